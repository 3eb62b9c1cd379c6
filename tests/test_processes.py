"One run on several processes: the numbers of one process, one folder, and no process left behind."
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asibkd.core.config import RunError
from asibkd.core.processes import together
from asibkd.run.experiment import run_experiment
from asibkd.trainers.loop import Callback

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the processes are forked')
TINY = dict(dataset='digits', device='cpu', compare=0, train_per_class=16, val_frac=.2, batch_size=32, use_amp=0,
            finetune_epochs=1, epochs=1, optimizer='sgd', student_lr=.1, report=0, disable_tqdm=1, log_level='ERROR',
            teacher1_type='mlp', teacher2_type='mlp', student_type='mlp', num_workers=0)
STAGES = dict(num_stages=1, student_epochs_per_stage=1, teacher_adapt_epochs=1)
CL = dict(cl_mode=1, num_tasks=2, stop_after=2, replay_capacity=40, teacher_adapt_epochs=1)

@pytest.fixture(scope='module', autouse=True)
def imported(tmp_path_factory):
    "What a run imports is imported here, once, and not by every forked process"
    run_experiment(**TINY | dict(results_dir=str(tmp_path_factory.mktemp('imported')), exp_id='run', method='avgz', report=1))

def weights(folder, name='student'):
    return load_file(Path(folder)/f'{name}.safetensors')

def furthest(a, b):
    "Largest difference of two state dicts"
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)

def run_on(n, folder, **params):
    "The run's folder, trained by `n` processes"
    def one(rank):
        return run_experiment(**TINY | dict(results_dir=str(folder/f'on{n}'), exp_id='run') | params)['run']
    return Path(one(0) if n == 1 else together(one, n, 300)[0])

CASES = dict(
    ce=(dict(method='ce'), 1e-6),
    avgz=(dict(method='avgz'), 1e-6),
    crd=(dict(method='crd', crd_nce_k=64), 1e-6),
    asmb=(STAGES | dict(method='asmb', bridge_objective='both'), 1e-6),
    asmb_fuse=(STAGES | dict(method='asmb'), 1e-5),
    batch_norm=(dict(method='avgz', student_type='resnet8', teacher1_type='resnet8', student_lr=.02), 1e-5),
    cl_asib=(CL | dict(cl_method='asib'), 1e-5))
NETS = dict(student_type='resnet8', teacher1_type='resnet8', teacher2_type='resnet8', student_lr=.02)
MORE = dict(       # of ASIBKD_SLOW=1: methods with modules of their own, a student of two networks, an agent, a sum of two
    simkd=(NETS | dict(method='simkd'), 1e-5),
    reviewkd=(NETS | dict(method='reviewkd'), 1e-5),
    mtkd_rl=(NETS | dict(method='mtkd_rl', student_lr=.002, epochs=2), 1e-5),   # its sum is large: at ten times the rate rounding grows to 2e-5
    stacked=(NETS | {'method': 'crd+wttm', 'crd_nce_k': 64}, 1e-5))
slow = pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='ASIBKD_SLOW=1: minutes')

@pytest.mark.parametrize('case', [*CASES, *(pytest.param(k, marks=slow) for k in MORE)])
def test_two_processes_train_what_one_does(case, tmp_path):
    params, tolerance = (CASES | MORE)[case]
    one, two = (run_on(n, tmp_path, **params) for n in (1, 2))
    assert furthest(weights(one), weights(two)) < tolerance
    if (one/'bridge.safetensors').exists():
        # the temperatures of a fusion are searched to a few digits
        assert furthest(weights(one, 'bridge'), weights(two, 'bridge')) < (1e-3 if case == 'asmb_fuse' else tolerance)
    a, b = (json.loads((o/'summary.json').read_text()) for o in (one, two))
    assert a['time']['teacher_images'] == b['time']['teacher_images']          # the tally of all processes
    assert len((two/'metrics.jsonl').read_text().splitlines()) == len((one/'metrics.jsonl').read_text().splitlines())
    assert len((two.parent/'summary.csv').read_text().splitlines()) == 2       # the header, and one row

def test_last_batch_smaller_than_the_group(tmp_path):
    "Ten batches of 12 and one of 2 for three processes: each computes all of the last one"
    params = dict(method='avgz', batch_size=14, drop_last=0, train_per_class=16)
    one, three = (run_on(n, tmp_path, **params) for n in (1, 3))
    assert furthest(weights(one), weights(three)) < 1e-6

def test_one_voice(tmp_path):
    "A folder in use is refused to all in one sentence, a report and a table are written once, callbacks called once"
    from asibkd.core.config import Config
    from asibkd.core.runfolder import Run
    folder = tmp_path/'on2'
    with Run(Config(results_dir=str(folder), exp_id='run')).open():
        with pytest.raises(RunError, match='process 0: .*being written by another process.*process 1: OtherProcess.*being written'):
            run_on(2, tmp_path, method='ce')
    def one(rank):
        rows = []
        s = run_experiment(**TINY | dict(results_dir=str(tmp_path/'calls'), exp_id='run', method='ce', epochs=2, report=1),
                           callbacks=[rows.append])
        again = run_experiment(**TINY | dict(results_dir=str(tmp_path/'calls'), exp_id='run', method='ce', epochs=2, report=1))
        return len(rows), s == again, sorted(f.name for f in Path(s['run']).glob('report*'))
    assert together(one, 2, 300) == [(2, True, ['report.html']), (0, True, ['report.html'])]

def test_without_synchronised_batch_norm_all_keep_one_network(tmp_path):
    class Statistics(Callback):
        def after_epoch(self, loop):
            self.sums = [b.double().sum().item() for b in loop.phase.keep['student'].buffers()]
    def one(rank):
        cb = Statistics()
        run_experiment(**TINY | dict(results_dir=str(tmp_path), exp_id='run', method='ce', student_type='resnet8', sync_bn='0'),
                       callbacks=[cb])
        return cb.sums
    a, b = together(one, 2, 300)
    assert a == b

def test_refused_where_a_batch_cannot_be_divided(tmp_path):
    from asibkd.distil.methods import CE, methods, register_method
    @register_method('undivided')
    class Undivided(CE):
        whole_batch = True
    try:
        with pytest.raises(RunError, match='num_processes=2: Undivided needs a whole batch in one process'):
            run_on(2, tmp_path, method='undivided')
    finally:
        del methods['undivided']

@pytest.mark.parametrize('n', [2, 4])
def test_streamed_images_are_decoded_once_and_are_the_same(n):
    "Each process decodes its rows; the last batch, of three, is too small for four"
    from asibkd.core.config import Config
    from asibkd.data.batches import Loader
    from asibkd.data.datasets import create_data
    from asibkd.data.images import ImageSet
    data, read = create_data(Config(dataset='digits')), []
    class Source:
        def __len__(self): return 11
        def __getitem__(self, i):
            read.append(i)
            return data.train.x[i]
    images = ImageSet(Source(), data.train.y[:11], data.classes, torch.arange(11), data.shape)
    loader = Loader(images, data, 4, train=True, data_aug='standard', mix=(.2, 0.), num_workers=0, drop_last=False)
    def epoch(rank):
        read.clear()
        return [b.x.tolist() for b in loader.epoch(1)], len(read)
    one, found = epoch(0), together(epoch, n)
    assert all(x == one[0] for x, _ in found)
    assert [k for _, k in found] == ([6, 5] if n == 2 else [5]*4)      # 2 + 2 + 2 and 2 + 2 + 1; 1 + 1 + 3

# Through the door

MORTAL = """
import os, signal
from pathlib import Path
from asibkd.distil.methods import AvgZ, register_method

@register_method('mortal')
class Mortal(AvgZ):
    steps = 0
    def after_step(self):
        Mortal.steps += 1
        mark = Path(os.environ['MARK'])
        if os.environ['RANK'] == '1' and str(Mortal.steps) == os.environ['DIES_AT'] and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""
MOMENTS = dict(first=1, middle_of_an_epoch=6, last=9)      # of nine steps in three epochs

def mortal(folder, **params):
    "Parameters of a run whose second process dies"
    (folder/'mortal.py').write_text(MORTAL)
    return TINY | dict(log_level='INFO', plugin=str(folder/'mortal.py'), method='mortal', epochs=3, batch_size=40,
                       checkpoint_steps=1, exp_id='run', report=1) | params

def torchrun(folder, moment):
    given = [f'{k}={v}' for k, v in mortal(folder, results_dir=folder/'door').items()]
    env = os.environ | dict(OMP_NUM_THREADS='1', MARK=str(folder/'mark'), DIES_AT=str(moment),
                            PYTHONPATH=str(Path(__file__).parents[1]))
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv_backend', 'c10d',
               '--rdzv_endpoint', '127.0.0.1:0', '--local_addr', '127.0.0.1', '-m', 'asibkd.run.cli', 'run', *given]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)

def dies(folder, moment):
    "Killed at this step: torchrun ends all, and the folder can be gone on with"
    r = torchrun(folder, moment)
    assert r.returncode and (folder/'mark').exists(), r.stdout + r.stderr
    assert not [p for p in Path('/proc').glob('[0-9]*/cmdline') if str(folder).encode() in p.read_bytes()]   # none is left

def undisturbed(folder, monkeypatch):
    "The same run, to its end: in forked processes, which take seconds"
    for k, v in dict(MARK=str(folder/'mark'), DIES_AT='0').items():
        monkeypatch.setenv(k, v)
    return run_on(2, folder, **mortal(folder))

def test_a_killed_process_ends_all_and_the_run_goes_on(tmp_path, monkeypatch):
    dies(tmp_path, MOMENTS['middle_of_an_epoch'])
    whole = undisturbed(tmp_path, monkeypatch)
    (tmp_path/'door').rename(tmp_path/'again')
    monkeypatch.chdir(tmp_path)
    def resumed(rank):
        return run_experiment(**mortal(tmp_path, results_dir=str(tmp_path/'again')))['run']
    run = Path(together(resumed, 2, 300)[0])
    assert furthest(weights(whole), weights(run)) == 0
    rows = [json.loads(o) for o in (run/'metrics.jsonl').read_text().splitlines()]
    assert [o['epoch'] for o in rows if o['phase'] == 'B1'] == [1, 2, 3]
    assert len((run.parent/'summary.csv').read_text().splitlines()) == 2 and (run/'report.html').exists()

@slow
@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_at_any_moment_it_ends_with_the_same_bits(moment, tmp_path, monkeypatch):
    dies(tmp_path, MOMENTS[moment])
    again = torchrun(tmp_path, 0)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count('B1 3/3') == 1                                    # one voice
    assert furthest(weights(undisturbed(tmp_path, monkeypatch)), weights(tmp_path/'door'/'run')) == 0
