"Shared pieces of the tests."
import os, subprocess, sys
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')   # the tests run in parallel on two cores
root = Path(__file__).parents[1]
TINY = dict(preset='quickstart', device='cpu', compare='0', train_per_class='12', finetune_epochs='1', teacher_adapt_epochs='1', student_epochs_per_stage='1', num_stages='1', log_level='WARNING', report='0')

@pytest.fixture
def tiny(tmp_path): return dict(TINY, results_dir=str(tmp_path/'results'))

@pytest.fixture
def asibkd(tmp_path):
    "The command, in an empty folder"
    def run(*argv, **kw):
        return subprocess.run([sys.executable, '-m', 'asibkd.run.cli', *map(str, argv)], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)}, **kw)
    return run

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
