"The README's big preset on a machine with 24 GB of memory: slow, so it runs only with ASIBKD_SLOW=1."
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from asibkd.run.experiment import run_experiment

class Noise(torch.utils.data.Dataset):
    "A few images of 32×32"
    classes = ['a', 'b', 'c', 'd']
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.randint(0, 255, (3, 32, 32), generator=torch.Generator().manual_seed(i), dtype=torch.uint8), i % 4

@pytest.mark.skipif(not os.environ.get('ASIBKD_SLOW'), reason='takes minutes and 18 GB: set ASIBKD_SLOW=1')
@pytest.mark.parametrize('objective', ['distil', 'both'])
def test_res152_effi_l2(tmp_path, objective):
    "ResNet-152 + EfficientNet-L2 → ResNet-152: builds, freezes as stated, steps of A and of B on batches of 2"
    s = run_experiment(preset='res152_effi_l2', train=Noise(4), val=Noise(4), test=Noise(4), batch_size=2, num_stages=1, teacher_adapt_epochs=1, student_epochs_per_stage=1, data_aug='standard',
                       bridge_objective=objective, results_dir=str(tmp_path), device='cpu', log_level='WARNING')
    t = pd.read_csv(Path(s['run'])/'freeze_report.csv')
    print(t.to_string())
    assert [r['model'] for r in s['rows'] if r['role'] == 'teacher'][:2] == ['resnet152', 'efficientnet_l2']
    open_ = t[t.trainable > 0].groupby('model').block.apply(list).to_dict()             # the preset's levels: 0, 1, and −1 for the student
    assert open_['teacher1'] == ['head', 'all'] and open_['teacher2'] == ['blocks.6', 'head', 'all'] and len(open_['student']) == 7
    assert set(t[(t.model == 'teacher1') & t.block.str.startswith('layer')]['BN mode']) == {'frozen'}
    assert len((Path(s['run'])/'metrics.jsonl').read_text().splitlines()) == 2
