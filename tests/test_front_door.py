"What `import asibkd` and the command cost, and what they offer. No clock: what must not be imported is named."
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

import asibkd

root = Path(__file__).parents[1]
HEAVY = ['torch', 'numpy', 'pandas', 'matplotlib', 'scipy', 'sklearn', 'torchvision', 'timm', 'accelerate', 'IPython', 'ipywidgets', 'PIL']

def loaded(code, *argv, **kw):
    "Heavy packages in memory after `code`, in a process of its own"
    code += f'\nimport json, sys; print("LOADED", json.dumps([m for m in {HEAVY} if m in sys.modules]))'
    r = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)}, **kw)
    assert r.returncode == 0, r.stderr
    return json.loads(re.search('LOADED (.*)', r.stdout)[1]), r.stdout

@pytest.mark.parametrize('code', ['import asibkd; dir(asibkd)', 'import asibkd.run.cli', 'import asibkd.core.config, asibkd.core.files, asibkd.core.runfolder', 'from asibkd import Config, resolve; resolve()',
                                  'import asibkd.analysis.tables, asibkd.analysis.cl, asibkd.analysis.notes'])
def test_light(code):
    assert loaded(code)[0] == []

def test_a_comparison_needs_no_torch(): assert 'torch' not in loaded('import asibkd.analysis.report')[0]

def test_asibkd_alone_imports_nothing():
    code = 'import sys; before = {*sys.modules}\nimport asibkd; assert {*sys.modules} - before == {"asibkd"}, {*sys.modules} - before'
    assert loaded(code)[0] == []

COMMAND = 'import sys; from asibkd.run.cli import main; main(sys.argv[1:])'

def test_help_and_show_are_light(tiny, tmp_path):
    heavy, out = loaded(COMMAND, '--help'); assert heavy == [] and 'asibkd COMMAND' in out
    for given in (dict(compare=1), dict(cl_mode=1, num_tasks=2, epochs=1, cl_method='er', student_type='mlp', replay_capacity=20)):
        run = asibkd.run_experiment(**tiny | given)['run']
        heavy, out = loaded(COMMAND, 'show', run)
        assert heavy == [] and 'Everything is in' in out and ('R, class-IL' in out) == ('cl_mode' in given)

def test_run_speaks_before_torch(tmp_path):
    "The first line of a run is written when nothing heavy is in memory; a plugin is not run for it"
    code = 'import sys\nfrom asibkd.run import commands\ncommands.announce("", dict(method="dkd", seed="7", plugin="nowhere.py"))'
    heavy, out = loaded(code); assert heavy == [] and 'dkd on digits, seed 7, preset quickstart' in out
    code = 'import sys\nfrom asibkd.run import commands\ncommands.announce("", dict(log_level="WARNING"))'
    assert 'digits' not in loaded(code)[1]

def test_python_m_asibkd(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'asibkd', 'rum'], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(root)})
    assert r.returncode == 2 and "Did you mean 'run'?" in r.stderr

@pytest.mark.parametrize('name', asibkd.__all__)
def test_every_name_resolves(name):
    value = getattr(asibkd, name)
    assert name in dir(asibkd) and getattr(asibkd, name) is value
    assert value.__doc__ and value.__module__.startswith('asibkd.')

def test_no_name_is_a_wing():
    "A module of the same name would take the place of the function"
    assert not {*asibkd.__all__} & {f.stem for f in (root/'asibkd').iterdir()}

def test_the_lists_show_everything():
    "Whatever was imported before: the methods of all chapters, networks, datasets, presets"
    code = 'import asibkd, json; print("LISTS", json.dumps({k: getattr(asibkd, k)() for k in dir(asibkd) if k.startswith("list_")}))'
    lists = json.loads(re.search('LISTS (.*)', loaded(code)[1])[1])
    assert {'asmb', 'crd', 'ce', 'vanilla_kd', 'avgz', 'dkd', 'fitnet', 'at', 'rkd', 'aver', 'aekd', 'camkd', 'ebkd', 'fitnet_mkd'} <= {*lists['list_methods']}
    assert {'asib', 'er', 'derpp', 'ewc', 'si', 'joint', 'naive'} <= {*lists['list_cl_methods']}
    assert 'resnet20' in lists['list_teachers'] and 'mlp' in lists['list_students'] and 'digits' in lists['list_datasets'] and 'quickstart' in lists['list_presets']

def test_an_unknown_name():
    with pytest.raises(AttributeError, match="Did you mean 'run_experiment'"): asibkd.run_experimant
    with pytest.raises(AttributeError, match="has no attribute 'xyzzy'"): asibkd.xyzzy
    with pytest.raises(ImportError): from asibkd import run_experimant
