"Data from elsewhere: the Hub's formats, arrays, tables of photos; and classes of unequal size."
import json, os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asibkd.core.config import Config, ConfigError, DataError
from asibkd.data.catalogue import list_datasets
from asibkd.data.datasets import create_data
from asibkd.data.several import run_data

TINY = dict(preset='quickstart', device='cpu', use_amp=0, compare=0, finetune_epochs=1, epochs=1, num_stages=1, teacher_adapt_epochs=1, student_epochs_per_stage=1, batch_size=8,
            teacher1_type='mlp', teacher2_type='mlp', student_type='mlp', log_level='ERROR', report=0, data_aug='standard')

def pictures(n, size=8, classes=2):
    "Noise, each class of its own brightness; (N, H, W, 3) and labels"
    rng, y = np.random.default_rng(0), np.arange(n) % classes
    return (rng.integers(0, 60, (n, size, size, 3)) + 90*y[:, None, None, None]).astype('uint8'), y

@pytest.fixture
def kaggle(tmp_path):
    "As a competition hands it out: train.csv, train/, test.csv, test/, sample_submission.csv"
    d = tmp_path/'leaves'
    x, y = pictures(40)
    for s in ('train', 'test'): (d/s).mkdir(parents=True)
    for i in range(40): Image.fromarray(x[i]).save(d/'train'/f'{i:04x}.png')
    for i in range(6): Image.fromarray(x[i]).save(d/'test'/f'{i:04x}.png')          # the same names as in train/
    (d/'train.csv').write_text('id,height,breed\n' + ''.join(f"{i:04x},{i % 11},{('oak', 'elm')[k]}\n" for i, k in enumerate(y)))
    (d/'test.csv').write_text('id,height\n' + ''.join(f'{i:04x},{i}\n' for i in range(6)))
    (d/'sample_submission.csv').write_text('id,breed\n0000,oak\n')
    return d

@pytest.fixture
def library(tmp_path, monkeypatch):
    "The datasets library, with its cache in this test's folder"
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path/'cache')
    datasets.disable_progress_bars()
    return datasets

# Tables

def test_kaggle_table(kaggle):
    "Columns found, ids without ending resolved in the split's own folder, a test set for all seeds"
    data = create_data(Config(dataset='csv', data_root=str(kaggle), val_frac=.2, test_frac=.25))
    assert data.classes == ['elm', 'oak'] and (len(data.test), len(data.train), len(data.val)) == (10, 24, 6)
    bright = data.train.x.float().mean((1, 2, 3)) > 75                              # class 1 of `pictures` is elm
    assert torch.equal(bright, data.train.y == 0)
    again = create_data(Config(dataset='csv', data_root=str(kaggle), val_frac=.2, test_frac=.25, seed=7))
    assert torch.equal(again.test.ids, data.test.ids) and not torch.equal(again.val.ids, data.val.ids)
    assert len(create_data(Config(dataset='csv', data_root=str(kaggle), test_frac=.5)).test) == 20

def test_a_table_is_a_folder(kaggle, tmp_path):
    "The same photos sorted into folders give the same batches"
    table = create_data(Config(dataset='csv', data_root=str(kaggle), val_frac=0, test_frac=.25))
    photos = tmp_path/'sorted'
    for split in ('train', 'test'):
        ds = getattr(table, split)
        for k, (im, y) in enumerate(zip(ds.x, ds.y)):
            f = photos/split/ds.classes[y]/f'{k:03}.png'
            f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(im.permute(1, 2, 0).numpy()).save(f)
    folder = create_data(Config(dataset='imagefolder', data_root=str(photos), val_frac=0))
    assert folder.classes == table.classes and sorted(map(hash, map(bytes, folder.train.x.numpy()))) == sorted(map(hash, map(bytes, table.train.x.numpy())))

def test_a_table_with_named_columns(kaggle):
    (kaggle/'train.csv').write_text('photo;copy;a;b\n' + ''.join(f'{i:04x};{i:04x}.png;{i % 2};{i % 5}\n' for i in range(40)))
    root = dict(dataset='csv', data_root=str(kaggle))
    with pytest.raises(DataError, match='Name it with label_column=.*a .2 different'): create_data(Config(**root))
    assert create_data(Config(**root, label_column='b')).n_class == 5
    assert create_data(Config(**root, label_column='a', image_column='copy')).n_class == 2
    with pytest.raises(ConfigError, match="image_column.*Did you mean 'copy'"): create_data(Config(**root, label_column='a', image_column='cop'))
    (kaggle/'train.csv').write_text('id,label\n0000,x\n0001,y\n0002,x\n0003,y\nzzzz,y\n')
    with pytest.raises(DataError, match="1 of 5 rows .* first: 'zzzz'"): create_data(Config(**root))
    assert len(create_data(Config(**root, skip_corrupt=1, val_frac=0, test_frac=.5)).train) == 2

def test_csv_from_start_to_report(kaggle, tmp_path, capsys):
    "A run; doctor says what is there; and the wrong name says the right one"
    from asibkd.run.doctor import check_path
    from asibkd.run.experiment import run_experiment
    s = run_experiment(**TINY | dict(dataset='csv', data_root=str(kaggle), method='ce', results_dir=str(tmp_path/'r'), log_level='INFO'))
    said = capsys.readouterr().out
    assert 'not used are test.csv' in said and 'brings no test set' in said and s['images']['test'] == 8 and s['dataset'] == 'csv'
    found = str(check_path(kaggle)[0])
    assert 'train.csv: sizes 8×8' in found and 'There is no test set' in found
    with pytest.raises(DataError, match='read by dataset=csv'): create_data(Config(dataset='imagefolder', data_root=str(kaggle)))

# Arrays

def test_medmnist(tmp_path):
    "The published form: labels (N, 1), three splits, grey or colour"
    x, y = pictures(30, 28, 3)
    parts = {f'{s}_{k}': v for s, at in dict(train=slice(0, 18), val=slice(18, 24), test=slice(24, 30)).items() for k, v in dict(images=x[at], labels=y[at, None]).items()}
    np.savez(tmp_path/'bloodmnist.npz', **parts)
    data = create_data(Config(dataset=str(tmp_path/'bloodmnist.npz')))
    assert (data.name, data.n_class, data.shape, len(data.train), len(data.val), len(data.test)) == ('bloodmnist.npz', 3, (3, 28, 28), 18, 6, 6)
    assert torch.equal(data.test.x, torch.from_numpy(x[24:]).permute(0, 3, 1, 2))
    assert torch.equal(create_data(Config(dataset='npz', data_root=str(tmp_path))).test.x, data.test.x)
    for changed, says in ((dict(train_labels=np.eye(18, dtype=int)), 'several classes'), (dict(train_images=np.zeros((18, 8, 8, 8), np.uint8)), 'Volumes')):
        np.savez(tmp_path/'bad.npz', **parts | changed)
        with pytest.raises(DataError, match=says): create_data(Config(dataset=str(tmp_path/'bad.npz')))
    with pytest.raises(DataError, match='no such file'): create_data(Config(dataset=str(tmp_path/'none.npz')))

def test_large_arrays_are_augmented(tmp_path):
    "96×96 in memory: a training batch differs from the images, as it does for photographs from files"
    from asibkd.data.batches import make_loader
    x, y = pictures(12, 96)
    np.savez(tmp_path/'a.npz', train_images=x, train_labels=y, test_images=x, test_labels=y)
    cfg = Config(dataset=str(tmp_path/'a.npz'), image_size=96, batch_size=4, num_workers=0, data_aug='standard', val_frac=0)
    data = create_data(cfg)
    a, b = (next(make_loader(cfg, data, 'train', p).epoch(0)) for p in ('A', 'A'))
    plain = data.train.images(a.idx).float()/255
    seen = a.x*torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    assert torch.equal(a.x, b.x) and (seen - plain).abs().amax((1, 2, 3)).min() > .01

# The Hub's formats

def hub_dataset(library, n, classes=('ant', 'bee')):
    x, y = pictures(n)
    kinds = library.Features(img=library.Image(), label=library.ClassLabel(names=list(classes)))
    return library.Dataset.from_dict(dict(img=[Image.fromarray(o) for o in x], label=y.tolist()), kinds)

def test_parquet_folder(library, tmp_path):
    "What lies on the Hub, without a network: pixels and names are the library's own"
    (tmp_path/'insects'/'data').mkdir(parents=True)
    for split, n in dict(train=20, test=6).items(): hub_dataset(library, n).to_parquet(tmp_path/'insects'/'data'/f'{split}-00000-of-00001.parquet')
    data = create_data(Config(dataset=f'hf:{tmp_path}/insects', val_frac=.2))
    theirs = library.load_dataset(str(tmp_path/'insects'))['test']
    assert data.name == 'hf:insects' and data.classes == theirs.features['label'].names and not data.test.streamed
    for x, y, o in zip(data.test.x, data.test.y, theirs):
        assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(o['img'])) and int(y) == o['label']
    one = create_data(Config(dataset=f'hf:{tmp_path}/insects/data/train-00000-of-00001.parquet', val_frac=.2, test_frac=.3))
    assert len(one.test) == 6

def test_image_folder_through_the_library(library, folder):
    "Photos beside the table are files: streamed, checked, with the fingerprint of files"
    photos = folder(size=80, train=4, test=2)
    data = create_data(Config(dataset=f'hf:{photos}', val_frac=.25))
    ours = create_data(Config(dataset='imagefolder', data_root=str(photos), val_frac=.25))
    assert data.classes == ours.classes and type(data.train.source).__name__ == 'FileSource' and data.train.streamed
    assert sorted(map(bytes, data.test.images(torch.arange(4)).numpy())) == sorted(map(bytes, ours.test.images(torch.arange(4)).numpy()))

def test_large_images_in_parquet(library, tmp_path):
    "They stay in the table; workers decode them, and one that cannot be read is named"
    from asibkd.data.batches import make_loader
    x, y = pictures(8, 80)
    kinds = library.Features(img=library.Image(), label=library.Value('int64'))
    library.Dataset.from_dict(dict(img=[Image.fromarray(o) for o in x], label=y.tolist()), kinds).to_parquet(tmp_path/'a.parquet')
    cfg = Config(dataset=f'hf:{tmp_path}/a.parquet', image_size=80, batch_size=4, val_frac=0, test_frac=.5, data_aug='0', num_workers=1)
    data = create_data(cfg)
    b = next(make_loader(cfg, data, 'train', 'A').epoch(0))
    assert data.train.streamed and data.train.source.fingerprint() and torch.equal(b.y, (data.train.images(b.idx).float().mean((1, 2, 3)) > 75).long())
    raw = [dict(bytes=b'no image' if i == 3 else o, path=None) for i, o in enumerate(library.load_dataset('parquet', data_files=str(tmp_path/'a.parquet'))['train'].cast_column('img', library.Image(decode=False))['img'][i]['bytes'] for i in range(8))]
    library.Dataset.from_dict(dict(img=raw, label=y.tolist()), kinds).to_parquet(tmp_path/'b.parquet')
    bad = cfg.model_copy(update=dict(dataset=f'hf:{tmp_path}/b.parquet'))
    with pytest.raises(DataError, match='row 3 of'): create_data(bad)
    assert create_data(bad.model_copy(update=dict(skip_corrupt=True))).notes['skipped'] == 1

def test_no_network_is_said_at_once(library, monkeypatch):
    import time
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    start = time.perf_counter()
    with pytest.raises(DataError, match=r'cannot be reached .*not in this machine') as e: create_data(Config(dataset='hf:user/birds'))
    assert time.perf_counter() - start < 8 and len(str(e.value).splitlines()) == 1
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(DataError, match='HF_HUB_OFFLINE forbids'): create_data(Config(dataset='hf:user/birds'))
    with pytest.raises(DataError, match='no such folder'): create_data(Config(dataset='hf:./none'))

def test_a_name_from_the_cache(library, tmp_path, monkeypatch, caplog):
    "What the library has prepared before is used where the Hub does not answer, and the log says so"
    (tmp_path/'birds').mkdir()
    for split, n in dict(train=20, test=6).items(): hub_dataset(library, n).to_parquet(tmp_path/'birds'/f'{split}.parquet')
    live = create_data(Config(dataset=f'hf:{tmp_path}/birds', val_frac=.2))
    (tmp_path/'cache'/'birds').rename(tmp_path/'cache'/'user___birds')               # as if it had come from user/birds
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    with caplog.at_level('INFO', 'asibkd'): data = create_data(Config(dataset='hf:user/birds', val_frac=.2))
    assert data.name == 'hf:user/birds' and torch.equal(data.train.x, live.train.x) and 'in its cache is used' in caplog.text

@pytest.mark.parametrize('kw', [dict(dataset='digits', label_column='y'), dict(dataset='digits', test_frac=.5), dict(dataset='digits', image_column='x')])
def test_what_is_not_read_is_refused(kw):
    assert {'csv', 'npz', 'imagefolder', 'mnist5k'} <= {*list_datasets()}
    with pytest.raises(ConfigError, match='has no effect: dataset=digits'): create_data(Config(**kw))

def test_a_stream_of_tables(kaggle, tmp_path):
    "Folders with a table are parts of a stream, too"
    import shutil
    other = tmp_path/'other'
    shutil.copytree(kaggle, other)
    (other/'train.csv').write_text((kaggle/'train.csv').read_text().replace('oak', 'ash'))
    data = run_data(Config(cl_mode=1, stream=[str(kaggle), str(other)], val_frac=.2))
    assert data.classes == ['elm', 'oak', 'ash'] and {*data.part['train'].tolist()} == {0, 1}

# Long tails

@pytest.fixture
def tail():
    "Four classes with 120, 40, 12 and 6 training images, 20 test images each, hard to tell apart"
    from asibkd.data.images import ImageSet
    def part(counts, seed):
        g = torch.Generator().manual_seed(seed)
        y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
        x = torch.randint(0, 200, (len(y), 3, 8, 8), generator=g)
        for c in range(4): x[y == c, :, 2*(c//2):2*(c//2) + 4, 4*(c % 2):4*(c % 2) + 4] += 45
        return ImageSet(x.clamp(0, 255).to(torch.uint8), y, ['ant', 'bee', 'cow', 'dog'])
    return part([120, 40, 12, 6], 0), part([20]*4, 1)

def run(tail, tmp_path, **kw):
    from asibkd.run.experiment import run_experiment
    return run_experiment(train=tail[0], val=tail[1], test=tail[1], results_dir=str(tmp_path), **TINY | dict(method='ce', epochs=12, batch_size=16, student_lr=.002) | kw)

@pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='ASIBKD_SLOW=1: trains three students')
def test_rare_classes_are_found(tail, tmp_path):
    "Balanced accuracy with either remedy is above that without, by far; the summary has what the report shows"
    from sklearn.metrics import balanced_accuracy_score
    from asibkd.models.checkpoints import load_weights
    got = {k: run(tail, tmp_path, **kw) for k, kw in dict(plain={}, weight=dict(class_weight='balanced'), sampler=dict(sampler='balanced')).items()}
    assert min(got['weight']['balanced_acc'], got['sampler']['balanced_acc']) > got['plain']['balanced_acc'] + .08, {k: s['balanced_acc'] for k, s in got.items()}
    o = got['weight']['by_class']
    assert o['train'] == [120, 40, 12, 6] and o['groups'] == dict(many=[0], medium=[1], few=[2, 3])
    p = load_weights(Path(got['weight']['run'])/'predictions.safetensors')
    assert got['weight']['balanced_acc'] == pytest.approx(balanced_accuracy_score(p['labels'], p['ce'].long()), abs=1e-6)
    assert o['group_recall']['ce']['few'] == pytest.approx(sum(o['recall'][2:])/2, abs=1e-3)
    from asibkd.analysis.classes import class_sections
    page = str(class_sections(Path(got['weight']['run']), got['weight']))
    assert 'Balanced accuracy of ce' in page and 'few (2 classes)' in page

def test_weights_reach_the_terms_that_are_named(tail):
    "CE of the student, of the synergy and of fine-tuning; MixUp; nothing in evaluation or KD"
    from types import SimpleNamespace as NS
    from asibkd.data.balance import class_weights
    from asibkd.distil.methods import create_method, with_method_defaults
    from asibkd.core.runtime import When
    from asibkd.trainers.phases import FinetuneStep
    import torch.nn.functional as F
    y, z = tail[0].y, torch.randn(16, 4, dtype=torch.float64)
    w = class_weights(y, 4).double()
    b = NS(y=y[::12][:16].clone()); n = len(b.y); z = z[:n]
    student = NS(n_class=4, feat_dim=8)
    method = create_method('avgz', Config(class_weight='balanced'), student, [], labels=y)
    assert torch.allclose(method.hard_ce(b, dict(logit=z)), F.cross_entropy(z, b.y, w), atol=1e-6)
    assert 'class_weight' not in method.state_dict() and create_method('avgz', Config(), student, [], labels=y).class_weight is None
    from asibkd.distil.methods import Method, list_methods
    from asibkd.distil.simkd import student_for
    from asibkd.models.teachers import create_teacher
    net, *teachers = [create_teacher(n, n_class=4, img_size=16) for n in ('resnet8', 'resnet14', 'resnet14')]
    for name in (*list_methods(), 'crd+wttm'):                     # whatever its constructor passes on
        built = create_method(name, Config(class_weight='balanced'), student_for(name, net, teachers), teachers, labels=y)
        assert all(torch.allclose(o.class_weight.double(), w) for o in built.modules() if isinstance(o, Method)), name
    class Net(torch.nn.Module):
        n_class = 4
        def forward(self, x): return dict(logit=x)
    b.x = z
    step = FinetuneStep(Net(), Config(class_weight='balanced'), y)
    assert torch.allclose(step(b, When('finetune'))['loss'], F.cross_entropy(z, b.y, w), atol=1e-6)
    b.y = torch.eye(4).double()[b.y]*.7 + torch.eye(4).double()[b.y.roll(1)]*.3           # MixUp
    share = b.y @ w
    assert torch.allclose(method.hard_ce(b, dict(logit=z)), -(w*b.y*z.log_softmax(1)).sum()/share.sum(), atol=1e-6)

def test_balanced_resumes_to_the_bit(tail, tmp_path):
    "Killed in the second epoch and started again: the bits of an undisturbed run"
    from _stop import Stop, StopInStep
    kw = dict(sampler='balanced', class_weight='balanced', epochs=3, checkpoint_steps=2)
    whole = run(tail, tmp_path/'a', **kw)
    with pytest.raises(Stop): run(tail, tmp_path/'b', **kw, callbacks=[StopInStep(15)])
    parts = run(tail, tmp_path/'b', **kw)
    weights = [(Path(s['run'])/'student_last.safetensors').read_bytes() for s in (whole, parts)]
    assert weights[0] == weights[1]

@pytest.mark.parametrize('kw, says', [(dict(sampler='balanced', cache_views=2), 'cache_views=0'), (dict(cl_mode=1, num_stages=1, class_weight='balanced'), 'class_weight=balanced with cl_mode=1'),
                                      (dict(cl_mode=1, num_stages=1, sampler='balanced'), 'sampler=balanced with cl_mode=1')])
def test_what_has_no_meaning_is_refused(tail, tmp_path, kw, says):
    if kw.get('cl_mode'): kw = dict(kw, method='asmb')
    with pytest.raises((ConfigError, DataError), match=says): run(tail, tmp_path, **kw)

def test_doctor_says_it(folder):
    import shutil
    from asibkd.data.check import check_data
    photos = folder(train=3, test=2)
    for i in range(40): shutil.copy(photos/'train'/'cat'/'000.png', photos/'train'/'cat'/f'x{i}.png')
    assert "43 photos of 'cat', 3 of 'dog'" in str(check_data(photos))

def test_a_folder_named_without_a_slash_is_called_once(tmp_path, monkeypatch):
    from asibkd.data.catalogue import dataset_name
    (tmp_path/'birds').mkdir(); monkeypatch.chdir(tmp_path)
    assert dataset_name('hf:birds') == dataset_name(f'hf:{tmp_path}/birds') == 'hf:birds'
