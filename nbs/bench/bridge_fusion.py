"""The ensemble itself: average, optimal constant weights, the gate alone, stacking and the bridge's path, from n labels a class.

    python nbs/bench/bridge_fusion.py --data cifar --data_root DATA      # fills what bridge_fusion.csv lacks, prints the table
    python nbs/bench/bridge_fusion.py --data digits                      # the same on digits, in minutes
    python nbs/bench/bridge_fusion.py --speed --data digits              # phase A against a stage's student time: bridge_speed.csv

Teachers learn from one part of the images, the n labelled ones a class come from the other part; the test set is never
used to choose. Every draw of labelled images is one row per fusion, so a stopped study goes on where it was. Teachers
are those of bridge_map.py. No student is asked here: this is the first stage."""
import argparse, csv, time
from pathlib import Path

import bridge_map as study

TABLE, SPEED = study.HERE/'bridge_fusion.csv', study.HERE/'bridge_speed.csv'
COLUMNS = ['data', 'pair', 'n', 'draw', 'fusion', 'test', 'nll', 'beta', 'cpu', 'torch']
SPEED_COLUMNS = ['data', 'teachers', 'labels', 'phase_a', 'epoch', 'epochs', 'share', 'torch']
PAIRS, COUNTS = ('specialists', 'unequal'), dict(digits=(2, 5, 10, 20, 50), mnist5k=(2, 5, 10, 20, 50, 100),
                                                 cifar=(2, 5, 10, 20, 50, 100, 500))


# Five fusions: from the table of the labelled images (and of all) to a function of a table

def fit_average(table, pool):
    "The mean of the logits, each class over the teachers that know it"
    from asibkd.ib_mbm import average_logits
    return lambda t: (average_logits([dict(logit=z, columns=c) for z, c in zip(t.logits, t.columns)]), None)


def fit_wavg(table, pool):
    "Calibrated, optimal constant weights"
    from asibkd.distil.fusion import fit_base
    base = fit_base(table)
    return lambda t: (base(t.logits, t.columns), None)


def fit_gate(table, pool):
    "log p_t + log P(the class is one of teacher t's | features, energies): evidence alone; None where classes are shared"
    import torch
    from asibkd.distil.fusion import fit_base
    from asibkd.ib_mbm import calibrated, energy, fuse
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    knows = table.judged()
    if (knows.sum(0) != 1).any():
        return None
    base = fit_base(table)
    def features(t): return torch.cat([*t.feats, energy(t.logits.float(), base.temps, t.columns)], 1).numpy()
    k = min(5, int(knows.sum(1).min()))
    search = GridSearchCV(LogisticRegression(max_iter=500), dict(C=[10**p for p in range(-5, 2)]),
                          cv=StratifiedKFold(k, shuffle=True, random_state=0), scoring='neg_log_loss')
    domain = make_pipeline(StandardScaler(), search).fit(features(table), knows.int().argmax(0).numpy())
    def fused(t):
        p = torch.tensor(domain.predict_proba(features(t)), dtype=torch.float32)
        logp = calibrated(t.logits.float(), base.temps, t.columns)
        return fuse(logp, torch.ones(len(logp)), t.columns, p.clamp(min=1e-12).log()), None
    return fused


def fit_stacking(table, pool):
    "Ridge-penalised regression on standardised features and log-probabilities"
    from asibkd.distil.fusion import fit_stack
    stack = fit_stack(table)
    return lambda t: (stack(t.logits, t.feats, t.columns), None)


def fit_bridge(table, pool):
    "The bridge, opened along its path of prices; it does not ask a student, and sees the other images without labels"
    from asibkd.distil.fusion import pooled
    from asibkd.distil.path import asked, fit_path
    path = fit_path(table, asks=False, seen=pool)
    return lambda t: (path['head'](pooled(t.feats), asked(t), t.logits, t.columns)['logit'], path['beta'])


FUSIONS = dict(average=fit_average, wavg=fit_wavg, gate=fit_gate, stack=fit_stacking, path=fit_bridge)


# Rows

def tables(data, pair, seed, params)->tuple:
    "The teachers' outputs on the images that may have a label, and on the test images; made once and kept in files"
    import torch
    from asibkd.distil.fusion import TeacherTable
    files = [study.WORK/'tables'/f'{data}-{pair}-s{seed}-{part}.pt' for part in ('pool', 'test')]
    if not all(f.exists() for f in files):
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for f, t in zip(files, made_tables(data, pair, seed, params)):
            torch.save(vars(t), f)
    return tuple(TeacherTable(**torch.load(f, weights_only=True)) for f in files)


def made_tables(data, pair, seed, params)->tuple:
    "The same, from the networks"
    from asibkd.data.batches import Loader, make_loader
    from asibkd.distil.fusion import collect_table
    from asibkd.trainers.build import build_student
    from asibkd.trainers.phases import to_device
    ctx, _ = study.open_cell(data, 0, seed, 'avgz', 0, params)
    teachers = [study.get_teacher(t, ctx, f'teacher{i + 1}') for i, t in enumerate(study.SETTINGS[pair])]
    device = ctx.acc.device
    loaders = (Loader(ctx.data.train, ctx.data, 4*ctx.cfg.batch_size, device=device),
               make_loader(ctx.cfg, ctx.data, 'test', 'test', device=device))
    student = build_student(ctx.cfg, ctx.data)          # the path's tables have one; it is not asked
    to_device(ctx, student)
    return tuple(collect_table(student, teachers, o, autocast=ctx.acc.autocast) for o in loaders)


def one_row(fusion, labelled, pool, test)->dict|None:
    "Fit one fusion on the labelled images and test it; None where it is not defined"
    import torch
    from asibkd.distil.metrics import accuracy, nll
    start = time.process_time()
    fitted = FUSIONS[fusion](labelled, pool)
    if fitted is None:
        return None
    cpu = time.process_time() - start
    with torch.no_grad():
        z, beta = fitted(test)
    return dict(test=round(100*accuracy(z, test.y), 3), nll=round(nll(z, test.y), 4), beta=beta, cpu=round(cpu, 2),
                torch=torch.__version__.split('+')[0])


def fill(data, pairs, counts, draws, fusions, params, seed=0):
    "The rows that the CSV lacks"
    from asibkd.data.images import limit_per_class
    done = {(r['data'], r['pair'], r['n'], r['draw'], r['fusion']) for r in study.read_rows(TABLE)}
    for pair in pairs:
        todo = [(n, d, f) for n in counts for d in range(draws) for f in fusions
                if (data, pair, str(n), str(d), f) not in done]
        if not todo:
            continue
        pool, test = tables(data, pair, seed, params)
        for n, d, fusion in todo:
            row = one_row(fusion, pool.subset(limit_per_class(pool.y, n, d, 'labelled')), pool, test)
            if row is not None:
                study.add_row(TABLE, dict(data=data, pair=pair, n=n, draw=d, fusion=fusion) | row, COLUMNS)
        print(f'{data}, {pair}: {len(todo)} rows', flush=True)


# What they say

def load(file=None):
    "The rows as a DataFrame"
    import pandas as pd
    t = pd.DataFrame(study.read_rows(file or TABLE), columns=COLUMNS)
    t[['n', 'draw', 'test', 'nll', 'cpu']] = t[['n', 'draw', 'test', 'nll', 'cpu']].apply(pd.to_numeric)
    return t


def summary(t):
    "Mean accuracy over the draws: one row per pair and n, one column per fusion"
    return t.pivot_table(index=['data', 'pair', 'n'], columns='fusion', values='test').reindex(
        columns=[f for f in FUSIONS if f in {*t.fusion}]).reset_index()


def claims(t)->list:
    "[(claim, difference in points, smallest allowed)] for the rows that exist: what the path must reach"
    m, out = summary(t), []
    def best(r, *names): return max(getattr(r, k) for k in names if k in m and getattr(r, k) == getattr(r, k))
    for r in m.dropna(subset='path').itertuples() if 'path' in m else ():
        where = f'{r.data}, {r.pair}, n = {r.n}'
        if r.pair == 'specialists' and r.n >= 20:
            out.append((f'{where}: path − better of gate and stack', r.path - best(r, 'gate', 'stack'), 0.))
        elif r.pair == 'specialists':
            out.append((f'{where}: path − average', r.path - r.average, -.5))
        else:
            out.append((f'{where}: path − wavg', r.path - r.wavg, -.3))
    return out


def plot_fusion(t):
    "Accuracy against labels a class, one panel for each pair"
    from asibkd.core.picture import Picture
    pairs = [p for p in PAIRS if p in {*t.pair}]
    fig = Picture(figsize=(1 + 3*len(pairs), 2.8), layout='constrained')
    for pair, ax in zip(pairs, fig.subplots(1, len(pairs), squeeze=False)[0]):
        for fusion in FUSIONS:
            g = t[(t.pair == pair) & (t.fusion == fusion)].groupby('n').test
            if len(g):
                ax.errorbar(g.mean().index, g.mean(), yerr=g.std().fillna(0), label=fusion, capsize=2, ms=4,
                            lw=2 if fusion == 'path' else 1)
        ax.set_xscale('log')
        ax.set(xlabel='labels a class', title=pair, ylabel='ensemble, test accuracy (%)')
        ax.spines[['top', 'right']].set_visible(False)
    fig.axes[0].legend(fontsize=8)
    return fig


# Speed

def clock():
    "A callback that adds up the CPU time of phase B"
    from asibkd.trainers.loop import Callback
    class Clock(Callback):
        seconds = 0.
        def before_fit(self, loop):
            self.start = time.process_time()
        def after_fit(self, loop):
            self.seconds += (time.process_time() - self.start)*(loop.phase.kind == 'B')
    return Clock()


def speed_row(data, m, labels, params)->dict:
    "CPU time of phase A and of a student's epoch with `m` teachers whose outputs are looked up"
    import torch
    from asibkd.models.teachers import create_teacher
    from asibkd.freeze import freeze_all
    from asibkd.run.students import train_student
    from asibkd.trainers.build import build_student
    from asibkd.trainers.phases import to_device
    short = params | dict(num_stages=1, student_epochs_per_stage=2)
    ctx, extra = study.open_cell(data, labels, 0, 'asmb', 0, short)
    teachers = []
    for i in range(m):                                       # untrained: the time does not depend on what they know
        torch.manual_seed(i)
        teachers.append(freeze_all(create_teacher('resnet14', n_class=ctx.data.n_class, img_size=ctx.data.shape[-1],
                                                  small_input=True)))
    to_device(ctx, *teachers)
    for _ in range(2):                                       # the first round fills the tables
        watch, start = clock(), time.process_time()
        train_student('asmb', build_student(ctx.cfg, ctx.data), teachers, ctx.but(callbacks=(watch,)), extra)
        total = time.process_time() - start
    epochs = study.DATA[data][0]['student_epochs_per_stage']
    a, epoch = total - watch.seconds, watch.seconds/2
    return dict(data=data, teachers=m, labels=labels, phase_a=round(a, 2), epoch=round(epoch, 3), epochs=epochs,
                share=round(a/(epoch*epochs), 3), torch=torch.__version__.split('+')[0])


def main(argv=None):
    "Fill the tables and print them"
    import torch
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', default='digits', choices=study.DATA)
    p.add_argument('--data_root', default='', help='folder of the JPEGs (cifar)')
    p.add_argument('--pairs', default=','.join(PAIRS))
    p.add_argument('--counts', default='', help="labels a class, e.g. 2,20; '' = all")
    p.add_argument('--fusions', default=','.join(FUSIONS))
    p.add_argument('--draws', type=int, default=5)
    p.add_argument('--device', default='auto')
    p.add_argument('--speed', action='store_true', help='measure phase A instead')
    o = p.parse_args(argv)
    torch.set_num_threads(1)
    params = dict(device=o.device) | (dict(data_root=o.data_root) if o.data_root else {})
    if o.speed:
        rows = [r for r in study.read_rows(SPEED) if r['data'] != o.data]
        rows += [speed_row(o.data, m, 50, params) for m in (2, 4, 8)]
        with SPEED.open('w', newline='') as f:
            w = csv.DictWriter(f, SPEED_COLUMNS, lineterminator='\n')
            w.writeheader()
            w.writerows(rows)
        return print(*rows, sep='\n')
    counts = [int(n) for n in o.counts.split(',') if n] or COUNTS[o.data]
    fill(o.data, o.pairs.split(','), counts, o.draws, o.fusions.split(','), params)
    t = load()
    t = t[t.data == o.data]
    print(summary(t).round(2).to_string(index=False))
    for claim, d, least in claims(t):
        print(f'{claim}: {d:+.2f} ({"holds" if d >= least else "FAILS"}, at least {least:+.1f})')


if __name__ == '__main__':
    main()
