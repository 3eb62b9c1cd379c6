"Strings and folders of strangers: names are shown as text, nothing is fetched, no code is run, and nobody else looks in."
import html.parser, http.client, io, json, os, re, signal, subprocess, sys
from pathlib import Path

import pytest

from asibkd.core.config import RunError

root = Path(__file__).parents[1]
EVIL = ['<img src=x onerror="document.title=`hacked`">', '</td><script>document.title="hacked"</script>', '$\\frac{$', '_hidden_', '"onmouseover="x', 'a&b', '100% #1 {x}~^\\', 'esc\x1b[31mape', 'half\udcff', 'two\nlines|and|bars', 'L'*3000]

class Tags(html.parser.HTMLParser):
    "Every tag and attribute of a page"
    def __init__(self, page): super().__init__(); self.found = []; self.feed(page)
    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))

def check_page(page, names=EVIL[:3]):
    "No tag and no handler came in with a name, and the name is there as text"
    for tag, attrs in Tags(page).found:
        assert tag != 'script' and not [k for k in attrs if k.startswith('on')], (tag, attrs)
        assert tag != 'img' or attrs['src'].startswith('data:')
    page.encode()
    assert '\x1b' not in page
    for n in names: assert n in html.unescape(page), n

def row(key, role='student', **kw):
    return dict(key=key, model=EVIL[0], role=role, target=dict(logits=['labels']), val_acc=.5, test_acc_val_selected=.5, test_acc_last=.5, params=10, macs=10, given=True) | kw

@pytest.fixture
def foreign(tmp_path):
    "A one-shot run that a stranger wrote: evil in every string"
    import torch
    from safetensors.torch import save_file
    d = tmp_path/'results'/'<b>run&$x^$'; d.mkdir(parents=True)
    rows = [row(EVIL[0], 'teacher', weights=dict(source=EVIL[1])), row(EVIL[1], 'teacher', params=20, macs=30), *map(row, EVIL[2:])]
    main = EVIL[2]
    s = dict(exp_id=EVIL[0], kind='distil', method=main, dataset=EVIL[1], seed=1, rows=rows, n_class=len(EVIL), images=dict(train=9, val=9, test=len(EVIL)), weights={}, baseline=EVIL[3], verdict=EVIL[0],
             time=dict(seconds={k: 1. for k in EVIL}, latency_ms={k: 1. for k in EVIL}), difference=dict(diff=-.1), differences=[dict(baseline=EVIL[3], diff=-.1, low=-.2, high=.1)],
             test_acc_val_selected=.5, gates=[])
    c = dict(method=main, seed=1, preset='quickstart', cl_mode=False, cl_method='asib', dataset=EVIL[1], user_code=EVIL[0], plugin='')
    epochs = [dict(phase='B1' if m == main else f'{m}-B1', kind='B', stage=1, epoch=1, val_acc=.5, **{'train_loss': 1., f'train_{EVIL[0]}': 1.}) for m in EVIL[2:]] + [dict(phase=EVIL[2], kind='A', epoch=1, val_acc=.5, train_nats=3.)]
    (d/'summary.json').write_text(json.dumps(s)); (d/'config.json').write_text(json.dumps(c)); (d/'metrics.jsonl').write_text(''.join(json.dumps(e) + '\n' for e in epochs))
    (d/'student.json').write_text(json.dumps(dict(classes=EVIL))); (d/'env.json').write_text(json.dumps(dict(python=EVIL[0], versions={EVIL[1]: EVIL[0]})))
    names = [k.encode('utf-8', 'replace').decode() for k in EVIL]
    y = torch.arange(len(EVIL)); save_file({'labels': y} | {k.replace('?', '�').replace('\x1b', '�'): y.flip(0) for k in names} | {f'confidence.{main}': torch.full((len(EVIL),), .5).half()}, d/'predictions.safetensors')
    return d

def continual():
    "Summary of a continual run, evil in every string"
    rows = [row(k, memory='replay', memory_items=9, ACC=.5, AIA=.5, BWT=.5, forgetting=.5, task_ACC=.5, learning_acc=.5) for k in EVIL[:4]]
    R = dict(class_il=[[.9], [.5, .9]], task_il=[[1.], [1., 1.]])
    return dict(kind='cl', method=EVIL[2], seed=1, dataset=EVIL[1], tasks=[EVIL[:2], EVIL[2:4]], composition=[[5, 5, 0, 0], [3, 3, 2, 2]], rows=rows, R={k: R for k in EVIL[:4]}, n_class=4,
                images=dict(train=9, val=9, test=9), time=dict(seconds=dict.fromkeys(EVIL[:4], 1.), latency_ms={}), verdict=EVIL[0])

def draw(fig):
    "The figure as PNG, SVG and PDF"
    for kind in ('png', 'svg', 'pdf'): out = io.BytesIO(); fig.savefig(out, format=kind); assert len(out.getvalue()) > 500
    assert max(fig.get_size_inches()) < 40

# C1: what is shown

def test_C1_report_of_a_strangers_run(foreign):
    from asibkd.analysis.report import save_report
    check_page(save_report(foreign).read_text(encoding='utf-8'))

def test_C1_compare_page_and_its_files(foreign):
    from asibkd.analysis.compare import collect, save_compare
    from asibkd.analysis.report import save_compare_report
    runs = collect(foreign.parent)
    check_page(save_compare_report(runs, foreign.parent/'compare.html').read_text(encoding='utf-8'))
    files = {f.suffix: f for f in save_compare(runs, foreign.parent/'out', runs.label[0])}
    tex, md = (files[e].read_text(encoding='utf-8') for e in ('.tex', '.md'))
    assert r'\$\textbackslash frac\{\$' in tex and r'\_hidden\_' in tex and r'a\&b' in tex and r'100\% \#1 \{x\}' in tex and r'$\pm$' not in tex
    lines = [o for o in md.splitlines() if o.startswith('|')]
    assert len({len(re.findall(r'(?<!\\)\|', o)) for o in lines}) == 1 and not re.search(r'(?<!\\)<(img|script)', md)

def test_C1_terminal(foreign):
    from asibkd.analysis.notes import run_text
    from asibkd.analysis.tables import load_summary
    raw = json.loads((foreign/'summary.json').read_text())                                              # as `run` prints it
    for text in (run_text(load_summary(foreign)), run_text(raw)): text.encode(); assert '\x1b' not in text and 'esc�[31mape' in text

def test_C1_terminal_of_a_continual_run(tmp_path):
    "A line break in a class's name breaks no table"
    from asibkd.analysis.cl import explain_cl, task_names
    s = continual(); s['tasks'] = [EVIL[7:9], EVIL[9:10] + ['z']]
    assert task_names(s) == ['esc�[31mape, half�', 'two lines|and|bars, z']
    assert 'after 1: esc�[31mape (5), half� (5)' in explain_cl(s)

def test_C1_figures_of_names():
    "A class may be called like a formula, begin with _, be long, or hold what no font has"
    import pandas as pd, torch
    from asibkd.analysis.cl import plot_forgetting, plot_memory, plot_R
    from asibkd.core.picture import image_grid
    from asibkd.explore.plots import plot_attention, plot_class_attention, plot_image, plot_target
    s = continual(); n = len(EVIL); p = torch.full((n,), 1/n)
    fig = plot_memory(s); draw(fig)
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()][2:] == ['$\\frac{$', ' _hidden_']
    names = pd.Index(EVIL, dtype=object)                     # pyarrow's strings cannot hold half a code point
    table = pd.DataFrame([[.1]*n]*3, columns=names, index=names[:3])
    by_class = pd.DataFrame({f'{m}_{EVIL[2]}': [.5]*n for m in ('mean', 'sd')}, index=names)
    for fig in (plot_R(s), plot_forgetting(s), plot_attention(table), plot_target(p, p, EVIL, 2), plot_class_attention(by_class), plot_image(torch.zeros(3, 8, 8, dtype=torch.uint8), EVIL[2]),
                image_grid(torch.zeros(2, 3, 8, 8), ['$\\frac{$', '$x^$'])): draw(fig)

def test_C1_widgets_escape_heads_and_rows(foreign):
    "Every string of a table, index and column heads included; messages, too"
    import pandas as pd
    from asibkd.explore.screens import CLExplorer, RunBrowser
    from asibkd.explore.widgets import Explorer, table_html
    page = table_html(pd.DataFrame({EVIL[0]: [EVIL[1], '5  90 %'], EVIL[1]: [1., float('nan')]}, index=[EVIL[0], EVIL[2]]), bold='5')
    check_page(page); assert page.count('<b>') == 1
    screen = Explorer()
    with screen.report_errors(): raise RunError(EVIL[0])
    check_page(screen.message.value, EVIL[:1])
    def texts(w): return [w.value if isinstance(getattr(w, 'value', None), str) else '', *(t for c in getattr(w, 'children', ()) for t in texts(c))]
    for screen, names in ((CLExplorer(continual()), EVIL[:3]), (RunBrowser(foreign.parent), EVIL[2:3])):
        assert not screen.message.value
        check_page('\n'.join(texts(screen)), names)

# C3: what is opened

@pytest.fixture
def student_run(tmp_path):
    "A folder with a student whose card can be changed"
    from asibkd.explore.opened import untrained_run
    d = Path(untrained_run(tmp_path/'results', teacher1_type='resnet8', teacher2_type='resnet8', student_type='resnet8'))
    def change(file, **kw): (d/file).write_text(json.dumps(json.loads((d/file).read_text()) | kw)); (d/'checksums.txt').unlink(missing_ok=True); return d
    return change

@pytest.fixture
def no_network(monkeypatch):
    "A connection that is tried fails the test"
    import socket
    def refuse(self, address): tried.append(address); raise OSError('no network in this test')
    tried = []; monkeypatch.setattr(socket.socket, 'connect', refuse)
    yield
    assert not tried, tried

@pytest.mark.parametrize('kind', ['hf-hub:someone/model', 'timm:hf-hub:someone/model', 'hf_hub:someone/model'])
def test_C3_a_students_card_fetches_nothing(student_run, no_network, kind):
    from asibkd.eval.deploy import load_student
    d = student_run('student.json', type=kind)
    with pytest.raises(RunError, match=r'opening a folder downloads nothing. Pass the network: load_student\(run, model=…\)'): load_student(d)

@pytest.mark.parametrize('config', [dict(student_type='hf-hub:someone/model'), dict(teacher1_type='hf-hub:someone/model'), dict(dataset='cifar10')])
def test_C3_the_explorer_fetches_nothing(student_run, no_network, tmp_path, config):
    from asibkd.explore.opened import open_run
    d = student_run('config.json', **config, data_root=str(tmp_path/'none'))
    if 'dataset' in config: student_run('summary.json', **config)
    with pytest.raises(RunError, match='opening a folder downloads nothing'): open_run(d)

def test_C3_pretrained_weights_are_not_fetched(student_run, no_network):
    "A teacher without a file: its published weights would be fetched"
    from asibkd.explore.opened import open_run
    d = student_run('config.json', teacher1_type='torchvision:squeezenet1_1', teacher1_pretrained=True)
    (d/'teacher1.pth').unlink()
    student_run('summary.json', weights=dict(teacher1=dict(source='pretrained'), teacher2=dict(source='finetuned')))
    with pytest.raises(RunError, match='opening a folder downloads nothing'): open_run(d)

def test_C3_a_folders_plugin_is_not_run(student_run, tmp_path, capsys):
    "A config.json names code: it is run only for who passes it"
    from asibkd.analysis.sections import command_of, config_parts
    from asibkd.analysis.tables import load_config
    from asibkd.explore.opened import open_run
    code = tmp_path/'helper_of_a_stranger.py'; code.write_text(f'open({str(tmp_path/"ran")!r}, "w").close()')
    d = student_run('config.json', plugin=str(code))
    with pytest.raises(RunError, match=r'does not run. If you trust it, pass it: open_run\(run, plugin=…\)'): open_run(d)
    config_parts(load_config(d)); assert 'plugin=' in command_of(load_config(d))
    assert not (tmp_path/'ran').exists()
    open_run(d, plugin=str(code)); assert (tmp_path/'ran').exists()

# C2: who looks in

def test_C2_token_host_and_no_child_left(student_run, tmp_path):
    "Without the token, or under another host's name, nothing is shown; killed, the command leaves no server behind"
    psutil = pytest.importorskip('psutil')
    d = student_run('config.json')
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    p = subprocess.Popen([sys.executable, '-m', 'asibkd.run.cli', 'explore', str(d), '--no-browser'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env=env, cwd=tmp_path)
    try:
        line = p.stdout.readline()
        port, token = re.search(r'http://127\.0\.0\.1:(\d+)/\?token=(\w{32})', line).groups()
        def ask(path, host='127.0.0.1', method='GET'):
            c = http.client.HTTPConnection('127.0.0.1', int(port), timeout=60); c.request(method, path, headers=dict(Host=f'{host}:{port}'))
            r = c.getresponse(); return r.status, r.getheader('Location') or '', r.read().decode('utf-8', 'replace')
        kernel = '/api/kernels/01234567-0123-0123-0123-012345678901'
        for path in ('/', '/?token=guess'): status, where, _ = ask(path); assert status == 302 and '/login' in where
        assert ask(kernel)[0] == 403 and ask(f'{kernel}?token={token}')[0] == 404                      # refused; let in: there is no such kernel
        for path in ('/', f'/?token={token}', '/login', f'{kernel}?token={token}'): assert ask(path, 'evil.example')[0] == 403, path
        assert ask(f'{kernel}?token={token}', 'localhost')[0] == 404                                    # through an ssh tunnel
        children = psutil.Process(p.pid).children(recursive=True)
        assert children and not any(token in ' '.join(c.cmdline()) for c in children)                   # every user may read a command line
        p.kill(); p.wait()
        assert not psutil.wait_procs(children, timeout=30)[1]
    finally:
        if p.poll() is None: p.kill()

@pytest.mark.parametrize('sign', ['SIGTERM', 'SIGHUP', 'SIGINT'])
def test_C2_every_signal_ends_it(tmp_path, sign, monkeypatch, capsys):
    "Called from Python, too: the server is ended, and the handlers are as before"
    from asibkd.explore import serve
    if not hasattr(signal, sign): pytest.skip('not on this system')
    if sign == 'SIGINT': signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background job has it off
    before = signal.getsignal(getattr(signal, sign)); started = []
    def fake(run, port, token, output, plugin):
        started.append(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdin=subprocess.PIPE, start_new_session=True)); return started[0]
    def ready(p, port, output): os.kill(os.getpid(), getattr(signal, sign))
    monkeypatch.setattr(serve, 'start_voila', fake); monkeypatch.setattr(serve, 'wait_for_server', ready)
    serve.serve('run', browser=False)
    assert started[0].returncode not in (None, 0) and 'stopped' in capsys.readouterr().out and signal.getsignal(getattr(signal, sign)) is before
