"Two teachers who know different classes, one student of all."
import os

from asibkd.run.experiment import run_experiment

def test_no_common_class(tmp_path):
    "Without a single label (`ce_alpha=0`) the student passes both teachers on the union by far: neither can pass half"
    keep = dict(finetune_ckpt1=str(tmp_path/'1.pth'), finetune_ckpt2=str(tmp_path/'2.pth'))   # fine-tuned once for all methods
    for method in ('asmb', *(('uhc', 'aver', 'camkd') if os.environ.get('ASIBKD_SLOW') else ())):
        s = run_experiment(preset='quickstart', method=method, overlap_pct=0, ce_alpha=0, kd_alpha=1, compare=0, finetune_epochs=10, num_stages=1, teacher_adapt_epochs=1,
                           student_epochs_per_stage=12, **keep, device='cpu', report=0, results_dir=str(tmp_path), log_level='ERROR')
        acc = {r['key']: r['test_acc_val_selected'] for r in s['rows']}
        assert max(acc['teacher1'], acc['teacher2']) <= .52
        assert acc['average'] > .6 and acc[method] > .58, method      # observed .70 to .85: room for other processors and precisions
