"A ready teacher is asked about augmented images before a student believes it."
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from asibkd.core.config import resolve
from asibkd.data.batches import normalise
from asibkd.data.datasets import create_data
from asibkd.run.experiment import run_experiment

TINY = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=32, train_per_class=60, val_frac=.5, student_type='mlp', method='vanilla_kd', epochs=1, finetune_epochs=0, compare=0)

def by_the_pixel():
    "A linear network that knows digits where they stand, and not a pixel further: least squares on the images as they are"
    data = create_data(resolve(**TINY, data_aug='0')[0])
    x = normalise(data.train.images(torch.arange(len(data.train))), data.mean, data.std).flatten(1)
    net = nn.Linear(x.shape[1], 10)
    a = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    w = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1]), a.T @ (10*nn.functional.one_hot(data.train.y, 10).double()))
    with torch.no_grad():
        net.weight.copy_(w[:-1].T)
        net.bias.copy_(w[-1])
    return nn.Sequential(nn.Flatten(), net)

@pytest.mark.parametrize('aug', ['standard', '0'])
def test_a_teacher_that_does_not_know_the_views(tmp_path, capsys, aug):
    "Said before the training, in the summary and in the report; with plain images there is nothing to say"
    s = run_experiment(**TINY, teachers=[by_the_pixel()], data_aug=aug, results_dir=str(tmp_path))
    said = capsys.readouterr().out.count('DOES NOT KNOW THE AUGMENTED IMAGES')
    page = (Path(s['run'])/'report.html').read_text()
    assert ('DOES NOT KNOW THE AUGMENTED IMAGES' in page) == (aug == 'standard') and (said > 0) == (aug == 'standard')
    if aug == 'standard':
        plain, seen, n = json.loads((Path(s['run'])/'summary.json').read_text())['views']['teacher1']
        assert plain > .8 and seen < plain - .2 and n == 300

def test_a_teacher_of_this_run_is_not_asked(tmp_path, capsys):
    "It learns from augmented images itself"
    s = run_experiment(**TINY | dict(finetune_epochs=1, teacher1_type='mlp', teacher2_type='', report=0), data_aug='standard', results_dir=str(tmp_path))
    assert 'DOES NOT KNOW' not in capsys.readouterr().out and 'views' not in s
