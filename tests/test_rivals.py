"Rivals in continual learning: each equal to its authors' definition in value and gradient (float64), through the task loop"
import copy
from types import SimpleNamespace as NS

import pytest
import torch
import torch.nn.functional as F

from _stop import Stop, StopCB
from asibkd.cl import loop, rivals                                         # noqa: they register
from asibkd.cl.learner import Learner
from asibkd.cl.memory import ReplayBatch, transplanted
from asibkd.cl.methods import CLMethod, TaskContext, cl_methods
from asibkd.cl.rivals import averaged_copy, corrected, fit_bias
from asibkd.cl.streams import align_head, create_stream
from asibkd.core.config import ConfigError, resolve
from asibkd.core.runtime import FOREIGN, RunContext, When, create_accelerator, generator
from asibkd.data.datasets import create_data
from asibkd.distil.methods import with_method_defaults
from asibkd.models.students import create_student
from asibkd.run.experiment import run_experiment
from asibkd.trainers.build import settle_config
from asibkd.trainers.loop import Callback

double = dict(dtype=torch.float64)
SMALL = dict(preset='none', cl_mode=1, dataset='digits', device='cpu', use_amp=0, batch_size=8, data_aug=0, num_tasks=3, epochs=2, train_per_class=14, replay_capacity=20, replay_ratio=1,
             student_type='mlp', student_lr=.003, num_stages=1, disable_tqdm=1, log_level='ERROR', seed=0)

# --- the losses ----------------------------------------------------------------------------------------------------------
# Task 3 of widths 2, 1, 2: three old columns in two past tasks, two new ones; four new images and three replayed ones.
LO, Y, NEW = 3, torch.tensor([3, 4, 4, 3, 0, 2, 1]), torch.tensor([True]*4 + [False]*3)

def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **double)

def method(key, **kw):
    torch.manual_seed(0)
    st, cls = create_student('mlp', n_class=5, img_size=8).double(), cl_methods[key]
    c = with_method_defaults(resolve(preset='none', cl_mode=1, device='cpu', **kw)[0], cls)
    return cls(c, st, [], None, TaskContext(2, LO, starts=(0, 2, 3), n_seen=5))

def step(key, z, z_t, **kw):
    m = method(key, **kw)
    b = ReplayBatch(draw(7, 3, 8, 8), Y, torch.arange(7), None, is_new=NEW, stored=torch.zeros(7, 1, 3), n_seen=LO*~NEW, certainty=torch.ones(7), n_new=4)
    old = torch.cat([z_t, torch.full((7, 2), FOREIGN, **double)], 1)
    return m, b, m.loss(b, dict(logit=z), [dict(logit=old, columns=torch.arange(LO))], When())

def p_soft(z, t): return (z/t).exp()/(z/t).exp().sum(1, keepdim=True)

def peer_wa(z, z_t, m, b):
    "(1 − λ) CE + λ KD, PyCIL's `_KD_loss` (no τ²) with the paper's λ"
    ce, kd = -p_soft(z, 1).log()[range(7), Y].mean(), -(p_soft(z_t, 2)*p_soft(z[:, :LO], 2).log()).sum()/7
    return (1 - 3/5)*ce + 3/5*kd

def peer_ssil(z, z_t, m, b):
    "Separate softmax, and the KL of every past task (Ahn et al.'s trainer: `reduction='sum'`, divided by the batch)"
    new, old = -p_soft(z[:4, LO:], 1).log()[range(4), Y[:4] - LO].sum(), -p_soft(z[4:, :LO], 1).log()[range(3), Y[4:]].sum()
    kd = 0.
    for a, e in ((0, 2), (2, 3)):
        p, q = p_soft(z_t[:, a:e], 2), p_soft(z[:, a:e], 2)
        kd = kd + 4*(p*(p.log() - q.log())).sum()/7
    return (new + old)/7 + kd

def peer_clser(z, z_t, m, b):
    "NeurAI-Lab/CLS-ER, models/clser.py"
    s, p = (m.averages[k](b.x[4:])['logit'].detach() for k in ('stable', 'plastic'))
    rows = [u if p_soft(u[None], 1)[0, y] > p_soft(v[None], 1)[0, y] else v for u, v, y in zip(s, p, Y[4:])]
    return -p_soft(z, 1).log()[range(7), Y].mean() + .1*((z[4:] - torch.stack(rows))**2).sum()/15

def peer_gdumb(z, z_t, m, b): return -p_soft(z, 1).log()[range(7), Y].mean()

@pytest.mark.parametrize('key,peer', dict(wa=peer_wa, bic=peer_wa, ssil=peer_ssil, clser=peer_clser, gdumb=peer_gdumb).items())
def test_value_and_gradient(key, peer):
    z, z_t = draw(7, 5, seed=1).requires_grad_(), draw(7, 3, seed=2)
    m, b, got = step(key, z, z_t)
    want = peer(z, z_t, m, b)
    torch.testing.assert_close(got['loss'], want, rtol=0, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(o, z)[0] for o in (got['loss'], want)), rtol=0, atol=1e-9)

def test_limits():
    "Without distillation WA is (1 − λ) CE; a student that answers as the snapshot pays SS-IL nothing; equal averages pull to one point"
    z, z_t = draw(7, 5, seed=1), draw(7, 3, seed=2)
    torch.testing.assert_close(step('wa', z, z_t, cl_old_kd=0)[2]['loss'], .4*F.cross_entropy(z, Y))
    assert step('ssil', z, z[:, :LO])[2]['parts']['old_kd'].abs() < 1e-12
    m, b, o = step('clser', z, z_t); z = m.averages['stable'](b.x)['logit']
    assert step('clser', z, z_t)[2]['parts']['recall'] < 1e-12
    assert 'recall' not in step('clser', z, z_t, clser_weight=0)[2]['parts']

# --- the head ------------------------------------------------------------------------------------------------------------
def test_alignment_is_the_authors():
    m = create_student('resnet8', n_class=5, img_size=8)
    w, bias = m.heads[0].weight.detach().clone(), m.heads[0].bias.detach().clone()
    with torch.no_grad(): m.heads[0].weight[3:] *= 2.5
    gamma = align_head(m, 3, 5)
    old, new = w[:3].pow(2).sum(1).sqrt().mean(), (2.5*w[3:]).pow(2).sum(1).sqrt().mean()
    assert gamma == pytest.approx((old/new).item())
    torch.testing.assert_close(m.heads[0].weight.detach(), torch.cat([w[:3], 2.5*w[3:]*old/new]))
    assert torch.equal(m.heads[0].bias, bias)                              # the bias is not touched

def test_bias_is_the_least_cross_entropy():
    "The 250 steps end at the minimum, which Newton finds; calibrated logits need no correction; the loss is even in a permutation"
    y = torch.arange(600) % 4
    z = .75*(3*F.one_hot(y, 4) + 2*draw(600, 4))
    z[:, 2:] = 1.4*z[:, 2:] + .8
    a = torch.tensor([1., 0.], **double)
    f = lambda a: F.cross_entropy(corrected(z, a[0], a[1], 2, 4), y)
    for _ in range(20): a = a - torch.linalg.solve(torch.autograd.functional.hessian(f, a), torch.autograd.functional.jacobian(f, a))
    torch.testing.assert_close(torch.tensor(fit_bias(z, y, 2, 4), **double), a, rtol=0, atol=.02)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(fit_bias(z[order], y[order], 2, 4)), torch.tensor(fit_bias(z, y, 2, 4)))
    wide = torch.cat([z, 9 + draw(600, 3)], 1)                             # a head with rows for future classes: they do not count
    assert fit_bias(wide, y, 2, 4) == pytest.approx(fit_bias(z, y, 2, 4))

def test_transplant_is_the_authors():
    "Mammoth, models/xder.py, `update_logits`"
    new, label, gamma = draw(50, 3), draw(50, seed=3).abs(), .85
    want = new.clone()
    for i in range(50):
        if new[i].max() > label[i]: want[i] = new[i]*gamma*label[i]/new[i].max()
    torch.testing.assert_close(transplanted(new, label, gamma), want)
    got = transplanted(new, -label, gamma)                                 # no factor helps a negative label: cut off
    assert (got.amax(1) <= -label).all() and torch.equal(got, torch.minimum(new, -label[:, None]))

# --- the loop ------------------------------------------------------------------------------------------------------------
def learner(key, callbacks=(), **kw):
    cfg = resolve(**SMALL | dict(cl_method=key) | kw)[0]
    data = create_data(cfg)
    ctx = RunContext(settle_config(cfg, data), data, create_accelerator(cfg))
    return Learner(key, create_stream(data, cfg.num_tasks, 0), ctx.but(callbacks=callbacks))

def test_an_aligned_head_in_any_method():
    two = dict(num_tasks=2)
    plain, l = learner('er', **two), learner('er', cl_align=1, **two)
    for o in (plain, l): o.learn()
    lo, norm = l.stream.classes(1).start, l.student.heads[0].weight.detach().norm(dim=1)
    torch.testing.assert_close(norm[:lo].mean(), norm[lo:].mean())
    assert plain.out.class_il[0] == l.out.class_il[0] and plain.out.class_il != l.out.class_il   # from the second task on
    wa = learner('wa', **two); wa.learn(); norm = wa.student.heads[0].weight.detach().norm(dim=1); torch.testing.assert_close(norm[:lo].mean(), norm[lo:].mean())

def test_bic_holds_out_and_hands_on():
    "Held-out images are not trained on; the snapshot is the corrected student, and training goes on with the plain one"
    l = learner('bic', bic_share=.2); seen = []
    first, second = (l.stream.task(t).train for t in (0, 1))
    for t in (0, 1):
        teachers, roles = l.gather_teachers(t)
        m = l.create_task_method(t, teachers, roles)
        data, memory, held = m.hold_out(l.task_data(t), l.memory)
        if t: break
        l.train_student(t, m, teachers); l.consolidate(t, m); l.fill_memory(t, m, teachers)
    count = torch.bincount(held.y); assert len(count) == l.stream.n_seen(1) and count.min() == count.max() >= 1, count
    rows = lambda x: {o.numpy().tobytes() for o in x}
    trained = rows(x for _, p in l.replay_loader(1, None, data, memory)._steps(0, 0) for x in l.replay_loader(1, None, data, memory).ds.images(p))
    assert trained and not trained & rows(held.x)
    l.train_student(1, m, teachers); bias = l.kept['bias']; assert (bias['lo'], bias['hi']) == (l.stream.n_seen(0), l.stream.n_seen(1)) and bias['alpha'] != 1
    l.consolidate(1, m); l.fill_memory(1, m, teachers); before = copy.deepcopy(l.student)
    x = draw(5, 3, 8, 8).float()
    snapshot = l.gather_teachers(2)[0][0]; n = l.stream.n_seen(1)
    torch.testing.assert_close(snapshot(x)['logit'][:, :n], corrected(before.eval()(x)['logit'], bias['alpha'], bias['beta'], bias['lo'], bias['hi']).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(l.student.eval()(x)['logit'][:, :n], before(x)['logit'])

class KeepCB(Callback):
    "The student's weights after every step of phase B"
    order = 15
    def __init__(self): self.weights = []
    def after_step(self, loop):
        self.weights.append({k: v.clone() for k, v in loop.phase.keep['student'].state_dict().items()})

def test_the_averages_of_clser_by_hand():
    "Two tasks: the recursion on recorded weights, with the draws of each step, and head rows that come with the second task"
    cb = KeepCB(); l = learner('clser', (cb,), num_tasks=2, train_per_class=20, clser_stable=.5, epochs=1)
    start = {k: v.clone() for k, v in l.student.state_dict().items()}
    l.learn(); k, want = 'model.fc1.weight', start['model.fc1.weight'].double(); head = [n for n in start if n.endswith('.weight')][-1]; assert l.kept['n'] == len(cb.weights)
    for n, w in enumerate(cb.weights, 1):
        if torch.rand(2, generator=generator(0, 'clser', n))[0] < .5:
            a = min(1 - 1/(n + 1), .999); want = a*want + (1 - a)*w[k].double()
    torch.testing.assert_close(l.kept['stable'][k].double(), want, rtol=0, atol=1e-5)
    assert len(l.kept['stable'][head]) == l.stream.data.n_class
    x = draw(4, 3, 8, 8).float(); torch.testing.assert_close(l.examined(x)['logit'], averaged_copy(l.student, l.kept['stable'])(x)['logit'])
    assert not torch.allclose(l.examined(x)['logit'], l.student.eval()(x)['logit'])

def test_gdumb_knows_the_memory_alone():
    "Whatever the student was before, and whatever the other images are: the same bits"
    a, b = learner('gdumb'), learner('gdumb')
    for l in (a, b):
        for t in range(2):
            if l is b and t:
                with torch.no_grad(): [p.add_(1.) for p in l.student.parameters()]
            teachers, roles = l.gather_teachers(t); l.fill_memory(t); m = l.train_task(t, teachers, roles)
    assert all(v.equal(b.student.state_dict()[k]) for k, v in a.student.state_dict().items())
    count = torch.bincount(a.memory.y); assert len(a.memory) == 20 and count.max() - count.min() <= 1
    ld = a.replay_loader(1); assert len(ld) == len(a.task_data(1).train)//8 and len(ld.ds) == 20           # as many steps as the others

# --- the door ------------------------------------------------------------------------------------------------------------
def test_transplant_and_alignment_resume_in_task_3(tmp_path, short_exam):
    kw = dict(SMALL, cl_method='derpp', cl_mask='seen', cl_transplant=.85, cl_align=1, compare=0)
    whole = run_experiment(**kw, report=1, results_dir=str(tmp_path/'a'), exp_id='x')
    with pytest.raises(Stop): run_experiment(**kw, report=0, results_dir=str(tmp_path/'b'), exp_id='x', checkpoint_steps=2, callbacks=[StopCB()])
    again = run_experiment(**kw, report=0, results_dir=str(tmp_path/'b'), exp_id='x', checkpoint_steps=2)
    assert whole['R'] == again['R'] and whole['rows'] == again['rows']
    assert (tmp_path/'a'/'x'/'report.html').exists() and whole['rows'][-1]['logits_mb'] > 0
    off = run_experiment(**kw | dict(cl_transplant=0, epochs=1), report=0, results_dir=str(tmp_path/'c'), exp_id='x')
    assert off['rows'][-1]['logits_mb'] < whole['rows'][-1]['logits_mb']                              # the new columns are counted

@pytest.mark.parametrize('kw,say', [(dict(cl_method='joint', cl_align=1), 'joint has no such term'), (dict(cl_method='icarl', cl_align=1), 'icarl has no such term'), (dict(cl_method='bic', cl_align=1), 'bic has no such term'),
                                    (dict(cl_method='er', bic_share=.2), 'no effect'), (dict(cl_method='er', cl_transplant=.85), 'needs another cl_der_alpha'), (dict(cl_method='asib', cl_transplant=.85), 'no effect'), (dict(cl_method='wa', clser_weight=2.), 'no effect'),
                                    (dict(cl_method='gdumb', replay_policy='herding'), 'before it has a network'), (dict(cl_method='gdumb', replay_capacity=5), 'at least one of each'), (dict(cl_method='gdumb', cl_mask='ace'), 'no such term'),
                                    (dict(cl_method='ssil', cl_teachers='expert', finetune_epochs=1), 'learns from the snapshot'), (dict(cl_method='clser', cl_teachers='snapshot'), 'uses no teacher')], ids=lambda o: o if isinstance(o, str) else '')
def test_refused_at_once(kw, say, tmp_path):
    with pytest.raises(ConfigError, match=say): run_experiment(**dict(SMALL, compare=0, report=0) | kw, results_dir=str(tmp_path))

def test_the_row_counts_kept_networks(tmp_path, short_exam):
    row = run_experiment(**dict(SMALL, num_tasks=2, epochs=1, compare=0, report=0, cl_method='clser', results_dir=str(tmp_path)))['rows'][-1]
    assert row['statistics_mb'] == pytest.approx(2*4*row['params']/1e6, rel=.05)

def test_a_new_domain_is_no_new_class():
    "Of a task that brings known classes once more, ACE keeps the batch's classes, and neither head nor stored logits are corrected"
    from asibkd.cl.memory import reservoir
    from asibkd.cl.streams import Stream
    domains = Stream(None, [0, 2, 4, 4], [0, 1, 2, 3], [(0, 2), (2, 4), (0, 2)])
    assert [domains.brings_classes(t) for t in range(3)] == [False, True, False]
    z, batch = torch.zeros(2, 4), NS(y=torch.tensor([0, 3]), is_new=torch.tensor([True, False]))
    for t, closed in ((0, []), (2, [1, 2, 3])):
        m = NS(cfg=NS(cl_mask='ace'), task=NS(index=t, first_label=0))
        o = CLMethod.masked_logits(m, z, batch)
        assert (o[0] < -1).nonzero().flatten().tolist() == closed and not o[1].any()
    g = torch.Generator().manual_seed(0)
    kept = [reservoir(104, 0, 500, 100, g) for _ in range(2)]                    # a memory whose share became smaller
    assert all(len(k.unique()) == 100 and k.max() < 104 for k in kept) and not kept[0].equal(kept[1])
