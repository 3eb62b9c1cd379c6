"Cached teacher outputs, through the public door: what is computed, what is found, and that it is the same."
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asibkd.data.batches import make_loader
from asibkd.trainers.build import settle_config
from asibkd.core.config import ConfigError, resolve
from asibkd.data.datasets import create_data
from asibkd.run.experiment import run_experiment

BASE = dict(report=0, preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, data_aug='standard', train_per_class=12, method='vanilla_kd', teacher_type='resnet8', student_type='resnet8', finetune_epochs=1,
            epochs=2, log_level='ERROR', num_stages=1, disable_tqdm=1)

def images(s): t = s['time']['teacher_images']; return t.get('requested', 0), t.get('computed', 0)
def weights(s): return load_file(Path(s['run'])/'student.safetensors')
def same(a, b): return all(v.equal(weights(b)[k]) for k, v in weights(a).items())

@pytest.fixture
def go(tmp_path):
    "Run with one results folder; the teachers are those of the first run"
    def run(**kw):
        first = tmp_path/'r'/'first'
        if (first/'summary.json').exists() and 'exp_id' not in kw: raise AssertionError('name the run')
        given = dict(teacher_ckpt=str(first/'teacher1.pth')) if first.exists() else dict(exp_id='first')
        return run_experiment(**BASE | dict(results_dir=str(tmp_path/'r')) | given | kw)
    return run

def test_second_run(go):
    "The same seed: no teacher forward, the same bits"
    a = go(); b = go(exp_id='second')
    requested, computed = images(a); assert 0 < computed < requested
    assert images(b) == (requested, 0) and same(a, b)
    assert a['test_acc_last'] == b['test_acc_last'] and a['rows'][0]['test_acc_val_selected'] == b['rows'][0]['test_acc_val_selected']

def rows_of(seed, results, **kw):
    "Every (image, view) that phase B of a seed needs"
    cfg, _ = resolve(**BASE | dict(seed=seed, results_dir=results) | kw); data = create_data(cfg); cfg = settle_config(cfg, data)
    ld = make_loader(cfg, data, 'train', 'B1')
    return {r for e in range(cfg.epochs) for b in ld.epoch(e) for r in b.row.tolist()}

def test_another_seed(go, tmp_path):
    "Computed are exactly the pairs that the first run had not needed; un-augmented images likewise"
    kw = dict(train_per_class=0, epochs=3, batch_size=64)
    a = go(**kw); b = go(exp_id='other', seed=43, **kw)
    one, two = (rows_of(s, str(tmp_path), **kw) for s in (42, 43))
    plain = [{*map(int, ds.ids)} for s in (42, 43) for d in (create_data(resolve(**BASE | kw | dict(seed=s))[0]),) for ds in (d.train, d.val, d.test)]
    plain1, plain2 = set.union(*plain[:3]), set.union(*plain[3:])
    assert images(b)[1] == len(two - one) + len(plain2 - plain1) and len(two & one) > 100

def test_every_stage_of_the_bridge(tmp_path):
    "Frozen teachers with adapters: phases A and B, two stages, three students, from one table"
    kw = BASE | dict(method='asmb', epochs=0, teacher_type='', teacher1_type='resnet8', teacher2_type='resnet8', num_stages=2, teacher_adapt_epochs=1, student_epochs_per_stage=1, compare=1, use_distillation_adapter=1,
                     distill_out_dim=16, bridge_objective='distil', results_dir=str(tmp_path))
    a = run_experiment(**kw, exp_id='a'); b = run_experiment(**kw, exp_id='b')
    assert images(b)[1] == 0 < images(a)[1] < images(a)[0] and same(a, b)
    live = run_experiment(**kw, exp_id='live', teacher_cache='off')
    assert images(live)[1] == images(live)[0] == images(a)[0]
    w = weights(live); far = max((weights(a)[k].float() - v.float()).abs().max() for k, v in w.items())
    assert 0 < far < .1                                        # half precision of the targets, a few steps later

def test_two_processes(tmp_path, door):
    "Two runs fill one table at once and leave the same student"
    args = [f'{k}={v}' for k, v in (BASE | dict(results_dir=tmp_path, train_per_class=30)).items()]
    ps = [door.start('run', *args, f'exp_id={n}') for n in 'ab']
    for p in ps: out = ''.join(p.communicate(timeout=300)); assert p.returncode == 0, out[-2000:]
    a, b = (load_file(tmp_path/n/'student.safetensors') for n in 'ab')
    assert all(v.equal(b[k]) for k, v in a.items())

def test_damage(go, tmp_path):
    "A damaged row is computed again; a cut-off table is made anew; neither changes the result"
    a = go(); table = max((tmp_path/'r'/'teacher_cache').glob('*.rows'), key=lambda f: f.stat().st_size)
    raw = bytearray(table.read_bytes()); at = next(i for i in range(4, len(raw), 4) if any(raw[i:i + 4])); raw[at] ^= 255; table.write_bytes(raw)
    b = go(exp_id='b'); assert images(b)[1] == 1 and same(a, b)
    os.truncate(table, 100)
    c = go(exp_id='c'); assert images(c)[1] > 10 and same(a, c)

def test_teachers_that_are_not_cached(tmp_path):
    "Methods that compare maps, augmentations without numbers, teachers that move"
    for kw in (dict(method='fitnet'), dict(method='at', teacher_cache='disk'), dict(data_aug='1'), dict(teacher_cache='off')):
        s = run_experiment(**BASE | kw, results_dir=str(tmp_path)); requested, computed = images(s)
        plain = kw.get('data_aug') == '1'                      # evaluation is un-augmented: cached, and found in no table yet
        assert requested == computed > 0 and (tmp_path/'teacher_cache').exists() == plain, kw
        if plain: (tmp_path/'teacher_cache').rename(tmp_path/'aside')
    s = run_experiment(**BASE | dict(method='asmb', epochs=0, teacher_type='', teacher1_type='resnet8', teacher2_type='resnet8', bridge_objective='both', teacher_adapt_epochs=1, student_epochs_per_stage=1), results_dir=str(tmp_path))
    assert images(s)[0] == images(s)[1]                        # the teachers are open in their upper blocks

def test_recycled_views(tmp_path):
    "RandAugment and CutMix with cache_views: the second run asks nobody, and the row says what it was trained on"
    kw = BASE | dict(data_aug='1', cutmix_alpha_distill=1., cache_views=2, epochs=3, results_dir=str(tmp_path))
    a = run_experiment(**kw, exp_id='a'); b = run_experiment(**kw, exp_id='b')
    assert images(b)[1] == 0 and same(a, b) and a['rows'][-1]['target']['views'] == 2
    with pytest.raises(ConfigError, match='drawn anew'): run_experiment(**BASE | dict(cl_mode=1, cache_views=2, method='asmb', epochs=1, results_dir=str(tmp_path)))

def test_bounds(tmp_path):
    "No room: the teacher is run, and the log says so; `memory` leaves nothing on the disk"
    a = run_experiment(**BASE | dict(log_level='WARNING'), cache_gb=1e-6, results_dir=str(tmp_path/'a'))
    assert images(a)[0] == images(a)[1] and not list((tmp_path/'a').glob('teacher_cache/*.rows'))
    assert 'cache_gb=1e-06' in (Path(a['run'])/'log.txt').read_text() if (Path(a['run'])/'log.txt').exists() else True
    b = run_experiment(**BASE, teacher_cache='memory', results_dir=str(tmp_path/'b'))
    assert images(b)[1] < images(b)[0] and not (tmp_path/'b'/'teacher_cache').exists()

def test_continual(tmp_path):
    "Snapshots are cached within their task; the result is that of a second run, bit by bit; an average that moves is run on every batch"
    kw = dict(preset='none', dataset='digits', device='cpu', use_amp=0, data_aug='standard', cl_mode=1, num_stages=1, num_tasks=3, epochs=3, batch_size=32, train_per_class=40, replay_capacity=30, student_type='resnet8', teacher1_type='resnet8', cl_teachers='expert+snapshot', kd_alpha=1, cl_kd_mix=0, bridge_objective='ce',
              teacher_adapt_epochs=2, finetune_epochs=1, log_level='ERROR', disable_tqdm=1, results_dir=str(tmp_path))
    a, b = (run_experiment(**kw, exp_id=n) for n in 'ab')
    requested, computed = images(a); assert computed < .8*requested and images(b) == (requested, computed) and same(a, b)
    e = run_experiment(**kw | dict(exp_id='ema', cl_teachers='ema', teacher_cache='memory')); assert images(e)[0] == images(e)[1] > 0

def test_compile(tmp_path, monkeypatch):
    "compile=1 compiles the networks of training steps, changes rounding only, and says what it misses where there is no compiler"
    kw = BASE | dict(teacher_type='mlp', student_type='mlp', epochs=1, results_dir=str(tmp_path))
    real = torch.compile
    if not os.environ.get('ASIBKD_SLOW'):     # C++ takes a minute: the graphs are traced, and run by torch
        monkeypatch.setattr(torch, 'compile', lambda m, **kw: real(m, **kw, backend='aot_eager'))
    a = run_experiment(**kw, exp_id='eager'); torch._dynamo.utils.counters.clear()
    b = run_experiment(**kw, exp_id='compiled', compile=1)
    assert torch._dynamo.utils.counters['frames']['ok'] >= 3 and not torch._dynamo.utils.counters['graph_break']     # teacher fine-tuned, teacher cached, student
    assert all(torch.allclose(v, weights(b)[k], atol=1e-3) for k, v in weights(a).items())
    monkeypatch.setenv('PATH', ''); monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(ConfigError, match='C\\+\\+ compiler'): run_experiment(**kw, exp_id='none', compile=1)
