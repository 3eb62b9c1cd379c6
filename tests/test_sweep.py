"""`asibkd sweep`: what is refused, workers that share a storage, one of them killed; a real PostgreSQL (slow)."""
import json, os, shlex, shutil, signal, subprocess, tempfile, time
from pathlib import Path

import pytest

from asibkd.core.config import ConfigError
from asibkd.run.space import list_sweeps
from asibkd.run.sweep import do_trial, next_trial, open_study, plan_sweep, superseded, work_on
from asibkd.run.sweeps import best_trial, run_sweep, save_sweep_report

pytest.importorskip('optuna')
SMALL = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, train_per_class=4, val_frac=.25, student_type='mlp', method='ce', data_aug=0, epochs=2, log_level='ERROR', report=0)
NETS = SMALL | dict(student_type='resnet8', teacher1_type='resnet8', teacher2_type='resnet8', finetune_epochs=1, num_stages=1, teacher_adapt_epochs=1, student_epochs_per_stage=1, epochs=0)

def counted(sweep):
    "Trials by number, without those that were taken up again"
    trials = open_study(sweep).get_trials(deepcopy=False)
    gone = superseded(trials)
    return [t for t in trials if t.number not in gone]

@pytest.fixture(scope='module')
def postgres():
    "A real server on the loopback address"
    if not os.environ.get('ASIBKD_SLOW'): pytest.skip('ASIBKD_SLOW=1: starts a PostgreSQL')
    found = sorted(Path('/usr/lib/postgresql').glob('*/bin')) if os.geteuid() == 0 else []
    if not found: pytest.skip('needs the Debian package postgresql, and to be root')
    d, as_user = Path(tempfile.mkdtemp(dir='/tmp')), ['runuser', '-u', 'postgres', '--']
    shutil.chown(d, 'postgres', 'postgres')
    port = 20_000 + os.getpid() % 20_000
    subprocess.run([*as_user, found[-1]/'initdb', '-D', d/'db', '-A', 'trust'], check=True, capture_output=True, cwd='/tmp')
    subprocess.run([*as_user, found[-1]/'pg_ctl', '-D', d/'db', '-w', '-l', d/'log', '-o', f'-p {port} -k {d} -h 127.0.0.1', 'start'], check=True, cwd='/tmp', stdout=subprocess.DEVNULL)
    yield f'postgresql://postgres@127.0.0.1:{port}/postgres'
    subprocess.run([*as_user, found[-1]/'pg_ctl', '-D', d/'db', '-m', 'immediate', 'stop'], cwd='/tmp', stdout=subprocess.DEVNULL)
    shutil.rmtree(d, ignore_errors=True)

@pytest.mark.parametrize('kind', ['sqlite', 'journal', 'postgresql'])
def test_two_workers_one_killed(tmp_path, door, request, kind):
    "No trial is lost or done twice; the one whose worker was killed goes on in its run folder; the best command runs"
    if not os.environ.get('ASIBKD_SLOW'): pytest.skip('ASIBKD_SLOW=1: a minute or more')
    url = request.getfixturevalue('postgres') if kind == 'postgresql' else 'sqlite:///s.db' if kind == 'sqlite' else 'journal:s'
    given = SMALL | dict(epochs=120, student_lr='log(1e-4,1e-1)', label_smoothing='choice(0,0.1)', trials=5, sampler='random', storage=url, results_dir=str(tmp_path/'r'), study='s')
    argv = ['sweep', *(f'{k}={v}' for k, v in given.items())]
    os.chdir(tmp_path)                                                  # the storage is named from here
    one, two = (door.start(*argv, cwd=tmp_path) for _ in range(2))
    sweep, end = plan_sweep(**given), time.time() + 200
    def mine(): return [t for t in counted(sweep) if t.state.name == 'RUNNING' and t.user_attrs['worker']['pid'] == one.pid and 'params' in t.user_attrs]
    while not (hit := mine()):
        assert time.time() < end and one.poll() is None
        time.sleep(.02)
    one.send_signal(signal.SIGKILL)
    out, err = two.communicate(300)
    assert two.returncode == 0, err
    done = counted(sweep)
    assert [t.state.name for t in done] == ['COMPLETE']*5 and len({json.dumps(t.params) for t in done}) == 5
    again = [t for t in done if t.system_attrs.get('retry_history')]
    assert [t.params for t in again] in ([hit[0].params], []) and len({t.user_attrs['run'] for t in done}) == 5
    assert len([*Path(tmp_path/'r').glob('*/summary.json')]) == 5
    command = out[out.index('best command:'):].splitlines()[1].strip()
    o = door(*shlex.split(command)[1:], 'log_level=INFO', cwd=tmp_path)
    assert o.returncode == 0 and 'is finished: nothing was run again' in o.stdout, o.stdout + o.stderr
    more = run_sweep(**given | dict(trials=6))                          # the study goes on
    assert [t['state'] for t in more['trials']] == ['complete']*6 and 'Parallel coordinates' in (Path(more['folder'])/'report.html').read_text()

@pytest.fixture(autouse=True)
def back():
    here = os.getcwd()
    yield
    os.chdir(here)

@pytest.mark.parametrize('name, trials', [('asmb_grid', 2), ('asmb_mixed', 1), ('overlap_grid', 1)])
def test_the_files_of_the_package_run(tmp_path, name, trials):
    found = run_sweep(name, **{k: v for k, v in NETS.items() if k != 'method'}, trials=trials, results_dir=str(tmp_path))
    assert [t['state'] for t in found['trials']] == ['complete']*trials and set(list_sweeps()) == {'asmb_grid', 'asmb_mixed', 'overlap_grid'}

def test_objective_is_validation_and_a_failing_trial_stops_no_other(tmp_path):
    "A grid, every point once, in order; one network does not exist"
    found = run_sweep(**SMALL | dict(student_type='choice(mlp,mpl,mlp400)', sampler='grid', results_dir=str(tmp_path)))
    assert [(t['values']['student_type'], t['state']) for t in found['trials']] == [('mlp', 'complete'), ('mpl', 'fail'), ('mlp400', 'complete')]
    best, good = best_trial(found), [t for t in found['trials'] if t['run']]
    assert best['val_acc'] == max(json.loads((Path(t['run'])/'summary.json').read_text())['val_acc'] for t in good)
    page = save_sweep_report(found['folder'], tmp_path/'page.html').read_text()
    assert 'trial 1 failed: ConfigError' in page and 'did you mean' in page.lower()

def test_a_stopped_trial_is_put_back(tmp_path, monkeypatch):
    "Ctrl-C within a trial: the next worker has the same parameters, and its run folder"
    from asibkd.run import sweep as module
    sweep = plan_sweep(**SMALL | dict(student_lr='log(1e-4,1e-1)', trials=2, results_dir=str(tmp_path)))
    study = open_study(sweep)
    trial, _ = next_trial(study, sweep)
    with monkeypatch.context() as m:
        m.setattr(module, 'run_experiment', lambda **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): do_trial(study, trial, sweep)
    work_on(sweep)
    first, again, other = open_study(sweep).get_trials(deepcopy=False)
    assert (first.state.name, again.state.name, other.state.name) == ('FAIL', 'COMPLETE', 'COMPLETE') and again.params == first.params != other.params

def test_a_worker_of_another_machine_is_given_time(tmp_path, monkeypatch):
    from asibkd.run import sweep as module
    sweep = plan_sweep(**SMALL | dict(student_lr='log(1e-4,1e-1)', trials=1, results_dir=str(tmp_path), storage=f'journal:{tmp_path}/j'))
    study = open_study(sweep)
    trial, _ = next_trial(study, sweep)
    elsewhere = module.sign_of_life() | dict(machine='other', pid=1)
    trial.set_user_attr('worker', elsewhere)
    assert next_trial(study, sweep) == (None, True)
    trial.set_user_attr('worker', elsewhere | dict(beat=time.time() - 5.5*module.BEAT))
    taken, _ = next_trial(study, sweep)
    assert taken is not None and taken.number == 1

def test_teachers_are_shared_by_trials(tmp_path):
    "Two student learning rates, one fine-tuning of the teacher"
    found = run_sweep(**SMALL | dict(method='vanilla_kd', teacher1_type='mlp', teacher2_type='mlp', finetune_epochs=1, student_lr='choice(0.01,0.1)', sampler='grid', results_dir=str(tmp_path)))
    assert len([*tmp_path.glob('teachers/*/*.pth')]) == 1 and [t['state'] for t in found['trials']] == ['complete']*2

def test_pruner_stops_what_is_below_the_median(tmp_path):
    found = run_sweep(**SMALL | dict(epochs=3, pruner='median', sampler='grid', student_lr='choice(0.1,0.09,0.08,0.07,0.06,0.000001,0.05)', results_dir=str(tmp_path)))
    assert 'pruned' in [t['state'] for t in found['trials']] and best_trial(found)['state'] == 'complete'

def test_refused_before_any_trial(tmp_path):
    for bad, why in ((dict(student_lr='log(0,1)'), 'above 0'), (dict(student_lr='0.1'), 'Nothing is varied'), (dict(student_lr='float(0.1,0.2)', val_frac=0), 'never by the test set'), (dict(student_lr='float(.1,.2)', storage='mysql://a'), 'expected sqlite'),
                     (dict(student_lr='float(.1,.2)', sampler='grid'), 'counted'), (dict(dkd_beta='float(1,2)'), 'no effect'), (dict(student_lr='float(.1,.2)', trials='many'), 'whole number'), (dict(exp_id='choice(a,b)'), "own")):
        with pytest.raises(ConfigError, match=why): run_sweep(**SMALL | dict(results_dir=str(tmp_path/'none')) | bad)
    assert not (tmp_path/'none').exists()

def test_the_same_command_tries_again_what_failed(tmp_path, folder):
    "The images were not there; then they are"
    root = tmp_path/'late'
    kw = SMALL | dict(dataset='imagefolder', data_root=str(root), student_lr='choice(.01,.1)', sampler='grid', results_dir=str(tmp_path/'r'))
    assert [t['state'] for t in run_sweep(**kw)['trials']] == ['fail']*2
    folder('late', train=8, test=4)
    found = run_sweep(**kw)
    assert sorted(t['state'] for t in found['trials'] if t['state'] != 'fail') == ['complete']*2 and best_trial(found)

def test_a_search_has_the_same_images_throughout(tmp_path, folder):
    root = folder(train=8, test=4)
    kw = SMALL | dict(dataset='imagefolder', data_root=str(root), student_lr='choice(.01,.1,.02)', sampler='grid', results_dir=str(tmp_path/'r'))
    run_sweep(**kw, trials=1)
    (root/'train'/'cat'/'more.png').write_bytes((root/'train'/'cat'/'000.png').read_bytes())
    with pytest.raises(ConfigError, match='begun with other files in .*another study'): run_sweep(**kw, trials=2)
