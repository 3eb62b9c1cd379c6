"Modules as people write them: compiled, scripted, lazy, weight-normed, in half precision, with BatchNorm1d"
import copy, logging
from pathlib import Path

import pytest
import torch
from torch import nn

from asibkd.core.config import ConfigError
from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher
from asibkd.models.trace import check_batch_of_one, plain_module
from asibkd.run.experiment import run_experiment
from asibkd.trainers.loop import explained_batch_norm

pytestmark = pytest.mark.filterwarnings('ignore')   # torch's own, about what it deprecates


def net(n=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n))


def normed(norm):
    m = net()
    m[3] = norm(m[3])
    return m


def one_step(m):
    "A training step, a copy, an evaluation: what a run does with a student"
    x = torch.randn(4, 1, 8, 8)
    opt = torch.optim.SGD(m.parameters(), .1)
    m.train()(x)['logit'].square().mean().backward()
    opt.step()
    with torch.no_grad(): a, b = m.eval()(x)['logit'], copy.deepcopy(m).eval()(x)['logit']
    assert torch.equal(a, b) and a.isfinite().all()
    m.eval()(x)
    copy.deepcopy(m)


KINDS = dict(compiled=lambda: torch.compile(net()), part_compiled=lambda: nn.Sequential(torch.compile(net()[:5]), *net()[5:]),
             parallel=lambda: nn.DataParallel(net()), half=lambda: net().half(), bfloat16=lambda: net().bfloat16(),
             double=lambda: net().double(), weight_norm=lambda: normed(nn.utils.weight_norm),
             spectral_norm=lambda: normed(nn.utils.spectral_norm), new_weight_norm=lambda: normed(nn.utils.parametrizations.weight_norm),
             lazy=lambda: nn.Sequential(nn.LazyConv2d(6, 3, 2, 1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('create', [create_teacher, create_student])
def test_B3_made_to_work(kind, create):
    m = create(KINDS[kind](), n_class=10, img_size=8, in_chans=1)
    one_step(m)
    assert not any('_orig_mod' in k or 'module.' in k for k in m.state_dict())
    assert {p.dtype for p in m.parameters()} == {torch.float32} and len(m.anatomy.blocks) >= 1 and m.anatomy.heads


def test_B3_compiled_in_place():
    m = net()
    m.compile()
    one_step(create_student(m, n_class=10, img_size=8, in_chans=1))


def test_B3_scripted_is_refused_in_one_sentence():
    for m in (torch.jit.script(net()), nn.Sequential(torch.jit.script(nn.Flatten()), nn.Linear(64, 10))):
        with pytest.raises(ConfigError, match='is scripted .*Give the nn.Module from which it was made'):
            create_teacher(m, n_class=10, img_size=8, in_chans=1)


def test_B3_half_precision_is_copied_and_said(caplog):
    given = net().half()
    with caplog.at_level(logging.INFO, 'asibkd'): m = create_teacher(given, n_class=10, img_size=8, in_chans=1)
    assert 'has float16 weights; a float32 copy of it is used' in caplog.text
    assert given[0].weight.dtype is torch.float16 and torch.equal(m.model[0].weight, given[0].weight.float())


def test_B3_weight_norm_keeps_its_names_and_follows_its_weights():
    m = plain_module(normed(nn.utils.weight_norm))
    assert {'3.weight_g', '3.weight_v'} <= set(m.state_dict())
    x, twin = torch.randn(2, 1, 8, 8), copy.deepcopy(m)
    with torch.no_grad():
        twin[3].weight_g.mul_(2)
        assert not torch.equal(twin.eval()(x), m.eval()(x))


def test_B3_a_table_of_attention_biases_is_not_kept():
    "timm caches it in evaluation mode: other weights loaded afterwards would be evaluated with the old table"
    a, b = (create_teacher('levit_128s', n_class=10, img_size=32).eval() for _ in range(2))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a(x)
        a.load_state_dict(b.state_dict())
        assert torch.equal(a(x)['logit'], b(x)['logit'])


def test_B3_a_module_that_fails_at_the_size_of_the_images():
    class Fixed(nn.Module):
        def __init__(self): super().__init__(); self.body, self.fc = nn.AvgPool2d(28), nn.Linear(64, 10)
        def forward(self, x): return self.fc(self.body(x).flatten(1).expand(-1, 64))
    with pytest.raises(ConfigError, match=r"fails on an image of shape \(1, 8, 8\)"): create_teacher(Fixed(), img_size=8, in_chans=1)


BN1d = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def test_B3_batch_norm_and_batches_of_one_image():
    with pytest.raises(ConfigError, match='BatchNorm cannot be trained on one value per channel.*batch_size=2 or more'):
        check_batch_of_one(BN1d(), 1, 8, 1)
    assert check_batch_of_one(net(), 1, 8, 1) and check_batch_of_one(BN1d(), 2, 8, 1)
    with pytest.raises(ConfigError, match='This batch: BatchNorm'), explained_batch_norm(): BN1d()(torch.ones(1, 1, 8, 8))


class Gray(nn.Module):
    def forward(self, x): return x.mean(1, keepdim=True)


def gray(m): return nn.Sequential(Gray(), m)


tiny = dict(preset='quickstart', method='vanilla_kd', device='cpu', train_per_class=2, val_frac=.5, epochs=1, finetune_epochs=0, image_size=8, batch_size=4,
            log_level='ERROR', report=False, use_amp=False)


@pytest.mark.parametrize('teacher,student', [('compiled', 'weight_norm'), ('half', 'lazy'), ('spectral_norm', 'part_compiled')])
def test_B3_through_the_public_door(teacher, student, tmp_path):
    s = run_experiment(teachers=[gray(KINDS[teacher]())], student=gray(KINDS[student]()), results_dir=str(tmp_path), **tiny)
    assert (Path(s['run'])/'summary.json').exists() and 0 <= s['test_acc_last'] <= 1


def test_B3_batch_size_one_at_the_door(tmp_path):
    with pytest.raises(ConfigError, match='BatchNorm cannot be trained on one value per channel'):
        run_experiment(teachers=[gray(net())], student=gray(BN1d()), results_dir=str(tmp_path), **tiny | dict(batch_size=1))
