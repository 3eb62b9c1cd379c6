"The report: a file that opens from disk, strict HTML, nothing fetched, everything escaped; and it tells the truth when a summary says that ASIB lost."
import json, re, tempfile
from pathlib import Path

import pytest

from asibkd.analysis import page as pages
from asibkd.analysis.tables import load_config, load_summary
from asibkd.core.files import atomic_write
from asibkd.analysis.report import run_page, save_compare_report, save_report
from asibkd.run.experiment import run_experiment
from asibkd.run.loops import run_loop
from conftest import TINY as SHORT

TINY = SHORT | dict(report='1')

html5lib = pytest.importorskip('html5lib')
CL = dict(cl_mode=1, compare=1, device='cpu', train_per_class=20, num_tasks=2, epochs=2, finetune_epochs=1, teacher_adapt_epochs=1, replay_capacity=20, log_level='ERROR')

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One finished run of each kind, made when first asked for"
    d, done = tmp_path_factory.mktemp('reports'), {}
    make = dict(one=lambda: run_experiment(**TINY | dict(compare=1, report_oracle=1, results_dir=str(d), exp_id='one'))['run'],
                cl=lambda: run_experiment(**CL, results_dir=str(d), exp_id='cl')['run'],
                loop=lambda: Path(run_loop('asmb ce', '0 1', **TINY | dict(results_dir=str(d/'loop')))[0]['run']).parent)
    def get(kind):
        if kind not in done: done[kind] = Path(make[kind]())
        return done[kind]
    return get

def check(html):
    "Strict HTML5, self-contained, accessible; returns the text a reader sees"
    assert len(html.encode()) < 3e6
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(html)
    every = list(tree.iter())
    assert tree.get('lang') == 'en' and tree.find('.//title').text
    for e in every:
        assert e.tag not in ('script', 'link', 'iframe', 'object', 'video', 'audio'), e.tag
        for k in ('src', 'href', 'srcset', 'poster', 'action'):
            v = e.get(k, ''); assert v == '' or v[0] == '#' or v.startswith('data:image/') or not re.match(r'\w+:|//', v), v[:80]
        assert not any(k.startswith('on') for k in e.keys())
    assert 'url(' not in html and '@import' not in html
    assert all(e.get('alt') for e in every if e.tag == 'img') and any(e.tag == 'img' for e in every)
    assert all(e[0].tag == 'caption' and e[0].text for e in every if e.tag == 'table')
    levels = [int(e.tag[1]) for e in every if re.fullmatch(r'h\d', str(e.tag))]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    ids = [e.get('id') for e in every if e.get('id')]; assert len(set(ids)) == len(ids)
    assert {e.get('href')[1:] for e in every if e.get('href', '').startswith('#')} <= {*ids}
    return ' '.join(''.join(o.itertext()) for o in tree.iter('body'))

def edited(run, change):
    "What the report of a run says whose summary was changed (its pictures are left out); the summary is put back"
    f = Path(run)/'summary.json'; old = f.read_text(encoding='utf-8')
    s = json.loads(old); change(s); f.write_text(json.dumps(s), encoding='utf-8')
    with tempfile.TemporaryDirectory() as d, pytest.MonkeyPatch.context() as m:
        m.setattr(pages, '_drawn', lambda *a, **kw: b'<svg/>')
        try: return check(save_report(run, f'{d}/report.html').read_text(encoding='utf-8'))
        finally: f.write_text(old, encoding='utf-8')

def accuracy(run, key, by, value):
    def change(s):
        for r in s['rows']:
            if r['key'] == key: r[by] = value
        s.pop('difference')
    return change

def test_one_shot(runs):
    "What it says; and that ASIB lost is said exactly when the summary says so"
    run = runs('one'); text = check((run/'report.html').read_text(encoding='utf-8'))
    s = load_summary(run)
    for word in (s['verdict'], 'ONE SEED (42)', 'ORACLE GAP', 'teachers were resnet20 and resnet14', 'Learning curves', 'Calibration', 'Confusion', 'The bottleneck', 'came from the cache', 'torch', 'train_per_class'): assert word in text, word
    lost, won = (edited(run, accuracy(run, 'avgz', 'test_acc_val_selected', v)) for v in (2., 0.))
    assert 'asmb is BELOW avgz (by' in lost and lost.index('asmb is BELOW') < lost.index('ONE SEED') < lost.index('Validation chose')      # warnings first
    assert 'asmb is BELOW avgz' not in won and 'BELOW avgz' not in edited(run, accuracy(run, 'asmb', 'test_acc_val_selected', 1.))
    assert 'teacher2 (resnet14, untrained' in edited(run, lambda s: s['weights']['teacher2'].update(source='untrained', file=''))
    shut = edited(run, lambda s: s['gates'][0].update(gate=False)); assert 'gate was CLOSED in stage 1' in shut
    assert 'CLOSED' not in edited(run, lambda s: s['gates'][0].update(gate=True))
    assert 'ORACLE' not in edited(run, lambda s: s.pop('test_acc_oracle'))

def test_continual(runs):
    run = runs('cl'); text = check((run/'report.html').read_text(encoding='utf-8'))
    for word in ('in 2 tasks (5 + 5 classes) with asib', 'Forgetting', 'Memory', 'R of asib, class-IL', 'R of asib, task-IL', 'ONE SEED', 'Confusion', 'Calibration'): assert word in text, word
    assert 'asib is BELOW er' in edited(run, accuracy(run, 'er', 'ACC', 2.)) and 'asib is BELOW' not in edited(run, accuracy(run, 'asib', 'ACC', 1.))
    assert 'asib is BELOW' not in edited(run, lambda s: (accuracy(run, 'asib', 'ACC', .99)(s), accuracy(run, 'joint', 'ACC', 1.)(s | dict(difference=0))))
    assert 'SAW FUTURE' in edited(run, lambda s: s['rows'][-1].update(leak='yes')) and 'SAW FUTURE' not in text
    assert 'against every baseline' in text and 'all data so far' in text
    names = lambda s: {r['key']: r for r in s['rows']}
    def last(row, *who):
        return lambda s: [s['R'][k]['class_il'].__setitem__(-1, [v/100 for v in row]) for k in who]
    assert 'newest task only' not in edited(run, last([50, 44], *names(load_summary(run))))               # near 1/T, and nothing forgotten
    lost = edited(run, last([0, 97], *names(load_summary(run))))
    assert 'naive: class-IL knows the newest task only' in lost and 'er knows the newest task only (last row of R), although it replays 20 kept images' in lost
    assert 'joint knows' not in lost and 'joint:' not in lost

def test_a_method_with_a_required_parameter(tmp_path):
    "Its report is written, and shows what it was given"
    from pydantic import BaseModel
    from asibkd.core.config import method_params
    from asibkd.distil.methods import methods, register_method
    class Must(BaseModel): must:float
    register_method('must', Must)(type('Must', (methods['avgz'],), {}))
    try: s = run_experiment(**TINY | dict(method='must', must=.5, results_dir=str(tmp_path)))
    finally: del methods['must'], method_params['must']
    text = check(Path(s['run'], 'report.html').read_text(encoding='utf-8'))
    assert "method='must', " in text and 'must=0.5)   # where' in text and 'where the method is registered' in text and "the method's own" in text

def test_only_what_is_read(tmp_path):
    "A method without a bridge lists no parameter of the bridge, and three classes have no top-5"
    shared = tmp_path/'shared.yaml'; shared.write_text('feat_kd_alpha: 1\nhybrid_beta: .3')       # typed, they would be refused
    three = dict(TINY, _file=str(shared), results_dir=str(tmp_path))
    parts = lambda s: {t['caption']: t for o in run_page(s['run'])['sections'] for t in o['parts'] if t['kind'] == 'table'}
    kd, asmb = (parts(run_experiment(**three, method=m)) for m in ('vanilla_kd', 'asmb'))
    listed = lambda p: {r[0] for r in p['Parameters that differ from the defaults']['rows']}
    bridge = {'feat_kd_alpha', 'hybrid_beta', 'teacher_adapt_epochs'}
    assert not bridge & listed(kd) and bridge <= listed(asmb)
    assert 'top-5 %' in kd['Scores on the test images']['head']

def test_the_summary_is_believed(tmp_path):
    "Own data: not the dataset that the parameters name; and no figure of a comparison warns"
    import warnings
    from torchvision.datasets import FakeData
    train, test = FakeData(60, (3, 16, 16), num_classes=3), FakeData(30, (3, 16, 16), num_classes=3)
    own = TINY | dict(results_dir=str(tmp_path), method='avgz', train_per_class='0', finetune_epochs='1', batch_size='16')
    runs = [run_experiment(train=train, test=test, **own | dict(seed=i, val_frac=f'.{i}', tau_start=i, student_lr=f'.00{i}', min_lr=f'.000{i}')) for i in (1, 2)]
    page = run_page(runs[0]['run']); text = check(Path(runs[0]['run'], 'report.html').read_text(encoding='utf-8'))
    shown = {r[0]: r[1] for o in page['sections'] for t in o['parts'] if t.get('caption') == 'Parameters that differ from the defaults' for r in t['rows']}
    assert load_config(runs[0]['run'])['dataset'] == shown['dataset'] == 'FakeData' and 'top-5' not in text
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        said = check(save_compare_report(tmp_path, tmp_path/'c.html', 'avgz [1]').read_text(encoding='utf-8'))
    for word in ('2 methods on FakeData', 'avgz [2]: val_frac=0.2', 'no common seed'): assert word in said, word
    assert 'nan' not in said.split('Who wins')[0]

def test_comparison(runs, tmp_path):
    d = runs('loop'); out = tmp_path/'deep'/'report.html'
    read = lambda: check(save_compare_report(d, out, 'ce').read_text(encoding='utf-8'))
    text = read()
    for word in ('over 2 seeds (0 and 1), 4 runs', 'vs ce', 'Who wins how often', 'Seeds on which the row beats'): assert word in text, word
    links = re.findall(r'href="([^#"][^"]*)"', out.read_text(encoding='utf-8')); assert len(links) == 4 and all((out.parent/o).resolve().exists() for o in links)
    files = [f for f in d.glob('*/summary.json') if load_summary(f.parent).get('method') == 'asmb']
    old = {f: f.read_text(encoding='utf-8') for f in files}; assert len(old) == 2
    try:
        for v, said in ((-.5, True), (1.5, False)):
            for f in files:
                s = json.loads(old[f]); next(r for r in s['rows'] if r['key'] == 'asmb')['test_acc_val_selected'] = v; atomic_write(f, json.dumps(s), checksum=True)
            assert ('asmb is BELOW ce by' in read()) == said
    finally:
        for f, o in old.items(): f.write_text(o, encoding='utf-8')

def test_the_command_repeats_the_run(runs, asibkd):
    "The page's command, typed as it stands, finds the run finished: every parameter is the same"
    for kind in ('one', 'cl'):
        html = (runs(kind)/'report.html').read_text(encoding='utf-8')
        line = re.findall(r'<code>(asibkd run [^<]*)</code>', html)[-1].replace('&#39;', "'")
        import shlex; r = asibkd(*shlex.split(line)[1:], 'log_level=INFO')
        assert r.returncode == 0 and 'finished: nothing was run again' in r.stdout, line + r.stdout + r.stderr
        assert f"to read: {runs(kind)}/report.html" in r.stdout

def test_through_the_door(runs, asibkd, tmp_path):
    one, cl = runs('one'), runs('cl')
    r = asibkd('report', one, '--out', 'here.html'); assert r.returncode == 0, r.stderr
    assert check((tmp_path/'here.html').read_text(encoding='utf-8')) == check((one/'report.html').read_text(encoding='utf-8'))
    (tmp_path/'results').symlink_to(one.parent)
    r = asibkd('report', '--out', 'newest.html'); assert r.returncode == 0 and (tmp_path/'newest.html').exists(), r.stderr
    r = asibkd('report', runs('loop'), '--baseline', 'asmb'); assert r.returncode == 0, r.stderr
    assert Path(r.stdout.strip()) == runs('loop')/'compare'/'report.html' and 'vs asmb' in check(Path(r.stdout.strip()).read_text(encoding='utf-8'))
    for bad, says in ((('nowhere',), "No finished run in 'nowhere'"), ((one, cl), '--cl 1'), ((runs('loop'), '--baseline', 'asbm'), "Did you mean 'asmb'")):
        r = asibkd('report', *bad); assert r.returncode == 2 and says in r.stderr and 'Traceback' not in r.stderr, r.stderr

def test_names_are_escaped(folder, tmp_path):
    nasty = '<b>&"'
    d = folder('<i>&\'photos', classes=(nasty, 'a$_$b'), train=12, test=3)
    s = run_experiment(**TINY | dict(dataset='imagefolder', data_root=str(d), results_dir=str(tmp_path/'r'), method='ce', val_frac=.25, batch_size=8, num_workers=0))
    html = Path(s['run'], 'report.html').read_text(encoding='utf-8'); text = check(html)
    assert '<b>' not in html and '<i>' not in html and nasty in text and "<i>&'photos" in text

def test_a_page_that_cannot_be_drawn_loses_no_run(tmp_path, monkeypatch, caplog):
    import asibkd.run.experiment
    def broken(*a, **kw): raise ZeroDivisionError('no ink')
    monkeypatch.setattr(asibkd.run.experiment, 'save_report', broken); monkeypatch.setattr(asibkd.run.experiment.log, 'propagate', True)
    monkeypatch.setattr(asibkd.run.experiment, 'setup_log', lambda *a: None); caplog.set_level('WARNING', 'asibkd')      # whatever another test has set
    s = run_experiment(**TINY | dict(method='ce', results_dir=str(tmp_path)))
    assert s['test_acc_last'] > 0 and Path(s['run'], 'summary.json').exists() and not Path(s['run'], 'report.html').exists()
    assert 'ZeroDivisionError: no ink' in caplog.text and 'the same command tries again' in caplog.text

def test_left_out_and_written_later(tmp_path):
    "report=0 saves a second a run; the same run asked for with a report is the same run"
    from asibkd.analysis.report import save_report
    s = run_experiment(**SHORT | dict(method='ce', results_dir=str(tmp_path))); page = Path(s['run'], 'report.html'); assert not page.exists()
    assert run_experiment(**TINY | dict(method='ce', results_dir=str(tmp_path)))['run'] == s['run']
    assert save_report(s['run']) == page and page.exists()
