"Killed and resumed: the same bits as if nothing had happened (same machine, same thread count)."
import json, os, random, signal, time
from pathlib import Path

import pytest
from safetensors.torch import load_file

root = Path(__file__).parents[1]
SLOW = pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='ASIBKD_SLOW=1: the other two hold the same')
ARGS = dict(preset='quickstart', device='cpu', compare=1, train_per_class=30, finetune_epochs=2, teacher_adapt_epochs=1, student_epochs_per_stage=2, num_stages=2, checkpoint_steps=2, exp_id='a', mbm_dropout=.1, report=0)

@pytest.fixture
def start(door):
    return lambda results, **kw: door.start('run', *(f'{k}={v}' for k, v in dict(ARGS, results_dir=results, **kw).items()))

def outcome(results):
    r = Path(results)/'a'
    s = json.loads((r/'summary.json').read_text()); s.pop('time')
    rows = [{k: v for k, v in json.loads(o).items() if k != 'seconds'} for o in (r/'metrics.jsonl').read_text().splitlines()]
    return s, rows, {f.name: load_file(f) for f in r.glob('*.safetensors')}

def same(a, b):
    assert a[0] == b[0], 'summary.json differs'
    assert a[1] == b[1], 'metrics.jsonl differs'
    assert a[2].keys() == b[2].keys()
    for f, w in a[2].items():
        for k, v in w.items(): assert v.dtype == b[2][f][k].dtype and v.equal(b[2][f][k]), f'{f}: {k} differs'

@pytest.mark.parametrize('kw', [{}, pytest.param(dict(compare=0, bridge_objective='both', feat_kd_alpha=1), marks=SLOW), dict(compare=0, student_ema=.9, accumulate=2, patience=1, grad_clip_norm=1)],
                         ids=['distil', 'both', 'callbacks'])
def test_kill_9(start, tmp_path, kw):
    "kill -9 at random moments; every field of the summary outside `time` and every weight equal the uninterrupted run's"
    p = start(tmp_path/'whole', **kw); t = time.time(); out = ''.join(p.communicate(timeout=500)); took = time.time() - t
    assert p.returncode == 0, out[-2000:]
    kills, rng = int(os.environ.get('ASIBKD_KILLS', 1 if kw else 2)), random.Random(len(kw))
    work = (tmp_path/'cut'/'a'/'checkpoint')
    for i in range(kills):
        p, t = start(tmp_path/'cut', **kw), time.time()
        while not work.exists() and p.poll() is None: time.sleep(.05)      # begun: the imports are behind it
        time.sleep(rng.uniform(0, .9*took/kills))
        if p.poll() is None: os.kill(p.pid, signal.SIGKILL)
        p.communicate()
    p = start(tmp_path/'cut', **kw); out = ''.join(p.communicate(timeout=500))
    assert p.returncode == 0, out[-2000:]
    same(outcome(tmp_path/'whole'), outcome(tmp_path/'cut'))

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM], ids=['ctrl-c', 'sigterm'])
def test_stopped(start, tmp_path, how):
    "Ctrl-C, or a scheduler's SIGTERM: a sentence, not a traceback; exit code 130; the same command goes on"
    p = start(tmp_path/'r', student_epochs_per_stage=60)             # still running when the signal comes, however late
    while not (tmp_path/'r'/'a'/'checkpoint').exists() and p.poll() is None: time.sleep(.05)
    p.send_signal(how); out = ''.join(p.communicate(timeout=200))
    assert p.returncode == 130 and 'goes on from the last checkpoint' in out and 'Traceback' not in out, out[-1500:]

def test_finished_run_is_not_run_again(tiny):
    from asibkd.run.experiment import run_experiment
    a = run_experiment(**tiny); f = Path(a['run'])/'summary.json'; t = f.stat().st_mtime_ns
    assert run_experiment(**tiny) == a and f.stat().st_mtime_ns == t
    b = run_experiment(**tiny | dict(resume='0'))
    assert f.stat().st_mtime_ns > t and {k: v for k, v in a.items() if k != 'time'} == {k: v for k, v in b.items() if k != 'time'}     # anew, and the same result
    assert (f.parent.parent/f'{f.parent.name}~1'/'summary.json').exists()                                                              # the old one is kept

def test_other_photos_are_refused(folder, tiny):
    "A run that was interrupted goes on with the images it began with, or says why not"
    import shutil
    from _stop import Stop, StopCB
    from asibkd.core.config import RunError
    from asibkd.run.experiment import run_experiment
    photos = folder(train=8, test=3)
    kw = tiny | dict(preset='method/ce', method='ce', dataset='imagefolder', data_root=str(photos), student_type='resnet8', student_epochs_per_stage=2, batch_size=4, train_per_class=8)
    with pytest.raises(Stop): run_experiment(**kw, callbacks=[StopCB('B1', 1)])
    more = photos/'test'/'cat'/'more.png'
    shutil.copy(photos/'test'/'cat'/'000.png', more)
    with pytest.raises(RunError, match='test images are others.*6 images.*7 images'): run_experiment(**kw)
    more.unlink()
    (photos/'train'/'cat'/'000.png').rename(photos/'train'/'dog'/'zzz.png')              # as many as before
    with pytest.raises(RunError, match='images are others.*labels'): run_experiment(**kw)
    (photos/'train'/'dog'/'zzz.png').rename(photos/'train'/'cat'/'000.png')
    assert run_experiment(**kw)['images']['test'] == 6
    more.write_bytes((photos/'test'/'cat'/'000.png').read_bytes())
    with pytest.raises(RunError, match="photos' are others.*22 files.*23 files.*resume=0"): run_experiment(**kw)    # finished: its result is of other images
    assert run_experiment(**kw, resume='0')['images']['test'] == 7
    photos.rename(photos.with_name('elsewhere'))
    assert run_experiment(**kw)['images']['test'] == 7                                   # a result needs no images
