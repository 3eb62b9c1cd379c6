"uhc and cfl: soft labels over the union of the teachers' classes, and a common space of features."
from types import SimpleNamespace as NS

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from asibkd.core.config import Config, resolve
from asibkd.core.runtime import FOREIGN, When
from asibkd.distil.amalgam import UnifiedLabels, mmd
from asibkd.distil.methods import create_method
from asibkd.models.kdmodel import spread_classes
from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher
from asibkd.run.experiment import run_experiment

K = 6
OVERLAPS = dict(half=([0, 1, 2, 3], [2, 3, 4, 5]), one=([0, 1, 2], [2, 3, 4, 5]), inside=([0, 1, 2, 3, 4, 5], [4, 1]),
                chain=([0, 1, 2], [2, 3], [3, 4, 5]), ring=([0, 1, 2], [2, 3, 4], [4, 5, 0]),
                pairs=([0, 1], [1, 2], [2, 0], [3, 4, 5, 0]), lone=([0, 1, 2, 3], [1, 2, 3, 4], [3, 4, 5], [5]))

def minimum(z, columns):
    "log q of one image, by scipy, from J as the paper writes it"
    p = [z[t, c].softmax(0).numpy() for t, c in enumerate(columns)]
    def J(u):
        value, slope = 0., np.zeros(K)
        for c, p_t in zip(columns, p):
            log_z = np.logaddexp.reduce(u[c])
            value += log_z - (p_t*u[c]).sum()
            slope[c] += np.exp(u[c] - log_z) - p_t
        return value, slope
    return minimize(J, np.zeros(K), jac=True, method='BFGS', options=dict(gtol=1e-11, maxiter=5000)).x

@pytest.mark.parametrize('case', OVERLAPS)
def test_the_labels_minimise_J(case):
    "Any overlaps of two to four teachers, against an independent minimiser"
    torch.manual_seed(0)
    columns = [torch.tensor(c) for c in OVERLAPS[case]]
    z = 2*torch.randn(len(columns), 5, K).double()
    unify = UnifiedLabels(columns, K)
    assert unify.exact == (case in ('half', 'one', 'inside', 'chain'))
    u = unify(z)
    for n in range(5):
        np.testing.assert_allclose(u[n].softmax(0), torch.tensor(minimum(z[:, n], OVERLAPS[case])).softmax(0), atol=2e-6)

@pytest.mark.parametrize('scale', [1, 3, 8])
def test_the_minimum_is_reached_in_the_steps_given(scale):
    "J's gradient vanishes, sharp teachers included"
    torch.manual_seed(scale)
    columns = [torch.tensor(c) for c in OVERLAPS['ring']]
    z = (scale*torch.randn(3, 64, K)).double()
    u = UnifiedLabels(columns, K)(z).requires_grad_()
    J = -sum((z[t][:, c].softmax(1)*u[:, c].log_softmax(1)).sum() for t, c in enumerate(columns))
    assert torch.autograd.grad(J, u)[0].abs().max() < 1e-8

def test_agreeing_teachers_are_both_believed():
    "Outputs that are conditionals of one q give that q back, whatever the temperature"
    torch.manual_seed(0)
    for columns in OVERLAPS.values():
        u = torch.randn(1, 3, K).double()
        z = torch.full((len(columns), 3, K), float(FOREIGN)).double()
        for t, c in enumerate(columns): z[t][:, c] = u[0][:, c] + 7*t       # a teacher's own constant says nothing
        for tau in (1., 4.):
            q = UnifiedLabels([torch.tensor(c) for c in columns], K)(z, tau)
            torch.testing.assert_close(q.softmax(1), (u[0]/tau).softmax(1), atol=1e-6, rtol=0)

def test_limits():
    "Unknown classes are left out; what a teacher does not know is not read; ±1e4 and half precision stay finite"
    torch.manual_seed(0)
    columns = [torch.tensor([0, 2]), torch.tensor([2, 5])]
    unify, z = UnifiedLabels(columns, K), torch.randn(2, 4, K)
    assert unify.classes.tolist() == [0, 2, 5]
    noise = z.clone()
    noise[0][:, [1, 3, 4, 5]] = 1e4
    torch.testing.assert_close(unify(noise), unify(z), rtol=0, atol=0)
    torch.testing.assert_close(unify(z), unify(z), rtol=0, atol=0)          # two evaluations are equal
    for case in OVERLAPS.values():
        u = UnifiedLabels([torch.tensor(c) for c in case], K)
        assert u(torch.randn(len(case), 4, K).sign()*1e4).isfinite().all()
        with torch.autocast('cpu', torch.bfloat16):
            z = torch.randn(len(case), 4, K)
            assert u(z).dtype == torch.float64 and u(z.bfloat16()).isfinite().all()
            torch.testing.assert_close(u(z), u(z.double()), atol=1e-6, rtol=0)

@pytest.fixture(scope='module')
def scene():
    "A student of six classes and two specialists"
    torch.manual_seed(0)
    st = create_student('resnet8', n_class=K, img_size=16)
    ts = [spread_classes(create_teacher(n, n_class=len(c), img_size=16), c, K).eval() for n, c in zip(('resnet8', 'vgg8'), OVERLAPS['one'])]
    b = NS(x=torch.randn(8, 3, 16, 16), y=torch.arange(8) % K, idx=torch.arange(8)); b.hard = b.y
    with torch.no_grad(): t_outs = [t(b.x) for t in ts]
    return NS(student=st, teachers=ts, batch=b, t_outs=t_outs)

@pytest.mark.parametrize('method', ['uhc', 'cfl'])
def test_loss(scene, method):
    "Finite in bfloat16 and at ±1e4; the gradient reaches the student and what is trained beside it, no teacher"
    m = create_method(method, Config(), scene.student, scene.teachers, {} if method == 'uhc' else dict(cfl_beta=10.))
    leaf = [{k: v.detach().clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in o.items()} for o in scene.t_outs]
    far = [o | dict(logit=o['logit'].detach().sign()*1e4) for o in leaf]
    for outs, dtype in ((leaf, torch.float32), (leaf, torch.bfloat16), (far, torch.float32)):
        scene.student.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = m.loss(scene.batch, scene.student.train()(scene.batch.x), outs, When())['loss']
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in (*scene.student.model.parameters(), *m.parameters()))
    assert all(v.grad is None for o in leaf for v in o.values() if torch.is_tensor(v))

@pytest.mark.parametrize('method', ['uhc', 'cfl'])
def test_only_known_classes_are_compared(scene, method):
    "The student's logits for classes of one teacher only: both methods move them, toward the teachers' answer"
    m = create_method(method, Config(ce_alpha=0, kd_alpha=1), scene.student, scene.teachers, {} if method == 'uhc' else dict(cfl_beta=0))
    z = torch.zeros(8, K, requires_grad=True)
    opt = torch.optim.Adam([z], lr=.3)
    for _ in range(200):
        opt.zero_grad(); m.loss(scene.batch, dict(logit=z), scene.t_outs, When())['loss'].backward(); opt.step()
    for o, c in zip(scene.t_outs, OVERLAPS['one']):                         # one class in common: q agrees with both exactly
        if method == 'uhc': torch.testing.assert_close((z[:, c]/4).softmax(1), (o['logit'][:, c]/4).softmax(1), atol=1e-3, rtol=0)
    if method == 'cfl': assert m.loss(scene.batch, dict(logit=z), scene.t_outs, When())['loss'] < 1e-4

def test_mmd():
    "Zero for equal sets, symmetric, larger the farther, blind to order and length"
    torch.manual_seed(0)
    a, noise = torch.randn(16, 8).double(), torch.randn(16, 8).double()
    torch.testing.assert_close(mmd(a, 2*a.flip(0)).item(), 0., atol=1e-9, rtol=0)
    torch.testing.assert_close(mmd(a, noise), mmd(noise, a))
    far = [mmd(a, a + e*noise).item() for e in (0, .001, .01, .1, 1.)]
    assert far == sorted(far) and far[1] > 1e-4                             # the narrow kernels see a thousandth
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(mmd(a.float(), noise.float()).item(), mmd(a, noise).item(), atol=1e-4, rtol=0)
    x = torch.randn(4, 8, requires_grad=True)
    mmd(x, x.detach().clone()).backward()
    assert x.grad.isfinite().all()

def test_presets_and_parameters():
    for method in ('uhc', 'cfl'): assert resolve(preset=f'method/{method}')[0].method == method
    assert resolve(preset='none', method='cfl', cfl_channels=8)[1]['cfl_channels'] == 8
    with pytest.raises(ValueError, match='logit_standardization'): run_experiment(preset='quickstart', method='uhc', compare=0, logit_standardization=1)
