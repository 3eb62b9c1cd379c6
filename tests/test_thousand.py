"1,000 run folders, made from the files of one real run: compare, show and the browser stay quick and small, and see every change."
import json, random, resource, sys, time
from pathlib import Path

import pandas as pd
import pytest

from asibkd.core.files import append_row, atomic_write
from asibkd.run.commands import run_command
from asibkd.run.experiment import run_experiment

N = 1000
TAUS, BETAS = (1, 2, 4, 8, 16), (0, .001, .01, .1)

@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "Forty settings, 25 seeds each: the real run's files with other numbers"
    d = tmp_path_factory.mktemp('thousand')
    s = run_experiment(preset='none', dataset='digits', device='cpu', train_per_class=4, val_frac=.25, student_type='mlp', teacher1_type='mlp', teacher2_type='mlp', method='avgz',
                       compare=1, finetune_epochs=1, epochs=2, report=0, log_level='ERROR', results_dir=str(d/'one'))
    run, rng = Path(s['run']), random.Random(0)
    summary, config = (json.loads((run/f).read_text()) for f in ('summary.json', 'config.json'))
    rows = [json.loads(o) for o in (run/'metrics.jsonl').read_text().splitlines()]
    for i in range(N):
        seed, f = i//40, d/'results'/f'avgz-{i:04}'
        t = json.loads(json.dumps(summary)) | dict(seed=seed)
        for r in t['rows']: r |= {k: min(1, max(0, v + rng.gauss(0, .02))) for k, v in r.items() if k in ('val_acc', 'test_acc_val_selected', 'test_acc_last')}
        varied = dict(seed=seed, tau=TAUS[i % 5], batch_size=2**(3 + i//5 % 8), exp_id=f.name)
        for name, o in (('summary.json', t), ('config.json', config | varied)): atomic_write(f/name, json.dumps(o), checksum=True)
        for r in rows: append_row(f/'metrics.jsonl', r)
    return d/'results'

def cpu(do):
    "What it returns, and its seconds of this process's own time: other processes do not count"
    start = time.process_time()
    return do(), time.process_time() - start

def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e6 if sys.platform == 'darwin' else 1e3)

def test_compare(many, tmp_path, capsys):
    before = peak_mb()
    code, seconds = cpu(lambda: run_command('compare', [str(many), '--out', str(tmp_path)]))
    assert code == 0 and seconds < 15 and peak_mb() - before < 800                      # about 3 s where nothing else runs
    t = pd.read_csv(tmp_path/'compare.csv')
    rows = pd.read_csv(tmp_path/'compare_runs.csv')
    main = t[t.method.str.startswith('avgz')]
    assert len(main) == 40 and set(main.seeds) == {25}
    one = main.iloc[0]
    runs = [json.loads((Path(r)/'summary.json').read_text()) for r in rows[rows.label == one.method].run]
    accs = [next(r for r in s['rows'] if r['key'] == 'avgz')['test_acc_val_selected'] for s in runs]
    assert one['test % (selected)'].split(' ± ')[0] == f'{100*sum(accs)/25:.2f}'
    page = (tmp_path/'report.html').read_text()
    assert 'more were compared' in page and page.count('<img') == 2 and 'Of these 1000 runs' in page

def test_a_change_is_seen(many, tmp_path, capsys):
    "Nothing is remembered between two commands: there is no index that could be stale"
    from asibkd.analysis.compare import collect
    f = many/'avgz-0007'/'summary.json'
    old = f.read_text(); s = json.loads(old)
    next(r for r in s['rows'] if r['key'] == 'avgz')['test_acc_val_selected'] = .123
    few = [many/f'avgz-{i:04}' for i in (7, 47)]
    try:
        atomic_write(f, json.dumps(s), checksum=True)
        t = collect(*few); assert t[t.run == str(few[0])].test_acc_val_selected.round(6).isin([12.3]).any()
        f.write_text(old.replace('"seed"', '"seeds"', 1))                                # damaged: named and left out
        assert str(few[0]) not in set(collect(*few).run)
    finally: atomic_write(f, old, checksum=True)

def test_show_and_browser(many, monkeypatch, capsys):
    from asibkd.run.commands import newest
    name, seconds = cpu(lambda: newest(many)); assert Path(name).parent == many and seconds < 2
    assert cpu(lambda: run_command('show', [name]))[1] < 2 and 'Everything is in' in capsys.readouterr().out
    from asibkd import RunBrowser
    b, seconds = cpu(lambda: RunBrowser(str(many)))
    assert seconds < 15 and len(b.chosen.options) == N                                   # about 1 s
    b.query.value = 'avgz seed=1'
    assert len(b.chosen.options) == 40
