"README.md is index.ipynb, rendered: `python nbs/_readme.py` writes it, `--check` says whether it is current."
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

here = Path(__file__).parent

def render()->str:
    "index.ipynb as Markdown: hidden cells out, directives out, pictures found from the top of the project"
    nb = nbformat.read(here/'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and re.match(r'\s*#\|\s*hide\b', c.source))]
    for c in nb.cells:
        if c.cell_type == 'code':
            mute = re.search(r'#\|\s*echo:\s*false', c.source)       # its output alone is for the reader
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            for o in c.outputs: o.get('data', {}).pop('text/html', None)
            if mute:
                c.cell_type, c.source = 'markdown', '\n\n'.join(o.data['text/markdown'] for o in c.outputs)
                for k in ('outputs', 'execution_count'): c.pop(k)
    nb.metadata['language_info'] = dict(name='python')                   # so that code blocks are coloured
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'(\]\(|src=")images/', r'\1nbs/images/', text)
    text = re.sub(r'\]\(([\w/]+\.ipynb)', r'](nbs/\1', text)
    return '<!-- Written by nbs/_readme.py from nbs/index.ipynb: edit that. -->\n\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__':
    out, text = here.parent/'README.md', render()
    if '--check' in sys.argv:
        if out.read_text(encoding='utf-8') != text: sys.exit('README.md is not what nbs/index.ipynb renders to: run `python nbs/_readme.py`.')
    else: out.write_text(text, encoding='utf-8')
