"""Do two versions of the package compute the same bits? Every kind of run, once with each, then compared file by file.

    python nbs/_same_bits.py run TREE OUT [CASE …]    run the cases (all of them) with the package in TREE
    python nbs/_same_bits.py compare OUT_A OUT_B      exit code 1 where a student, a prediction or a summary differs
"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

SHORT = dict(preset='quickstart', compare=0, train_per_class=60, finetune_epochs=1, teacher_adapt_epochs=2,
             num_stages=1, student_epochs_per_stage=2)
METHODS = 'aekd asmb at aver avgz camkd ce crd dkd ebkd fitnet fitnet_mkd rkd vanilla_kd'.split()
CL_METHODS = 'asib avgz der derpp er er_ace ewc icarl joint lwf naive si'.split()
SWITCHES = dict(mbm_tokens='spatial', mbm_n_head=2, mbm_learnable_q=1, feat_kd_alpha=.1, rkd_loss_weight=1., hybrid_beta=.2,
                use_disagree_weight=1, use_certainty_weight=1, bridge_objective='both', synergy_gate=0, mixup_alpha=.2,
                label_smoothing=.1, grad_clip_norm=1., num_stages=2, report_oracle=1)
CASES = {'quickstart': {}, 'quickstart-cl': dict(cl_mode=1),
         **{f'method-{m}': SHORT | dict(method=m) for m in METHODS},
         **{f'cl-{m}': SHORT | dict(cl_mode=1, cl_method=m, num_tasks=3, replay_capacity=60) for m in CL_METHODS},
         'switches': SHORT | SWITCHES,
         'adapters': SHORT | dict(use_distillation_adapter=1, synergy_base='none', cache_views=2, lr_schedule='cosine'),
         'cl-expert-ema': SHORT | dict(cl_mode=1, cl_method='asib', num_tasks=3, replay_capacity=60, cl_teachers='expert+snapshot+ema'),
         'killed': SHORT | dict(checkpoint_steps=3, student_epochs_per_stage=4),
         'killed-cl': SHORT | dict(cl_mode=1, cl_method='asib', num_tasks=3, checkpoint_steps=3)}
# what a later version calls by another name: in summary.json, and in the names of tensors
RENAMED = {'known': 'n_seen',       # classes seen when an item of memory.safetensors was stored
           'asked': 'checked'}      # gates: was the synergy compared with the average?

# the verdict's words were changed on purpose, its numbers were not
REWORDED = {': there is nothing to judge it by.': ', so there is no comparison.',
            'one seed, so what another would give is not known': 'one seed, so the variation over seeds is unknown'}

RUN = '''
import json, sys
try: from asibkd import run_experiment
except ImportError: from asibkd.run import run_experiment
run_experiment(**json.loads(sys.argv[1]))
'''

def start(tree, case, out, **kw):
    "The run of a case in a process of its own"
    given = json.dumps({'device': 'cpu', 'report': 0, 'log_level': 'WARNING', 'disable_tqdm': 1} | CASES[case]
                       | dict(exp_id=case, results_dir=str(out)))
    env = {**os.environ, 'PYTHONPATH': str(Path(tree).resolve()), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-c', RUN, given], env=env, cwd=out, **kw)

def kill_in_the_middle(tree, case, out, rows=3):
    "`kill -9` once a few epochs are logged"
    p, log = start(tree, case, out), out/case/'metrics.jsonl'
    while p.poll() is None:
        if log.exists() and log.read_text(encoding='utf-8').count('\n') >= rows:
            os.kill(p.pid, signal.SIGKILL)
            break
        time.sleep(.05)
    return p.wait() == -signal.SIGKILL

def run(tree, out, cases):
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for case in cases or CASES:
        if (out/case/'summary.json').exists():
            continue
        if case.startswith('killed'):
            assert kill_in_the_middle(tree, case, out), f'{case} was over before it could be killed'
        if start(tree, case, out).wait():
            sys.exit(f'{case} failed')
        print(f'{case}: done', flush=True)

LOGITS = {'labels': ['labels'], 'averaged logits': ['average'], 'synergy logits': ['synergy'], 'teachers': ['teachers']}
FILES = {'fine-tuned in this run': 'finetuned', 'pretrained trunk, untrained head': 'pretrained', 'untrained': 'untrained',
         'given': 'given'}

def typed_weights(text, classes=None):
    "'fine-tuned in this run' → dict(source='finetuned', …)"
    source = FILES.get(text, 'checkpoint')
    return dict(source=source, file=text if source == 'checkpoint' else '', classes=classes)

def typed_row(row, s):
    "A row of a summary as it was before its sentences became fields"
    row, cl, said = dict(row), s['kind'] == 'cl', row.get('taught_by', '')
    if 'taught_by' not in row:
        return row
    row.pop('taught_by')
    kind = row['role'] = row['role'].split(':')[0]
    if kind == 'teacher':
        adapted = row['key'].endswith('~adapted')
        row['weights'] = dict(source='adapted', file='', classes=None) if adapted else typed_weights(s['weights'][row['key']])
        if not adapted:
            row['given'] = said.startswith('given')
    elif row['key'] == 'synergy':
        row['objective'] = said
    elif kind == 'student' and cl:
        row['target'], kept = said.split('+'), row.pop('learned_with')
        items = 0 if kept == 'all data so far' else int(kept.split()[0])
        row |= dict(memory='all' if kept == 'all data so far' else 'replay' if items else 'none', memory_items=items)
    elif kind == 'student':
        logits, *views = said.split(', ') if 'recycled' in said else [said]
        logits, _, features = logits.partition(' + ')
        stages = len(s['gates']) if logits in ('averaged logits', 'synergy logits') and row['key'] == s['method'] and s['gates'] else 1
        row['target'] = dict(logits=LOGITS.get(logits, [logits])*stages, features=features or None,
                             views=int(views[0].split()[0]) if views else 0)
    return row

def typed(s):
    "A summary in the words of today: `kind` always there, sentences typed, `own` is `method_params`"
    s = dict(s)
    s.setdefault('kind', 'distil')
    if 'own' in s:
        s['method_params'] = s.pop('own')
    s['rows'] = [typed_row(r, s) for r in s['rows']]
    s['gates'] = [{k: v for k, v in g.items() if k != 'epochs'} for g in s['gates']]       # new: how many there were
    if any(isinstance(w, str) for w in s.get('weights', {}).values()):
        s['weights'] = {k: typed_weights(w) for k, w in s['weights'].items()}
    return s

def plain(o):
    "Without what the clock and the folder decide; old names replaced"
    if isinstance(o, list):
        return [plain(v) for v in o]
    if isinstance(o, dict):
        return {RENAMED.get(k, k): plain(v) for k, v in o.items() if k not in ('time', 'seconds', 'latency_ms', 'run')}
    if isinstance(o, str):
        for old, new in REWORDED.items():
            o = o.replace(old, new)
        return RENAMED.get(o, o)
    return o

def tensors(f):
    from safetensors.torch import load_file
    return {RENAMED.get(k, k): v for k, v in load_file(f).items()}

def differences(a, b, at=''):
    "Paths at which two nested values differ"
    if isinstance(a, dict) and isinstance(b, dict):
        for k in sorted({*a, *b}):
            if k in a and k in b:
                yield from differences(a[k], b[k], f'{at}/{k}')
            else:
                yield f"{at}/{k} only {'before' if k in a else 'after'}"
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (u, v) in enumerate(zip(a, b)):
            yield from differences(u, v, f'{at}/{i}')
    elif a != b:
        yield f'{at}: {str(a)[:60]} → {str(b)[:60]}'

def compare(a, b):
    import torch
    bad = 0
    cases = [c for c in CASES if all((Path(o)/c/'summary.json').exists() for o in (a, b))]
    for case in cases:
        found = []
        for f in sorted((Path(a)/case).glob('*.safetensors')):
            g = Path(b)/case/f.name
            if not g.exists():
                found.append(f'{f.name} is missing')
                continue
            s, t = tensors(f), tensors(g)
            if s.keys() != t.keys():
                found.append(f'{f.name}: other names {sorted(s.keys() ^ t.keys())[:6]}')
            found += [f'{f.name}: {k}' for k in s.keys() & t.keys() if not torch.equal(s[k], t[k])][:5]
        s, t = (plain(typed(json.loads((Path(o)/case/'summary.json').read_text(encoding='utf-8')))) for o in (a, b))
        found += [f'summary.json{o}' for o in differences(s, t)]
        bad += bool(found)
        print(f"{case:18} {'same' if not found else 'DIFFERENT: ' + '; '.join(found[:8])}")
    print(f'{len(cases) - bad} of {len(CASES)} runs have the same bits; {len(CASES) - len(cases)} were not run.')
    return bad + len(CASES) - len(cases)

if __name__ == '__main__':
    if sys.argv[1] == 'run':
        run(*sys.argv[2:4], sys.argv[4:])
    else:
        sys.exit(bool(compare(*sys.argv[2:4])))
