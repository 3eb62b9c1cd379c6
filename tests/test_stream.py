"Streams: a finished run that goes on, datasets one after the other, uneven tasks, one pass, weights after each task."
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from _stop import Stop, StopCB
from asibkd.core.config import ConfigError, RunError
from asibkd.data.catalogue import datasets
from asibkd.data.datasets import create_data
from asibkd.data.images import ImageSet
from asibkd.eval.deploy import load_student
from asibkd.run.experiment import run_experiment

SMALL = dict(report=0, cl_mode=1, compare=0, device='cpu', train_per_class=15, epochs=1, finetune_epochs=1, teacher_adapt_epochs=1, replay_capacity=20, batch_size=8, log_level='ERROR')
OF = dict(asib=dict(analytic_dim=60))      # a small trunk

def named_digits(cfg, classes, invert=False):
    "Some digits under other names, with validation images of their own"
    d, out = datasets['digits'](cfg), {}
    for split, ds, lo, hi in (('train', d['train'], 0, 12), ('val', d['train'], 12, 15), ('test', d['test'], 0, 10)):
        keep = torch.cat([(ds.y == c).nonzero().flatten()[lo:hi] for c in classes])
        x = ds.images(keep) if hasattr(ds, 'images') and ds.shape else ds.source.x[ds.ids[keep]]
        out[split] = ImageSet(255 - x if invert else x, torch.tensor([classes.index(int(y)) for y in ds.y[keep]]), [f'n{c}' for c in classes])
    return out | dict(flip=False)

@pytest.fixture
def pets(monkeypatch):
    "Digits under other names: `low` are 0 to 3, `high` 4 to 7, `all8` both, `drawn` 0 to 3 as negatives; with validation images of their own"
    def part(classes, invert=False): return lambda cfg: named_digits(cfg, classes, invert)
    for name, o in dict(low=part([*range(4)]), high=part([*range(4, 8)]), all8=part([*range(8)]), drawn=part([*range(4)], True)).items(): monkeypatch.setitem(datasets, name, o)

def rows(s): return s['R'][s['method']]
def same_weights(a, b, names=('student', 'memory', 'predictions')):
    for n in names: assert all(v.equal(load_file(Path(b['run'])/f'{n}.safetensors')[k]) for k, v in load_file(Path(a['run'])/f'{n}.safetensors').items()), n

@pytest.mark.parametrize('method', ['er', 'derpp', 'asib'])
def test_goes_on_with_tasks_that_were_left(method, tmp_path, short_exam):
    "Two tasks, then the one or two that are left: R, memory and every weight of the run that learned them all at once"
    kw = SMALL | OF.get(method, {}) | dict(cl_method=method, num_tasks=3 if method == 'er' else 4, compare=int(method == 'er'), results_dir=str(tmp_path))    # its baselines go on, too
    whole = run_experiment(**kw)
    half = run_experiment(**kw, stop_after=2)
    assert len(rows(half)['class_il']) == 2 == len(half['tasks']) and rows(half)['class_il'] == rows(whole)['class_il'][:2]
    rest = run_experiment(extend=half['run'], report=0)
    assert rest['R'] == whole['R'] and rest['tasks'] == whole['tasks'] and rest['run'] not in (half['run'], whole['run'])
    assert rest['rows'] == whole['rows']
    same_weights(whole, rest)

@pytest.mark.parametrize('method', ['er', 'derpp', 'asib'])
def test_goes_on_with_classes_that_came_later(method, pets, tmp_path):
    "A head with room for them makes derpp and asib, which see all rows from the start, equal, too"
    room = {} if method == 'er' else dict(cl_rows=8)
    kw = SMALL | OF.get(method, {}) | room | dict(cl_method=method, results_dir=str(tmp_path))
    first = run_experiment(**kw, dataset='low', num_tasks=2)
    later = run_experiment(extend=first['run'], dataset='high', task_sizes=[1, 3], report=0)
    order = sum(later['tasks'], [])
    assert later['tasks'][:2] == first['tasks'] and [len(t) for t in later['tasks']] == [2, 2, 1, 3] and set(order) == {f'n{c}' for c in range(8)}
    whole = run_experiment(**kw, stream='low,high', class_order=order, task_sizes=[2, 2, 1, 3])
    assert later['R'] == whole['R'] and later['composition'] == whole['composition']
    same_weights(whole, later)

def test_a_stream_of_datasets(pets, tmp_path):
    "New names bring new classes; the same names a new domain, which adds no row"
    kw = SMALL | dict(cl_method='er', epochs=2, results_dir=str(tmp_path))
    s = run_experiment(**kw, stream='low,drawn,high')
    assert [len(t) for t in s['tasks']] == [4, 4, 4] and s['tasks'][0] == s['tasks'][1] and s['n_class'] == 8 and s['dataset'] == 'low+drawn+high'
    R, told = rows(s)['class_il'], rows(s)['task_il']
    assert [len(r) for r in R] == [1, 2, 3] and R[1] == told[1] and max(R[-1]) > .4
    assert load_student(s['run']).classes == [f'n{c}' for c in range(8)]
    with pytest.raises(ConfigError, match='together with n4'): run_experiment(**kw, stream='low,all8')
    for m in ('wa', 'bic', 'ssil', 'icarl'):                       # icarl's snapshot would teach nothing
        with pytest.raises(ConfigError, match='compares new classes with old ones'): run_experiment(**kw | dict(cl_method=m), stream='low,drawn,high')
    with pytest.raises(ConfigError, match='No folder of that name'): run_experiment(**kw, stream='low,hihg')

def test_a_stream_goes_on(pets, tmp_path, monkeypatch):
    "What is named is what is new, however the first run came by its data; it may be cut finer, and the folder may begin with ~"
    monkeypatch.setitem(datasets, 'rest', lambda cfg: named_digits(cfg, [8, 9]))
    kw = SMALL | dict(cl_method='er', results_dir=str(tmp_path))
    first = run_experiment(**kw, stream='low,high')
    monkeypatch.setenv('HOME', str(tmp_path))
    near = '~/' + Path(first['run']).name
    for new in (dict(dataset='rest'), dict(stream='rest')):
        later = run_experiment(extend=near, report=0, **new)
        assert later['tasks'] == [*first['tasks'], ['n8', 'n9']] and rows(later)['class_il'][:2] == rows(first)['class_il']
    for new in (dict(dataset='rest'), dict(stream='rest')):
        assert [len(t) for t in run_experiment(extend=near, report=0, task_sizes=[1, 1], **new)['tasks']] == [4, 4, 1, 1]
    with pytest.raises(ConfigError, match='share classes'): run_experiment(extend=near, report=0, stream='rest,drawn', task_sizes=[1, 1])
    with pytest.raises(ConfigError, match='keeps new and old classes apart'): run_experiment(**kw | dict(cl_mask='separated'), stream='low,high,drawn')
    with pytest.raises(ConfigError, match='it would close'): run_experiment(**kw | dict(cl_mask='separated', cl_method='joint'))

def test_a_run_that_goes_on_can_be_interrupted(pets, tmp_path):
    first = run_experiment(**SMALL, cl_method='derpp', dataset='low', num_tasks=2, results_dir=str(tmp_path))
    more = dict(extend=first['run'], dataset='high', num_tasks=2, report=0)
    whole = run_experiment(**more, results_dir=str(tmp_path/'a'))
    with pytest.raises(Stop): run_experiment(**more, results_dir=str(tmp_path/'b'), callbacks=[StopCB('t4-B', 0)])
    again = run_experiment(**more, results_dir=str(tmp_path/'b'))
    assert again['R'] == whole['R'] and len(rows(whole)['class_il']) == 4
    same_weights(whole, again)
    with pytest.raises(ConfigError, match='nothing is left'): run_experiment(extend=whole['run'], report=0)
    with pytest.raises(ConfigError, match='go on as they are. Leave student_type out'): run_experiment(extend=whole['run'], student_type='resnet8')
    (Path(first['run'])/'tasks'/'derpp.pt').unlink()
    with pytest.raises(RunError, match="no 'derpp.pt'"): run_experiment(**more, results_dir=str(tmp_path/'c'))

def test_one_pass(tmp_path, short_exam):
    "Each new image once, however many batches it takes"
    s = run_experiment(**{k: v for k, v in SMALL.items() if k != 'epochs'}, cl_method='er', num_tasks=2, cl_online=1, replay_ratio=1, results_dir=str(tmp_path))
    n = s['images']['train']                                                     # 135 in two tasks: nine steps each
    assert s['rows'][0]['student_images'] == n + 8*9                             # task 2 replays eight images a step
    with pytest.raises(ConfigError, match='epochs=3 with cl_online=1'): run_experiment(**SMALL | dict(epochs=3), cl_online=1)

@pytest.mark.parametrize('method', ['derpp', 'icarl'])
def test_the_student_after_each_task(method, tmp_path, short_exam):
    "As it was examined, with the rows of the classes it had seen: derpp has all ten from the start, icarl predicts the nearest mean"
    s = run_experiment(**SMALL, cl_method=method, task_sizes='5,1,2,2', keep_task_weights=1, results_dir=str(tmp_path))
    assert [len(t) for t in s['tasks']] == [5, 1, 2, 2] and sum(s['composition'][-1]) == 20 and set(s['composition'][-1]) == {2}
    test = datasets['digits'](None)['test']
    for t in (0, 1, 3):
        student = load_student(Path(s['run'])/'tasks'/f'task{t + 1}')
        assert student.classes == sum(s['tasks'][:t + 1], [])
        with torch.no_grad():
            right = [student.classes[int(student.model(student.preprocess(test.source.x[i])[None]).argmax())] == str(int(y))
                     for i, y in zip(test.ids, test.y) if str(int(y)) in s['tasks'][t]]
        assert abs(sum(right)/len(right) - rows(s)['class_il'][t][t]) < (1e-6 if method == 'derpp' else .03)

@pytest.mark.parametrize('kw, say', [(dict(stream='digits,digits', num_tasks=2), 'each of its datasets is a task'), (dict(cl_method='er', cl_rows=20), 'cl_rows=20 has no effect'),
                                     (dict(extend='nowhere'), 'no run whose config.json'), (dict(stream='digits,digits', cl_method='wa'), 'compares new classes with old ones')])
def test_refused(kw, say, tmp_path):
    with pytest.raises(ConfigError, match=say): run_experiment(**SMALL, **kw, results_dir=str(tmp_path))

def test_memory_advice(tmp_path, capsys, short_exam):
    run_experiment(**SMALL | dict(log_level='INFO'), cl_method='er', num_tasks=5, stop_after=1, results_dir=str(tmp_path))
    assert 'memory: 20 images, 2 a class of 14 (' in capsys.readouterr().out
