"The study of the bridge: its statistics on rows made up here, its resumability, and that every arm is treated alike"
import json, sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'nbs'/'bench'))
import bridge_map as study
from _rows import written as written_rows

written = partial(written_rows, columns=study.COLUMNS)

ARMS = ('best', 'avgz', 'wavg', 'stack', 'asmb')


def rows(gain:dict, seeds=10, steps=300):
    "Made-up students: `asmb` is `gain[setting]` points above `wavg`, the best baseline; seeds vary by 3, pairs by .2"
    rng, out = np.random.default_rng(0), []
    def row(setting, seed, arm, test):
        return dict.fromkeys(study.COLUMNS, '') | dict(
            data='digits', setting=setting, labels=20, seed=seed, arm=arm, choice=0, test=round(test, 3), val=test,
            steps=steps, cpu=1, teacher1=80, teacher2=70, average=78, stages='[]', torch='2')
    for seed in range(seeds):
        level = rng.normal(90, 3)
        out.append(row(study.NO_TEACHERS, seed, 'ce', level - 8))
        for setting, d in gain.items():
            shift = dict(best=-2, avgz=-1, wavg=0, stack=-3, asmb=d)
            out += [row(setting, seed, a, level + shift[a] + rng.normal(0, .2)) for a in ARMS]
    return out


def test_map_finds_what_was_planted(tmp_path):
    t = study.load(written(tmp_path/'m.csv', rows(dict(specialists=2., equal=0., noisy=-1.))))
    assert set(t[t.arm == 'ce'].setting) == {'specialists', 'equal', 'noisy'}    # once trained, in every cell
    m = study.the_map(t).set_index('setting')
    assert dict(m.outcome) == dict(specialists='won', equal='undecided', noisy='lost') and set(m.best) == {'wavg'}
    assert abs(m.difference['specialists'] - 2) < .4 > m.half.max() and (m.holm >= m.p).all() and (m.seeds == 10).all()
    assert abs(m.difference - m.vs_wavg).max() < 1e-9
    assert 'wins 1, loses 1, 1 are undecided' in study.sentence(study.the_map(t))
    parts = study.parts(t).set_index('asmb minus')
    assert parts.outcome['ce'] == 'better' and parts.points['wavg'].startswith('+0.') and len(study.means(t)) == 3
    gaps = study.gaps(t).set_index('arm')
    assert gaps['worst in'].asmb == 'noisy, 20' and gaps.worst.asmb == pytest.approx(-m.difference['noisy'])
    assert gaps.worst.wavg == pytest.approx(m.difference['specialists']) and (gaps.worst >= gaps['mean']).all()
    for fig in (study.plot_map(m.reset_index()), study.plot_arms(t)):
        assert 0 < len(fig._repr_png_()) < 40_000


def test_the_baseline_is_the_best_of_the_cell(tmp_path):
    "Not the one that asmb beats most easily; none of our own arms is a baseline"
    made = rows(dict(specialists=1.))
    made += [r | dict(arm='asmb_no_ib', test=r['test'] + 5) for r in made if r['arm'] == 'asmb']
    made += [r | dict(arm='uhc', test=r['test'] + 3) for r in made if r['arm'] == 'wavg']
    m = study.the_map(study.load(written(tmp_path/'m.csv', made)))
    assert m.best[0] == 'uhc' and m.outcome[0] == 'lost'


def test_unequal_steps_are_refused(tmp_path):
    made = rows(dict(equal=0.))
    made[-1]['steps'] = 301
    with pytest.raises(ValueError, match='Unequal steps'):
        study.load(written(tmp_path/'m.csv', made))


def test_holm_by_hand():
    p = study.holm([.01, .04, .03, float('nan')])
    assert np.allclose(p[:3], [.03, .06, .06]) and np.isnan(p[3])
    assert study.p_value([1., 1., 1.]) == 1 and np.isnan(study.p_value([1.])) and study.p_value([1., 1.1, .9]) < .01


def test_every_arm_has_the_same_budget():
    from asibkd.run.experiment import method_class
    assert {len(settings) for *_, settings in study.ARMS.values()} == {study.BUDGET}
    cfgs = [study.config_of('digits', 20, 0, arm, c)[0] for arm in study.ARMS for c in (0, study.BUDGET - 1)]
    assert len({(c.epochs or c.num_stages*c.student_epochs_per_stage, c.batch_size, c.student_type) for c in cfgs}) == 1
    assert all(method_class(c.method, 0) for c in cfgs)
    for data, (_, _, reported, tuning) in study.DATA.items():
        assert not {*reported} & {*tuning}, data


def test_tuning_takes_the_best_mean_of_its_arm():
    made = [dict(data='digits', setting=s, labels=5, seed=1000, arm=a, choice=c, val=v)
            for a, s, c, v in (('wavg', 'equal', 0, 80), ('wavg', 'noisy', 0, 60), ('wavg', 'equal', 1, 79),
                               ('wavg', 'noisy', 1, 70), ('asmb', 'equal', 0, 90), ('asmb', 'equal', 1, 10))]
    assert study.chosen(made, 'digits') == {('wavg', 5): 1, ('asmb', 5): 0} and study.chosen(made, 'cifar') == {}


def test_a_cut_row_is_trained_again(tmp_path, monkeypatch):
    "A line that a crash cut off is no row, and does not damage the next"
    monkeypatch.setattr(study, 'WORK', tmp_path)
    full = rows(dict(equal=0.), seeds=1)
    file = written(tmp_path/'m.csv', full[:3])
    text = file.read_text()
    file.write_text(text[:text.rindex('300') + 1])
    assert len(study.read_rows(file)) == 2
    study.add_row(file, full[3])
    assert [study.key_of(r) for r in study.read_rows(file)] == [study.key_of(r) for r in (*full[:2], full[3])]


def test_cells_and_plan():
    grid = study.read_cells('', 'digits')
    assert len(grid) == 20 and study.read_cells('specialists:20,equal:all', 'digits') == [('specialists', 20), ('equal', 0)]
    with pytest.raises(SystemExit, match='specialists'):
        study.read_cells('specialist:20', 'digits')
    todo = study.wanted('digits', grid, study.GRID, range(10), lambda a, n: [0])
    assert len(todo) == 10*(20*10 + 4) and len({study.key_of(r) for r in todo}) == len(todo)


def test_the_plan_counts_the_settings_that_were_chosen(tmp_path, monkeypatch, capsys):
    "`--plan` agrees with the call that follows: done rows have the chosen setting, not setting 0"
    def row(seed, choice, val): return dict.fromkeys(study.COLUMNS, '') | dict(
        data='digits', setting='equal', labels=5, seed=seed, arm='wavg', choice=choice, test=val, val=val, cpu=360, torch='2')
    monkeypatch.setattr(study, 'TUNING', written(tmp_path/'tuning.csv', [row(1000, c, 80 + c) for c in range(study.BUDGET)]))
    monkeypatch.setattr(study, 'TABLE', written(tmp_path/'map.csv', [row(s, study.BUDGET - 1, 90) for s in range(6)]))
    study.main('--plan --cells equal:5 --arms wavg --tuned_in equal'.split())
    missing = len(study.DATA['digits'][3])*study.BUDGET - study.BUDGET
    assert capsys.readouterr().out.splitlines() == [
        f'tuning.csv: 4 of {4 + missing} students are there; {missing} missing, {missing/10:.1f} h of CPU',
        'map.csv: 6 of 10 students are there; 4 missing, 0.4 h of CPU']
    study.main('--plan --cells equal:5 --arms wavg --untuned'.split())       # nothing to tune; setting 0: none is there
    assert capsys.readouterr().out.splitlines()[1].startswith('map.csv: 0 of 10')


def test_a_cell_from_end_to_end(tmp_path, monkeypatch, capsys):
    "Small networks, one epoch: equal steps, teachers trained once, and the second call trains nothing"
    def small(t): return study.replace(t, arch='mlp')
    for k, v in dict(WORK=tmp_path, TABLE=tmp_path/'map.csv', TUNING=tmp_path/'tuning.csv',
                     COMMON=study.COMMON | dict(student_type='mlp'),
                     SETTINGS={k: tuple(map(small, v)) for k, v in study.SETTINGS.items()}).items():
        monkeypatch.setattr(study, k, v)
    params, *rest = study.DATA['digits']
    quick = params | dict(student_epochs_per_stage=1, finetune_epochs=2)
    monkeypatch.setitem(study.DATA, 'digits', (quick, *rest))
    call = '--cells specialists:10 --arms ce,wavg,asmb,asmb_no_u,asmb_no_delta --seeds 0 --untuned'.split()
    from asibkd.trainers import fusing
    real, asked = fusing.fit_path, []
    monkeypatch.setattr(fusing, 'fit_path', lambda *a, **how: asked.append(how.get('without', ())) or real(*a, **how))
    study.main(call)
    rows = study.read_rows(study.TABLE)
    assert [r['arm'] for r in rows] == ['ce', 'wavg', 'asmb', 'asmb_no_u', 'asmb_no_delta']
    assert asked == [(), (), ('u',), ('u',), ('delta',), ('delta',)]        # two stages each
    assert len({r['steps'] for r in rows}) == 1 and int(rows[0]['steps']) > 0
    stages = json.loads(next(r['stages'] for r in rows if r['arm'] == 'asmb'))
    assert len(stages) == 2 and all({'synergy', 'student'} <= {*s} for s in stages)
    assert len([*(tmp_path/'teachers').glob('*.pt')]) == 2 and 'specialists' in capsys.readouterr().out
    monkeypatch.setattr(study, 'train_row', None)
    study.main(call)
    assert study.read_rows(study.TABLE) == rows
