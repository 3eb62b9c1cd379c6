"The second synergy: each part of its formula by hand, its limits, its path, and phase A on a table."
import json
from math import exp, log
from pathlib import Path
from types import SimpleNamespace as NS

import pytest
import torch
from torch import nn

from asibkd.core.config import Config, ConfigError
from asibkd.core.runtime import FOREIGN, When, base_of, objective_of
from asibkd.distil.asmb import refuse_bridge
from asibkd.distil.fusion import Base, TeacherTable, fit_base
from asibkd.distil.methods import create_method
from asibkd.distil.metrics import nll
from asibkd.distil.path import PATH, asked, fit_path
from asibkd.ib_mbm import calibrated, energy, fuse
from asibkd.run.experiment import run_experiment

pytestmark = pytest.mark.usefixtures('full_path')

def by_hand(logits, temps, w, u, delta, known):
    "The formula in loops over plain numbers"
    m, n, k = len(logits), len(logits[0]), len(delta[0])
    out = [[FOREIGN]*k for _ in range(n)]
    for i in range(n):
        logp = []
        for t in range(m):
            z = [logits[t][i][c]/temps[t] for c in known[t]]
            norm = log(sum(exp(o - max(z)) for o in z)) + max(z)
            logp.append(dict(zip(known[t], (o - norm for o in z))))
        for c in range(k):
            experts = [t for t in range(m) if c in known[t]]
            if experts:
                total = sum(w[i][t] for t in experts)
                out[i][c] = sum(w[i][t]*(logp[t][c] + u[i][t]) for t in experts)/total + delta[i][c]
    return out

CASES = dict(disjoint=([0, 1], [2, 3]), overlap=([0, 1, 2], [1, 2, 3]), all=([0, 1, 2, 3], [0, 1, 2, 3]), three=([0, 1], [1, 2], [1]))

@pytest.fixture
def parts(request):
    torch.manual_seed(0)
    known = CASES[request.param]
    m, d = len(known), torch.float64
    columns = [torch.tensor(c) for c in known]
    logits = torch.full((m, 5, 4), FOREIGN, dtype=d)
    for t, c in enumerate(columns): logits[t, :, c] = 3*torch.randn(5, len(c), dtype=d)
    return known, columns, logits, torch.rand(m, dtype=d) + .5, torch.rand(5, m, dtype=d), torch.randn(5, m, dtype=d), torch.randn(5, 4, dtype=d)

@pytest.mark.parametrize('parts', CASES, indirect=True)
def test_the_formula_by_hand(parts):
    known, columns, logits, temps, w, u, delta = parts
    hand = torch.tensor(by_hand(*(o.tolist() for o in (logits, temps, w, u, delta)), known), dtype=torch.float64)
    got = fuse(calibrated(logits, temps, columns), w, columns, u, delta)
    assert torch.allclose(got, hand, rtol=1e-6)
    assert (got == FOREIGN).sum() == 5*(4 - len({c for o in known for c in o}))

def test_its_gradient():
    "ds_c/du_t = w_t/Σw for the experts of c, and 0 for the others; ds_c/dδ_c = 1"
    logp, columns = torch.randn(2, 3, 3, dtype=torch.float64), [torch.tensor([0, 1]), torch.tensor([1, 2])]
    w, u, delta = torch.rand(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64, requires_grad=True), torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    s = fuse(logp, w, columns, u, delta)
    share = w/w.sum(1, keepdim=True)
    for c, expected in enumerate((torch.tensor([1., 0]).expand(3, 2), share, torch.tensor([0., 1]).expand(3, 2))):
        du, dd = torch.autograd.grad(s[:, c].sum(), (u, delta), retain_graph=True)
        assert torch.allclose(du, expected.double(), atol=1e-12) and torch.equal(dd[:, c], torch.ones(3).double())

def test_limits():
    "All know all: u cancels exactly. Disjoint: w cancels. A weight of 0 leaves a lone expert its class"
    torch.manual_seed(0)
    z, w, v, u = torch.randn(3, 6, 4), torch.rand(3), torch.rand(6, 3), torch.randn(6, 3)
    logp = calibrated(z, torch.tensor([1., 2., .5]))
    assert torch.equal(fuse(logp, w, None, u), fuse(logp, w)) and torch.equal(fuse(logp, v, [None]*3, u), fuse(logp, v))
    full = [torch.arange(4)]*3
    assert torch.allclose(fuse(logp, w, full, u).softmax(1), fuse(logp, w).softmax(1), atol=1e-6)
    columns = [torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([3])]
    logp = calibrated(z, torch.ones(3), columns)
    assert torch.allclose(fuse(logp, w, columns, u), fuse(logp, v, columns, u), atol=1e-6)
    assert fuse(logp, torch.tensor([0., 0., 1.]), columns)[:, 0].eq(0).all()             # one class: log 1
    assert fuse(10**4*z, w).isfinite().all() and calibrated(10**4*z, torch.ones(3)).isfinite().all()

def table(n, seed=0, student=2.):
    "Two specialists of three classes each, n images a class; only the student's feature tells the domains apart"
    g = torch.Generator().manual_seed(seed)
    y, columns = torch.arange(6).repeat(n), [torch.arange(3), torch.arange(3, 6)]
    logits, feats = torch.full((2, len(y), 6), FOREIGN), []
    for t, c in enumerate(columns):
        own = (y >= c[0]) & (y <= c[-1])
        logits[t, :, c] = (1. + t)*(torch.randn(len(y), 3, generator=g) + 3*nn.functional.one_hot((y - c[0]) % 3, 3)*own[:, None])
        feats.append(torch.randn(len(y), 5, generator=g))
    f = torch.randn(len(y), 4, generator=g) + (y > 2)[:, None]*torch.tensor([student, 0, 0, 0])
    return TeacherTable(logits, feats, y, columns, f, torch.randn(len(y), 6, generator=g))

def scored(head, t):
    with torch.no_grad(): o = head(t.feats, asked(t), t.logits, t.columns)
    return o, (o['logit'].argmax(1) == t.y).float().mean().item()

QUICK = dict(steps=60)

def test_the_first_point_is_wavg_to_the_bit():
    t, exam = table(4), table(50, 1)
    base = fit_base(t)
    path = fit_path(t, base, PATH[:1])
    o, _ = scored(path['head'], exam)
    assert path['beta'] is None and torch.equal(o['base'], base(exam.logits, exam.columns))
    assert torch.allclose(o['logit'], o['base'], atol=1e-5) and not o['delta'].any()
    assert torch.equal(o['evidence'], energy(exam.logits, path['head'].temps, exam.columns))

def test_energy_by_hand():
    z = torch.tensor([[[1., 2., FOREIGN]], [[FOREIGN, 0., 4.]]])
    e = energy(z, torch.tensor([1., 2.]), [torch.tensor([0, 1]), torch.tensor([1, 2])])
    assert torch.allclose(e, torch.tensor([[log(exp(1) + exp(2)), log(1 + exp(2))]]))
    logp = calibrated(z, torch.tensor([1., 2.]), [torch.tensor([0, 1]), torch.tensor([1, 2])])
    assert torch.allclose((logp + e.T[..., None])[1, 0, 1:], torch.tensor([0., 2.]), atol=1e-6)          # z/T again

def test_the_path_opens_with_labels_and_not_without():
    exam = table(100, 1)
    few, many = fit_path(table(2), **QUICK), fit_path(table(20), **QUICK)
    assert [r['beta'] for r in many['rows']] == [None, *PATH[1:]] and few['rows'][0]['nats'] == 0
    (b, base), (o, acc) = (scored(p['head'], exam) for p in (fit_path(table(20), betas=PATH[:1]), many))
    # the energies alone recognise most of these images: likelihood tells more than accuracy
    assert many['beta'] is not None and acc > base - .02 and nll(o['logit'], exam.y) < nll(b['logit'], exam.y)
    u = o['evidence']
    own = (u[:, 1] > u[:, 0]) == (exam.y > 2)
    assert own.float().mean() > .75                                       # evidence says whose image it is
    assert scored(few['head'], exam)[1] > base - .1
    again = fit_path(table(2), **QUICK)
    assert again['rows'] == few['rows'] and all(torch.equal(v, again['head'].state_dict()[k]) for k, v in few['head'].state_dict().items())
    assert fit_path(table(2), gate=False, **QUICK)['beta'] is not None             # synergy_gate=0: never the base

def test_nats_have_a_price():
    rows = fit_path(table(10), **QUICK)['rows']
    assert sorted(r['nats'] for r in rows) == [r['nats'] for r in rows]

@pytest.fixture
def method():
    torch.manual_seed(0)
    st, ts = NS(feat_dim=8, distill_dim=None, n_class=3, name='s'), [NS(feat_dim=n, feat4_dim=n, distill_dim=None, name=f't{n}') for n in (6, 10)]
    return create_method('asmb', Config(bridge_objective='fuse', mbm_r=2, feat_kd_alpha=1.), st, ts)

def outputs(b=6):
    out = lambda n: dict(logit=torch.randn(b, 3, requires_grad=True), feat_2d=torch.randn(b, n, requires_grad=True))
    y = torch.arange(b) % 3
    return NS(x=torch.zeros(b, 1), y=y, hard=y, idx=torch.arange(b)), out(8), [out(6), out(10)]

@pytest.mark.parametrize('phase', 'AB')
def test_no_gradient_reaches_a_teacher(method, phase):
    method.prepare(phase)
    b, s, t = outputs()
    nn.init.normal_(method.synergy.head.fusion.read.weight)
    o = method.train().adapt_loss(b, s, t, When('A')) if phase == 'A' else method.train().loss(b, s, t, When())
    o['loss'].backward()
    assert all(v.grad is None for o in t for v in o.values())
    assert all(p.grad is None for p in method.synergy.head.fusion.parameters())
    if phase == 'A': assert sorted(o['parts']) == ['nats', 'recon'] and s['feat_2d'].grad is None

def test_two_evaluations_are_equal_and_the_gate_gives_the_base(method):
    _, s, t = outputs()
    synergy = method.eval().synergy
    nn.init.normal_(synergy.head.fusion.read.weight)
    first, second = synergy(s, t), synergy(s, t)
    assert all(torch.equal(first[k], second[k]) for k in first)
    synergy.gate.zero_()
    fusion = synergy.head.fusion
    logits = torch.stack([o['logit'] for o in t])
    assert torch.equal(synergy(s, t)['logit'], Base(fusion.temps, fusion.weights)(logits, [None, None]))

def test_what_auto_means_and_what_is_refused():
    auto = dict(bridge_objective='auto')
    assert [objective_of(Config(**auto, **kw)) for kw in ({}, dict(cl_mode=1), dict(mbm_tokens='spatial'), dict(use_distillation_adapter=1))] == ['fuse', 'fuse', 'distil', 'distil']
    assert (base_of(Config(**auto)), base_of(Config(bridge_objective='ce'))) == ('wavg', 'average')
    for kw in (dict(mbm_tokens='spatial'), dict(use_distillation_adapter=1), dict(synergy_base='none')):
        with pytest.raises(ConfigError, match='bridge_objective=fuse'): refuse_bridge(Config(bridge_objective='fuse', **kw))
    with pytest.raises(ConfigError, match='synergy_base=wavg'): refuse_bridge(Config(bridge_objective='ce', synergy_base='wavg'))

TINY = dict(preset='none', method='asmb', bridge_objective='fuse', dataset='digits', device='cpu', use_amp=0, train_per_class=12, data_aug='0', batch_size=32, overlap_pct=0, val_frac=.3,
            teacher1_type='mlp', teacher2_type='mlp', student_type='mlp', finetune_epochs=3, finetune_lr=.01, teacher_adapt_epochs=2, teacher_lr=1e-3, num_stages=2,
            student_epochs_per_stage=2, student_lr=.01, feat_kd_alpha=1., log_level='ERROR', report=0)

@pytest.mark.usefixtures('short_exam')
def test_a_run(tmp_path):
    "Two stages through the public door: the record of each"
    a = run_experiment(**TINY, results_dir=str(tmp_path))
    assert len(a['gates']) == 2
    for g in a['gates']:
        assert [r['beta'] for r in g['path']] == [None, *PATH[1:]] and g['images']['split'] == 'val'   # its teachers learnt from the rest
        assert len(g['temps']) == len(g['weights']) == 2 and abs(sum(g['weights']) - 1) < 1e-5 and g['base_nll'] >= g['synergy_nll'] > 0
        assert g['gate'] == (g['beta'] is not None)
    rows = [json.loads(o) for o in (Path(a['run'])/'metrics.jsonl').read_text().splitlines()]
    assert {'A1', 'B1', 'A2', 'B2'} <= {r.get('phase') for r in rows}

@pytest.mark.usefixtures('short_exam')
def test_a_price_and_no_adaptation(tmp_path):
    one = run_experiment(**TINY | dict(ib_beta=.05, num_stages=1), results_dir=str(tmp_path))
    assert [r['beta'] for r in one['gates'][0]['path']] == [None, .05]
    base = run_experiment(**{k: v for k, v in TINY.items() if k != 'teacher_lr'} | dict(teacher_adapt_epochs=0, num_stages=1, feat_kd_alpha=0), results_dir=str(tmp_path))
    assert not base['gates'][0]['gate'] and [r['beta'] for r in base['gates'][0]['path']] == [None]
