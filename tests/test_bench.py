"`asibkd bench` measures every part, small, and says on what; no number is judged here."
import pandas as pd

def test_bench(asibkd, tmp_path, folder):
    r = asibkd('bench', '--quick', '--rounds', 1, '--out', 'b.csv'); assert r.returncode == 0, r.stderr[-2000:]
    t = pd.read_csv(tmp_path/'b.csv')
    assert {*t.part} == {'pipeline', 'precision', 'loop', 'cache', 'peers', 'growth', 'parts'} and t.machine.notna().all() and (t.img_s.dropna() > 0).all()
    first = t[t.ratio.notna()].groupby(['part', 'of']).ratio.first(); assert (first == 1).all()       # ratios are to the first case
    assert 'looked up' in r.stdout and 'Written: b.csv' in r.stdout

def test_wrong_words(asibkd, tmp_path):
    for args, says in ((['cahce'], "Did you mean 'cache'"), (['pipeline', '--data_root', 'nowhere'], 'train/<class>')):
        r = asibkd('bench', *args); assert r.returncode == 2 and says in r.stderr and 'Traceback' not in r.stderr
