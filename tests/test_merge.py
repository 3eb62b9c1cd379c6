"""Teachers who know different classes: named by parameters, files and modules; `asibkd merge`."""
import json, logging, shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from asibkd.core.config import CheckpointError, ConfigError, RunError
from asibkd.run.cli import main
from asibkd.run.experiment import run_experiment

pytestmark = pytest.mark.usefixtures('short_exam')
TINY = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, data_aug=0, train_per_class=8, val_frac=.25, teacher1_type='mlp', teacher2_type='mlp', student_type='mlp',
            method='avgz', epochs=1, finetune_epochs=1, compare=0, report=0, log_level='WARNING')

def run(tmp_path, **kw):
    return run_experiment(**TINY | dict(results_dir=str(tmp_path/'results')) | kw)

def test_specialists_by_parameter(tmp_path):
    "Each is fine-tuned on its classes, and its file says which: named as a checkpoint, it needs no parameter"
    s = run(tmp_path, teacher1_classes='0,1,2,3,4', teacher2_classes=[5, 6, 7, 8, 9])
    assert [s['weights'][f'teacher{i}']['classes'] for i in (1, 2)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    files = {f'teacher{i}_ckpt': str(Path(s['run'])/f'teacher{i}.pth') for i in (1, 2)}
    again = run(tmp_path, finetune_epochs=0, **files)
    assert [o['classes'] for o in again['weights'].values()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    acc = {k: {r['key']: r['test_acc_val_selected'] for r in o['rows']} for k, o in dict(a=s, b=again).items()}
    assert all(acc['a'][k] == acc['b'][k] for k in ('teacher1', 'teacher2', 'average'))
    assert acc['a']['teacher1'] <= .55                        # it cannot name the other half
    with pytest.raises(CheckpointError, match='in this order'):
        run(tmp_path, finetune_epochs=0, **files, teacher1_classes='4,3,2,1,0')

def test_three_of_any_overlap(tmp_path, capsys):
    "Three teachers, overlapping, and a class that none of them knows: it is learnt from labels"
    s = run(tmp_path, teachers='mlp,mlp,mlp', teacher_classes='["0,1,2,3", "3,4,5", "5,6,7,8"]')
    assert [o['classes'] for o in s['weights'].values()] == [[0, 1, 2, 3], [3, 4, 5], [5, 6, 7, 8]]
    assert 'no teacher knows 9: distillation compares the other 9 classes' in capsys.readouterr().out
    for kw, message in ((dict(teacher_classes='["0,1", "2,3", "4,5"]'), 'has 3 lists, the run has 2 teachers'), (dict(teacher1_classes='0,1,1'), "names '1' twice"),
                        (dict(teacher1_classes='0,1,cat'), "to learn.*'cat'"), (dict(teacher1_classes='0,1', overlap_pct=0), 'Leave one of both out'),
                        (dict(teacher1_classes='0,1', method='dkd'), 'needs teachers that know every class: teacher1 knows 2 of 10')):
        with pytest.raises(ConfigError, match=message): run(tmp_path, **kw)

def linear(n, classes=None):
    m = nn.Sequential(nn.Flatten(), nn.Linear(192, n))
    if classes: m.classes = classes
    return m

def test_own_modules(tmp_path, capsys):
    "A module says what its outputs stand for; one output that the data lack is left out; the width alone is refused with the name of the parameter"
    torch.manual_seed(0)
    mods = [linear(4, ['0', '1', 'cow', '2']), linear(7, list(range(3, 10)))]
    s = run(tmp_path, teachers=mods, student=linear(10), finetune_epochs=0, log_level='INFO')
    assert s['weights']['teacher1'] | dict(norm=None) == dict(source='given', file='', classes=[0, 1, 2], outputs=[0, 1, -1, 2], norm=None)
    assert "knows 3 of the data's 10 classes (0, 1, 2); left out: cow, which the data do not have" in capsys.readouterr().out
    with pytest.raises(ConfigError, match='has 4 outputs, the data have 10 classes.*teacher1_classes='): run(tmp_path, teachers=[linear(4), mods[1]], finetune_epochs=0)
    with pytest.raises(ConfigError, match='Name one for each output'): run(tmp_path, teachers=[linear(4), mods[1]], finetune_epochs=0, teacher1_classes='0,1,2')
    given = run(tmp_path, teachers=[linear(4), mods[1]], student=linear(10), finetune_epochs=0, teacher1_classes='0,1,cow,2')
    assert given['weights']['teacher1']['outputs'] == [0, 1, -1, 2]

def checkpoints(tmp_path):
    "Two files as other people's scripts write them: timm's (its `arch`, no class names), torchvision's with `class_to_idx`"
    import timm, torchvision
    torch.manual_seed(0)
    a, b = timm.create_model('mobilenetv3_small_050', num_classes=3), torchvision.models.shufflenet_v2_x0_5(num_classes=2)
    torch.save(dict(epoch=9, arch='mobilenetv3_small_050', state_dict=a.state_dict()), tmp_path/'a.pth')
    torch.save(dict(model=b.state_dict(), class_to_idx=dict(cow=0, dog=1)), tmp_path/'b.pth')
    return a, b

FAST = ('--method', 'avgz', '--compare', '0', '--report', '0', '--num_stages', '1', '--student_epochs_per_stage', '1', '--batch_size', '4', '--device', 'cpu', '--student_type', 'mlp')

def test_merge_from_the_command_line(tmp_path, monkeypatch, capsys, folder):
    "Two foreign files and a folder: architectures from the files, classes from the file or the command line; the average is that of the two networks"
    a, b = checkpoints(tmp_path)
    shutil.copytree(folder(classes=('cat', 'cow', 'dog'), train=6, test=2)/'test', tmp_path/'photos/unlabelled/from_the_web')
    monkeypatch.chdir(tmp_path)
    merge = ['merge', 'a.pth', 'b.pth', '--data_root', 'photos', *FAST]
    torch.save(dict(model=b.state_dict()), tmp_path/'c.pth')
    assert main(['merge', 'c.pth', 'b.pth', '--data_root', 'photos', *FAST]) == 2              # before any image is read
    assert "'c.pth' has 2 outputs, and does not name them; the folder has 3 classes (cat, cow, dog)" in capsys.readouterr().err
    assert main([*merge, '--teacher1_classes', 'cat,bird,dog', '--exp_id', 'm']) == 0
    out = capsys.readouterr().out
    for said in ('a.pth: mobilenetv3_small_050, 3 outputs', 'b.pth: shufflenet_v2_x0_5, 2 outputs', "knows 2 of the data's 3 classes (cat, dog); left out: bird", "knows 2 of the data's 3 classes (cow, dog)", 'teacher2_norm=imagenet if'):
        assert said in out, said
    s = json.loads((tmp_path/'results/m/summary.json').read_text())
    w = s['weights']
    assert s['images']['train'] - s['images']['labelled'] == 6       # the same folder as photos without a class
    assert (w['teacher1']['outputs'], w['teacher1']['classes'], w['teacher2']['classes']) == ([0, -1, 2], [0, 2], [1, 2])
    assert main([*merge, '--teacher1_classes', 'cat,dog']) == 2
    err = capsys.readouterr().err
    assert 'another number of classes (3, here 2)' in err and 'teacher1_classes' in err, err

def test_merge_is_refused_in_a_sentence(tmp_path, asibkd, folder):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path/'odd.pth')
    for words, said in ((['merge', 'a.pth', '--data_root', 'photos'], 'two files of weights'), (['merge', 'a.pth', 'b.pth', '--data_root', 'photos'], 'is no file'),
                        (['merge', 'odd.pth', 'odd.pth'], 'needs images'), (['merge', 'odd.pth', 'odd.pth', '--data_root', 'photos'], '--teacher1_type NAME')):
        r = asibkd(*words)
        assert r.returncode == 2 and said in r.stderr, r.stderr

def test_merge_takes_a_file_of_parameters(tmp_path, monkeypatch, capsys, folder):
    "What a file says is not guessed again; a checkpoint may be called like a parameter, and a class Cow where the folder is cow"
    a, b = checkpoints(tmp_path)
    folder(classes=('cat', 'cow', 'dog'), train=6, test=2)
    monkeypatch.chdir(tmp_path)
    shutil.copy('a.pth', 'epoch=3-step=10.ckpt')
    torch.save(dict(model=b.state_dict(), class_to_idx=dict(Cow=0, Dog=1)), 'B.pth')
    words = dict(zip((o[2:] for o in FAST[::2]), FAST[1::2])) | dict(data_root='photos', teacher1_classes='cat,bird,dog', exp_id='m')
    Path('m.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in words.items()))
    assert main(['merge', 'epoch=3-step=10.ckpt', 'B.pth', '-f', 'm.yaml']) == 0, capsys.readouterr().err
    s, c = (json.loads((tmp_path/'results/m'/f).read_text()) for f in ('summary.json', 'config.json'))
    assert c['student_type'] == 'mlp' and [o['classes'] for o in s['weights'].values()] == [[0, 2], [1, 2]]
    torch.jit.trace(b.eval(), torch.zeros(1, 3, 32, 32)).save('b.pt')
    for typed, said in ((['a.pth', 'b.pt'], "'b.pt' is a program, not a file of weights. Programs are teachers as they are: asibkd run"),
                        (['a.pth', 'b.pth', 'B.pth', '--teachers', 'mlp,mlp'], 'teachers names 2 networks for 3 files')):
        assert main(['merge', *typed, '-f', 'm.yaml']) == 2
        assert said in (err := capsys.readouterr().err), err

def test_a_replaced_checkpoint_is_not_the_old_result(tmp_path):
    "The same command over another file of weights is refused before anything is passed off as its result; over the same file it is done"
    s = run(tmp_path)
    files = [Path(s['run'])/f'teacher{i}.pth' for i in (1, 2)]
    kw = dict(finetune_epochs=0, **{f'teacher{i + 1}_ckpt': str(f) for i, f in enumerate(files)})
    first = run(tmp_path, **kw)
    assert run(tmp_path, **kw)['run'] == first['run']
    shutil.copy(files[1], files[0])
    with pytest.raises(RunError, match=r"teacher1.pth' is another file than when the run in .* began"): run(tmp_path, **kw)
    assert run(tmp_path, **kw, resume=0)['run'] == first['run']
