"`asibkd bench` measures every part, small, and says on what; no number is judged here."
import pandas as pd

def test_bench(asibkd, tmp_path, folder):
    r = asibkd('bench', '--quick', '--rounds', 1, '--out', 'b.csv'); assert r.returncode == 0, r.stderr[-2000:]
    t = pd.read_csv(tmp_path/'b.csv')
    assert {*t.part} == {'pipeline', 'precision', 'loop', 'cache', 'peers', 'growth', 'parts', 'start'} and t.machine.notna().all() and (t.img_s.dropna() > 0).all()
    assert 'bench growth: part 6 of 8' in r.stdout                  # it says where it is
    first = t[t.ratio.notna()].groupby(['part', 'of']).ratio.first(); assert (first == 1).all()       # ratios are to the first case
    assert 'looked up' in r.stdout and 'Written: b.csv' in r.stdout

def test_wrong_words(asibkd, tmp_path):
    for args, says in ((['cahce'], "Did you mean 'cache'"), (['pipeline', '--data_root', 'nowhere'], 'train/<class>')):
        r = asibkd('bench', *args); assert r.returncode == 2 and says in r.stderr and 'Traceback' not in r.stderr

def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    "Stopped in its second part, the file has the first"
    import pytest
    from asibkd.run import bench
    def stop(**kw): raise KeyboardInterrupt
    monkeypatch.setitem(bench.PARTS, 'parts', stop)
    with pytest.raises(KeyboardInterrupt): bench.run_bench(['start', 'parts'], quick=True, rounds=1, out=tmp_path/'b.csv')
    t = pd.read_csv(tmp_path/'b.csv')
    assert set(t.part) == {'start'} and t.machine.notna().all() and (t.ms > 0).all()
