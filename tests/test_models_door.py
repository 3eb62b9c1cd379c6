"Ten models nobody wrote code for, five timm CNNs, three timm transformers, one of torchvision, one plain `nn.Sequential`, teach and learn through the public door, unedited."
import os
from pathlib import Path

import pytest
import torchvision
from torch import nn

from asibkd.run.experiment import run_experiment

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

pytestmark = pytest.mark.usefixtures('tiny_exam')
MODELS = ['resnet10t', 'mobilenetv3_small_050', 'regnetx_002', 'convnext_atto', 'efficientnet_b0',
          'vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'swin_tiny_patch4_window7_224', 'torchvision', 'sequential']

def module(name):
    return {'torchvision': lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), 'sequential': plain}.get(name, lambda: name)()

SLOW = pytest.mark.skipif(os.environ.get('ASIBKD_SLOW') != '1', reason='one family of each kind is enough; set ASIBKD_SLOW=1')

@pytest.mark.parametrize('name', [pytest.param(m, marks=SLOW) if m not in ('mobilenetv3_small_050', 'deit_tiny_distilled_patch16_224', 'torchvision') else m for m in MODELS])
def test_twenty_steps_of_a_and_b(name, tmp_path):
    "20 steps of A (what is open in the teacher moves too) and of B, as teacher beside another and as student"
    s = run_experiment(teachers=[module(name), 'resnet8'], student=module(name), preset='method/asmb', bridge_objective='both', teacher1_freeze_level=1, dataset='digits', image_size=32, small_input=0,
        batch_size=2, train_per_class=5, val_frac=.2, num_stages=1, teacher_adapt_epochs=1, student_epochs_per_stage=1, data_aug='standard', device='cpu', report=0, results_dir=str(tmp_path), log_level='ERROR')
    assert len((Path(s['run'])/'metrics.jsonl').read_text().splitlines()) == 2 and s['images']['train']//2 == 20
