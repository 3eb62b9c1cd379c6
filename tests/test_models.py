"Models nobody wrote code for: wrapped, they answer as the bare ones do, in every mode"
import copy
import gc

import pytest
import timm
import torch
import torchvision
from torch import nn

from asibkd.freeze import apply_freeze, freeze_report
from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher, model_costs
from asibkd.models.trace import forget_pass


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7))


outside = dict(   # five timm CNNs, three timm transformers, one of torchvision, one plain Sequential
    regnety=lambda: timm.create_model('regnety_002', num_classes=7), mobilenet=lambda: timm.create_model('mobilenetv3_small_050', num_classes=7),
    densenet=lambda: timm.create_model('densenet121', num_classes=7, growth_rate=8, block_config=(2, 2, 2, 2)), ghostnet=lambda: timm.create_model('ghostnet_050', num_classes=7),
    edgenext=lambda: timm.create_model('edgenext_xx_small', num_classes=7), deit=lambda: timm.create_model('deit_tiny_distilled_patch16_224', num_classes=7, img_size=32, depth=3),
    levit=lambda: timm.create_model('levit_128s', num_classes=7, img_size=64), pvt=lambda: timm.create_model('pvt_v2_b0', num_classes=7),
    shufflenet=lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=7), sequential=plain)
size = {'levit': 64, 'densenet': 64}


@pytest.fixture(scope='module', params=outside)
def pair(request):
    torch.manual_seed(0)
    name = request.param
    bare = outside[name]().eval()
    return name, bare, torch.randn(2, 3, size.get(name, 32), size.get(name, 32))


@pytest.mark.parametrize('create', [create_teacher, create_student])
def test_logits_are_the_bare_models(pair, create):
    name, bare, x = pair
    m = create(copy.deepcopy(bare), n_class=7, img_size=x.shape[-1]).eval()
    with torch.no_grad(): want, got = bare(x), m(x)
    assert torch.equal(got['logit'], want)
    assert got['feat_2d'].shape == (2, m.feat_dim) and got['feat_4d'].shape[:2] == (2, m.feat4_dim)
    assert [s.shape[1] for s in got['stages']] == m.stage_dims and all(s.ndim == 4 and len(s) == 2 for s in got['stages'])
    assert torch.allclose(m.classify(got['feat_2d']), want, atol=1e-5)


def test_wrapping_changes_nothing(pair):
    name, bare, x = pair
    before, rng = {k: v.clone() for k, v in bare.state_dict().items()}, torch.get_rng_state()
    m = create_teacher(bare, img_size=x.shape[-1])
    assert torch.equal(torch.get_rng_state(), rng) and not bare.training
    assert all(torch.equal(v, before[k]) for k, v in bare.state_dict().items())
    assert {k.split('.', 1)[1] for k in m.state_dict()} == set(before)


def test_features_carry_gradients_and_leave_nothing(pair):
    name, bare, x = pair
    m = create_student(copy.deepcopy(bare), n_class=7, img_size=x.shape[-1], use_adapter=True, adapter_out=8).train()
    out = m(x)
    (out['distill_feat'].sum() + out['feat_4d'].square().mean() + sum(s.square().mean() for s in out['stages'])).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.model.parameters())
    del out
    gc.collect()
    assert not any({*o._forward_hooks.values()} - {forget_pass} or o._forward_pre_hooks for o in m.modules())
    with torch.autocast('cpu', torch.bfloat16): assert m.eval()(x)['logit'].shape == (2, 7)


def test_levels(pair):
    name, bare, x = pair
    m = create_teacher(copy.deepcopy(bare), img_size=x.shape[-1])
    n = [sum(p.numel() for p in apply_freeze(m, k).parameters() if p.requires_grad) for k in (0, 1, 2, -1)]
    assert 0 < n[0] < n[1] < n[2] <= n[3] == sum(p.numel() for p in m.parameters())
    before = {k: v.clone() for k, v in apply_freeze(m, 1).state_dict().items()}
    m.train()(x)
    moved = {k for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    r = freeze_report(m).set_index('block')
    assert all(m.anatomy.block_of[k.removeprefix('model.').rpartition('.')[0]] >= len(m.anatomy.blocks) - 1 for k in moved)
    assert r.trainable.iloc[:-3].sum() == 0 and r.parameters['all'] == sum(p.numel() for p in m.parameters())


def test_costs():
    # resnet18 at 224: 1.82 GMACs, 11.69 M parameters, as its authors and torchvision say
    with torch.no_grad(): c = model_costs(torchvision.models.resnet18(), (3, 224, 224), repeats=1)
    assert abs(c['macs']/1e9 - 1.814) < .01 and c['params'] == 11_689_512


@pytest.mark.parametrize('out,what', [(lambda z: dict(boxes=z), 'a dict'), (lambda z: z[..., None, None].expand(-1, -1, 2, 2), 'a tensor of shape')])
def test_an_answer_that_is_no_logits(out, what):
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net = plain()
        def forward(self, x): return out(self.net(x))
    with pytest.raises(ValueError, match=what): create_teacher(Odd())


def test_data_dependent_forward():
    "A model that looks at numbers cannot run on the meta device; it runs once for real, and is as before"
    class Looks(nn.Module):
        def __init__(self): super().__init__(); self.net = plain()
        def forward(self, x): return dict(logits=self.net(x if x.abs().max() < 1e6 else x/2), aux=None)
    bare = Looks().train()
    before, rng = copy.deepcopy(bare.state_dict()), torch.get_rng_state()
    m = create_teacher(bare, n_class=7)
    assert bare.training and torch.equal(torch.get_rng_state(), rng) and all(torch.equal(v, before[k]) for k, v in bare.state_dict().items())
    assert m.stage_dims == [8, 16] and m(torch.randn(2, 3, 32, 32))['logit'].shape == (2, 7)


@pytest.mark.parametrize('name', ['swin_tiny', 'vit_tiny_patch16_224', 'convnext_atto', 'resnet10t', 'efficientnet_b0'])
@pytest.mark.parametrize('small', [False, True])
def test_small_input(name, small):
    kw = dict(swin_tiny=dict(depths=(1, 1, 1, 1), embed_dim=24), vit_tiny_patch16_224=dict(depth=2)).get(name, {})
    m = create_teacher(name, n_class=7, small_input=small, **kw).eval()
    out = m(torch.randn(2, 3, 32, 32))
    assert out['logit'].shape == (2, 7)
    assert (out['stages'][0].shape[-1] >= 8) or not small
