"The law of the house: who may import whom, what a notebook looks like and shows, and that asibkd/ is printed from nbs/."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'nbs'))
import _measure as book

chapters = book.chapters()
every = sorted((root/'nbs').rglob('*.ipynb'))
modules = book.modules()
by_name = dict(ids=book.name)

@pytest.fixture(scope='module')
def m(): return book.measure()

def none(found): assert not found, '\n' + '\n'.join(found[:20])

# The law

def test_twelve_wings(m):
    assert m['wings'] == 12
    for module, f in modules.items():
        assert book.name(f).split('/')[0].removesuffix('.ipynb')[3:] == module.split('.')[0], f'{f.name} is not in the wing of {module}'

def test_imports_only_smaller_numbers(m):
    "No star, no cycle, nothing upward: in demos and tests too"
    none(m['upward'])

def test_every_import_exists():
    known = {*modules, *(o.split('.')[0] for o in modules), '', 'asibkd'}
    for f in every:
        for c in book.cells(f):
            if book.is_code(c):
                for o, _ in book.imports(book.source(c), modules):
                    assert o in known, f'{book.name(f)} imports asibkd.{o}, which no notebook exports'

def test_no_name_exported_twice():
    seen = {}
    for f in sorted((root/'asibkd').rglob('*.py')):
        all_ = re.search(r'^__all__ = \[(.*?)\]', f.read_text(encoding='utf-8'), re.S | re.M)
        for name in re.findall(r"'(\w+)'", all_[1] if all_ else ''):
            assert name not in seen, f'{name} is exported by {seen[name]} and {f.name}'
            seen[name] = f.name

# The code

def test_defining_cells_are_small(m):
    none(m['long_cells'])
    assert m['median'] <= 12 and m['p90'] <= 30 and m['longest'] <= 45

def test_one_idea_a_line(m):
    none(m['wide'])
    assert len(m['second_statements']) <= 20, m['second_statements']

def test_public_names_have_docstrings(m): none(m['undocumented'])

def test_every_definition_is_shown(m): none(m['not_shown'])

# The book

def test_the_book_shows_what_it_builds(m):
    assert m['demo_cells_shown'] >= .6*m['demo_cells']
    none(m['little_shown'])
    none(m['blank'])

def test_pictures(m):
    assert m['with_picture'] >= 30
    none(m['large_pictures'])

def test_outputs_say_nothing_that_changes(m):
    "No path, clock time, memory address, warning, traceback, log or progress bar"
    none(m['bad_outputs'])

def test_sizes(m):
    none(m['long_notebooks'])
    none(m['large_notebooks'])

def test_the_guard_would_notice(tmp_path):
    "The guards above can fail: each of these outputs is refused"
    def cell(text): return dict(cell_type='code', source='1', outputs=[dict(output_type='stream', name='stdout', text=text)])
    for text in ('/tmp/tmpabc/run', '<object at 0x7f3a2b4c5d6e>', 'at 12:31:07', 'UserWarning: no', 'Traceback (most recent call last)', ' 50%|█████     | 5/10'):
        f = book.here/'00_core'/'guard.ipynb'      # a name for the message; nothing is written
        assert any(r.search(book.output_text(cell(text))) for r in book.BAD_OUTPUT.values()), f'{text} passes in {f.name}'
    assert book.semicolons('a = 1; b = 2') and not book.semicolons('a = ";"')
    assert book.ends_in_a_value('x = 1\nx') and not book.ends_in_a_value('test_eq(1, 1)') and not book.ends_in_a_value('x = 1')

@pytest.mark.parametrize('f', every, **by_name)
def test_hygiene(f):
    nb = json.loads(f.read_text(encoding='utf-8'))
    assert nb['metadata']['kernelspec'] == dict(display_name='python3', language='python', name='python3')
    ids = [c['id'] for c in nb['cells']]
    assert len(set(ids)) == len(ids), 'cell ids must be there and be unique'
    assert not any('widget' in k for c in nb['cells'] for o in c.get('outputs', []) for k in o.get('data', {})), 'no committed widget state'
    assert all(c.get('execution_count') is None for c in nb['cells'])

@pytest.mark.parametrize('f', chapters, **by_name)
def test_chapter(f):
    "Opening in order, imports alone in their cell, one definition an exported name"
    cs = book.cells(f)
    assert cs[0]['cell_type'] == 'markdown' and re.match(r'# \w+\n\n> \S', book.source(cs[0])), 'opens with `# name` and `> one line`'
    assert '#| default_exp' in book.source(cs[1])
    assert 'nbdev_export()' in book.source(cs[-1])
    for s in book.exported(f):
        body = ast.parse(book.python(s)).body
        if isinstance(body[0], (ast.Import, ast.ImportFrom)):
            assert all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body), f'an import cell holds more than imports: {s[:80]}'
    names = [n.name for s in book.exported(f) for n in book.definitions(s)
             if not n.name.startswith('_') and not any('patch' in ast.unparse(d) for d in n.decorator_list)]
    assert len(set(names)) == len(names), 'one definition per exported name'

def test_parameters_tag():
    "Without papermill's tag, -p would be silently ignored"
    tags = [t for c in book.cells(root/'nbs'/'run_experiment.ipynb') for t in c['metadata'].get('tags', [])]
    assert tags == ['parameters']

# The package

def test_export_is_current(tmp_path):
    "asibkd/**/*.py is what nbdev prints from nbs/"
    pytest.importorskip('nbdev')
    skip = shutil.ignore_patterns('__pycache__', 'results', 'checkpoints', 'teacher_cache')
    for d in ('nbs', 'asibkd'): shutil.copytree(root/d, tmp_path/d, symlinks=True, ignore=skip)
    for f in ('settings.ini', '_quarto.yml', 'README.md'): shutil.copy(root/f, tmp_path/f)
    subprocess.run([sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()'], cwd=tmp_path, check=True, capture_output=True)
    by_hand = {'__init__.py', '__main__.py', '_modidx.py'}
    for d in (root/'asibkd', tmp_path/'asibkd'):
        here = {f.relative_to(d).as_posix() for f in d.rglob('*.py') if '__pycache__' not in f.parts}
        assert {f for f in here if f.split('/')[-1] not in by_hand} == {f"{o.replace('.', '/')}.py" for o in modules}, 'a deleted notebook left its module behind'
    for f in (root/'asibkd').rglob('*.py'):
        assert f.read_text(encoding='utf-8') == (tmp_path/f.relative_to(root)).read_text(encoding='utf-8'), f'{f.name}: run nbdev_export'

def test_runs_with_any_fastcore():
    "fastcore 1.12 and 2.x differ; the package uses `patch` alone, which both have"
    for f in (root/'asibkd').rglob('*.py'):
        for line in f.read_text(encoding='utf-8').splitlines():
            if re.match(r'\s*(from|import)\b.*\bfastcore\b', line):
                assert line.strip() in ('from fastcore.basics import patch', 'from fastcore.basics import patch_to'), f'{f.name}: {line}'

def test_every_module_imports():
    "Each alone, the highest first"
    names = ', '.join(f'asibkd.{o}' for o in reversed(modules))
    subprocess.run([sys.executable, '-c', f'import {names}'], check=True, cwd=root)

def test_presets_resolve():
    from asibkd import list_presets, resolve
    assert {'quickstart', 'base', 'res152_effi_l2'} <= set(list_presets())
    for p in list_presets(): resolve(preset=p)

def test_sidebar():
    "The documentation lists every notebook, the chapters in reading order"
    import yaml
    def listed(o):
        if isinstance(o, str): yield o
        for v in (o.get('contents', []) if isinstance(o, dict) else o if isinstance(o, list) else []): yield from listed(v)
    names = list(listed(yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']))
    assert [o for o in names if re.match(r'\d\d_', o)] == [book.name(f) for f in chapters]
    assert sorted(names) == sorted(book.name(f) for f in every)
