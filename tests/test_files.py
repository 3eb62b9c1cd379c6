"Files that are kept: written whole, checked when read back, closed until whole (faults.md A6, B4, B5, C3)"
import json, os, random, subprocess, sys, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from asibkd import load_runs, load_student, load_summary, run_experiment
from asibkd.analysis.report import save_report
from asibkd.analysis.tables import finished_runs, load_metrics
from asibkd.core import files, runfolder
from asibkd.core.config import Config, ConfigError, RunError, resolve
from asibkd.core.files import (FileDamaged, SUMS, append_row, atomic_save, atomic_write, check_folder, read_csv, read_json,
                               read_jsonl, read_weights, recorded_sums)
from asibkd.core.runfolder import Run
from asibkd.models.checkpoints import load_weights
from asibkd.models.tables import Table, table_bytes
from asibkd.trainers.callbacks import PhaseCheckpoint

TINY = dict(preset='quickstart', method='ce', compare=0, train_per_class=6, epochs=2, student_type='mlp', device='cpu', use_amp=0,
            finetune_epochs=0, teacher1_type='mlp', teacher2_type='mlp', disable_tqdm=1, log_level='WARNING', report=0)

@pytest.fixture(autouse=True)
def told(monkeypatch): monkeypatch.setattr(files, '_told', set())

@pytest.fixture
def said(monkeypatch):
    "What the package warned of"
    out = []
    for m in (files, runfolder): monkeypatch.setattr(m.log, 'warning', lambda text, *a: out.append(text))
    return out

def flip(path, at=None, bit=0):
    "Flip one bit of a file"
    raw = bytearray(Path(path).read_bytes()); raw[len(raw)//2 if at is None else at] ^= 1 << bit; Path(path).write_bytes(raw)

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished run; tests copy it"
    d = tmp_path_factory.mktemp('finished')
    return Path(run_experiment(**TINY, results_dir=str(d), exp_id='a')['run'])

@pytest.fixture
def run(finished, tmp_path):
    import shutil
    return Path(shutil.copytree(finished.parent, tmp_path/'r')/'a')

# --- A6 -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('end', ['.pt', '.pth', '.safetensors'])
@pytest.mark.parametrize('beside', [True, False])
def test_A6_a_flipped_bit_in_weights_is_named(tmp_path, end, beside):
    "With a checksum beside the file, and a zip archive also without one"
    f, state = tmp_path/f'w{end}', dict(w=torch.arange(64.))
    if end == '.safetensors':
        with files.atomic_path(f, checksum=True) as tmp: save_file(state, tmp)
    else: atomic_save(state, f)
    if not beside: (tmp_path/SUMS).unlink()
    assert read_weights(f)['w'].equal(state['w']) and load_weights(f)['w'].equal(state['w'])
    flip(f, f.read_bytes().index(state['w'].numpy().tobytes()) + 40)
    if end == '.safetensors' and not beside: return                    # nothing to compare with
    for read in (read_weights, load_weights):
        with pytest.raises(FileDamaged, match=f"w{end}' is damaged"): read(f)

def test_A6_a_kill_between_checksum_and_rename(tmp_path, monkeypatch):
    "The old file is whole, and known; then the new one"
    f = tmp_path/'w.pt'; atomic_save(dict(w=1), f)
    monkeypatch.setattr(files.os, 'replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): atomic_save(dict(w=2), f)
    monkeypatch.undo(); assert read_weights(f) == dict(w=1) and len(recorded_sums(f)) == 2
    atomic_save(dict(w=3), f); assert read_weights(f) == dict(w=3)

def test_A6_checksums_of_several_processes(tmp_path):
    "No line is lost where processes append at once"
    code = ('import sys\nfrom asibkd.core.files import add_sum\n'
            'for i in range(200): add_sum(sys.argv[1], f"{i:032x}", sys.argv[2])')
    ps = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path), n]) for n in 'abc']
    assert [p.wait() for p in ps] == [0, 0, 0]
    assert {n: len(s) for n, s in files.read_sums(tmp_path).items()} == dict(a=200, b=200, c=200)

def test_A6_a_damaged_checksum_line_condemns_no_file(tmp_path):
    atomic_write(tmp_path/'a.json', '{"a": 1}', checksum=True)
    for at in range(1, (tmp_path/SUMS).stat().st_size, 3):
        flip(tmp_path/SUMS, at); assert read_json(tmp_path/'a.json') == dict(a=1); flip(tmp_path/SUMS, at)

def test_A6_the_phase_before_is_taken(tmp_path, said):
    "A damaged checkpoint is named and set aside; what came after it goes with it, what came before it stays"
    with Run(Config(results_dir=str(tmp_path), exp_id='a')) as r:
        for n in ('A1', 'B1', 'A2'): PhaseCheckpoint(r, n).save(dict(n=n), done=True)
        flip(r/'checkpoint'/'B1.pt')
        assert [PhaseCheckpoint(r, n).load() for n in ('A1', 'B1', 'A2')] == [(dict(n='A1'), True), (None, False), (None, False)]
    assert len(said) == 1 and "B1.pt' is damaged" in said[0] and (r/'checkpoint'/'B1.pt.damaged').exists()

def test_A6_resume_with_a_damaged_checkpoint_gives_the_same_student(tmp_path, finished, said):
    class Stop(Exception): pass
    def stop(row):
        if row['epoch'] == 2: raise Stop
    with pytest.raises(Stop): run_experiment(**TINY, results_dir=str(tmp_path), exp_id='a', callbacks=[stop])
    flip(tmp_path/'a'/'checkpoint'/'B1.part.pt')
    again = Path(run_experiment(**TINY, results_dir=str(tmp_path), exp_id='a')['run'])
    a, b = (load_file(d/'student.safetensors') for d in (finished, again))
    assert any('B1.part.pt' in o for o in said) and all(v.equal(b[k]) for k, v in a.items())
    assert len(load_metrics(again)) == len(load_metrics(finished)) == 2

def test_A6_a_continual_run_goes_on_from_the_task_before(tmp_path, said):
    "The state of two tasks is damaged: the second is learnt again, and nothing differs"
    kw = TINY | dict(method='asmb', cl_mode=1, cl_method='er', num_tasks=3, epochs=1, replay_capacity=20, exp_id='a')
    class Stop(Exception): pass
    def stop(row):
        if row['phase'].startswith('t3'): raise Stop
    whole = run_experiment(**kw, results_dir=str(tmp_path/'whole'))
    with pytest.raises(Stop): run_experiment(**kw, results_dir=str(tmp_path/'cut'), callbacks=[stop])
    flip(tmp_path/'cut'/'a'/'checkpoint'/'tasks.pt')
    again = run_experiment(**kw, results_dir=str(tmp_path/'cut'))
    assert any('tasks.pt' in o for o in said) and again['R'] == whole['R']
    rows = [load_metrics(s['run']).drop(columns='seconds') for s in (whole, again)]
    pd.testing.assert_frame_equal(*rows)

@pytest.mark.parametrize('name', ['student.safetensors', 'student.json'])
def test_A6_a_damaged_student_is_not_deployed(run, name):
    flip(run/name)
    with pytest.raises(FileDamaged, match=name): load_student(run)

def test_A6_a_damaged_row_of_a_table_is_named_and_written_again(tmp_path, said):
    f = tmp_path/'t.rows'; f.touch(); os.truncate(f, table_bytes(8, 3))
    t, rows, v = Table(8, 3, path=f), torch.arange(8), torch.arange(24.).view(8, 3)
    t.write(rows, v)
    flip(f, 4*t.words*5 + 5)
    t = Table(8, 3, path=f); assert t.read(rows)[1].tolist() == [i != 5 for i in range(8)]
    t.write(rows[5:6], v[5:6]); t.write(rows[5:6], v[5:6])
    assert t.read(rows)[1].all() and t.read(rows)[0].equal(v.half()) and len(said) == 1 and 't.rows' in said[0]

def test_A6_a_row_of_metrics(tmp_path, said):
    "A digit, a row's end, a bracket: named, and the other rows are read"
    f = tmp_path/'metrics.jsonl'
    for i in range(4): append_row(f, dict(epoch=i, acc=.25))
    whole = f.read_bytes()
    for at in range(len(whole)):
        f.write_bytes(whole); flip(f, at, bit=1); said.clear(); files._told.clear()
        rows = read_jsonl(f, strict=False)
        assert said and all(r in [dict(epoch=i, acc=.25) for i in range(4)] for r in rows), at

# --- B4 -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('text', ['', '{"acc": 0.', '[]', 'null', '{"rows": [{}], "method": "ce"}', '{"rows": [], "x": 1}', b'\xff\xfe'])
def test_B4_broken_summaries(run, said, text):
    "Named where one is meant, left out where many are"
    other = run.parent/'b'; other.mkdir(); (other/'config.json').write_text('{}')
    (other/'summary.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileDamaged, match="summary.json' is damaged"): load_summary(other)
    assert [d.name for d, *_ in finished_runs(run.parent)] == ['a'] and any("Run 'b' is left out" in o for o in said)

def test_B4_a_number_changed_in_a_summary_enters_no_mean(run, said):
    "It is shown with a warning"
    f = run/'summary.json'; s = json.loads(f.read_text()); f.write_text(f.read_text().replace(str(s['test_acc_last']), '0.99'))
    assert load_summary(run)['test_acc_last'] == .99 and 'checksum' in said[0]
    with pytest.raises(RunError, match='No finished run'): load_runs(run.parent)

@pytest.mark.parametrize('text', ['name,price\nchair,20\n', '', 'exp_id,acc\n"a,1\nb', b'exp_id\ncaf\xe9\n', b'\x00'*100])
def test_B4_a_foreign_summary_csv_is_set_aside(tmp_path, said, text):
    shared = tmp_path/'summary.csv'; shared.write_bytes(text if isinstance(text, bytes) else text.encode())
    with Run(Config(results_dir=str(tmp_path), exp_id='a')) as r: r.finish(dict(acc=.5), dict(acc=.5))
    assert r.finished and pd.read_csv(shared).exp_id.tolist() == ['a'] and (tmp_path/'summary.csv.damaged').exists()
    assert any('summary.csv.damaged' in o for o in said)

def test_B4_a_folder_in_place_of_summary_csv(tmp_path, said):
    (tmp_path/'summary.csv').mkdir()
    with Run(Config(results_dir=str(tmp_path), exp_id='a')) as r: r.finish(dict(acc=.5), dict(acc=.5))
    assert r.finished and pd.read_csv(tmp_path/'summary.csv').exp_id.tolist() == ['a']

def test_B4_a_full_disk_after_the_training(tmp_path, monkeypatch, said):
    "freeze_report.csv and summary.csv cannot be written: the results are there, and the row comes later"
    real = os.fsync
    def full(f):
        name = os.readlink(f'/proc/self/fd/{f}')
        if 'freeze_report' in name or 'summary.csv' in name: raise OSError(28, 'No space left on device')
        real(f)
    monkeypatch.setattr(files.os, 'fsync', full)
    s = run_experiment(**TINY | dict(epochs=1), results_dir=str(tmp_path), exp_id='a')
    assert (tmp_path/'a'/'summary.json').exists() and not (tmp_path/'summary.csv').exists()
    assert any('freeze_report.csv' in o and 'No space left' in o for o in said) and any('summary.csv could not' in o for o in said)
    monkeypatch.setattr(files.os, 'fsync', real)
    again = run_experiment(**TINY | dict(epochs=1), results_dir=str(tmp_path), exp_id='a')
    assert again == s and pd.read_csv(tmp_path/'summary.csv').exp_id.tolist() == ['a']

def test_B4_names_that_utf8_cannot_hold(tmp_path):
    "A folder name in latin-1 becomes an escape in JSON, and is read back as it was"
    name = os.fsdecode(b'caf\xe9')
    atomic_write(tmp_path/'student.json', json.dumps(dict(classes=[name]), ensure_ascii=False), checksum=True)
    assert read_json(tmp_path/'student.json') == dict(classes=[name])

def test_B4_predictions(run, said):
    "The report is written without them, and says why"
    flip(run/'predictions.safetensors')
    assert "predictions.safetensors' is damaged" in save_report(run).read_text().replace('&#39;', "'").replace('&#x27;', "'")

# --- B5 -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('step', ['add_to_table', 'report'])
def test_B5_closing_is_repeated_until_it_is_whole(tmp_path, monkeypatch, step):
    "A kill anywhere after summary.json; the same command closes the run"
    import asibkd.run.experiment as door
    kw = TINY | dict(report=1, epochs=1, results_dir=str(tmp_path), exp_id='a')
    def killed(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(*((Run, 'add_to_table') if step == 'add_to_table' else (door, 'save_report')), killed)
    with pytest.raises(KeyboardInterrupt): run_experiment(**kw)
    a = tmp_path/'a'; assert (a/'summary.json').exists() and not (a/'report.html').exists()
    before = (a/'summary.json').read_bytes()
    monkeypatch.undo(); run_experiment(**kw)
    assert (a/'report.html').exists() and not list((a/'checkpoint').iterdir()) and (a/'summary.json').read_bytes() == before
    assert pd.read_csv(tmp_path/'summary.csv').exp_id.tolist() == ['a']

def test_B5_stray_temporary_files_are_swept(tmp_path):
    a = tmp_path/'a'
    with Run(Config(results_dir=str(tmp_path), exp_id='a')):
        (a/'checkpoint').mkdir()
        for f in (a/'.summary.json.4711.tmp', a/'checkpoint'/'.B1.pt.4711.tmp', a/'.keep.tmp'): f.write_text('x')
    with Run(Config(results_dir=str(tmp_path), exp_id='a')):
        assert [f.name for f in a.rglob('*.tmp')] == ['.keep.tmp']

def test_B5_synced_before_the_rename(tmp_path, monkeypatch):
    order, sync, move = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, 'fsync', lambda f: (order.append('sync'), sync(f)))
    monkeypatch.setattr(files.os, 'replace', lambda *a: (order.append('rename'), move(*a)))
    atomic_write(tmp_path/'a.json', '{}', checksum=True)
    assert order == ['sync', 'sync', 'rename', 'sync']                  # file, checksums, the folder

# --- config.json, C3 ------------------------------------------------------------------------------------------------
def test_A6_a_damaged_config_is_not_resumed_from(tmp_path):
    c = dict(results_dir=str(tmp_path), exp_id='a')
    Run(Config(**c)).open().close()
    f = tmp_path/'a'/'config.json'; flip(f, f.read_bytes().index(b'"seed": 42') + 9)
    with pytest.raises(FileDamaged, match='config.json.*resume=0'): Run(Config(**c)).open()
    with Run(Config(**c, resume=0)): assert read_json(f)['seed'] == 42
    assert (tmp_path/'a~1'/'config.json').exists()

@pytest.mark.parametrize('key, name', [*(('log_filename', n) for n in ('summary.json', 'Config.JSON', 'metrics.jsonl', 'student.safetensors',
    'checksums.txt', 'report.html', '../x.log', '/tmp/x.log', 'a/b.log', '.lock', 'checkpoint')),
    *(('exp_id', n) for n in ('summary.csv', 'evaluation.csv', 'teachers', 'teacher_cache', 'a.lock', 'checksums.txt'))])
def test_C3_own_names_are_refused(key, name):
    with pytest.raises(ConfigError, match=key): resolve(**{key: name})

# --- must show 3, a small sample ------------------------------------------------------------------------------------
def test_flips_in_a_finished_run(run, said):
    "Each is named, or harmless; `tests/flip_bits.py` tries hundreds, with a run that is resumed"
    draw = random.Random(3)
    assert not check_folder(run)
    for f in sorted(o for o in run.iterdir() if o.suffix in ('.json', '.jsonl', '.csv', '.safetensors')):
        for _ in range(6):
            whole = f.read_bytes(); flip(f, draw.randrange(len(whole)), draw.randrange(8))
            assert any(f.name in o for o in check_folder(run)), f
            f.write_bytes(whole)
    assert not check_folder(run)
