"""Teachers who know different classes: named by parameters, files and modules; `asibkd merge`."""
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from asibkd.core.config import CheckpointError, ConfigError
from asibkd.run.experiment import run_experiment

pytestmark = pytest.mark.usefixtures('short_exam')
TINY = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, data_aug=0, train_per_class=8, val_frac=.25, teacher1_type='mlp', teacher2_type='mlp', student_type='mlp',
            method='avgz', epochs=1, finetune_epochs=1, compare=0, report=0, log_level='WARNING')

def run(tmp_path, **kw):
    return run_experiment(**TINY | dict(results_dir=str(tmp_path/'results')) | kw)

def test_specialists_by_parameter(tmp_path):
    "Each is fine-tuned on its classes, and its file says which: named as a checkpoint, it needs no parameter"
    s = run(tmp_path, teacher1_classes='0,1,2,3,4', teacher2_classes=[5, 6, 7, 8, 9])
    assert [s['weights'][f'teacher{i}']['classes'] for i in (1, 2)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    files = {f'teacher{i}_ckpt': str(Path(s['run'])/f'teacher{i}.pth') for i in (1, 2)}
    again = run(tmp_path, finetune_epochs=0, **files)
    assert [o['classes'] for o in again['weights'].values()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    acc = {k: {r['key']: r['test_acc_val_selected'] for r in o['rows']} for k, o in dict(a=s, b=again).items()}
    assert all(acc['a'][k] == acc['b'][k] for k in ('teacher1', 'teacher2', 'average'))
    assert acc['a']['teacher1'] <= .55                        # it cannot name the other half
    with pytest.raises(CheckpointError, match='in this order'):
        run(tmp_path, finetune_epochs=0, **files, teacher1_classes='4,3,2,1,0')

def test_three_of_any_overlap(tmp_path, capsys):
    "Three teachers, overlapping, and a class that none of them knows: it is learnt from labels"
    s = run(tmp_path, teachers='mlp,mlp,mlp', teacher_classes='["0,1,2,3", "3,4,5", "5,6,7,8"]')
    assert [o['classes'] for o in s['weights'].values()] == [[0, 1, 2, 3], [3, 4, 5], [5, 6, 7, 8]]
    assert 'no teacher knows 9: distillation compares the other 9 classes' in capsys.readouterr().out
    for kw, message in ((dict(teacher_classes='["0,1", "2,3", "4,5"]'), 'has 3 lists, the run has 2 teachers'), (dict(teacher1_classes='0,1,1'), "names '1' twice"),
                        (dict(teacher1_classes='0,1,cat'), "to learn.*'cat'"), (dict(teacher1_classes='0,1', overlap_pct=0), 'Leave one of both out'),
                        (dict(teacher1_classes='0,1', method='dkd'), 'needs teachers that know every class: teacher1 knows 2 of 10')):
        with pytest.raises(ConfigError, match=message): run(tmp_path, **kw)

def linear(n, classes=None):
    m = nn.Sequential(nn.Flatten(), nn.Linear(192, n))
    if classes: m.classes = classes
    return m

def test_own_modules(tmp_path, capsys):
    "A module says what its outputs stand for; one output that the data lack is left out; the width alone is refused with the name of the parameter"
    torch.manual_seed(0)
    mods = [linear(4, ['0', '1', 'cow', '2']), linear(7, list(range(3, 10)))]
    s = run(tmp_path, teachers=mods, student=linear(10), finetune_epochs=0, log_level='INFO')
    assert s['weights']['teacher1'] | dict(norm=None) == dict(source='given', file='', classes=[0, 1, 2], outputs=[0, 1, -1, 2], norm=None)
    assert "knows 3 of the data's 10 classes (0, 1, 2); left out: cow, which the data do not have" in capsys.readouterr().out
    with pytest.raises(ConfigError, match='has 4 outputs, the data have 10 classes.*teacher1_classes='): run(tmp_path, teachers=[linear(4), mods[1]], finetune_epochs=0)
    with pytest.raises(ConfigError, match='Name one for each output'): run(tmp_path, teachers=[linear(4), mods[1]], finetune_epochs=0, teacher1_classes='0,1,2')
    given = run(tmp_path, teachers=[linear(4), mods[1]], student=linear(10), finetune_epochs=0, teacher1_classes='0,1,cow,2')
    assert given['weights']['teacher1']['outputs'] == [0, 1, -1, 2]
