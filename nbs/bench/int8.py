"""Students taken away: what each form answers on 1,000 real images, and what int8 costs and gains.

    python nbs/bench/int8.py DATA [RESULTS]      # DATA holds train/<class>/*.jpg and test/<class>/*.jpg: CIFAR-10 as JPEG

Two students learn from the labels of 4,500 images (eight epochs; 500 images choose the epoch): resnet8 on 32 pixels, and
mobilenetv3_small_050 on 64 pixels with timm's own stem. Each is exported to every target and compared with the run's
student on 1,000 test images; then it is quantised (calibrated on 256 training images), and float32, bfloat16 and int8
are measured on 2,000 test images (every fifth), one image at a time for the latency. One line a row goes to int8.csv.
A run that is finished is not repeated. CPU only; the ratios are of one machine (column `machine`)."""
import csv, platform, sys
from dataclasses import replace
from pathlib import Path

NETWORKS = dict(resnet8=dict(student_lr=.01), mobilenetv3_small_050=dict(student_lr=.01, image_size=64, small_input=0))
COLUMNS = ['network', 'form', 'test_acc', 'agreement', 'mb', 'latency_ms', 'worst_difference', 'images', 'machine']
TABLE = Path(__file__).with_name('int8.csv')


def train(name, data, results, **more):
    "A student from labels alone; returns its run folder"
    from asibkd import run_experiment
    if (there := Path(results)/f'int8-{name}'/'summary.json').exists(): return str(there.parent)
    return run_experiment(preset='none', dataset='imagefolder', data_root=str(data), train_per_class=500, data_aug='standard', batch_size=64,
                          method='ce', compare=0, student_type=name, student_weight_decay=.02, lr_warmup_epochs=1, num_stages=1,
                          teacher_adapt_epochs=0, student_epochs_per_stage=8, finetune_epochs=0, teacher1_type='resnet8', teacher2_type='resnet8',
                          results_dir=str(results), exp_id=f'int8-{name}', report=0, seed=1, device='cpu', **more)['run']


def read_back(to, path):
    "An exported student as its user loads it: a function of a batch"
    import torch
    from asibkd.eval.hub import run_source
    from asibkd.eval.quantise import onnx_session
    if to == 'onnx': return onnx_session(path)
    if to == 'pt2': return torch.export.load(path).module()
    if (Path(path)/'student.py').exists(): return run_source(path)[0]
    import timm
    return timm.create_model(f'local-dir:{path}', pretrained=True).eval()


def differences(run, data, n=1000):
    "Target → the largest difference of a logit on `n` test images, relative to the largest logit"
    import torch
    from asibkd import AsibError, export_student, load_student
    from asibkd.data.batches import normalise
    student, out = load_student(run), {}
    at = torch.linspace(0, len(data.test) - 1, n).round().long()
    x = normalise(data.test.images(at), student.preprocess.mean, student.preprocess.std)
    with torch.inference_mode():
        z = torch.cat([student.model(b) for b in x.split(100)])
        for to in ('pt2', 'onnx', 'timm', 'hub'):
            try: fn = read_back(to, export_student(run, to)['path'])
            except AsibError as e: print(f'{to}: {e}'); continue
            out[to] = ((torch.cat([fn(b).detach() for b in x.split(100)]) - z).abs().max()/z.abs().max()).item()
    return out


def main(folder, results='results'):
    import torch
    from asibkd.eval.quantise import quantise_student
    from asibkd.run.export import data_of_run
    rows, machine = [], f'{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}'
    for name, more in NETWORKS.items():
        run = train(name, folder, results, **more)
        data = data_of_run(run)
        for to, gap in differences(run, data).items():
            rows.append(dict(network=name, form=f'exported: {to}', worst_difference=f'{gap:.1e}', images=1000, machine=machine))
            print(rows[-1], flush=True)
        some = replace(data, test=data.test.subset(range(0, len(data.test), 5)))       # bfloat16 is emulated on many CPUs
        for r in (o := quantise_student(run, some))['rows']:
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} | dict(network=name, images=o['test_images'], machine=machine))
            print(rows[-1], flush=True)
        print(o['warning'] or 'int8 is within the tolerance', flush=True)
        with TABLE.open('w', newline='', encoding='utf-8') as f:
            w = csv.DictWriter(f, COLUMNS, lineterminator='\n'); w.writeheader(); w.writerows(rows)


if __name__ == '__main__': main(*sys.argv[1:])
