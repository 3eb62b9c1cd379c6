"A file of one's own (`plugin=mine.py`) gives methods, models and datasets a name at every door."
import copy, html, json, re, shlex, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
MINE = '''
import torch
from pydantic import BaseModel, Field
from torch import nn
from torchvision.datasets import FakeData
from asibkd import Method, register_dataset, register_method, register_model, weighted

class Mine(BaseModel, extra='forbid'):
    sharpness:float = Field(2., description='How much the surest teacher is preferred.')

@register_method('surest', Mine)
class Surest(Method):
    "Image by image, learn from the teacher that is surest of itself"
    def loss(self, batch, s_out, t_outs, when):
        z = torch.stack([o['logit'] for o in t_outs])
        best = z.softmax(-1).amax(-1).argmax(0)
        kd = self.kd_term(s_out['logit'], z[best, torch.arange(len(best))], when)
        return weighted(ce=(1., self.hard_ce(batch, s_out)), kd=(self.params.sharpness, kd))

@register_model('tiny_net')
def tiny_net(n_class=10): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, n_class))

@register_dataset('colours')
def colours(cfg): return dict(train=FakeData(60, (3, 16, 16), 3), test=FakeData(30, (3, 16, 16), 3))
'''
SHORT = ['--plugin', 'mine.py', '--method', 'surest', 'dataset=colours', 'teacher1_type=tiny_net', 'teacher2_type=mlp', 'student_type=tiny_net', 'small_input=0', 'compare=0', 'finetune_epochs=1', 'student_epochs_per_stage=1', 'num_stages=1', 'device=cpu', 'batch_size=16']

@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path/'mine.py').write_text(MINE); monkeypatch.chdir(tmp_path)
    return tmp_path/'mine.py'

@pytest.fixture
def here(door): return lambda *argv: door(*argv, cwd=Path.cwd())

def test_every_door(mine, here, notebook):
    "In fresh processes: a run, its help, the command its report gives, papermill"
    r = here('run', *SHORT, '--sharpness', '3'); assert r.returncode == 0, r.stderr[-2000:]
    run, = (f.parent for f in Path('results').glob('*/summary.json')); s = json.loads((run/'summary.json').read_text())
    assert (s['method_params'], s['dataset'], s['n_class']) == ({'sharpness': 3.0}, 'colours', 3)
    h = here('run', '--plugin=mine.py', '--help').stdout; assert 'How much the surest teacher is preferred. [2.0]' in h and 'Of method=surest' in h
    command = html.unescape(re.search(r'asibkd (run [^<]*method=surest[^<]*)', (run/'report.html').read_text())[1])
    again = here(*shlex.split(command)); assert again.returncode == 0 and 'nothing was run again' in again.stdout, again.stderr[-1000:]
    same = here('run', '-f', str(run/'config.json')); assert same.returncode == 0 and 'nothing was run again' in same.stdout, same.stderr[-1000:]
    other = here('run', '-f', str(run/'config.json'), 'seed=1007'); assert other.returncode == 2 and 'seed: ' in other.stderr and ' → 1007' in other.stderr
    r = notebook('out.ipynb', *(o for k in SHORT[4:] for o in ('-p', *k.split('='))), '-p', 'plugin', 'mine.py', '-p', 'method', 'surest', '-p', 'results_dir', 'pm')
    assert r.returncode == 0, r.stderr[-2000:]
    assert json.loads(next(Path('pm').glob('*/summary.json')).read_text())['method'] == 'surest'

def test_an_edited_method_is_another_run(mine, monkeypatch):
    from asibkd.core import config as core
    from asibkd.distil import methods
    from asibkd.run.experiment import run_experiment
    monkeypatch.setattr(methods, 'methods', copy.copy(methods.methods)); monkeypatch.setattr(core, 'method_params', core.method_params)
    given = dict(o.removeprefix('--').split('=') for o in SHORT[4:]) | dict(plugin='mine.py', method='surest', log_level='ERROR')
    a = run_experiment(**given); assert run_experiment(**given)['run'] == a['run']
    mine.write_text(MINE.replace('"Image by image', '# a remark\n    "Image by image')); assert run_experiment(**given)['run'] == a['run']
    mine.write_text(MINE.replace('ce=(1.,', 'ce=(7.,')); b = run_experiment(**given)
    loss = lambda s: json.loads((Path(s['run'])/'metrics.jsonl').read_text().splitlines()[-1])['train_loss']
    assert b['run'] != a['run'] and loss(b) > 2*loss(a)

def test_refusals(mine):
    from asibkd.core.config import ConfigError, resolve
    with pytest.raises(ConfigError, match="plugin='yours.py': no such file"): resolve(plugin='yours.py')
    with pytest.raises(ConfigError, match='plugin=FILE.py names the file'): resolve(method='surest_of_all', sharpnes=3)
    mine.write_text('import no_such_module_at_all')
    with pytest.raises(ConfigError, match="plugin='mine.py' failed: ModuleNotFoundError"): resolve(plugin='mine.py')
