"Families of timm at small sizes: a fast sample of `nbs/bench/timm_families.py`, and its table"
import csv, logging, sys
from pathlib import Path

import pytest
import timm
import torch

from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher, find_fit, InputFit

sys.path.insert(0, str(Path(__file__).parents[1]/'nbs'/'bench'))
import timm_families as bench


@pytest.mark.parametrize('name,size,small,note', [
    ('levit_128s', 32, 1, ''), ('cait_xxs24_224', 32, 1, ''), ('visformer_tiny', 32, 1, ''), ('xcit_nano_12_p16_224', 32, 1, ''),
    ('pit_ti_distilled_224', 32, 1, 'published stem')])
def test_B1_awkward_family(name, size, small, note):
    "Teacher: evaluated, frozen at every level, copied. Student: forward, backward, evaluated"
    row = bench.row(name, size, bool(small))
    assert row['outcome'] == 'ok', row
    assert row['note'] == note


@pytest.mark.parametrize('name,fit', [
    ('mobileone_s0', InputFit(32, stem=True)), ('gmixer_12_224', InputFit(128, patch=4)), ('resmlp_12_224', InputFit(128, patch=4)),
    ('levit_128s', InputFit(64, stem=True)), ('swin_tiny_patch4_window7_224', InputFit(64, patch=2)), ('resnet10t', InputFit(32, stem=True))])
def test_B1_how_a_network_reads_32_pixels(name, fit):
    assert find_fit(name, 32, small_input=True) == fit


def test_B1_a_network_for_larger_images_gets_them_enlarged(caplog):
    with caplog.at_level(logging.INFO, 'asibkd'): m = create_teacher('crossvit_9_240', n_class=10, img_size=32, small_input=True).eval()
    assert 'crossvit_9_240: small_input=1 changes nothing' in caplog.text and 'it gets them enlarged to 120×120' in caplog.text
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        large = torch.nn.functional.interpolate(x, (120, 120), mode='bilinear')
        assert torch.equal(m(x)['logit'], m(large)['logit'])
    assert set(m.model.state_dict()) == set(timm.create_model('crossvit_9_240', num_classes=10).state_dict())


def test_B1_a_network_without_a_stem_keeps_its_layers(caplog):
    class Dense(torch.nn.Sequential): pass
    from asibkd.models.teachers import models, register_model
    register_model('dense')(lambda n_class, img_size=32: Dense(torch.nn.Flatten(), torch.nn.Linear(3*img_size**2, n_class)))
    try:
        with caplog.at_level(logging.INFO, 'asibkd'): s = create_student('dense', n_class=4, img_size=32, small_input=True)
    finally: models.pop('dense')
    assert 'dense: small_input=1 changes nothing' in caplog.text and s(torch.zeros(2, 3, 32, 32))['logit'].shape == (2, 4)


def test_B1_the_table_has_no_crash():
    rows = list(csv.DictReader(bench.TABLE.open()))
    assert len(bench.FAMILIES) >= 60 and {r['name'] for r in rows} <= set(bench.FAMILIES)
    assert [r for r in rows if r['outcome'] != 'ok'] == []
    done = {(r['name'], r['size'], r['small_input']) for r in rows}
    missing = [n for n in bench.FAMILIES if any((n, z, k) not in done for z in ('32', '64') for k in '01')]
    assert missing == [], 'python nbs/bench/timm_families.py fills the table'
