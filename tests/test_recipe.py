"The published CIFAR recipe update by update (E1), teachers without weights (B10), several processes (A11)."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from asibkd.core.config import ConfigError, DataError, resolve
from asibkd.core.runtime import RunContext, create_accelerator, precision_of
from asibkd.data.batches import apply_views, make_loader
from asibkd.data.images import Data, ImageSet
from asibkd.run.experiment import run_experiment
from asibkd.run.loops import run_loop
from asibkd.run.tasks import run_evaluate, run_finetune
from asibkd.trainers import loop as loops
from asibkd.trainers.loop import Loop, Phase, train_epoch

RECIPE = dict(preset='schedule/cifar_240', method='ce', student_type='resnet20', device='cpu')
DIGITS = RECIPE | dict(dataset='digits', train_per_class=9, batch_size=16, epochs=3, milestones=[1, 2], student_type='resnet8', compare=0, report=0, log_level='ERROR')

def recipe_lr(epoch, lr=.05):
    "Epochs count from 1: `epoch > milestone` in both peers"
    return lr*.1**sum(epoch > m for m in (150, 180, 210))

def cifar(n=50_000):
    "The size of CIFAR-100 without its images: one pixel's memory, seen n times"
    ds = ImageSet(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(n, 3, 32, 32), torch.arange(n) % 100, shape=(3, 32, 32))
    return Data('zeros', ds, ds.subset([]), ds, classes=list(range(100)), mean=(.5,)*3, std=(.25,)*3, shape=(3, 32, 32))

class Sizes:
    "A loader's order without its images: batches are the positions"
    def __init__(self, loader): self.loader = loader
    def __len__(self): return len(self.loader)
    def epoch(self, e, start=0): return (p for _, p in self.loader._steps(e, start))

def simulated(cfg):
    net = nn.Linear(2, 2)
    groups = [dict(params=net.parameters(), lr=cfg.student_lr, weight_decay=cfg.student_weight_decay)]
    phase = Phase('B1', net, groups, Sizes(make_loader(cfg, cifar(), 'train', 'B1')), cfg.epochs, dict, dict(net=net))
    return Loop(phase, RunContext(cfg, acc=create_accelerator(cfg))).prepare()

@pytest.mark.parametrize('student, lr', [('resnet20', .05), ('mobilenetv2_050', .01)])
def test_E1_240_epochs_of_updates(monkeypatch, student, lr):
    "Every update of 240 epochs: its learning rate and the size of its batch; the forward pass is left out"
    monkeypatch.delenv('ASIBKD_TEST_AMP', raising=False)     # the recipe's own precision
    cfg, _ = resolve(**RECIPE | dict(student_type=student))
    loop, seen = simulated(cfg), []
    monkeypatch.setattr(loops, 'train_step', lambda l: seen.append((l.opt.param_groups[0]['lr'], len(l.batch))))
    for k in ('reseed', 'seed_of'): monkeypatch.setattr(loops, k, lambda *key: None)      # time alone
    epochs = range(240) if student == 'resnet20' else (0, 149, 150, 179, 180, 209, 210, 239)
    for loop.epoch in epochs: train_epoch(loop)
    table = [(recipe_lr(e + 1, lr), b) for e in epochs for b in [64]*781 + [16]]
    assert sum(a != b for a, b in zip(seen, table, strict=True)) == 0
    g, = loop.opt.param_groups
    assert type(getattr(loop.opt, 'optimizer', loop.opt)) is torch.optim.SGD and (g['momentum'], g['weight_decay'], g['nesterov'], g['dampening']) == (.9, 5e-4, False, 0)
    assert precision_of(cfg) == 'no' and cfg.epochs == 240

def test_E1_every_image_once_an_epoch():
    loader = Sizes(make_loader(resolve(**RECIPE)[0], cifar(), 'train', 'B1'))
    first, second = (torch.cat(list(loader.epoch(e))) for e in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(50_000)) and not torch.equal(first, second)

def test_E1_views_are_pad_4_crop_flip():
    "All 162 views: torchvision's crop of the padded image, then its flip"
    from torchvision.transforms.v2 import functional as TF
    x = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    views = torch.arange(162)
    for v, y in zip(views.tolist(), apply_views(x.expand(162, -1, -1, -1), views, 4)):
        dy, dx, flip = v//2//9, v//2 % 9, v % 2
        crop = TF.crop(TF.pad(x[0], 4), dy, dx, 32, 32)
        assert torch.equal(y, TF.horizontal_flip(crop) if flip else crop)

def test_E1_the_preset_says_what_differs():
    from asibkd.core.config import PRESETS
    text = ' '.join(o.removeprefix('# ') for o in (PRESETS/'schedule/cifar_240.yaml').read_text(encoding='utf-8').splitlines() if o.startswith('#'))
    for said in ('What differs', 'best *test* accuracy', 'rounded constants', 'other draws', 'The last epoch is the result'): assert said in text, said

def test_A11_one_process(monkeypatch, tmp_path):
    "Before any file is written, at every door; several that can find each other share a run (test_processes.py)"
    for k in ('WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE'):
        with monkeypatch.context() as m:
            m.setenv(k, '2')
            for door in (run_experiment, run_finetune, run_evaluate, run_loop):
                what = 'RANK, .* is not set, so the processes cannot find each other' if door is run_experiment else 'works in one process; start it without torchrun'
                with pytest.raises(ConfigError, match=f'num_processes=2: .*{what}'):
                    door(**DIGITS | dict(results_dir=str(tmp_path/'results')) if door is not run_loop else dict(methods='ce', results_dir=str(tmp_path/'results')))
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv('WORLD_SIZE', '1')          # torchrun with one process
    create_accelerator(resolve(**RECIPE)[0])

NOISE = dict(preset='none', dataset='digits', device='cpu', use_amp=0, train_per_class=4, val_frac=.25, data_aug='0', student_type='resnet8', epochs=1, num_stages=1, student_epochs_per_stage=1, compare=0, report=0, log_level='ERROR')

@pytest.mark.parametrize('kw, key', [
    (dict(method='vanilla_kd', teacher_type='resnet32x4'), 'teacher_ckpt=FILE (or the file checkpoints/resnet32x4_ft.pth)'),
    (dict(method='dkd', teacher1_type='resnet14'), 'teacher1_ckpt=FILE'), (dict(method='avgz', teachers=['resnet8', 'resnet14']), 'teacher_ckpts=FILE'),
    (dict(method='asmb', teacher1_type='resnet8'), 'teacher1_ckpt=FILE'), (dict(method='ce', compare=1, teacher1_type='resnet8'), 'teacher1_ckpt=FILE')])
def test_B10_a_teacher_without_weights_is_refused(kw, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as e: run_experiment(**NOISE | kw)
    for part in ('has no weights for these classes, so its logits are noise', key, 'finetune_epochs=20', 'allow_untrained=1'): assert part in str(e.value), e.value
    assert not [f for f in (tmp_path/'results').rglob('*') if f.is_file() and f.suffix in ('.pt', '.json', '.csv')]

def test_B10_allowed_and_doors(tmp_path):
    kw = NOISE | dict(results_dir=str(tmp_path), method='vanilla_kd', teacher1_type='resnet8')
    s = run_experiment(**kw, allow_untrained=1)
    assert s['weights']['teacher1']['source'] == 'untrained'
    assert run_experiment(**kw)['run'] == s['run']                                  # the flag makes no other run
    with pytest.raises(ConfigError, match='needs student_ckpt'): run_evaluate(**NOISE | dict(eval_mode='synergy', mbm_ckpt='bridge.safetensors'))
    with pytest.raises(ConfigError, match='nothing to fine-tune'): run_finetune(**NOISE | dict(results_dir=str(tmp_path)))

# Without validation images the last epoch is the result

def rows_of(s): return [json.loads(o) for o in (Path(s['run'])/'metrics.jsonl').read_text().splitlines()]
def weights(s, name='student'): return (Path(s['run'])/f'{name}.safetensors').read_bytes()

def test_E1_the_last_epoch_is_the_result(tmp_path):
    "90 images in batches of 16: six updates an epoch, the last of ten images; the rate of each epoch is its own"
    seen = []
    class Watch(loops.Callback):
        def after_step(self, loop): seen.append((len(loop.batch), loop.opt.param_groups[0]['lr']))
    s = run_experiment(**DIGITS | dict(student_type='mlp'), report_oracle=1, callbacks=[Watch()], results_dir=str(tmp_path))
    assert seen == [(n, .05*.1**e) for e in range(3) for n in [16]*5 + [10]]
    assert [r['lr'] for r in rows_of(s)] == [.05*.1**e for e in range(3)] and not any('val_acc' in r for r in rows_of(s))
    assert s['images']['val'] == 0 and s['notes']['val'] == 'none' and s['val_acc'] is None
    assert s['test_acc_val_selected'] == s['test_acc_last'] and weights(s) == weights(s, 'student_last')
    assert s['test_acc_oracle'] == max(r['oracle'] for r in rows_of(s))

def test_E1_resumes_before_the_smaller_batch(tmp_path):
    "Stopped within an epoch, a step before its last batch: the same bits"
    class Stop(Exception): pass
    class Cut(loops.Callback):
        order = 99
        def after_step(self, loop):
            if loop.epoch == 1 and loop.step == 4: raise Stop
    kw = DIGITS | dict(checkpoint_steps=5)
    whole = run_experiment(**kw, results_dir=str(tmp_path/'whole'))
    with pytest.raises(Stop): run_experiment(**kw, callbacks=[Cut()], results_dir=str(tmp_path/'cut'))
    assert weights(run_experiment(**kw, results_dir=str(tmp_path/'cut'))) == weights(whole)

def test_E1_the_teacher_cache_knows_the_smaller_batch(tmp_path):
    "With a table and without: the same student; every image is looked up once an epoch"
    kw = DIGITS | dict(method='vanilla_kd', teacher1_type='mlp', student_type='mlp', finetune_epochs=1, epochs=2, milestones=[1])
    on, off = (run_experiment(**kw, teacher_cache=c, results_dir=str(tmp_path/c)) for c in ('memory', 'off'))
    assert all(abs(a['train_loss'] - b['train_loss']) < 1e-4 for a, b in zip(rows_of(on), rows_of(off)))
    assert on['time']['teacher_images']['requested'] >= 2*90

def test_E1_what_needs_validation_is_off_or_refused(tmp_path, capsys):
    kw = DIGITS | dict(results_dir=str(tmp_path), teachers=['mlp', 'mlp'], student_type='mlp', finetune_epochs=1, epochs=0, student_epochs_per_stage=1, teacher_adapt_epochs=1, log_level='INFO')
    with pytest.raises(ConfigError, match='patience=2 waits for a better validation score'): run_experiment(**kw, patience=2)
    with pytest.raises(ConfigError, match='val_frac=0 with cl_mode=1'): run_experiment(**NOISE | dict(val_frac=0, cl_mode=1, report=0, student_type='mlp', teacher1_type='mlp', finetune_epochs=1, results_dir=str(tmp_path)))
    s, out = run_experiment(**kw | dict(method='asmb', bridge_objective='distil', compare=1, synergy_gate=1)), capsys.readouterr().out
    for said in ('no validation images (val_frac=0): the last epoch is the result', 'synergy_gate is off', 'teacher1 is the single teacher'): assert said in out, said
    g, = s['gates']
    assert g['gate'] and not g['checked'] and g['synergy_nll'] is None
    from asibkd.analysis.notes import run_text
    assert 'NO VALIDATION IMAGES (val_frac=0)' in run_text(s) and 'val %' not in run_text(s)

def test_E1_drop_last_of_one_image_is_refused(tmp_path):
    with pytest.raises(DataError, match='leave a last batch of one image'): run_experiment(**DIGITS | dict(batch_size=89), results_dir=str(tmp_path))
    with pytest.raises(ConfigError, match='replayed images follow whole batches'): run_experiment(**NOISE | dict(cl_mode=1, drop_last=0, student_type='mlp', teacher1_type='mlp', finetune_epochs=1, results_dir=str(tmp_path)))

# Fine-tuning that was killed before its end (B5)

def test_B5_finetune_killed_before_its_summary(tmp_path, monkeypatch):
    "The same command goes on to the summary; weights of somebody else's are never written over"
    from asibkd.run import tasks
    kw = NOISE | dict(teacher_type='mlp', finetune_epochs=1, results_dir=str(tmp_path/'results'), finetune_ckpt1=str(tmp_path/'mlp.pth'))
    with monkeypatch.context() as m:
        m.setattr(tasks, 'collect_logits', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))       # trained and saved, not evaluated
        with pytest.raises(KeyboardInterrupt): run_finetune(**kw)
    assert (tmp_path/'mlp.pth').exists()
    assert not run_finetune(**kw)['skipped'] and run_finetune(**kw)['skipped']
    run, = [d for d in (tmp_path/'results').iterdir() if (d/'summary.json').exists()]
    assert not list(run.rglob('*.pt'))
    (tmp_path/'mine.pth').write_bytes(b'mine')
    with monkeypatch.context() as m:                                                                        # stopped within the training
        m.setattr(loops, 'train_step', lambda l: (_ for _ in ()).throw(KeyboardInterrupt))
        mine = kw | dict(finetune_ckpt1=str(tmp_path/'other.pth'))
        with pytest.raises(KeyboardInterrupt): run_finetune(**mine)
    (tmp_path/'mine.pth').rename(tmp_path/'other.pth')
    assert run_finetune(**mine)['skipped'] and (tmp_path/'other.pth').read_bytes() == b'mine'
