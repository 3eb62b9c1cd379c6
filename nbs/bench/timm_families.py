"""Sixty families of timm at 32 and 64 pixels, small_input 0 and 1, as teacher and as student.

    python nbs/bench/timm_families.py          # fills what timm_families.csv lacks (all of it: < 10 minutes on one core)
    python nbs/bench/timm_families.py levit_128s xcit_nano_12_p16_224    # these names only, printed, not written

Each row is one network at one size: as a teacher it is evaluated, frozen at the levels 0, 1, 2, -1 and copied; as a
student it takes a forward and a backward pass in training mode and is evaluated. The smallest variant stands for its
family; the second column of FAMILIES makes it shallower, where timm's constructor allows that."""
import csv, copy, logging, sys, time
from pathlib import Path

FAMILIES = dict(   # name of timm: further arguments; first those whose size, stem or patches are awkward
    levit_128s={}, mobileone_s0={}, gmixer_12_224={}, visformer_tiny={}, twins_pcpvt_small=dict(depths=(1, 1, 1, 1)),
    volo_d1_224={}, sequencer2d_s=dict(layers=(1, 1, 1, 1)), pit_ti_distilled_224={}, repvit_m0_9={},
    resmlp_12_224={}, xcit_nano_12_p16_224=dict(depth=3), mixer_s16_224={}, fastvit_t8={},
    tiny_vit_5m_224={}, tnt_s_patch16_224=dict(depth=3), nest_tiny={}, gcvit_xxtiny={}, halonet26t={}, shvit_s1={}, repvgg_a0={},
    mobilevit_xxs={}, efficientvit_m0={}, swiftformer_xs={}, crossvit_9_240={}, cait_xxs24_224=dict(depth=2), efficientformer_l1={},
    efficientformerv2_s0={}, coatnet_nano_rw_224={}, convit_tiny=dict(depth=3, local_up_to_layer=2), coat_lite_tiny={},
    davit_tiny=dict(depths=(1, 1, 1, 1)), deit_tiny_distilled_patch16_224=dict(depth=3),
    beit_base_patch16_224=dict(depth=2, embed_dim=96, num_heads=3), convnext_atto={},
    densenet121=dict(growth_rate=8, block_config=(2, 2, 2, 2)), dla46_c={}, edgenext_xx_small={}, efficientnet_b0={},
    efficientvit_b0={}, ese_vovnet19b_slim_dw={}, eva02_tiny_patch14_224=dict(depth=3), fbnetc_100={},
    focalnet_tiny_srf={}, ghostnet_050={}, hgnetv2_b0={}, inception_next_atto={}, lcnet_035={},
    mambaout_femto={}, mobilenetv3_small_050={}, mobilenetv4_conv_small_035={}, nf_regnet_b0={}, poolformer_s12={}, pvt_v2_b0={},
    regnetx_002={}, repghostnet_050={}, resnet10t={}, rexnet_100={}, skresnet18={}, starnet_s050={},
    swin_tiny_patch4_window7_224=dict(depths=(1, 1, 1, 1), embed_dim=24),
    swinv2_tiny_window8_256=dict(depths=(1, 1, 1, 1), embed_dim=24), vgg11={}, vit_tiny_patch16_224=dict(depth=3))
COLUMNS = ['name', 'size', 'small_input', 'outcome', 'note', 'blocks', 'feat_dim', 'first_map', 'last_map', 'seconds']
TABLE = Path(__file__).with_name('timm_families.csv')


def check(name, size, small_input, **kw)->dict:
    "One network in both roles; an error is raised"
    import torch
    from asibkd.freeze import apply_freeze, freeze_report
    from asibkd.models.students import create_student
    from asibkd.models.teachers import create_teacher
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    t = create_teacher(name, n_class=10, img_size=size, small_input=small_input, **kw).eval()
    with torch.no_grad(): out = t(x)
    assert out['logit'].shape == (2, 10) and out['logit'].isfinite().all()
    assert out['feat_2d'].shape == (2, t.feat_dim) and t.feat_dim >= 2
    assert [s.shape[1] for s in out['stages']] == t.stage_dims and all(s.ndim == 4 for s in out['stages'])
    last = out['feat_4d']
    assert (t.feat4_dim is None) == (last is None) and (last is None or last.shape[:2] == (2, t.feat4_dim))
    n_open = [sum(p.numel() for p in apply_freeze(t, level).parameters() if p.requires_grad) for level in (0, 1, 2, -1)]
    assert 0 < n_open[0] < n_open[1] <= n_open[2] <= n_open[3] == sum(p.numel() for p in t.parameters()), n_open
    assert freeze_report(t).set_index('block').parameters['all'] == n_open[-1]
    s = create_student(copy.deepcopy(t), n_class=10).train()
    out = s(x)
    parts = [out['logit'], *out['stages'], *([] if out['feat_4d'] is None else [out['feat_4d']])]
    sum(p.square().mean() for p in parts).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in s.parameters())
    assert sum(p.grad is not None for p in s.parameters()) >= .5*len(list(s.parameters()))
    s.eval()(x)
    with torch.no_grad(): assert copy.deepcopy(s)(x)['logit'].shape == (2, 10)
    def side(m): return '-' if m is None else f'{m.shape[1]}x{m.shape[2]}x{m.shape[3]}'
    return dict(blocks=len(t.anatomy.blocks), feat_dim=t.feat_dim, last_map=side(last),
                first_map=side(out['stages'][0] if out['stages'] else None))


class Notes(logging.Handler):
    "Keeps what the package logs"
    def __init__(self): super().__init__(); self.lines = []
    def emit(self, record): self.lines.append(record.getMessage())


def row(name, size, small_input)->dict:
    "One row of the table; an error becomes its outcome"
    from asibkd.core.config import log
    notes, level, start = Notes(), log.level, time.process_time()
    log.addHandler(notes)
    log.setLevel('INFO')
    r = dict(name=name, size=size, small_input=int(small_input))
    try: r |= check(name, size, small_input, **FAMILIES.get(name, {})) | dict(outcome='ok')
    except Exception as e: r |= dict(outcome=f'{type(e).__name__}: {str(e).splitlines()[0][:150] if str(e) else ""}')
    finally:
        log.removeHandler(notes)
        log.setLevel(level)
    said = ' '.join(notes.lines)
    note = [w for w, so in (('published stem', 'changes nothing' in said), ('enlarged', 'enlarged to' in said)) if so]
    if 'enlarged to' in said: note[-1] += ' to ' + said.partition('enlarged to ')[2].split(',')[0]
    return r | dict(note=', '.join(note), seconds=round(time.process_time() - start, 1))


def main(names):
    "Fill the table, or print the rows of some names"
    import warnings
    import torch
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    done = list(csv.DictReader(TABLE.open())) if TABLE.exists() and not names else []
    known = {(r['name'], r['size'], r['small_input']) for r in done}
    todo = [(n, size, small) for n in names or FAMILIES for size in (32, 64) for small in (0, 1)
            if (n, str(size), str(small)) not in known]
    for n, size, small in todo:
        r = row(n, size, bool(small))
        print(*(r.get(c, '') for c in COLUMNS), sep=' | ', flush=True)
        if names: continue
        done.append(r)
        with TABLE.open('w', newline='') as f:
            w = csv.DictWriter(f, COLUMNS)
            w.writeheader()
            w.writerows(done)


if __name__ == '__main__': main(sys.argv[1:])
