"""Many runs at once: `loop --jobs N`, submitit's executor, a real SLURM (slow)."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

from asibkd.core.config import ConfigError
from asibkd.run.loops import LoopError, run_loop
from asibkd.run.plans import Job, loop_jobs, loop_runs, plan_loop

slow = pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='ASIBKD_SLOW=1: minutes')
root = Path(__file__).parents[1]
SMALL = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, train_per_class=4, val_frac=.25, student_type='mlp', teacher1_type='mlp', teacher2_type='mlp',
             data_aug=0, epochs=2, finetune_epochs=1, log_level='ERROR', report=0)
NOT_NUMBERS = {'time', 'run', 'exp_id', 'weights', 'environment'}

@pytest.fixture(autouse=True)
def full_path(): "The jobs' processes know nothing of what is shortened here"

def numbers(s):
    "A summary without times, folders, and who fine-tuned the teachers"
    def plain(o):
        if isinstance(o, dict): return {k: plain(v) for k, v in o.items() if k not in NOT_NUMBERS and 'second' not in k and 'latency' not in k}
        return [plain(v) for v in o] if isinstance(o, list) else o
    return plain(json.loads((Path(s['run'])/'summary.json').read_text()))

def left(folder):
    "Processes that know this folder"
    return [p for p in psutil.process_iter(['cmdline', 'environ']) if str(folder) in ' '.join(p.info['cmdline'] or []) or (p.info['environ'] or {}).get('ASIBKD_TEST') == str(folder)]

def test_jobs_give_the_numbers_of_one_by_one(tmp_path):
    "The same summaries in the same order, a failing plan in the middle; the teachers are fine-tuned once"
    args = dict(methods='avgz fitnet wavg', seeds='0 1', **SMALL)
    found = {}
    for n in (1, 2):
        with pytest.raises(LoopError) as e: run_loop(**args, jobs=n, results_dir=str(tmp_path/str(n)))
        found[n] = e.value
    assert [*found[1].failed] == [*found[2].failed] == ['method=fitnet seed=0', 'method=fitnet seed=1']          # an mlp has no stages
    assert [(s['method'], s['seed']) for s in found[2].summaries] == [('avgz', 0), ('wavg', 0), ('avgz', 1), ('wavg', 1)]
    assert [numbers(s) for s in found[1].summaries] == [numbers(s) for s in found[2].summaries]
    assert {w['source'] for s in found[2].summaries for w in s['weights'].values()} == {'checkpoint'}
    assert len([*tmp_path.glob('2/teachers/*/*.pth')]) == 4 and not [*tmp_path.glob('2/teachers/teacher-*')]
    assert (tmp_path/'2'/'jobs'/'method-avgz-seed-0.log').exists()

def test_a_job_that_is_killed_is_one_failed_run(tmp_path):
    "As by the kernel when memory runs out: the others finish"
    from asibkd.run.jobs import run_jobs
    plan = [Job(f'seed={s}', SMALL | dict(method='ce', seed=s, results_dir=str(tmp_path))) for s in (0, 1)]
    plan.insert(1, Suicide('dead', {}))
    done = run_jobs(plan, 2, logs=tmp_path/'jobs')
    assert [*done] == ['seed=0', 'dead', 'seed=1'] and 'killed by signal 9 (out of memory?' in done['dead'][1]
    assert not done['seed=0'][1] and not done['seed=1'][1]

class Suicide(Job):
    def do(self, objects): os.kill(os.getpid(), signal.SIGKILL)

def test_refused_before_anything_is_trained(tmp_path):
    for bad, why in ((dict(jobs='two'), 'whole number'), (dict(jobs=0), 'from 1 on'), (dict(jobs=2, launcher='slurm'), 'Leave jobs out'), (dict(slurm_time=60), 'without launcher'), (dict(launcher='slurm'), 'no `sbatch`'),
                     (dict(threads=2), 'jobs=N'), (dict(jobs=2, callbacks=[lambda row: row]), 'cannot be sent')):
        if bad == dict(launcher='slurm') and shutil.which('sbatch'): continue
        with pytest.raises(ConfigError, match=why): run_loop('ce', '0', **SMALL | dict(results_dir=str(tmp_path/'none')), **bad)
    assert not (tmp_path/'none').exists()

def test_teachers_wait_for_nobody_and_runs_for_their_teachers():
    plan = plan_loop('ce vanilla_kd avgz', '0', SMALL)
    jobs = loop_jobs(plan, loop_runs(plan))
    assert [len(j.after) for j in jobs] == [0, 0, 0, 1, 2] and [bool(j.teacher) for j in jobs] == [True, True, False, False, False]

def test_ctrl_c_leaves_no_process(tmp_path, door, monkeypatch):
    "Ctrl-C to the command alone, not to its group; then the same command finishes"
    monkeypatch.setenv('ASIBKD_TEST', str(tmp_path))
    argv = ['loop', *(f'{k}={v}' for k, v in (SMALL | dict(results_dir=tmp_path/'r', epochs=3000, log_level='INFO', finetune_epochs=0, method='ce')).items() if k != 'method'), '--methods', 'ce', '--seeds', '0 1', '--jobs', '2']
    c = door.start(*argv, cwd=tmp_path)
    end = time.time() + 120
    while len([*tmp_path.glob('r/*/metrics.jsonl')]) < 2 and time.time() < end and c.poll() is None: time.sleep(.1)
    c.send_signal(signal.SIGINT)
    out, err = c.communicate(120)
    assert c.returncode == 130 and 'the same command goes on' in err, out + err
    until = time.time() + 20
    while left(tmp_path) and time.time() < until: time.sleep(.2)
    assert not left(tmp_path)
    assert not [*tmp_path.glob('r/*/summary.json')]

def test_submitit_queues_a_job_again_and_it_goes_on(tmp_path):
    "The local executor: the signal that SLURM sends before the time is up; the bits are those of an uninterrupted run"
    pytest.importorskip('submitit')
    import pickle
    from asibkd.run.experiment import run_experiment
    from asibkd.run.slurm import Cluster
    params = SMALL | dict(method='ce', epochs=60, results_dir=str(tmp_path/'r'))
    cluster, job = Cluster('local', tmp_path/'slurm', {}), Job('method=ce', params)
    cluster.submit(job, pickle.dumps({}))
    end = time.time() + 240
    while not (rows := [*tmp_path.glob('r/*/metrics.jsonl')]) or rows[0].read_bytes().count(b'\n') < 3:
        assert time.time() < end and cluster.alive(), Path(cluster.jobs[job.name].paths.stdout).read_text()
        time.sleep(.05)
    task, = psutil.Process(int(cluster.jobs[job.name].job_id)).children()
    task.send_signal(signal.SIGUSR2)
    while (ended := cluster.result(job, cluster.alive())) is None: time.sleep(.2)
    text = cluster.jobs[job.name].paths.stdout.read_text()
    assert not ended[1] and 'Requeued job' in text and text.count('Starting with') == 2, text
    whole = run_experiment(**params | dict(results_dir=str(tmp_path/'whole')))
    assert numbers(ended[0]) == numbers(whole)
    a, b = (Path(s['run'])/'student.safetensors' for s in (ended[0], whole))
    assert a.read_bytes() == b.read_bytes()
