"""Does a teacher that cannot forget make a better continual learner? asib, its parts, and the rivals of 2019–2024

    python nbs/bench/cl_analytic.py --jobs 2                    # digits: fills what the CSV lacks, prints the tables
    python nbs/bench/cl_analytic.py --data cifar --data_root DATA        # JPEGs in train/<class>, test/<class>
    python nbs/bench/cl_analytic.py --data cifar_ready --data_root DATA  # trunk pretrained on classes 0–4, tasks: 5–9
    python nbs/bench/cl_analytic.py --plan                      # counts what is missing and estimates its CPU time

In each cell (data × memory) every arm trains the same initial student on the same tasks for the same number of epochs.
No test image selects anything.

Tuning: every arm has `BUDGET` settings, tried on the tuning seeds, which are not reported; for each memory that is
tuned, the setting with the best mean accuracy on validation images is taken. Ablations use the setting of `asib`.

Equal bytes: a rival may keep as many more images as the statistics of `asib` (or of `asib_small`) would hold.

Resumable: a finished run is a row of cl_analytic.csv (tuning: cl_analytic_tuning.csv) and is not trained again. Several
processes may work at once: each locks its row."""
import argparse, json, logging, math, os, time
from functools import lru_cache
from pathlib import Path

import bridge_map
from bridge_map import chosen, estimate, p_value, read_rows, run_all

HERE = Path(__file__).parent
TABLE, TUNING = HERE/'cl_analytic.csv', HERE/'cl_analytic_tuning.csv'
WORK = HERE.parents[1]/'results'/'cl_analytic'
KEY = ['data', 'budget', 'arm', 'buffer', 'seed', 'choice']
COLUMNS = [*KEY, 'params', 'capacity', 'val', 'ACC', 'AIA', 'BWT', 'task_ACC', 'items', 'images_mb', 'statistics_mb',
           'trunk', 'curves', 'gate', 'cpu', 'torch']
BUDGET = 4                                         # Settings that every arm may try


# The grid

LRS = [dict(student_lr=r) for r in (.0015, .003, .006, .012)]      # for arms without a weight of their own

def rates(*own)->list:
    "Two settings of the arm's own weights, each with two learning rates"
    return [dict(student_lr=r) | o for o in own for r in (.003, .006)]


CAST = dict(cl_teachers='analytic+snapshot')
VIEWS = rates(dict(cl_kd_mix=1.), dict(cl_kd_mix=3.))
PHOTO_VIEWS = [dict(cl_kd_mix=3.) | o for o in ({}, dict(cl_mask='ace'), dict(cl_align=1), dict(cl_mask='ace', cl_align=1))]
DER = rates(dict(cl_der_alpha=.05), dict(cl_der_alpha=.2))
LAMBDAS = [dict(analytic_lambda=v) for v in ('auto', .1, 1., 10.)]
ARMS = dict(      # cl_method, what makes the arm, its settings to choose from
    naive=('naive', {}, LRS),
    joint=('joint', {}, LRS),
    analytic=('analytic', {}, LAMBDAS),
    er=('er', {}, LRS),
    er_ace=('er_ace', {}, LRS),
    derpp=('derpp', {}, DER),
    derpp_transplant=('derpp', dict(cl_transplant=.85), DER),
    wa=('wa', {}, rates(dict(cl_old_kd=1.), dict(cl_old_kd=2.))),
    bic=('bic', {}, rates(dict(cl_old_kd=1.), dict(cl_old_kd=2.))),
    ssil=('ssil', {}, rates(dict(cl_old_kd=1.), dict(cl_old_kd=.25))),
    clser=('clser', {}, rates(dict(clser_decay=.95), dict(clser_decay=.99))),
    gdumb=('gdumb', {}, LRS),
    views=('avgz', dict(cl_teachers='snapshot'), VIEWS),           # the same views, without the analytic teacher
    avgz=('avgz', CAST, VIEWS),
    wavg=('wavg', CAST, VIEWS),
    asib=('asib', CAST, VIEWS))
ABLATIONS = dict(                                  # `asib` in its setting, but for this
    asib_no_views=dict(cl_kd_mix=0., kd_alpha=1.),   # distilled on the images as they are
    asib_no_bridge=dict(bridge_objective='distil', teacher_adapt_epochs=0),
    asib_no_snapshot=dict(cl_teachers='analytic'),
    asib_no_stored=dict(cl_der_alpha=0.),
    asib_random=dict(cl_trunk='random'),
    asib_kmeans=dict(cl_trunk='kmeans'),
    asib_small={})                                 # fewer features: see `FEW`
FEW = dict(digits=200, cifar=64)                   # random features; centroids (four features each)
WITHOUT_MEMORY = ('naive', 'joint', 'analytic')    # one run for all memories
OURS = ('analytic', 'avgz', 'wavg', 'asib', *ABLATIONS)      # they ask the analytic teacher, so they are no rivals
RIVALS = [a for a in ARMS if a not in (*OURS, *WITHOUT_MEMORY)]
IN_BYTES = ('er_ace', 'derpp', 'wa', 'bic')        # rivals that get the bytes of the statistics as images:
BUDGETS = dict(bytes='asib', small='asib_small')   # those of which arm

SMALL = dict(preset='quickstart', dataset='digits')
PHOTOS = dict(preset='split_cifar', dataset='imagefolder', train_per_class=1112)      # 1,000 train, 112 validate
READY = dict(dataset='imagefolder', teacher1_type='resnet20', train_per_class=2000, finetune_epochs=20,
             finetune_lr=.008, batch_size=64, data_aug='standard', seed=7, report=0)     # the pretrained trunk
DATA = dict(      # parameters, memories, those that are tuned, seeds that are reported, seeds for tuning, its own trunk
    digits=(SMALL, (10, 20, 50, 200), (20, 200), range(200, 220), (1000, 1001, 1002), 'random'),
    cifar=(PHOTOS, (200, 500), (200,), range(11, 16), (1000,), 'kmeans'),
    cifar_ready=(PHOTOS | dict(num_tasks=3, task_sizes=[2, 2, 1]), (200, 500), (200,),
                 range(11, 14), (1000,), 'teacher'))


def arms_of(data)->list:
    "Every arm; an ablation that is the same as `asib` on these data is left out"
    same = [f'asib_{DATA[data][-1]}', *(['asib_small'] if data not in FEW else [])]
    return [*ARMS, *(a for a in ABLATIONS if a not in same)]


def base_of(arm)->str:
    "The arm whose settings it uses"
    return 'asib' if arm in ABLATIONS else arm


def choices_of(data, arm)->list:
    "The settings of an arm; on photographs those with views have others (new classes drown the old ones there)"
    choices = ARMS[base_of(arm)][2]
    return PHOTO_VIEWS if choices is VIEWS and data != 'digits' else choices


# One run

def key_of(row)->tuple:
    "What identifies a run: a row that exists is not trained again"
    return (row['data'], row['budget'], row['arm'], int(row['buffer']), int(row['seed']), int(row['choice']))


def config_of(row, **params):
    "The parameters of one run: (Config, those of its method)"
    from asibkd.core.config import resolve
    data, arm = row['data'], row['arm']
    method, own, _ = ARMS[base_of(arm)]
    given = dict(cl_mode=1, cl_method=method, compare=0, report=0, seed=row['seed'])
    if arm not in WITHOUT_MEMORY:
        given['replay_capacity'] = int(row['capacity'])
    less = dict(analytic_dim=FEW[data]) if arm == 'asib_small' else ABLATIONS.get(arm, {})
    return resolve(**given | DATA[data][0] | own | choices_of(data, arm)[row['choice']] | less | params)


def missing_parts(data, arms, params)->dict:
    "Arms that this version of the package does not have → why"
    from asibkd.cl.setup import check_cl
    from asibkd.core.config import AsibError
    from asibkd.run import cl                       # registers every continual method
    out = {}
    for a in arms:
        try:
            for c in every(a, 0):
                cfg, _ = config_of(dict(data=data, arm=a, seed=0, capacity=20, choice=c), **params)
                check_cl(cfg, cfg.cl_method)
        except (AsibError, ValueError) as e:
            out[a] = str(e).split('. ')[0]
    return out


def part_of(ds, classes, names):
    "The images of some classes, labels counted from 0"
    import torch
    from asibkd.data.images import ImageSet
    new = torch.full((10,), -1)
    new[classes] = torch.arange(len(classes))
    keep = (new[ds.y] >= 0).nonzero().flatten()
    return ImageSet(ds.source.x[ds.ids[keep]], new[ds.y[keep]], [names[c] for c in classes])


@lru_cache(maxsize=2)
def images_for(data, seed, root):
    "The splits of one seed, the same object for every arm"
    from asibkd.data.datasets import create_data
    cfg, _ = config_of(dict(data=data, arm='er', seed=seed, capacity=20, choice=0), data_root=root or './data')
    if data == 'digits':
        return create_data(cfg)
    sets = bridge_map.decoded(root)
    if data == 'cifar_ready':
        sets = {k: part_of(o, range(5, 10), o.classes) for k, o in sets.items()}
    return create_data(cfg, **sets)


def ready_trunk(root)->str:
    "A resnet20 that the package pretrained on CIFAR's classes 0–4; trained at the first call"
    from asibkd.core.config import log
    from asibkd.run.tasks import run_finetune
    from filelock import FileLock
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK/'resnet20_first_five.pth'
    with FileLock(f'{file}.lock'):
        if not file.exists():
            log.info('pretraining resnet20 on the first five classes')
            names = bridge_map.decoded(root)['train'].classes[:5]
            run_finetune(**READY, data_root=root, teacher1_classes=names, finetune_ckpt1=str(file),
                         results_dir=str(WORK))
    return str(file)


def learner_of(row, params):
    "The learner of one run, untrained"
    from asibkd.core.runtime import RunContext, create_accelerator
    from asibkd.run.cl import create_learners, stream_of
    from asibkd.trainers.build import settle_config
    root = params.get('data_root', '')
    if row['data'] == 'cifar_ready':
        params = params | dict(teacher1_type='resnet20', teacher1_ckpt=ready_trunk(root))
    cfg, extra = config_of(row, **params)
    images = images_for(row['data'], int(row['seed']), root)
    ctx = RunContext(settle_config(cfg, images), images, create_accelerator(cfg))
    return create_learners(ctx, stream_of(images, cfg), params=extra)[cfg.cl_method]


def curves_of(out)->dict:
    "Class-IL accuracy after each task of the student, the analytic teacher, the snapshot, the synergy"
    def curve(name): return [round(100*o[name], 2) if name in o else None for o in out.others]
    names = dict.fromkeys(k for o in out.others for k in o if k != 'average')
    return {k: curve(k) for k in names}


def train_row(row:dict, params:dict)->dict:
    "Train and test one run"
    import torch
    from asibkd.run.cl import cl_row
    learner = learner_of(row, params)
    start = time.process_time()
    out = learner.learn()
    cpu = time.process_time() - start
    r = cl_row(out, learner, learner.stream)
    percent = {k: round(100*r[v], 3) for k, v in dict(val='val_acc', ACC='ACC', AIA='AIA', BWT='BWT',
                                                      task_ACC='task_ACC').items()}
    return row | percent | dict(
        items=r['memory_items'], images_mb=round(r['memory_mb'], 6),
        statistics_mb=round(r.get('statistics_mb') or 0, 6), trunk=r.get('trunk', ''),
        curves=json.dumps(curves_of(out)), gate=json.dumps([g.get('gate') for g in out.gates]),
        cpu=round(cpu, 2), torch=torch.__version__.split('+')[0])


def try_row(file, row:dict, params:dict)->bool:
    "Train what is missing and free; where a run fails, the others go on: hours of them are worth more than a traceback"
    import torch
    from asibkd.core.config import log
    torch.set_num_threads(1)
    log.setLevel(logging.ERROR)
    return bridge_map.try_row(file, row, key_of, lambda: train_row(row, params), COLUMNS, Exception)


# What is to be done

def wanted(data, arms, buffers, seeds, choice, budget='images', capacity=None)->list:
    "A row for each run; `choice(arm, buffer)` → settings; `capacity(arm, buffer)` → images, or None: no such run"
    rows = {}
    for seed in seeds:
        for b in buffers:
            for arm in arms:
                kept = 0 if arm in WITHOUT_MEMORY else b
                room = kept if capacity is None else capacity(arm, b)
                for c in () if room is None else choice(arm, kept):
                    r = dict(data=data, budget=budget, arm=arm, buffer=kept, seed=seed, choice=c, capacity=room,
                             params=json.dumps(choices_of(data, arm)[c]))
                    rows[key_of(r)] = r
    return [*rows.values()]


def every(arm, buffer):
    "All settings of an arm: for tuning"
    return range(len(ARMS[base_of(arm)][2]))


def nearest(best:dict, arm, buffer)->int:
    "The chosen setting for this memory, or for the nearest that was tuned; untuned arms with views: that of `asib`; else 0"
    tuned = {a for a, _ in best}
    like = base_of(arm) if base_of(arm) in tuned or ARMS[base_of(arm)][2] is not VIEWS else 'asib'
    there = [b for a, b in best if a == like]
    if not there:
        return 0
    return best[like, min(there, key=lambda b: abs(math.log((b or 1)/(buffer or 1))))]


def room_in_bytes(t, data, ours='asib')->dict:
    "(rival, buffer) → images that take the bytes of our images and statistics, at what the rival stores of each"
    t = t[(t.data == data) & (t.budget == 'images') & (t['items'] > 0)]
    t = t.assign(each=t.images_mb/t['items'])
    mean = t.groupby(['arm', 'buffer'])[['each', 'images_mb', 'statistics_mb']].mean()
    total = (mean.images_mb + mean.statistics_mb).to_dict()
    return {(a, b): int((total[ours, b] + 1e-12)/r.each) for (a, b), r in mean.iterrows() if (ours, b) in total}


def in_bytes(data, arms, buffers, seeds, choice)->list:
    "The rivals' rows with memories of as many bytes as ours: as far as the runs that say how many exist"
    rivals, rows = [a for a in IN_BYTES if a in arms], []
    for budget, ours in BUDGETS.items():
        room = room_in_bytes(load(), data, ours)
        rows += wanted(data, rivals, buffers, seeds, choice, budget, lambda a, b: room.get((a, b)))
    return rows


def work_through(file, rows:list, jobs:int, params:dict):
    "Train what the file lacks"
    done = {key_of(r) for r in read_rows(file)}
    run_all([(try_row, file, r, params) for r in rows if key_of(r) not in done], jobs, 'runs')


# Statistics

NUMBERS = ['buffer', 'seed', 'choice', 'capacity', 'val', 'ACC', 'AIA', 'BWT', 'task_ACC', 'items', 'images_mb',
           'statistics_mb', 'cpu']

def load(file=None):
    "The finished runs as a DataFrame; those without a memory are repeated for every memory"
    import pandas as pd
    t = pd.DataFrame(read_rows(file or TABLE), columns=COLUMNS)
    t = t.drop_duplicates(KEY[:-1], keep='last')                      # the last choice of the tuning
    t[NUMBERS] = t[NUMBERS].apply(pd.to_numeric)
    shared = t[t.buffer == 0].drop(columns=['buffer', 'budget'])
    t = t[t.buffer > 0]
    places = t[['data', 'budget', 'buffer', 'seed']].drop_duplicates()
    return pd.concat([t, places.merge(shared, on=['data', 'seed'])], ignore_index=True)


def cells(t, budget='images'):
    "((data, buffer), its runs); in bytes: the rivals with the larger memory, and what they are compared with"
    import pandas as pd
    ours = [*({*OURS} - {*ABLATIONS})] if budget == 'bytes' else [BUDGETS.get(budget)]
    more = t[t.budget == budget]
    for (data, b), g in t[t.budget == 'images'].groupby(['data', 'buffer'], sort=False):
        if budget != 'images':
            larger = more[(more.data == data) & (more.buffer == b)]
            if larger.empty:
                continue
            rest = g[g.arm.isin([*ours, *WITHOUT_MEMORY])]
            g = pd.concat([rest, larger[~larger.arm.isin({*rest.arm})]])
        yield (data, int(b)), g


def by_seed(g, measure='ACC'):
    "Seeds × arms"
    return g.pivot_table(index='seed', columns='arm', values=measure)


def against_best(t, budget='images', ours='asib', measure='ACC'):
    "One row per cell: `ours` minus its best rival (the best by its test mean: a bar no single rival has to clear)"
    import pandas as pd
    from asibkd.analysis.intervals import outcome, paired
    rows = []
    for (data, b), g in cells(t, budget):
        acc = by_seed(g, measure)
        rivals = acc[[a for a in RIVALS if a in acc]]
        if ours not in acc or rivals.empty:
            continue
        best = rivals.loc[acc[ours].dropna().index].mean().idxmax()
        mean, half, n = paired(acc[ours], acc[best])
        row = dict(data=data, buffer=b, ours=acc[ours].mean(), best=best, at=acc[best].mean(), difference=mean)
        p = p_value((acc[ours] - acc[best]).dropna())
        rows.append(row | dict(half=half, seeds=n, p=p, outcome=outcome(mean, half, n)))
    names = ['data', 'buffer', 'ours', 'best', 'at', 'difference', 'half', 'seeds', 'p', 'outcome']
    return pd.DataFrame(rows, columns=names)


def interval(v)->str:
    "Mean ± half-width of the 95 % t-interval"
    from asibkd.analysis.intervals import t_interval
    return '{:.2f} ± {:.2f}'.format(*t_interval(v)).removesuffix(' ± nan')


def table(g, ours='asib'):
    "The arms of one cell, the best first: ACC, AIA, BWT, bytes, CPU, and `ours` minus each, paired over seeds"
    import pandas as pd
    from asibkd.analysis.intervals import outcome, paired
    acc, rows = by_seed(g), []
    for arm in acc.mean().sort_values(ascending=False).index:
        o = g[g.arm == arm]
        row = dict(arm=arm, seeds=len(o), ACC=interval(o.ACC), AIA=interval(o.AIA), BWT=interval(o.BWT))
        row |= {'task-IL': f'{o.task_ACC.mean():.2f}', 'images kept': round(o['items'].mean()),
                'images (MB)': f'{o.images_mb.mean():.3f}', 'statistics (MB)': f'{o.statistics_mb.mean():.3f}',
                'CPU (s)': f'{o.cpu.mean():.1f}'}
        if ours in acc and arm != ours:
            mean, half, n = paired(acc[ours], acc[arm])
            row |= {f'{ours} minus it': f'{mean:+.2f} ± {half:.2f}'.removesuffix(' ± nan'),
                    'outcome': outcome(mean, half, n)}
        rows.append(row)
    return pd.DataFrame(rows).fillna('')


def parts(t, ours='asib'):
    "What each part is worth: `asib` minus each ablation, and minus avgz and wavg of the same cast"
    import pandas as pd
    from asibkd.analysis.intervals import outcome, paired
    rows = []
    for (data, b), g in cells(t):
        acc = by_seed(g)
        for arm in (a for a in ('avgz', 'wavg', *ABLATIONS) if a in acc and ours in acc):
            mean, half, n = paired(acc[ours], acc[arm])
            rows.append({'data': data, 'memory': b, f'{ours} minus': arm, 'points': f'{mean:+.2f} ± {half:.2f}',
                         'seeds': n, 'outcome': outcome(mean, half, n)})
    return pd.DataFrame(rows)


def sentence(m)->str:
    "The comparison with the best rival, cell by cell"
    if m.empty:
        return 'No cell is finished.'
    def said(r):
        return (f'{r.data}, memory {r.buffer}: {r.difference:+.2f} ± {r.half:.2f} against {r.best} '
                f'({r.seeds} seeds, {r.outcome})')
    return 'asib minus the best rival, ACC. ' + ' · '.join(map(said, m.itertuples())) + '.'


def settings_table(tuning:list):
    "What was chosen for each arm, by memory"
    import pandas as pd
    out = []
    for data in dict.fromkeys(r['data'] for r in tuning):
        best = chosen(tuning, data, 'buffer')
        for arm in dict.fromkeys(a for a, _ in best):
            settings = {b: choices_of(data, arm)[c] for (a, b), c in best.items() if a == arm}
            said = {b: ', '.join(f'{k} {v}' for k, v in o.items()) for b, o in settings.items()}
            out.append(dict(data=data, arm=arm) | {str(b or 'none'): v for b, v in sorted(said.items())})
    return pd.DataFrame(out).fillna('')


# Figures

def plot_cells(t, data, budget='images'):
    "ACC of every arm, one panel per memory: mean, interval, and a tick for each seed"
    from asibkd.analysis.intervals import t_interval
    from asibkd.core.picture import COLOURS, Picture
    shown = [(k[1], g) for k, g in cells(t, budget) if k[0] == data]
    arms = [a for a in arms_of(data) if any(a in {*g.arm} for _, g in shown)]
    fig = Picture(figsize=(1.6 + 2.3*len(shown), .8 + .2*len(arms)), layout='constrained')
    for ax, (b, g) in zip(fig.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown):
        for i, a in enumerate(arms):
            v, colour = g[g.arm == a].ACC, COLOURS[0 if a in RIVALS else 2 if a in WITHOUT_MEMORY else 1]
            mean, half = t_interval(v)
            ax.errorbar(mean, i, xerr=half, fmt='o', ms=3, color=colour, capsize=2)
            ax.plot(v, [i + .25]*len(v), '|', color=colour, ms=4)
        ax.set_title(f'memory {b}', fontsize=9)
        ax.set_xlabel('ACC (%)')
        ax.spines[['top', 'right']].set_visible(False)
    ax.set_yticks(range(len(arms)), arms, fontsize=8)
    ax.invert_yaxis()
    return fig


def plot_curves(g, arms=('asib', 'derpp', 'joint'), title=''):
    "Accuracy over all classes seen, after each task: students (lines), and the teachers of `asib` (dashed)"
    import numpy as np
    from asibkd.core.picture import Picture
    fig = Picture(figsize=(5.4, 2.9), layout='constrained')
    ax = fig.subplots()
    def mean_of(arm, who):
        rows = [json.loads(o).get(who) for o in g[g.arm == arm].curves]
        rows = [[float('nan') if v is None else v for v in r] for r in rows if r]
        return np.mean(rows, 0) if rows else None
    lines = [(a, 'student', '-') for a in arms] + [('asib', w, '--') for w in ('analytic1', 'snapshot1', 'synergy')]
    for arm, who, style in lines:
        if (v := mean_of(arm, who)) is not None:
            name = arm if who == 'student' else f'{who.rstrip("12345")} of {arm}'
            ax.plot(range(1, len(v) + 1), v, style, label=name, lw=1.4, marker='o', ms=3)
    ax.set(xlabel='after task', ylabel='class-IL accuracy (%)', title=title)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(fontsize=7, frameon=False)
    return fig


# The command

def options(argv):
    "The command's options"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', default='digits', choices=DATA)
    p.add_argument('--data_root', default='', help='folder of the JPEGs (cifar, cifar_ready)')
    p.add_argument('--methods', default='', help="arms, e.g. derpp,asib,asib_no_views; '' = all")
    p.add_argument('--buffers', default='', help="images in the memory, e.g. 20,50; '' = all")
    p.add_argument('--seeds', default='', help="e.g. 200,201; '' = all that are reported")
    p.add_argument('--budget', default='both', choices=('images', 'bytes', 'both'), help='which memory is equal')
    p.add_argument('--jobs', type=int, default=1, help='processes, one thread each')
    p.add_argument('--device', default='auto')
    p.add_argument('--tuned_at', default='', help="memories that settings are tried with, e.g. 20; '' = all that are tuned")
    p.add_argument('--tuned_on', default='', choices=DATA, help='take the settings that were chosen on these data')
    p.add_argument('--untuned', action='store_true', help='setting 0 for every arm: a trial')
    p.add_argument('--plan', action='store_true', help='only count what is missing')
    return p.parse_args(argv)


def numbers(text, usual)->list:
    "'1,2' → [1, 2]; '' = the usual ones"
    return [int(s) for s in text.split(',') if s] or [*usual]


def arms_asked(o, params)->list:
    "The arms of a call that this version has; the others are named"
    known = arms_of(o.data)
    arms = [*filter(None, o.methods.split(','))] or known
    if unknown := [a for a in arms if a not in known]:
        raise SystemExit(f"--methods {','.join(unknown)}: unknown. Choose from {', '.join(known)}.")
    absent = missing_parts(o.data, arms, params)
    for a, why in absent.items():
        print(f'{a} is left out: {why}')
    return [a for a in arms if a not in absent]


def report(data):
    "Print the tables of one dataset"
    t = load()
    t = t[t.data == data]
    for budget, ours in (dict(images='asib') | BUDGETS).items():
        for (_, b), g in cells(t, budget):
            what = 'images' if budget == 'images' else f'bytes as {ours}'
            print(f'\n{data}, memory {b}, equal {what}', table(g, ours).to_string(index=False), sep='\n')
    if len(p := parts(t)):
        print('', p.to_string(index=False), sep='\n')
    print('', sentence(against_best(t)), sep='\n')


def main(argv=None):
    "Fill the tables, and print them"
    o = options(argv)
    if o.data != 'digits' and not o.data_root:
        raise SystemExit(f'--data {o.data} needs --data_root: a folder with train/<class>/ and test/<class>/.')
    _, buffers, tuned_at, reported, trial, _ = DATA[o.data]
    params = dict(device=o.device) | (dict(data_root=o.data_root) if o.data_root else {})
    arms, buffers, seeds = arms_asked(o, params), numbers(o.buffers, buffers), numbers(o.seeds, reported)
    tuned_at = numbers(o.tuned_at, tuned_at)
    tuning = wanted(o.data, dict.fromkeys(map(base_of, arms)), tuned_at, trial, every)
    if o.untuned or o.tuned_on:
        tuning = []
    if not o.plan:
        work_through(TUNING, tuning, o.jobs, params)
    best = {} if o.untuned else chosen(read_rows(TUNING), o.tuned_on or o.data, 'buffer')
    def choice(a, b): return [nearest(best, a, b)]
    rows = wanted(o.data, arms, buffers, seeds, choice) if o.budget != 'bytes' else []
    if not o.plan:
        work_through(TABLE, rows, o.jobs, params)
    larger = in_bytes(o.data, arms, buffers, seeds, choice) if o.budget != 'images' else []
    if o.plan:
        seen = [r for r in read_rows(TABLE) + read_rows(TUNING) if r['data'] == o.data]
        plans = [estimate(part, file, seen, key_of, 'runs') for part, file in ((tuning, TUNING), (rows + larger, TABLE))]
        return print(*plans, sep='\n')
    work_through(TABLE, larger, o.jobs, params)
    report(o.data)


if __name__ == '__main__':
    main()
