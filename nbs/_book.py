"""`make book`: run every chapter from a fresh kernel and store what its visible cells show.

    python nbs/_book.py [NOTEBOOK …] [--workers 2]     all chapters, or the named ones
"""
import argparse, os, re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

here = Path(__file__).resolve().parent
SKIP = re.compile(r'^\s*#\|\s*(slow|cuda|download|eval\s*:\s*false)', re.M | re.I)
HIDDEN = re.compile(r'^\s*#\|\s*(hide|export)', re.M)
WIDGET = 'application/vnd.jupyter.widget-view+json'
BARE_WIDGET = re.compile(r'''(VBox|HBox|Output|Tab)\(|\[?['"]?[^\n]*\d+%\|''')   # what is left of a widget or a progress bar

def chapters():
    "The numbered notebooks, in reading order"
    return sorted(f for f in here.rglob('*.ipynb') if re.match(r'\d\d', f.relative_to(here).as_posix()) and 'checkpoint' not in f.name)

def is_skipped(source):
    return bool(SKIP.search(source)) or 'nbdev_export()' in source

def keep(outputs):
    "What a reader sees: no log, no warning, no live widget"
    kept = []
    for o in outputs:
        if o.output_type == 'stream' and o.name == 'stderr':
            continue
        if 'data' in o:
            o.data.pop(WIDGET, None)
            if not o.data or set(o.data) == {'text/plain'} and BARE_WIDGET.match(str(o.data['text/plain'])):
                continue
            o.metadata = {}
        if 'execution_count' in o:
            o.execution_count = None
        kept.append(o)
    return kept

def run(f):
    "Execute one notebook and store its outputs; returns an error text, or ''"
    nb = nbformat.read(f, 4)
    sources = [c.source for c in nb.cells]
    for c in nb.cells:
        if c.cell_type == 'code' and is_skipped(c.source):
            c.source = ''
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1', 'PYTHONWARNINGS': 'ignore', 'IN_TEST': '1',
           'PYTHONPATH': os.pathsep.join(filter(None, [str(here.parent), os.environ.get('PYTHONPATH')]))}
    client = NotebookClient(nb, timeout=900, kernel_name='python3', extra_arguments=['--log-level=ERROR'], coalesce_streams=True,
                            resources={'metadata': {'path': str(f.parent)}})
    try:
        client.execute(env=env)
    except Exception as e:
        return f'{f.relative_to(here)}: {str(e)[-2500:]}'
    for c, source in zip(nb.cells, sources):
        c.source = source
        if c.cell_type == 'code':
            c.execution_count = None
            c.outputs = [] if HIDDEN.search(source) else keep(c.outputs)
            c.metadata.pop('execution', None)
    nb.metadata = {'kernelspec': dict(display_name='python3', language='python', name='python3')}
    text = nbformat.writes(nb, 4, indent=1, ensure_ascii=False, sort_keys=True)
    f.write_text(text.rstrip('\n') + '\n', encoding='utf-8')
    return ''

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='*', type=Path)
    p.add_argument('--workers', type=int, default=2)
    a = p.parse_args()
    files = [f.resolve() for f in a.notebooks] or chapters()
    with ThreadPoolExecutor(a.workers) as pool:
        failed = [e for e in pool.map(run, files) if e]
    print('\n\n'.join(failed) or f'{len(files)} notebooks ran; their outputs are stored.')
    sys.exit(bool(failed))
