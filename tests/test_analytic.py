"The teacher that cannot forget: sums in any order, the closed form by other means, trunks, resume to the bit, one-shot."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from _stop import Stop, StopCB
from asibkd.cl.learner import Learner
from asibkd.cl.setup import AnalyticMemory, trunk_kind
from asibkd.cl.streams import create_stream
from asibkd.core.config import CheckpointError, ConfigError, resolve
from asibkd.core.runtime import RunContext, create_accelerator
from asibkd.data.batches import Loader
from asibkd.data.datasets import create_data
from asibkd.distil.analytic import AnalyticTeacher, RidgeSums, fit_temperature
from asibkd.explore.opened import open_run
from asibkd.models.cards import save_teacher
from asibkd.models.teachers import create_teacher
from asibkd.models.trunks import kmeans_trunk, network_trunk, normalised_patches, random_trunk, whitening
from asibkd.run.experiment import run_experiment
from asibkd.trainers.build import settle_config, teacher_specs

@pytest.fixture(scope='module')
def toy():
    "120 images of 12 features and six unequal classes"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120)**2 % 11 % 6
    return torch.randn(120, 12, generator=g, dtype=torch.float64) + 2*F.one_hot(y, 12), y

# Must show 1: partial_fit = closed form, in any order; the statistics do not grow with images

@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize('batch', [1, 7, 120])
def test_sums_over_tasks_equal_the_closed_form(toy, order, batch):
    (x, y), sums = toy, RidgeSums(12)
    for t in order:
        rows = (y//2 == t).nonzero().flatten()
        for part in rows.split(batch): sums.partial_fit(x[part], y[part], 6 if t == 2 else None)
    for lam in (1e-3, 1., 1e3):
        stacked = torch.cat([torch.cat([x, torch.ones(120, 1)], 1), torch.cat([lam**.5*torch.eye(12, dtype=x.dtype), torch.zeros(12, 1)], 1)])
        target = torch.cat([F.one_hot(y, 6), torch.zeros(12, 6)]).double()
        assert (sums.solve(lam) - torch.linalg.lstsq(stacked, target).solution).abs().max() < 1e-9

def test_statistics_grow_with_features_not_with_images(toy):
    x, y = toy
    few, many = RidgeSums(12).partial_fit(x[:20], y[:20], 6), RidgeSums(12).partial_fit(x.repeat(50, 1), y.repeat(50), 6)
    assert few.megabytes == many.megabytes == 8*(78 + 12*6 + 6)/1e6 < RidgeSums(24, 6).megabytes
    assert many.n == 6000

# The closed form against other definitions

def test_solve_equals_sklearn(toy):
    from sklearn.linear_model import Ridge
    (x, y), lam = toy, 3.
    other = Ridge(lam, solver='svd').fit(x.numpy(), F.one_hot(y, 6).double().numpy())
    w = RidgeSums(12).partial_fit(x, y).solve(lam)
    assert np.abs(w[:-1].T.numpy() - other.coef_).max() < 1e-9 and np.abs(w[-1].numpy() - other.intercept_).max() < 1e-9

def hat(x, lam):
    "Ŷ = HY with an intercept that is not penalised"
    n, c = len(x), x - x.mean(0)
    return torch.full((n, n), 1/n, dtype=x.dtype) + c @ torch.linalg.solve(c.T @ c + lam*torch.eye(x.shape[1]).double(), c.T)

@pytest.mark.parametrize('lam', [1e-3, 1., 50.])
def test_gcv_and_leave_one_out(toy, lam):
    (x, y), n = toy, 120
    sums, target = RidgeSums(12).partial_fit(x, y), F.one_hot(y, 6).double()
    h = hat(x, lam)
    assert abs(sums.gcv([lam])[0] - (target - h @ target).square().sum()/n/(1 - h.trace()/n)**2) < 1e-9
    loo = sums.leave_one_out(x, y, lam)
    for i in (0, 50, 119):                                           # refitted without it
        rest = torch.arange(n) != i
        w = RidgeSums(12).partial_fit(x[rest], y[rest], 6).solve(lam)
        assert (loo[i] - (x[i] @ w[:-1] + w[-1])).abs().max() < 1e-8

def test_choose_takes_more_ridge_where_there_is_more_noise(toy):
    x, y = toy
    noise = torch.randn(120, 12, generator=torch.Generator().manual_seed(1)).double()
    assert RidgeSums(12).partial_fit(noise, y).choose() > 10*RidgeSums(12).partial_fit(x, y).choose()

def test_temperature_is_the_minimum(toy):
    z, y = torch.randn(120, 6, generator=torch.Generator().manual_seed(2)).double(), toy[1]
    z = z + 2*F.one_hot(y, 6)
    t, w = fit_temperature(z, y), 1/y.bincount(minlength=6).double()
    costs = [F.cross_entropy(z/(t*f), y, w) for f in (.95, 1., 1.05)]
    assert costs[1] < costs[0] and costs[1] < costs[2] and abs(fit_temperature(3*z, y)/t - 3) < .01

# Trunks

def images(n=40, size=8, c=3): return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(n))

def test_triangle_and_pooling_by_definition():
    x, d = images(3, 9), 27
    trunk = kmeans_trunk(images(30, 9), 10)
    p = normalised_patches(x, 3)                                       # 7 × 7 places
    dist = torch.cdist((p - trunk.mean) @ trunk.whiten, trunk.centroids)
    f = (dist.mean(-1, keepdim=True) - dist).relu().reshape(3, 7, 7, 10)
    quadrants = [f[:, a, b].mean((1, 2)) for a in (slice(0, 4), slice(3, 7)) for b in (slice(0, 4), slice(3, 7))]
    assert (trunk(x).reshape(3, 4, 10) - torch.stack(quadrants, 1)).abs().max() < 1e-4
    assert trunk.dim == 40 and trunk.centroids.shape == (10, d)

def test_whitening_decorrelates():
    p = images(300, 3).flatten(1).double() @ torch.randn(27, 27, generator=torch.Generator().manual_seed(5)).double()
    mean, m = whitening(p, eps=0.)
    z = (p - mean) @ m.double()
    assert (z.T @ z/300 - torch.eye(27)).abs().max() < 1e-2

@pytest.mark.parametrize('make', [lambda: random_trunk((3, 8, 8), 50), lambda: kmeans_trunk(images(), 12),
                                  lambda: network_trunk(create_teacher('mlp', n_class=4, img_size=8)), lambda: network_trunk(create_teacher('mlp', n_class=4, img_size=8), 30)],
                         ids=['random', 'kmeans', 'network', 'projected'])
def test_a_trunk_is_frozen_and_exact(make):
    torch.manual_seed(3)
    t, x = make(), images(5)
    with torch.autocast('cpu', torch.bfloat16): half = t(x)
    assert half.dtype == torch.float32 and half.equal(t(x)) and t(x).shape == (5, t.dim)     # no half precision
    assert not t.train().training and not any(p.requires_grad for p in t.parameters())
    torch.manual_seed(3)
    assert all(v.equal(make().state_dict()[k]) for k, v in t.state_dict().items()) or 'model' in str(t.state_dict().keys())
    sums = RidgeSums(t.dim).partial_fit(t(images(40)), torch.arange(40) % 4)
    a = AnalyticTeacher(t, sums, (3, 8, 8))                                                  # the contract of a model
    o = a(x)
    assert o['logit'].shape == (5, 4) and o['feat_2d'].equal(t(x)) and not any(p.requires_grad for p in a.parameters())
    assert (a.classify(t(x)) - o['logit']).abs().max() < 1e-4

def test_large_images_and_too_few_patches():
    assert kmeans_trunk(images(3, 70), 6)(images(2, 70)).shape == (2, 24)
    with pytest.raises(ConfigError, match='at most 36, or use cl_trunk=random'): kmeans_trunk(images(1), 100)

# Continual learning

CL = dict(preset='quickstart', teacher1_type='mlp', student_type='mlp', report=0, cl_mode=1, compare=0, device='cpu', use_amp=0, train_per_class=12, num_tasks=3, epochs=2, finetune_epochs=1, teacher_adapt_epochs=0, replay_capacity=20,
          log_level='ERROR', cl_teachers='analytic', analytic_dim=60)

def test_stopped_in_task_3_the_same_bits(tmp_path, short_exam):
    run = lambda where, **kw: run_experiment(**CL, results_dir=str(tmp_path/where), exp_id='x', checkpoint_steps=2, **kw)
    whole = run('a')
    with pytest.raises(Stop): run('b', callbacks=[StopCB()])
    again = run('b')
    assert {k: v for k, v in again.items() if k not in ('time', 'run')} == {k: v for k, v in whole.items() if k not in ('time', 'run')}
    for f in ('student.safetensors', 'memory.safetensors'): assert (tmp_path/'a'/'x'/f).read_bytes() == (tmp_path/'b'/'x'/f).read_bytes()
    others, row = whole['others'], whole['rows'][-1]
    assert all(o['analytic1'] > .6 for o in others) and row['trunk'] == 'random'                # it has not forgotten
    assert row['statistics_mb'] == pytest.approx(8*(60*61/2 + 60*10 + 10)/1e6)

@pytest.fixture(scope='module')
def digits():
    cfg = resolve(**CL | dict(preset='none', dataset='digits', num_stages=1))[0]
    data = create_data(cfg)
    return settle_config(cfg, data), create_stream(data, 3, 0)

@pytest.mark.parametrize('kind', ['random', 'kmeans', 'first'])
def test_state_of_every_trunk(digits, kind):
    "Saved after task 1 and loaded elsewhere: task 2 gives the same bits"
    cfg, stream = digits
    specs, cfg = teacher_specs(cfg), cfg.model_copy(update=dict(cl_trunk=kind, analytic_dim=0 if kind == 'first' else 20))
    net = create_teacher('mlp', n_class=4, img_size=8) if kind == 'first' else None
    a = AnalyticMemory(cfg, specs, stream)
    plain = lambda t: Loader(stream.task(t).train, stream.data, 32)
    assert a.state() is None
    a.learn(plain(0), 4, net)
    b = AnalyticMemory(cfg, specs, stream)
    b.load({k: {n: v.clone() for n, v in s.items()} for k, s in a.state().items()})
    for m in (a, b): m.learn(plain(1), stream.n_seen(1))
    ta, tb = (m.teacher(stream.task(1).train, 1) for m in (a, b))
    assert ta.temperature == tb.temperature and all(v.equal(tb.state_dict()[k]) for k, v in ta.state_dict().items())

def test_first_is_the_expert_after_task_1(digits):
    "Its own, or that of the cast"
    cfg, stream = digits
    for cast in ('analytic', 'analytic+expert'):
        c = cfg.model_copy(update=dict(cl_trunk='first', analytic_dim=0, cl_teachers=cast))
        l = Learner('asib', stream, RunContext(c, stream.data, create_accelerator(c)), teacher_specs(c))
        teachers, roles = l.gather_teachers(0)
        assert roles == tuple(cast.split('+')) and [*l.teachers] == (['expert1'] if 'expert' in cast else [])
        if 'expert' in cast: assert l.analytic.trunk.model.model.state_dict().keys() == teachers[1].model.state_dict().keys() and l.analytic.trunk.model is not teachers[1]
        before = {k: v.clone() for k, v in l.analytic.trunk.state_dict().items()}
        l.gather_teachers(1)
        assert all(v.equal(before[k]) for k, v in l.analytic.trunk.state_dict().items())     # frozen, whatever the expert does

def test_kinds_and_refusals(digits, tmp_path, short_exam):
    cfg, stream = digits
    specs = teacher_specs(cfg)
    kind = lambda shape=(3, 8, 8), specs=specs, **kw: trunk_kind(cfg.model_copy(update=kw), specs, shape)
    assert (kind(), kind((3, 32, 32)), kind(cl_trunk='first')) == ('random', 'kmeans', 'first')
    with pytest.raises(ConfigError, match='teacher1 has no weights'): kind(cl_trunk='teacher')
    run = lambda **kw: run_experiment(**CL | dict(results_dir=str(tmp_path)) | kw)
    with pytest.raises(ConfigError, match='finetune_epochs=0 leaves it untrained'): run(cl_trunk='first', finetune_epochs=0)
    with pytest.raises(ConfigError, match='analytic_dim=60 has no effect with cl_method=asib'): run(cl_teachers='snapshot')
    with pytest.raises(ConfigError, match='analytic_dim=7 has no effect with method=ce'): run_experiment(preset='quickstart', method='ce', compare=0, analytic_dim=7)
    f = tmp_path/'ten.pth'                                                                   # a trunk that saw the labels of the future
    data = create_data(cfg)
    save_teacher(create_teacher('mlp', n_class=10, img_size=8), f, data, 'mlp', .9)
    with pytest.raises(CheckpointError, match='would teach the future'): run(teacher1_ckpt=str(f))
    s = run(teacher1_ckpt=str(f), allow_leak=1, epochs=1, num_tasks=2)
    assert s['rows'][-1]['leak'] == 'yes' and s['rows'][-1]['trunk'] == 'teacher' and s['rows'][-1]['statistics_mb'] < .1

# One-shot

SMALL = dict(preset='quickstart', student_type='mlp', compare=0, report=0, device='cpu', use_amp=0, train_per_class=30, num_stages=1, student_epochs_per_stage=1, log_level='ERROR')

def test_a_teacher_without_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = run_experiment(**SMALL, method='avgz', teachers='analytic,analytic', analytic_dim=150, finetune_epochs=0)
    rows = {r['key']: r for r in s['rows']}
    assert rows['teacher1']['weights']['source'] == 'computed' and rows['teacher1']['test_acc_val_selected'] > .85
    again = open_run(s['run']).teachers['teacher1']                       # the explorer computes it again
    assert again.feat_dim == 150 and 0 < again.temperature < 1
    with pytest.raises(ConfigError, match='trunk of analytic:mlp has no weights'): run_experiment(**SMALL, method='vanilla_kd', teacher1_type='analytic:mlp', finetune_epochs=0)
    with pytest.raises(ConfigError, match='cl_trunk=first is for continual learning'): run_experiment(**SMALL, method='vanilla_kd', teacher1_type='analytic', cl_trunk='first')

def test_the_trunk_of_a_checkpoint_with_other_classes(tmp_path):
    data = create_data(resolve(preset='none', dataset='digits')[0])
    net = create_teacher('mlp', n_class=3, img_size=8)
    save_teacher(net, tmp_path/'t.pth', type(data)(**{**vars(data), 'classes': ['x', 'y', 'z']}), 'mlp', .5)
    s = run_experiment(**SMALL, method='vanilla_kd', teacher1_type='analytic:mlp', teacher1_ckpt=str(tmp_path/'t.pth'), finetune_epochs=0, results_dir=str(tmp_path))
    row = s['rows'][0]
    assert row['weights']['file'] == 't.pth' and row['weights']['classes'] is None and row['test_acc_val_selected'] > .7

def test_a_student_in_closed_form(tmp_path):
    s = run_experiment(**SMALL, method='analytic', results_dir=str(tmp_path), exp_id='x')
    assert s['test_acc_last'] == s['test_acc_val_selected'] > .6
    assert [json.loads(o)['phase'] for o in (Path(s['run'])/'metrics.jsonl').read_text().splitlines()] == ['B1']
    more = run_experiment(**SMALL, method='analytic', analytic_lambda=1e6, results_dir=str(tmp_path))
    assert more['test_acc_last'] < s['test_acc_last']
    with pytest.raises(ConfigError, match='kd_alpha=0.5 has no effect with method=analytic'): run_experiment(**SMALL, method='analytic', kd_alpha=.5)
