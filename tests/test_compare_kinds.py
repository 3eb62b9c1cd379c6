"Comparisons keep apart what was trained apart"
import json
import logging

import pytest

from asibkd.analysis.compare import collect
from asibkd.run.experiment import run_experiment


def lead(t, label, base):
    return float(t[t.label == label].test_acc_val_selected.iloc[0] - t[t.label == base].test_acc_val_selected.iloc[0])


def test_baselines_with_other_weights_are_other_baselines(tiny):
    "One-shot baselines read kd_alpha and take the student's freezing; a difference within a run is the one that is shown"
    kw = tiny | dict(method='asmb', compare=1, student_type='mlp', teacher1_type='mlp', teacher2_type='mlp', epochs=1)
    own = {}
    for k, more in {'default': {}, '3.0': dict(kd_alpha=3.)}.items():
        s = run_experiment(**kw, **more)
        acc = {r['key']: 100*r['test_acc_val_selected'] for r in s['rows'] if r['role'] == 'student'}
        own[k] = acc['asmb'] - acc['avgz']
    t = collect(tiny['results_dir'])
    for k, d in own.items():
        assert lead(t, f'asmb kd_alpha={k}', f'avgz kd_alpha={k}') == pytest.approx(d, abs=1e-6)
    assert (t.label == 'ce').sum() <= 2


def written(folder, name, acc, **params):
    d = folder/name
    d.mkdir(parents=True)
    row = dict(key='ce', role='student', val_acc=acc, test_acc_val_selected=acc, test_acc_last=acc, params=9)
    (d/'summary.json').write_text(json.dumps(dict(kind='distil', method='ce', seed=1, rows=[row])))
    (d/'config.json').write_text(json.dumps(dict(seed=1) | params))


def test_one_student_with_two_results_is_said(tmp_path, caplog):
    "The same parameters, other teachers' files: one is left out, and the log says which"
    for name, acc in (('good', .65), ('bad', .14)):
        written(tmp_path, name, acc, finetune_ckpt1=f'{name}.pth')
    log = logging.getLogger('asibkd')
    kept, log.propagate = log.propagate, True
    try:
        with caplog.at_level('WARNING'):
            assert len(collect(tmp_path)) == 1
    finally:
        log.propagate = kept
    assert 'there twice with other results' in caplog.text and '65.00' in caplog.text and '14.00' in caplog.text


def test_every_continual_method_can_be_shown_beside_its_baselines(tiny):
    "`joint` keeps all data, and is an upper bound: also where it is the run's own method"
    from asibkd.analysis.notes import run_text
    from asibkd.analysis.tables import baselines_ahead
    rows = [dict(key=k, role='student', ACC=a, supervision='x') for k, a in (('joint', .5), ('naive', .6), ('er', .4))]
    assert baselines_ahead(dict(kind='cl', method='joint', rows=rows)).get('naive') == pytest.approx(10)
    s = run_experiment(**tiny | dict(cl_mode=1, num_tasks=2, cl_method='joint', compare=1, student_type='mlp', epochs=1))
    assert 'joint' in run_text(s)
