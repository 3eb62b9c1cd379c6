"""The map: which student is best where several teachers differ and labels are few?

    python nbs/bench/bridge_map.py --jobs 2                  # digits: fills what the CSV lacks, then prints the map
    python nbs/bench/bridge_map.py --data cifar --data_root DATA --cells specialists:20,specialists:100 --seeds 0,1,2,3,4
    python nbs/bench/bridge_map.py --plan                    # counts what is missing and estimates its CPU time

A cell is a pair of teachers × labels a class. In each, every arm trains the same initial student for the same number of
steps, from the same two frozen teachers, on the same images and the same labels. Teachers learn from images that the
student never sees (`teacher_share`). No validation image selects anything: the last epoch counts.

Tuning: every arm has `BUDGET` settings. Each is tried on the tuning seeds, in all five pairs of teachers; per arm and
labels a class, the setting with the best mean accuracy on validation images is taken. Tuning seeds are not reported.

Resumable: a finished student is a row of bridge_map.csv (tuning: bridge_map_tuning.csv) and is not trained again;
teachers are kept in results/bridge_map. Several processes may work at once: each locks its teacher and its row."""
import argparse, csv, json, logging, math, os, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')      # small networks: two processes are faster than two threads

HERE = Path(__file__).parent
TABLE, TUNING, WORK = HERE/'bridge_map.csv', HERE/'bridge_map_tuning.csv', HERE.parents[1]/'results'/'bridge_map'
COLUMNS = ['data', 'setting', 'labels', 'seed', 'arm', 'choice', 'params', 'test', 'val', 'steps', 'cpu', 'teacher1',
           'teacher2', 'average', 'stages', 'torch']
BUDGET = 4                                         # Settings that every arm may try


# The grid

@dataclass(frozen=True)
class Teacher:
    "How one teacher came about"
    arch: str
    share: float = 1.     # Part of the teachers' images that it has seen, by class
    wrong: float = 0.     # Part of its labels that are wrong
    overlap: int = -1     # It knows a part of the classes; per cent of them that both know. −1: it knows all
    which: int = 0        # Which of the two parts

    @property
    def name(self)->str:
        "Names its file"
        return '-'.join(str(getattr(self, f.name)) for f in fields(self))


FIRST = Teacher('resnet20')
NO_TEACHERS = '-'                                  # Where `ce` stands, once for all pairs
SETTINGS = dict(
    equal=(FIRST, Teacher('resnet14')),
    unequal=(FIRST, Teacher('resnet14', share=.1)),
    noisy=(FIRST, Teacher('resnet14', wrong=.4)),
    specialists=(Teacher('resnet20', overlap=0), Teacher('resnet14', overlap=0, which=1)),
    overlapping=(Teacher('resnet20', overlap=40), Teacher('resnet14', overlap=40, which=1)))

COMMON = dict(teacher_cache='memory', data_aug='standard', student_type='resnet8', num_stages=2, compare=0)
DATA = {          # parameters, labels a class (0 = all), seeds that are reported, seeds for tuning
    'digits': (dict(dataset='digits', use_amp=0, batch_size=64, student_epochs_per_stage=10, student_lr=.01,
                    finetune_epochs=30, finetune_lr=.003, val_frac=.1, teacher_share=.4),
               (5, 10, 20, 0), range(10), (1000, 1001)),      # all = 70: there are no 100
    'mnist5k': (dict(dataset='mnist5k', use_amp=0, batch_size=64, student_epochs_per_stage=6, student_lr=.01,
                     finetune_epochs=15, finetune_lr=.003, val_frac=.1, teacher_share=.4),
                (5, 20, 100, 0), range(10), (1000, 1001)),
    'cifar': (dict(train_per_class=2200, batch_size=128, student_epochs_per_stage=9,
                   student_lr=.01, student_weight_decay=.02, lr_warmup_epochs=1, finetune_epochs=18, finetune_lr=.008,
                   finetune_weight_decay=.02, val_frac=.0909, teacher_share=.5),
              (5, 20, 50, 100, 0), range(5), (1000,))}

KD = [dict(tau_start=t, ce_alpha=a) for t in (2, 4) for a in (.1, 1)]
BRIDGE = [dict(tau_start=t, ce_alpha=a, feat_kd_alpha=f) for t in (2, 4) for a, f in ((.1, 3), (1, 3))]
FUSE = dict(bridge_objective='fuse', ib_beta='auto')
ARMS = dict(      # method, what makes the arm, its settings to choose from
    ce=('ce', {}, [dict(student_lr=r, label_smoothing=s) for r in (.005, .02) for s in (0, .1)]),
    best=('best', {}, KD),
    avgz=('avgz', {}, KD),
    wavg=('wavg', {}, KD),
    camkd=('camkd', {}, [dict(tau_start=t, camkd_beta=b) for t in (2, 4) for b in (0, 50)]),
    uhc=('uhc', {}, KD),
    cfl=('cfl', dict(cfl_on='pooled'), [dict(ce_alpha=a, cfl_beta=b) for a in (.1, 1) for b in (1, 10)]),
    stack=('stack', {}, KD),
    asmb_no_ib=('asmb', FUSE | dict(use_ib=0), BRIDGE),
    asmb_no_feature=('asmb', FUSE | dict(feat_kd_alpha=0), KD),
    asmb=('asmb', FUSE, BRIDGE),
    asmb_no_query=('asmb', FUSE | dict(mbm_learnable_q=1), BRIDGE),
    asmb_no_u=('asmb', FUSE, BRIDGE),
    asmb_no_delta=('asmb', FUSE, BRIDGE))
WITHOUT = dict(asmb_no_u=('u',), asmb_no_delta=('delta',))    # Parts of the formula that the path leaves closed
ABLATIONS = ('asmb_no_query', *WITHOUT)                       # only where --arms names them; in the setting of asmb
GRID = [a for a in ARMS if a not in ABLATIONS]
OURS, LABELS_ONLY = tuple(a for a in ARMS if a.startswith('asmb')), ('ce',)


def base_of(arm)->str:
    "The arm whose settings it uses"
    return 'asmb' if arm in ABLATIONS else arm


# Rows

def key_of(row)->tuple:
    "What identifies a student: a row that exists is not trained again"
    return (row['data'], row['setting'], int(row['labels']), int(row['seed']), row['arm'], int(row['choice']))


def read_rows(file)->list:
    "The rows of a CSV; a line cut off by a crash is left out"
    if not Path(file).exists():
        return []
    with open(file, newline='') as f:
        return [r for r in csv.DictReader(f) if r['torch']]


def add_row(file, row:dict, columns=COLUMNS):
    "Append one row; other processes may do the same"
    from filelock import FileLock
    WORK.mkdir(parents=True, exist_ok=True)
    with FileLock(str(WORK/f'{Path(file).name}.lock')):
        new = not Path(file).exists() or not Path(file).stat().st_size
        torn = not new and not Path(file).read_bytes().endswith(b'\n')
        with open(file, 'a', newline='') as f:
            if torn:
                f.write('\n')
            w = csv.DictWriter(f, columns, lineterminator='\n')
            if new:
                w.writeheader()
            w.writerow(row)


# One pair of teachers and one seed

def config_of(data, labels, seed, arm, choice, **params):
    "The parameters of one student: (Config, those of its method)"
    from asibkd.core.config import resolve
    method, own, choices = ARMS[arm]
    given = COMMON | DATA[data][0] | choices[choice] | own | params
    return resolve(preset=f'method/{method}', method=method, seed=seed, labels_per_class=labels, **given)


def wrong_labels(y, share, n_class, seed):
    "A part of the labels replaced by other classes"
    import torch
    from asibkd.core.runtime import generator
    g = generator(seed, 'wrong')
    at = torch.randperm(len(y), generator=g)[:round(share*len(y))]
    y = y.clone()
    y[at] = (y[at] + torch.randint(1, n_class, (len(at),), generator=g)) % n_class
    return y


def images_of(t:Teacher, data, seed):
    "The images a teacher has seen, as `Data` without validation; its classes, or None"
    import torch
    from asibkd.data.images import by_class, overlap_classes, restrict
    ds = data.teacher.subset(torch.arange(len(data.teacher)))
    if t.wrong:
        ds.y = wrong_labels(ds.y, t.wrong, data.n_class, seed)
    if t.share < 1:
        ds = ds.subset(torch.cat([g[:max(2, round(t.share*len(g)))] for g in by_class(ds.y)]))
    seen = replace(data, train=ds, teacher_images=ds, val=ds.subset([]))
    if t.overlap < 0:
        return seen, None
    classes = overlap_classes(data.n_class, t.overlap, seed)[t.which]
    return restrict(seen, classes), classes


def build(t:Teacher, cfg, data, name):
    "The network of a teacher, and of which `Data` it knows"
    from asibkd.models.kdmodel import spread_classes
    from asibkd.models.teachers import create_teacher
    from asibkd.core.runtime import forked_rng
    seen, classes = images_of(t, data, cfg.seed)
    with forked_rng(cfg.seed, 'init', name):
        net = create_teacher(t.arch, n_class=seen.n_class, img_size=data.shape[-1], in_chans=data.shape[0],
                             small_input=cfg.small_input == '1')
    def finish():
        return net if classes is None else spread_classes(net, classes, data.n_class)
    return net, seen, finish


def get_teacher(t:Teacher, ctx, name):
    "A frozen teacher: from its file, or trained and kept there"
    import torch
    from asibkd.freeze import freeze_all
    from asibkd.trainers.phases import finetune, to_device
    from filelock import FileLock
    file = WORK/'teachers'/f'{ctx.data.name}-s{ctx.cfg.seed}-{t.name}.pt'
    file.parent.mkdir(parents=True, exist_ok=True)
    net, seen, finish = build(t, ctx.cfg, ctx.data, name)
    with FileLock(f'{file}.lock'):
        if file.exists():
            net.load_state_dict(torch.load(file, weights_only=True))
        else:
            epochs = round(ctx.cfg.finetune_epochs/t.share)               # as many steps on fewer images
            finetune(net, ctx.but(data=seen, cfg=ctx.cfg.model_copy(update=dict(finetune_epochs=epochs))), name)
            torch.save(net.state_dict(), file.with_suffix('.tmp'))
            file.with_suffix('.tmp').rename(file)
    to_device(ctx, finish())
    freeze_all(net)
    return net.eval()


@lru_cache(maxsize=1)
def decoded(root):
    "CIFAR-10 as JPEGs in train/<class> and test/<class>, decoded once and kept in a file"
    import torch
    from asibkd.core.config import resolve
    from asibkd.data.datasets import create_data
    from asibkd.data.images import ImageSet
    from filelock import FileLock
    file = WORK/'cifar.pt'
    WORK.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{file}.lock'):
        if not file.exists():
            d = create_data(resolve(dataset='imagefolder', data_root=root, val_frac=0)[0])
            torch.save({k: (o.x, o.y, d.classes) for k, o in (('train', d.train), ('test', d.test))}, file)
    return {k: ImageSet(*o) for k, o in torch.load(file, weights_only=True).items()}


@lru_cache(maxsize=8)
def images_for(data, labels, seed, root):
    "The splits of one seed and number of labels, the same object for every arm"
    from asibkd.data.datasets import create_data
    cfg, _ = config_of(data, labels, seed, 'avgz', 0)
    return create_data(cfg, **(decoded(root) if data == 'cifar' else {}))


def open_cell(data, labels, seed, arm, choice, params):
    "The context of one student: settled parameters, images, device; those of its method"
    from asibkd.core.runtime import RunContext, create_accelerator
    from asibkd.trainers.build import settle_config
    cfg, extra = config_of(data, labels, seed, arm, choice, **params)
    images = images_for(data, labels, seed, cfg.data_root)
    return RunContext(settle_config(cfg, images), images, create_accelerator(cfg)), extra


def accuracies(models:dict, teachers, ctx, synergy=None, split='test')->dict:
    "Accuracy in per cent of students, teachers, their average and, with a bridge, the synergy"
    from asibkd.data.batches import make_loader
    from asibkd.distil.metrics import accuracy, collect_logits
    from asibkd.models.cache import get_teacher_fn
    loader = make_loader(ctx.cfg, ctx.data, split, split, device=ctx.acc.device)
    named = {f'teacher{i + 1}': t for i, t in enumerate(teachers)}
    fns = {k: get_teacher_fn(t, loader, ctx.cfg) for k, t in named.items()}
    z, y = collect_logits(named | models, loader, synergy, [*named], 'student', fns, ctx.acc.autocast)
    return {k: round(100*accuracy(v, y), 3) for k, v in z.items() if v.ndim == 2 and v.shape[1] == ctx.data.n_class}


def watcher(student, teachers, ctx, stages:list):
    "A callback that counts the student's steps, and looks at the test set where a stage begins and ends"
    from asibkd.trainers.loop import Callback
    class Watch(Callback):
        steps = 0
        def before_fit(self, loop):
            if loop.phase.kind == 'B' and (s := getattr(loop.phase.objective.method, 'synergy', None)) is not None:
                stages.append(dict(synergy=accuracies(dict(student=student), teachers, ctx, s)['synergy']))
        def after_step(self, loop):
            self.steps += loop.phase.kind == 'B'
        def after_fit(self, loop):
            if loop.phase.kind == 'B' and stages:
                stages[-1]['student'] = accuracies(dict(student=student), (), ctx)['student']
    return Watch()


@contextmanager
def ablation(arm):
    "The path of β without a part of the formula, for the arms of `WITHOUT`"
    from functools import partial
    from asibkd.trainers import fusing
    full = fusing.fit_path
    fusing.fit_path = partial(full, without=WITHOUT[arm]) if arm in WITHOUT else full
    try:
        yield
    finally:
        fusing.fit_path = full


def train_row(row:dict, teachers, params:dict)->dict:
    "Train and test one student"
    import torch
    from asibkd.run.students import train_student
    from asibkd.trainers.build import build_student
    ctx, extra = open_cell(row['data'], row['labels'], row['seed'], row['arm'], row['choice'], params)
    student, stages = build_student(ctx.cfg, ctx.data), []
    watch = watcher(student, teachers, ctx, stages)
    blind = replace(ctx.data, val=ctx.data.val.subset([]))          # nothing is selected on validation images
    start = time.process_time()
    with ablation(row['arm']):
        _, gates, _ = train_student(ctx.cfg.method, student, teachers, ctx.but(data=blind, callbacks=(watch,)), extra)
    cpu = time.process_time() - start
    test = accuracies(dict(student=student), teachers, ctx)
    val = accuracies(dict(student=student), (), ctx, split='val')['student']
    for s, g in zip(stages, gates):
        s |= {k: g.get(k) for k in ('gate', 'beta', 'base_acc', 'synergy_acc', 'seconds') if k in g}
    return row | dict(test=test['student'], val=val, steps=watch.steps, cpu=round(cpu, 2), stages=json.dumps(stages),
                      torch=torch.__version__.split('+')[0],
                      **{k: test.get(k) for k in ('teacher1', 'teacher2', 'average')})


def try_row(file, row:dict, key, train, columns, refused)->bool:
    "Add the row that `train` makes, if it is missing and free; after a `refused` error the next call tries it again"
    from filelock import FileLock, Timeout
    (WORK/'locks').mkdir(parents=True, exist_ok=True)
    text = '-'.join(map(str, (Path(file).stem, *key(row))))
    try:
        with FileLock(str(WORK/'locks'/text), timeout=0):
            if key(row) in {key(r) for r in read_rows(file)}:
                return False
            add_row(file, train(), columns)
            return True
    except Timeout:
        return False
    except refused as e:
        print(f"{', '.join(map(str, key(row)))}: {type(e).__name__}: {e}", flush=True)
        return False


def run_unit(file, data, setting, seed, todo:list, params:dict)->int:
    "The missing rows of one pair of teachers and one seed; how many were added"
    import torch
    from asibkd.core.config import AsibError, log
    torch.set_num_threads(1)
    log.setLevel(logging.ERROR)
    ctx, _ = open_cell(data, 0, seed, 'avgz', 0, params)
    teachers = [get_teacher(t, ctx, f'teacher{i + 1}') for i, t in enumerate(SETTINGS.get(setting, ()))]
    return sum(try_row(file, r, key_of, lambda: train_row(r, teachers, params), COLUMNS, AsibError) for r in todo)


# What is to be done

def wanted(data, cells, arms, seeds, choice)->list:
    "A row for each student; `choice(arm, labels)` → numbers of settings"
    rows = {}
    for seed in seeds:
        for setting, labels in cells:
            for arm in arms:
                where = NO_TEACHERS if arm in LABELS_ONLY else setting
                for c in choice(arm, labels):
                    r = dict(data=data, setting=where, labels=labels, seed=seed, arm=arm, choice=c,
                             params=json.dumps(ARMS[arm][2][c]))
                    rows[key_of(r)] = r
    return [*rows.values()]


def chosen(tuning:list, data, of='labels')->dict:
    "(arm, labels) → the setting with the best mean validation accuracy over teachers and tuning seeds; `of`: a column"
    import pandas as pd
    t = pd.DataFrame([r for r in tuning if r['data'] == data])
    if t.empty:
        return {}
    t = t.astype(dict(val=float, choice=int) | {of: int})
    mean = t.groupby(['arm', of, 'choice']).val.mean()
    return {k: int(g.droplevel([0, 1]).idxmax()) for k, g in mean.groupby(['arm', of])}


def nearest(best:dict, arm, labels)->int:
    "The chosen setting for this number of labels, or for the nearest that was tuned; 0 without tuning"
    arm = base_of(arm)
    def far(n): return abs(math.log((n or 10**4)/(labels or 10**4)))
    return best[min((k for k in best if k[0] == arm), key=lambda k: far(k[1]))] if any(k[0] == arm for k in best) else 0


def results_of(tasks:list, jobs:int):
    "What (function, *arguments) return, as they finish, in `jobs` processes"
    if jobs == 1:
        yield from (work(*given) for work, *given in tasks)
        return
    with ProcessPoolExecutor(jobs, get_context('spawn')) as pool:
        for f in as_completed([pool.submit(*t) for t in tasks]):
            yield f.result()


def run_all(tasks:list, jobs:int, what):
    "Run tasks that return how many rows they added, and say how far it is"
    start, n = time.monotonic(), 0
    for i, added in enumerate(results_of(tasks, jobs), 1):
        n += added
        print(f'{i}/{len(tasks)} {what}, {n} trained, {(time.monotonic() - start)/60:.0f} min', flush=True)


def work_through(file, rows:list, jobs:int, params:dict):
    "Train what the file lacks, in units that share their teachers; with more processes than units, each in parts"
    done, units = {key_of(r) for r in read_rows(file)}, {}
    for r in rows:
        if key_of(r) not in done:
            units.setdefault((r['data'], r['setting'], r['seed']), []).append(r)
    n = 1 if len(units) >= jobs else math.ceil(3*jobs/max(1, len(units)))
    tasks = [(run_unit, file, *k, todo[i::n], params) for k, todo in units.items() for i in range(min(n, len(todo)))]
    run_all(tasks, jobs, 'units')


# Statistics

def holm(p):
    "Holm's adjusted p-values (1979); NaN stays"
    import numpy as np
    p = np.asarray(p, float)
    out, running = np.full(len(p), np.nan), 0.
    order = [i for i in p.argsort() if p[i] == p[i]]
    for k, i in enumerate(order):
        running = max(running, min(1., (len(order) - k)*p[i]))
        out[i] = running
    return out


def p_value(d)->float:
    "Two-sided paired t-test of differences; identical ones on a few seeds decide nothing"
    import numpy as np
    from scipy import stats
    d = np.asarray(d, float)
    if len(d) < 2:
        return float('nan')
    return 1. if d.std() < 1e-9 else float(stats.ttest_1samp(d, 0).pvalue)


def load(file=None):
    "The finished students as a DataFrame, `ce` repeated in every cell; unequal steps are an error"
    import pandas as pd
    t = pd.DataFrame(read_rows(file or TABLE), columns=COLUMNS)
    t = t.drop_duplicates(COLUMNS[:5], keep='last')        # the last choice of the tuning
    number = ['labels', 'seed', 'choice', 'test', 'val', 'steps', 'cpu', 'teacher1', 'teacher2', 'average']
    t[number] = t[number].apply(pd.to_numeric)
    cell, taught = ['data', 'setting', 'labels', 'seed'], ['teacher1', 'teacher2', 'average']
    shared = t[t.setting == NO_TEACHERS].drop(columns=['setting', *taught])
    t = t[t.setting != NO_TEACHERS]
    places = t[[*cell, *taught]].drop_duplicates(cell)
    t = pd.concat([t, places.merge(shared, on=['data', 'labels', 'seed'])], ignore_index=True)
    for k, g in t.groupby(cell):
        if g.steps.nunique() > 1:
            raise ValueError(f"Unequal steps in {k}: {dict(zip(g.arm, g.steps))}. Such rows cannot be compared.")
    return t


def cell_row(g, ours='asmb')->dict:
    "One cell: the arm against the best baseline, and against wavg"
    from asibkd.analysis.intervals import paired
    test = g.pivot(index='seed', columns='arm', values='test')
    base = test.drop(columns=[a for a in OURS if a in test])
    if ours not in test or base.empty:
        return {}
    best = base.loc[test[ours].dropna().index].mean().idxmax()
    mean, half, n = paired(test[ours], test[best])
    row = dict(asmb=test[ours].mean(), best=best, at=test[best].mean(), difference=mean, half=half, seeds=n,
               p=p_value((test[ours] - test[best]).dropna()))
    if 'wavg' in test:
        row |= dict(zip(('vs_wavg', 'wavg_half'), paired(test[ours], test.wavg)))
    return row


def the_map(t, ours='asmb', level=.05):
    "One row per cell: the difference to its best baseline with interval, Holm's p over the cells, the outcome"
    import pandas as pd
    cells = [dict(zip(('data', 'setting', 'labels'), k)) | cell_row(g, ours)
             for k, g in t.groupby(['data', 'setting', 'labels'])]
    m = pd.DataFrame([c for c in cells if 'best' in c])
    if m.empty:
        return m
    m['holm'] = m.groupby('data').p.transform(lambda p: holm(p))
    def outcome(r): return 'undecided' if not r.holm < level else 'won' if r.difference > 0 else 'lost'
    m['outcome'] = [outcome(r) for r in m.itertuples()]
    rank = {s: i for i, s in enumerate(SETTINGS)}
    return m.sort_values(['data', 'setting', 'labels'], key=lambda c: c.map(rank) if c.name == 'setting' else
                         c.replace(0, 10**9) if c.name == 'labels' else c).reset_index(drop=True)


def sentence(m)->str:
    "Won, undecided and lost cells in one sentence"
    if m.empty:
        return 'No cell is finished.'
    n, top = m.outcome.value_counts(), m.loc[m.difference.idxmax()]
    low, labels = m.loc[m.difference.idxmin()], lambda r: f"{r.labels or 'all'} labels a class"
    def said(r): return f"{r.setting}, {labels(r)}: {r.difference:+.2f} ± {r.half:.2f} against {r.best}"
    seeds = ' to '.join(str(k) for k in sorted({m.seeds.min(), m.seeds.max()}))
    return (f"{m.data.iloc[0]}, {len(m)} cells, {seeds} seeds: asmb wins "
            f"{n.get('won', 0)}, loses {n.get('lost', 0)}, {n.get('undecided', 0)} are undecided "
            f"(best baseline of the cell, Holm, 5 %). Largest gain: {said(top)}. Largest loss or smallest gain: {said(low)}.")


def stage_gains(t):
    "What the second stage adds, with the student as query: synergy and student, paired over seeds"
    import pandas as pd
    from asibkd.analysis.intervals import t_interval
    rows = []
    for k, g in t[t.arm == 'asmb'].groupby(['data', 'setting', 'labels']):
        s = [json.loads(o) for o in g.stages if o and len(json.loads(o)) > 1]
        for what in ('synergy', 'student') if s else ():
            mean, half = t_interval([o[-1][what] - o[0][what] for o in s])
            rows.append(dict(zip(('data', 'setting', 'labels'), k)) | dict(what=what, gain=mean, half=half, seeds=len(s)))
    return pd.DataFrame(rows)


def means(t):
    "Mean test accuracy of every arm, one row per cell"
    m = t.pivot_table(index=['data', 'setting', 'labels'], columns='arm', values='test').reset_index()
    names = ['setting', 'labels', *(a for a in ARMS if a in m)]
    return m[names].replace(dict(labels={0: 'all'})).round(2)


def parts(t, ours='asmb'):
    "`asmb` minus each other arm over the whole map: mean over the cells of a seed, paired over seeds"
    import pandas as pd
    from asibkd.analysis.intervals import outcome, paired
    rows = []
    for data, g in t.groupby('data'):
        test = g.pivot_table(index=['seed', 'setting', 'labels'], columns='arm', values='test')
        for arm in (a for a in ARMS if a in test and a != ours and ours in test):
            d = (test[ours] - test[arm]).dropna().groupby('seed').mean()
            mean, half, n = paired(d, 0*d)
            rows.append({'data': data, 'asmb minus': arm, 'points': f'{mean:+.2f} ± {half:.2f}', 'seeds': n,
                         'outcome': outcome(mean, half, n)})
    return pd.DataFrame(rows)


def gaps(t):
    "How far an arm is behind the best arm of a cell, ours included: mean over the cells, and where it is furthest behind"
    import pandas as pd
    cells = t.pivot_table(index=['data', 'setting', 'labels'], columns='arm', values='test')
    rows = []
    for data, g in cells.groupby('data'):
        g = g[[a for a in ARMS if a in g and g[a].notna().all()]]          # those that every cell has
        behind = g.rsub(g.max(axis=1), axis=0)
        for arm in behind:
            _, setting, n = behind[arm].idxmax()
            rows.append({'data': data, 'arm': arm, 'mean': behind[arm].mean(), 'worst': behind[arm].max(),
                         'worst in': f"{setting}, {n or 'all'}"})
    return pd.DataFrame(rows)


def settings_table(tuning:list):
    "What was chosen for each arm, by labels a class"
    import pandas as pd
    out = []
    for data in dict.fromkeys(r['data'] for r in tuning):
        best = chosen(tuning, data)
        for arm in dict.fromkeys(a for a, _ in best):
            said = {n: ', '.join(f'{k} {v}' for k, v in ARMS[arm][2][c].items()) for (a, n), c in best.items() if a == arm}
            out.append(dict(data=data, arm=arm) | {str(n or 'all'): v for n, v in sorted(said.items())})
    return pd.DataFrame(out).fillna('')


# Figures

def plot_map(m, title=''):
    "The map: difference to the best baseline of each cell"
    from asibkd.core.picture import Picture
    from matplotlib.colors import TwoSlopeNorm
    rows, columns = [s for s in SETTINGS if s in {*m.setting}], [*dict.fromkeys(m.labels)]
    columns = sorted((c for c in columns if c)) + [c for c in columns if not c]
    fig = Picture(figsize=(2 + 1.5*len(columns), max(2.4, .9 + .62*len(rows))), layout='constrained')
    ax, top = fig.add_subplot(), max(1., m.difference.abs().max())
    grid = [[float('nan')]*len(columns) for _ in rows]
    for r in m.itertuples():
        i, j = rows.index(r.setting), columns.index(r.labels)
        grid[i][j] = r.difference
        weight = 'bold' if r.outcome != 'undecided' else 'normal'
        dark = abs(r.difference) > .6*top
        ax.text(j, i, f'{round(r.difference, 1) + 0:+.1f} ± {r.half:.1f}\n{r.outcome}, {r.best}', ha='center', va='center', fontsize=8,
                weight=weight, color='white' if dark else 'black')
    shown = ax.imshow(grid, cmap='PuOr', norm=TwoSlopeNorm(0, -top, top), aspect='auto')
    ax.set_xticks(range(len(columns)), [str(c or 'all') for c in columns])
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel='labels a class', title=title)
    fig.colorbar(shown, label='asmb − best (points)')
    return fig


def plot_arms(t, title='', arms=('ce', 'best', 'avgz', 'wavg', 'camkd', 'stack', 'asmb')):
    "Student accuracy against labels a class, one panel for each pair of teachers"
    from asibkd.core.picture import Picture
    rows = [s for s in SETTINGS if s in {*t.setting}]
    fig = Picture(figsize=(max(5.5, 1.2 + 1.9*len(rows)), 2.7), layout='constrained')
    for i, (setting, ax) in enumerate(zip(rows, fig.subplots(1, len(rows), sharey=True, squeeze=False)[0])):
        g = t[t.setting == setting]
        counts = sorted({*g.labels} - {0}) + [0]*(0 in {*g.labels})
        for arm in (a for a in arms if a in {*g.arm}):
            mean = g[g.arm == arm].groupby('labels').test.mean().reindex(counts)
            ax.plot(range(len(counts)), mean, label=arm, lw=2 if arm == 'asmb' else 1, ms=4)
        ax.set_xticks(range(len(counts)), [str(c or 'all') for c in counts])
        ax.set_title(setting, fontsize=9)
        ax.spines[['top', 'right']].set_visible(False)
        if not i:
            ax.set_ylabel('student, test accuracy (%)')
    fig.suptitle(title, fontsize=10)
    fig.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=len(arms), fontsize=8)
    return fig


# The command

def estimate(rows:list, file, seen:list, key=None, what='students')->str:
    "How many of the rows a file lacks, and their CPU time: the mean of their arm in the rows that were `seen`"
    import pandas as pd
    key = key or key_of
    done, known = {key(r) for r in read_rows(file)}, pd.DataFrame(seen, columns=['arm', 'cpu'])
    todo = [r for r in rows if key(r) not in done]
    cpu = pd.to_numeric(known.cpu).groupby(known.arm).mean()
    hours = sum(cpu.get(r['arm'], cpu.mean()) for r in todo)/3600
    time_needed = f'{hours:.1f} h of CPU' if hours == hours else 'no row yet to estimate the time from'
    return f'{Path(file).name}: {len(rows) - len(todo)} of {len(rows)} {what} are there; {len(todo)} missing, {time_needed}'


def read_cells(text, data)->list:
    "'specialists:20,equal:all' → [(setting, labels)]; '' = the whole grid"
    labels = DATA[data][1]
    cells = [(s, n) for s in SETTINGS for n in labels]
    if not text:
        return cells
    asked = []
    for word in text.split(','):
        s, _, n = word.partition(':')
        if s not in SETTINGS or n and not (n == 'all' or n.isdigit()):
            raise SystemExit(f"--cells {word}: use SETTING or SETTING:LABELS; settings are {', '.join(SETTINGS)}; "
                             "labels a number or all.")
        asked += [(s, int(n.replace('all', '0')))] if n else [c for c in cells if c[0] == s]
    return asked


def main(argv=None):
    "Fill the tables, and print the map"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', default='digits', choices=DATA)
    p.add_argument('--data_root', default='', help='folder of the JPEGs (cifar)')
    p.add_argument('--cells', default='', help="e.g. specialists:20,equal:all; '' = all")
    p.add_argument('--arms', default='', help="e.g. wavg,asmb; '' = all")
    p.add_argument('--seeds', default='', help="e.g. 0,1,2; '' = all that are reported")
    p.add_argument('--tuned_in', default='', help="pairs of teachers that settings are tried in; '' = all")
    p.add_argument('--jobs', type=int, default=1, help='processes, one thread each')
    p.add_argument('--device', default='auto')
    p.add_argument('--tuned_on', default='', choices=DATA, help='take the settings that were chosen on these data')
    p.add_argument('--untuned', action='store_true', help='setting 0 for every arm: a trial')
    p.add_argument('--plan', action='store_true', help='only count what is missing')
    o = p.parse_args(argv)
    cells, arms = read_cells(o.cells, o.data), [*filter(None, o.arms.split(','))] or GRID
    seeds = [int(s) for s in o.seeds.split(',') if s] or [*DATA[o.data][2]]
    params = dict(device=o.device) | (dict(data_root=o.data_root) if o.data_root else {})
    pairs = [*filter(None, o.tuned_in.split(','))] or SETTINGS
    every = [(s, n) for s in pairs for n in dict.fromkeys(n for _, n in cells)]
    tuned = dict.fromkeys(map(base_of, arms))
    tuning = wanted(o.data, every, tuned, DATA[o.data][3], lambda a, n: range(BUDGET))
    if o.untuned or o.tuned_on:
        tuning = []
    if not o.plan:
        work_through(TUNING, tuning, o.jobs, params)
    best = {} if o.untuned else chosen(read_rows(TUNING), o.tuned_on or o.data)
    rows = wanted(o.data, cells, arms, seeds, lambda a, n: [nearest(best, a, n)])
    if o.plan:
        seen = read_rows(TABLE) + read_rows(TUNING)
        return print(estimate(tuning, TUNING, seen), estimate(rows, TABLE, seen), sep='\n')
    work_through(TABLE, rows, o.jobs, params)
    t = load()
    m = the_map(t[t.data == o.data])
    print(m.round(2).to_string(index=False), sentence(m), sep='\n')


if __name__ == '__main__':
    main()
