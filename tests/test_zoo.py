"The CIFAR zoo has the names and shapes of the checkpoints that RepDistiller and mdistiller publish"
import json
from pathlib import Path

import pytest
import torch

from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher
from asibkd.models.zoo import create_zoo, zoo

theirs = json.loads((Path(__file__).parent/'fixtures'/'zoo_shapes.json').read_text())   # written down from their networks, 100 classes


def test_same_names():
    assert {n for n in zoo if not n.startswith("mlp")} == set(theirs)
    assert {'resnet8', 'resnet14', 'resnet20', 'resnet32', 'resnet56', 'resnet110', 'resnet8x4', 'resnet32x4', 'wrn_16_2', 'wrn_40_2', 'vgg8', 'vgg13'} <= set(zoo)


@pytest.mark.parametrize('name', theirs)
def test_shapes(name):
    with torch.device('meta'): ours = create_zoo(name, 100).state_dict()
    assert {k: list(v.shape) for k, v in ours.items()} == theirs[name]


@pytest.mark.parametrize('name', ['resnet8', 'resnet8x4', 'wrn_16_1', 'vgg8'])
@pytest.mark.parametrize('wrap', ['model', 'state_dict', None])
def test_published_checkpoint_loads(name, wrap, tmp_path):
    g = torch.Generator().manual_seed(0)
    state = {k: torch.rand(s, generator=g) if s else torch.tensor(0) for k, s in theirs[name].items()}
    f = tmp_path/'ckpt_epoch_240.pth'
    torch.save({'epoch': 240, wrap: state, 'best_acc': torch.tensor(74.)} if wrap else state, f)
    for create in (create_teacher, create_student):
        m = create(name, n_class=100, ckpt=f)
        assert all(torch.equal(v, state[k]) for k, v in m.model.state_dict().items())


@pytest.mark.parametrize('name', ['resnet14', 'wrn_16_2', 'vgg11'])
@pytest.mark.parametrize('size,chans', [(8, 1), (32, 3), (64, 3)])
def test_sizes(name, size, chans):
    out = create_student(name, n_class=7, img_size=size, in_chans=chans).eval()(torch.randn(2, chans, size, size))
    assert out['logit'].shape == (2, 7) and out['feat_4d'].ndim == 4 and len(out['stages']) in (4, 5)
