"""A10: a network with ready weights is given images in its own normalisation, exactly, wherever it is run.

The published weights are stand-ins: a module, or a local file in place of timm's download, whose right answer is computed
here in double precision from the pixels."""
import json, logging
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from asibkd.core.config import Config, ConfigError, resolve
from asibkd.data.batches import Loader
from asibkd.data.datasets import create_data
from asibkd.eval.deploy import load_student
from asibkd.models.cache import cache_key, get_teacher_fn
from asibkd.models.kdmodel import KDModel
from asibkd.models.norm import IMAGENET, Norm, fit_channels, network_norm, set_norm
from asibkd.models.teachers import models, register_model
from asibkd.models.zoo import create_zoo
from asibkd.run.experiment import run_experiment
from asibkd.run.tasks import run_evaluate
from asibkd.models.cards import card_norm, object_fingerprint, save_teacher
from asibkd.trainers.build import TeacherSpec, build_student, build_teacher, settle_config

OWN = Norm((.2, .5, .7), (.1, .3, .6))
BASE = dict(preset='none', dataset='digits', image_size=8, train_per_class=6, val_frac=.3, batch_size=16, device='cpu',
            use_amp=0, compare=0, report=0, data_aug='standard', epochs=1, student_type='resnet8', finetune_epochs=0,
            log_level='INFO', disable_tqdm=1)

def data_of(**kw): return create_data(resolve(**BASE | kw)[0])

@pytest.fixture(scope='module')
def data(): return data_of()

def settled(data, **kw): return settle_config(resolve(**BASE | dict(method='vanilla_kd') | kw)[0], data)

def net(n_class=10, in_chans=3, seed=0):
    torch.manual_seed(seed)
    return create_zoo('resnet8', n_class, in_chans).eval()

def pixels(ds, n=None): return ds.images(torch.arange(len(ds) if n is None else n)).double()/255

def own_input(ds, norm=OWN, n=None):
    "What the network was trained on, from the pixels, in double precision"
    mean, std = (torch.tensor(o, dtype=torch.float64).view(1, -1, 1, 1) for o in norm)
    return (pixels(ds, n) - mean)/std

def right(m, ds, norm=OWN, n=None):
    with torch.no_grad(): return m.eval()(own_input(ds, norm, n).float())

def close(a, b): assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4), (a - b).abs().max()

def batch(data, split='test', n=8): return next(iter(Loader(getattr(data, split), data, n).epoch())).x

# The map

def test_A10_one_affine_map_exact_and_differentiable(data):
    t = set_norm(KDModel(net(), 8).eval(), OWN, data.mean, data.std)
    x = batch(data)
    assert torch.allclose(t.renormalise(x).double(), own_input(data.test, n=8), rtol=1e-5, atol=1e-5)
    close(t(x)['logit'], right(t.model, data.test, n=8))
    x.requires_grad_()
    t.renormalise(x).sum().backward()
    assert torch.allclose(x.grad[0, :, 0, 0], torch.tensor([d/o for d, o in zip(data.std, OWN.std)]))
    half = set_norm(KDModel(net(), 8).eval(), OWN, data.mean, data.std)
    with torch.autocast('cpu', torch.bfloat16): assert half.renormalise(batch(data)).dtype == torch.float32

def test_A10_equal_is_the_same_tensor(data):
    t = KDModel(net(), 8).eval()
    x = batch(data)
    before, names = t(x)['logit'], list(t.state_dict())
    set_norm(t, Norm(data.mean, data.std), data.mean, data.std)
    assert t.renormalise(x) is x and t.norm is None and torch.equal(t(x)['logit'], before)
    assert list(set_norm(t, OWN, data.mean, data.std).state_dict()) == names      # checkpoints stay as they are

@pytest.mark.parametrize('chans', (1, 2, 3, 4))
def test_A10_channels(chans):
    "Grey: the mean of the three maps; more channels: the numbers repeat, as timm repeats the kernels"
    m = KDModel(net(in_chans=chans), 8, chans).eval()
    set_norm(m, OWN, (.4,)*chans, (.2,)*chans)
    p = torch.rand(2, chans, 8, 8, dtype=torch.float64)
    got = m.renormalise(((p - .4)/.2).float()).double()
    each = torch.stack([(p - a)/s for a, s in zip(*OWN)])                          # (3, B, C, H, W)
    want = each.mean(0) if chans == 1 else torch.stack([each[i % 3][:, i] for i in range(chans)], 1)
    assert torch.allclose(got, want, atol=1e-5)

def test_A10_grey_equals_the_published_network_on_three_equal_channels():
    "Exact where the published first kernels are equal: timm's sum over channels, and our map"
    from timm.models._manipulate import adapt_input_conv
    k = torch.randn(4, 1, 3, 3).expand(4, 3, 3, 3).contiguous()
    g = torch.rand(2, 1, 8, 8)
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in IMAGENET)
    (m1,), (s1,) = fit_channels(IMAGENET, 1)
    a = nn.functional.conv2d((g.expand(-1, 3, -1, -1) - mean)/std, k)
    assert torch.allclose(nn.functional.conv2d((g - m1)/s1, adapt_input_conv(1, k)), a, atol=1e-4)

@pytest.mark.parametrize('text, said', [
    ('cifar', "teacher1_norm='cifar': expected auto, data, imagenet, or 'mean / std'"),
    ('0.5 / 0', "teacher1_norm='0.5 / 0': a mean and a positive standard deviation"),
    ('0.5 / nan', "teacher1_norm='0.5 / nan': a mean and a positive standard deviation"),
    ('0.1 0.2 / 1 1', "2 channels; the images have 3")])
def test_A10_what_is_no_normalisation_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said.replace('.', r'\.')):
        run_experiment(**BASE, method='vanilla_kd', teachers=[net()], teacher1_norm=text, results_dir=str(tmp_path))

# Who says what

def local_timm(tmp_path, monkeypatch):
    "timm's published weights of ten classes, from a local file: a stand-in for the download"
    torch.manual_seed(0)
    state = timm.create_model('test_resnet', num_classes=10).state_dict()
    save_file(state, tmp_path/'published.safetensors')
    real = timm.create_model
    def create(name, pretrained=False, **kw):
        overlay = dict(file=str(tmp_path/'published.safetensors'), mean=OWN.mean, std=OWN.std, num_classes=10)
        return real(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kw)
    monkeypatch.setattr(timm, 'create_model', create)
    m = real('test_resnet', num_classes=10)
    m.load_state_dict(state)
    return m

def test_A10_timm_pretrained(tmp_path, monkeypatch, data, caplog):
    published = local_timm(tmp_path, monkeypatch)
    c = settled(data, small_input='0', allow_untrained=1)
    with caplog.at_level(logging.INFO, 'asibkd'):
        t, info = build_teacher(TeacherSpec('teacher1', 'test_resnet', pretrained=True), data, c)
    close(t.eval()(batch(data))['logit'], right(published, data.test, n=8))
    assert info.norm == dict(mean=list(OWN.mean), std=list(OWN.std))
    assert ('teacher1: test_resnet is given images in its own normalisation (mean 0.2 0.5 0.7, std 0.1 0.3 0.6'
            in caplog.text and 'teacher1_norm=data keeps' in caplog.text)
    assert "teacher1: test_resnet's weights were published for 160×160 pixels; these images have 8×8" in caplog.text
    assert 'keeps its published head' in caplog.text and 'noise' not in caplog.text
    # without the weights its `pretrained_cfg` means nothing; neither where this run trains it
    trains = c.model_copy(update=dict(finetune_epochs=1))
    for spec, cfg in ((TeacherSpec('teacher1', 'test_resnet'), c),
                      (TeacherSpec('teacher1', 'test_resnet', pretrained=True), trains),
                      (TeacherSpec('teacher1', 'test_resnet', pretrained=True, norm='data'), c)):
        assert build_teacher(spec, data, cfg)[0].norm is None

def test_A10_torchvision_pretrained(monkeypatch, data):
    real = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, 'get_model', lambda name, weights=None, **kw: real(name, **kw))
    spec = TeacherSpec('teacher2', 'torchvision:resnet18', pretrained=True)
    t, info = build_teacher(spec, data, settled(data, allow_untrained=1))
    assert t.norm == IMAGENET and info.norm['mean'] == [.485, .456, .406]
    t.eval()
    close(t(batch(data))['logit'], right(t.model, data.test, IMAGENET, 8))

def test_A10_a_module_says_it(data):
    for attribute, value in (('input_norm', OWN), ('input_norm', dict(mean=OWN.mean, std=OWN.std)),
                             ('pretrained_cfg', dict(mean=OWN.mean, std=OWN.std))):
        m = net()
        setattr(m, attribute, value)
        t, info = build_teacher(TeacherSpec('teacher1', m), data, settled(data))
        close(t.eval()(batch(data))['logit'], right(m, data.test, n=8))
        assert info.norm['mean'] == list(OWN.mean)
    m = net()
    assert build_teacher(TeacherSpec('teacher1', m), data, settled(data))[0].norm is None      # it says nothing
    m.input_norm = (0, 1)                                                            # it normalises by itself
    t = build_teacher(TeacherSpec('teacher1', m), data, settled(data))[0]
    assert torch.allclose(t.renormalise(batch(data)).double(), pixels(data.test, 8), atol=1e-6)
    m.input_norm = 'imagenet'
    with pytest.raises(ConfigError, match='CifarResNet.input_norm: a mean and a positive'): network_norm(m)

def test_A10_a_registered_module_says_it(data):
    @register_model('with_norm')
    def build(n_class, pretrained=False):
        m = net(n_class)
        m.input_norm = OWN
        return m
    spec = TeacherSpec('teacher1', 'with_norm', pretrained=True)
    try: assert build_teacher(spec, data, settled(data, allow_untrained=1))[0].norm == OWN
    finally: models.pop('with_norm')

def test_A10_our_card(tmp_path, data, caplog):
    "A teacher trained on brighter images, used on these; one of the same data keeps its bits; an old card says nothing"
    other, c = replace(data, mean=OWN.mean, std=OWN.std), settled(data)
    t = KDModel(net(), 8, name='resnet8').eval()
    save_teacher(t, tmp_path/'other.pth', other, 'resnet8', .9)
    save_teacher(t, tmp_path/'same.pth', data, 'resnet8', .9)
    assert card_norm(tmp_path/'other.pth') == OWN
    def built(f, **kw):
        return build_teacher(TeacherSpec('teacher1', 'resnet8', str(f), **kw), data, c)
    with caplog.at_level(logging.INFO, 'asibkd'): m, info = built(tmp_path/'other.pth')
    close(m.eval()(batch(data))['logit'], right(net(), data.test, n=8))
    assert info.norm['std'] == list(OWN.std) and 'the card of other.pth' in caplog.text
    same, info = built(tmp_path/'same.pth')
    assert same.norm is None and info.norm is None
    assert torch.equal(same.eval()(batch(data))['logit'], t(batch(data))['logit'])
    old = torch.load(tmp_path/'other.pth')
    for k in ('mean', 'std'): old['asibkd'].pop(k)
    torch.save(old, tmp_path/'old.pth')
    torch.save(net().state_dict(), tmp_path/'foreign.pth')
    for f in ('old.pth', 'foreign.pth'): assert built(tmp_path/f)[0].norm is None
    assert built(tmp_path/'foreign.pth', norm='imagenet')[0].norm == IMAGENET         # the user knows
    assert built(tmp_path/'other.pth', norm='data')[0].norm is None                   # and has the last word

def test_A10_a_teacher_of_some_classes(data):
    m = net(4)
    m.input_norm = OWN
    t, info = build_teacher(TeacherSpec('teacher1', m, classes=[1, 3, 5, 7]), data, settled(data))
    assert t.norm == OWN and info.norm and info.classes == [1, 3, 5, 7]
    close(t.eval()(batch(data))['logit'][:, [1, 3, 5, 7]], right(m, data.test, n=8))

# The cache

def test_A10_the_cache_knows_it(tmp_path, data):
    loader = Loader(data.train, data, 16)
    c = Config(**dict(teacher_cache='memory', results_dir=str(tmp_path)))
    plain, own = (KDModel(net(), 8).eval().requires_grad_(False) for _ in range(2))
    set_norm(own, OWN, data.mean, data.std)
    k = cache_key(plain, loader)
    assert 'norm' not in k and cache_key(own, loader) != k
    assert cache_key(set_norm(KDModel(net(), 8), IMAGENET, data.mean, data.std), loader) != cache_key(own, loader)
    fn = get_teacher_fn(own, loader, c)
    assert type(fn).__name__ == 'CachedTeacher'
    first = next(iter(loader.epoch()))
    computed, read = fn(first)['logit'].clone(), fn(first)['logit']
    want = right(own.model, data.train)[first.idx]
    close(computed, want), close(read, want)

def test_A10_another_statement_is_another_experiment():
    a, b = net(), net()
    b.input_norm = OWN
    assert object_fingerprint(a) != object_fingerprint(b) and object_fingerprint(net()) == object_fingerprint(a)

# Runs

def run(tmp_path, teachers, **kw):
    return run_experiment(**BASE | dict(method='vanilla_kd', results_dir=str(tmp_path), teachers=teachers) | kw)

def row(s, key='teacher1'): return next(r for r in s['rows'] if r['key'] == key)

def accuracy(z, y): return (z.argmax(1) == y).double().mean().item()

def stated(seed=0, norm=OWN):
    m = net(seed=seed)
    m.input_norm = norm
    return m

def test_A10_a_run_trains_evaluates_and_reports_it(tmp_path, data, capsys):
    from asibkd.analysis.tables import supervision_text
    from asibkd.explore.opened import open_run, split_outputs
    m = stated()
    s = run(tmp_path, [m], teacher_cache='off')
    assert row(s)['test_acc_val_selected'] == pytest.approx(accuracy(right(m, data.test), data.test.y))
    assert row(s)['weights']['norm'] == dict(mean=list(OWN.mean), std=list(OWN.std))
    assert supervision_text(row(s)) == 'given, own normalisation'
    assert 'is given images in its own normalisation' in capsys.readouterr().out
    # cached or live, the same training; and not that of the data's normalisation
    def val(s): return [json.loads(o)['train_loss'] for o in (Path(s['run'])/'metrics.jsonl').read_text().splitlines()]
    cached, wrong = run(tmp_path, [stated()], teacher_cache='disk'), run(tmp_path, [net()])
    assert val(cached) == pytest.approx(val(s), rel=1e-3) and val(wrong) != pytest.approx(val(s), rel=1e-3)
    # the explorer sees the same, also where the fresh instance says nothing
    o = open_run(s['run'], teachers=[net()], device='cpu')
    close(split_outputs(o)[0]['teacher1'], right(net(), data.test))

def test_A10_finetuned_in_the_run_keeps_the_datas(tmp_path, data):
    s = run(tmp_path, [stated()], finetune_epochs=1, teacher1_norm='auto')
    assert row(s)['weights']['source'] == 'finetuned' and row(s)['weights']['norm'] is None
    assert card_norm(Path(s['run'])/'teacher1.pth') == Norm(data.mean, data.std)
    # unless the user says so: then the card says it, too
    spec = TeacherSpec('teacher1', stated(), norm='0.5 / 0.25')
    t, info = build_teacher(spec, data, settled(data, finetune_epochs=1))
    save_teacher(t, tmp_path/'t.pth', data, 'mine', .9)
    assert info is None and t.norm == card_norm(tmp_path/'t.pth') == Norm((.5,)*3, (.25,)*3)

def test_A10_adapted_teachers(tmp_path, data):
    "Phase A changes a part of the teachers: they keep their normalisation, in their rows, cards and the explorer"
    from asibkd.explore.opened import open_run, split_outputs
    s = run(tmp_path, [stated(), stated(1, IMAGENET)], method='asmb', epochs=0, num_stages=1, student_epochs_per_stage=1,
            teacher_adapt_epochs=1, bridge_objective='both', teacher_lr=.01)
    adapted = row(s, 'teacher2~adapted')
    assert adapted['weights']['norm']['mean'] == list(IMAGENET.mean)
    assert card_norm(Path(s['run'])/'teacher1_adapted.pth') == OWN
    o = open_run(s['run'], teachers=[net(), net()], device='cpu')
    z, y = split_outputs(o)
    assert accuracy(z['teacher2'], y) == pytest.approx(adapted['test_acc_val_selected'])
    t = KDModel(net(), 8)
    state = torch.load(Path(s['run'])/'teacher2_adapted.pth')['model']
    t.load_state_dict({k: v for k, v in state.items()})
    close(z['teacher2'], right(t.model, data.test, IMAGENET))

def test_A10_evaluate(tmp_path, data):
    "`asibkd evaluate` reads the card: a teacher's, and the student.json beside a student"
    m = KDModel(net(), 8, name='resnet8')
    save_teacher(m, tmp_path/'t.pth', replace(data, mean=OWN.mean, std=OWN.std), 'resnet8', .9)
    want = accuracy(right(net(), data.test), data.test.y)
    kw = BASE | dict(method='vanilla_kd', results_dir=str(tmp_path))
    got = run_evaluate(**kw, teacher_type='resnet8', ckpt_path=str(tmp_path/'t.pth'))
    assert got['test']['models']['resnet8']['acc'] == pytest.approx(want)

# Students

def test_A10_a_student_with_a_ready_trunk(tmp_path, data):
    "It is trained, evaluated and deployed in the trunk's normalisation; one that is trained whole keeps the data's"
    c = settled(data)
    assert build_student(c, data, stated()).norm is None
    s = run(tmp_path, [net(seed=1)], student=stated(), student_freeze_level=0)
    card = json.loads((Path(s['run'])/'student.json').read_text())
    assert card['mean'] == list(OWN.mean) and card['std'] == list(OWN.std)
    model, preprocess, _ = load_student(s['run'], model=net())
    x = torch.stack([preprocess(im) for im in data.test.images(torch.arange(len(data.test)))])
    with torch.no_grad(): z = model(x)
    assert accuracy(z, data.test.y) == pytest.approx(s['test_acc_val_selected'])
    assert build_student(settled(data, student_freeze_level=0), data, net()).norm is None       # it says nothing

# Continual learning

def test_A10_continual_learning(tmp_path, data, monkeypatch):
    "A generic teacher and a student keep their trunk and its normalisation, an expert is trained whole; also resumed"
    import asibkd.cl.learner as learner
    seen, lowest = {}, []
    real, fisher = learner.Learner.evaluate_task, learner.fisher_diag
    def stop_once(self, t, method, teachers):
        seen[t] = {r: m.norm for r, m in zip(method.task.roles, teachers)} | dict(student=self.student.norm)
        if t == 1 and 'stopped' not in seen:
            seen['stopped'] = True
            raise KeyboardInterrupt
        return real(self, t, method, teachers)
    def input_of_fisher(net, x, *rest):
        lowest.append(x.amin((0, 2, 3)))
        return fisher(net, x, *rest)
    monkeypatch.setattr(learner.Learner, 'evaluate_task', stop_once)
    monkeypatch.setattr(learner, 'fisher_diag', input_of_fisher)
    kw = dict(cl_mode=1, method='asmb', cl_method='avgz', num_tasks=2, num_stages=1, finetune_epochs=1, epochs=1,
              replay_capacity=10, allow_leak=1, cl_teachers='expert+generic+snapshot', student_freeze_level=0,
              lambda_ewc=.1)
    with pytest.raises(KeyboardInterrupt): run(tmp_path, [stated()], student=stated(2), **kw)
    s = run(tmp_path, [stated()], student=stated(2), **kw)
    for t in (0, 1): assert seen[t]['generic'] == seen[t]['student'] == OWN and seen[t]['expert'] is None
    assert seen[1]['snapshot'] == OWN
    assert s['norms'] == dict(generic1=dict(mean=list(OWN.mean), std=list(OWN.std)), expert1=None)
    assert card_norm(Path(s['run'])/'student.safetensors') == OWN
    black = torch.tensor([-m/d for m, d in zip(*OWN)])                    # what a black pixel is to the student
    assert lowest and all(torch.allclose(o, black, atol=1e-4) for o in lowest)
