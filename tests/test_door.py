"The doors as a stranger opens them: papermill, the command line outside the repository, the wheel's contents."
import json, os, re, subprocess, sys, time, zipfile
from pathlib import Path

import pytest

root = Path(__file__).parents[1]

def test_papermill(tmp_path):
    "The README's line, shortened: parameters reach the run, the output reads well"
    short = dict(preset='quickstart', report=0, train_per_class=12, finetune_epochs=1, teacher_adapt_epochs=1, student_epochs_per_stage=1, num_stages=1, device='cpu', seed=3)
    args = [a for k, v in short.items() for a in ('-p', k, str(v))]
    r = subprocess.run([sys.executable, '-m', 'papermill', str(root/'nbs'/'run_experiment.ipynb'), 'out.ipynb', *args], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr[-3000:]
    run = next((tmp_path/'results').glob('asmb-digits-s3-*'))
    s = json.loads((run/'summary.json').read_text())
    assert [o['key'] for o in s['rows']] == ['teacher1', 'teacher2', 'average', 'synergy', 'ce', 'vanilla_kd', 'avgz', 'asmb']
    text = (tmp_path/'out.ipynb').read_text()
    assert 'averaged logits' in text and 'image/png' in text and 'synergy gate' in text and len(text) < 300_000
    assert re.search(r'asmb (is ahead of|is BEHIND|cannot be told)', text)

def test_command_line_outside_the_repository(asibkd, tmp_path):
    r = asibkd('run', 'preset=quickstart', 'train_per_class=12', 'finetune_epochs=1', 'teacher_adapt_epochs=1', 'student_epochs_per_stage=1', '--num_stages', 1, '--compare', 0, '--report', 0, '--device', 'cpu')
    assert r.returncode == 0, r.stderr[-2000:]
    assert 'asmb' in r.stdout and (tmp_path/'results'/'summary.csv').exists()
    assert '\r' not in r.stderr and '%|' not in r.stderr          # no progress bars where nobody watches
    assert asibkd('show').returncode == 0
    r = asibkd('export'); assert r.returncode == 0 and 'answers alike' in r.stdout

def test_help(asibkd):
    from asibkd.core.config import Config
    text = asibkd('run', '--help').stdout
    for k, f in Config.model_fields.items(): assert f'--{k}' in text
    for group in ('Data', 'Bridge', 'Distillation', 'Precision'): assert f'\n{group}' in text
    from asibkd.cl.methods import list_cl_methods
    from asibkd.distil.methods import list_methods
    from asibkd.run import cl, experiment       # every method that comes with the package
    words = {*re.findall(r'\w+', text)}
    assert not {*list_methods(), *list_cl_methods()} - words

def test_image_folder_from_the_command_line(asibkd, folder):
    d = folder(train=12, test=3)
    r = asibkd('run', '--preset', 'method/asmb', '--dataset', 'imagefolder', '--data_root', d, '--teachers', 'resnet8,resnet14,vgg8', '--student_type', 'resnet8', '--finetune_epochs', 1, '--batch_size', 8,
               '--student_epochs_per_stage', 1, '--teacher_adapt_epochs', 1, '--num_stages', 1, '--val_frac', .25, '--device', 'cpu', '--data_aug', 'standard', '--report', 0)
    assert r.returncode == 0, r.stderr[-2000:]
    assert 'teacher3' in r.stdout or 'vgg8' in r.stdout

def test_load_student(tiny):
    import torch
    from asibkd.eval.deploy import load_student
    from asibkd.data.datasets import create_data
    from asibkd.core.config import resolve
    from asibkd.run.experiment import run_experiment
    s = run_experiment(**tiny)
    model, preprocess, classes = load_student(s['run'])
    data = create_data(resolve(**tiny)[0])
    x = torch.stack([preprocess(data.test.x[i]) for i in range(len(data.test))])
    with torch.inference_mode(): acc = (model(x).argmax(1) == data.test.y).float().mean().item()
    assert abs(acc - s['test_acc_val_selected']) < 1e-6 and len(classes) == 10        # fed by hand, it scores what the table says

def test_wheel_contents(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q', '-w', str(tmp_path), str(root)], capture_output=True, text=True)
    if r.returncode and 'No module named pip' in r.stderr: pytest.skip('this environment has no pip')
    assert r.returncode == 0, r.stderr[-2000:]
    wheel = zipfile.ZipFile(next(tmp_path.glob('*.whl'))); names = wheel.namelist()
    assert {'asibkd/run/cli.py', 'asibkd/__main__.py', 'asibkd/templates/page.html', 'asibkd/templates/page.css', 'asibkd/ib_mbm.py'} <= set(names)
    assert 'asibkd/presets/quickstart.yaml' in names and 'asibkd/presets/method/asmb.yaml' in names
    assert wheel.read('asibkd/notebooks/explore.ipynb') == (root/'nbs'/'explore.ipynb').read_bytes()
    assert 'asibkd/notebooks/voila/templates/asibkd/index.html.j2' in names
    assert not any(n.startswith(('nbs/', 'tests/')) for n in names)

def test_finetune_then_run_then_evaluate(asibkd, tmp_path):
    "A teacher is fine-tuned once, the stages find its checkpoint, and `evaluate` gives the table's numbers back"
    short = ['preset=quickstart', 'train_per_class=12', 'device=cpu', 'log_level=INFO']
    r = asibkd('finetune', *short, '--teacher_type', 'resnet20', '--finetune_epochs', 1, '--finetune_use_cutmix', 1); assert r.returncode == 0, r.stderr[-2000:]
    assert (tmp_path/'checkpoints'/'resnet20_ft.pth').exists()
    r = asibkd('finetune', *short, '--teacher_type', 'resnet20', '--finetune_epochs', 1); assert r.returncode == 0 and 'skipped' in r.stdout
    r = asibkd('run', *short, '--finetune_epochs', 1, '--teacher_adapt_epochs', 1, '--student_epochs_per_stage', 1, '--num_stages', 1, '--compare', 0, '--report', 0, '--exp_id', 'a')
    assert r.returncode == 0 and 'from checkpoints/resnet20_ft.pth' in r.stdout and 'fine-tuning resnet14' in r.stdout, r.stderr[-2000:]
    s = json.loads((tmp_path/'results'/'a'/'summary.json').read_text())
    r = asibkd('evaluate', *short, '--eval_mode', 'synergy', '--mbm_ckpt', 'results/a/bridge.safetensors', '--student_ckpt', 'results/a/student.safetensors', '--teacher2_ckpt', 'results/a/teacher2.pth')
    assert r.returncode == 0, r.stderr[-2000:]
    assert f"acc {s['test_acc_val_selected']:.4f}" in next(o for o in r.stdout.splitlines() if re.match(r'test\s+student', o)) and 'both_wrong' in r.stdout
    assert (tmp_path/'results'/'evaluation.csv').exists()
