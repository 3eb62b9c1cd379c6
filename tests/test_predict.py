"`asibkd predict`: class and confidence of any images by the student alone."
import csv, io, json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest, torch
from PIL import Image

from asibkd.core.config import ConfigError, DataError, RunError
from asibkd.data.images import prepare_image
from asibkd.eval.deploy import load_student, save_student, student_card
from asibkd.eval.predict import open_predictor, predict_command, predict_images, read_pixels
from asibkd.models.teachers import build_network

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CLASSES = ['cat', 'dog', 'fox, red']

@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    card = dict(type='resnet8', n_class=3, classes=CLASSES, shape=[3, 32, 32], mean=[.4, .5, .6], std=[.2, .25, .3], small_input=True)
    save_student(tmp_path/'run', build_network('resnet8', n_class=3).state_dict(), card)
    return tmp_path/'run'

@pytest.fixture
def photos(tmp_path):
    "Of every kind, in folders; one cut off, one text"
    d, rng = tmp_path/'photos', np.random.default_rng(0)
    (d/'deep').mkdir(parents=True)
    im = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((120, 77))
    exif = Image.Exif(); exif[0x112] = 6
    im.save(d/'a.jpg'); im.save(d/'turned.jpg', exif=exif); im.convert('L').save(d/'grey.jpg'); im.save(d/'deep'/'b.png'); im.convert('P').save(d/'p.png')
    im.convert('CMYK').save(d/'cmyk.jpg'); im.resize((32, 32)).save(d/'same.webp')
    (d/'cut.jpg').write_bytes((d/'a.jpg').read_bytes()[:500]); (d/'text.jpg').write_text('no photo'); (d/'notes.txt').write_text('not asked for')
    return d

def test_pixels_are_those_of_evaluation(photos):
    for f in (*photos.glob('*.jpg'), *photos.rglob('*.png')):
        for shape in ((3, 32, 32), (3, 224, 224), (1, 28, 28)):
            x = read_pixels(f, shape)
            if f.stem in ('cut', 'text'): assert isinstance(x, str)
            else: assert torch.equal(x, prepare_image(f, shape)), (f.name, shape)

def test_rows_and_failures(run, photos, capsys):
    code = predict_command([str(run), str(photos), '--batch_size', '3'])
    o = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(o.out)))
    assert code == 2 and [*rows[0]] == ['file', 'class', 'confidence']
    assert {Path(r['file']).name for r in rows} == {'a.jpg', 'turned.jpg', 'grey.jpg', 'cmyk.jpg', 'b.png', 'p.png', 'same.webp'}
    assert 'cut.jpg' in o.err and 'text.jpg' in o.err and '2 of 9 files' in o.err and 'notes' not in o.err + o.out
    s = load_student(run)
    for r in rows:
        with torch.no_grad(): c, i = s.model(s.preprocess(r['file'])[None]).softmax(1).max(1)
        assert r['class'] == CLASSES[i] and abs(float(r['confidence']) - c.item()) < 2e-4

def test_out_and_code_zero(run, photos, tmp_path, capsys):
    assert predict_command([str(run), str(photos/'a.jpg'), '--out', str(tmp_path/'f.csv')]) == 0
    assert len((tmp_path/'f.csv').read_text().splitlines()) == 2 and not capsys.readouterr().out
    rows, failed = predict_images(run, photos/'a.jpg', photos/'deep')
    assert len(rows) == 2 and not failed

def test_exported_programs_answer_alike(run, photos):
    from asibkd.eval.deploy import export_program
    want, _ = predict_images(run, photos/'a.jpg', photos/'grey.jpg')
    got, _ = predict_images(export_program(run, 'pt2')['path'], photos/'a.jpg', photos/'grey.jpg')
    assert [r['class'] for r in got] == [r['class'] for r in want]
    assert all(abs(a['confidence'] - b['confidence']) < 1e-3 for a, b in zip(got, want))

def test_onnx_without_a_card(tmp_path, photos):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval()
    torch.onnx.export(net, (torch.randn(1, 3, 8, 8),), tmp_path/'m.onnx', dynamo=False)
    with pytest.raises(ConfigError, match="--norm imagenet"): open_predictor(tmp_path/'m.onnx')
    (row,), _ = predict_images(tmp_path/'m.onnx', photos/'a.jpg', norm='0.5 / 0.5')
    x = (prepare_image(photos/'a.jpg', (3, 8, 8)).float()/255 - .5)/.5
    with torch.no_grad(): assert abs(row['confidence'] - net(x[None]).softmax(1).max().item()) < 1e-3 and row['class'] in '01'

def test_refusals(run, photos, tmp_path):
    with pytest.raises(DataError, match='neither a file nor a folder'): predict_images(run, photos/'gone.jpg')
    with pytest.raises(RunError, match='no run folder'): predict_images(tmp_path/'gone', photos)
    (tmp_path/'hub').mkdir(); (tmp_path/'hub'/'model.pt2').write_bytes(b'x')
    with pytest.raises(RunError, match='naming a folder runs none'): predict_images(tmp_path/'hub', photos)

def test_nothing_that_trains_is_imported(run, photos):
    "The student, torch and PIL: no torchvision, no timm, no pandas, none of the wings that train"
    code = f"""
import sys
from asibkd.run.cli import main
code = main(['predict', {str(run)!r}, {str(photos/'a.jpg')!r}])
ours = sorted({{m.split('.')[1] for m in sys.modules if m.startswith('asibkd.')}})
print(code, ours, [m for m in ('torchvision', 'timm', 'pandas', 'sklearn', 'scipy', 'accelerate', 'matplotlib', 'torch._dynamo', 'onnxruntime') if m in sys.modules], file=sys.stderr)
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=photos)
    assert r.stderr.strip() == "0 ['core', 'data', 'eval', 'models', 'run'] []", r.stderr
    assert r.stdout.startswith('file,class,confidence\n')

def test_a_damaged_image_is_named_once(tmp_path):
    from asibkd.eval.predict import read_pixels
    f = tmp_path/'a.png'; f.write_bytes(b'\x89PNG and no more')
    assert read_pixels(str(f), (3, 8, 8)) == 'cannot identify image file'

def test_a_student_from_timm_waits_for_no_compiler(photos, tmp_path):
    "timm is imported without torch's compiler, the answers are the same, and the compiler is there for whoever asks"
    torch.manual_seed(0)
    net, seen = build_network('test_resnet', n_class=3, img_size=32), SimpleNamespace(n_class=3, classes=CLASSES, shape=(3, 32, 32), mean=[.4, .5, .6], std=[.2, .25, .3], name='')
    save_student(tmp_path/'timm', net.state_dict(), student_card('test_resnet', seen, False, net))
    code = f"""
import sys
from asibkd.run.cli import main
main(['predict', {str(tmp_path/'timm')!r}, {str(photos/'a.jpg')!r}])
print([m for m in ('timm', 'torch._dynamo', 'torch._dynamo.utils', 'wandb', 'sympy') if m in sys.modules], file=sys.stderr)
from asibkd.eval.predict import Later, without_compiler
with without_compiler():
    from torch._dynamo.utils import is_compile_supported
    from torch._dynamo import config
assert not isinstance(sys.modules['torch._dynamo'], Later) and is_compile_supported('cpu') in (True, False) and config.recompile_limit > 0
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=photos)
    assert r.returncode == 0 and r.stderr.strip() == "['timm']", r.stderr
    (here,), (there,) = predict_images(tmp_path/'timm', photos/'a.jpg')[0], csv.DictReader(io.StringIO(r.stdout))
    assert there['class'] == here['class'] and abs(float(there['confidence']) - here['confidence']) < 2e-4

@pytest.mark.parametrize('kind, small, fit', [('test_vit', True, dict(size=128, patch=4, stem=False, resize=False)), ('torchvision:resnet18', True, dict(size=32, patch=0, stem=True, resize=False)),
                                              ('test_resnet', False, dict(size=32, patch=0, stem=False, resize=False)), ('resnet8', True, None)])
def test_how_a_student_reads_its_images_is_remembered(kind, small, fit, tmp_path, monkeypatch):
    "Another version of torch or timm may find another way: the one of the run is in the card, and nothing is looked for"
    from asibkd.models import teachers
    torch.manual_seed(0)
    net, seen = build_network(kind, n_class=3, img_size=32, small_input=small), SimpleNamespace(n_class=3, classes=CLASSES, shape=(3, 32, 32), mean=[.5]*3, std=[.25]*3, name='')
    card = student_card(kind, seen, small, net)
    assert card.get('input_fit') == fit
    save_student(tmp_path, net.state_dict(), card)
    with monkeypatch.context() as m:
        for name in ('find_fit', 'failure_at'): m.setattr(teachers, name, lambda *a, **kw: 1/0)
        there = load_student(tmp_path).model
    save_student(tmp_path/'old', net.state_dict(), {k: v for k, v in card.items() if k != 'input_fit'})      # a run from before
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert all(torch.equal(net.eval()(x), o(x)) for o in (there, load_student(tmp_path/'old').model))
