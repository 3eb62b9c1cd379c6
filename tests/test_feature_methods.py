"Feature and multi-teacher methods where a notebook cell cannot see them: SimKD's student from training to the exported program, pre-activations of timm's networks, teachers of other classes, resume."
import json
from pathlib import Path
from types import SimpleNamespace as NS

import pytest
import torch
import torch.nn.functional as F

from asibkd.core.config import ConfigError, resolve
from asibkd.core.runtime import FOREIGN, UNLABELLED, When
from asibkd.distil.methods import check_method, create_method
from asibkd.distil.simkd import ReusedHead, student_for
from asibkd.eval.deploy import load_student
from asibkd.run.export import export_student
from asibkd.models.kdmodel import spread_classes
from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher, model_costs
from asibkd.run import experiment     # it registers every method

ONE, SEVERAL = ('pkt', 'sp', 'itrd', 'vid', 'reviewkd'), ('mtkd_static', 'mtkd_rl')
SMALL = dict(preset='quickstart', compare=0, report=0, device='cpu', teacher1_type='resnet14', teacher2_type='resnet8', student_type='resnet8', num_stages=1, train_per_class=12,
             finetune_epochs=2, student_epochs_per_stage=2, log_level='ERROR')

@pytest.fixture(scope='module')
def nets():
    torch.manual_seed(0)
    return NS(st=create_student('resnet8', n_class=4, img_size=16), ts=[create_teacher(n, n_class=4, img_size=16).eval().requires_grad_(False) for n in ('vgg8', 'resnet14', 'wrn_16_1')])

def made(name, nets, m=1, **given):
    cfg, extra = resolve(preset='none', method=name, device='cpu', **given)
    return create_method(name, cfg, nets.st, nets.ts[:m], extra).train()

def batch(n, y=None):
    y = torch.arange(n) % 4 if y is None else y
    return NS(x=torch.randn(n, 3, 16, 16), y=y, hard=y, idx=torch.arange(n))

def outputs(nets, b, m): return nets.st.train()(b.x), [t(b.x) for t in nets.ts[:m]]

@pytest.mark.parametrize('name, m', [*((k, 1) for k in ONE), *((k, m) for k in SEVERAL for m in (1, 3))])
def test_small_batches_and_large_numbers(nets, name, m):
    "One image, two, and features and logits of 10⁴: loss and gradient stay finite"
    torch.manual_seed(0)
    method, big = made(name, nets, m), lambda o: {k: [1e4*f for f in v] if isinstance(v, list) else v if v is None or k == 'columns' else 1e4*v for k, v in o.items()}
    for n, scale in ((1, False), (2, False), (2, True)):
        b = batch(n); s, ts = outputs(nets, b, m)
        if scale: s, ts = big(s), [big(t) for t in ts]
        nets.st.zero_grad(); method.zero_grad()
        l = method.loss(b, s, ts, When(epoch=1))['loss']; l.backward()
        assert l.isfinite() and all(p.grad.isfinite().all() for p in (*nets.st.parameters(), *method.parameters()) if p.grad is not None), (n, scale)

@pytest.mark.parametrize('name', (*ONE, *SEVERAL))
def test_two_classes(name):
    "A gradient for the student and for what is trained beside it, and different numbers where the teacher differs"
    torch.manual_seed(0)
    def two(arch): return create_teacher(arch, n_class=2, img_size=16).eval().requires_grad_(False)
    nets = NS(st=create_student('resnet8', n_class=2, img_size=16), ts=[two('vgg8'), two('resnet14')])
    m = 2 if name in SEVERAL else 1
    method, b = made(name, nets, m), batch(6, torch.arange(6) % 2)
    s, ts = outputs(nets, b, m)
    o = method.loss(b, s, ts, When(epoch=1))
    o['loss'].backward()
    assert o['loss'].isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    assert next(nets.st.parameters()).grad.abs().sum() > 0
    other = [{k: v.flip(0) if torch.is_tensor(v) else [f.flip(0) for f in v] if isinstance(v, list) else v for k, v in t.items()} for t in ts]
    assert method.loss(b, s, other, When(epoch=1))['loss'] != o['loss']

@pytest.mark.parametrize('name', (*ONE, *SEVERAL))
def test_images_without_a_label(nets, name):
    "CE counts on the labelled images alone; the features of all images are compared"
    torch.manual_seed(0)
    m = 2 if name in SEVERAL else 1
    method, b = made(name, nets, m).eval(), batch(6, torch.tensor([0, 1, 2, UNLABELLED, UNLABELLED, UNLABELLED]))
    s, ts = outputs(nets, b, m)                          # after the method, which says what the networks are to keep
    o = method.loss(b, s, ts, When(epoch=1))
    torch.testing.assert_close(o['parts']['ce'], F.cross_entropy(s['logit'][:3], b.y[:3]).detach())
    (g,) = torch.autograd.grad(o['loss'], s['feat_2d' if name in ('pkt', 'itrd', 'reviewkd') else 'feat_4d'] if name != 'vid' else s['stages'][-1])
    assert g[3:].abs().sum() > 0

@pytest.mark.parametrize('name', SEVERAL)
def test_teachers_of_other_classes(name):
    "A teacher that does not know an image's class is hardly believed there; the agent never sees FOREIGN"
    torch.manual_seed(0)
    st = create_student('resnet8', n_class=4, img_size=16)
    ts = [spread_classes(create_teacher('resnet8', n_class=2, img_size=16).eval(), c, 4) for c in ([0, 1], [2, 3])]
    cfg, extra = resolve(preset='none', method=name, device='cpu')
    m, b = create_method(name, cfg, st, ts, extra).eval(), batch(8)
    with torch.no_grad(): t_outs = [t(b.x) for t in ts]
    s_out = st(b.x); g = m.gaps(b, s_out, t_outs, When())
    assert t_outs[0]['logit'].min() == FOREIGN and g['kl'].max() < 100
    if name == 'mtkd_rl':
        from asibkd.distil.mtkd import agent_state
        assert g['ce'].max() > 1000 and agent_state(g['cosine'], g['kl'], g['ce'], t_outs).abs().max() < 100
    w, _ = m.policy_weights(g, t_outs, b, When(epoch=1))
    knows = torch.stack([b.y < 2, b.y >= 2])
    assert (w[knows].mean() - w[~knows].mean()) > .2 and m.loss(b, s_out, t_outs, When(epoch=1))['loss'].isfinite()

@pytest.mark.parametrize('name', ['resnet10t', 'resnet8', 'vgg8', 'wrn_16_1', 'resnetv2_18', 'mobilenetv2_050', 'convnext_atto'])
def test_maps_before_their_activation(name):
    "Also where an activation overwrites its input; a stage without one gives its map as it is"
    torch.manual_seed(0)
    t = create_teacher(name, n_class=3, img_size=32).eval(); x = torch.randn(2, 3, 32, 32)
    for m in t.modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.ones_(m.weight)                    # timm starts residual branches at 0
    with torch.no_grad():
        plain = t(x); t.preact = True; o = t(x)
    assert 'preact' not in plain and torch.equal(o['logit'], plain['logit']) and all(torch.equal(a, b) for a, b in zip(o['stages'], plain['stages']))
    assert [p.shape for p in o['preact']] == [s.shape for s in o['stages']]
    acts = t.anatomy.preacts
    if name in ('mobilenetv2_050', 'convnext_atto'): assert not any(acts[1:4])
    else: assert all(acts[1:]) and all(p.min() < 0 for p in o['preact'][1:])
    for n, p, s in zip(acts, o['preact'], o['stages']):
        if n and 'resnet' in name and 'v2' not in name: assert torch.equal(F.relu(p), s)

def test_vid_trains_its_variances(nets):
    m = made('vid', nets); b = batch(4)
    opt = torch.optim.SGD(m.parameters(), .1); before = m.predict[0].variance.detach().clone()
    m.loss(b, *outputs(nets, b, 1), When())['loss'].backward(); opt.step()
    assert (m.predict[0].variance - before).abs().max() > 0

def test_simkd_from_training_to_export(tmp_path, tiny_exam):
    "The student that is trained, evaluated, saved, loaded, opened, evaluated from its file and exported is one: body, projector, the teacher's head"
    s = experiment.run_experiment(**SMALL, method='simkd', results_dir=str(tmp_path))
    run = Path(s['run']); st = load_student(run)
    assert isinstance(st.model, ReusedHead) and json.loads((run/'student.json').read_text())['type'] == 'resnet8'
    teacher = torch.load(run/'teacher1.pth', weights_only=True)
    teacher = teacher.get('model', teacher.get('state_dict', teacher))
    assert torch.equal(st.model.head.weight, next(v for k, v in teacher.items() if k.endswith('fc.weight')))
    row = next(r for r in s['rows'] if r['key'] == 'simkd'); shape = st.preprocess.shape
    assert {k: row[k] for k in ('params', 'macs')} == {k: v for k, v in model_costs(st.model, shape, 3).items() if k != 'latency_ms'}
    own = model_costs(create_student('resnet8', n_class=10, img_size=shape[-1], in_chans=shape[0], small_input=True), shape, 3)
    assert row['params'] > own['params'] and row['macs'] > own['macs']
    from asibkd.core.files import read_weights
    from asibkd.explore.opened import open_run
    from asibkd.run.tasks import run_evaluate
    o = open_run(run); x = torch.stack([st.preprocess(im) for im in o.data.test.images(torch.arange(20))])
    with torch.inference_mode(): z = st.model(x)
    assert torch.equal(z.argmax(1), read_weights(run/'predictions.safetensors')['simkd'][:20].long())
    with torch.inference_mode(): torch.testing.assert_close(o.student.eval()(x)['logit'], z)
    assert export_student(run)['difference'] < 1e-4
    again = run_evaluate(eval_mode='single', student_type='resnet8', ckpt_path=str(run/'student.safetensors'), **{k: SMALL[k] for k in ('preset', 'device', 'train_per_class', 'log_level')}, results_dir=str(tmp_path/'e'))
    assert abs(next(iter(again['test']['models'].values()))['acc'] - s['test_acc_val_selected']) < 1e-6

def test_simkd_beside_its_baselines(tmp_path, tiny_exam):
    "Baselines train the run's own student; the costs are told apart"
    s = experiment.run_experiment(**SMALL | dict(compare=1, train_per_class=8, finetune_epochs=1, student_epochs_per_stage=1), method='simkd', results_dir=str(tmp_path))
    params = {r['key']: r['params'] for r in s['rows'] if r['role'] == 'student'}
    assert params['ce'] == params['avgz'] < params['simkd']

def test_refusals():
    with pytest.raises(ConfigError, match='overlap_pct'): experiment.run_experiment(**SMALL, method='simkd', overlap_pct=50)
    st, mlp = create_student('resnet8', n_class=4, img_size=16), create_teacher('mlp', n_class=4, img_size=16)
    for build, match in ((lambda: student_for('simkd', st, [mlp]), 'has no feature map'), (lambda: student_for('simkd', mlp, [st]), "'mlp' has none"),
                         (lambda: create_method('sp', resolve(method='sp', preset='none')[0], st, [mlp], {}), "'mlp' has none")):
        with pytest.raises(ConfigError, match=match): build()
    for name in (*ONE, *SEVERAL, 'simkd'): assert check_method(name).cited_by
