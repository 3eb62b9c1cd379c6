"""Flip single bits in the files of a run folder, then resume, show, compare and report it.

    python tests/flip_bits.py [300] [SEED]

Each flip must be named (the file, in a warning or an error) or harmless (the same weights, rows and summary).
"""
import contextlib, io, json, logging, os, random, shutil, sys, tempfile, traceback
from collections import Counter
from pathlib import Path
from safetensors.torch import load_file
from asibkd import run_experiment
from asibkd.analysis.tables import load_metrics, load_summary
from asibkd.core import files
from asibkd.core.config import AsibError, log
from asibkd.run import commands

BASE = dict(preset='quickstart', compare=0, train_per_class=6, device='cpu', use_amp=0, disable_tqdm=1, finetune_epochs=1, num_stages=2,
            student_epochs_per_stage=1, teacher_adapt_epochs=1, teacher1_type='resnet8', teacher2_type='mlp', student_type='mlp',
            teacher_cache='disk', data_aug='0', exp_id='a')
ENDINGS = ('.pt', '.pth', '.safetensors', '.json', '.csv', '.jsonl', '.rows')

class Kill(BaseException): pass

def stop(row):
    "A callback that ends the process after the first phase A of the second stage"
    if row['phase'] == 'A2': raise Kill

def result(results):
    "What a run came to: weights, rows and numbers, without times"
    run, s = results/'a', json.loads((results/'a'/'summary.json').read_text())
    s.pop('time', None)
    rows = load_metrics(run).drop(columns='seconds', errors='ignore')
    return {f.name: load_file(f) for f in run.glob('*.safetensors')}, rows.to_json(), json.dumps(s, sort_keys=True)

def same(a, b):
    "Are two results equal, bit for bit?"
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(
        x.keys() == b[0][k].keys() and all(v.equal(b[0][k][n]) for n, v in x.items()) for k, x in a[0].items())

def said_by(do):
    "What a command says (log, output, error), and a traceback where it ends in one"
    out = io.StringIO(); handler = logging.StreamHandler(out); files._told.clear(); tb = ''
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        log.addHandler(handler)
        try: do()
        except AsibError as e: print(e)
        except SystemExit: pass
        except Exception: tb = traceback.format_exc()
        finally: log.removeHandler(handler)
    return out.getvalue(), tb

def outcome(template, wanted, draw):
    "Flip one bit of a copy, use every door, and say what came of it"
    with tempfile.TemporaryDirectory() as d:
        results = Path(shutil.copytree(template, Path(d)/'r'))
        every = sorted(f for f in results.rglob('*') if f.suffix in ENDINGS and f.stat().st_size)
        end = draw.choice(sorted({f.suffix for f in every}))
        f = draw.choice([o for o in every if o.suffix == end])
        raw = bytearray(f.read_bytes()); at = draw.randrange(len(raw)); raw[at] ^= 1 << draw.randrange(8); f.write_bytes(raw)
        run = str(results/'a'); words = tb = ''
        doors = [lambda: run_experiment(**BASE, results_dir=str(results)), lambda: commands.cmd_show([run]),
                 lambda: commands.cmd_compare([str(results), '--out', f'{d}/out']), lambda: commands.cmd_report([run])]
        for do in doors:
            w, t = said_by(do)
            words, tb = words + w, tb or t
        name = f.relative_to(results).as_posix()
        if tb: return end, 'TRACEBACK', name, at, tb
        named = f.name in words or f.stem in words and end in ('.json', '.rows') and 'teacher_cache' in words
        try: equal = same(result(results), wanted)
        except Exception: equal = False
        return end, 'named' if named else 'harmless' if equal else 'SILENT', name, at, words

def main(n=300, seed=0):
    "Half of the flips in a run that was killed, half in a finished one"
    log.setLevel('WARNING'); draw, counts = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        with contextlib.suppress(Kill): run_experiment(**BASE, results_dir='killed', log_level='WARNING', callbacks=[stop])
        run_experiment(**BASE, results_dir='whole', log_level='WARNING')
        wanted = result(Path('whole'))
        for i in range(n):
            end, what, name, at, words = outcome(('killed', 'whole')[i % 2], wanted, draw)
            counts[end, what] += 1
            if what in ('SILENT', 'TRACEBACK'): print(f'{what}: {name}, byte {at}\n{words[-1500:]}', flush=True)
    kinds = ('named', 'harmless', 'SILENT', 'TRACEBACK')
    print(f"{'':14}" + ''.join(f'{k:>11}' for k in kinds))
    for end in ENDINGS: print(f'{end:14}' + ''.join(f'{counts[end, k]:11}' for k in kinds))
    return sum(counts[end, k] for end in ENDINGS for k in kinds[2:])

if __name__ == '__main__': sys.exit(bool(main(*map(int, sys.argv[1:]))))
