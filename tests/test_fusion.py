"What several teachers are worth together: optimal constant weights, stacking, the outlook, and the methods made of them."
import itertools, json, math

import pytest
import torch
import torch.nn.functional as F

from asibkd.core.config import Config
from asibkd.core.runtime import FOREIGN, When
from asibkd.distil.fusion import (Base, TeacherTable, error_gram, fit_base, fit_stack, fit_temperatures, folds, optimal_weights,
                                  outlook)
from asibkd.ib_mbm import calibrated, fuse, mean_logits
from asibkd.run.experiment import run_experiment

def table(n, noise, columns, k=6, seed=0):
    "Teachers that see the same images, each through a noise of its own"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    x = 2*torch.eye(k)[y] + torch.randn(n, k, generator=g)
    feats = [x + s*torch.randn(n, k, generator=g) for s in noise]
    z = torch.stack([2*f for f in feats])
    for o, c in zip(z, columns):
        if c is not None: o[:, [i for i in range(k) if i not in c]] = FOREIGN
    return TeacherTable(z, feats, y, [c if c is None else torch.tensor(c) for c in columns])

def simplex(m, steps):
    "Every point of a grid on the simplex"
    return torch.tensor([p for p in itertools.product(range(steps + 1), repeat=m) if sum(p) == steps]).double()/steps

@pytest.mark.parametrize('noise', [(.5, 2.), (1., 1., 3.), (0., 4., 4.)], ids=str)
def test_optimal_weights_are_those_of_the_grid(noise):
    t = table(240, noise, [None]*len(noise))
    logp = calibrated(t.logits, fit_temperatures(t.logits, t.y), None)
    onehot = F.one_hot(t.y, 6).double()
    grid = simplex(len(noise), 40)
    brier = torch.stack([((w[:, None, None]*logp.double().exp()).sum(0) - onehot).square().sum(1).mean() for w in grid])
    w = optimal_weights(error_gram(logp, t.y))
    ours = ((w[:, None, None]*logp.double().exp()).sum(0) - onehot).square().sum(1).mean()
    assert ours <= brier.min() + 1e-9
    assert (w - grid[brier.argmin()]).abs().max() <= 1.5/40
    assert w.min() >= 0 and abs(w.sum() - 1) < 1e-9

def test_gram_by_hand():
    "Two images of classes 0 and 1; errors (−.2, .2) and (−.5, .5), (.4, −.4) and (.1, −.1)"
    p = torch.tensor([[[.8, .2], [.4, .6]], [[.5, .5], [.1, .9]]])
    c = error_gram(p.log(), torch.tensor([0, 1]))
    want = torch.tensor([[(.08 + .32)/2, (.2 + .08)/2], [(.2 + .08)/2, (.5 + .02)/2]]).double()
    torch.testing.assert_close(c, want, rtol=1e-6, atol=1e-7)
    w = optimal_weights(c)                              # C⁻¹1/(1ᵀC⁻¹1) of [[.2, .14], [.14, .26]]: .12 and .06
    torch.testing.assert_close(w, torch.tensor([2/3, 1/3]).double(), rtol=1e-4, atol=1e-5)

def test_equal_rows_give_equal_weights():
    for m in (2, 3, 5):
        c = torch.full((m, m), .1) + .3*torch.eye(m)
        torch.testing.assert_close(optimal_weights(c.double()), torch.full((m,), 1/m).double(), rtol=1e-5, atol=1e-6)
    assert optimal_weights(torch.zeros(2, 2)).tolist() == [.5, .5]     # perfect teachers

def test_only_shared_classes_are_compared():
    "Teacher 1's own classes are easy: that must not earn it weight on the shared ones"
    t = table(1200, (1., 1.), ([0, 1, 2, 3], [2, 3, 4, 5]))
    t.logits[0][t.y < 2] = 20*F.one_hot(t.y[t.y < 2], 6).float()
    t.logits[0][:, 4:] = FOREIGN
    assert abs(fit_base(t).weights[0] - .5) < .1
    apart = table(600, (.5, 4.), ([0, 1, 2], [3, 4, 5]))
    logp = calibrated(apart.logits, torch.ones(2), apart.columns)
    assert error_gram(logp, apart.y, apart.columns)[0, 1] == 0
    one, other = (fuse(logp, torch.tensor(w), apart.columns) for w in ([.9, .1], [.1, .9]))
    torch.testing.assert_close(one, other)                             # w cancels

def test_temperatures():
    "p of the right class ¾: 2/T = log 3; all right: the prior keeps T away from its limit; few labels: equal temperatures"
    z, y = torch.tensor([[[2., 0.]]*4]), torch.tensor([0, 0, 0, 1])
    assert math.isclose(fit_temperatures(z, y, prior=0.)[0], 2/math.log(3), rel_tol=1e-3)
    assert .4 < fit_temperatures(z[:, :3], y[:3])[0] < 1
    halves = ([0, 1, 2], [3, 4, 5])
    few, t = table(12, (.5, .5), halves), table(1200, (.5, .5), halves, seed=1)
    base = fit_base(few)
    assert (base.temps[0]/base.temps[1]).log().abs() < .25
    many = fit_base(table(1200, (.5, .5), halves))
    average = mean_logits(t.logits, columns=t.columns)
    assert F.cross_entropy(many(t.logits, t.columns), t.y) <= F.cross_entropy(average, t.y) + 1e-3
    common = Base([2., 2.], [.7, .3])(t.logits, t.columns)             # one temperature, disjoint classes: the average's ranking
    assert torch.equal(common.argmax(1), average.argmax(1))

def test_folds_are_even_and_seeded():
    y = torch.randint(0, 7, (101,), generator=torch.Generator().manual_seed(0))
    f = folds(y, 5, 3)
    assert torch.equal(f, folds(y, 5, 3)) and not torch.equal(f, folds(y, 5, 4))
    assert f.bincount().max() - f.bincount().min() <= 1
    for c in range(7):
        n = f[y == c].bincount(minlength=5)
        assert n.max() - n.min() <= 1

def test_few_labels_hurt_stacking_and_not_the_weights(full_path):
    many = table(3000, (.3, 3.), (None, None), seed=1)
    def acc(z): return (z.argmax(1) == many.y).double().mean().item()
    few = table(12, (.3, 3.), (None, None))
    base, stack = fit_base(few), fit_stack(few)
    average = acc(many.logits.mean(0))
    assert acc(base(many.logits)) > average + .05
    assert acc(stack(many.logits, many.feats)) < acc(base(many.logits))

def test_stacking_tells_domains_apart(full_path):
    "Two specialists whose features say whose image it is; a class without a label is never predicted"
    halves = ([0, 1, 2], [3, 4, 5])
    fit, t = table(600, (.5, .5), halves), table(1200, (.5, .5), halves, seed=1)
    for o in (fit, t): o.logits = calibrated(o.logits, torch.ones(2), o.columns)     # log-probabilities do not say it
    def acc(z): return (z.argmax(1) == t.y).double().mean().item()
    assert acc(fit_stack(fit)(t.logits, t.feats, t.columns)) > acc(fit_base(fit)(t.logits, t.columns)) + .05
    z = fit_stack(fit.subset(fit.y < 5))(t.logits, t.feats, t.columns)
    assert (z[:, 5] == FOREIGN).all() and (z[:, :5] > FOREIGN/2).all()

def test_outlook_says_what_matters(full_path):
    unequal = outlook(table(600, (.3, 3.), (None, None)), ['a', 'b'])
    assert unequal['best'] == 'a' and unequal['gain_of_weighting'] > .03 and 'costs' in unequal['sentence']
    equal = outlook(table(600, (.7, .7), (None, None)), ['a', 'b'])
    assert abs(equal['gain_of_weighting']) < .02 and 'feature term' in equal['sentence']
    assert json.loads(json.dumps(equal)) == equal

@pytest.mark.parametrize('name', ['wavg', 'best', 'stack'])
def test_value_and_gradient(name):
    "Against an independent definition, in double precision"
    from types import SimpleNamespace as NS
    from asibkd.distil.methods import create_method
    columns = ([0, 1, 2, 3], [2, 3, 4, 5])
    fit, t = table(300, (.5, 2.), columns), table(8, (.5, 2.), columns, seed=5)
    nets = [NS(n_class=6, feat_dim=6, columns=torch.tensor(c)) for c in columns]
    m = create_method(name, Config(ce_alpha=.3, kd_alpha=.7, tau_start=2.), NS(n_class=6, feat_dim=6), nets)
    m.fit_teachers(fit)
    t_outs = [dict(logit=z.clone().requires_grad_(), feat_2d=f.clone().requires_grad_(), columns=torch.tensor(c))
              for z, f, c in zip(t.logits, t.feats, columns)]
    z = torch.randn(8, 6, dtype=torch.double, generator=torch.Generator().manual_seed(3)).requires_grad_()
    o = m.loss(NS(y=t.y, hard=t.y), dict(logit=z), t_outs, When())
    got = torch.autograd.grad(o['loss'], z)[0]
    assert all(x['logit'].grad is None and x['feat_2d'].grad is None for x in t_outs)
    if name == 'best':
        c = columns[m.chosen]
        s, target = z[:, c], t.logits[m.chosen][:, c]
    else:
        s = z
        if name == 'stack':
            target = fit_stack(fit)(t.logits, t.feats, fit.columns)
        else:
            b, target = fit_base(fit), torch.empty(8, 6)
            for k in range(6):
                knows = [i for i in range(2) if k in columns[i]]
                lp = {i: t.logits[i][:, k]/b.temps[i] for i in knows}      # log-probability plus energy
                target[:, k] = sum(b.weights[i]*lp[i] for i in knows)/sum(b.weights[i] for i in knows)
    p, q = (target.double()/2).softmax(1), (s/2).log_softmax(1)
    want = .3*F.nll_loss(z.log_softmax(1), t.y) + .7*4*(p*(p.log() - q)).sum(1).mean()
    torch.testing.assert_close(o['loss'], want, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(got, torch.autograd.grad(want, z)[0], rtol=1e-4, atol=1e-6)

TINY = dict(preset='quickstart', device='cpu', use_amp=0, report=0, train_per_class=12, image_size=8, teachers='mlp,mlp', student_type='mlp',
            finetune_epochs=2, epochs=2, batch_size=32, val_frac=.25, num_workers=0, disable_tqdm=1, log_level='WARNING')

def test_merging_two_specialists_through_the_door(tmp_path):
    "Baselines of this case, their targets, the outlook; a stopped run goes on to the same bits"
    class Stop(Exception): pass
    def stop(row):
        if row['phase'] == 'B1': raise Stop
    kw = TINY | dict(method='stack', compare=1, overlap_pct=20)
    s = run_experiment(**kw, results_dir=str(tmp_path/'a'))
    target = {r['key']: r['target']['logits'] for r in s['rows'] if r['role'] == 'student'}
    assert list(target) == ['ce', 'best', 'avgz', 'wavg', 'stack']
    assert target['best'][0] in ('teacher1', 'teacher2') and [target[k] for k in ('ce', 'avgz', 'wavg', 'stack')] == [['labels'], ['average'], ['weighted'], ['stacked']]
    o = s['outlook']
    assert o['split'] == 'val' and set(o['teachers']) == {'teacher1', 'teacher2'} and o['images'] == s['images']['val'] and o['sentence']
    with pytest.raises(Stop): run_experiment(**kw, results_dir=str(tmp_path/'b'), callbacks=[stop])
    again = run_experiment(**kw, results_dir=str(tmp_path/'b'))
    assert {k: v for k, v in again.items() if k not in ('run', 'time', 'exp_id')} == {k: v for k, v in s.items() if k not in ('run', 'time', 'exp_id')}

def test_teachers_from_elsewhere_leave_the_labelled_images(tmp_path):
    s = run_experiment(**TINY | dict(method='wavg', compare=0, teacher_share=.5, labels_per_class=3, epochs=1), results_dir=str(tmp_path))
    assert s['outlook']['split'] == 'train' and s['outlook']['fitted_on'] == 30 and s['outlook']['images'] == s['images']['val']

def test_fitting_on_validation_images_needs_some(tmp_path):
    "Said before a teacher is trained"
    from asibkd.core.config import ConfigError
    with pytest.raises(ConfigError, match='bridge_images=val: there are no validation images'):
        run_experiment(**TINY | dict(method='wavg', compare=0, bridge_images='val', val_frac=0), results_dir=str(tmp_path))
