"What is typed, what stands in files, and what the command answers: each entry states the value or the sentence."
import json, os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]

def test_help_imports_almost_nothing():
    "`asibkd --help` costs what Python costs: under 0.4 s of CPU, start included"
    code = 'import sys; before = {*sys.modules}\nfrom asibkd.run.cli import main\nmain(["--help"])\n' \
           'print("LOADED", sorted({o.split(".")[0] for o in {*sys.modules} - before}))'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
    text, _, loaded = r.stdout.partition('LOADED ')
    assert text.startswith('usage: asibkd COMMAND') and 'asibkd' in loaded, r.stderr
    assert not any(o in loaded for o in ('pydantic', 'yaml', 'argparse', 'logging', 'fastcore', 'torch')), loaded

# B6: values of the wrong kind, in a file or typed

def refused(text, tmp_path, **given):
    "The message for a parameter file with this content"
    from asibkd import ConfigError, resolve
    f = tmp_path/'mine.yaml'
    f.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as e: resolve(str(f), **given)
    return str(e.value)

def read(text, tmp_path, **given):
    from asibkd import resolve
    f = tmp_path/'mine.yaml'
    f.write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolve(str(f), **given)[0]

@pytest.mark.parametrize('text,words', {
    'method: [ce, dkd]': ("Parameter 'method' = ['ce', 'dkd']", 'Give one value, not a list', '`asibkd loop --methods ce,dkd` runs several'),
    'cl_mode: 1\ncl_method: [er, ewc]': ("Parameter 'cl_method' = ['er', 'ewc']", 'asibkd loop --methods er,ewc'),
    'method: {ce: 1}': ("Parameter 'method' =", 'not a dict'),
    'log: 3': ('log = 3: expected log_level and log_filename', ), 'log: [INFO]': ("log = ['INFO']: expected log_level", ),
    'plugin: 3': ('plugin = 3: expected the path of a Python file', ), 'plugin: {a: b}': ("plugin = {'a': 'b'}: expected", ), 'plugin: [[a.py]]': ("plugin = [['a.py']]: expected", ),
    'preset: 3': ('preset = 3: expected a name', 'quickstart'), 'preset: {a: 1}': ("preset = {'a': 1}: expected a name", ), 'preset: [[a]]': ("Unknown preset '['a']'", ),
    '1: seed': ("Unknown parameter '1'", ), 'yes: 3': ("Unknown parameter 'yes'", ), '~: 3': ("Unknown parameter '~'", ), 'on: quickstart': ("Unknown parameter 'on'. Did you mean 'preset'?", ),
    '? [a, b]\n: 3': ('a key must be one word (line 1)', ), 'seed: 1\nepochs: 2\nseed: 3': ("'seed' stands twice (line 3)", ),
    'with_digits: 3': ('with_digits = 3: expected lines of `key: value` below it', ),
    'seed:': ("Parameter 'seed' = None", 'It is empty: give a value, or leave it out'),
    'student_lr: .inf': ("Parameter 'student_lr' = '.inf'", ), 'student_lr: inf': ('a finite number', ), 'tau_start: nan': ('a finite number', ), 'ib_beta: 1e999': ('a finite number', ), 'seed: inf': ('a finite number', ),
    'epochs: [1]': ("Parameter 'epochs' = [1]", 'Give one value, not a list'), 'student_lr: {a: 1}': ("Parameter 'student_lr' =", 'not a dict'), 'milestones: [1, x]': ("Parameter 'milestones[1]' = 'x'", ),
    'compare: maybe': ("Parameter 'compare' = 'maybe'", ), 'student_lr: yes': ("Parameter 'student_lr' = 'yes'", ), 'class_order: [a, ~]\ncl_mode: 1': ("Parameter 'class_order[1]' = None", ),
    'model: {teacher: {freeze_level: 1}}': ("Unknown parameter 'model'", ),
    '{': ('is no valid YAML', '(line 1)'), '- a\n- b': ('holds a list; expected lines of `key: value`', ), 'seed': ('holds a str; expected lines', ), 'seed: "a\tb': ('is no valid YAML', ),
    '{a: ' * 2000: ('is no valid YAML', ), 'a: !!python/object/apply:os.system [ls]': ('is no valid YAML: could not determine a constructor', )}.items())
def test_B6_yaml_of_the_wrong_kind_names_key_and_remedy(text, words, tmp_path):
    message = refused(text, tmp_path)
    assert all(w in message for w in words), message

@pytest.mark.parametrize('raw,words', {
    'seed: 1\ndata_root: für'.encode('latin-1'): ("mine.yaml' is not UTF-8 text (line 2, byte 0xfc)", 'iconv'),
    b'PK\x03\x04\x80\x81': ('is not UTF-8 text', ), b'seed: \x00': ('is no valid YAML', )}.items())
def test_B6_a_file_that_is_no_utf8(raw, words, tmp_path):
    message = refused(raw, tmp_path)
    assert all(w in message for w in words), message

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_B6_what_windows_writes_is_read(encoding, tmp_path):
    assert read('preset: none\ndata_root: für\n'.encode(encoding), tmp_path).data_root == 'für'

def test_B6_names_that_yaml_takes_for_something_else(tmp_path):
    names = ['no', 'yes', 'off', 'on', 'Y', '007', '010', '1_000', '12:30', '1e3', '1.50', '2026-11-25', '0x10', 'true', '3']
    assert read(f"cl_mode: 1\nclass_order: [{', '.join(names)}]", tmp_path).class_order == names
    assert read('cl_mode: 1\nclass_order:\n- "null"\n- "a, b"\n', tmp_path).class_order == ['null', 'a, b']
    c = read('preset: none\nexp_id: 007\nteacher_cache: off\nuse_ib: off\ncompare: yes\nsmall_input: no\nseed: 010\nmin_lr: 1e-5\nstudent_type: 18', tmp_path)
    assert (c.exp_id, c.teacher_cache, c.use_ib, c.compare, c.small_input, c.seed, c.min_lr, c.student_type) == ('007', 'off', False, True, '0', 10, 1e-5, '18')

@pytest.mark.parametrize('typed,names', {
    'no, yes, off': ['no', 'yes', 'off'], "['no', 'yes']": ['no', 'yes'], '["rock, paper", b]': ['rock, paper', 'b'], '"a b",c': ['a b', 'c'], "it's, 'n' roll": ["it's", "'n' roll"], '[]': []}.items())
def test_B6_quotes_inside_lists(typed, names):
    from asibkd import resolve
    assert resolve(cl_mode=1, class_order=typed)[0].class_order == names

def test_B6_objects_of_python(tmp_path):
    import numpy as np
    from asibkd import ConfigError, resolve
    c = resolve(preset='none', data_root=tmp_path, seed=np.int64(3), student_lr=np.float32(.5), exp_id=7, tau_end='none', milestones=(1, 2), data_aug=np.bool_(False))[0]
    assert (c.data_root, c.seed, c.student_lr, c.exp_id, c.tau_end, c.milestones, c.data_aug) == (str(tmp_path), 3, .5, '7', None, [1, 2], '0')
    for given, words in ((dict(class_order=['a', False], cl_mode=1), 'put it in quotes'), (dict(student_lr=True), 'not a switch'), (dict(seed=True), 'not a switch'), (dict(tau_start=float('nan')), 'finite'), (dict(data_aug=float('inf')), 'data_aug')):
        with pytest.raises(ConfigError, match=words): resolve(**given)

def test_B6_a_method_of_ones_own_is_read_alike():
    from asibkd import ConfigError, Params, param, resolve
    from asibkd.core.config import method_params
    class Knobs(Params):
        sharpness:float | None = param(None, "How sharp.")
    method_params['sharp'] = Knobs
    try:
        assert resolve(method='sharp', sharpness='none')[1] == dict(sharpness=None)
        with pytest.raises(ConfigError, match='finite number'): resolve(method='sharp', sharpness='inf')
    finally: del method_params['sharp']

def test_B6_a_plugin_that_exits_is_named(tmp_path):
    from asibkd import ConfigError, resolve
    (tmp_path/'mine.py').write_text('import sys; sys.exit(0)')
    with pytest.raises(ConfigError, match='failed: SystemExit: 0'): resolve(plugin=str(tmp_path/'mine.py'))

def command(*argv):
    "(exit code, what it printed), in this process"
    import contextlib, io
    from asibkd.run.cli import main
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): code = main([*map(str, argv)])
    return code, out.getvalue()

@pytest.mark.parametrize('argv', [['run', '--seed'], ['run', '--seed', '--epochs', '3'], ['run', '--exp_id'], ['run', '-f'], ['loop', '--methods'], ['run', '--student_lr', '--compare']])
def test_B6_a_number_without_a_value_is_not_1(argv):
    code, text = command(*argv)
    assert code == 2 and 'needs a value' in text

# C3: names of files

@pytest.mark.parametrize('name', ['../a.log', 'a/b.log', '/tmp/a.log', '.hidden', '..', 'summary.json', 'Summary.JSON', 'config.json', 'metrics.jsonl', 'student.safetensors', 'checkpoint',
                                  'checksums.txt', 'report.html', 'freeze_report.csv', 'memory.safetensors', 'teacher1_adapted.pth', 'a\nb.log', 'run.ipynb'])
def test_C3_log_filename_stays_in_the_folder_and_overwrites_nothing(name):
    from asibkd import ConfigError, resolve
    with pytest.raises(ConfigError, match="Parameter 'log_filename'"): resolve(log_filename=name)

@pytest.mark.parametrize('name', ['', 'train.log', 'train', 'log.txt', 'a=1.log'])
def test_C3_names_that_are_free(name):
    from asibkd import resolve
    assert resolve(log_filename=name)[0].log_filename == name

@pytest.mark.parametrize('name', ['summary.csv', 'evaluation.csv', 'teachers', 'teacher_cache', 'compare', 'summary.csv.lock', 'checksums.txt', '../a', '', 'a b'])
def test_C3_a_run_folder_takes_no_name_of_the_results_folder(name):
    from asibkd import ConfigError, resolve
    with pytest.raises(ConfigError, match="Parameter 'exp_id'"): resolve(exp_id=name)

# A8, B7: several runs

FAST = dict(preset='none', dataset='digits', device='cpu', use_amp=0, train_per_class=4, batch_size=20, val_frac=.25, data_aug=0, student_type='mlp', teacher1_type='mlp', teacher2_type='mlp',
            finetune_epochs=1, epochs=1, num_stages=1, report=0, log_level='ERROR', disable_tqdm=1)

def options(**params): return [f'{k}={v}' for k, v in params.items()]

@pytest.fixture(scope='module')
def loop(tmp_path_factory):
    "ce runs; at needs feature maps, which an mlp has not"
    d = tmp_path_factory.mktemp('loop')
    return d, command('loop', *options(**FAST, results_dir=d), '--methods', 'at, ce', '--seeds', '1 2', '--baseline', 'ce')

def test_B7_a_loop_goes_on_after_a_failure(loop):
    d, (code, text) = loop
    table, _, listed = text.partition('asibkd: 2 of 4 runs failed. The 2 others are finished. The same command tries the failed ones again.')
    assert code == 2 and '| ce |' in table.replace('  ', ' ') or 'ce' in table, text
    assert [o.split(':')[0].strip() for o in listed.strip().splitlines()] == ['method=at seed=1', 'method=at seed=2'], text
    assert listed.count('ConfigError: ') == 2 and (d/'compare'/'compare.csv').exists()

def test_B7_in_python_the_finished_summaries_are_kept(loop):
    from asibkd.run.loops import LoopError, run_loop
    d, _ = loop
    with pytest.raises(LoopError) as e: run_loop('at ce', '1', **FAST, results_dir=str(d))
    assert [s['method'] for s in e.value.summaries] == ['ce'] and [*e.value.failed] == ['method=at seed=1']

def test_B7_an_error_of_any_kind(monkeypatch, tmp_path, capsys):
    "A fault in the code of a user's method: its traceback is logged, the next run starts"
    from asibkd.run import loops, plans
    def fails(**p):
        if p['seed'] == '1': raise ZeroDivisionError('mine')
        return dict(run='r', seed=p['seed'])
    monkeypatch.setattr(plans, 'run_experiment', fails)
    with pytest.raises(loops.LoopError, match='1 of 3 runs failed') as e: loops.run_loop('ce', '0 1 2', **FAST)
    assert [s['seed'] for s in e.value.summaries] == ['0', '2'] and e.value.failed == {'method=ce seed=1': 'ZeroDivisionError: mine'}
    def stopped(**p): raise KeyboardInterrupt
    monkeypatch.setattr(plans, 'run_experiment', stopped)
    with pytest.raises(KeyboardInterrupt): loops.run_loop('ce', '0 1 2', **FAST)

def test_A8_a_folder_that_is_not_there_is_an_error(loop, tmp_path, monkeypatch):
    d, _ = loop
    monkeypatch.chdir(tmp_path)
    for argv in (['compare', d, 'doesnotexist'], ['compare', 'doesnotexist', d], ['report', d, 'doesnotexist', '--out', tmp_path/'r.html'], ['compare']):
        code, text = command(*argv)
        assert code == 2 and ("'doesnotexist'" in text or len(argv) == 1), text
    assert command('show', 'doesnotexist')[0] == command('export', 'doesnotexist')[0] == 2

def finished(folder, name, method, dataset, seed, acc, **summary):
    "A run folder as a finished run leaves it, as far as a comparison reads it"
    from asibkd import resolve
    d = folder/name
    d.mkdir(parents=True)
    row = dict(key=method, role='student', val_acc=acc, test_acc_val_selected=acc, test_acc_last=acc, train_acc=acc, params=9, model='mlp', macs=1)
    (d/'summary.json').write_text(json.dumps(dict(kind='distil', method=method, dataset=dataset, seed=seed, rows=[row]) | summary))
    config = dict(method=method, dataset=dataset, seed=seed, data_root=summary.get('root', ''))
    (d/'config.json').write_text(json.dumps(resolve(preset='none')[0].model_dump() | config))

def test_A8_no_difference_across_datasets(tmp_path):
    from asibkd import collect, compare_runs, win_table
    from asibkd.analysis.compare import compare_notes
    for seed in (1, 2, 3):
        finished(tmp_path, f'a{seed}', 'ce', 'digits', seed, .90 + seed/90)
        finished(tmp_path, f'b{seed}', 'dkd', 'cifar10', seed, .50 + seed/100)
        finished(tmp_path, f'c{seed}', 'avgz', 'digits', seed, .80 + seed/100)
    runs = collect(tmp_path)
    t = compare_runs(runs, 'avgz').set_index('method')
    assert [*t.index] == ['dkd on cifar10', 'ce on digits', 'avgz on digits']
    assert t['vs avgz'].tolist() == ['', '+10.22 ± 0.28', ''] and t.verdict.tolist() == ['other data', 'better', '']
    assert win_table(runs).set_index('method').loc['dkd on cifar10'].tolist() == ['']*3
    assert any('a difference is taken within one dataset only' in o for o in compare_notes(runs))

def test_A8_photographs_of_two_folders_are_two_datasets(tmp_path):
    from asibkd import RunError, ablation_table, collect
    for seed in (1, 2):
        for root, n in (('cats', 3), ('birds', 5)):
            finished(tmp_path, f'{root}{seed}', 'ce', 'imagefolder', seed, .5, n_class=n, images=dict(test=40), root=f'x/{root}')
    assert set(collect(tmp_path).label) == {'ce on imagefolder cats (3 classes, 40 test images)', 'ce on imagefolder birds (5 classes, 40 test images)'}
    finished(tmp_path, 'd1', 'ce', 'digits', 1, .5)
    with pytest.raises(RunError, match='within one dataset only'): ablation_table(str(tmp_path))

# The doctor

def flip(f, at=.5):
    raw = bytearray(f.read_bytes())
    raw[int(len(raw)*at)] ^= 1
    f.write_bytes(raw)

@pytest.fixture
def whole(loop, tmp_path):
    "A finished run of one's own"
    import shutil
    run = next(f.parent for f in sorted(loop[0].glob('ce-*/summary.json')))
    return Path(shutil.copytree(run, tmp_path/'runs'/'a'))

def test_doctor_a_whole_run(whole):
    code, text = command('doctor', whole)
    assert code == 0 and 'It is finished and closed' in text and 'Nothing is wrong.' in text
    assert command('doctor', whole.parent)[0] == 0 and command('doctor', whole/'student.safetensors')[0] == 0

@pytest.mark.parametrize('name', ['student.safetensors', 'student_last.safetensors', 'predictions.safetensors', 'summary.json', 'config.json', 'env.json', 'metrics.jsonl', 'student.json', 'freeze_report.csv'])
def test_doctor_names_one_flipped_bit(whole, name):
    flip(whole/name)
    code, text = command('doctor', whole)
    assert code == 1 and name in text and 'is damaged' in text, text

def test_doctor_names_what_is_missing_and_what_to_do(whole):
    (whole/'student.json').unlink()
    code, text = command('doctor', whole)
    assert code == 1 and "student.json' is missing. Copy it from where the run was made." in text
    (whole/'summary.json').unlink()
    code, text = command('doctor', whole)
    assert 'It is not finished: `asibkd run -f' in text

def test_doctor_looks_at_images(tmp_path):
    from PIL import Image
    for i, f in enumerate(f'{s}/{c}/{n}.png' for s in ('train', 'test') for c in ('cat', 'dog') for n in range(3)):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (9, 9), (20*i, 0, 0)).save(tmp_path/f)
    code, text = command('doctor', tmp_path)
    assert code == 0 and '6 photos of 2 classes' in text, text
    (tmp_path/'test'/'cat'/'0.png').write_bytes((tmp_path/'train'/'cat'/'0.png').read_bytes())
    code, text = command('doctor', tmp_path)
    assert code == 0 and 'in train/ and in test/' in text
    (tmp_path/'train'/'dog'/'1.png').write_bytes(b'no image')
    assert command('doctor', tmp_path)[0] == 1

def test_doctor_of_nothing(tmp_path):
    code, text = command('doctor', tmp_path/'nowhere')
    assert code == 2 and 'neither a folder nor a file' in text
    assert command('doctor', tmp_path)[0] == 1          # an empty folder holds no train/

def test_doctor_of_another_programs_folder(tmp_path):
    (tmp_path/'x').mkdir()
    (tmp_path/'x'/'summary.json').write_text('{"loss": 1}')
    code, text = command('doctor', tmp_path)
    assert code == 0 and "another program's" in text
    (tmp_path/'x'/'summary.json').write_text('{"kind": "dis')
    code, text = command('doctor', tmp_path)
    assert code == 1 and text.count('✗') == 1 and 'summary.json' in text
