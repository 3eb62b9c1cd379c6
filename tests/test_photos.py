"Photos as people have them: deep pixels, turned telephones, links, hidden files, labels of their own. Named after the entries."
import logging, os, struct, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asibkd.core.config import Config, DataError
from asibkd.data.batches import make_loader
from asibkd.data.check import check_data
from asibkd.data.datasets import create_data
from asibkd.data.images import ImageSet
from asibkd.data.sources import FileSource, as_image
from asibkd.eval.deploy import load_student, preprocess_for, student_card
from asibkd.run.experiment import run_experiment

rng = np.random.default_rng(0)
def noise(h, w, c=3): return rng.integers(0, 256, (h, w, c)[:3 if c else 2]).astype('uint8')
def save(f, im, **kw): f.parent.mkdir(parents=True, exist_ok=True); (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(f, **kw)
def config(root, **kw): return Config(dataset='imagefolder', data_root=str(root), device='cpu', num_workers=0, **dict(val_frac=.34) | kw)
def data(root, **kw): return create_data(config(root, **kw))
def turned(k):
    exif = Image.Exif()
    exif[0x0112] = k
    return exif

@pytest.fixture
def photos(tmp_path):
    "photos(train=6, test=2): noise of two classes, and where it is"
    def make(at='photos', classes=('cat', 'dog'), size=(8, 8), **splits):
        for split, n in splits.items():
            for c in classes:
                for i in range(n): save(tmp_path/at/split/c/f'{i}.png', noise(*size))
        return tmp_path/at
    return make

@pytest.fixture
def logged():
    "The lines that are logged"
    lines, log = [], logging.getLogger('asibkd')
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = log.level
    log.addHandler(handler); log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler); log.setLevel(level)

# --- A1 deep and odd pixels -------------------------------------------------------------------------------------------
DEEP = np.array([[0, 128, 129, 257], [32768, 40000, 65407, 65535]], np.uint16)
BYTES = torch.tensor([[0, 0, 1, 1], [128, 156, 255, 255]], dtype=torch.uint8)      # divided by 257, rounded

@pytest.mark.parametrize('ext', ['png', 'tif', 'pgm'])
def test_A1_sixteen_bit_files_keep_their_brightness(tmp_path, ext):
    f = tmp_path/f'a.{ext}'
    if ext == 'pgm': f.write_bytes(b'P5 4 2 65535\n' + DEEP.astype('>u2').tobytes())
    else: save(f, DEEP)
    assert all(torch.equal(c, BYTES) for c in FileSource([f])[0])

def test_A1_a_folder_of_sixteen_bit_pngs(tmp_path):
    for split in ('train', 'test'):
        for c, low in dict(dark=5_000, bright=40_000).items():
            for i in range(6): save(tmp_path/split/c/f'{i}.png', rng.integers(low, low + 999, (8, 8)).astype(np.uint16))
    d = data(tmp_path)
    mean = {c: d.train.x[d.train.y == k].float().mean().item() for k, c in enumerate(d.classes)}
    assert abs(mean['dark'] - 5_500/257) < 1 and abs(mean['bright'] - 40_500/257) < 1

def test_A1_colours_of_sixteen_bits(tmp_path):
    "Three channels of 16 bits: their high bytes, at most one off"
    deep = rng.integers(0, 65536, (4, 5, 3)).astype('>u2')
    chunk = lambda kind, o: struct.pack('>I', len(o)) + kind + o + struct.pack('>I', zlib.crc32(kind + o))
    rows = b''.join(b'\0' + row.tobytes() for row in deep)
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 5, 4, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    for name in ('a.png', 'a.jpg'):              # the second one has the wrong ending
        (tmp_path/name).write_bytes(png)
        got = FileSource([tmp_path/name])[0]
        assert got.dtype == torch.uint8 and (got.permute(1, 2, 0).numpy() - deep/257).__abs__().max() <= 1

@pytest.mark.parametrize('mode', ['I;16', 'I;16B', 'I;16L', 'I'])
def test_A1_pil_modes_of_sixteen_bits(mode):
    kind = dict([('I;16B', '>u2'), ('I', 'i4')]).get(mode, '<u2')
    im = Image.frombytes(mode, (4, 2), DEEP.astype(kind).tobytes())
    assert im.mode == mode and torch.equal(as_image(im)[0], BYTES)

@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'LA', 'PA', 'La', 'RGBa', 'F'])
def test_A1_other_pil_modes(mode):
    "Black and white in every mode; alpha is dropped"
    grey = Image.fromarray(np.array([[0, 255]], np.uint8))
    steps = dict(LA=['LA'], PA=['P', 'PA'], La=['LA', 'La'], RGBa=['RGBA', 'RGBa']).get(mode, [mode])
    im = grey
    for step in steps: im = im.convert(step)
    if mode == 'F': im = im.point(lambda v: v/255 + 0)
    assert im.mode == mode and as_image(im).tolist() == [[[0, 255]]]*3

def test_A1_alpha_is_dropped_whatever_the_format(tmp_path):
    clear = Image.new('RGBA', (4, 4), (200, 30, 60, 0))
    palette = Image.new('P', (4, 4))
    palette.putpalette([200, 30, 60]*256)
    save(tmp_path/'a.png', clear); save(tmp_path/'b.png', palette, transparency=0); save(tmp_path/'c.png', palette, transparency=bytes(256)); save(tmp_path/'d.webp', clear, lossless=True, exact=True)
    for f in sorted(tmp_path.iterdir()): assert FileSource([f])[0][:, 0, 0].tolist() == [200, 30, 60], f.name

def test_A1_floats_outside_0_1_are_refused_by_name(tmp_path):
    save(tmp_path/'good.tif', np.array([[0, .2, 1]], np.float32)); save(tmp_path/'bad.tif', np.array([[0, 40.]], np.float32))
    assert FileSource([tmp_path/'good.tif'])[0][0].tolist() == [[0, 51, 255]]
    with pytest.raises(DataError, match=r"bad.tif.*floats in 0…1; got float32 in 0…40"): FileSource([tmp_path/'bad.tif'])[0]

def test_A1_values_whose_scale_is_unknown_are_refused(tmp_path):
    save(tmp_path/'a.tif', np.array([[0, 7]], np.int32))
    with pytest.raises(DataError, match=r"a.tif.*16-bit image \(mode I\) with values in 0…7"): FileSource([tmp_path/'a.tif'])[0]
    with pytest.raises(DataError, match='16-bit image .uint16. with values in 0…200'): as_image(np.array([[0, 200]], np.uint16))

def test_A1_uint16_arrays_of_a_dataset():
    items = [(np.full((8, 8), 257*(100*(i % 2) + i), np.uint16), i % 2) for i in range(12)]
    d = create_data(Config(val_frac=.34), train=items, test=items)
    assert sorted(d.test.x[:, 0, 0, 0].tolist()) == sorted(100*(i % 2) + i for i in range(12))

def test_A1_torchvisions_loader_would_clip(tmp_path):
    from torchvision.datasets import ImageFolder
    for k, c in enumerate('ab'):
        for i in range(4): save(tmp_path/c/f'{i}.png', np.full((8, 8), 257*(90 + 100*k), np.uint16))
    ds = ImageFolder(tmp_path)
    for bad in (ds, torch.utils.data.Subset(ds, [0, 5])):
        with pytest.raises(DataError, match=r"16-bit image '.*0.png' .mode I;16.: torchvision's loader clips it"): create_data(Config(), train=bad, test=bad)
    ds = ImageFolder(tmp_path, loader=Image.open)
    assert create_data(Config(val_frac=.3), train=ds, test=ds).test.x.unique().tolist() == [90, 190]

@pytest.mark.parametrize('ext', ['jpg', 'png', 'tif', 'webp'])
def test_A1_exif_rotation_in_training_and_in_use(tmp_path, ext):
    upright = np.zeros((48, 80, 3), np.uint8); upright[:12] = 250                  # the sky is above
    back = {1: 0, 3: 2, 6: 1, 8: 3}                                                # quarter turns that the camera made
    for k, turns in back.items():
        f = tmp_path/f'{k}.{ext}'
        save(f, np.rot90(upright, turns).copy(), exif=turned(k))
        got = FileSource([f])[0]
        assert got.shape == (3, 48, 80) and FileSource([f]).size(0) == (48, 80) and got[:, :8].min() > 200 and got[:, 16:].max() < 50, k
        prepare = preprocess_for(dict(shape=(3, 40, 40), mean=(0, 0, 0), std=(1, 1, 1)))
        assert prepare(Image.open(f))[0, 2].min() > .7 and torch.equal(prepare(Image.open(f)), prepare(f))

def test_A1_a_damaged_exif_turns_nothing(tmp_path):
    save(tmp_path/'a.png', noise(5, 9), exif=b'Exif\0\0II*\0garbage')
    assert FileSource([tmp_path/'a.png'])[0].shape == (3, 5, 9)

def test_A1_images_of_one_colour_are_noticed(tmp_path, logged):
    for split in ('train', 'test'):
        for c in 'ab':
            for i in range(4): save(tmp_path/split/c/f'{i}.png', rng.integers(0, 4096, (8, 8)).astype(np.uint16))   # 12 bits in 16
    data(tmp_path)
    assert any('The training images are nearly black' in o for o in logged)

# --- A2 what counts as a photo ----------------------------------------------------------------------------------------
def names(d): return sorted(Path(f).name for f in d.source.paths) if isinstance(d.source, FileSource) else len(d)

def test_A2_link_loops_are_not_followed(photos, logged):
    root = photos(train=10, test=3)
    before = data(root)
    (root/'train'/'cat'/'loop').symlink_to(root); (root/'train'/'cat'/'up').symlink_to('..'); (root/'train'/'all').symlink_to('.'); (root/'test'/'dog'/'me').symlink_to('.')
    d = data(root)
    assert (len(d.train), len(d.val), len(d.test), d.classes) == (len(before.train), len(before.val), 6, ['cat', 'dog']) and torch.equal(d.train.x, before.train.x)
    assert any('4 links to folders that are read already' in o for o in logged)

def test_A2_links_to_other_classes_and_splits(photos):
    "A dog stays a dog, and a test photo a test photo, whichever way a link leads to them"
    root = photos(train=4, test=2)
    save(root/'train'/'dog'/'deep'/'x.png', noise(8, 8))
    (root/'train'/'cat'/'a').symlink_to(root/'train'/'dog'/'deep'); (root/'train'/'cat'/'b').symlink_to(root/'test'/'dog')
    found = check_data(root).splits
    assert found == dict(train=dict(cat=4, dog=5), test=dict(cat=2, dog=2))

def test_A2_links_to_elsewhere_are_followed(photos, tmp_path):
    store = photos('store', classes=('cat', 'dog'), a=3)
    for split in ('train', 'test'):
        for c in ('cat', 'dog'): (tmp_path/'set'/split).mkdir(parents=True, exist_ok=True); (tmp_path/'set'/split/c).symlink_to(store/'a'/c)
    (tmp_path/'set'/'val').symlink_to(tmp_path/'set'/'test')
    assert check_data(tmp_path/'set').splits == {k: dict(cat=3, dog=3) for k in ('train', 'val', 'test')}

def test_A2_hidden_and_system_files(photos, logged):
    root = photos(train=4, test=2)
    copy = root/'train'/'cat'/'0.png'
    for hidden in ('.ipynb_checkpoints/0-checkpoint.png', '@eaDir/0.png', '__MACOSX/0.png'):
        (copy.parent/hidden).parent.mkdir(); (copy.parent/hidden).write_bytes(copy.read_bytes())
    for name in ('cat/._0.png', '.DS_Store', 'cat/.DS_Store', 'cat/Thumbs.db'): (root/'train'/name).write_bytes(b'\0\5\x16\7')
    (root/'train'/'__MACOSX').mkdir(); (root/'train'/'.git').mkdir()
    d = data(root)
    assert (len(d.train) + len(d.val), d.classes) == (8, ['cat', 'dog']) and not any('left out' in o for o in logged)

def test_A2_jfif_is_jpeg_and_what_is_left_out_is_said_in_one_line(photos, logged):
    root = photos(train=4, test=2)
    for i in range(5): save(root/'train'/'cat'/f'{i}.JFIF', noise(8, 8), format='JPEG')
    for name in ('cat/1.gif', 'cat/2.gif', 'dog/3.gif', 'dog/notes.txt', 'dog/README', 'stray.png'): (root/'train'/name).write_bytes(b'x')
    d = data(root)
    assert len(d.train) + len(d.val) == 13
    said = [o for o in logged if 'left out' in o]
    assert len(said) == 1 and all(o in said[0] for o in ('3 .gif', '1 .txt', '1 without ending', '1 .png outside the class folders'))

def test_A2_pipes_and_broken_links_do_not_hang(photos, logged):
    root = photos(train=4, test=2)
    os.mkfifo(root/'train'/'cat'/'pipe.png'); (root/'train'/'dog'/'gone.jpg').symlink_to(root/'nowhere.jpg'); (root/'train'/'dog'/'self.jpg').symlink_to('self.jpg')
    (root/'train'/'dog'/'to_pipe.png').symlink_to(root/'train'/'cat'/'pipe.png')
    assert len(data(root).test) == 4 and any('left out 4 no regular file' in o for o in logged)

def test_A2_names_in_other_encodings(photos):
    root = photos(train=4, test=2)
    odd = Path(os.fsdecode(os.fsencode(root/'train'/'cat') + b'/caf\xe9'))
    try: save(Path(f'{odd}.png'), noise(8, 8)); save(Path(f'{odd}.jpg'), noise(8, 8), format='JPEG')
    except OSError: pytest.skip('this file system takes UTF-8 only')
    assert len(data(root).train) + len(data(root).val) == 10
    Path(f'{odd}.jpg').write_bytes(b'no image')
    with pytest.raises(DataError, match='caf\ufffd.jpg'): data(root)
    odd.mkdir(); odd.rename(os.fsdecode(os.fsencode(root/'train') + b'/caf\xe9'))
    with pytest.raises(DataError, match='no valid UTF-8. Rename it'): data(root)

# --- A3 labels --------------------------------------------------------------------------------------------------------
class Own(torch.utils.data.Dataset):
    "`.targets` and `.classes` of ten classes; the items answer another question"
    classes = [f'c{i}' for i in range(10)]
    def __init__(self, n=40, question=lambda y: int(y >= 5)): self.targets, self.question, self.reads = [i % 10 for i in range(n)], question, 0
    def __len__(self): return len(self.targets)
    def __getitem__(self, i):
        if i >= len(self): raise IndexError(i)
        self.reads += 1
        return torch.full((3, 8, 8), i, dtype=torch.uint8), self.question(self.targets[i])

def true_labels(d, part): return [int(part.x[i, 0, 0, 0]) % 10 >= 5 for i in range(len(part))]

def test_A3_labels_are_what_the_items_say():
    odd = lambda: Own(42, lambda y: y % 2)                                         # first and last agree with .targets
    d = create_data(Config(), train=odd(), test=odd())
    for part in (d.train, d.val, d.test): assert part.y.tolist() == [int(v) % 2 for v in part.x[:, 0, 0, 0]]
    assert d.classes == ['0', '1']                                                 # .classes name something else

def test_A3_through_subset():
    pick = list(range(39, -1, -1))
    d = create_data(Config(), train=torch.utils.data.Subset(Own(), pick), test=torch.utils.data.Subset(torch.utils.data.Subset(Own(), pick), list(range(20))))
    for part in (d.train, d.test): assert part.y.bool().tolist() == true_labels(d, part)

def test_A3_target_transform_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder
    for c in 'abc':
        for i in range(4): save(tmp_path/c/f'{i}.png', noise(8, 8))
    plain, relabelled = (ImageFolder(tmp_path, target_transform=t) for t in (None, lambda y: 2 - y))
    a, b = (create_data(Config(val_frac=.3), train=o, test=torch.utils.data.Subset(o, [0, 5, 10])) for o in (plain, relabelled))
    assert (a.test.y.tolist(), b.test.y.tolist()) == ([0, 1, 2], [2, 1, 0])
    assert a.classes == ['a', 'b', 'c'] and b.classes == ['0', '1', '2']           # class 0 is no 'a' any more

def test_A3_torchvision_is_believed_without_decoding(monkeypatch, tmp_path):
    from torchvision.datasets import ImageFolder
    from asibkd.data.datasets import as_image_set
    for c in 'ab': save(tmp_path/c/'1.png', noise(8, 8))
    monkeypatch.setattr(ImageFolder, 'loader', None, raising=False)
    ds = ImageFolder(tmp_path, loader=lambda f: 1/0)
    assert as_image_set(ds).y.tolist() == as_image_set(torch.utils.data.Subset(ds, [0, 1])).y.tolist() == [0, 1]

def test_A3_each_item_is_read_once_and_image_and_label_belong_together():
    class Drawn(Own):
        def __getitem__(self, i):
            self.reads += 1
            k = int(torch.randint(2, ()))
            return torch.full((3, 8, 8), 200*k + 1, dtype=torch.uint8), k
    train = Drawn(60)
    d = create_data(Config(), train=train, test=Drawn(60))
    assert train.reads == 60 and all(((p.x[:, 0, 0, 0] > 100) == p.y.bool()).all() for p in (d.train, d.val, d.test))

def test_A3_noise_keeps_the_class_names():
    noisy = Own(80, lambda y: y)
    noisy.question = lambda y: int(torch.randint(10, ())) if torch.rand(()) < .2 else y
    assert create_data(Config(), train=noisy, test=Own(80, lambda y: y)).classes == Own.classes

@pytest.mark.parametrize('hot', [torch.eye(2), np.eye(2), [[1, 0], [0, 1]]], ids=['tensor', 'array', 'list'])
def test_A3_one_hot_labels_say_give_class_numbers(hot):
    items = [(torch.zeros(3, 8, 8), hot[i % 2]) for i in range(8)]
    with pytest.raises(DataError, match='Give class numbers'): create_data(Config(), train=items, test=items)

@pytest.mark.parametrize('item, says', [((torch.zeros(3, 8, 8), torch.eye(2)[0]), 'Give class numbers'), ((torch.zeros(3, 8, 8), 'cat'), 'whole numbers'), ((torch.zeros(3, 8, 8), None), 'whole numbers'),
    (dict(image=0, label=0), 'item 0 is dict'), ((torch.zeros(16, 16, 3), 0), r'Item 0 of the Items: .*did you mean'), ((torch.zeros(3, 8, 8), 0), 'at least two classes')], ids=['one-hot', 'text', 'none', 'dict', 'axes', 'one class'])
def test_A3_A4_the_door_says_so(tiny, item, says):
    class Items(torch.utils.data.Dataset):
        def __len__(self): return 12
        def __getitem__(self, i): return item
    with pytest.raises(DataError, match=says): run_experiment(**tiny, train=Items(), test=Items())

# --- A4 axes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('im', [np.zeros((3, 16, 16), np.uint8), np.zeros((1, 28, 28), np.float32), np.zeros((4, 9, 16), np.uint8), torch.zeros(16, 16, 3), torch.zeros(28, 28, 1), torch.zeros(16, 9, 4)], ids=str)
def test_A4_channels_at_the_wrong_place(im):
    items = [(im, i % 2) for i in range(8)]
    with pytest.raises(DataError, match=r'channels; did you mean \(C, H, W\)\?'): create_data(Config(), train=items, test=items)

def test_A4_many_channels_are_fine_where_nothing_else_looks_like_colours():
    assert as_image(np.zeros((16, 16, 13), np.uint8)).shape == (13, 16, 16) == as_image(torch.zeros(13, 16, 16)).shape

def test_A4_a_tensor_of_all_images():
    for bad, says in ((torch.zeros(4, 16, 16, 3, dtype=torch.uint8), r'did you mean \(N, C, H, W\)'), (torch.rand(4, 3, 16, 16), 'uint8'), (torch.zeros(4, 16, 16, dtype=torch.uint8), 'N, C, H, W')):
        with pytest.raises(DataError, match=says): ImageSet(bad, [0, 1, 0, 1])

@pytest.mark.parametrize('im, says', [(torch.ones(3, 8, 8, dtype=torch.bool), 'bool'), (np.full((8, 8, 3), 200.), 'Divide by the value of white .is it 255'), (torch.full((3, 8, 8), 200.), 'is it 255'), (np.full((8, 8), 3, np.uint16), '16-bit image'),
    (np.zeros((8, 8), np.int64), 'int64'), (torch.zeros(3, 8, 8, dtype=torch.long), 'int64'), (np.full((8, 8), np.nan), 'NaN'), (torch.randn(3, 8, 8), 'Leave out Normalize')], ids=lambda o: o if isinstance(o, str) else type(o).__name__)
def test_A4_every_type_of_number_has_its_own_message(im, says):
    with pytest.raises(DataError, match=says) as e: as_image(im)
    assert ('Normalize' in str(e.value)) == ('Normalize' in says)

# --- A5 deployed = evaluated ------------------------------------------------------------------------------------------
SIZES = [(7, 7), (8, 31), (31, 8), (32, 32), (33, 47), (48, 40), (64, 64), (65, 64), (20, 200), (100, 101), (223, 300), (224, 224), (225, 500), (256, 256), (500, 333)]

@pytest.mark.parametrize('side', [16, 32, 64, 96, 224])
def test_A5_a_student_sees_in_use_what_it_saw_in_evaluation(tmp_path, side):
    for k, (h, w) in enumerate(SIZES):
        for split in ('train', 'test'):
            if split == 'train' and k > 3: continue
            f = tmp_path/split/'ab'[k % 2]
            save(f/f'{k}.png', noise(h, w)); save(f/f'{k}.jpg', noise(h, w), exif=turned(1 + k % 8))
            if split == 'test': save(f/f'{k}-grey.png', noise(h, w, 0)); save(f/f'{k}-deep.png', noise(h, w, 0).astype(np.uint16)*257)
    cfg = config(tmp_path, image_size=side, batch_size=8)
    d = create_data(cfg)
    prepare = preprocess_for(student_card('resnet8', d, True))
    x = torch.cat([b.x for b in make_loader(cfg, d, 'test', 'eval').epoch()])
    files = sorted((tmp_path/'test'/'a').iterdir(), key=str) + sorted((tmp_path/'test'/'b').iterdir(), key=str)
    assert len(x) == len(files)
    for seen, f in zip(x, files):
        with Image.open(f) as im: assert torch.equal(prepare(im), seen), f.name
        assert torch.equal(prepare(f), seen) and torch.equal(prepare(str(f)), seen), f.name

@pytest.mark.parametrize('channels', [1, 3, 4, 6])
def test_A5_images_from_memory(channels):
    x = torch.randint(0, 256, (24, channels, 10, 14), dtype=torch.uint8)
    ds = ImageSet(x, [0, 1]*12)
    for size in (0, 12, 80):
        cfg = Config(image_size=size, val_frac=.3, num_workers=0)
        d = create_data(cfg, train=ds, test=ds)
        prepare = preprocess_for(student_card('resnet8', d, True))
        seen = torch.cat([b.x for b in make_loader(cfg, d, 'test', 'eval').epoch()])
        assert torch.equal(torch.stack([prepare(im) for im in x]), seen)

def test_A5_the_trained_student_of_a_folder(tiny, tmp_path):
    "Photos of no common shape, through a run, a saved student, and PIL: the same accuracy and the same predictions"
    for split, n in dict(train=8, test=5).items():
        for k, c in enumerate(('cat', 'dog')):
            for i in range(n): save(tmp_path/'p'/split/c/f'{i}.png', (noise(20 + 3*i, 60 - 4*i)//2 + 100*k).astype('uint8'))
    s = run_experiment(**tiny | dict(dataset='imagefolder', data_root=str(tmp_path/'p'), image_size=16, method='ce', train_per_class=0, batch_size=8, val_frac=.25, teacher1_type='resnet8', student_type='resnet8'))
    model, prepare, classes = load_student(s['run'])
    right = [classes[model(prepare(Image.open(f))[None]).argmax()] == f.parent.name for f in sorted((tmp_path/'p'/'test').glob('*/*'))]
    assert abs(np.mean(right) - s['test_acc_val_selected']) < 1e-6

# --- B8 folders as people have them -----------------------------------------------------------------------------------
def test_B8_one_class(photos):
    with pytest.raises(DataError, match=r"one class only, 'cat'.*Is data_root one level too high\?"): data(photos(classes=('cat',), train=4, test=2))
    root = photos('deep', classes=('all/cat', 'all/dog'), train=4, test=2)
    with pytest.raises(DataError, match=r"It holds the folders cat, dog. Is data_root one level too high\?"): data(root)
    items = [(torch.zeros(3, 8, 8), 0)]*8
    with pytest.raises(DataError, match='at least two classes'): create_data(Config(), train=items, test=items)

@pytest.mark.parametrize('name', ['val', 'valid', 'validation'])
def test_B8_names_of_the_validation_folder(photos, name, logged):
    d = data(photos(**{'train': 4, name: 3, 'test': 2}))
    assert (len(d.train), len(d.val), len(d.test), d.notes['val']) == (8, 6, 4, 'given')
    assert any(f'{name}/ is the validation set' in o for o in logged)

def test_B8_two_validation_folders(photos):
    with pytest.raises(DataError, match='holds val and valid: which is the validation set'): data(photos(train=4, val=2, valid=2, test=2))

@pytest.mark.parametrize('val', [0, 3])
def test_B8_unlabelled_test_folder(photos, val):
    root = photos(train=4, **dict(val=val) if val else {})
    for i in range(3): save(root/'test'/f'{i}.png', noise(8, 8))
    with pytest.raises(DataError, match="test' holds 3 images, no class folders"): data(root)

def test_B8_case_and_near_names(photos, tmp_path):
    with pytest.raises(DataError, match="Rename 'Test' to 'test', 'Train' to 'train'"): data(photos('a', Train=4, Test=2))
    with pytest.raises(DataError, match="Rename 'Test' to 'test'"): data(photos('b', train=4, val=2, Test=2))    # not: val is the test set
    with pytest.raises(DataError, match="Rename 'training' to 'train'"): data(photos('c', training=4, test=2))
    root = photos('d/inner', train=4, test=2)
    for wrong in (root.parent, root/'train'):
        with pytest.raises(DataError) as e: data(wrong)
        assert f'Did you mean data_root={root}?' in str(e.value)

def test_B8_folders_beside_the_splits_are_named(photos, logged):
    data(photos(train=4, test=2, holdout=2))
    assert any('not used are the folders holdout' in o for o in logged)

# --- check_data -------------------------------------------------------------------------------------------------------
def test_check_data_finds_what_a_run_would_not_notice(photos):
    root = photos(train=6, test=3)
    assert check_data(root).ok
    (root/'test'/'cat'/'0.png').write_bytes((root/'train'/'cat'/'5.png').read_bytes())
    (root/'train'/'dog'/'x.png').write_bytes((root/'train'/'cat'/'1.png').read_bytes())
    save(root/'train'/'dog'/'deep.png', np.full((8, 8), 3000, np.uint16))
    (root/'train'/'dog'/'y.heic').write_bytes(b'')
    c = check_data(root)
    assert c.ok and sum(f.level == 'warning' for f in c.findings) == 4
    for says in ('1 photos are in train/ and in test/', "cat/1.png' is '", 'no value above 3000', '1 .heic', 'I;16 (1)', 'train  14 photos in 2 classes (cat 6, dog 8)'): assert says in str(c), says
    (root/'test'/'dog'/'0.png').write_bytes(b'no image')
    (root/'train'/'cow').mkdir()
    c = check_data(root)
    assert not c.ok and "Class 'cow' has no images in train/" in str(c) and 'dog/0.png' in str(c)

def test_check_data_of_anything(tmp_path, photos):
    for root in (tmp_path/'nowhere', photos('a', Train=2, Test=2), tmp_path):
        assert not check_data(root).ok and 'A run cannot read it' in str(check_data(root))
