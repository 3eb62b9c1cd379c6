"""A table over all parameters: parameter → where its effect is seen. Nothing is accepted and ignored.

Most are seen end to end: the same tiny run through the public door with one parameter changed must leave other numbers
(`CHANGES`: the value to change to, and the other parameters under which it matters). What has no numeric effect, by
intention or because it names a file, has a test of its own (`ELSEWHERE`)."""
import functools, json, re, tempfile
from pathlib import Path

import pytest
import torch

from asibkd.core.config import CheckpointError, Config, ConfigError, RunError, resolve
from asibkd.distil.idle import idle_parameters
from asibkd.run.experiment import classes_of_run, run_experiment

root = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('short_exam')
BASE = dict(preset='none', dataset='digits', device='cpu', use_amp=0, batch_size=16, data_aug='standard', train_per_class=8, val_frac=.25, teacher1_type='resnet8', teacher2_type='resnet14',
            student_type='resnet8', finetune_epochs=0, allow_untrained=1, num_stages=1, teacher_adapt_epochs=1, student_epochs_per_stage=1, bridge_objective='both', teacher_lr=.01, student_lr=.01,
            mbm_lr_factor=1., teacher1_freeze_level=1, ib_beta=.01, log_level='ERROR', report=0)
FEAT, WEIGH, STEP, CRD, DKD = dict(feat_kd_alpha=1.), dict(use_disagree_weight=1, disagree_lambda_high=5.), dict(lr_schedule='step', student_epochs_per_stage=2), dict(method='crd', crd_nce_k=16), dict(method='dkd', dkd_warmup=1)
TUNED = dict(finetune_epochs=1, finetune_lr=.01, allow_untrained=0)
FIXED, FUSED = dict(bridge_objective='distil'), dict(bridge_objective='fuse', bridge_images='train')
OPEN = dict(teacher1_freeze_level=-1, teacher2_freeze_level=-1)
CL = dict(TUNED, cl_mode=1, num_tasks=2, epochs=1, replay_capacity=20, replay_ratio=1, student_type='mlp', teacher1_type='mlp', bridge_objective='ce', data_aug=0)
VIEWS = dict(CL, cl_kd_mix=3.)
ANALYTIC = dict(CL, cl_teachers='analytic', analytic_dim=40)
EWC3, SI3 = dict(CL, cl_method='ewc', num_tasks=3, lambda_ewc=50., epochs=4), dict(CL, cl_method='si', num_tasks=3, si_c=50., epochs=4)
CHANGES = dict(
    cl_mode=(1, TUNED), num_tasks=(3, CL), task_sizes=([7, 3], CL), class_order_seed=(7, CL), class_order=('9,8,7,6,5,4,3,2,1,0', CL), stop_after=(1, CL), cl_rows=(12, CL), cl_online=(1, CL), cl_method=('er', CL), cl_teachers=('expert', CL), cl_ema_decay=(.5, dict(CL, cl_teachers='expert+ema')),
    cl_mask=('ace', CL), cl_replay_ce=(.1, CL), cl_der_alpha=(5., dict(CL, epochs=2)), cl_der_loss=('kl', CL), cl_kd_mix=(1., CL), cl_held=(0., dict(VIEWS, bridge_objective='fuse', cl_teachers='expert+snapshot', replay_capacity=40)), cl_mix_alpha=(.2, VIEWS), cl_mix_aug=('0', VIEWS), cl_old_kd=(9., dict(CL, teacher_adapt_epochs=4)), replay_ratio=(.3, CL), replay_capacity=(10, CL), replay_policy=('reservoir', CL),
    cl_trunk=('kmeans', ANALYTIC), analytic_dim=(50, ANALYTIC), analytic_lambda=(1e4, ANALYTIC),
    store=('synergy', CL), cl_align=(1, dict(CL, cl_method='derpp', epochs=4)), cl_transplant=(.85, dict(CL, cl_method='derpp', num_tasks=3)), bic_share=(.5, dict(CL, cl_method='bic')),
    clser_weight=(9., dict(CL, cl_method='clser')), clser_stable=(.2, dict(CL, cl_method='clser')), clser_decay=(.1, dict(CL, cl_method='clser', clser_weight=9., epochs=4)), clser_plastic=(.1, dict(CL, cl_method='clser', clser_stable=.1, epochs=3)), lambda_ewc=(99., CL), fisher=('empirical', EWC3), fisher_n=(5, EWC3), ewc_mode=('separate', EWC3), ewc_gamma=(.1, EWC3), si_c=(5., SI3), si_xi=(9., SI3),
    preset=('method/asmb_original', {}), method=('avgz', {}), compare=(1, {}), report_oracle=(1, {}), labels_per_class=(2, {}), teacher_share=(.5, {}), seed=(1, {}), batch_size=(12, {}), data_aug=('0', {}), image_size=(12, {}),
    small_input=('0', dict(student_type='resnet10t', image_size=16, method='ce')), mixup_alpha=(1., {}), cutmix_alpha_distill=(1., {}), label_smoothing=(.2, {}), overlap_pct=(0, {}), val_frac=(.5, {}), drop_last=(0, {}),
    train_per_class=(9, {}), sampler=('balanced', {}), class_weight=('balanced', dict(val_frac=.3, method='ce')), teacher1_type=('resnet14', {}), teacher2_type=('resnet8', {}), teachers=('resnet8,resnet14,resnet8', {}), teacher_type=('resnet14', dict(method='vanilla_kd')),
    teacher1_norm=('0.2 / 0.5', {}), teacher2_norm=('0.2 / 0.5', {}), student_norm=('0.2 / 0.5', {}),
    student_type=('resnet14', {}), dropout_p=(.5, {}), efficientnet_dropout=(.8, dict(teacher1_type='efficientnet_b0', image_size=16, train_per_class=4)),
    use_partial_freeze=(0, {}), teacher1_freeze_level=(0, {}), teacher2_freeze_level=(0, {}), student_freeze_level=(0, {}), teacher1_freeze_scope=('layer2', {}), teacher2_freeze_scope=('layer2', {}),
    teacher1_bn_head_only=(1, {}), teacher2_bn_head_only=(1, {}), teacher1_freeze_bn=(1, OPEN), teacher2_freeze_bn=(1, OPEN), student_freeze_bn=(1, {}), use_distillation_adapter=(1, {}),
    distill_hidden_dim=(8, dict(use_distillation_adapter=1)), distill_out_dim=(8, dict(use_distillation_adapter=1)),
    use_ib=(0, {}), ib_beta=(1., {}), ib_beta_warmup_epochs=(3, {}), mbm_query_dim=(8, {}), mbm_out_dim=(8, {}), mbm_r=(2, {}), mbm_n_head=(2, {}), mbm_learnable_q=(1, {}), mbm_dropout=(.5, {}),
    synergy_head_dropout=(.5, {}), synergy_base=('none', {}), bridge_objective=('ce', {}), bridge_images=('val', FUSED), synergy_gate=(0, dict(synergy_base='none')), mbm_tokens=('spatial', {}),
    num_stages=(2, {}), teacher_adapt_epochs=(2, {}), student_epochs_per_stage=(2, {}), epochs=(2, dict(method='ce')), optimizer=('sgd', {}), momentum=(.5, dict(optimizer='sgd')),
    nesterov=(1, dict(optimizer='sgd')), teacher_lr=(.02, {}), student_lr=(.02, {}), teacher_weight_decay=(.5, OPEN), student_weight_decay=(.5, {}), mbm_lr_factor=(2., {}), ce_alpha=(1., {}), kd_alpha=(.1, {}),
    synergy_ce_alpha=(1., {}), synergy_kd_alpha=(.1, {}), teacher_adapt_kd_warmup=(0, {}), tau_start=(2., {}), tau_end=(1., dict(student_epochs_per_stage=2)), tau_decay_power=(3., dict(tau_end=1., student_epochs_per_stage=2)), hybrid_beta=(.5, {}),
    feat_kd_alpha=(1., {}), feat_kd_key=('distill_feat', dict(FEAT, use_distillation_adapter=1)), feat_kd_norm=('l2', FEAT), feat_kd_target=('synergy', FEAT), rkd_loss_weight=(1., {}), reg_lambda=(.1, {}),
    mbm_reg_lambda=(.1, {}), use_disagree_weight=(1, dict(disagree_lambda_high=5.)), disagree_mode=('any_wrong', WEIGH), disagree_lambda_high=(2., dict(use_disagree_weight=1)),
    disagree_lambda_low=(5., dict(use_disagree_weight=1)), use_certainty_weight=(1, {}), grad_clip_norm=(.01, {}), accumulate=(2, {}), student_ema=(.9, {}), patience=(1, dict(student_epochs_per_stage=4, student_lr=1.)), lr_schedule=('step', dict(step_size=1)), lr_restart=(1, dict(num_stages=2)), lr_warmup_epochs=(1, {}),
    min_lr=(.005, {}), step_size=(1., STEP), milestones=([1], STEP), gamma=(.5, dict(STEP, step_size=1)), use_amp=(1, dict(amp_dtype='bfloat16')),
    finetune_epochs=(2, TUNED), finetune_lr=(.02, TUNED), finetune_weight_decay=(1., TUNED), finetune_use_cutmix=(1, TUNED), finetune_cutmix_alpha=(1., TUNED),
    logit_standardization=(1, {}), hint_layer=(1, dict(method='fitnet')), stage_pairs=('end', dict(method='at', teacher_type='vgg8', at_beta=10., image_size=16)), hint_beta=(1., dict(method='fitnet')), at_beta=(1., dict(method='at')), crd_feat_dim=(16, CRD), crd_nce_k=(8, CRD), crd_nce_t=(.2, CRD),
    crd_momentum=(.9, CRD), teacher_cache=('off', FIXED), cache_gb=(1e-6, FIXED), cache_views=(1, {}), dkd_alpha=(3., DKD), dkd_beta=(1., DKD), dkd_warmup=(9, DKD))
ELSEWHERE = dict(
    stream='test_stream.py::test_a_stream_of_datasets', extend='test_stream.py::test_goes_on_with_classes_that_came_later', keep_task_weights='test_stream.py::test_the_student_after_each_task',
    allow_leak='test_cl.py::test_a_teacher_that_saw_the_future', allow_untrained='test_recipe.py::test_B10_a_teacher_without_weights_is_refused', plugin='test_plugin.py::test_every_door', report='test_report.py::test_left_out_and_written_later',
    compile='test_cache.py::test_compile', sync_bn='test_processes.py::test_without_synchronised_batch_norm_all_keep_one_network', deterministic='test_deterministic', device='test_device', results_dir='test_folder_names', exp_id='test_folder_names', resume='test_resume.py::test_finished_run_is_not_run_again',
    checkpoint_steps='test_methods.py::test_resumes', log_level='test_log', log_filename='test_log', debug_verbose='test_log', mbm_type='test_log', disable_tqdm='nbs/00_core/05_runtime.ipynb', track='test_tracking.py::test_D_tensorboard_once_after_resume',
    dataset='test_door.py::test_image_folder_from_the_command_line', data_root='test_faults.py::test_data_root_missing_or_empty', num_workers='nbs/01_data/04_batches.ipynb', skip_corrupt='test_faults.py::test_corrupt_image', unlabelled='test_few_labels.py::test_unlabelled_folder',
    image_column='test_data_in.py::test_a_table_with_named_columns', label_column='test_data_in.py::test_a_table_with_named_columns', test_frac='test_data_in.py::test_kaggle_table',
    teacher1_classes='test_merge.py::test_specialists_by_parameter', teacher2_classes='test_merge.py::test_specialists_by_parameter', teacher_classes='test_merge.py::test_three_of_any_overlap',
    teacher1_ckpt='test_checkpoints', teacher2_ckpt='test_checkpoints', teacher_ckpts='test_checkpoints', teacher_ckpt='test_checkpoints', student_ckpt='test_checkpoints', finetune_ckpt1='test_checkpoints',
    finetune_ckpt2='test_checkpoints', teacher1_pretrained='test_pretrained', teacher2_pretrained='test_pretrained', student_pretrained='test_pretrained', amp_dtype='test_precision',
    grad_scaler_init_scale='test_precision', channels_last='test_precision', eval_mode='nbs/11_run/04_tasks.ipynb', ckpt_path='nbs/11_run/04_tasks.ipynb', mbm_ckpt='nbs/11_run/04_tasks.ipynb', head_ckpt='nbs/08_eval/00_evaluate.ipynb')

def test_the_table_is_complete():
    assert {*CHANGES} | {*ELSEWHERE} == set(Config.model_fields) and not {*CHANGES} & {*ELSEWHERE}
    for where in ELSEWHERE.values():
        f, _, name = where.rpartition('::')
        if where.startswith('nbs/'): assert (root/where).exists()
        else: assert f'def {name}(' in (root/'tests'/(f or 'test_flags.py')).read_text(encoding='utf-8'), where

def read_by_method(given):
    "Without what the method does not read: typed, it would be refused"
    cfg = resolve(**given)[0]; idle = idle_parameters(given, cfg, classes_of_run(cfg))
    return {k: v for k, v in given.items() if k not in idle}

@functools.lru_cache(None)
def outcome(given)->str:
    "The numbers a run leaves: its rows, its summary without times, what was open"
    with tempfile.TemporaryDirectory() as d:
        s = run_experiment(**read_by_method(BASE | json.loads(given)), results_dir=d)
        rows = re.sub(r'"seconds": [\d.]+', '', (Path(s['run'])/'metrics.jsonl').read_text())
        return rows + json.dumps({k: v for k, v in s.items() if k not in ('time', 'run', 'exp_id', 'seed')})

def test_nothing_else_differs():
    "The control: a parameter that must not change a result leaves the same numbers"
    assert outcome('{}') == outcome(json.dumps(dict(num_workers=0, log_level='WARNING')))

@pytest.mark.parametrize('flag', CHANGES)
def test_effect(flag):
    value, under = CHANGES[flag]
    a, b = outcome(json.dumps(under)), outcome(json.dumps(under | {flag: value}))
    assert a != b, f'{flag}={value!r} changed nothing'

def run(tmp_path, **kw):
    return run_experiment(**read_by_method({**BASE, **TUNED, 'results_dir': str(tmp_path), **kw}))

def test_deterministic(tmp_path):
    try:
        for on in (0, 1): run(tmp_path, deterministic=on, method='ce', seed=on); assert torch.are_deterministic_algorithms_enabled() == bool(on)
    finally: torch.use_deterministic_algorithms(False)

def test_device(tmp_path, capsys):
    s = run(tmp_path, device='cuda', method='ce', log_level='WARNING')
    if not torch.cuda.is_available(): assert 'goes on on the CPU' in capsys.readouterr().out
    assert json.loads((Path(s['run'])/'config.json').read_text())['device'] == ('cuda' if torch.cuda.is_available() else 'cpu')

def test_folder_names(tmp_path):
    assert run(tmp_path/'here', exp_id='me', method='ce')['run'] == str(tmp_path/'here'/'me')

def test_log(tmp_path, capsys):
    s = run(tmp_path, log_level='INFO', log_filename='train.log', debug_verbose=1, mbm_type='mbm')
    said = capsys.readouterr().out
    assert 'feat_2d (' in said and 'always ib_mbm' in said and 'feat_2d (' in (Path(s['run'])/'train.log').read_text()
    run(tmp_path, log_level='ERROR', seed=1); assert capsys.readouterr().out == ''

def weights(s):
    "Where each teacher's weights came from: the file, or the word"
    return {k: w['file'] or w['source'] for k, w in s['weights'].items()}

def test_checkpoints(tmp_path):
    "Weights come from the files that are named; fine-tuned ones are kept where it is said, and not made again"
    keep = {f'finetune_ckpt{i}': str(tmp_path/f'{i}.pth') for i in (1, 2)}
    assert weights(run(tmp_path, **keep)) == dict.fromkeys(('teacher1', 'teacher2'), 'finetuned')
    assert weights(run(tmp_path, **keep, seed=1)) == dict(teacher1='1.pth', teacher2='2.pth')
    f = {i: str(tmp_path/f'{i}.pth') for i in (1, 2)}
    assert weights(run(tmp_path, teacher1_ckpt=f[1])) == dict(teacher1='1.pth', teacher2='finetuned')
    assert weights(run(tmp_path, teacher2_ckpt=f[2])) == dict(teacher1='finetuned', teacher2='2.pth')
    assert weights(run(tmp_path, teachers=['resnet14', 'resnet8', 'resnet14'], teacher_ckpts=[f[2], f[1], f[2]])) == dict(teacher1='2.pth', teacher2='1.pth', teacher3='2.pth')
    assert weights(run(tmp_path, method='vanilla_kd', teacher_type='resnet14', teacher_ckpt=f[2])) == dict(teacher1='2.pth')
    a, b = run(tmp_path, method='ce'), run(tmp_path, method='ce', student_ckpt=f[1])                    # a teacher's weights to begin with
    assert a['val_acc'] != b['val_acc'] or a['student'] != b['student']

@pytest.mark.parametrize('kw', [dict(teacher1_type='resnet10t', teacher1_pretrained=1), dict(teacher2_type='resnet10t', teacher2_pretrained=1), dict(student_type='resnet10t', student_pretrained=1)])
def test_pretrained(tmp_path, monkeypatch, kw):
    "Published weights are asked for; without a network the message says what to do"
    import timm
    real, asked = timm.create_model, []
    def create(name, pretrained=False, **kw):
        asked.append(pretrained)
        if pretrained: raise OSError('no network')
        return real(name, **kw)
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(CheckpointError, match="(?s)'resnet10t'.*connect to the network"): run(tmp_path, **kw)
    assert True in asked

def test_precision(tmp_path, monkeypatch):
    from asibkd.core import runtime
    from asibkd.core.runtime import RunContext
    from asibkd.trainers.phases import to_device
    with pytest.raises(ConfigError, match='needs a GPU'): run(tmp_path, use_amp=1, amp_dtype='float16')
    monkeypatch.setattr(runtime, 'pick_device', lambda *a: torch.device('cuda'))                        # as on a GPU: the scaler gets its scale
    made = []
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, init_scale: made.append((device, init_scale)))
    runtime.get_amp_components(Config(amp_dtype='float16', grad_scaler_init_scale=64)); assert made == [('cuda', 64.)]
    monkeypatch.undo()
    acc = runtime.create_accelerator(Config(device='cpu', use_amp=0))
    for on in '01':
        m = torch.nn.Conv2d(3, 8, 3); to_device(RunContext(Config(device='cpu', use_amp=0, channels_last=on), acc=acc), m)
        assert m.weight.is_contiguous(memory_format=torch.channels_last) == (on == '1')
