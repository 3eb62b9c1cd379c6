"Students taken away: folders for timm and the Hub, the model card, push, int8, what a notebook's front-end gets, the docs' sources."
import json, os, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
slow = pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='a kernel of its own: ASIBKD_SLOW=1')
FORMS = [dict(form=f, test_acc=a, agreement=1., mb=mb, latency_ms=ms) for f, a, mb, ms in (('float32, torch', .9, .4, 2.), ('int8, onnxruntime', .85, .1, 1.))]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run folder with what a card reads"
    from asibkd.explore.opened import untrained_run
    d = Path(untrained_run(tmp_path_factory.mktemp('results'), teacher1_type='resnet8', teacher2_type='resnet8', student_type='resnet8'))
    s = json.loads((d/'summary.json').read_text()) | dict(n_class=10, time=dict(seconds={}))
    (d/'summary.json').write_text(json.dumps(s))
    return d

@pytest.fixture
def student_of(tmp_path):
    "A folder with a student: student_of(type, size, small_input) → (folder, its network)"
    def make(kind, size=32, small_input=False, net=None):
        import torch
        from asibkd.eval.deploy import save_student
        from asibkd.models.students import create_student
        torch.manual_seed(0)
        net = net or create_student(kind, n_class=3, img_size=size, small_input=small_input).model
        d = tmp_path/f'{kind.replace(":", "-") or "own"}-{small_input}'
        d.mkdir()
        save_student(d, net.state_dict(), dict(type=kind, n_class=3, classes=['a', 'b', 'ü'], shape=[3, size, size], mean=[.4, .5, .6], std=[.2, .25, .3],
                                               small_input=small_input, dataset='pets'))
        return d, net.eval()
    return make

ALONE = '''
import sys
class No:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('asibkd', 'fastcore', 'pydantic', 'accelerate'): raise ImportError(f'{name} is not installed here')
sys.meta_path.insert(0, No())
import json, torch, timm
x, out = torch.load('x.pt'), {}
for kind, folder in json.load(open('folders.json')):
    if kind == 'timm':
        net = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        c = timm.data.resolve_data_config(model=net); classes = net.pretrained_cfg['label_names']
        assert [round(v, 4) for v in c['mean']] == [.4, .5, .6] and c['crop_pct'] == 1 and c['interpolation'] == 'bilinear', c
        transform = timm.data.create_transform(**c, is_training=False)
    else:
        sys.path.insert(0, folder); sys.modules.pop('student', None)
        from student import load_student
        net, transform, classes = load_student(); sys.path.pop(0)
    from PIL import Image
    image = Image.open('image.png')
    with torch.inference_mode(): out[folder] = net(x), transform(image)
    assert classes == ['a', 'b', 'ü'], classes
torch.save(out, 'out.pt')
'''

def test_folders_load_where_this_package_is_not(student_of, tmp_path):
    "timm alone loads timm's own network; student.py loads the zoo's and a network with another stem; logits and pixels are those of the run"
    import numpy as np, torch
    from PIL import Image
    from asibkd.eval.deploy import load_student
    from asibkd.eval.hub import export_folder
    cases = [('timm', 'timm:mobilenetv3_small_050', False), ('hub', 'resnet8', False), ('hub', 'timm:mobilenetv3_small_050', True)]
    made = [(to, *student_of(kind, small_input=stem)) for to, kind, stem in cases]
    folders = [(to, export_folder(d, to)['path']) for to, d, _ in made]
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path/'x.pt'); (tmp_path/'folders.json').write_text(json.dumps(folders))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path/'image.png')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    subprocess.run([sys.executable, '-W', 'ignore', '-c', ALONE], check=True, cwd=tmp_path, env=env)
    out = torch.load(tmp_path/'out.pt')
    for (to, d, net), (_, folder) in zip(made, folders):
        z, pixels = out[folder]
        with torch.inference_mode():
            torch.testing.assert_close(z, net(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pixels, load_student(d).preprocess(tmp_path/'image.png'), rtol=0, atol=1e-5)
            torch.testing.assert_close(load_student(folder).model(x), net(x), rtol=1e-5, atol=1e-6)                 # this package reads the folder, too

def test_what_timm_cannot_load_is_refused_in_a_sentence(student_of, tmp_path):
    from asibkd import AsibError, export_student
    for kind, stem, says in (('resnet8', False, 'is no network that timm knows'), ('timm:mobilenetv3_small_050', True, r'first layers were changed .*small_input=1')):
        d, _ = student_of(kind, small_input=stem)
        with pytest.raises(AsibError, match=says + '.*--to hub'): export_student(d, 'timm')
        assert not (d/'timm').exists() and not list(d.glob('.timm*'))
    with pytest.raises(AsibError, match="to='onnx'"): export_student(d, 'pt2', quantize='int8')
    with pytest.raises(AsibError, match='Known: pt2, onnx, timm, hub'): export_student(d, 'gguf')

@slow
def test_a_module_of_yours_goes_as_a_program(student_of):
    import torch
    from torch import nn
    from asibkd.eval.hub import export_folder, run_source
    d, net = student_of('', net=nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    e = export_folder(d, model=net)
    assert e['way'] == 'traced' and {'model.pt2', 'model.safetensors', 'student.py', 'config.json'} == {f.name for f in Path(e['path']).iterdir()}
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(run_source(e['path'])[0](x).detach(), net(x).detach(), rtol=1e-5, atol=1e-6)

# The card

def test_the_card_says_what_the_summary_says(run):
    from huggingface_hub import ModelCard
    from asibkd.analysis.card import accuracy_interval, model_card
    from scipy.stats import binomtest
    s = json.loads((run/'summary.json').read_text())
    card = ModelCard(model_card(run, 'timm', 'me/pets', 'apache-2.0'))
    result = card.data.eval_results[0]
    row = next(r for r in s['rows'] if r['key'] == 'asmb')
    assert (card.data.license, card.data.to_dict()['library_name'], result.dataset_name) == ('apache-2.0', 'timm', 'digits')
    assert result.metric_value == round(row['test_acc_val_selected'], 4)
    low, high = accuracy_interval(.3, 200)
    assert binomtest(60, 200, low).pvalue < .1 and low < .3 < high
    for words in ('resnet8', 'hf-hub:me/pets', '95 % interval', 'ONE SEED', 'NO BASELINE', 'asibkd run', '120 training'.replace('120', str(s['images']['train']))):
        assert words in card.text, words

def test_int8_is_in_summary_report_and_card(run):
    from asibkd import load_summary
    from asibkd.analysis.card import model_card
    from asibkd.analysis.notes import run_text
    from asibkd.analysis.sections import quantised_section
    from asibkd.eval.quantise import drop_sentence
    warning = drop_sentence(FORMS, .01)
    assert '5.0 POINTS' in warning and drop_sentence(FORMS, .051) == ''
    (run/'quantised.json').write_text(json.dumps(dict(rows=FORMS, warning=warning, test_images=500, n_images=256, threads=1)))
    try:
        s = load_summary(run)
        assert quantised_section(s)['title'] == 'Smaller forms' and 'int8, onnxruntime' in model_card(run)
        assert 'Beware: INT8 COSTS 5.0 POINTS' in run_text(s) and 'INT8 COSTS' in model_card(run)
    finally: (run/'quantised.json').unlink()

@slow
def test_int8_of_a_run(run):
    "From the folder alone: calibrated, measured, runs in onnxruntime, and most answers stay"
    from asibkd.run.cli import main
    assert main(['export', str(run), '--quantize', 'int8', '--quant_tolerance', '1']) == 0
    o = json.loads((run/'quantised.json').read_text()); (run/'quantised.json').unlink()
    assert [r['form'].split(',')[0] for r in o['rows']] == ['float32', 'bfloat16', 'float32', 'int8'] and o['warning'] == ''
    assert o['rows'][-1]['agreement'] > .8 and o['rows'][-1]['mb'] < o['rows'][0]['mb']/2

# The Hub, on the loopback address

class Hub(BaseHTTPRequestHandler):
    "The parts of the Hub's API that an upload uses"
    def log_message(self, *args): pass
    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status); self.send_header('Content-Type', 'application/json'); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.answer(dict(error='not here'), 404)
    def do_PUT(self):
        self.server.files[self.path] = self.rfile.read(int(self.headers['Content-Length'])); self.answer({})
    def do_POST(self):
        body, at = self.rfile.read(int(self.headers.get('Content-Length', 0))), f'http://127.0.0.1:{self.server.server_port}'
        self.server.seen.append(self.path)
        if self.headers.get('Authorization') != 'Bearer hf_good': return self.answer(dict(error='Invalid credentials'), 401)
        if self.path == '/api/repos/create':
            o = json.loads(body)
            return self.answer(dict(error='no rights'), 403) if o['organization'] == 'them' else self.answer(dict(url=f"{at}/{o['organization']}/{o['name']}"))
        if self.path == '/api/validate-yaml':
            import yaml
            self.server.card = yaml.safe_load(json.loads(body)['content'].split('---\n')[1]); return self.answer(dict(errors=[], warnings=[]))
        if '/preupload/' in self.path:
            names = [f['path'] for f in json.loads(body)['files']]
            return self.answer(dict(files=[dict(path=n, uploadMode='lfs' if n.endswith('.safetensors') else 'regular', shouldIgnore=False) for n in names]))
        if self.path.endswith('/objects/batch'):
            return self.answer(dict(transfer='basic', objects=[o | dict(actions=dict(upload=dict(href=f"{at}/upload/{o['oid']}"))) for o in json.loads(body)['objects']]))
        if '/commit/' in self.path:
            self.server.commit = [json.loads(o) for o in body.splitlines()]
            return self.answer(dict(success=True, commitOid='0'*40, commitUrl=f'{at}/me/pets/commit/{"0"*40}', hookOutput=''))
        self.answer(dict(error=self.path), 404)

@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.files, server.seen, server.commit, server.card = {}, [], [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)      # what is uploaded goes to the server above
    monkeypatch.setenv('HF_TOKEN', 'hf_good')
    yield server
    server.shutdown(); server.server_close()

def test_push(run, hub, capsys):
    from asibkd.run.cli import main
    assert main(['push', str(run), 'me/pets', '--license', 'mit']) == 0
    assert capsys.readouterr().out.strip().endswith('/me/pets')
    names = {o['value']['path'] for o in hub.commit if o['key'] in ('file', 'lfsFile')}
    assert names == {'README.md', 'config.json', 'model.safetensors', 'student.py'}
    assert [*hub.files.values()] == [(run/'hub'/'model.safetensors').read_bytes()]
    assert hub.card['license'] == 'mit' and hub.card['pipeline_tag'] == 'image-classification'

def test_push_refused_in_one_sentence(run, hub, monkeypatch, capsys):
    from asibkd.run.cli import main
    def says(repo, words):
        assert main(['push', str(run/'hub' if (run/'hub').exists() else run), repo]) == 2
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1 and 'Traceback' not in err, err
    says('pets', 'user/name')
    says('them/pets', 'may not write there (403)')
    monkeypatch.setenv('HF_TOKEN', 'hf_old'); says('me/pets', 'does not accept the token (401)')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None); says('me/pets', 'hf auth login')
    monkeypatch.undo()
    monkeypatch.setenv('HF_TOKEN', 'hf_good'); monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    says('me/pets', 'cannot be reached')

# Notebooks

def test_headless_is_known_from_the_kernel(monkeypatch):
    "Whoever executes a notebook without a reader allows no questions; no name of a folder is mistaken for a program"
    from types import SimpleNamespace as NS
    from asibkd.core import runtime
    for kernel, watched in ((NS(_allow_stdin=True), True), (NS(_allow_stdin=False), False), (NS(), True)):
        monkeypatch.setattr(runtime, 'running_kernel', lambda: kernel)
        assert runtime.watched() is watched
    monkeypatch.setitem(sys.modules, 'google.colab', NS())
    monkeypatch.setattr(runtime, 'running_kernel', lambda: NS(_allow_stdin=False)); assert runtime.watched()

CELL = '''
from types import SimpleNamespace as NS
from asibkd.core.runtime import progress_bar
from asibkd.explore.monitor import LiveMonitorCB
live = LiveMonitorCB()
for e in range(1, 4):
    for _ in progress_bar(range(3), desc='A1'): pass
    live.next = 0
    live.after_epoch(NS(row=dict(phase='A1', kind='A', epoch=e, val_acc=.2*e, train_loss=1/e)))
'''

@slow
def test_a_front_end_without_comms(monkeypatch):
    "A reader's kernel sends one picture and replaces it, and bars as text; a headless one sends nothing; neither opens a comm"
    from jupyter_client.manager import start_new_kernel
    monkeypatch.setenv('PYTHONPATH', str(root))
    manager, client = start_new_kernel(kernel_name='python3')
    try:
        for reader in (True, False):
            got = []
            client.execute_interactive(CELL, allow_stdin=reader, stdin_hook=lambda m: None, output_hook=got.append, timeout=120)
            kinds = [m['msg_type'] for m in got]
            assert not {'comm_open', 'error'} & {*kinds}, [m['content'] for m in got if m['msg_type'] == 'error']
            pictures = [m['content'] for m in got if 'data' in m['content']]
            assert [k for k in kinds if 'display' in k] == (['display_data', 'update_display_data', 'update_display_data'] if reader else [])
            assert all({*p['data']} == {'image/png', 'text/plain'} for p in pictures) and len({p['transient']['display_id'] for p in pictures}) == (1 if reader else 0)
            text = ''.join(m['content']['text'] for m in got if m['msg_type'] == 'stream')
            assert ('A1:' in text) is reader, text
    finally:
        client.stop_channels(); manager.shutdown_kernel(now=True)

# The docs, as far as their sources go

def test_links_between_chapters_resolve():
    for f in sorted((root/'nbs').rglob('*.ipynb')):
        if 'checkpoint' in f.as_posix(): continue
        for c in json.loads(f.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] != 'markdown': continue
            for to in re.findall(r'\]\(([^)\s]+)\)', ''.join(c['source'])):
                if not re.match(r'[a-z]+:|#', to): assert (f.parent/to.split('#')[0]).exists(), f'{f.name} links to {to}'

def test_the_docs_are_rendered_and_published():
    "The workflow's commands are there, and it publishes the folder that Quarto fills"
    import configparser, shutil, yaml
    jobs = yaml.safe_load((root/'.github'/'workflows'/'docs.yml').read_text())['jobs']['docs']['steps']
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None); ini.read(root/'settings.ini', encoding='utf-8')
    published = next(o['with']['path'] for o in jobs if 'upload-pages' in o.get('uses', ''))
    assert published == ini['DEFAULT']['doc_path'] == yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['project']['output-dir']
    assert any('nbdev_docs' in o.get('run', '') for o in jobs) and any('quarto-actions/setup' in o.get('uses', '') for o in jobs)
