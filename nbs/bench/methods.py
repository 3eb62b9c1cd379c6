"""Every distillation method on the same student: accuracy from `asibkd loop`, and the time of a step beside vanilla_kd's.

    asibkd loop --preset quickstart --methods "$(python nbs/bench/methods.py --names)" --seeds "0 1 2" --compare 0 --report 0 --results_dir results/methods/digits
    asibkd loop --preset quickstart --dataset imagefolder --data_root DATA --train_per_class 500 --batch_size 64 --methods "$(python nbs/bench/methods.py --names)" --seeds 0 --finetune_epochs 10 --finetune_lr 0.008 --num_stages 1 --student_epochs_per_stage 8 --student_lr 0.01 --lr_warmup_epochs 1 --compare 0 --report 0 --results_dir results/methods/cifar
    python nbs/bench/methods.py results/methods      # reads both into methods.csv; a dataset that is not there stays
    python nbs/bench/methods.py --steps              # on an idle machine: methods_steps.csv, minutes

A step is the student's forward and backward pass, the loss and the optimiser, batch 64 of 32 × 32 pixels, resnet8 taught by
resnet20 and resnet14, which are asked in the step; the methods take turns in one process, and ratios are within a turn."""
import json, sys, time
from pathlib import Path

HERE = Path(__file__).parent
TABLE, STEPS = HERE/'methods.csv', HERE/'methods_steps.csv'


def names()->list:
    "Every one-shot method whose student is trained by steps"
    from asibkd.distil.methods import check_method, methods
    from asibkd.run import experiment                # registers the methods
    return sorted(k for k in methods if not check_method(k).closed_form)


def collected(folder):
    "One row per finished run under results/methods/DATASET"
    import pandas as pd
    rows = []
    for f in sorted(Path(folder).glob('*/*/summary.json')):
        s, env = json.loads(f.read_text()), json.loads((f.parent/'env.json').read_text())
        row = next((r for r in s['rows'] if r['key'] == s['method']), None)
        if row is not None and s['kind'] == 'distil':
            rows.append(dict(data=f.parent.parent.name, method=s['method'], seed=s['seed'], val=100*row['val_acc'],
                             test=100*row['test_acc_val_selected'], seconds=s['time']['seconds'][s['method']],
                             machine=env.get('gpu') or 'CPU', torch=env['versions']['torch'].split('+')[0]))
    return pd.DataFrame(rows)


def step_of(name, ctx):
    "A function that does one training step of a method on a batch"
    import torch
    from asibkd import When, create_method, create_student, create_teacher
    from asibkd.distil.simkd import student_for
    from asibkd.trainers.loop import create_optimizer
    from asibkd.trainers.phases import DistilStep, to_device
    torch.manual_seed(0)
    teachers = [create_teacher(k, n_class=10) for k in ('resnet20', 'resnet14')]
    student = student_for(name, create_student('resnet8', n_class=10), teachers)
    m = create_method(name, ctx.cfg, student, teachers, {}, ctx.data.train.y)
    to_device(ctx, student, m, *teachers)
    for t in teachers:
        t.requires_grad_(False)
    if m.adapts:
        m.prepare('B')
    step = DistilStep(student, teachers[:1] if m.teachers_used == 'one' else teachers, m).train()
    free = [p for p in (*student.parameters(), *m.parameters()) if p.requires_grad]
    opt = create_optimizer([dict(params=free, lr=.05, weight_decay=5e-4)], ctx.cfg)
    def train(batch):
        loss = step(batch, When())['loss']
        opt.zero_grad()
        loss.backward()
        opt.step()
    return train


def measure(turns=12, warm=2):
    "Milliseconds of a step: one row per turn, one column per method"
    import pandas as pd, torch
    from asibkd import Config, RunContext
    from asibkd.core.runtime import create_accelerator
    from asibkd.data.batches import make_loader
    from asibkd.run.bench import noise
    torch.set_num_threads(1)
    cfg = Config(preset='none', batch_size=64, data_aug='standard', optimizer='sgd', use_amp=0, device='cpu')
    ctx = RunContext(cfg, noise(2000, 10), create_accelerator(cfg))
    steps, rows = {k: step_of(k, ctx) for k in names()}, []
    for _, b in zip(range(warm + turns), make_loader(cfg, ctx.data, 'train', 'bench').epoch(0)):
        row = {}
        for k, f in steps.items():
            start = time.process_time()
            f(b)
            row[k] = 1000*(time.process_time() - start)
        rows.append(row)
    return pd.DataFrame(rows[warm:])


def main(argv):
    import pandas as pd
    if argv == ['--names']:
        return print(*names())
    if argv == ['--steps']:
        ms = measure()
        ratio = ms.div(ms.vanilla_kd, axis=0)
        out = pd.DataFrame(dict(ms=ms.median(), ratio=ratio.median(), low=ratio.min(), high=ratio.max()))
        out.rename_axis('method').round(3).to_csv(STEPS)
        return print(out.round(2).to_string())
    new = collected(argv[0])
    old = pd.read_csv(TABLE) if TABLE.exists() else new.iloc[:0]
    t = pd.concat([old[~old.data.isin({*new.data})], new]) if len(new) else old
    t.sort_values(['data', 'method', 'seed']).round(3).to_csv(TABLE, index=False)
    print(t.pivot_table(index='method', columns='data', values='test').round(2).to_string())


if __name__ == '__main__':
    main(sys.argv[1:])
