"Shared pieces of the tests."
import os, sys
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')   # the tests run in parallel on two cores
os.fsync = lambda file: None                     # a run waits 85 times for the disk: nobody cuts the power here
root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tests'))
TINY = dict(preset='quickstart', device='cpu', compare='0', train_per_class='12', finetune_epochs='1', teacher_adapt_epochs='1', student_epochs_per_stage='1', num_stages='1', log_level='WARNING', report='0')

@pytest.fixture
def tiny(tmp_path): return dict(TINY, results_dir=str(tmp_path/'results'))

@pytest.fixture(scope='session')
def door():
    from _door import Door
    d = Door()
    yield d
    d.close()

@pytest.fixture
def asibkd(tmp_path, door):
    "The command, in an empty folder"
    return lambda *argv: door(*argv, cwd=tmp_path)

@pytest.fixture
def full_path(): "For a test that is about the fusion's fit itself"

@pytest.fixture(autouse=True)
def short_path(request, monkeypatch):
    "What does not matter to a test is done in short"
    if 'full_path' in request.fixturenames: return
    from _short import shorten
    shorten(monkeypatch.setattr)

@pytest.fixture
def notebook(tmp_path, door):
    "nbs/run_experiment.ipynb with parameters, as papermill runs it: notebook('out.ipynb', '-p', 'seed', 3)"
    path = root/'nbs'/'run_experiment.ipynb'
    return lambda out, *argv: door(*argv, cwd=tmp_path, notebook=(str(path), str(out)))

@pytest.fixture
def short_exam(monkeypatch):
    "The digits with 100 test images instead of 500, where it does not matter how well they are recognised"
    from _short import digits_with_few_tests
    digits_with_few_tests(monkeypatch.setitem, 100)

@pytest.fixture
def tiny_exam(monkeypatch):
    "The digits with two test images a class"
    from _short import digits_with_few_tests
    digits_with_few_tests(monkeypatch.setitem, 20)

@pytest.fixture
def folder(tmp_path):
    "A small image folder with two classes: folder(train=6, test=2)"
    import numpy as np
    from PIL import Image
    def make(at='photos', classes=('cat', 'dog'), size=32, **splits):
        d, rng = tmp_path/at, np.random.default_rng(0)
        for split, n in splits.items():
            for c, name in enumerate(classes):
                (d/split/name).mkdir(parents=True)
                for i in range(n): Image.fromarray(rng.integers(100*c, 100*c + 120, (size, size, 3)).astype('uint8')).save(d/split/name/f'{i:03}.png')
        return d
    return make

def pytest_collection_finish(session):
    "The first backward pass of a worker comes before any torch.export: after one, processes that are forked could run none"
    if torch := sys.modules.get('torch'): torch.ones(1, requires_grad=True).sum().backward()
