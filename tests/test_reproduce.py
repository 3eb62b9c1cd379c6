"The papers of a run as BibTeX, and a published table run again: presets, plan, comparison, a kill in the middle."
import json, re, signal, time
from pathlib import Path

import pytest
import torch

from asibkd.cl.methods import cl_methods
from asibkd.core.config import PRESETS, ConfigError, preset_values, resolve
from asibkd.core.papers import paper, papers, read_bib
from asibkd.distil.methods import Method, methods, register_method
from asibkd.models.zoo import create_zoo
from asibkd.run.cite import cite
from asibkd.run.experiment import check_typed
from asibkd.run.reproduce import chosen_methods, deviations, pair_params, read_table

# BibTeX, read a second time: character by character, strictly

NEEDED = dict(article={'author', 'title', 'journal', 'year'}, inproceedings={'author', 'title', 'booktitle', 'year'},
              techreport={'author', 'title', 'institution', 'year'}, misc={'author', 'title', 'year'})

def parse_bib(text):
    "Key → (kind, {field: value}); anything that BibTeX would stumble over is an error"
    out, i = {}, 0
    while (i := text.find('@', i)) >= 0:
        assert i == 0 or text[i - 1] == '\n', f'an @ outside an entry: {text[max(i - 40, 0):i + 10]}'
        m = re.compile(r'@([a-z]+)\{([\w:.-]+),').match(text, i); assert m, text[i:i + 60]
        kind, key, i, fields = m[1], m[2], m.end(), {}
        while True:
            m = re.compile(r'\s*([a-z]+)\s*=\s*\{').match(text, i); assert m, f'{key}: {text[i:i + 40]!r}'
            start, depth, i = m.end(), 1, m.end()
            while depth:
                if text[i] == '\\': i += 1
                elif text[i] in '{}': depth += 1 if text[i] == '{' else -1
                i += 1
            assert m[1] not in fields, f'{key}: {m[1]} twice'
            fields[m[1]] = text[start:i - 1]
            m = re.compile(r'\s*(,)?\s*(\})?').match(text, i); i = m.end()
            if m[2]: break
            assert m[1], f'{key}: a comma is missing after {list(fields)[-1]}'
        assert key not in out, f'{key} twice'
        out[key] = (kind, fields)
    return out

def check_bib(text):
    found = parse_bib(text)
    for key, (kind, fields) in found.items():
        assert NEEDED[kind] <= set(fields) and all(fields.values()), key
        assert re.fullmatch(r'(19|20)\d\d', fields['year']), key
        assert not re.search(r'(?<!\\)[&%#_$]', re.sub(r'\\url\{.*?\}', '', ''.join(fields.values()))), f'{key}: a character that TeX reads as a command'
        assert all(', ' in n or n == 'others' or n.startswith('{') for n in fields['author'].split(' and ')), f'{key}: "Last, First and …"'
    return found

def test_every_entry_is_valid():
    text = (PRESETS.parent/'references.bib').read_text(encoding='utf-8')
    assert set(check_bib(text)) == set(papers()) and len(papers()) > 70

def test_every_method_names_its_papers():
    "But those that are nobody's: labels alone, tasks in turn, all tasks at once"
    without = {n for r in (methods, cl_methods) for n, c in r.items() if c.__module__.startswith('asibkd.') and not c.cited_by}
    assert without == {'ce', 'naive', 'joint'}
    for r in (methods, cl_methods):
        for cls in r.values(): assert all(paper(o) for o in cls.cited_by)

def test_a_method_of_ones_own(monkeypatch):
    "A whole entry counts; an unknown key is refused where it is written"
    monkeypatch.delitem(methods, 'mine', raising=False)
    with pytest.raises(ConfigError, match="Unknown paper 'hinton2015distiling'. Did you mean 'hinton2015distilling'"):
        register_method('mine')(type('Mine', (Method,), dict(cited_by=('hinton2015distiling',))))
    with pytest.raises(ConfigError, match='is no BibTeX entry'):
        register_method('mine')(type('Mine', (Method,), dict(cited_by=('@article(no)',))))
    assert paper('@misc{me, title = {My Method}}')[0] == 'me'

# The presets of the pairs

PAIRS = sorted(f.stem for f in (PRESETS/'pair').glob('*.yaml'))

def test_a_preset_for_every_pair_of_the_table():
    table = read_table('mdistiller')
    assert set(PAIRS) == set(table.pairs) and len(PAIRS) == 13
    for row in table.pairs.values():
        assert {'teacher', 'ce', 'vanilla_kd', 'crd'} <= set(row) and all(55 < v < 80 for v in row.values())

@pytest.mark.parametrize('pair', PAIRS)
def test_pair(pair):
    "The networks of its name, the published recipe; each method gets its own weights and no other's"
    teacher, student = pair.split('-')
    c = resolve(preset=f'pair/{pair}')[0]
    light = student.startswith(('mobile', 'shuffle'))
    assert (c.teacher_type, c.student_type, c.dataset, c.epochs, c.student_lr) == (teacher, student, 'cifar100', 240, .01 if light else .05)
    weights = preset_values(f'pair/{pair}').get('with_method', {})
    for m, values in weights.items():
        if m not in methods: continue
        cfg, extra = resolve(preset=f'pair/{pair}', method=m)
        check_typed(cfg, dict(preset=f'pair/{pair}', method=m))
        assert all(float((cfg.model_dump() | extra)[k]) == float(v) for k, v in values.items())
    assert resolve(preset=f'pair/{pair}', method='crd')[0].dkd_beta == 8                # the default: another method's weights stay out
    assert deviations(read_table('mdistiller'), pair, pair_params(read_table('mdistiller'), pair, {})) == {}

def test_what_is_typed_wins_over_the_pair():
    assert resolve(preset='pair/vgg13-vgg8', method='dkd', dkd_beta=3)[0].dkd_beta == 3
    assert set(deviations(read_table('mdistiller'), 'vgg13-vgg8', pair_params(read_table('mdistiller'), 'vgg13-vgg8', dict(epochs=3)))) == {'epochs'}

def test_all_methods_of_the_table_are_known():
    table = read_table('mdistiller')
    assert {'ce', 'vanilla_kd', 'fitnet', 'at', 'rkd', 'crd', 'dkd'} <= set(chosen_methods(table))
    with pytest.raises(ConfigError, match='vanila_kd'): chosen_methods(table, 'vanila_kd')

# The loop, small

SMALL = dict(dataset='digits', epochs=3, milestones='[2]', train_per_class=12, batch_size=16, teacher_type='resnet8', student_type='resnet8', device='cpu', log_level='ERROR')

@pytest.fixture
def teachers(tmp_path):
    torch.manual_seed(0)
    (tmp_path/'models'/'resnet8_vanilla').mkdir(parents=True)
    torch.save(dict(model=create_zoo('resnet8', 10).state_dict()), tmp_path/'models'/'resnet8_vanilla'/'ckpt_epoch_240.pth')
    return tmp_path/'models'

def test_killed_and_run_again(tmp_path, door, teachers):
    "The finished run is kept, the killed one goes on where it was. Then: its papers"
    argv = ['reproduce', '--pairs', 'resnet56-resnet20', '--methods', 'ce, vanilla_kd', '--seeds', '0', '--weights', str(teachers), *(f'{k}={v}' for k, v in SMALL.items())]
    c = door.start(*argv, cwd=tmp_path)
    end = time.time() + 120
    while not list(tmp_path.glob('results/vanilla_kd-*/metrics.jsonl')) and c.poll() is None and time.time() < end: time.sleep(.01)
    c.send_signal(signal.SIGKILL); c.communicate()
    done, = tmp_path.glob('results/*/summary.json')
    before = done.stat().st_mtime_ns
    r = door(*argv, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    assert done.stat().st_mtime_ns == before and len(list(tmp_path.glob('results/*/summary.json'))) == 2
    assert re.search(r'\| teacher +\| 1 +\|.*72\.34', r.stdout) and re.search(r'\| vanilla_kd \| 1 .*70\.66', r.stdout) and 'No difference is shown' in r.stdout
    assert (tmp_path/'results'/'reproduce'/'mdistiller.csv').read_text().count('\n') == 4 and (tmp_path/'results'/'reproduce'/'mdistiller.md').exists()
    run, = tmp_path.glob('results/vanilla_kd-*')
    assert [json.loads(o)['epoch'] for o in (run/'metrics.jsonl').read_text().splitlines() if '"B' in o] == [1, 2, 3]
    bib = check_bib(cite(tmp_path/'results'))
    assert set(bib) == {'hinton2015distilling', 'he2016resnet', 'alpaydin1998digits', 'tian2020crd', 'asibkd', 'paszke2019pytorch'}
    r = door('cite', 'results', '--out', 'papers.bib', cwd=tmp_path)
    assert r.returncode == 0 and '6 entries' in r.stdout and check_bib((tmp_path/'papers.bib').read_text()) == bib

def test_a_method_that_is_not_registered_is_named(monkeypatch):
    s, c = dict(method='theirs', seed=0, rows=[dict(key='theirs', role='student', model='net')]), resolve(preset='none')[0].model_dump()
    monkeypatch.setattr('asibkd.run.cite.finished_runs', lambda *runs: [('', s, c)])
    assert '% theirs: not registered here' in cite('run') and check_bib(cite('run'))

def test_refusals(tmp_path, asibkd):
    for argv, said in ((['--table', 'mdistilled'], "Did you mean 'mdistiller'"), (['--pairs', 'vgg13-vgg9'], "Did you mean 'vgg13-vgg8'"),
                       (['--weights', str(tmp_path), '--pairs', 'vgg13-vgg8', '--methods', 'dkd'], 'No weights of vgg13'), (['--seed', '1', '--pairs', 'vgg13-vgg8'], "'seed' is what the loop varies")):
        r = asibkd('reproduce', *argv)
        assert r.returncode == 2 and said in r.stderr, r.stderr
    r = asibkd('cite', 'nothing')
    assert r.returncode == 2 and 'no such folder' in r.stderr
