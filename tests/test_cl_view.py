"What a continual run shows beside R: who knew what, how the bridge weighted them, and the images it kept"
import json, shutil
from pathlib import Path

import pytest

from asibkd import run_experiment
from asibkd.analysis.cl import role_names
from asibkd.analysis.knowledge import fusion_table, knowledge_sections, knowledge_table, plot_strips, strips_of
from asibkd.analysis.report import run_page, save_report
from asibkd.analysis.tables import load_summary, result_table
from asibkd.core.files import check_folder
from asibkd.explore.screens import CLExplorer

TITLES = ['What is known after each task', 'The fusion over tasks', 'Images in the memory']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Two tasks of five digits: the analytic teacher and the snapshot teach, twenty images are kept"
    out = tmp_path_factory.mktemp('view')
    run_experiment(cl_mode=1, cl_method='asib', cl_teachers='analytic+snapshot', compare=0, device='cpu', num_tasks=2,
                   train_per_class=20, epochs=2, teacher_adapt_epochs=1, replay_capacity=20, report=0, seed=1,
                   log_level='ERROR', results_dir=out, exp_id='r')
    return out/'r'


def test_who_knew_what(run):
    s = load_summary(run)
    t = knowledge_table(s)
    assert {'student', 'analytic', 'snapshot'} <= {*t} and t.index.tolist() == ['after 1', 'after 2']
    for i, row in enumerate(s['R']['asib']['class_il']):
        assert abs(t.student.iloc[i] - 100*sum(row)/len(row)) < 3            # tasks differ a little in size
    assert t.snapshot.isna().tolist() == [True, False] and t.snapshot.iloc[1] < 60      # it never saw the second task


def test_statistics_have_their_own_column(run):
    t = result_table(run)
    assert t['statistics (MB)'][0] > 0 < t['memory (MB)'][0] < .01 < t['statistics (MB)'][0]


def test_thumbnails(run):
    assert (run/'memory.png').stat().st_size < 10_000 and not check_folder(run)
    sheet = strips_of(run, 10)
    assert sheet.size == (8*9, 10*9)                     # 8 × 8 pixels and a gap; two images a class, the rest white
    assert sheet.convert('L').getpixel((9*7, 0)) > 250
    (run/'memory.png').rename(run/'aside.png')
    assert strips_of(run, 10).size == sheet.size         # a run of an older version: from the memory itself
    (run/'aside.png').rename(run/'memory.png')


def test_report_and_screen_show_them(run):
    html = save_report(run).read_text(encoding='utf-8')
    assert all(f'>{o}</h2>' in html for o in ('What is known after each task', 'Images in the memory'))
    assert 'Thumbnails of 10 classes' in html and 'statistics (MB)' in html and len(html) < 1e6
    e = CLExplorer(run)
    assert not e.message.value and len(e.children) == 6 and len(e.children[4].children) >= 2
    assert 'After the last task: ' in e.children[5].value


def test_old_runs_have_what_they_recorded(run, tmp_path):
    "No accuracies of teachers, no records of gates, no images"
    old = tmp_path/'old'
    shutil.copytree(run, old)
    for f in ('memory.png', 'memory.safetensors', 'checksums.txt'):
        (old/f).unlink()
    s = json.loads((old/'summary.json').read_text())
    s = {k: v for k, v in s.items() if k not in ('others', 'gates')}
    for r in s['rows']:
        r.pop('statistics_mb', None)
    (old/'summary.json').write_text(json.dumps(s))
    titles = [o['title'] for o in run_page(old)['sections']]
    assert not {*titles} & {*TITLES} and 'Accuracy task by task' in titles
    assert [o['parts'] for o in knowledge_sections(old, s)] == [[], [], []] and plot_strips(old, s) is None
    e = CLExplorer(old)
    assert not e.message.value and len(e.children) == 5 and 'statistics (MB)' not in result_table(s)


def test_fusion_needs_a_record_of_it(run):
    "A bridge that was trained otherwise has no weights to show; weights without names are counted"
    s = load_summary(run)
    assert fusion_table(s | dict(gates=[dict(task=1, stage=0, gate=True, average_nll=.1)])).empty
    g = dict(task=2, stage=0, gate=True, beta=.1, temps=[1, 1], weights=[.7, .3],
             path=[dict(beta=None, cv_nll=.5, cv_acc=.9), dict(beta=.1, cv_nll=.4, cv_acc=.9)])
    t = fusion_table(s | dict(gates=[g]))
    assert t['fused NLL'].tolist() == [.4] and 'w* of analytic' in t and 'w* of snapshot' in t
    assert 'w* of teacher 2' in fusion_table(s | dict(gates=[g], others=[]))
    assert [*role_names(['generic1', 'generic2', 'ema3']).values()] == ['generic 1', 'generic 2', 'ema']
