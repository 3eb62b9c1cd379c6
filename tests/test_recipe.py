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
from asibkd.run.tasks import run_evaluate, run_finetune, run_loop
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
    cfg, _ = resolve(**RECIPE | dict(student_type=student))
    loop, seen = simulated(cfg), []
    monkeypatch.setattr(loops, 'train_step', lambda l: seen.append((l.opt.param_groups[0]['lr'], len(l.batch))))
    monkeypatch.setattr(loops, 'reseed', lambda seed: None)
    epochs = range(240) if student == 'resnet20' else (0, 149, 150, 179, 180, 209, 210, 239)
    for loop.epoch in epochs: train_epoch(loop)
    table = [(recipe_lr(e + 1, lr), b) for e in epochs for b in [64]*781 + [16]]
    assert sum(a != b for a, b in zip(seen, table, strict=True)) == 0
    g, = loop.opt.param_groups
    assert type(loop.opt.optimizer) is torch.optim.SGD and (g['momentum'], g['weight_decay'], g['nesterov'], g['dampening']) == (.9, 5e-4, False, 0)
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

def test_A11_one_process(monkeypatch, tmp_path):
    "Before any file is written, at every door"
    for k in ('WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE'):
        with monkeypatch.context() as m:
            m.setenv(k, '2')
            for door in (run_experiment, run_finetune, run_evaluate, run_loop):
                with pytest.raises(ConfigError, match='num_processes=2: a run is trained by one process; start it without torchrun'):
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
