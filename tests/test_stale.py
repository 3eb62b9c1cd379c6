"A result is returned, and a run goes on, only with what it began with: photos, tables, checkpoints, code, shared teachers"
import shutil

import pytest
import torch
from torch import nn

from _stop import Stop, StopCB
from asibkd.core.config import RunError
from asibkd.models.teachers import register_model
from asibkd.run.experiment import run_experiment

ALONE = dict(dataset='digits', preset='method/ce', method='ce', student_type='mlp', epochs=1, student_epochs_per_stage=1)


def of_photos(tiny, root, **kw):
    return tiny | dict(dataset='imagefolder', data_root=str(root), batch_size=4, train_per_class=8) | kw


def swap(photos, a='train', b='test'):
    (photos/a).rename(photos/'x')
    (photos/b).rename(photos/a)
    (photos/'x').rename(photos/b)


def test_checkpoints_that_are_found_by_their_names(tiny, tmp_path, monkeypatch):
    "checkpoints/{type}_ft.pth, and the file of fine-tuned weights that is there already"
    from asibkd.run.tasks import run_finetune
    monkeypatch.chdir(tmp_path)
    kw = tiny | dict(dataset='digits', preset='method/vanilla_kd', method='vanilla_kd', student_type='mlp', teacher1_type='mlp', epochs=1)
    for file, given in (('checkpoints/mlp_ft.pth', {}), ('mine.pth', dict(finetune_ckpt1='mine.pth'))):
        made = tiny | dict(dataset='digits', teacher_type='mlp', finetune_epochs=1, finetune_ckpt1=file)
        run_finetune(**made, seed=1)
        old = run_experiment(**kw, **given)
        assert run_experiment(**kw, **given) == old
        (tmp_path/file).unlink()
        run_finetune(**made, seed=2)
        with pytest.raises(RunError, match='another file'):
            run_experiment(**kw, **given)
        (tmp_path/file).unlink()


def test_code_of_a_plugin(tiny):
    "A network or a dataset that was registered again with other code makes another run"
    def small(n_class=10): return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, n_class))
    def wide(n_class=10): return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Linear(16, n_class))
    kw = tiny | ALONE | dict(student_type='stale_net', small_input=0)
    runs = []
    for fn in (small, small, wide):
        register_model('stale_net')(fn)
        runs.append(run_experiment(**kw)['run'])
    assert runs[0] == runs[1] != runs[2]


def test_a_module_with_a_buffer_that_is_not_saved(tiny):
    "The usual case: the user corrects the mean in a layer of their own"
    class Shift(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.register_buffer('by', torch.tensor([by]), persistent=False)
        def forward(self, x): return x - self.by
    def teacher(by):
        torch.manual_seed(0)
        return nn.Sequential(Shift(by), nn.Flatten(), nn.Linear(192, 10))
    kw = tiny | dict(dataset='digits', preset='method/vanilla_kd', method='vanilla_kd', student_type='mlp', epochs=1, finetune_epochs=0)
    runs = [run_experiment(teachers=[teacher(by)], **kw)['run'] for by in (1., 1., 2.)]
    assert runs[0] == runs[1] != runs[2]


def test_a_teacher_that_learns_goes_on_with_its_images(tiny, folder):
    "`asibkd finetune`, killed; then training and test images change places"
    from asibkd.core.config import resolve
    from asibkd.core.runfolder import Run
    from asibkd.run.tasks import finetune_in_folder, finetune_target
    photos = folder(train=8, test=8)
    cfg, extra = resolve(**of_photos(tiny, photos, teacher_type='mlp', finetune_epochs=3, method='ce', compare=0))
    path = photos.parent/'t.pth'
    with pytest.raises(Stop), Run(cfg, extra, 'mlp', 'finetune') as run:
        finetune_in_folder(run, cfg, 'mlp', path, (StopCB('finetune-teacher1', 1),))
    swap(photos)
    with pytest.raises(RunError, match='are others than when the run'), Run(cfg, extra, 'mlp', 'finetune') as run:
        finetune_in_folder(run, cfg, 'mlp', path)


def test_shared_teachers_of_other_images(tiny, folder):
    "A loop after its photos have changed: its teachers learnt what is now tested"
    from asibkd.run.loops import run_loop
    photos = folder(train=8, test=8)
    kw = of_photos(tiny, photos, teacher1_type='mlp', teacher2_type='mlp', student_type='mlp', finetune_epochs=1, epochs=1)
    run_loop(methods='avgz', seeds='1', **kw)
    swap(photos)
    with pytest.raises(Exception, match='fine-tuned by a loop or a search on other images|others than when'):
        run_loop(methods='wavg', seeds='1', **kw)
    shutil.rmtree(photos.parent/'results'/'teachers')
    run_loop(methods='wavg', seeds='1', **kw)
