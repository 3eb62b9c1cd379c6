"A method of one's own, and a teacher's file: what is wrong with them is said where it happens, through the public door."
import pytest
import torch
from pydantic import BaseModel

from asibkd.cl.methods import cl_methods, register_cl_method
from asibkd.core.config import CheckpointError, ConfigError, RunError, method_params, resolve
from asibkd.distil.methods import AvgZ, Method, methods, register_method, with_method_defaults, weighted
from asibkd.run.experiment import run_experiment
from asibkd.models.students import create_student
from asibkd.run.tasks import run_finetune

@pytest.fixture
def mine(tiny):
    "Run a method whose loss is the given function of (method, batch, s_out, t_outs)"
    def go(f, **kw):
        @register_method('most_confident')
        class MostConfident(Method):
            defaults = dict(ce_alpha=1.)
            def loss(self, batch, s_out, t_outs, when): return f(self, batch, s_out, t_outs)
        return run_experiment(**tiny | dict(method='most_confident', finetune_epochs=0, allow_untrained=1, teachers='mlp', student_type='mlp') | kw)
    yield go
    methods.pop('most_confident', None)


@pytest.mark.parametrize('f,says', [
    (lambda m, b, s, t: m.hard_ce(b, s), 'MostConfident.loss returned a Tensor; return weighted'),
    (lambda m, b, s, t: None, 'returned None'),
    (lambda m, b, s, t: dict(loss=m.hard_ce(b, s)), "a dict without 'parts'"),
    (lambda m, b, s, t: dict(loss=s['logit'].logsumexp(1), parts=dict(z=s['logit'].mean())), r'a loss of shape \('),
    (lambda m, b, s, t: weighted(ce=(1., m.hard_ce(b, s).detach())), 'a loss without gradient'),
    (lambda m, b, s, t: weighted(ce=(1., s['feat'].mean())), "asked for 'feat'.*dict of logit, feat_2d, feat_4d, stages, distill_feat.*02_models/03_kdmodel"),
    (lambda m, b, s, t: weighted(ce=(1., m.hard_ce(b, s)), bad=(1., s['logit'].mean()*float('nan'))), "step 1, in term 'bad'\\. Lower")],
    ids=['tensor', 'none', 'no-parts', 'unreduced', 'detached', 'key', 'nan'])
def test_a_loss_that_is_none(mine, f, says):
    with pytest.raises(RunError, match='(?s)' + says): mine(f)

def test_a_term_that_is_none(mine):
    with pytest.raises(ConfigError, match="Term 'size' has shape"): mine(lambda m, b, s, t: weighted(size=(1., s['logit'])))

def test_a_layer_made_in_the_loss(mine, capsys):
    def f(m, b, s, t):
        if not hasattr(m, 'late'): m.late = torch.nn.Linear(10, 10)
        return weighted(ce=(1., m.hard_ce(b, dict(s, logit=m.late(s['logit'])))))
    s = mine(f, student_epochs_per_stage=2)
    assert s['val_acc'] >= 0 and capsys.readouterr().out.count('method.late.weight, method.late.bias came into being') == 1

def test_terms_that_come_and_go(mine):
    calls = []
    def f(m, b, s, t): calls.append(1); return weighted(ce=(1., m.hard_ce(b, s)), **(dict(size=(.01, s['logit'].pow(2).mean())) if len(calls) % 2 else {}))
    s = mine(f, batch_size=16, student_epochs_per_stage=2)
    assert '"train_size"' in (open(f"{s['run']}/metrics.jsonl").read())

# --- the registry -----------------------------------------------------------------------------------------------------
def test_own_weights_over_the_base():
    class Part(AvgZ): defaults = dict(ce_alpha=1.)
    assert (lambda c: (c.ce_alpha, c.kd_alpha, c.rkd_loss_weight))(with_method_defaults(resolve(preset='none')[0], Part)) == (1., .9, 0.)

class Gamma(BaseModel): gamma:float = 2.
class Seed(BaseModel): cutmix_alpha:float = 2.
class Mine(Method):
    def __init__(self, cfg): super().__init__(cfg, None, [])

@pytest.mark.parametrize('register', [register_method, register_cl_method])
def test_what_the_registry_refuses(register):
    whole = type('Whole', (Method,), {}); before = dict(methods), dict(cl_methods), dict(method_params)
    for make, says in ((lambda: register(whole), 'needs a name.*got the class Whole'), (lambda: register()(whole), 'needs a name'), (lambda: register('a b')(whole), 'needs a name'),
                       (lambda: register('toy')(dict), 'subclass of Method'), (lambda: register('toy', dict)(whole), 'BaseModel'),
                       (lambda: register('toy', Gamma)(whole), r"Parameter 'gamma' of method toy: Config has one of that name \(Factor of each drop\.\)\. Choose another, e\.g\. toy_gamma"),
                       (lambda: register('toy', Seed)(whole), "Parameter 'cutmix_alpha'"), (lambda: register('toy')(Mine), 'must take .cfg, student, teachers, params, '),
                       (lambda: register('toy')(type('Two', (Method,), dict(teachers_used='two'))), "'all', 'one' or 'none'"), (lambda: register('avgz')(whole), "'avgz' is the package's own; choose another name")):
        with pytest.raises(ConfigError, match=says): make()
    assert before == (methods, cl_methods, method_params)
    try:
        for _ in range(2): register('toy')(type('Whole', (Method,), {}))      # a cell that is run again
    finally: methods.pop('toy', None); cl_methods.pop('toy', None)

# --- a teacher's file -------------------------------------------------------------------------------------------------
def test_a_file_nobody_named(tiny, tmp_path, monkeypatch, capsys):
    "checkpoints/<type>_ft.pth of another network is passed over; the fitting one is used, and both are said"
    monkeypatch.chdir(tmp_path); (tmp_path/'checkpoints').mkdir()
    kw = tiny | dict(method='vanilla_kd', teacher_type='mlp', student_type='mlp', log_level='INFO', use_amp=0)
    f = tmp_path/'checkpoints'/'mlp_ft.pth'; torch.save(create_student('mlp', n_class=7, img_size=8).state_dict(), f)
    s = run_experiment(**kw, exp_id='a'); out = capsys.readouterr().out
    assert out.count('is passed over: Checkpoint') == 1 and s['weights']['teacher1']['source'] == 'finetuned'
    with pytest.raises(CheckpointError, match='does not fit'): run_experiment(**kw, exp_id='b', teacher_ckpt=str(f))
    f.unlink(); run_finetune(**{k: v for k, v in kw.items() if k not in ('method', 'compare')}); capsys.readouterr()
    s = run_experiment(**kw, exp_id='c'); out = capsys.readouterr().out
    assert s['weights']['teacher1']['file'] == 'mlp_ft.pth' and 'finetune_epochs=1 is skipped because of it (move the file away' in out and 'another split' not in out
    run_experiment(**kw, exp_id='d', seed=7); assert 'was trained on another split of these images' in capsys.readouterr().out
