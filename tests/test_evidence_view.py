"Evidence as a reader meets it: the explorer's words, the report's bridge, runs of older versions; and, slow, the demo in a browser."
import json, os, re
from pathlib import Path

import pytest

from conftest import TINY, root
from test_explore import page, serving, until     # noqa: F401: the browser

def path(*rows): return [dict(zip(('beta', 'cv_nll', 'cv_acc', 'nats'), r)) for r in rows]

OPEN = dict(stage=1, gate=True, checked=True, beta=.1, temps=[1.8, 2.4], weights=[.4, .6], images=dict(split='train', n=60), epoch=0, epochs=0, recon=None,
            synergy_nll=.61, average_nll=.74, synergy_acc=.8, average_acc=.76, path=path((None, .74, .76, 0.), (1., .7, .77, .4), (.1, .61, .8, 2.1)))
CLOSED = OPEN | dict(stage=2, gate=False, beta=None, path=path((None, .6, .8, 0.), (1., .62, .8, .3)))
OLD = dict(stage=1, gate=True, checked=True, epoch=2, epochs=3, synergy_nll=.31, average_nll=.34, synergy_acc=.9, average_acc=.88, recon=.1)

@pytest.fixture(scope='module')
def specialists(tmp_path_factory):
    "An untrained run of two teachers without a common class, its bridge of the second design"
    from asibkd.explore.opened import untrained_run
    return untrained_run(tmp_path_factory.mktemp('two'), overlap_pct=0, synergy_base='wavg', bridge_objective='fuse')

def changed(run, **more):
    "The summary of a run with other entries"
    f = Path(run)/'summary.json'
    s = json.loads(f.read_text(encoding='utf-8')) | more
    f.write_text(json.dumps(s), encoding='utf-8')
    return s

def test_the_screen_says_whose_business_an_image_is(specialists):
    "Words, numbers and bars agree with each other and with what the teachers know, image after image"
    from asibkd.explore.opened import open_run
    from asibkd.explore.widgets import SynergyExplorer
    from asibkd.explore.evidence import evidence_table, hits_by_image, teacher_knows
    o = open_run(specialists, device='cpu')
    e, knows = SynergyExplorer(o, most=60), teacher_knows(o)
    assert not e.message.value and (knows.sum(0) == 1).all()
    hits, seen = hits_by_image(e.table, o.teachers, knows), set()
    for i in range(6):
        e.position.value = i
        t, words = evidence_table(e.bridge, o.teachers, knows), re.sub('<.*?>', '', e.business.value)
        assert all(f'{v:.4g}' in e.reliance.value for v in t.share.round(4)) and abs(t.share.sum() - 1) < 1e-6
        best, label = t.share.idxmax(), e.outputs['label']
        assert t.share[best] == pytest.approx(e.table[f'evidence_{best}'][i], abs=1e-4)
        only = next(n for n, k in zip(o.teachers, knows[:, label]) if k)
        assert (best == only) == hits[i] and f'is known to {only} only' in words
        assert 'does not decide' in words or f"{best}'s business" in words and ('Right:' in words) == hits[i] != ('Wrong:' in words)
        seen.add(e.evidence.value)
    assert len(seen) == 6 and e.trust.layout.display != 'none'
    assert {'base', 'average', 'synergy'} <= set(re.findall(r'<th>(\w+)</th>', e.top.value))

def test_the_query_moves_the_evidence(specialists):
    from asibkd.explore.widgets import SynergyExplorer
    e = SynergyExplorer(specialists)
    before, target = e.reliance.value, e.target.value
    e.tau.value = 1.
    assert e.reliance.value == before and e.target.value != target
    e.toward_mean.value = 1.
    assert e.reliance.value != before

def test_over_many_images(specialists, tmp_path):
    "The bottleneck's screen: a path instead of the information plane where there is one, evidence by class, how often it is right"
    from asibkd.explore.opened import open_run
    from asibkd.explore.screens import BottleneckExplorer
    o = open_run(specialists, device='cpu')
    plane = BottleneckExplorer(o, most=100)
    assert re.match(r'On \d+\.\d % of 100 test images', plane.hits.value) and plane.evidence.layout.display != 'none'
    o.summary['gates'] = [OPEN, CLOSED]
    walked = BottleneckExplorer(o, most=100)
    assert walked.plane.value != plane.plane.value and 'From stage 1 to stage 2' in walked.note.value and not walked.message.value

def test_a_run_of_an_older_version(tmp_path):
    "Without the new fields: no evidence is claimed, the rest is shown"
    from asibkd.explore.opened import untrained_run
    from asibkd.explore.screens import BottleneckExplorer
    from asibkd.explore.widgets import SynergyExplorer
    run = untrained_run(tmp_path, synergy_base='average', bridge_objective='distil')
    c = json.loads((Path(run)/'config.json').read_text())
    new = ('bridge_images', 'labels_per_class', 'unlabelled', 'teacher_share', 'teacher1_classes', 'teacher2_classes', 'teacher_classes')
    (Path(run)/'config.json').write_text(json.dumps({k: v for k, v in c.items() if k not in new}))
    changed(run, gates=[OLD])
    e = SynergyExplorer(run, most=30)
    assert not e.message.value and e.attention.value and re.sub('<.*?>', '', e.business.value) == '' and e.trust.layout.display == 'none'
    assert 'base' not in re.findall(r'<th>(\w+)</th>', e.top.value)
    b = BottleneckExplorer(e.run, most=30)
    assert not b.message.value and not b.hits.value and b.evidence.layout.display == 'none' and b.plane.value

def reported(folder, **more):
    "What the report of a hand-written run shows; strict HTML"
    pytest.importorskip('html5lib')
    from test_report import check
    from asibkd.analysis.report import save_report
    from asibkd.core.config import Config
    folder.mkdir(exist_ok=True)
    row = lambda key, role, acc, **o: dict(key=key, model='small', role=role, val_acc=acc, test_acc_val_selected=acc, test_acc_last=acc, params=1000, macs=1e6) | o
    student = lambda key, acc: row(key, 'student', acc, target=dict(logits=['synergy'], features=None, views=0))
    weights = {f'teacher{i}': dict(source='checkpoint', classes=[5*i - 5 + j for j in range(5)]) for i in (1, 2)}
    s = dict(kind='distil', method='asmb', dataset='digits', seed=3, n_class=10, images=dict(train=700, val=60, test=500), weights=weights, baseline='wavg', verdict='asmb is ahead of wavg.',
             rows=[*(row(k, 'teacher', .5, weights=w) for k, w in weights.items()), student('wavg', .8), student('asmb', .9)], difference=dict(diff=.1, low=.05, high=.15),
             differences=[dict(baseline='wavg', diff=.1, low=.05, high=.15)], time=dict(seconds=dict(asmb=1.), latency_ms={}))
    (folder/'summary.json').write_text(json.dumps(s | more)); (folder/'config.json').write_text(Config(preset='none', seed=3).model_dump_json())
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(dict(phase=f'B{i}', kind='B', stage=i - 1, epoch=e, val_acc=.7 + .05*i + .01*e)) + '\n' for i in (1, 2) for e in (1, 2)))
    return check(save_report(folder).read_text(encoding='utf-8')), s | more

def test_the_report_shows_the_bridge(tmp_path):
    from asibkd.analysis.notes import run_text
    outlook = dict(teachers=dict(teacher1=.38, teacher2=.44), average=.76, wavg=.77, best=.44, images=180, gain_of_weighting=.01, gain_of_learning=.045, sentence='Averaging costs 1.0 point here.')
    images = dict(train=700, val=60, test=500, labelled=50, teacher=400)
    text, s = reported(tmp_path/'new', gates=[OPEN, CLOSED], outlook=outlook, images=images, evidence=dict(right=.93, images=500))
    for word in ('Averaging costs 1.0 point here.', 'Predicted gain of weighting: +1.0 points; predicted gain of learning: +4.5 points.', 'optimal constant weights (wavg)', 'Stage by stage',
                 '60 labelled training images', '0.61', 'The path of prices', 'temperature T', 'From stage 1 to stage 2', '700 training (50 with a label), 400 for the teachers only', 'CLOSED in stage 2 (1 of 2)',
                 'calibrated constant fusion', 'On 93.0 % of 500 test images', 'MORE LABELS FOR VALIDATION'): assert word in text, word
    assert text.index('Averaging costs') < text.rindex('Learning curves')
    said = run_text(s)
    for word in ('Outlook before training: Averaging costs', 'the path ends at β = 0.1', 'the path stays at β = ∞', 'MORE LABELS'): assert word in said, word

def test_the_report_of_an_older_run(tmp_path):
    text, s = reported(tmp_path/'old', gates=[OLD])
    for word in ('Outlook', 'path of prices', 'with a label', 'for the teachers only', 'MORE LABELS'): assert word not in text, word
    from asibkd.analysis.notes import run_text
    assert 'stage 1: synergy gate open (validation NLL 0.3100, average 0.3400)' in run_text(s)

# The whole way

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "A tiny run of the case: two specialists, few labels"
    from asibkd.run.experiment import run_experiment
    few = dict(overlap_pct=0, labels_per_class=5, teacher_share=.4, bridge_objective='fuse', synergy_base='wavg', train_per_class=40, finetune_epochs=4, num_stages=2, report=1)
    return run_experiment(**TINY | few | dict(results_dir=str(tmp_path_factory.mktemp('real'))))

def test_a_real_run_has_all_of_it(real):
    from asibkd.analysis.bridge import path_table, stage_table
    from asibkd.analysis.notes import gate_lines, count_text
    from asibkd.analysis.tables import load_metrics
    from asibkd.explore.widgets import SynergyExplorer
    t, stages = path_table(real), stage_table(real, load_metrics(real['run']))
    assert t.groupby('stage').chosen.sum().tolist() == [1, 1] and t.β.iloc[0] == '∞' and (t.NLL > 0).all()
    assert stages['student val %'].notna().all() and len(gate_lines(real)) == 2 and 'with a label' in count_text(real)
    text = Path(real['run'], 'report.html').read_text(encoding='utf-8')
    for word in ('The bridge', 'The path of prices', 'Outlook'): assert word in text, word
    e = SynergyExplorer(real['run'])
    assert not e.message.value and re.sub('<.*?>', '', e.business.value) and e.trust.layout.display != 'none'

@pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='trains the demo and starts a browser: set ASIBKD_SLOW=1')
def test_the_demo_in_a_browser(tmp_path, page, monkeypatch):
    "For ten test images of each half, the explorer shows the larger evidence for the right specialist in at least 85 %"
    import torch
    from asibkd import demo_run
    from asibkd.explore.opened import open_run
    from asibkd.explore.evidence import teacher_knows
    monkeypatch.chdir(tmp_path)
    run = Path(demo_run(log_level='WARNING')).absolute()
    o = open_run(run, device='cpu')
    knows, y = teacher_knows(o), torch.as_tensor(o.data.test.y)
    assert (knows.sum(0) == 1).all(), 'the demo has two specialists'
    halves = [torch.where(knows[t][y])[0][:10].tolist() for t in range(2)]
    chosen = [(i, t) for pair in zip(*halves) for t, i in enumerate(pair)]       # in turn, so that the class always changes
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    right = []
    with serving(['asibkd.run.cli', 'explore', str(run), '--no-browser'], r'http://127\.0\.0\.1:\d+/\?token=\w+', env=env, cwd=tmp_path) as (_, address):
        page.goto(address)
        page.locator('.asibkd-reliance tbody').wait_for()
        number = page.locator('.widget-text', has_text='image number').locator('input').first
        for i, t in chosen:
            name = o.data.classes[int(y[i])]
            number.fill(str(i)); number.press('Enter')
            words = until(page, lambda: page.locator('.asibkd-business').inner_text(), lambda w: f"'{name}' is known to" in w)
            share = [float(r.split()[2]) for r in page.locator('.asibkd-reliance tbody').inner_text().strip().splitlines()]
            right.append(share[t] == max(share))
            assert 'does not decide' in words or ('Right' in words) == right[-1]
        assert not page.errors, page.errors
    assert sum(right) >= .85*len(right), right

