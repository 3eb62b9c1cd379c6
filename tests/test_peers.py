"""Losses against what the peers' own code computes, each defined a second time here: float64, value and gradient.

The definitions follow RepDistiller, mdistiller, logit-standardization-KD, AE-KD, CA-MKD, RKD, Mammoth, AML and pathint.
The last part is the table of (parameter, method): a parameter has an effect on the loss, or it is refused."""
import copy, functools
from dataclasses import replace
from types import SimpleNamespace as NS

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from asibkd.cl.fisher import EWC, SI
from asibkd.cl.memory import ReplayBatch
from asibkd.cl.methods import TaskContext, cl_methods
from asibkd.core.config import Config, ConfigError, resolve
from asibkd.core.runtime import FOREIGN, When
from asibkd.distil.idle import idle_parameters, narrow_parameters, parameters_read, refuse_idle
from asibkd.distil.losses import at_loss, dkd_losses, pairwise, rkd_angle, rkd_distance
from asibkd.distil.methods import check_method, create_method, list_methods, with_method_defaults
from asibkd.distil.multi import PooledRegressor, min_norm, weigh_entropy, weigh_min_norm
from asibkd.distil.simkd import student_for
from asibkd.distil.single import aligned, hint_pair
from asibkd.models.kdmodel import spread_classes
from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher
from asibkd.run.experiment import check_typed, run_experiment
from asibkd.run.plans import params_of_method, plan_loop

double = dict(dtype=torch.float64)

def equal(loss, peer, *args, rtol=1e-6):
    "The same value, and the same gradient with respect to the first argument"
    got, want = [], []
    for f, out in ((loss, got), (peer, want)):
        a = args[0].detach().clone().requires_grad_()
        v = f(a, *args[1:])
        out += [v.detach(), *torch.autograd.grad(v, a)]
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=1e-12)
    torch.testing.assert_close(got[1], want[1], rtol=rtol, atol=rtol*want[1].abs().max().item())

@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=g, **double), 3*torch.randn(3, 6, 5, generator=g, **double), torch.tensor([0, 1, 2, 3, 4, 0])

# --- A7: logit standardisation reaches DKD -----------------------------------------------------------------------------
def peer_dkd(s, t, y, alpha, beta, tau, stand):
    "logit-standardization-KD, mdistiller/distillers/DKD.py: z-scores first, then the two masks"
    if stand:
        s, t = ((z - z.mean(-1, keepdim=True))/(1e-7 + z.std(-1, keepdim=True)) for z in (s, t))
    hit = F.one_hot(y, s.shape[1]).bool()
    ps, pt = (s/tau).softmax(1), (t/tau).softmax(1)
    two = lambda p: torch.stack([(p*hit).sum(1), (p*~hit).sum(1)], 1)
    tckd = F.kl_div(two(ps).log(), two(pt), reduction='sum')*tau**2/len(y)
    masked = lambda z: z/tau - 1000.*hit
    nckd = F.kl_div(masked(s).log_softmax(1), masked(t).softmax(1), reduction='sum')*tau**2/len(y)
    return alpha*tckd + beta*nckd

@pytest.mark.parametrize('stand', [False, True])
def test_A7_dkd_standardises_as_its_authors_do(logits, stand):
    z_s, z_t, y = logits
    def ours(s): a, b = dkd_losses(s, z_t[0], y, 4., stand); return 1.5*a + 8*b
    equal(ours, lambda s: peer_dkd(s, z_t[0], y, 1.5, 8., 4., stand), z_s, rtol=1e-5)

# --- E2: AEKD, EBKD ----------------------------------------------------------------------------------------------------
def peer_aekd(grads, C):
    "AE-KD, helper/optimization.py: gradients averaged over the batch, one-class SVM with ν = 1/(C·M), weights divided by M ν"
    from sklearn.svm import OneClassSVM
    m, mean = len(grads), np.stack([g.mean(0).numpy() for g in grads])
    nu = min(max(1/(C*m), 1/m), 1.)
    svm = OneClassSVM(kernel='precomputed', nu=nu, tol=1e-10).fit(mean @ mean.T*1e4)       # the SVM's own tolerance is absolute
    w = np.zeros(m); w[svm.support_] = svm.dual_coef_[0]/(m*nu)
    return torch.tensor(w)

@pytest.mark.parametrize('C', [1., .8, .6, .5, .4, .34])
@pytest.mark.parametrize('seed', range(3))
def test_E2_aekd_is_the_authors_problem(C, seed):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = torch.randn(8, 5, generator=g, **double), 3*torch.randn(3, 8, 5, generator=g, **double)
    grads = []
    for z in z_t:
        s = z_s.clone().requires_grad_()
        (F.kl_div((s/4).log_softmax(1), (z/4).softmax(1), reduction='sum')*16/len(s)).backward()   # their DistillKL
        grads.append(s.grad)
    ours, theirs = weigh_min_norm(z_s, z_t, None, 4., C)[:, 0], peer_aekd(grads, C)
    assert abs(ours.sum() - 1) < 1e-9 and ours.min() >= 0 and ours.max() <= max(C, 1/3) + 1e-5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    norm = lambda w: (w[:, None]*torch.stack(grads).mean(1)).sum(0).norm()
    assert norm(ours) <= norm(theirs)*(1 + 1e-4)                                            # and never the worse solution

def test_E2_aekd_tolerance_and_its_ends():
    g = torch.tensor([[3., 0.], [0., 1.]], **double)
    for cap, want in ((1., [.1, .9]), (.6, [.4, .6]), (.5, [.5, .5]), (.01, [.5, .5])):
        torch.testing.assert_close(min_norm(g @ g.T, cap), torch.tensor(want, **double), rtol=0, atol=1e-5)
    same = torch.ones(10, 10, **double)
    torch.testing.assert_close(min_norm(same, .6), torch.full((10,), .1, **double), rtol=0, atol=1e-3)
    with pytest.raises(ConfigError, match='aekd_c'): resolve(preset='none', method='aekd', aekd_c=1.5)
    assert resolve(preset='none', method='aekd')[1] == dict(aekd_c=.6)

def test_E2_aekd_gradients_follow_standardisation(logits):
    z_s, z_t, y = logits
    plain, stand = (weigh_min_norm(z_s, 5*z_t, y, 2., 1., o)[:, 0] for o in (False, True))
    torch.testing.assert_close(stand, weigh_min_norm(z_s, z_t + 3, y, 2., 1., True)[:, 0], rtol=0, atol=1e-6)   # free in scale
    assert (plain - stand).abs().max() > .01

def test_E2_a_class_no_teacher_knows_has_no_say(logits):
    z_s, z_t, y = logits
    z_t[1, :, :2] = FOREIGN
    other = z_t.clone(); other[1, :, :2] = FOREIGN - 50
    for stand in (False, True):
        torch.testing.assert_close(weigh_min_norm(z_s, z_t, y, 4., .6, stand), weigh_min_norm(z_s, other, y, 4., .6, stand))

def test_E2_ebkd_has_both_rules(logits):
    "CA-MKD, helper/loops.py: 1 − H/ΣH; there the sum over M teachers is M − 1"
    z_s, z_t, y = logits
    h = -(z_t.softmax(-1)*z_t.softmax(-1).log()).sum(-1)
    torch.testing.assert_close(weigh_entropy(z_s, z_t, y, 'share')*2, 1 - h/h.sum(0))
    torch.testing.assert_close(weigh_entropy(z_s, z_t, y), (-h).softmax(0))
    for n in (1, 2):
        w = weigh_entropy(None, torch.full((n, 2, 3), 0.).index_fill(2, torch.tensor([0]), 1e4), None, 'share')        # no entropy at all
        torch.testing.assert_close(w, torch.full((n, 2), 1/n))

# --- E3: defaults, CA-MKD's regressor, DKD's pairs ---------------------------------------------------------------------
@pytest.mark.parametrize('method,ce,kd', [('aver', 1., 1.), ('ebkd', 1., 1.), ('camkd', 1., 1.), ('fitnet_mkd', 1., 1.), ('aekd', 1., .9),
                                          ('avgz', .1, .9), ('vanilla_kd', .1, .9), ('dkd', 1., 0.)])
def test_E3_default_weights_are_the_authors(method, ce, kd):
    c = with_method_defaults(Config(), method)
    assert (c.ce_alpha, c.kd_alpha) == (ce, kd)
    assert with_method_defaults(Config(kd_alpha=.3), method).kd_alpha == .3

@pytest.mark.parametrize('size', [4, 8, 16, 5])
def test_E3_camkd_regressor(size):
    "CA-MKD, models/util.py CalWeight + Embed: pool or interpolate, then 1×1 convolution, BatchNorm, ReLU"
    torch.manual_seed(0)
    r, f = PooledRegressor((6, 8, 8), (3, size, size)).double(), torch.randn(4, 6, 8, 8, **double)
    def peer(x):
        x = F.adaptive_avg_pool2d(x, (size, size)) if 8 >= size else F.interpolate(x, size=(size, size), mode='bilinear')
        conv, bn, _ = r.net
        assert conv.kernel_size == (1, 1)
        x = torch.einsum('oi,bihw->bohw', conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]
        x = (x - x.mean((0, 2, 3), keepdim=True))/(x.var((0, 2, 3), unbiased=False, keepdim=True) + bn.eps).sqrt()
        return x.relu().pow(2).sum()
    equal(lambda x: r(x).pow(2).sum(), peer, f, rtol=1e-5)

def make_scene(use_adapter=False):
    "A batch, a student and two teachers, and what they say"
    torch.manual_seed(0)
    kw = dict(n_class=4, img_size=16, use_adapter=use_adapter)
    st = create_student('resnet8', **kw)
    ts = [create_teacher(n, **kw).eval() for n in ('resnet8', 'vgg8')]
    for t in ts: t.preact = True                                            # ReviewKD's targets
    b = NS(x=torch.randn(8, 3, 16, 16), y=torch.arange(8) % 4, idx=torch.arange(8)); b.hard = b.y
    with torch.no_grad(): outs = st.train()(b.x), [t(b.x) for t in ts]
    return NS(student=st, teachers=ts, batch=b, s_out=outs[0], t_outs=outs[1])

scene = pytest.fixture(make_scene, scope='module')

@pytest.fixture(scope='module')
def decided():
    "With adapters, and teachers who are sure of something, and not of the same"
    o = make_scene(use_adapter=True)
    o.t_outs = [t | dict(logit=3*F.one_hot(o.batch.y, 4) + 3*torch.randn(8, 4)) for t in o.t_outs]
    for t in o.t_outs: t['logit'][0] = torch.tensor([0., 9., 0., 0.])        # both wrong, and of one mind
    return o

def test_E3_no_feature_term_in_camkds_first_epoch(scene):
    m = create_method('camkd', Config(), scene.student, scene.teachers)
    parts = [sorted(m.loss(scene.batch, scene.s_out, scene.t_outs, When(epoch=e))['parts']) for e in range(3)]
    assert parts == [['ce', 'kd'], ['ce', 'feat', 'kd'], ['ce', 'feat', 'kd']]
    m = create_method('camkd', Config(), scene.student, scene.teachers, dict(camkd_skip_epochs=0))
    assert 'feat' in m.loss(scene.batch, scene.s_out, scene.t_outs, When())['parts']

def test_E3_dkd_pairs():
    "mdistiller, configs/cifar100/dkd: β"
    beta = {'resnet56-resnet20': 2, 'resnet110-resnet32': 2, 'resnet32x4-resnet8x4': 8, 'wrn_40_2-wrn_16_2': 6, 'wrn_40_2-wrn_40_1': 6, 'vgg13-vgg8': 6, 'vgg13-mobilenetv2_half': 6, 'wrn_40_2-shufflenetv1': 8}
    for k, v in beta.items():
        typed = dict(preset=f'pair/{k}', method='dkd')
        c = resolve(**typed)[0]
        assert (c.method, c.dkd_beta, f'{c.teacher_type}-{c.student_type}', c.epochs, c.dataset) == ('dkd', v, k, 240, 'cifar100')
        check_typed(c, typed)

# --- E4: stages from the front -----------------------------------------------------------------------------------------
def test_E4_stages_pair_from_the_front(scene):
    assert aligned('abcd', 'vwxyz') == list(zip('abcd', 'vwxyz')) and aligned('abcd', 'vwxyz', 'end')[0] == ('a', 'w')
    assert hint_pair('abcd', 'vwxyz', 3) == ('d', 'y')
    s, t = scene.s_out['stages'], scene.t_outs[1]['stages']
    assert (len(s), len(t)) == (4, 5)
    one = lambda **kw: create_method('at', Config(**kw), scene.student, scene.teachers[1:]).loss(scene.batch, scene.s_out, scene.t_outs[1:], When())['parts']['at']
    torch.testing.assert_close(one(), sum(at_loss(a, b) for a, b in zip(s[1:], t[1:])))      # RepDistiller: zip(g_s, g_t) without the stem
    torch.testing.assert_close(one(stage_pairs='end'), sum(at_loss(a, b) for a, b in zip(s[1:], t[2:])))
    m = create_method('fitnet', Config(hint_layer=2), scene.student, scene.teachers[1:])
    assert m.regress.hw == tuple(t[2].shape[-2:])

# --- E5: ER-ACE, RKD, AT, SI -------------------------------------------------------------------------------------------
def peer_at(s, t):
    "RepDistiller, distiller_zoo/AT.py"
    q = lambda f: F.normalize(f.pow(2).mean(1).view(f.size(0), -1))
    return (q(F.adaptive_avg_pool2d(s, t.shape[-2:])) - q(t)).pow(2).mean()

def test_E5_at_is_the_authors_mean_of_squares():
    g = torch.Generator().manual_seed(0)
    equal(at_loss, peer_at, torch.randn(4, 3, 8, 8, generator=g, **double), torch.randn(4, 5, 4, 4, generator=g, **double))

def peer_pdist(e):
    "RKD, metric/utils.py: never 0 off the diagonal, so that the mean runs over all B(B − 1) pairs"
    sq = e.pow(2).sum(1)
    d = (sq[:, None] + sq[None] - 2*e @ e.T).clamp(min=1e-12).sqrt()
    return d*(1 - torch.eye(len(e), **double))

def peer_rkd_distance(s, t):
    d, t_d = peer_pdist(s), peer_pdist(t)
    return F.smooth_l1_loss(d/d[d > 0].mean(), t_d/t_d[t_d > 0].mean())

def peer_rkd_angle(s, t):
    angle = lambda e: (lambda u: torch.bmm(u, u.transpose(1, 2)))(F.normalize(e[None] - e[:, None], p=2, dim=2))
    return F.smooth_l1_loss(angle(s).view(-1), angle(t).view(-1))

def test_E5_rkd_is_the_authors():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(6, 4, generator=g, **double), torch.randn(6, 7, generator=g, **double)
    equal(rkd_distance, peer_rkd_distance, s, t)
    equal(rkd_angle, peer_rkd_angle, s, t)

def test_E5_rkd_divides_by_all_pairs_where_rows_are_equal():
    e = torch.tensor([[0.], [0.], [0.], [1.]], **double)                  # 6 of 12 pairs are 1 apart
    assert pairwise(e).max().item() == pytest.approx(2.) and pairwise(e).sum().item() == pytest.approx(12.)
    torch.testing.assert_close(pairwise(e), peer_pdist(e)/peer_pdist(e)[peer_pdist(e) > 0].mean(), rtol=1e-5, atol=1e-5)
    s = e.clone().requires_grad_(); rkd_distance(s, e.flip(0)).backward(); assert s.grad.isfinite().all()

def ace(labels, first, is_new):
    c = with_method_defaults(resolve(preset='none', cl_mode=1, cl_method='er_ace')[0], cl_methods['er_ace'])
    st = create_student('mlp', n_class=6, img_size=8)
    z = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, new = torch.tensor(labels), torch.tensor(is_new)
    b = ReplayBatch(None, y, torch.arange(len(y)), None, is_new=new, stored=torch.zeros(len(y), 1, 6), n_seen=torch.full((len(y),), 6))
    return z, y, new, cl_methods['er_ace'](c, st, [], None, TaskContext(first > 0, first)).loss(b, dict(logit=z), [], When())

def test_E5_er_ace_opens_the_classes_of_the_batch():
    "Mammoth, models/er_ace.py: the incoming images' softmax runs over the classes present among them"
    z, y, new, o = ace([4, 2, 4, 0, 5], 2, [True]*3 + [False]*2)
    present = [2, 4]                                                      # 3 and 5 are of the task, too, but not in the batch
    want = -z[:3].softmax(1)[range(3), y[:3]].log() + (z[:3].softmax(1)[:, present].sum(1)).log()
    torch.testing.assert_close(o['parts']['ce'], want.mean().detach())
    torch.testing.assert_close(o['parts']['ce_old'], F.cross_entropy(z[3:], y[3:]).detach())
    o['loss'].backward()
    assert z.grad[:3, [0, 1, 3, 5]].abs().max() == 0 and z.grad[:3, present].abs().min() > 0
    z, y, _, o = ace([1, 0, 1], 0, [True]*3)                              # the first task: no mask
    torch.testing.assert_close(o['parts']['ce'], F.cross_entropy(z, y).detach())

def test_E5_si_clamps_what_has_accumulated():
    "pathint, protocols.py: Ω ← relu(Ω + ω/(Δ² + ξ)), also where a task took importance away"
    net = torch.nn.Linear(3, 1, bias=False).double()
    with torch.no_grad(): net.weight.copy_(torch.tensor([[1., 1., 1.]]))
    si, omega = SI(net, xi=.1), torch.zeros(1, 3, **double)
    for path in ([2., .3, -1.], [-.5, -1., .2], [.1, .2, .3]):            # Σ −g Δθ of three tasks
        way = torch.tensor([[.5, -.2, .1]], **double)
        with torch.no_grad(): net.weight.add_(way)
        si.omega0.copy_(torch.tensor([path]))
        si.consolidate()
        omega = (omega + torch.tensor([path], **double)/(way**2 + .1)).relu()
        torch.testing.assert_close(si.importance0, omega)
    assert omega[0, 0] > 0 and (omega >= 0).all() and si.omega0.abs().sum() == 0

# --- A7: every (parameter, method): an effect, or refused ----------------------------------------------------------------
OTHER = dict(   # a value that is not the default
    ce_alpha=.37, kd_alpha=.53, tau_start=2., tau_end=1., tau_decay_power=3., logit_standardization=True, rkd_loss_weight=3., use_disagree_weight=True, disagree_mode='any_wrong',
    disagree_lambda_high=4., disagree_lambda_low=3., use_certainty_weight=True, hint_layer=1, stage_pairs='end', hint_beta=7., at_beta=9., crd_feat_dim=16, crd_nce_k=5,
    crd_nce_t=.2, crd_momentum=.1, dkd_alpha=3., dkd_beta=1., dkd_warmup=3, use_ib=False, ib_beta=.5, mbm_query_dim=8, mbm_out_dim=8, mbm_r=2, mbm_n_head=2, mbm_learnable_q=True,
    mbm_dropout=.5, mbm_tokens='spatial', synergy_head_dropout=.5, synergy_base='none', bridge_objective='both', synergy_ce_alpha=1., synergy_kd_alpha=.3, teacher_adapt_kd_warmup=0,
    mbm_reg_lambda=.1, hybrid_beta=.5, feat_kd_alpha=1., feat_kd_norm='l2', feat_kd_target='synergy', use_distillation_adapter=True)
TRAINING = {    # read outside the loss: tests/test_flags.py sees their effect end to end
    'mbm_type', 'synergy_gate', 'teacher_adapt_epochs', 'teacher_lr', 'teacher_weight_decay', 'mbm_lr_factor', 'ib_beta_warmup_epochs', 'reg_lambda', 'feat_kd_key', 'distill_hidden_dim',
    'distill_out_dim', 'use_partial_freeze', 'bridge_images', 'cl_trunk', 'analytic_dim', 'analytic_lambda', *(f'teacher{i}_{k}' for i in (1, 2) for k in ('freeze_level', 'freeze_scope', 'freeze_bn', 'bn_head_only'))}
BASE = dict(hint_layer=2, crd_nce_k=8, disagree_lambda_high=2., dkd_warmup=2)

def test_A7_the_table_is_complete():
    assert {*OTHER} | TRAINING == narrow_parameters(Config()) and not {*OTHER} & TRAINING

def one_step(method, scene, **given):
    "The losses of one step: phase A where there is one, and phase B, of untrained networks"
    cfg, o, cls, out = Config(**BASE | given), scene, check_method(method), []
    last = slice(1 if cls.teachers_used == 'one' else 0, None)
    torch.manual_seed(0)
    st = student_for(method, o.student, o.teachers[last])
    s_out = o.s_out if st is o.student else st(o.batch.x)
    m = create_method(method, cfg, st, o.teachers[last], None, torch.arange(40) % 4).train()
    for p in m.parameters(): p.data.add_(.1*torch.randn_like(p))            # what begins at zero has no effect yet
    for phase in 'AB' if cls.adapts else 'B':
        m.prepare(phase); torch.manual_seed(1)
        when = When(phase, stage=0, epoch=1, epochs=4)
        got = (m.adapt_loss if phase == 'A' else m.loss)(o.batch, s_out, o.t_outs[last], when)
        out += [got['loss'].item(), *(v.item() for v in got['parts'].values())]
    after = [v.double().sum().item() for k, v in m.state_dict().items() if 'bank' in k]       # CRD's memory after the step
    return out + after

NEEDS = dict(tau_decay_power=dict(tau_end=1.), **dict.fromkeys(('disagree_mode', 'disagree_lambda_high', 'disagree_lambda_low'), dict(use_disagree_weight=True)))

@pytest.mark.parametrize('method', list_methods())
def test_A7_every_parameter_has_an_effect_or_is_refused(method, decided):
    cls, before = check_method(method), {}
    def step(**given):
        key = repr(sorted(given.items()))
        if key not in before: before[key] = one_step(method, decided, **given)
        return before[key]
    def config(**given): return Config(**BASE | given)
    for under in ({}, dict(kd_alpha=.5, bridge_objective='both', feat_kd_alpha=2.)):
        idle = {}
        for k, v in OTHER.items():
            if k in under: continue
            base = under | (NEEDS.get(k, {}) if under else {})
            if k in parameters_read(config(**base), [cls]) | parameters_read(config(**base, **{k: v}), [cls]):
                assert step(**base, **{k: v}) != step(**base), f'{method} says that it reads {k}; {k}={v} changed nothing ({base})'
            else: idle[k] = v
        for k, v in idle.items():
            with pytest.raises(ConfigError, match=f'^{k}=.* has no effect with {method}: .*leave {k} out'): refuse_idle([k], config(**under, **{k: v}), method, [cls])
        together = config(**under, **idle)                      # all of them at once: not a bit of the loss moves
        alone = {k: v for k, v in idle.items() if k not in parameters_read(together, [cls])}
        assert step(**under, **alone) == step(**under), f'{method} reads one of {", ".join(alone)}, and does not name it in `reads`'

def test_A7_the_door_refuses(tmp_path):
    run = lambda **kw: run_experiment(preset='quickstart', results_dir=str(tmp_path/'r'), compare=0, **kw)
    with pytest.raises(ConfigError, match='logit_standardization=True has no effect with method=at: it needs another kd_alpha'): run(method='at', logit_standardization=1)
    with pytest.raises(ConfigError, match='use_disagree_weight=True has no effect with method=avgz'): run(method='avgz', use_disagree_weight=1)
    with pytest.raises(ConfigError, match='ib_beta=0.5 has no effect with method=dkd'): run(method='dkd', ib_beta=.5)
    with pytest.raises(ConfigError, match='si_c=9.0 has no effect with cl_method=er'): run(cl_mode=1, cl_method='er', si_c=9.)
    assert not (tmp_path/'r').exists()                                                        # before anything is made

def test_A7_what_a_baseline_reads_counts(tmp_path):
    cfg = resolve(preset='none', method='rkd', tau_start=2., compare=1)[0]
    assert check_typed(cfg, dict(tau_start=2.)) == ''
    f = tmp_path/'p.yaml'; f.write_text('dkd_beta: 2\nmethod: avgz\n')                         # a file may serve several methods
    assert check_typed(resolve(str(f), preset='none')[0], {}, str(f)) == 'without effect with method=avgz: dkd_beta=2.0'

def test_A7_a_loop_gives_each_method_what_it_reads():
    plan = plan_loop('dkd asmb ce', '0', dict(preset='none', dkd_beta=2., ib_beta=.5, batch_size=8))
    assert {m: sorted(params_of_method(plan, m)) for m in plan.methods} == dict(
        dkd=['batch_size', 'compare', 'dkd_beta', 'preset'], asmb=['batch_size', 'compare', 'ib_beta', 'preset'], ce=['batch_size', 'compare', 'preset'])
    plan = plan_loop('avgz ce', '0', dict(preset='none', dkd_beta=2.))
    assert 'dkd_beta' in params_of_method(plan, 'ce')                                          # nobody reads it: the run will refuse it
    assert idle_parameters(['dkd_beta'], Config(dkd_beta=2.), map(check_method, plan.methods)) == ['dkd_beta']

# --- the same for continual methods --------------------------------------------------------------------------------------
CL_OTHER = dict(ce_alpha=.37, kd_alpha=.53, tau_start=3., tau_end=1.5, logit_standardization=True, cl_mask='ace', cl_old_kd=.3, cl_replay_ce=.2, cl_der_alpha=.7, cl_der_loss='kl', lambda_ewc=3.,
                si_c=9., hybrid_beta=.5, feat_kd_alpha=1., rkd_loss_weight=2., synergy_ce_alpha=.9, synergy_kd_alpha=.4, use_ib=False, ib_beta=.3, dkd_beta=2., hint_beta=3.)

@functools.lru_cache
def networks():
    torch.manual_seed(0)
    return create_student('mlp', n_class=4, img_size=8), spread_classes(create_student('mlp', n_class=2, img_size=8), [0, 1], 4).eval()

def cl_step(method, **given):
    "The losses of one step of the second task: two new images, two replayed ones"
    cls, (st, snapshot) = cl_methods[method], copy.deepcopy(networks())
    torch.manual_seed(0)
    c = with_method_defaults(Config(cl_mode=True, cl_method=method, bridge_objective='both', **given), cls)
    x, y, new = torch.randn(4, 3, 8, 8), torch.tensor([2, 2, 0, 1]), torch.tensor([True, True, False, False])
    stored = dict(stored=torch.randn(4, 1, 2)*~new[:, None, None], n_seen=torch.tensor([0, 0, 2, 2]), certainty=torch.ones(4))
    if not (cls.rehearses or cls.is_teacher): y, new, stored = torch.tensor([2, 2, 3, 2]), torch.ones(4).bool(), {}
    b = ReplayBatch(x, y, torch.arange(4), None, is_new=new, **stored)
    ewc = EWC() if cls.cumulative else EWC().consolidate(st.model, {k: torch.ones_like(v) for k, v in st.model.named_parameters()})
    si = SI(st.model); si.omega0 += 1.; si.consolidate()
    ts = [] if cls.teachers_used == 'none' else [snapshot]
    m = cls(c, st, ts, None, TaskContext(1, 2, ('snapshot',) if ts else (), ewc, si)).train()
    for p in (*m.parameters(), *st.parameters()): p.data.add_(.1*torch.randn_like(p))
    s_out, t_outs, out = st(x), [t(x) for t in ts], []
    for phase in 'AB' if cls.adapts else 'B':
        if phase == 'B' and cls.mixes and m.views():                                         # views between the images, behind them
            b = replace(b, x=torch.cat([x, x.roll(1, 0)/2 + x/2]), n_mixed=4, plain=m.views().plain)
            s_out, t_outs = st(b.x), [t(b.for_teachers.x) for t in ts]
        m.prepare(phase); torch.manual_seed(1)
        o = (m.adapt_loss if phase == 'A' else m.loss)(b, s_out, t_outs, When(phase, stage=1, epoch=1, epochs=4))
        out += [o['loss'].item(), *(v.item() for v in o['parts'].values())]
    return out

@pytest.mark.parametrize('method', sorted(cl_methods))
def test_A7_continual_methods_too(method):
    cls, base = cl_methods[method], cl_step(method)
    for k, v in CL_OTHER.items():
        if k == 'cl_mask' and cls.classifies_by_means: continue                               # check_cl refuses it
        if v == cls.defaults.get(k): v = 'seen'                                              # er_ace
        c = resolve(preset='none', cl_mode=1, num_stages=1, cl_method=method, bridge_objective='both', finetune_epochs=1, **{k: v})[0]
        if k in parameters_read(c, [cls]):
            assert cl_step(method, **{k: v}) != base, f'{method} says that it reads {k}; {k}={v} changed nothing'
        else:
            assert cl_step(method, **{k: v}) == base, f'{k}={v} has an effect on {method}, which does not name it in `reads`'
            with pytest.raises(ConfigError, match=f'{k}=.*(has no effect|has no such term)'): check_typed(c, [k])
