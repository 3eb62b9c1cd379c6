"ASIB-CL with a teacher that cannot forget: views between images, the cast's fusion, its yardsticks, the ablations."
import io
from pathlib import Path
from types import SimpleNamespace as NS

import pytest
import torch
import torch.nn.functional as F
from _short import digits_with_few_tests, shorten

from asibkd.cl import loop, rivals, yardsticks  # noqa: they register their methods
from asibkd.cl.learner import Learner
from asibkd.cl.memory import Replay
from asibkd.cl.methods import ASIBCL, AverageCL, TaskContext, cl_methods
from asibkd.cl.streams import create_stream
from asibkd.cl.yardsticks import WAvgCL
from asibkd.core.config import Config, ConfigError, resolve
from asibkd.core.runtime import RunContext, When, create_accelerator
from asibkd.data.datasets import create_data
from asibkd.distil.fusion import Base, TeacherTable, fit_base
from asibkd.distil.methods import with_method_defaults
from asibkd.distil.views import Views, mixup
from asibkd.models.kdmodel import spread_classes
from asibkd.models.students import create_student
from asibkd.run.cl import memory_columns
from asibkd.trainers.build import settle_config, teacher_specs
from asibkd.trainers.casts import balanced_rows, cast_base, complete, left_out, unfitted

TINY = dict(preset='none', cl_mode=1, dataset='digits', device='cpu', use_amp=0, batch_size=16, data_aug=0, num_tasks=3, val_frac=.2,
            epochs=2, train_per_class=30, replay_capacity=40, replay_ratio=1, tau_start=2, num_stages=1, student_type='mlp', student_lr=.003,
            teacher1_type='mlp', finetune_epochs=1, finetune_lr=.003, teacher_adapt_epochs=1, analytic_dim=100, disable_tqdm=1, log_level='ERROR', feat_kd_alpha=0)
ALL = dict(cl_teachers='analytic+expert+snapshot', replay_capacity=60, epochs=1)
exam = pytest.mark.usefixtures('tiny_exam')

def learner(key='asib', **kw):
    cfg = resolve(**TINY | dict(cl_method=key) | kw)[0]
    data = create_data(cfg)
    cfg = settle_config(cfg, data)
    return Learner(key, create_stream(data, cfg.num_tasks, 0), RunContext(cfg, data, create_accelerator(cfg)), teacher_specs(cfg))

def learnt(key='asib', **kw):
    l = learner(key, **kw)
    l.learn()
    return l

def saved(state):
    f = io.BytesIO(); torch.save(state, f); f.seek(0)
    return f

@pytest.fixture(scope='module')
def whole():
    "Three tasks with every role, and the state between the second and the third"
    with pytest.MonkeyPatch.context() as patch:                # both are for one test, this is for three
        shorten(patch.setattr)
        digits_with_few_tests(patch.setitem, 20)
        l = learner(**ALL)
        states = {}
        l.on_task = lambda t: states.update({t: saved(l.state(t))})
        l.learn()
    return l, states[1]

@pytest.fixture(scope='module')
def whole_of_two():
    "The student of two tasks without any ablation"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch.setattr)
        digits_with_few_tests(patch.setitem, 20)
        return learnt(num_tasks=2, epochs=1).student.state_dict()

# The views

def test_mixup_value_and_gradient():
    "Against the definition, image by image, in double precision"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64, requires_grad=True)
    p, lam = torch.randperm(5, generator=g), torch.rand(5, generator=g, dtype=torch.float64)
    by_hand = torch.stack([lam[i]*x[i] + (1 - lam[i])*x[p[i]] for i in range(5)])
    assert torch.allclose(mixup(x, p, lam), by_hand, rtol=1e-12)
    a, = torch.autograd.grad(mixup(x, p, lam).square().sum(), x)
    b, = torch.autograd.grad(by_hand.square().sum(), x)
    assert torch.allclose(a, b, rtol=1e-12)

def nets(dtype, k=4):
    "A student and two teachers of which the second knows the old classes only"
    torch.manual_seed(0)
    student, a, b = (create_student('mlp', n_class=n, img_size=8) for n in (k, k, 2))
    return student.to(dtype), [a.to(dtype).eval(), spread_classes(b, [0, 1], k).to(dtype).eval()]

def batch_of(n_mixed, plain, dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4 + n_mixed, 3, 8, 8, generator=g, dtype=dtype)
    is_new = torch.tensor([True, True, False, False])
    return NS(x=x, y=torch.tensor([2, 3, 0, 1]), is_new=is_new, stored=torch.randn(4, 1, 2, generator=g).to(dtype)*~is_new[:, None, None],
              n_seen=torch.tensor([0, 0, 2, 2]), certainty=torch.ones(4), n_mixed=n_mixed, plain=plain, labelled=torch.ones(4, dtype=torch.bool))

def by_hand(z_s, z_t, columns, tau=2.):
    s, t = (o[:, columns]/tau for o in (z_s, z_t))
    return tau**2*(t.softmax(1)*(t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()

@pytest.mark.parametrize('cls', [AverageCL, WAvgCL, ASIBCL])
@pytest.mark.parametrize('kd', [0., .7])
def test_the_loss_on_views(cls, kd):
    "CE + stored logits on the images, cl_kd_mix · KD on the views; value and gradient; no gradient to a teacher"
    dtype = torch.float32 if cls is ASIBCL else torch.float64             # the bridge is in single precision
    student, teachers = nets(dtype)
    given = dict(kd_alpha=kd, cl_kd_mix=3., cl_der_alpha=.1, hybrid_beta=0., feat_kd_alpha=0., rkd_loss_weight=0.)
    cfg = with_method_defaults(Config(cl_mode=True, tau_start=2., ce_alpha=1., **given), cls)
    m = cls(cfg, student, teachers, task=TaskContext(1, 2, ('expert', 'snapshot'))).to(dtype)
    m.prepare('B')
    assert m.views().plain == (kd > 0)
    b = batch_of(4, m.views().plain, dtype)
    s_out = student(b.x)
    t_outs = [t(b.x if b.plain else b.x[-4:]) for t in teachers]
    o = m.loss(b, s_out, t_outs, When())
    def target(ts, s): return m.soft_label(s, ts).detach()
    z, at = s_out['logit'], slice(-4, None)
    mixed = [t(b.x[at]) for t in teachers]
    want = F.cross_entropy(z[:2], b.y[:2]) + F.cross_entropy(z[2:4], b.y[2:]) + .1*((z[2:4, :2] - b.stored[2:, 0])**2).mean(1).mean()
    want = want + 3*by_hand(z[at], target(mixed, student(b.x[at])), range(4))
    if kd:
        want = want + kd*by_hand(z[:4], target([t(b.x[:4]) for t in teachers], student(b.x[:4])), range(4))
    assert torch.allclose(o['loss'], want, rtol=1e-5 if cls is ASIBCL else 1e-6), (o['loss'], want)
    assert set(o['parts']) == {'ce', 'ce_old', 'der', 'kd_mix'} | ({'kd'} if kd else set())
    params = list(student.parameters())
    got, ref = (torch.autograd.grad(v, params, retain_graph=True, allow_unused=True) for v in (o['loss'], want))
    assert all(torch.allclose(a, c, rtol=1e-4, atol=1e-7) for a, c in zip(got, ref) if a is not None)
    o['loss'].backward()
    assert all(p.grad is None for t in teachers for p in t.parameters())

def test_views_of_a_loader():
    "They are between an image and its partner, drawn by key, resumable; teachers are shown them alone; without: same bits"
    l = learner()
    ds = l.stream.task(0).train
    l.memory.add(ds, 0, 4, torch.zeros(len(ds), 1, 4), feature=ds.x.flatten(1).float())
    data, kw = l.stream.task(1), dict(seed=1, phase='x')
    def batches(views): return list(Replay(data, l.memory, 16, 1, views=views, **kw).epoch(0))
    with_views, without = batches(Views(aug='0')), batches(None)
    for a, b in zip(with_views, without):
        assert a.x[:32].equal(b.x) and a.y.equal(b.y) and a.n_mixed == 32 and a.for_teachers.x.equal(a.x[32:]) and b.for_teachers is b
    x, v = with_views[0].x[:32].flatten(1), with_views[0].x[32:].flatten(1)
    off = [min(((v[i] - x[i]).norm() + (v[i] - x[j]).norm() - (x[i] - x[j]).norm()).item() for j in range(32)) for i in range(32)]
    assert max(off) < 1e-3
    again = Replay(data, l.memory, 16, 1, views=Views(aug='0'), **kw)
    assert next(iter(again.epoch(0, 2))).x.equal(with_views[2].x)
    assert not batches(Views(aug='standard'))[0].x[32:].equal(with_views[0].x[32:])

# The cast

def cast(n, old, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(4*n) % 4
    def answers(right, k):
        said = torch.where(torch.rand(len(y), generator=g) < right, y, torch.randint(k, (len(y),), generator=g))
        return 4*(F.one_hot(said, 4)*(said < k)[:, None]).float() + torch.randn(len(y), 4, generator=g)
    z = torch.stack([answers(.7, 4), answers(old, 2)])
    return TeacherTable(z, [o.clone() for o in z], y, [None, torch.tensor([0, 1])], z[0], z[0])

@pytest.mark.parametrize('old,single', [(.1, 0), (1., None)])
def test_the_base_is_never_worse_than_the_best_teacher(old, single):
    "The weights where they win, else the teacher that knows all: on other images at least as good as the better of the two"
    acc = lambda b, t: (b(t.logits, t.columns).argmax(1) == t.y).float().mean().item()
    table, fresh = cast(30, old), cast(500, old, 1)
    base, which = cast_base(table)
    assert which == single and complete(table) == [0]
    alone = (fresh.logits[0].argmax(1) == fresh.y).float().mean().item()
    assert acc(base, fresh) > max(alone, acc(unfitted(2), fresh)) - .02 and acc(base, fresh) >= acc(fit_base(table), fresh) - .02

def test_leave_one_out_rows():
    "A closed-form teacher's own images enter the table as if it had not seen them"
    l = learner(cl_teachers='analytic')
    teacher, ds = l.compute_teacher(0), l.stream.task(0).train
    loader = l.eval_loader(ds, l.stream.data)
    from asibkd.trainers.tables import fitting_table
    table = fitting_table(l.student, [teacher], loader, l.ctx)
    out = left_out(table, [teacher])
    refit = learner(cl_teachers='analytic')
    rest = ds.subset(torch.arange(1, len(ds)))
    refit.analytic.learn(refit.eval_loader(rest, l.stream.data), 4)
    from asibkd.distil.analytic import AnalyticTeacher
    alone = AnalyticTeacher(refit.analytic.trunk, refit.analytic.sums, l.stream.data.shape, teacher.lam)
    z = alone(next(iter(loader.epoch(0))).x[:1])['logit'][0]/teacher.temperature
    assert torch.allclose(out.logits[0, 0, :4], z[:4], atol=1e-3*z.abs().max().item()) and not torch.allclose(table.logits[0, 0, :4], z[:4], atol=1e-3)

def test_fused_in_the_task_loop(whole):
    "A record a task from the second on, fitted on images that were held out; the target is a mixture or the analytic teacher"
    l, _ = whole
    assert [g['task'] for g in l.out.gates] == [2, 3]
    for g in l.out.gates:
        assert g['images']['split'] == 'held' and len(g['weights']) == len(g['temps']) == 3 and g['path'][0]['beta'] is None
        assert {'beta', 'base_nll', 'synergy_nll', 'average_nll', 'gate', 'single'} <= set(g)
    assert len(l.memory) + len(l.held) == 60 and torch.bincount(l.held.y).tolist() == [1]*10
    kept = {o.numpy().tobytes() for o in l.held.x}
    assert not kept & {o.numpy().tobytes() for t in range(3) for o in l.stream.task(t).train.x}        # never learnt from
    assert l.out.others[-1]['synergy'] > max(l.out.others[-1]['analytic1'] - .05, .8)

def test_what_is_held_out_is_counted(whole):
    "60 places: 50 images are replayed and ten held out, each of 3 · 8 · 8 bytes and a label of eight"
    l, _ = whole
    assert (len(l.memory), len(l.held)) == (50, 10)
    row = memory_columns(l)
    assert row['memory'] == 'replay' and row['memory_items'] == 60 == sum(l.out.composition[-1])
    logits = 2*(l.memory.n_seen.sum().item()*l.memory.logits.shape[1] + 50)                 # half precision, and a certainty
    assert row['logits_mb'] == pytest.approx(logits/1e6) and row['memory_mb'] == pytest.approx((60*(192 + 8) + logits)/1e6)

@exam
def test_resumed_between_tasks(whole):
    "What is held out survives; the next task's fusion is the same"
    a, state = whole
    c = learner(**ALL)
    c.restore(torch.load(state, weights_only=True))
    assert len(c.held) == 7 and c.memory.capacity == 53
    teachers, roles = c.gather_teachers(2)
    m = c.train_task(2, teachers, roles); c.consolidate(2, m); c.fill_memory(2, m, teachers); c.evaluate_task(2, m, teachers)
    assert c.out.gates == a.out.gates and c.out.class_il == a.out.class_il
    assert c.held.x.equal(a.held.x) and all(v.equal(a.student.state_dict()[k]) for k, v in c.student.state_dict().items())

# What the teacher is worth, and the ablations

def test_a_teacher_that_cannot_forget_pays():
    "Few remembered images: views of the analytic teacher against replay; the teacher alone is better than both"
    acc = lambda l: sum(l.out.class_il[-1])/3
    few = dict(replay_capacity=12, epochs=10, train_per_class=60)
    with_views, er = acc(learnt('avgz', cl_teachers='analytic', **few)), acc(learnt('er', **few))
    alone = learnt('analytic', **few)
    assert with_views > er + .02, (with_views, er)
    assert acc(alone) > with_views and alone.out.cost['student_images'] == 0 and alone.examined is not alone.student

@exam
@pytest.mark.parametrize('kw', [dict(cl_kd_mix=0, kd_alpha=1), dict(bridge_objective='distil', teacher_adapt_epochs=0), dict(cl_teachers='analytic'), dict(cl_der_alpha=0),
                                dict(cl_held=0), dict(bridge_images='train'), dict(use_ib=0), dict(feat_kd_alpha=1), dict(teacher_adapt_epochs=0)], ids=lambda kw: '-'.join(kw))
def test_ablations_by_flags(kw, whole_of_two):
    "No views, no bridge, no snapshot, no stored logits, …: each runs, and where a part is gone the student is another"
    l = learnt(**dict(num_tasks=2, epochs=1) | kw)
    same = all(v.equal(w) for v, w in zip(l.student.state_dict().values(), whole_of_two.values(), strict=True))
    assert not same or not {'cl_kd_mix', 'bridge_objective', 'cl_teachers', 'cl_der_alpha', 'cl_held'} & {*kw}
    if 'cl_teachers' in kw or kw.get('bridge_objective') or kw.get('cl_held') == 0:
        assert not l.out.gates
    else:
        assert l.out.gates[0]['images']['split'] == ('memory' if kw.get('bridge_images') else 'held')

@pytest.mark.parametrize('kw,say', [(dict(cl_method='er', cl_kd_mix=1), 'er does not distil'), (dict(cl_method='lwf', cl_kd_mix=1), 'lwf does not distil'),
                                    (dict(cl_method='analytic', cl_teachers='expert'), 'analytic teacher alone')], ids=lambda o: o if isinstance(o, str) else '')
def test_refused(kw, say):
    with pytest.raises(ConfigError, match=say):
        learner(kw['cl_method'], **{k: v for k, v in kw.items() if k != 'cl_method'})

@exam
def test_through_the_door(tmp_path):
    "wavg and analytic: rows, files, gates"
    from asibkd.run.experiment import run_experiment
    kw = {k: v for k, v in TINY.items() if k not in ('finetune_epochs', 'finetune_lr', 'teacher1_type', 'teacher_adapt_epochs', 'feat_kd_alpha')} | dict(report=0, compare=0, num_tasks=2)
    w = run_experiment(**kw, cl_method='wavg', results_dir=str(tmp_path))
    assert w['gates'][0]['images']['split'] == 'held' and w['rows'][-1]['statistics_mb'] > 0 and (Path(w['run'])/'student.safetensors').exists()
    a = run_experiment(**{k: v for k, v in kw.items() if k not in ('replay_capacity', 'replay_ratio', 'tau_start')}, cl_method='analytic', results_dir=str(tmp_path))
    row = a['rows'][-1]
    assert row['ACC'] > .8 and row['memory'] == 'none' and row['student_images'] == 0 and 'analytic' in row['model']
    assert (Path(a['run'])/'analytic.safetensors').exists() and not (Path(a['run'])/'student.safetensors').exists()
