"Teachers from elsewhere: hub folders, torchvision's weights by name, programs. Their logits are their own library's; what cannot work is refused in a sentence."
import json, time, warnings
from unittest import mock

import pytest, torch
from torch import nn

from asibkd.core.config import CheckpointError, ConfigError, RunError, resolve
from asibkd.data.datasets import create_data
from asibkd.models.cache import CachedTeacher, cache_key, get_teacher_fn, teacher_counts
from asibkd.models.programs import Program, create_program
from asibkd.models.teachers import create_teacher
from asibkd.trainers.build import build_teacher, teacher_specs

pytestmark = pytest.mark.filterwarnings('ignore')
NAMES = [str(i) for i in range(10)]

def made(d, labels=NAMES, size=16, name='hub', **kw):
    "A folder as timm saves it for the Hub"
    import timm
    net = timm.create_model('test_resnet', num_classes=len(labels)).eval()
    cfg = dict(input_size=(3, size, size), mean=(.5, .4, .3), std=(.2, .3, .4))
    timm.models.save_for_hf(net, d/name, dict(num_classes=len(labels), label_names=labels, pretrained_cfg=cfg) | kw, safe_serialization=True)
    return f'local-dir:{d/name}', net

@pytest.fixture(scope='module')
def digits(): return create_data(resolve(dataset='digits', preset='quickstart')[0])

def teacher(arch, data, **kw):
    "The first teacher of a run"
    cfg, _ = resolve(preset='quickstart', method='vanilla_kd', teacher1_type=arch, compare=0, device='cpu', **kw)
    spec = teacher_specs(cfg)[0]
    return (*build_teacher(spec, data, cfg), spec, cfg)

def pixels(data, n=6): return data.test.images(torch.arange(n)).float()/255

def normalised(x, mean, std): return (x - torch.tensor(mean).view(1, -1, 1, 1))/torch.tensor(std).view(1, -1, 1, 1)

# hub

def test_hub_folder_answers_as_timm_does(tmp_path, digits):
    "Its own normalisation, its own size, its own class names; nothing is fine-tuned"
    import timm
    name, net = made(tmp_path, NAMES[::-1])
    t, info, spec, _ = teacher(name, digits)
    assert info.source == 'pretrained' and spec.pretrained and spec.matched
    x = pixels(digits)
    theirs = timm.create_model(name, pretrained=True).eval()
    cfg = theirs.pretrained_cfg
    big = nn.functional.interpolate(normalised(x, cfg['mean'], cfg['std']), (16, 16), mode='bilinear')
    with torch.no_grad(): got, want = t.eval()(normalised(x, digits.mean, digits.std))['logit'], theirs(big)
    assert torch.allclose(got, want.flip(1), atol=1e-4)                # class 0 of the data is its output 9

def test_hub_specialist_keeps_what_the_data_have(tmp_path, digits):
    name, net = made(tmp_path, ['7', 'cat', '3'], size=8)
    t, info, spec, _ = teacher(name, digits)
    assert t.columns.tolist() == [7, 3] and info.outputs == [7, -1, 3]

def test_hub_of_other_classes_is_a_trunk(tmp_path, digits):
    name, _ = made(tmp_path, ['cat', 'dog'], size=8)
    t, info, spec, _ = teacher(name, digits)
    assert info is None and t.n_class == 10                             # it has to be fine-tuned
    with pytest.raises(ConfigError, match='a pretrained trunk with a new head'): teacher(name, digits, finetune_epochs=0)

def test_hub_folders_have_tables_of_their_own(tmp_path, digits):
    "Weights, normalisation and size tell tables apart; the folder's place does not"
    from asibkd.trainers.phases import make_loader
    keys = []
    torch.manual_seed(0)
    name, net = made(tmp_path, size=8)
    import shutil
    shutil.copytree(tmp_path/'hub', tmp_path/'moved')
    shutil.copytree(tmp_path/'hub', tmp_path/'larger')
    f = tmp_path/'larger'/'config.json'
    c = json.loads(f.read_text()); c['pretrained_cfg']['input_size'] = [3, 16, 16]; f.write_text(json.dumps(c))
    for folder in ('hub', 'moved', 'larger'):
        t, _, _, cfg = teacher(f'local-dir:{tmp_path/folder}', digits)
        keys.append(cache_key(t, make_loader(cfg, digits, 'test', 'eval', device='cpu')))
    assert keys[0] == keys[1] != keys[2]

def test_hub_refusals(tmp_path, digits):
    with pytest.raises(CheckpointError, match='no config.json'): create_teacher(f'local-dir:{tmp_path}/none', pretrained=True)
    (tmp_path/'vit').mkdir(); (tmp_path/'vit'/'config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match='it is a vit of transformers'): create_teacher(f'local-dir:{tmp_path}/vit', pretrained=True)
    name, _ = made(tmp_path)
    (tmp_path/'hub'/'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='could not be loaded'): create_teacher(name, pretrained=True)

@pytest.mark.parametrize('name', ['hf-hub:somebody/model', 'resnet18'])
def test_no_network_is_one_sentence_at_once(tmp_path, name, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match='127.0.0.1:9 does not answer') as e: create_teacher(name, pretrained=True)
    assert time.perf_counter() - start < 10 and '\n' not in str(e.value)

def test_student_starts_from_a_hub_folder(tmp_path, digits):
    from asibkd.trainers.build import build_student
    name, net = made(tmp_path, size=8)
    cfg, _ = resolve(preset='quickstart', student_type=name, student_pretrained=1, student_freeze_level=-1, method='ce', compare=0, device='cpu')
    s = build_student(cfg, digits)
    assert torch.equal(s.model.fc.weight, net.fc.weight)

# torchvision

def test_torchvision_weights_by_name(tmp_path, digits, monkeypatch):
    "From torch's folder of downloads, with their normalisation, size and names"
    import torchvision
    from torch.hub import get_dir
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    net = torchvision.models.squeezenet1_1().eval()
    f = tmp_path/'hub'/'checkpoints'/weights.url.rpartition('/')[2]
    f.parent.mkdir(parents=True); torch.save(net.state_dict(), f)
    with mock.patch('torch.hub.urlopen', side_effect=OSError('no network')):
        t = create_teacher('tv:squeezenet1_1.IMAGENET1K_V1', pretrained=True, img_size=64)
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad(): assert torch.allclose(t.eval()(x)['logit'], net(nn.functional.interpolate(x, (224, 224), mode='bilinear')), atol=1e-4)
        assert t.model.pretrained_cfg['mean'] == list(weights.transforms().mean)
        f.unlink()
        with pytest.raises(CheckpointError, match='could not be loaded: no network'): create_teacher('tv:squeezenet1_1.IMAGENET1K_V1', pretrained=True)
    with pytest.raises(ConfigError, match='tv:squeezenet1_1.IMAGENET1K_V1'): create_teacher('tv:squeezenet1_1.V7', pretrained=True)

# programs

@pytest.fixture(scope='module')
def programs(tmp_path_factory):
    "One network as ONNX (any batch; one image), .pt2 and TorchScript"
    d = tmp_path_factory.mktemp('programs')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).eval()
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(net, (x,), d/'any.onnx', dynamo=False, input_names=['x'], dynamic_axes={'x': {0: 'n'}})
        torch.onnx.export(net, (x[:1],), d/'one.onnx', dynamo=False)
        torch.jit.save(torch.jit.trace(net, x), d/'t.pt')
        torch.jit.save(torch.jit.trace(nn.Sequential(net, nn.Softmax(1)), x), d/'soft.pt')
        torch.export.save(torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('n', min=1, max=999)},)), d/'t.pt2')
    torch.save(net.state_dict(), d/'weights.pth')
    return d, net

@pytest.mark.parametrize('file', ['any.onnx', 'one.onnx', 't.pt2', 't.pt'])
def test_program_gives_its_own_logits(programs, digits, file):
    d, net = programs
    t, info, spec, _ = teacher(str(d/file), digits)
    assert info.source == 'program' and info.file == file
    x = normalised(pixels(digits, 5), digits.mean, digits.std)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): got = t(x)['logit']           # bfloat16 does not reach it
    with torch.no_grad(): assert torch.allclose(got, net(x), atol=1e-5)
    t.train()
    assert torch.equal(t(x)['logit'], got)

def test_program_is_run_once_per_image(programs, digits):
    from asibkd.trainers.phases import make_loader
    d, net = programs
    t, _, _, cfg = teacher(str(d/'one.onnx'), digits, teacher_cache='memory')
    loader = make_loader(cfg, digits, 'val', 'eval', device='cpu')
    t.requires_grad_(False)
    fn = get_teacher_fn(t, loader, cfg)
    assert isinstance(fn, CachedTeacher)
    teacher_counts.clear()
    twice = [torch.cat([fn(b)['logit'] for b in loader.epoch(0)]) for _ in range(2)]
    assert torch.equal(*twice) and teacher_counts['computed'] == len(digits.val)
    with pytest.raises(ConfigError, match='logits alone'): fn(next(loader.epoch(0)))['feat_2d']

def test_program_table_belongs_to_its_content(programs, digits, tmp_path):
    from asibkd.models.programs import content_sum
    d, _ = programs
    (tmp_path/'moved.onnx').write_bytes((d/'one.onnx').read_bytes())
    assert content_sum(tmp_path/'moved.onnx') == content_sum(d/'one.onnx') != content_sum(d/'any.onnx')

def test_program_of_probabilities(programs, digits):
    d, net = programs
    x = torch.randn(4, 3, 8, 8)
    t = create_program(d/'soft.pt', 8)
    with torch.no_grad(): assert torch.allclose(t(x)['logit'].softmax(1), net(x).softmax(1), atol=1e-5)

@pytest.mark.parametrize('method', ['fitnet', 'crd', 'rkd', 'simkd', 'reviewkd', 'asmb', 'stack', 'mtkd_rl', 'crd+wttm'])
def test_program_with_a_method_that_reads_features(programs, digits, tiny, method):
    from asibkd import run_experiment
    d, _ = programs
    with pytest.raises(ConfigError, match='gives logits alone, and this method reads features'):
        run_experiment(**tiny, dataset='digits', method=method, student_type='resnet8', teacher1_type=str(d/'t.pt'), teacher2_type=str(d/'one.onnx'))

def test_program_in_a_run(programs, tiny, caplog):
    from asibkd import run_experiment
    d, _ = programs
    r = run_experiment(**tiny, dataset='digits', method='avgz', student_type='mlp', teacher1_type=str(d/'t.pt'), teacher2_type=str(d/'one.onnx'))
    assert [r['weights'][k]['source'] for k in ('teacher1', 'teacher2')] == ['program']*2
    row = {o['key']: o for o in r['rows']}
    assert row['teacher1']['params'] == 970 and row['teacher2']['params'] is None
    from asibkd.explore.opened import open_run
    with pytest.raises(RunError, match='opening a folder runs none'): open_run(r['run'])

def test_program_refusals(programs, tmp_path, digits):
    from asibkd.models.students import create_student
    d, _ = programs
    with pytest.raises(CheckpointError, match='holds no program. If it holds weights, name the network'): create_teacher(str(d/'weights.pth'))
    with pytest.raises(CheckpointError, match='does not exist'): create_teacher(str(d/'none.onnx'))
    (tmp_path/'bad.onnx').write_bytes(b'no model')
    with pytest.raises(CheckpointError, match='cannot be loaded as onnx'): create_teacher(str(tmp_path/'bad.onnx'))
    with pytest.raises(ConfigError, match='cannot be trained'): create_student(str(d/'t.pt2'))
    with pytest.raises(ConfigError, match='takes images of 3 channels|fails on images'): create_teacher(str(d/'t.pt2'), in_chans=1, img_size=8)

def test_pt2_runs_no_code_of_its_pickles(programs, tmp_path):
    "A record of an archive that would run code when unpickled"
    import io, pickle, zipfile
    d, _ = programs
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    bad = io.BytesIO(); torch.save(Evil(), bad)
    with zipfile.ZipFile(d/'t.pt2') as a, zipfile.ZipFile(tmp_path/'evil.pt2', 'w') as b:
        for n in a.namelist(): b.writestr(n, bad.getvalue() if n.endswith('sample_inputs/model.pt') else a.read(n))
    try: Program(tmp_path/'evil.pt2')
    except CheckpointError: pass
    assert not (tmp_path/'ran').exists()

def test_evaluate_scores_outputs_as_the_classes_they_stand_for(folder, tmp_path):
    "Outputs in another order, and those of some classes only: names in the file or typed decide, for teachers and students; images without a label are left out"
    from PIL import Image
    from asibkd import load_student, run_experiment
    from asibkd.run.tasks import run_evaluate
    d = folder(classes=('cat', 'dog', 'horse'), size=16, train=12, test=6)
    for f in d.glob('*/horse/*'): Image.new('RGB', (16, 16), (255, 0, 255)).save(f)
    for f in d.glob('*/dog/*'): Image.new('RGB', (16, 16), (0, 255, 0)).save(f)
    (d/'unlabelled').mkdir(); Image.new('RGB', (16, 16)).save(d/'unlabelled'/'x.png')
    data = dict(dataset='imagefolder', data_root=str(d), device='cpu', log_level='WARNING', results_dir=str(tmp_path/'r'))
    net, _, classes = load_student(run_experiment(preset='none', method='ce', student_type='mlp', epochs=6, student_lr=.01, compare=0, report=0, val_frac=.25, **data)['run'])
    def file(name, order, named=True):
        state = {k: v[order] if k.startswith('fc.') else v for k, v in net.state_dict().items()}
        torch.save(dict(state_dict=state) | (dict(classes=[classes[i] for i in order]) if named else {}), tmp_path/name)
        return str(tmp_path/name)
    def accuracy(ckpt, **kw):
        r = run_evaluate(ckpt_path=ckpt, **data, **kw)
        assert len(r['train']['per_class']['mlp']) == 3
        return round(r['test']['models']['mlp']['acc'], 3)
    right = accuracy(file('right.pth', [0, 1, 2]), teacher_type='mlp'); assert right > .9
    turned = file('turned.pth', [2, 0, 1])
    assert accuracy(turned, teacher_type='mlp') == accuracy(turned, student_type='mlp') == right
    assert accuracy(file('bare.pth', [2, 0, 1], named=False), teacher_type='mlp') < .2              # nobody can know
    assert accuracy(file('two.pth', [1, 0]), teacher_type='mlp') == pytest.approx(right*2/3, abs=.04)
    assert accuracy(file('typed.pth', [1, 0], named=False), teacher_type='mlp', teacher1_classes=['dog', 'cat']) == pytest.approx(right*2/3, abs=.04)

@pytest.mark.parametrize('method', ['vanilla_kd', 'wavg'])
def test_programs_that_know_some_classes(tiny, tmp_path, method):
    "Two specialists, of which only programs are left"
    from asibkd import run_experiment
    for i in range(2):
        torch.manual_seed(i)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
        torch.jit.save(torch.jit.trace(net, torch.randn(2, 3, 8, 8)), tmp_path/f'{i}.pt')
    known = dict(teacher1_classes=list('01234'), teacher2_classes=list('56789'))
    s = run_experiment(**tiny, dataset='digits', method=method, student_type='mlp', teacher1_type=str(tmp_path/'0.pt'), teacher2_type=str(tmp_path/'1.pt'), **known)
    assert s['rows'][-1]['test_acc_last'] >= 0

# images that are no squares

def wide(n):
    g = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset((torch.rand(n, 3, 16, 24, generator=g)*255).byte(), torch.arange(n) % 3)

@pytest.mark.parametrize('method', ['fitnet', 'camkd', 'mtkd_static'])
def test_maps_of_images_that_are_no_squares(tiny, method):
    from asibkd import run_experiment
    nets = dict(teacher1_type='resnet8', teacher2_type='resnet14', student_type='resnet8')
    s = run_experiment(train=wide(60), test=wide(12), **tiny | nets | dict(method=method, preset='none', train_per_class=0, epochs=2, val_frac=.2, batch_size=16))
    assert s['rows'][-1]['test_acc_last'] >= 0

def test_a_network_of_squares(tiny):
    from asibkd import run_experiment
    kw = tiny | dict(method='ce', preset='method/ce', train_per_class=0, student_type='vit_tiny_patch16_224', epochs=1)
    with pytest.raises(ConfigError, match='cannot read images of 16×24 pixels.*image_size=24'): run_experiment(train=wide(60), test=wide(12), **kw)

def test_camkd_refuses_what_does_not_average(tiny):
    "The regressed map goes through the teacher's classifier: a class token is no average"
    from asibkd import run_experiment
    kw = tiny | dict(dataset='digits', method='camkd', student_type='resnet8', teacher1_type='resnet8', teacher2_type='convnext_atto', finetune_epochs=0, allow_untrained=1)
    with pytest.raises(ConfigError, match="average is what the classifier reads; 'convnext_atto'.*camkd_beta=0"): run_experiment(**kw)
