"TensorBoard, Weights & Biases, MLflow and Trackio, the real packages, offline: what they read back is what the run logged, once."
import json, os, signal, struct, threading, time
from pathlib import Path

import pytest

from asibkd.core.config import RunError
from asibkd.run.experiment import run_experiment
from asibkd.run.loops import run_loop
from asibkd.run.tasks import run_finetune
from asibkd.trainers.loop import Callback

SMALL = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, train_per_class=4, val_frac=.25, student_type='mlp', teacher1_type='mlp', teacher2_type='mlp',
             method='ce', epochs=3, data_aug=0, log_level='ERROR', report=0)

@pytest.fixture
def params(tmp_path): return SMALL | dict(results_dir=str(tmp_path/'results'))

@pytest.fixture
def mlflow(monkeypatch):
    for k in ('MLFLOW_TRACKING_URI', 'MLFLOW_EXPERIMENT_NAME'): monkeypatch.delenv(k, raising=False)
    return pytest.importorskip('mlflow', reason='mlflow is not installed: pip install asibkd[track]')

@pytest.fixture(scope='module')
def trackio(tmp_path_factory):
    os.environ['TRACKIO_DIR'] = str(tmp_path_factory.mktemp('trackio'))       # it is read once, when the package is imported
    yield pytest.importorskip('trackio', reason='trackio is not installed: pip install asibkd[track]')
    os.environ.pop('TRACKIO_DIR')

@pytest.fixture
def wandb(monkeypatch, tmp_path):
    "The package, without a network; it keeps the settings of its first run in a process, so each test starts anew"
    for k, v in dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_CONFIG_DIR=tmp_path/'c', WANDB_CACHE_DIR=tmp_path/'c', WANDB_ERROR_REPORTING='false').items(): monkeypatch.setenv(k, str(v))
    wandb = pytest.importorskip('wandb')
    wandb.teardown()
    yield wandb
    wandb.teardown()

class Killed(Callback):
    "Ends the run after a row was sent and before its checkpoint is written"
    order = 85

    def __init__(self, row, error): self.row, self.error = row, error

    def after_epoch(self, loop):
        if loop.ctx.run.n_rows == self.row: raise self.error

def rows(run): return [json.loads(o) for o in (Path(run)/'metrics.jsonl').read_text().splitlines()]

def scalars(run):
    "What TensorBoard shows: {tag: [(step, value)]}"
    ea = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    o = ea.EventAccumulator(str(Path(run)/'tensorboard')).Reload()
    return {k: [(e.step, e.value) for e in o.Scalars(k)] for k in o.Tags()['scalars']}, o

def records(file):
    "The records of a .wandb file: a LevelDB log of protobuf messages"
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part, out = file.read_bytes(), 7, b'', []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768; continue     # the rest of a block is padding
        _, n, kind = struct.unpack('<IHB', data[at:at + 7])
        part += data[at + 7:at + 7 + n]; at += 7 + n
        if kind in (1, 4): out.append(Record.FromString(part)); part = b''
    return out

def sent(file):
    "id, config, {tag: [(step, value)]}, exit code of a .wandb file; wandb's own process may still be writing it"
    for _ in range(600):
        if any(r.HasField('exit') for r in records(file)): break
        time.sleep(.1)
    found, tags, config, code, name = '', {}, {}, None, ''
    for r in records(file):
        if r.HasField('run'):
            found, name = r.run.run_id, r.run.display_name
            config |= {u.key: json.loads(u.value_json) for u in r.run.config.update}
        if r.HasField('history'):
            values = {i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
            for k, v in values.items(): tags.setdefault(k, []).append((r.history.step.num, v))
        if r.HasField('exit'): code = r.exit.exit_code
    return found, name, config, tags, code

def wandb_files(run, n=1):
    "Its `n` files, oldest first; wandb's own process makes them when it comes to it"
    for _ in range(600):
        if len(files := sorted(Path(run).glob('wandb/offline-run-*/*.wandb'))) >= n: break
        time.sleep(.1)
    assert len(files) == n, (files, sorted(Path(run).glob('wandb/**/*')))
    return files

def nothing_open(): assert not [t for t in threading.enumerate() if 'Writer' in type(t).__name__]

def check_scalars(run, tags):
    "Every row once, at its own step"
    every = rows(run)
    for k in ('val_acc', 'train_loss'):
        there = sorted(o for tag, v in tags.items() if tag.endswith(f'/{k}') and not tag.startswith('summary/') for o in v)
        assert [s for s, _ in there] == list(range(1, len(every) + 1))
        assert [v for _, v in there] == pytest.approx([r[k] for r in every], abs=1e-5)

def test_D_tensorboard_once_after_resume(params):
    "A row that was sent before the kill and again after it is there once"
    pytest.importorskip('tensorboard')
    with pytest.raises(KeyboardInterrupt): run_experiment(**params, track='tensorboard', callbacks=[Killed(2, KeyboardInterrupt())])
    nothing_open()
    s = run_experiment(**params, track='tensorboard'); nothing_open()
    tags, o = scalars(s['run'])
    check_scalars(s['run'], tags)
    assert len({f.name.split('.')[3] for f in (Path(s['run'])/'tensorboard').iterdir()}) == 2           # two files, not of the same second: they are read in the order of their names
    assert tags['summary/ce/test_acc_last'] == [(3, pytest.approx(s['rows'][0]['test_acc_last']))]
    assert [e.step for e in o.Tensors('config/text_summary')] == [0] and b'| student_type | mlp |' in o.Tensors('config/text_summary')[0].tensor_proto.string_val[0]

def test_D_tensorboard_killed_before_the_first_checkpoint(params):
    pytest.importorskip('tensorboard')
    with pytest.raises(KeyboardInterrupt): run_experiment(**params, track='tensorboard', callbacks=[Killed(1, KeyboardInterrupt())])
    s = run_experiment(**params, track='tensorboard')
    tags, o = scalars(s['run'])
    check_scalars(s['run'], tags); assert len(o.Tensors('config/text_summary')) == 1

def test_D_wandb_resume_is_the_same_run(params, wandb):
    "One id, a step that only grows, failed and then finished; the user's own run stays open"
    mine = wandb.init(project='mine', dir=str(Path(params['results_dir']).parent), reinit='create_new')
    with pytest.raises(RunError): run_experiment(**params, track='wandb', callbacks=[Killed(2, RunError('no'))])
    s = run_experiment(**params, track='wandb')
    (a, name, config, first, code), (b, _, _, second, code2) = map(sent, wandb_files(s['run'], 2))
    assert a == b == json.loads((Path(s['run'])/'tracking.json').read_text())['wandb_id'] and name == Path(s['run']).name
    assert (code, code2) == (1, 0)
    assert [n for n, _ in first['B1/val_acc']] == [1, 2] and [n for n, _ in second['B1/val_acc']] == [1, 2, 3]
    assert first['B1/val_acc'] == second['B1/val_acc'][:2]                                            # what is sent again is the same
    check_scalars(s['run'], second)                                                                   # offline, the newest file is whole
    assert config['student_type'] == 'mlp' and config['use_amp'] is False and '_requested' not in config
    assert second['summary/ce/test_acc_last'] == [(3, s['rows'][0]['test_acc_last'])]
    mine.log(dict(a=1)); mine.finish()

def test_D_wandb_starting_over_is_another_run(params, wandb):
    s = run_experiment(**params, track='wandb')
    old = sent(wandb_files(s['run'])[0])[0]
    s = run_experiment(**params, track='wandb', resume='0')
    assert [sent(f)[0] == old for f in wandb_files(s['run'])] == [False]

@pytest.mark.parametrize('track', ['tensorboard', 'wandb'])
def test_D_every_run_of_a_loop_is_its_own(params, wandb, track):
    done = run_loop('ce', '0 1', **{k: v for k, v in params.items() if k != 'method'}, track=track)
    for s in done:
        tags = scalars(s['run'])[0] if track == 'tensorboard' else sent(*wandb_files(s['run']))[3]
        check_scalars(s['run'], tags)
    if track == 'wandb': assert len({sent(*wandb_files(s['run']))[0] for s in done}) == 2

def test_D_figures_of_the_report(params):
    "The figures of the report, as images at the last step"
    pytest.importorskip('tensorboard')
    s = run_experiment(**params | dict(epochs=1, report=1), track='tensorboard')
    _, o = scalars(s['run'])
    names = {k for k in o.Tags()['images'] if k.startswith('figures/')}
    assert {'figures/learning-curves/image/0', 'figures/confusion/image/0'} <= {f'{k}/image/0'.replace('/image/0/image/0', '/image/0') for k in names}
    assert all([e.step for e in o.Images(k)] == [1] and o.Images(k)[0].width > 300 for k in names)

def mlflow_run(mlflow, results, run):
    "Run, {metric: [(step, value)]}, artifacts, read back from the store"
    client = mlflow.MlflowClient(f'sqlite:///{results}/mlflow.db')
    e, = [o for o in client.search_experiments() if o.name == 'asibkd']
    r, = [o for o in client.search_runs([e.experiment_id]) if o.info.run_name == Path(run).name]
    tags = {k: [(m.step, m.value) for m in client.get_metric_history(r.info.run_id, k)] for k in r.data.metrics}
    return r, tags, [f.path for f in client.list_artifacts(r.info.run_id, 'figures')]

def test_D_mlflow_resume_is_the_same_run(params, mlflow, monkeypatch):
    "One run in the store beside the run folders, every row once; yours stays open, and the store that you chose is yours"
    results = params['results_dir']
    Path(results).mkdir()
    monkeypatch.setenv('MLFLOW_RUN_ID', '0'*32)                  # it must not make one run of a loop
    with pytest.raises(RunError): run_experiment(**params, track='mlflow', callbacks=[Killed(2, RunError('no'))])
    run, = Path(results).glob('*/tracking.json')
    assert mlflow_run(mlflow, results, run.parent)[0].info.status == 'FAILED' and not mlflow.is_tracking_uri_set()
    s = run_experiment(**params | dict(report=1), track='mlflow')
    r, tags, files = mlflow_run(mlflow, results, s['run'])
    check_scalars(s['run'], tags)
    assert r.info.status == 'FINISHED' and r.data.params['student_type'] == 'mlp' and 'figures/confusion.png' in files
    assert tags['summary/ce/test_acc_last'] == [(3, pytest.approx(s['rows'][0]['test_acc_last']))] and not mlflow.is_tracking_uri_set()
    assert mlflow.active_run() is None

def test_D_mlflow_of_yours_stays_open(params, mlflow, tmp_path):
    mlflow.set_tracking_uri(f'sqlite:///{tmp_path}/mine.db')
    try:
        with mlflow.start_run() as mine:
            s = run_experiment(**params | dict(epochs=1), track='mlflow')
            assert mlflow.active_run().info.run_id == mine.info.run_id and mlflow.get_tracking_uri().endswith('mine.db')
        assert not (Path(params['results_dir'])/'mlflow.db').exists() and mlflow.get_run(read(s, 'mlflow')).info.status == 'FINISHED'
    finally: mlflow.set_tracking_uri(None)

def read(s, to): return json.loads((Path(s['run'])/'tracking.json').read_text())[f'{to}_id']

def trackio_runs(trackio, run):
    "{name: {metric: [(step, value)]}} of Trackio's runs with the name of this folder"
    from trackio.sqlite_storage import SQLiteStorage
    out = {}
    for r in trackio.Api().runs('asibkd'):
        if r.name.startswith(Path(run).name):
            tags = out.setdefault(r.name, {})
            for row in SQLiteStorage.get_logs('asibkd', r.name):
                for k, v in row.items():
                    if '/' in k: tags.setdefault(k, []).append((row['step'], v))
    return out

def test_D_trackio_resume_is_the_same_run(params, trackio):
    "A killed process's last row is sent once; starting over is another run"
    with pytest.raises(RunError): run_experiment(**params, track='trackio', callbacks=[Killed(2, RunError('no'))])
    s = run_experiment(**params | dict(report=1), track='trackio')
    (name, tags), = trackio_runs(trackio, s['run']).items()
    check_scalars(s['run'], tags)
    assert tags['summary/ce/test_acc_last'][0][0] == 3 and tags['figures/confusion'][0][1]['_type'] == 'trackio.image'
    s = run_experiment(**params | dict(resume='0', epochs=1), track='trackio')
    assert len(trackio_runs(trackio, s['run'])) >= 1 and read(s, 'trackio')[:6] not in name

@pytest.mark.parametrize('track', ['mlflow', 'trackio'])
def test_D_the_others_keep_the_runs_of_a_loop_apart(params, request, track):
    package = request.getfixturevalue(track)
    done = run_loop('ce', '0 1', **{k: v for k, v in params.items() if k not in ('method', 'epochs')}, epochs=2, track=track)
    for s in done:
        tags = mlflow_run(package, params['results_dir'], s['run'])[1] if track == 'mlflow' else next(iter(trackio_runs(package, s['run']).values()))
        check_scalars(s['run'], tags)
    assert len({read(s, track) for s in done}) == 2

def everything_sent(track, package, results, run):
    "{tag: [(step, value)]} of a run, as its tracker shows it"
    if track == 'tensorboard': return scalars(run)[0]
    if track == 'mlflow': return mlflow_run(package, results, run)[1]
    if track == 'trackio':
        (_, tags), = trackio_runs(package, run).items()
        return tags
    *killed, last = wandb_files(run, 3)
    assert len(killed) == 2 and json.loads((run/'tracking.json').read_text())['wandb_id'] == sent(last)[0]
    return sent(last)[3]                                        # what a killed process had not written yet is sent again

@pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='ASIBKD_SLOW=1: minutes')
@pytest.mark.parametrize('track', ['tensorboard', 'wandb', 'mlflow', 'trackio'])
def test_D_kill_9_and_resume(params, request, door, tmp_path, track):
    "Killed in the middle, twice, at no moment of our choice; every row is there once, at its step, in one run"
    package = pytest.importorskip('tensorboard') if track == 'tensorboard' else request.getfixturevalue(track)
    words = [f'{k}={v}' for k, v in (params | dict(epochs=60, track=track, exp_id='run')).items()]
    run = Path(params['results_dir'])/'run'
    def n(): return (run/'metrics.jsonl').read_bytes().count(b'\n') if (run/'metrics.jsonl').exists() else 0
    for until in (8, 25):
        c, end = door.start('run', *words, cwd=tmp_path), time.time() + 120
        while n() < until and c.poll() is None:
            assert time.time() < end
            time.sleep(.01)
        assert c.poll() is None
        c.send_signal(signal.SIGKILL)
        c.communicate(20)
    o = door('run', *words, cwd=tmp_path)
    assert o.returncode == 0 and 'Nothing more is sent' not in o.stdout + o.stderr, o.stdout + o.stderr
    tags = everything_sent(track, package, params['results_dir'], run)
    assert n() == 60
    check_scalars(run, tags)
    assert len(list(run.glob('tensorboard/*'))) == (3 if track == 'tensorboard' else 0)

def test_D_continual_run_and_resume(params):
    "Tasks, baselines and a resumed process: one growing step"
    pytest.importorskip('tensorboard')
    cl = params | dict(cl_mode=1, num_tasks=2, cl_method='er', num_stages=1, compare=1, replay_capacity=10, epochs=1, track='tensorboard')
    cl.pop('method')
    with pytest.raises(KeyboardInterrupt): run_experiment(**cl, callbacks=[Killed(4, KeyboardInterrupt())])
    s = run_experiment(**cl)
    tags, _ = scalars(s['run'])
    check_scalars(s['run'], tags)
    assert len(rows(s['run'])) == 6 and tags['summary/er/ACC'][0] == (6, pytest.approx(next(r for r in s['rows'] if r['key'] == 'er')['ACC']))

def test_D_a_fine_tuned_teacher(params, tmp_path):
    pytest.importorskip('tensorboard')
    s = run_finetune(**params | dict(method='ce', finetune_epochs=2, teacher_type='mlp', finetune_ckpt1=str(tmp_path/'t.pth'), track='tensorboard'))
    (run,) = (tmp_path/'results').glob('*/tensorboard')
    tags, _ = scalars(run.parent)
    assert [n for n, _ in tags['finetune-teacher1/val_acc']] == [1, 2] and tags['summary/mlp/test_acc'] == [(2, pytest.approx(s['test_acc']))]

def test_D_a_tracker_that_fails_costs_no_run(params, monkeypatch, capsys):
    "Sending fails in the middle: a warning, and the results are there"
    tracking = pytest.importorskip('accelerate.tracking'); pytest.importorskip('tensorboard')
    monkeypatch.setattr(tracking.TensorBoardTracker, 'log', lambda self, values, step: 1/0)
    s = run_experiment(**params | dict(log_level='WARNING', track='tensorboard'))
    assert len(rows(s['run'])) == 3 and capsys.readouterr().out.count('Nothing more is sent') == 1; nothing_open()

def test_D_wandb_switched_off(params, wandb, monkeypatch):
    "WANDB_MODE=disabled: nothing is sent, and a resumed run still has its id"
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    with pytest.raises(RunError): run_experiment(**params, track='wandb', callbacks=[Killed(2, RunError('no'))])
    f, = Path(params['results_dir']).glob('*/tracking.json'); before = f.read_text()
    s = run_experiment(**params, track='wandb'); assert f.read_text() == before and len(rows(s['run'])) == 3

def test_D_a_damaged_id_is_named(params, wandb, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    with pytest.raises(RunError): run_experiment(**params, track='wandb', callbacks=[Killed(2, RunError('no'))])
    f, = Path(params['results_dir']).glob('*/tracking.json'); f.write_text(f.read_text().replace('"', "'", 1))
    with pytest.raises(RunError, match='tracking.json.*Remove it'): run_experiment(**params, track='wandb')
    f.unlink(); run_experiment(**params, track='wandb')

def test_D_without_the_package(params, monkeypatch):
    "Named before anything is trained"
    import sys
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(RunError, match='pip install wandb'): run_experiment(**params, track='wandb')

def test_D_wandb_that_cannot_start(params, wandb, monkeypatch):
    "No login, no terminal: one sentence, before anything is trained"
    monkeypatch.setattr(wandb, 'init', lambda **kw: (_ for _ in ()).throw(wandb.errors.UsageError('No API key configured.')))
    with pytest.raises(RunError, match='wandb login.*WANDB_MODE=offline'): run_experiment(**params, track='wandb')
