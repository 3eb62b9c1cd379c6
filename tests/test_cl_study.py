"The study of the analytic teacher: its tables on rows made up here, equal treatment of every arm, and that it resumes"
import json, sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'nbs'/'bench'))
import cl_analytic as study
from _rows import written as written_rows

written = partial(written_rows, columns=study.COLUMNS)


MADE = ('er', 'derpp', 'avgz', 'asib', 'asib_no_views', 'joint')


def made(gain, seeds=10, buffers=(20, 50)):
    "`asib` is `gain[buffer]` points above `derpp`, the best rival; seeds vary by 3, arms by .2"
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        level = rng.normal(80, 3)
        for b in buffers:
            shift = dict(er=-5, derpp=0, avgz=gain[b] - 1, asib=gain[b], asib_no_views=gain[b] - 3, joint=12)
            for arm in MADE:
                kept = 0 if arm in study.WITHOUT_MEMORY else b
                acc = level + shift[arm] + rng.normal(0, .2)
                rows.append(dict.fromkeys(study.COLUMNS, '') | dict(
                    data='digits', budget='images', arm=arm, buffer=kept, seed=seed, choice=0, capacity=kept,
                    val=acc, ACC=acc, AIA=acc + 5, BWT=-10, task_ACC=99, items=kept, images_mb=.0001*kept,
                    torch='2', cpu=9, gate='[]',
                    statistics_mb=.01 if arm in ('asib', 'avgz', 'asib_no_views') else 0,
                    curves=json.dumps(dict(student=[99, acc], analytic1=[98, 97], snapshot1=[None, 70]))))
    return [*{study.key_of(r): r for r in rows}.values()]


def test_tables_find_what_was_planted(tmp_path):
    t = study.load(written(tmp_path/'t.csv', made({20: 4., 50: 0.})))
    assert {*t[t.arm == 'joint'].buffer} == {20, 50}                       # trained once, in every cell
    m = study.against_best(t).set_index('buffer')
    assert {*m.best} == {'derpp'} and dict(m.outcome) == {20: 'better', 50: 'not decided'}
    assert abs(m.difference[20] - 4) < .3 > m.half.max() and m.p[20] < 1e-6 and (m.seeds == 10).all()
    assert 'memory 20: +' in study.sentence(m.reset_index()) and study.sentence(m[:0]) == 'No cell is finished.'
    parts = study.parts(t).set_index(['memory', 'asib minus']).points
    assert parts[20, 'asib_no_views'].startswith(('+2.', '+3.')) and (20, 'avgz') in parts
    shown = study.table(dict(study.cells(t))['digits', 20])
    assert shown.arm.tolist()[:2] == ['joint', 'asib'] and shown.set_index('arm')['statistics (MB)']['asib'] == '0.010'


def test_figures_are_small(tmp_path):
    t = study.load(written(tmp_path/'t.csv', made({20: 4., 50: 0.}, seeds=3)))
    for fig in (study.plot_cells(t, 'digits'), study.plot_curves(t[t.buffer == 20], title='digits')):
        assert 0 < len(fig._repr_png_()) < 40_000


def test_our_own_arms_are_no_rivals(tmp_path):
    rows = made({20: 1., 50: 1.})
    rows += [r | dict(arm='wavg', ACC=r['ACC'] + 9) for r in rows if r['arm'] == 'asib']
    rows += [r | dict(arm='ssil', ACC=r['ACC'] + 3) for r in rows if r['arm'] == 'derpp']
    m = study.against_best(study.load(written(tmp_path/'t.csv', rows)))
    assert {*m.best} == {'ssil'} and {*m.outcome} == {'worse'}


def test_equal_bytes_by_hand(tmp_path):
    "asib stores 20 × 0.0001 + 0.01 MB = 0.012 MB: room for 120 images of derpp"
    rows = made({20: 4., 50: 0.})
    t = study.load(written(tmp_path/'t.csv', rows))
    room = study.room_in_bytes(t, 'digits')
    assert room['derpp', 20] == 120 and room['derpp', 50] == 150
    assert not [*study.cells(t, 'bytes')]
    more = study.wanted('digits', ['derpp', 'wa'], [20], [0], lambda a, b: [0], 'bytes', lambda a, b: room.get((a, b)))
    assert [(r['arm'], r['buffer'], r['capacity'], r['budget']) for r in more] == [('derpp', 20, 120, 'bytes')]
    larger = [r | dict(budget='bytes', ACC=99.) for r in rows if r['arm'] == 'derpp' and r['buffer'] == 20]
    t = study.load(written(tmp_path/'t.csv', rows + larger))
    (key, g), = study.cells(t, 'bytes')
    assert key == ('digits', 20) and {*g.arm} == {'derpp', 'avgz', 'asib', 'joint'} and len(g) == 40
    assert {*study.against_best(t, 'bytes').outcome} == {'worse'} and study.room_in_bytes(t, 'digits') == room


def test_every_arm_has_the_same_budget():
    assert {len(choices) for *_, choices in study.ARMS.values()} == {study.BUDGET}
    for data, (_, buffers, tuned, reported, trial, _) in study.DATA.items():
        assert not {*reported} & {*trial} and {*tuned} <= {*buffers}
    arms = study.arms_of('digits')
    absent = study.missing_parts('digits', arms, {})
    there = [a for a in arms if a not in absent]
    assert {'naive', 'joint', 'er', 'derpp', 'asib', 'asib_small'} <= {*there}
    cfgs = {a: study.config_of(dict(data='digits', arm=a, seed=0, capacity=20, choice=0))[0] for a in there}
    assert len({(c.epochs, c.batch_size, c.replay_ratio, c.student_type, c.num_tasks) for c in cfgs.values()}) == 1
    assert {c.replay_capacity for a, c in cfgs.items() if a not in study.WITHOUT_MEMORY} == {20}
    assert cfgs['asib_small'].analytic_dim == study.FEW['digits'] and cfgs['asib'].analytic_dim == 0


def test_tuning_takes_the_best_mean_of_its_arm():
    rows = [dict(data='digits', arm=a, buffer=b, seed=s, choice=c, val=v)
            for a, b, s, c, v in (('asib', 20, 1, 0, 80), ('asib', 20, 2, 0, 60), ('asib', 20, 1, 1, 79),
                                  ('asib', 20, 2, 1, 70), ('asib', 200, 1, 2, 90), ('joint', 0, 1, 3, 99))]
    best = study.chosen(rows, 'digits', 'buffer')
    assert best == {('asib', 20): 1, ('asib', 200): 2, ('joint', 0): 3} and study.chosen(rows, 'cifar', 'buffer') == {}
    asked = (('asib', 10), ('asib_no_views', 50), ('joint', 0), ('er', 20), ('wavg', 200))     # not tuned: as asib
    assert [study.nearest(best, *o) for o in asked] == [1, 1, 3, 0, 2]
    assert study.nearest(best | {('wavg', 20): 3}, 'wavg', 200) == 3 and study.nearest({}, 'wavg', 20) == 0


def test_options_are_checked():
    with pytest.raises(SystemExit, match='data_root'):
        study.main(['--data', 'cifar'])
    with pytest.raises(SystemExit, match='derp: unknown'):
        study.main(['--methods', 'derp'])


def test_a_cell_from_end_to_end(tmp_path, monkeypatch, capsys):
    "One epoch: the same command twice trains once; equal bytes follow where there are statistics"
    for k, v in dict(WORK=tmp_path, TABLE=tmp_path/'t.csv', TUNING=tmp_path/'u.csv').items():
        monkeypatch.setattr(study, k, v)
    monkeypatch.setattr(study.bridge_map, 'WORK', tmp_path)
    small = dict(epochs=1, train_per_class=12, num_tasks=2, analytic_dim=30, teacher_adapt_epochs=1)
    params, *rest = study.DATA['digits']
    monkeypatch.setitem(study.DATA, 'digits', (params | small, *rest))
    call = '--methods naive,derpp,asib --buffers 50 --seeds 200 --untuned'.split()
    study.main(call)
    rows = study.read_rows(study.TABLE)
    assert {(r['budget'], r['arm']) for r in rows} == {
        ('images', 'naive'), ('images', 'derpp'), ('images', 'asib'), ('bytes', 'derpp')}
    derpp, asib = (next(r for r in rows if r['arm'] == a) for a in ('derpp', 'asib'))
    assert 0 < float(derpp['ACC']) < 100 and len(json.loads(derpp['curves'])['student']) == 2 and derpp['items'] == '50'
    assert 'digits, memory 50, equal images' in capsys.readouterr().out
    # an image and its label are 200 bytes; ten logits and a certainty, 22: of asib's images ten are held out, without
    assert [(o['items'], float(o['images_mb'])) for o in (derpp, asib)] == [('50', 50*(200 + 22)/1e6), ('50', (50*200 + 40*22)/1e6)]
    monkeypatch.setattr(study, 'train_row', None)
    study.main(call)
    assert study.read_rows(study.TABLE) == rows
