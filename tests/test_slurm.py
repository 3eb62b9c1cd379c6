"""A loop on a real SLURM on the loopback address (slow): a job out of time and one that is queued again by hand go on and
end with the bits of an uninterrupted run; what fails is said."""
import json, os, re, shutil, signal, subprocess, tempfile, threading, time
from pathlib import Path

import pytest

from asibkd.core.config import RunError
from asibkd.run.loops import LoopError, run_loop

NEEDED = ('slurmctld', 'slurmd', 'sbatch', 'munged')
SMALL = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, train_per_class=4, val_frac=.25, student_type='mlp', teacher1_type='mlp', teacher2_type='mlp',
             data_aug=0, finetune_epochs=1, log_level='ERROR', report=0)
PLUGIN = '''
import os, time
from torch import nn
from asibkd.distil.methods import VanillaKD, register_method
from asibkd.models.teachers import register_model

@register_method('patient')
class Patient(VanillaKD):
    "vanilla_kd on a slow machine, until a file is there"
    def after_step(self): time.sleep(0 if os.path.exists(os.environ['GO']) else 3)

@register_model('broken')
class Broken(nn.Module):
    "A network that cannot be trained"
    def __init__(self, n_class=10):
        super().__init__()
        self.fc = nn.Linear(3*8*8, n_class)
    def forward(self, x):
        if self.training: raise RuntimeError('no memory left')
        return self.fc(x.flatten(1))
'''
CONFIG = '''
ClusterName=asibkd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
MessageTimeout=30
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=5
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
'''

@pytest.fixture(scope='module')
def slurm():
    "A cluster of one node, this machine; what is printed about it lies in its folder"
    if not os.environ.get('ASIBKD_SLOW'): pytest.skip('ASIBKD_SLOW=1: minutes')
    if os.geteuid() or any(not shutil.which(o) for o in NEEDED): pytest.skip('needs the Debian packages slurm-wlm and munge, and to be root')
    d, port = Path(tempfile.mkdtemp(dir='/tmp')), 20_000 + os.getpid() % 20_000
    for o in ('munge', 'state', 'spool'): (d/o).mkdir()
    d.chmod(0o755)
    key = d/'munge'/'key'
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    for o in (key, d/'munge'): shutil.chown(o, 'munge', 'munge')
    munge = ['munged', '--force', *(f'--{k}={d}/munge/{v}' for k, v in {'socket': 'socket', 'key-file': 'key', 'pid-file': 'pid', 'log-file': 'log', 'seed-file': 'seed'}.items())]
    subprocess.run(['runuser', '-u', 'munge', '--', *munge], check=True, capture_output=True)
    (d/'slurm.conf').write_text(CONFIG.format(d=d, port=port, port1=port + 1))
    before = os.environ.get('SLURM_CONF')
    os.environ['SLURM_CONF'] = str(d/'slurm.conf')
    for o in (['slurmctld'], ['slurmd', '-N', 'localhost']): subprocess.run(o, check=True)
    until = time.time() + 60
    while 'idle' not in subprocess.run(['sinfo', '-h', '-o', '%T'], capture_output=True, text=True).stdout:
        assert time.time() < until, (d/'slurmctld.log').read_text() + (d/'slurmd.log').read_text()
        time.sleep(.5)
    yield d
    subprocess.run(['scancel', '--user', 'root'])
    time.sleep(2)
    for o in ('slurmd.pid', 'slurmctld.pid', 'munge/pid'): os.kill(int((d/o).read_text()), signal.SIGTERM)
    time.sleep(2)
    os.environ.pop('SLURM_CONF')
    if before: os.environ['SLURM_CONF'] = before
    shutil.rmtree(d, ignore_errors=True)

@pytest.fixture(autouse=True)
def full_path(): "The jobs know nothing of what is shortened here"

def numbers(tmp_path): return json.loads((tmp_path/'r'/'slurm'/'jobs.json').read_text())

def number_of(tmp_path, seed): return next(n for k, n in numbers(tmp_path).items() if k.startswith(f'method-patient-seed-{seed}'))

def printed(tmp_path, seed): return (tmp_path/'r'/'slurm'/f'{number_of(tmp_path, seed)}_0_log.out').read_text()

def rows(tmp_path, seed):
    found = [f for f in tmp_path.glob('r/*/metrics.jsonl') if json.loads((f.parent/'config.json').read_text())['seed'] == seed]
    return found[0].read_bytes().count(b'\n') if found else 0

def wait_for(what, seconds=120):
    until = time.time() + seconds
    while not what():
        assert time.time() < until
        time.sleep(.3)

def limit(job, minutes): subprocess.run(['scontrol', 'update', f'JobId={job}', f'TimeLimit={minutes}'], check=True)

def minutes_run(job):
    shown = subprocess.run(['scontrol', 'show', 'job', job], capture_output=True, text=True, check=True).stdout
    h, m = re.search(r'RunTime=(\d+):(\d+):', shown).groups()
    return 60*int(h) + int(m)

def test_out_of_time_and_queued_again(slurm, tmp_path, door, monkeypatch):
    "Seed 0's job comes to the end of its time, seed 1's is queued again by hand; Ctrl-C ends no job, the same command watches them"
    (tmp_path/'plugin.py').write_text(PLUGIN)
    go, epochs = tmp_path/'go', 60                     # of two steps: six minutes until it goes fast
    monkeypatch.setenv('GO', str(go))
    given = SMALL | dict(plugin=str(tmp_path/'plugin.py'), epochs=epochs, results_dir=str(tmp_path/'r'), log_level='WARNING')
    asked = dict(methods='patient', seeds='0 1', launcher='slurm', slurm_time=60, slurm_signal_delay=20)
    words = ['loop', *(f'{k}={v}' for k, v in (given | asked).items())]
    c = door.start(*words, cwd=tmp_path)
    wait_for(lambda: rows(tmp_path, 0) > 3 and rows(tmp_path, 1) > 3 or c.poll() is not None, 400)     # after their teachers
    c.send_signal(signal.SIGINT)
    out, err = c.communicate(60)
    logs = '\n'.join(f.read_text() for f in tmp_path.glob('r/slurm/*.out'))
    assert c.returncode == 130 and 'jobs on SLURM go on' in out + err and 'scancel ' in out + err, out + err + logs
    before = numbers(tmp_path)
    def again():
        zero, one = (number_of(tmp_path, s) for s in (0, 1))
        subprocess.run(['scontrol', 'requeue', one], check=True)
        limit(zero, minutes_run(zero) + 2)
        wait_for(lambda: 'Requeued job' in printed(tmp_path, 0), 400)
        limit(zero, 60)
        wait_for(lambda: all(printed(tmp_path, s).count('Starting with') > 1 for s in (0, 1)), 400)
        go.touch()
    t = threading.Thread(target=again, daemon=True)
    t.start()
    c = door.start(*words, cwd=tmp_path)
    out, err = c.communicate(900)
    assert c.returncode == 0, out + err
    t.join()
    assert {k: n for k, n in numbers(tmp_path).items() if 'patient' in k} == {k: n for k, n in before.items() if 'patient' in k}
    assert 'Requeued job' in printed(tmp_path, 0) and all(printed(tmp_path, s).count('Starting with') > 1 for s in (0, 1))
    assert len([*tmp_path.glob('r/teachers/*/*.pth')]) == 2
    whole = run_loop('patient', '0 1', **given | dict(results_dir=str(tmp_path/'whole')))
    for b in whole:
        a, = tmp_path.glob(f"r/patient-digits-s{b['seed']}-*")
        b = Path(b['run'])
        assert (a/'student.safetensors').read_bytes() == (b/'student.safetensors').read_bytes()
        rows_of_student = [[o['epoch'] for o in map(json.loads, (f/'metrics.jsonl').read_text().splitlines()) if o['kind'] != 'finetune'] for f in (a, b)]
        assert rows_of_student == [[*range(1, epochs + 1)]]*2

def test_a_teacher_that_fails_ends_the_job_that_waits_for_it(slurm, tmp_path):
    (tmp_path/'plugin.py').write_text(PLUGIN)
    given = SMALL | dict(plugin=str(tmp_path/'plugin.py'), epochs=1, results_dir=str(tmp_path/'r'), launcher='slurm', teacher2_type='broken')
    with pytest.raises(LoopError, match='(?s)1 of 2 runs failed.*teacher2.*failed: .*no memory left') as e: run_loop('ce avgz', '0', **given)
    assert [s['method'] for s in e.value.summaries] == ['ce']

def test_what_sbatch_refuses_is_one_sentence(slurm, tmp_path):
    with pytest.raises(RunError, match='sbatch refused the job of .*nvalid partition'): run_loop('ce', '0', **SMALL | dict(epochs=1, results_dir=str(tmp_path), launcher='slurm', slurm_partition='nowhere'))
