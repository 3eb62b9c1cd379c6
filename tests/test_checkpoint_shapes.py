"Published checkpoints in every usual shape: prefix × container × company. They are chosen by fit, never by running code"
import argparse, collections, datetime, itertools, logging, os
from pathlib import Path

import numpy as np
import pytest
import torch

from asibkd.core.config import CheckpointError
from asibkd.models.checkpoints import load_into, load_weights
from asibkd.models.kdmodel import KDModel, add_adapter
from asibkd.models.teachers import create_teacher
from asibkd.models.zoo import create_zoo

PREFIXES = ('', 'module.', '_orig_mod.', 'backbone.', 'net.', 'student.', 'module._orig_mod.', '_orig_mod.module.model.',
            'module.student.', 'model.net.backbone.')
CONTAINERS = ('', 'model', 'state_dict', 'state_dict_ema', 'model_ema', 'params', 'net', 'teacher', 'ema.shadow',
              'ckpt.0.weights')


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return create_zoo('resnet8', 10)


def company(i, state):
    "What trainers save beside weights"
    optimizer = dict(state={0: dict(step=3, momentum_buffer=torch.ones(4))}, param_groups=[dict(lr=.1, params=[0])])
    return (dict(), dict(epoch=240, best_acc=np.float64(.74), optimizer=optimizer),
            dict(args=argparse.Namespace(lr=.1, data=Path('data'), seen={1, 2}), scheduler=dict(last_epoch=3)),
            dict(log=collections.defaultdict(list, loss=[1., 2.]), curve=np.arange(3.), when=datetime.datetime(2026, 1, 2)),
            dict(rng=torch.get_rng_state(), history=collections.deque([1, 2]), np_rng=np.random.RandomState(0).get_state()))[i]


def extras(i):
    "Entries among the weights that are none"
    return ({}, {'n_averaged': torch.tensor(3)}, {'layer1.total_ops': torch.zeros(1), 'total_params': torch.zeros(1)},
            {'criterion.weight': torch.ones(10)}, {})[i]


def wrap(state, container, beside):
    "{'a': {'b': state}} for 'a.b', with company on the outer level"
    if not container: return {**state, **beside}
    for key in reversed(container.split('.')): state = [state] if key == '0' else {key: state}
    return {**state, **beside}


SHAPES = [(p, c, i) for k, (p, c) in enumerate(itertools.product(PREFIXES, CONTAINERS)) for i in [k % 5]
          if (k // 10 + k) % 2 == 0]


def same(model, net):
    return all(torch.equal(v, w) for v, w in zip(getattr(model, 'model', model).state_dict().values(), net.state_dict().values()))


def test_B2_there_are_fifty_shapes():
    assert len(SHAPES) == 50 and {p for p, _, _ in SHAPES} == set(PREFIXES) and {c for _, c, _ in SHAPES} == set(CONTAINERS)


@pytest.mark.parametrize('prefix,container,i', SHAPES, ids=lambda o: str(o) or '-')
def test_B2_published_shape(prefix, container, i, net, tmp_path):
    state = {prefix + k: v for k, v in net.state_dict().items()}
    inside = {prefix + k if k != 'n_averaged' else k: v for k, v in extras(i).items()}
    as_numpy = i == 3 and prefix == '_orig_mod.'
    if as_numpy: state = {k: v.numpy() for k, v in state.items()}
    torch.save(wrap(state | inside, container, company(i, state)), tmp_path/'a.pth')
    bare = create_zoo('resnet8', 10)
    assert same(load_into(KDModel(bare) if i % 2 else bare, load_weights(tmp_path/'a.pth'), 'a.pth'), net)


def test_B2_three_wrong_ones_name_the_first_names_of_both_sides(net, tmp_path):
    for name, wrong, ours, theirs in (
            ('depth', create_zoo('resnet14', 10), 'nothing', 'layer1.1.conv1.weight, layer1.1.bn1.weight'),
            ('family', create_zoo('vgg8', 10), 'conv1.weight, bn1.weight', 'block0.0.weight, block0.0.bias'),
            ('part', torch.nn.Sequential(collections.OrderedDict(conv1=net.conv1, bn1=net.bn1)),
             'layer1.0.conv1.weight, layer1.0.bn1.weight', 'nothing')):
        torch.save({'state_dict': {f'module.{k}': v for k, v in wrong.state_dict().items()}}, tmp_path/f'{name}.pth')
        target = KDModel(create_zoo('resnet8', 10), name='resnet8')
        before = {k: v.clone() for k, v in target.state_dict().items()}
        with pytest.raises(CheckpointError, match='another architecture') as e:
            load_into(target, load_weights(tmp_path/f'{name}.pth'), f'{name}.pth')
        assert f'only in the model: {ours}' in str(e.value), e.value
        assert 'only in the checkpoint: ' in str(e.value) and theirs in str(e.value).partition('only in the checkpoint')[2], e.value
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_B2_student_and_teacher_in_one_dict(net, tmp_path):
    "A deeper network of the same names is not cut down to the shallow one"
    deep = create_zoo('resnet14', 10).state_dict()
    both = {f'teacher.{k}': v for k, v in deep.items()} | {f'student.{k}': v for k, v in net.state_dict().items()}
    torch.save({'state_dict': both}, tmp_path/'both.pth')
    assert same(load_into(KDModel(create_zoo('resnet8', 10)), load_weights(tmp_path/'both.pth')), net)
    assert torch.equal(load_into(create_zoo('resnet14', 10), load_weights(tmp_path/'both.pth')).fc.weight, deep['fc.weight'])
    torch.save({'teacher': deep}, tmp_path/'deep.pth')
    with pytest.raises(CheckpointError, match='only in the checkpoint: .*layer1.1'):
        load_into(create_zoo('resnet8', 10), load_weights(tmp_path/'deep.pth'))


def test_B2_head_under_another_prefix(net, tmp_path):
    state = {('head.' if k.startswith('fc') else 'backbone.') + k: v for k, v in net.state_dict().items()}
    torch.save(state | {'neck.proj.weight': torch.ones(3)}, tmp_path/'a.pth')
    assert same(load_into(KDModel(create_zoo('resnet8', 10)), load_weights(tmp_path/'a.pth')), net)


def test_B2_what_is_chosen_and_left_out_is_logged(net, tmp_path, caplog):
    other = create_zoo('resnet8', 10).state_dict()
    torch.save({'state_dict': net.state_dict(), 'state_dict_ema': other}, tmp_path/'two.pth')
    with caplog.at_level(logging.INFO, 'asibkd'):
        assert same(load_into(create_zoo('resnet8', 10), load_weights(tmp_path/'two.pth'), 'two.pth'), net)
    assert "'two.pth': took the weights under 'state_dict'; it also holds state_dict_ema" in caplog.text
    torch.save({f'student.{k}': v for k, v in net.state_dict().items()} | {'projector.weight': torch.ones(2)}, tmp_path/'p.pth')
    caplog.clear()
    with caplog.at_level(logging.INFO, 'asibkd'): load_into(create_zoo('resnet8', 10), load_weights(tmp_path/'p.pth'), 'p.pth')
    assert "'p.pth': 1 tensors outside the network are left out (projector.weight)" in caplog.text


def test_B2_parts_of_a_network_in_dicts_of_their_own(net, tmp_path):
    parts = collections.defaultdict(dict)
    for k, v in net.state_dict().items(): parts[k.partition('.')[0]][k.partition('.')[2]] = v
    torch.save(dict(parts), tmp_path/'parts.pth')
    assert same(load_into(create_zoo('resnet8', 10), load_weights(tmp_path/'parts.pth')), net)


def test_B2_half_precision_and_adapter(net, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, tmp_path/'half.pth')
    t = load_into(KDModel(create_zoo('resnet8', 10)), load_weights(tmp_path/'half.pth'))
    assert t.model.fc.weight.dtype is torch.float32 and torch.allclose(t.model.fc.weight, net.fc.weight, atol=1e-3)
    own = add_adapter(KDModel(net), out=4)
    torch.save({'model': {f'_orig_mod.{k}': v for k, v in own.state_dict().items()}}, tmp_path/'own.pth')
    t = load_into(add_adapter(KDModel(create_zoo('resnet8', 10)), out=4), load_weights(tmp_path/'own.pth'))
    assert torch.equal(t.adapter[0].weight, own.adapter[0].weight) and same(t, net)
    with pytest.raises(CheckpointError, match='use_distillation_adapter=1'):
        load_into(KDModel(create_zoo('resnet8', 10)), load_weights(tmp_path/'own.pth'))


class Bomb:
    def __init__(self, fn, *args): self.call = fn, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize('fn,args', [(os.system, ('touch pwned',)), (eval, ("open('pwned', 'w')",)), (os.mkdir, ('pwned',)),
                                     (getattr, ('a', 'upper')), (exec, ("import os; os.mkdir('pwned')",))], ids=lambda o: getattr(o, '__name__', ''))
def test_B2_code_in_a_pickle_never_runs(fn, args, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': net.state_dict(), 'args': argparse.Namespace(x=Bomb(fn, *args))}, 'bomb.pth')
    with pytest.raises(CheckpointError, match='holds Python objects .*could run code, so it is refused'): load_weights('bomb.pth')
    assert not Path('pwned').exists()


@pytest.mark.filterwarnings('ignore')   # torch's own, about TorchScript
def test_B2_a_whole_model_and_a_scripted_one_are_refused(net, tmp_path):
    torch.save(net, tmp_path/'whole.pth')
    with pytest.raises(CheckpointError, match=r'could run code.*Save `model.state_dict\(\)` instead'): load_weights(tmp_path/'whole.pth')
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/'scripted.pt')
    with pytest.raises(CheckpointError, match='TorchScript archive'): load_weights(tmp_path/'scripted.pt')


def test_B2_a_flipped_bit_is_named(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'a.pth')
    raw = bytearray((tmp_path/'a.pth').read_bytes())
    at = raw.find(net.fc.weight.detach().numpy().tobytes())
    raw[at + 1] ^= 4
    (tmp_path/'a.pth').write_bytes(raw)
    with pytest.raises(CheckpointError, match='a.pth.* is damaged'): load_weights(tmp_path/'a.pth')


def test_B2_through_the_door_of_teachers(net, tmp_path):
    torch.save({'state_dict_ema': {f'module.{k}': v for k, v in net.state_dict().items()}, 'args': argparse.Namespace(a=1)}, tmp_path/'t.pth')
    assert same(create_teacher('resnet8', n_class=10, ckpt=tmp_path/'t.pth'), net)
