"The explorer as a reader meets it: in a browser, through Voilà and in JupyterLab."
import contextlib, hashlib, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
ARGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split() + ['--host-resolver-rules=MAP evil.example 127.0.0.1']
LONG = 90_000   # ms: two kernels start beside other tests

@pytest.fixture
def run(tmp_path):
    from asibkd.explore.opened import untrained_run
    return untrained_run(tmp_path/'results')

EVIL = '<img src=x onerror="document.title=`hacked`">', '$\\frac{$'   # names of classes: text, wherever they are shown

@pytest.fixture
def evil_run(folder, tmp_path):
    "A run on photos whose folders have such names"
    from asibkd.explore.opened import untrained_run
    return untrained_run(tmp_path/'results', dataset='imagefolder', data_root=str(folder(classes=EVIL, size=16, train=12, test=6)), image_size=16, teacher1_type='resnet8', teacher2_type='resnet8', student_type='resnet8')

@pytest.fixture
def shots(tmp_path, request):
    "Where screenshots go: outside the repository"
    d = Path(os.environ.get('ASIBKD_SHOTS') or tmp_path); d.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=str(d/f'{request.node.name}-{name}.png'))

@pytest.fixture
def page():
    "A page of a headless Chromium, and what went wrong on it"
    if CHROMIUM is None: pytest.skip('Chromium is not installed (Debian: apt-get install chromium)')
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed: pip install playwright')
    with playwright.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport=dict(width=1400, height=1500)); page.errors = []; page.set_default_timeout(LONG)
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        page.on('console', lambda m: page.errors.append(m.text) if m.type == 'error' else None)
        page.on('request', lambda r: None if re.match(r'(http|ws)://127\.0\.0\.1|data:|blob:', r.url) else page.errors.append(f'asks the network: {r.url}'))
        yield page
        browser.close()

@contextlib.contextmanager
def serving(argv, pattern, **kw):
    "A server, and the address it prints; ended as a reader ends it"
    p = subprocess.Popen([sys.executable, '-m', *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL, **kw)
    try:
        said = []
        while not (found := re.search(pattern, ''.join(said))):
            line = p.stdout.readline(); said.append(line)
            assert line, 'it ended: ' + ''.join(said)[-2000:]
        yield p, found[0]
    finally:
        if p.poll() is None:
            p.send_signal(signal.SIGINT)
            try: p.wait(30)
            except subprocess.TimeoutExpired: p.kill()

def drawn(page, name):
    "A hash of the picture that is shown"
    return hashlib.sha1(bytes(page.locator(f'img.asibkd-{name}').evaluate('async i => [...new Uint8Array(await (await fetch(i.src)).arrayBuffer())]'))).hexdigest()

def until(page, ask, good):
    "Ask until the answer is good"
    for _ in range(150):
        if good(got := ask()): return got
        page.wait_for_timeout(200)
    raise AssertionError(f'still {got!r} after 30 s')

def settled(page, name):
    "A picture that is drawn, and stays as it is"
    before = None
    while before is None or drawn(page, name) != before:
        before = until(page, lambda: drawn(page, name), bool)
        page.wait_for_timeout(1500)
    return before

def shares(page): return [float(v) for v in re.findall(r'[01](?:\.\d+)?(?=\s|$)', page.locator('.asibkd-shares tbody').inner_text().replace('head 1', ''))]

def test_voila(evil_run, page, shots, tmp_path):
    "An image is chosen, a slider is moved, and what is shown is what the functions say; a class's name is text"
    from asibkd.explore.opened import attention_table, all_logits, bridge_outputs, image_outputs, open_run, top_classes
    from asibkd.explore.serve import is_listening
    run, o = evil_run, open_run(evil_run, device='cpu')
    seen = image_outputs(o, 7)
    def expected(toward): s = bridge_outputs(o, seen, toward); return attention_table(o, s['attn'], seen['teachers'])[0], top_classes(all_logits(o, seen, s), o.data.classes)
    near = lambda table: lambda got: len(got) == 2 and all(abs(a - b) < 6e-4 for a, b in zip(got, table.iloc[0]))
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    with serving(['asibkd.run.cli', 'explore', run, '--no-browser'], r'http://127\.0\.0\.1:\d+/\?token=\w+', env=env, cwd=tmp_path) as (p, address):
        assert page.goto(address.partition('?')[0]).url.partition('?')[0].endswith('/login')               # without the token
        other = page.context.browser.new_page(); assert other.goto(address.replace('127.0.0.1', 'evil.example')).status == 403; other.close()   # a name that an attacker points here
        page.goto(address)
        page.locator('.asibkd-shares tbody').wait_for()
        before = {n: until(page, lambda: drawn(page, n), bool) for n in ('image', 'attention')}
        # choose an image by its number
        number = page.get_by_label('image number').or_(page.locator('.widget-text', has_text='image number').locator('input')).first
        number.fill('7'); number.press('Enter')
        until(page, lambda: drawn(page, 'image'), lambda h: h != before['image'])
        table, top = expected(0.)
        until(page, lambda: shares(page), near(table))
        text = lambda: page.locator('.asibkd-top tbody').inner_text().replace('\xa0', ' ')
        until(page, text, lambda t: all(c in t for c in top['synergy']))
        attention = settled(page, 'attention'); shots(page, 'image')
        # move the query to the mean feature
        handle = page.locator('.widget-hslider', has_text='query → mean').locator('.noUi-handle')
        handle.focus(); page.keyboard.press('End')
        table2, top2 = expected(1.)
        assert not near(table)(table2.iloc[0].tolist()) and list(top['synergy']) != list(top2['synergy'])
        until(page, lambda: shares(page), near(table2))
        until(page, text, lambda t: all(c in t for c in top2['synergy']))
        until(page, lambda: drawn(page, 'attention'), lambda h: h != attention)
        # another temperature changes the target and nothing else
        now, target = settled(page, 'attention'), settled(page, 'target')
        page.locator('.widget-hslider', has_text='τ').locator('.noUi-handle').focus(); page.keyboard.press('ArrowRight')
        until(page, lambda: drawn(page, 'target'), lambda h: h != target); assert drawn(page, 'attention') == now
        # nonsense is answered in a line
        number.fill('seven'); number.press('Enter')
        page.get_by_text('type a number from 0 to 11').wait_for()
        # the name of a class came as text: in the table, and in the list of classes
        assert EVIL[0] in text() and EVIL[0] in page.locator('select', has_text='any').last.inner_text().replace('\xa0', ' ')
        assert page.title() != 'hacked' and not page.locator('img[src=x]').count()
        shots(page, 'moved')
        assert not page.errors, page.errors
        p.send_signal(signal.SIGINT); assert p.wait(40) == 0 and 'stopped' in p.stdout.read()          # Ctrl-C ends it cleanly
    assert not is_listening(int(re.search(r':(\d+)/', address)[1]))

def test_jupyterlab(run, page, shots, tmp_path):
    "The same notebook by hand: open it, run all cells, the screen is there"
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed: pip install jupyterlab')
    shutil.copy(root/'nbs'/'explore.ipynb', tmp_path/'explore.ipynb')
    home = {k: str(tmp_path/k.lower()) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'IPYTHONDIR')}
    env = {**os.environ, **home, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'ASIBKD_RUN': run}
    from asibkd.explore.serve import is_listening, free_port
    argv = ['jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={(port := free_port())}', f'--ServerApp.root_dir={tmp_path}', '--IdentityProvider.token=here', '--LabApp.news_url=None',
            '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--ServerApp.shutdown_no_activity_timeout=300']
    with serving(argv, r'http://127\.0\.0\.1:\d+/lab', env=env, cwd=tmp_path) as (p, address):
        until(page, lambda: is_listening(port), bool)
        page.goto(f'{address}/tree/explore.ipynb?token=here')
        page.get_by_text(re.compile(r'\| Idle$')).first.wait_for()                                     # before that, a kernel's start may swallow the request
        page.locator('.lm-MenuBar-itemLabel', has_text=re.compile('^Run$')).click()
        page.locator('.lm-Menu-itemLabel', has_text=re.compile('^Run All Cells$')).click()
        page.locator('.asibkd-shares tbody').first.wait_for()
        assert abs(sum(shares(page)) - 1) < 2e-3
        until(page, lambda: drawn(page, 'attention'), bool)
        shots(page, 'lab')

def executed(run, monkeypatch):
    "What explore.ipynb shows of a run: its text, and the values of its widgets"
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    for k, v in dict(ASIBKD_RUN=str(run), PYTHONPATH=str(root), OMP_NUM_THREADS='1').items(): monkeypatch.setenv(k, v)
    nb = nbclient.NotebookClient(nbformat.read(root/'nbs'/'explore.ipynb', 4), timeout=200, kernel_name='python3').execute()
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert not [o for o in outputs if o.output_type == 'error']
    data = [o.data for o in outputs if 'data' in o]
    state = nb.metadata.widgets['application/vnd.jupyter.widget-state+json']['state'].values()
    return '\n'.join(o['text/markdown'] for o in data if 'text/markdown' in o), '\n'.join(str(o['state'].get('value', '')) for o in state), data

def test_a_continual_run_has_its_own_screen(tmp_path, monkeypatch):
    "No dead screens above it, and nothing went wrong"
    import json
    row = lambda k: dict(key=k, role='student', memory='replay', memory_items=9, params=9, **dict.fromkeys(('val_acc', 'ACC', 'AIA', 'BWT', 'forgetting', 'task_ACC'), .5))
    R = dict(class_il=[[.98], [.5, .9]], task_il=[[1.], [1., 1.]])
    s = dict(kind='cl', method='asib', seed=1, tasks=[['a', 'b'], ['c', 'd']], composition=[[5, 5, 0, 0], [3, 3, 2, 2]], rows=[row('er'), row('asib')], R=dict(er=R, asib=R))
    d = tmp_path/'results'/'cl'; d.mkdir(parents=True)
    (d/'summary.json').write_text(json.dumps(s)); (d/'config.json').write_text('{"seed": 1}')
    text, values, data = executed(d, monkeypatch)
    assert '## The tasks' in text and 'no bridge' in text and 'One image' not in text and 'The bottleneck' not in text
    assert 'after 2: a (3), b (3), c (2), d (2)' in values and 'forgotten' in values and 'role="alert"' not in values
    assert len([o for o in data if 'application/vnd.jupyter.widget-view+json' in o]) == 2                # this screen, and all runs

def test_a_one_shot_run_has_no_continual_screen(run, monkeypatch):
    text, values, data = executed(run, monkeypatch)
    assert '## One image' in text and '## The bottleneck' in text and 'The tasks' not in text
    assert 'teacher1' in values and 'cl_mode=1' not in ''.join(str(o) for o in data) and len([o for o in data if 'application/vnd.jupyter.widget-view+json' in o]) == 3

def test_without_voila(run, monkeypatch):
    from asibkd.explore import serve
    from asibkd.core.config import RunError
    monkeypatch.setattr(serve, 'find_spec', lambda name: None)
    with pytest.raises(RunError, match='pip install voila'): serve.serve(run, browser=False)

def test_refusals(run, capsys):
    "An occupied port and a folder that holds no run are answered in a line"
    import socket
    from asibkd.run.cli import main
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        for argv, says in (([run, '--port', str(s.getsockname()[1])], 'Name another one'), (['nothing_here'], 'not the folder of a finished run')):
            assert main(['explore', '--no-browser', *argv]) == 2 and says in capsys.readouterr().err

def test_the_notebook_comes_along():
    "What the package serves is the notebook that people read (that a wheel holds it: test_door)"
    from asibkd.explore.serve import explore_notebook
    assert Path(explore_notebook()).read_bytes() == (root/'nbs'/'explore.ipynb').read_bytes()

def test_a_monitor_never_breaks_a_run(tiny, monkeypatch):
    from asibkd.explore import monitor
    from asibkd.run.experiment import run_experiment
    monkeypatch.setattr(monitor, 'plot_parts', lambda rows: 1/0)
    live = monitor.LiveMonitorCB(show=True)
    s = run_experiment(callbacks=[live], **tiny)
    assert s['test_acc_val_selected'] >= 0 and not live.on and len(live.rows) == 4                      # two teachers, A, B

def test_own_modules_and_data_are_given_again(tmp_path):
    "What a folder cannot hold is asked for; given again, everybody answers as the summary says, and the givers keep what they had"
    import copy, torch
    from torch import nn
    from torchvision.datasets import FakeData
    from asibkd.core.config import RunError
    from asibkd.explore.opened import open_run, split_outputs
    from asibkd.distil.metrics import accuracy
    from asibkd.run.experiment import run_experiment
    def net(width): return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4*width, 4))
    torch.manual_seed(0)
    train, test, ts, student = FakeData(80, (3, 16, 16), num_classes=4), FakeData(40, (3, 16, 16), num_classes=4), [net(8), 'resnet8'], net(4)
    s = run_experiment(teachers=ts, student=student, train=train, test=test, preset='method/asmb', batch_size=16, finetune_epochs=1, num_stages=1, teacher_adapt_epochs=1,
                       student_epochs_per_stage=1, data_aug=0, device='cpu', report=0, results_dir=str(tmp_path), log_level='WARNING')
    for given, says in ((dict(), r'train=…'), (dict(train=train, test=test), r'teachers=\[…\]'), (dict(train=train, test=test, teachers=ts), r'student=MyModule')):
        with pytest.raises(RunError, match=says): open_run(s['run'], **given)
    mine, theirs = net(4), [net(8), 'resnet8']; before = copy.deepcopy(mine.state_dict())
    o = open_run(s['run'], train=train, test=test, teachers=theirs, student=mine, device='cpu')
    z, y = split_outputs(o)
    rows = {r['key']: r['test_acc_val_selected'] for r in s['rows']}
    assert accuracy(z['student'], y) == pytest.approx(s['test_acc_val_selected']) and accuracy(z['synergy'], y) == pytest.approx(rows['synergy'])
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())
