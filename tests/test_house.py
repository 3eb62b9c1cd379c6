"The law of the house: who may import whom, what a notebook looks like, and that asibkd/ is printed from nbs/."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
numbered = sorted(f for f in (root/'nbs').glob('*.ipynb') if re.match(r'\d\d', f.name))
every = sorted((root/'nbs').rglob('*.ipynb'))

def cells(f): return json.loads(f.read_text(encoding='utf-8'))['cells']
def code(f): return [''.join(c['source']) for c in cells(f) if c['cell_type'] == 'code']
def module(f): return re.search(r'#\|\s*default_exp (\w+)', '\n'.join(code(f))).group(1)
order = {module(f): f.name.split('_')[0] for f in numbered}

def imports(src):
    "Modules of the package that a piece of source imports, and whether by star"
    for node in ast.walk(ast.parse(src)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('asibkd'):
            star = any(a.name == '*' for a in node.names)
            if node.module == 'asibkd': yield from ((a.name, star) for a in node.names)
            else: yield node.module.split('.')[1], star
        if isinstance(node, ast.Import):
            yield from ((a.name.split('.')[1], False) for a in node.names if a.name.startswith('asibkd.'))

def clean(src): return '\n'.join(o for o in src.splitlines() if not o.lstrip().startswith(('%', '!')))

@pytest.mark.parametrize('f', numbered, ids=lambda f: f.name)
def test_imports_only_smaller_numbers(f):
    mine = f.name.split('_')[0]
    for src in code(f):
        for name, star in imports(clean(src)):
            assert not star, f'{f.name}: star import of asibkd.{name}'
            assert name in order, f'{f.name} imports asibkd.{name}, which no notebook exports'
            assert order[name] < mine, f'{f.name} imports asibkd.{name} ({order[name]}), which is not below it'

@pytest.mark.parametrize('f', every, ids=lambda f: f.name)
def test_hygiene(f):
    nb = json.loads(f.read_text(encoding='utf-8'))
    assert nb['metadata']['kernelspec'] == dict(display_name='python3', language='python', name='python3')
    ids = [c['id'] for c in nb['cells']]
    assert len(set(ids)) == len(ids), 'cell ids must be there and be unique'
    assert f.stat().st_size < 150_000
    assert not any(k.startswith('image/') or 'widget' in k for c in nb['cells'] for o in c.get('outputs', []) for k in o.get('data', {})), 'no committed images or widget state'
    assert all(c.get('execution_count') is None for c in nb['cells'])

@pytest.mark.parametrize('f', numbered, ids=lambda f: f.name)
def test_chapter(f):
    "Opening in order, imports alone in their cell, the right length, everything shown"
    cs = cells(f)
    assert cs[0]['cell_type'] == 'markdown' and re.match(r'# \w+\n\n> \S', ''.join(cs[0]['source'])), 'opens with `# name` and `> one line`'
    assert '#| default_exp' in ''.join(cs[1]['source'])
    assert 'nbdev_export()' in ''.join(cs[-1]['source'])
    assert len(cs) <= 95, f'{len(cs)} cells: split it'
    for c in cs:
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or not re.match(r'#\|\s*export', src): continue
        body = ast.parse(clean(src)).body
        if isinstance(body[0], (ast.Import, ast.ImportFrom)):
            assert all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body), f'an import cell holds more than imports: {src[:80]}'
    exported = [(i, ''.join(c['source'])) for i, c in enumerate(cs) if c['cell_type'] == 'code' and re.match(r'#\|\s*export', ''.join(c['source']))]
    names = [n.name for _, s in exported for n in ast.parse(clean(s)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]
    assert len(set(names)) == len(names), 'one definition per exported name'

def test_no_name_exported_twice():
    seen = {}
    for f in sorted((root/'asibkd').glob('*.py')):
        m = re.search(r'__all__ = \[(.*?)\]', f.read_text(encoding='utf-8'), re.S)
        for name in re.findall(r"'(\w+)'", m.group(1) if m else ''):
            assert name not in seen, f'{name} is exported by {seen[name]} and {f.name}'
            seen[name] = f.name

def test_export_is_current(tmp_path):
    "asibkd/*.py is what nbdev prints from nbs/"
    pytest.importorskip('nbdev')
    for d in ('nbs', 'asibkd'): shutil.copytree(root/d, tmp_path/d, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', 'results', 'checkpoints'))
    for f in ('settings.ini', '_quarto.yml', 'README.md'): shutil.copy(root/f, tmp_path/f)
    subprocess.run([sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()'], cwd=tmp_path, check=True, capture_output=True)
    for d in (root/'asibkd', tmp_path/'asibkd'):
        assert {f.name for f in d.glob('*.py')} == {'__init__.py', '_modidx.py', *(f'{m}.py' for m in order)}, 'a deleted notebook left its module behind'
    for f in (root/'asibkd').glob('*.py'): assert f.read_text(encoding='utf-8') == (tmp_path/'asibkd'/f.name).read_text(encoding='utf-8'), f'{f.name}: run nbdev_export'

def test_parameters_tag():
    "Without papermill's tag, -p would be silently ignored"
    tags = [t for c in cells(root/'nbs'/'run_experiment.ipynb') for t in c['metadata'].get('tags', [])]
    assert tags == ['parameters']

def test_runs_with_any_fastcore():
    "fastcore 1.12 and 2.x differ; the package itself imports neither (the notebooks' tests use the one that nbdev needs)"
    for f in (root/'asibkd').glob('*.py'): assert 'fastcore' not in f.read_text(encoding='utf-8')

def test_every_module_imports():
    subprocess.run([sys.executable, '-c', '; '.join(f'import asibkd.{m}' for m in reversed(order))], check=True, cwd=root)

def test_presets_resolve():
    from asibkd.core.config import list_presets, resolve
    assert {'quickstart', 'base', 'res152_effi_l2'} <= set(list_presets())
    for p in list_presets(): resolve(preset=p)

def test_sidebar():
    "The documentation lists every notebook: chapters in reading order, then doors and studies"
    import yaml
    first, chapters, doors = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    assert chapters['contents'] == sorted(f.name for f in (root/'nbs').glob('[0-9]*.ipynb'))
    here = {str(f.relative_to(root/'nbs')) for d in ('', 'bench') for f in (root/'nbs'/d).glob('*.ipynb')}
    assert {first, *chapters['contents'], *doors['contents']} == here
