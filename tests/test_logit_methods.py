"""The logit methods against second definitions, written as their authors' code has them, at their limits, and the sums
of methods (`method=crd+wttm`), from the loss to the run folder."""
import json, math
from pathlib import Path
from types import SimpleNamespace as NS

import pytest
import torch
import torch.nn.functional as F

from _stop import Stop, StopInStep
from asibkd import run as door     # importing it registers every method of the package
from asibkd.core.config import ConfigError, resolve
from asibkd.core.runtime import UNLABELLED, When
from asibkd.distil.crd import CRDParams
from asibkd.distil.logits import WTTMParams
from asibkd.distil.methods import check_method, create_method, list_methods, refuse_unlabelled
from asibkd.run.experiment import run_experiment

B, K = 12, 7

def dist(z_s, z_t, y, epoch):
    def cosine(a, b): return (a*b).sum(1)/(a.norm(dim=1)*b.norm(dim=1) + 1e-8)
    def pearson(a, b): return cosine(a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1))
    s, t = (z_s/4).softmax(1), (z_t/4).softmax(1)
    return 2*16*(1 - pearson(s, t).mean()) + 2*16*(1 - pearson(s.t(), t.t()).mean())

def transformed(z_s, z_t, gamma, by_power):
    p = torch.pow(z_t.softmax(1), gamma)
    norm = p.sum(1)
    kl = F.kl_div(z_s.log_softmax(1), p/norm.unsqueeze(1), reduction='none').sum(1)
    return (norm*kl if by_power else kl).mean()

def rld(z_s, z_t, y, epoch):
    def binary(z, c):
        p = z.softmax(1).gather(1, c[:, None])
        return torch.cat([p, 1 - p], 1)
    s, t = binary(z_s, y), binary(z_t, z_t.argmax(1))
    scd = (t*(t.log() - s.log())).sum(1).mean()
    mcd = 0.
    for zs, zt, c in zip(z_s, z_t, y):
        keep = zt < zt[c]
        if keep.any():
            p, q = (zt[keep]/4).softmax(0), (zs[keep]/4).softmax(0)
            mcd = mcd + 16*(p*(p/q).log()).sum()/len(y)
    return min((epoch + 1)/20, 1)*(scd + 8*mcd)

def normkd(z_s, z_t, y, epoch):
    t, s = 2*z_t.std(1, keepdim=True), 2*z_s.std(1, keepdim=True)
    kl = F.kl_div((z_s/s).log_softmax(1), (z_t/t).softmax(1), reduction='none').sum(1, keepdim=True)
    return .9*(kl*t**2).mean()

def ctkd(z_s, z_t, y, epoch):
    tau = 1 + 20/(1 + math.exp(-1))
    return .9*tau**2*F.kl_div((z_s/tau).log_softmax(1), (z_t/tau).softmax(1), reduction='batchmean')

def ofa(z_s, z_t, y, epoch):
    one = F.one_hot(y, z_s.shape[1]).to(z_s.dtype)
    return -((z_t.softmax(1) + one)**1.3 - one).mul(z_s.softmax(1).log()).sum(1).mean()

SECOND = dict(dist=dist, ttm=lambda s, t, y, e: 45*transformed(s, t, .1, False), wttm=lambda s, t, y, e: 4*transformed(s, t, .2, True), rld=rld, normkd=normkd, ctkd=ctkd, ofa=ofa)
CE = dict(normkd=.1, ctkd=.1)
OWN = dict(ofa=dict(ofa_eps=1.3))

def make(name, k=K, extra=None, **kw):
    cfg, given = resolve(preset='none', method=name, **{**OWN.get(name, {}), **(extra or {}), **kw})
    net = NS(feat_dim=4, n_class=k, name='net')
    return create_method(name, cfg, net, [net], given)

def scene(b=B, k=K, scale=1., seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (scale*torch.randn(b, k, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    y = torch.arange(b) % k
    return z_s.requires_grad_(), (2*z_t).requires_grad_(), NS(y=y, hard=y)

def z_score(z): return (z - z.mean(1, keepdim=True))/z.std(1, keepdim=True)

@pytest.mark.parametrize('standardised', (0, 1))
@pytest.mark.parametrize('name', SECOND)
def test_value_and_gradient(name, standardised):
    "Equal to the second definition, CE beside it, in float64; no gradient reaches the teacher"
    m = make(name, logit_standardization=standardised)
    for epoch, seed in ((0, 1), (30, 2)):
        z_s, z_t, batch = scene(seed=seed)
        loss = m.loss(batch, dict(logit=z_s), [dict(logit=z_t)], When(epoch=epoch, epochs=40))['loss']
        got, leaked = torch.autograd.grad(loss, (z_s, z_t), allow_unused=True)
        assert leaked is None
        pair = (z_score(z_s), z_score(z_t)) if standardised else (z_s, z_t)
        want = CE.get(name, 1.)*F.cross_entropy(z_s, batch.y) + SECOND[name](*pair, batch.y, epoch)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(got, torch.autograd.grad(want, z_s)[0], rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('name', SECOND)
def test_limits(name):
    "B = 1, K = 2, equal rows, logits of ±1e4 and half types: a finite value and a finite gradient"
    for b, k in ((1, K), (B, 2), (1, 2)):
        for scale, dtype in ((1., torch.float32), (1e4, torch.float32), (1e4, torch.float64), (0., torch.float32), (3., torch.float16), (3., torch.bfloat16), (1e4, torch.bfloat16)):
            z_s, z_t, batch = scene(b, k, scale, dtype=dtype)
            for when in (When(epoch=0), When(epoch=25)):
                o = make(name, k).loss(batch, dict(logit=z_s), [dict(logit=z_t)], when)
                assert o['loss'].isfinite() and o['loss'].dtype == (torch.float64 if dtype == torch.float64 else torch.float32), (b, k, scale, dtype)
                assert torch.autograd.grad(o['loss'], z_s)[0].isfinite().all(), (b, k, scale, dtype)

@pytest.mark.parametrize('name', [n for n in SECOND if n != 'ofa'])
def test_zero_where_nothing_is_left_to_learn(name):
    "The student that the method asks for has loss 0, and no gradient; no other is below"
    y = torch.arange(B) % K
    right = 6*F.one_hot(y, K).double() + torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    best = {'ttm': .1*right, 'wttm': .2*right}.get(name, right).clone().requires_grad_()
    extra = dict(rld_warmup=0) if name == 'rld' else {}
    m = make(name, extra=extra, ce_alpha=0)
    o = m.loss(NS(y=y, hard=y), dict(logit=best), [dict(logit=right)], When())
    assert abs(o['loss'].item()) < 1e-4 and torch.autograd.grad(o['loss'], best)[0].abs().max() < 1e-5
    for seed in range(5):
        z_s, z_t, batch = scene(seed=seed)
        assert m.loss(batch, dict(logit=z_s), [dict(logit=z_t)], When())['loss'] >= 0

def test_a_normalised_scale_is_no_matter():
    "NormKD of standardised logits is Sun's standardised KD; DIST and NormKD do not see a factor of the student's logits as KD does"
    z_s, z_t, batch = scene()
    a = make('normkd', logit_standardization=1, kd_alpha=1., ce_alpha=0).loss(batch, dict(logit=z_s), [dict(logit=z_t)], When())['loss']
    b = make('vanilla_kd', logit_standardization=1, tau_start=2., kd_alpha=1., ce_alpha=0).loss(batch, dict(logit=z_s), [dict(logit=z_t)], When())['loss']
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('name', SECOND)
def test_labels_that_are_mixed_or_missing(name):
    "MixUp: the dominant label counts. Without a label: the teacher alone, or a refusal"
    z_s, z_t, batch = scene()
    hard = make(name).loss(batch, dict(logit=z_s), [dict(logit=z_t)], When())['parts']
    soft = NS(y=.7*F.one_hot(batch.y, K).double() + .3*F.one_hot(batch.y.flip(0), K).double(), hard=batch.y)
    mixed = make(name).loss(soft, dict(logit=z_s), [dict(logit=z_t)], When())['parts']
    assert mixed['ce'] != hard['ce'] and all(mixed[k] == hard[k] for k in hard if k != 'ce')
    if name == 'rld':
        with pytest.raises(ConfigError, match='needs a label on every image'): refuse_unlabelled('method=rld', [check_method('rld')], 5)
        return
    none = torch.full((B,), UNLABELLED)
    o = make(name).loss(NS(y=none, hard=none), dict(logit=z_s), [dict(logit=z_t)], When())
    assert o['parts']['ce'] == 0 and o['loss'].isfinite() and torch.autograd.grad(o['loss'], z_s)[0].abs().sum() > 0
    if name != 'ofa': assert all(o['parts'][k] == hard[k] for k in hard if k != 'ce')

@pytest.mark.parametrize('name', [n for n in SECOND if n != 'rld'])
def test_a_teacher_of_some_classes(name):
    "Compared on the classes it knows: no gradient on the others, and what stands there does not count"
    known = torch.tensor([0, 2, 5])
    z_s, z_t, batch = scene()
    def outcome(z): return make(name, ce_alpha=0).loss(batch, dict(logit=z_s), [dict(logit=z, columns=known)], When())['loss']
    foreign = z_t.detach().clone(); foreign[:, [1, 3, 4, 6]] = -1e4
    a = outcome(z_t)
    assert a == outcome(foreign)
    g = torch.autograd.grad(a, z_s)[0]
    assert g[:, [1, 3, 4, 6]].abs().sum() == 0 and g[:, known].abs().sum() > 0
    assert not check_method('rld').allows_class_subsets

def test_the_temperature_of_ctkd():
    "θ alone, λ from 0 to −1: its gradient is that of the loss, times λ; the log shows τ"
    z_s, z_t, batch = scene()
    def gradient(epoch):
        m = make('ctkd', kd_alpha=1., ce_alpha=0)
        o = m.loss(batch, dict(logit=z_s), [dict(logit=z_t)], When(epoch=epoch))
        assert o['parts']['tau'].item() == pytest.approx(1 + 20/(1 + math.exp(-1)), rel=1e-6)
        assert [k for k, _ in m.named_parameters()] == ['theta']
        return torch.autograd.grad(o['loss'], m.theta)[0].item()
    theta = torch.tensor(1., dtype=torch.float64, requires_grad=True)
    tau = 1 + 20*theta.sigmoid()
    true = torch.autograd.grad(tau**2*F.kl_div((z_s/tau).log_softmax(1), (z_t.detach()/tau).softmax(1), reduction='batchmean'), theta)[0].item()
    for epoch, by in ((0, (math.cos(math.pi/10) - 1)/2), (4, -.5), (9, -1.), (100, -1.)):
        assert gradient(epoch) == pytest.approx(by*true, rel=1e-5)
    assert not [*make('ctkd', kd_alpha=0.).parameters()]      # nothing is trained that nothing reads

# Sums

def images(n=40, k=4):
    from asibkd.models.students import create_student
    from asibkd.models.teachers import create_teacher
    torch.manual_seed(0)
    st, te = create_student('resnet8', n_class=k, img_size=16).eval(), create_teacher('resnet8', n_class=k, img_size=16).eval()
    y = torch.arange(8) % k
    return st, te, NS(x=torch.randn(8, 3, 16, 16), y=y, hard=y, idx=torch.arange(8)), torch.arange(n) % k

def outcome(name, **kw):
    "Loss, gradient at the first layer, and terms; the draws of negatives are the same for everybody"
    st, te, batch, labels = images()
    cfg, extra = resolve(preset='none', method=name, **kw)
    with torch.no_grad(): t_outs = [te(batch.x)]
    torch.manual_seed(1)
    m = create_method(name, cfg, st, [te], extra, labels)
    torch.manual_seed(2)
    o = m.loss(batch, st(batch.x), t_outs, When(epoch=3))
    return o['loss'], torch.autograd.grad(o['loss'], st.model.conv1.weight)[0], o['parts']

@pytest.mark.parametrize('a,b', (('crd', 'wttm'), ('crd', 'normkd'), ('rkd', 'dist'), ('itrd', 'wttm'), ('dkd', 'at')))
def test_the_sum_of_two(a, b):
    "Value, gradient and logged terms are the sum, the cross-entropy stands once"
    own = {'crd': dict(crd_nce_k=8), 'dkd': dict(dkd_warmup=1)}
    one = outcome(a, **own.get(a, {}))
    two = outcome(b, **own.get(b, {}), ce_alpha=0)
    both = outcome(f'{a}+{b}', **own.get(a, {}), **own.get(b, {}))
    torch.testing.assert_close(both[0], one[0] + two[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1], one[1] + two[1], rtol=1e-4, atol=1e-4)
    assert both[2].keys() == one[2].keys() | two[2].keys() and all(v == (one[2] | two[2])[k] for k, v in both[2].items())
    assert list(both[2]).count('ce') == 1

def test_their_parameters_keep_their_names():
    _, extra = resolve(preset='none', method='crd+wttm', crd_beta=.4, wttm_gamma=.3)
    assert extra == CRDParams(crd_beta=.4).model_dump() | WTTMParams(wttm_gamma=.3).model_dump()
    with pytest.raises(ConfigError, match="belongs to method ttm"): resolve(preset='none', method='crd+wttm', ttm_beta=1.)
    with pytest.raises(ConfigError, match="wttm_beta"): resolve(preset='none', method='crd+wttm', wttm_beta=-1.)
    assert 'crd+wttm' not in list_methods() and set(check_method('crd+wttm').cited_by) >= {'zheng2024ttm'}

NONSENSE = {'ce+crd': 'every method has the cross-entropy already', 'asmb+crd': 'trains a bridge in a phase of its own', 'crd+crd': "'crd' twice", 'crd+': "Unknown method ''",
            'crd+wtm': "Did you mean 'wttm'", 'crd+aver': 'crd learns from one teacher, aver from all', 'vanilla_kd+normkd': 'are both weighted by kd_alpha', 'wavg+aver': 'fits a fusion of the teachers',
            'simkd+ce': 'defines the whole `loss`'}

@pytest.mark.parametrize('name', NONSENSE)
def test_nonsense_is_refused_in_a_sentence(name, tmp_path):
    with pytest.raises(ConfigError) as e: run_experiment(preset='quickstart', method=name, results_dir=str(tmp_path))
    assert NONSENSE[name] in str(e.value) and '\n' not in str(e.value) and not [*tmp_path.iterdir()]

def test_a_parameter_that_no_part_reads_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='hint_beta=3.0 has no effect with method=crd.wttm'): run_experiment(preset='quickstart', compare=0, method='crd+wttm', hint_beta=3., results_dir=str(tmp_path))
    with pytest.raises(ConfigError, match='tau_start=2.0 has no effect with method=wttm'): run_experiment(preset='quickstart', compare=0, method='wttm', tau_start=2., results_dir=str(tmp_path))
    with pytest.raises(ConfigError, match='tau_start=2.0 has no effect with method=crd.normkd'): run_experiment(preset='quickstart', compare=0, method='crd+normkd', tau_start=2., results_dir=str(tmp_path))

SMALL = dict(preset='quickstart', compare=0, report=0, device='cpu', teacher1_type='resnet8', teacher2_type='resnet8', num_stages=1, finetune_epochs=0, allow_untrained=1, student_epochs_per_stage=2,
             train_per_class=6, batch_size=8, log_level='ERROR')

def test_a_sum_runs_resumes_and_is_taken_away(tmp_path, short_exam):
    "Stopped within an epoch and started again: the same bits; the student loads; config.json names every parameter"
    from asibkd import load_student
    args = SMALL | dict(method='crd+wttm', crd_nce_k=16, wttm_beta=2., checkpoint_steps=3)
    whole = run_experiment(**args, results_dir=str(tmp_path/'whole'))
    with pytest.raises(Stop): run_experiment(**args, results_dir=str(tmp_path/'cut'), callbacks=[StopInStep(8)])
    again = run_experiment(**args, results_dir=str(tmp_path/'cut'))
    assert (Path(again['run'])/'student_last.safetensors').read_bytes() == (Path(whole['run'])/'student_last.safetensors').read_bytes()
    rows = [json.loads(o) for o in (Path(whole['run'])/'metrics.jsonl').read_text().splitlines()]
    assert {'train_ce', 'train_crd', 'train_wttm'} <= {*rows[-1]} or {'ce', 'crd', 'wttm'} <= {*rows[-1]}, rows[-1]
    saved = json.loads((Path(whole['run'])/'config.json').read_text())
    assert (saved['method'], saved['wttm_beta'], saved['crd_beta'], saved['ce_alpha'], saved['kd_alpha']) == ('crd+wttm', 2., .8, 1., 0.)
    assert Path(whole['run']).name.startswith('crd+wttm-') and load_student(whole['run']) is not None

def test_sums_in_a_loop_and_with_a_plugin(tmp_path, short_exam):
    "Each method of the loop gets its own parameters; a part may be the user's, whose code is part of the run's name"
    from asibkd.run.loops import run_loop
    plugin = tmp_path/'mine.py'
    text = ("from asibkd import register_method\nfrom asibkd.distil.single import SingleTeacher\n@register_method('small_logits')\nclass Small(SingleTeacher):\n    'Small logits'\n"
            "    def own_terms(self, batch, s_out, t_outs, when): return dict(size=(1., s_out['logit'].pow(2).mean()))\n")
    plugin.write_text(text)
    kw = SMALL | dict(student_epochs_per_stage=1, plugin=str(plugin), results_dir=str(tmp_path/'r'), wttm_beta=2.)
    done = run_loop('wttm,wttm+small_logits', '1', **kw)
    assert [s['method'] for s in done] == ['wttm', 'wttm+small_logits'] and [s['method_params']['wttm_beta'] for s in done] == [2., 2.]
    plugin.write_text(text.replace('1.,', '3.,'))
    s = run_experiment(**kw, method='wttm+small_logits', seed=1)
    assert s['run'] != done[1]['run']
