"What goes wrong at a user's: each fault stops with a message that names it, and loses nothing."
import json, os, pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from asibkd.core.config import CheckpointError, Config, ConfigError, DataError, RunError, resolve
from asibkd.core.runfolder import Run
from asibkd.data.datasets import create_data
from asibkd.run.experiment import run_experiment
from asibkd.models.students import create_student
from asibkd.models.checkpoints import load_into, load_weights
from asibkd.models.teachers import create_teacher

root = Path(__file__).parents[1]

# --- parameters ---------------------------------------------------------------------------------------------------
def test_misspelt_at_the_papermill_door(notebook):
    r = notebook('o.ipynb', '-p', 'cl_mdoe', 1)
    assert r.returncode != 0 and "Did you mean 'cl_mode'" in r.stderr + r.stdout

def test_misspelt_on_the_command_line(asibkd):
    r = asibkd('run', '--cl_mdoe', 1)
    assert r.returncode == 2 and "Did you mean 'cl_mode'" in r.stderr and 'Traceback' not in r.stderr

@pytest.mark.parametrize('bad, says', [
    (dict(tau_start=0), 'greater than 0'), (dict(val_frac=1.5), "'val_frac' = 1.5"), (dict(data_aug='strong'), "'data_aug' = 'strong'"),
    (dict(dataset='cifar11'), "Did you mean 'cifar10'"), (dict(method='asbm'), "Did you mean 'asmb'"), (dict(method='dkd', overlap_pct=0), 'every class'), (dict(teacher1_type='resnt20'), "Did you mean 'resnet"),
    (dict(student_type='no_such_net_at_all'), "Unknown"), (dict(preset='quikstart'), "Did you mean 'quickstart'"), (dict(cl_mode=1, num_stages=3), 'num_stages=1'), (dict(cl_mode=1, cl_method='icral'), "Did you mean 'icarl'"), (dict(cl_mode=1, num_tasks=11), 'at most 10'), (dict(student_freeze_level=3), "student_freeze_level"), (dict(mbm_n_head=64), 'mbm_n_head')])
def test_bad_values(tiny, bad, says):
    with pytest.raises(ValueError, match='(?s)' + says) as e: run_experiment(**tiny | bad)
    assert not list(Path(tiny['results_dir']).glob('*/summary.json'))

# --- data ---------------------------------------------------------------------------------------------------------
def data(root_, **kw): return create_data(Config(dataset='imagefolder', data_root=str(root_), device='cpu', num_workers=0, val_frac=.25, **kw))

def test_data_root_missing_or_empty(tmp_path):
    with pytest.raises(DataError, match='nowhere'): data(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='empty'): data(tmp_path/'empty')

def test_corrupt_image(folder):
    d = folder(train=8, test=2)
    (d/'train'/'dog'/'003.png').write_bytes(b'not a picture')
    with pytest.raises(DataError, match='003.png'): data(d)
    got = data(d, skip_corrupt=1)
    assert len(got.train) + len(got.val) == 15 and '1' in str(got.notes)

def test_class_without_test_image(folder):
    d = folder(train=8, test=2)
    for f in (d/'test'/'dog').iterdir(): f.unlink()
    with pytest.raises(DataError, match='dog'): data(d)

def test_labels_out_of_range():
    class Ds(torch.utils.data.Dataset):
        classes = ['a', 'b']
        def __len__(self): return 20
        def __getitem__(self, i): return torch.zeros(3, 8, 8, dtype=torch.uint8), 7 if i == 5 else i % 2
    with pytest.raises(DataError, match='7'): create_data(Config(), train=Ds(), test=Ds())

# --- checkpoints --------------------------------------------------------------------------------------------------
def test_checkpoint_of_another_architecture(tmp_path, tiny):
    torch.save({'model': create_student('resnet14', n_class=10, img_size=8, small_input=True).state_dict()}, tmp_path/'t.pth')
    with pytest.raises(CheckpointError, match='t.pth'): run_experiment(**tiny, teacher1_ckpt=str(tmp_path/'t.pth'))

def test_pickle_that_would_run_code(tmp_path, tiny):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/harm',)
    with open(tmp_path/'evil.pth', 'wb') as f: pickle.dump({'w': Evil()}, f)
    torch.save({'model': Evil()}, tmp_path/'evil2.pth')
    for f in ('evil.pth', 'evil2.pth'):
        with pytest.raises(CheckpointError, match=f): run_experiment(**tiny, teacher1_ckpt=str(tmp_path/f))
    assert not (tmp_path/'harm').exists()

def test_missing_checkpoint(tiny):
    with pytest.raises(CheckpointError, match='nowhere.pth'): run_experiment(**tiny, teacher1_ckpt='nowhere.pth')

def test_damaged_run_checkpoint(tiny, caplog):
    "It is named and set aside, and its phase is repeated"
    s = Path(tiny['results_dir'])/'a'/'checkpoint'; s.mkdir(parents=True)
    (s/'finetune-teacher1.pt').write_bytes(b'\x80garbage')
    run = run_experiment(**tiny, exp_id='a')['run']
    assert Path(run, 'summary.json').exists()

# --- the run ------------------------------------------------------------------------------------------------------
class Fragile(torch.nn.Module):
    "A small network of the user's own that can be made to answer NaN"
    broken = False
    def __init__(self): super().__init__(); self.body, self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8)), torch.nn.Linear(8, 10)
    def forward(self, x): return self.head(self.body(x))*(float('nan') if Fragile.broken else 1.)

def test_nan_stops_and_keeps_the_last_checkpoint(tiny, monkeypatch):
    monkeypatch.setattr(Fragile, 'broken', False)
    def poison(row): Fragile.broken = row['phase'] == 'B1'
    with pytest.raises(RunError, match=r'phase B1, epoch 2, step 1') as e:
        run_experiment(**tiny | dict(method='ce', student_epochs_per_stage='3'), student=Fragile(), callbacks=[poison])
    run = next(Path(tiny['results_dir']).glob('ce-*'))
    kept = torch.load(run/'checkpoint'/'B1.part.pt', weights_only=True)
    assert kept['epoch'] == 1 and not (run/'summary.json').exists() and str(run) in str(e.value)

def test_own_modules_stay_as_they_were(tiny):
    "The same call with the same objects finds the same run again, interrupted or finished; other images are another run"
    st, te = Fragile(), Fragile()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (st, te)]
    args = dict(**tiny, student=st, teachers=[te, 'resnet8'])
    class Stop(Exception): pass
    def stop(row):
        if row['phase'] == 'B1': raise Stop()
    with pytest.raises(Stop): run_experiment(**args, callbacks=[stop])
    a = run_experiment(**args); assert run_experiment(**args) == a and len(list(Path(tiny['results_dir']).glob('asmb-*'))) == 1
    assert all(torch.equal(v, m.state_dict()[k]) for m, old in zip((st, te), before) for k, v in old.items())
    data = lambda shift: [(torch.full((3, 8, 8), (20*i + shift) % 256, dtype=torch.uint8), i % 4) for i in range(40)]
    x, y = (run_experiment(**tiny | dict(method='ce', batch_size=8), train=data(s), test=data(0))['run'] for s in (0, 5))
    assert x != y

@pytest.mark.parametrize('bad, says', [(dict(student_type='resnt8'), "Did you mean"), (dict(teacher2_type='resnt8'), 'Did you mean'), (dict(method='fitnet', hint_layer=9), 'hint_layer=9'), (dict(mbm_r=1000), 'mbm_r'),
    (dict(teacher1_freeze_scope='nowhere'), 'matches nothing'), (dict(synergy_base='none', teacher_adapt_epochs=0), 'untrained head')])
def test_refused_before_anything_is_trained(tiny, bad, says):
    rows = []
    with pytest.raises(ConfigError, match=says): run_experiment(**tiny | dict(compare=1) | bad, callbacks=[rows.append])
    assert not rows

def test_teachers_of_a_wrong_shape(tiny):
    with pytest.raises(ConfigError, match='at least one teacher'): run_experiment(**tiny, teachers=[])
    s = run_experiment(**tiny, teachers=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)))      # one module is one teacher
    assert [r['key'] for r in s['rows'] if r['role'] == 'teacher'] == ['teacher1']

def test_one_teacher_methods_hear_the_same_one(tiny):
    "With compare=1 every single-teacher row has the same teacher; teacher_type names it"
    s = run_experiment(**tiny | dict(compare=1, method='fitnet', teacher_type='resnet8'))
    by = {r['key']: r.get('target') for r in s['rows']}
    assert by['fitnet'] == by['vanilla_kd'] and by['fitnet']['logits'] == ['teacher1'] and next(r for r in s['rows'] if r['key'] == 'teacher1')['model'] == 'resnet8'
    by = {r['key']: r.get('target') for r in run_experiment(**tiny | dict(compare=1, method='fitnet'))['rows']}; assert by['fitnet'] == by['vanilla_kd']

def test_commands_after_a_fine_tuning(asibkd):
    "A folder with nothing but a fine-tuned teacher has no table, and says so"
    assert asibkd('finetune', 'train_per_class=12', 'finetune_epochs=1', 'device=cpu').returncode == 0
    for cmd in ('compare', 'show', 'export'):
        r = asibkd(cmd); assert r.returncode == 2 and 'No finished run' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    r = asibkd('run', 'mbm_r=1000'); assert r.returncode == 2 and 'Traceback' not in r.stderr
    r = asibkd('run', 'exp_id=..'); assert r.returncode == 2 and 'exp_id' in r.stderr

def test_results_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path/'file').write_text('')
    for bad in (tmp_path/'file'/'results', '/proc/results'):
        with pytest.raises(RunError, match='cannot be written'): run_experiment(**tiny | dict(results_dir=str(bad)))

def test_full_disk(tmp_path, door):
    "A limit on file size stands in for a full disk: the same system call fails. The run stops with a message, and goes on when there is room"
    args = [f'{k}={v}' for k, v in dict(preset='quickstart', device='cpu', compare=0, train_per_class=12, finetune_epochs=1, teacher_adapt_epochs=1, student_epochs_per_stage=1,
            num_stages=1, report=0, results_dir=tmp_path/'r', exp_id='a').items()]
    r = door('run', *args, cwd=root, largest=200_000)
    assert r.returncode == 2 and 'Is the disk full' in r.stderr and 'Traceback' not in r.stderr, r.stderr[-800:]
    assert not (tmp_path/'r'/'a'/'summary.json').exists() and not list((tmp_path/'r'/'a').rglob('*.tmp'))
    r = door('run', *args, cwd=root)
    assert r.returncode == 0, r.stderr[-800:]

def test_two_runs_with_one_name(tiny):
    cfg, extra = resolve(**tiny | dict(exp_id='a'))
    with Run(cfg, extra):
        with pytest.raises(RunError, match='another process'): run_experiment(**tiny, exp_id='a')
    run_experiment(**tiny, exp_id='a')
    with pytest.raises(RunError, match='seed: 42 → 1'): run_experiment(**tiny, exp_id='a', seed=1)
    assert run_experiment(**tiny, exp_id='a')['seed'] == 42
