"""MobileNetV2, ShuffleNetV1, ShuffleNetV2 and ResNet-50 of the CIFAR tables: a second implementation, written from the
formulas of their papers over the published names, gives the same logits; files of that layout load."""
import pytest
import torch
import torch.nn.functional as F

from asibkd.core.config import CheckpointError, resolve
from asibkd.models.identify import identify
from asibkd.models.students import create_student
from asibkd.models.teachers import create_teacher
from asibkd.models.zoo import create_zoo

K = 100

# The published layouts: name → shape, 100 classes

def bn(name, c): return {f'{name}.{k}': (c,) for k in ('weight', 'bias', 'running_mean', 'running_var')} | {f'{name}.num_batches_tracked': ()}

def conv(name, o, i, k=1): return {f'{name}.weight': (o, i, k, k)}

def linear(name, i): return {f'{name}.weight': (K, i), f'{name}.bias': (K,)}

MOBILE = ((1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1))    # expansion, channels, blocks; half width

def layout_mobilenetv2_half():
    out, i = conv('conv1.0', 16, 3, 3) | bn('conv1.1', 16), 16
    for s, (t, o, n) in enumerate(MOBILE):
        for b in range(n):
            p, w = f'blocks.{s}.{b}.conv', i*t
            out |= conv(f'{p}.0', w, i) | bn(f'{p}.1', w) | conv(f'{p}.3', w, 1, 3) | bn(f'{p}.4', w) | conv(f'{p}.6', o, w) | bn(f'{p}.7', o)
            i = o
    return out | conv('conv2.0', 1280, 160) | bn('conv2.1', 1280) | linear('classifier.0', 1280)

def layout_shufflenetv1():
    out, i = conv('conv1', 24, 3) | bn('bn1', 24), 24
    for s, (w, n) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
        for b in range(n):
            p, o = f'layer{s}.{b}', w if b else w - i
            m = o//4
            out |= conv(f'{p}.conv1', m, i if i == 24 else i//3) | bn(f'{p}.bn1', m) | conv(f'{p}.conv2', m, 1, 3) | bn(f'{p}.bn2', m) | conv(f'{p}.conv3', o, m//3) | bn(f'{p}.bn3', o)
            i = w
    return out | linear('linear', 960)

def layout_shufflenetv2():
    out, i = conv('conv1', 24, 3) | bn('bn1', 24), 24
    for s, (w, n) in enumerate(((116, 4), (232, 8), (464, 4)), 1):
        for b in range(n):
            p, h = f'layer{s}.{b}', w//2
            if b: out |= conv(f'{p}.conv1', h, h) | bn(f'{p}.bn1', h) | conv(f'{p}.conv2', h, 1, 3) | bn(f'{p}.bn2', h) | conv(f'{p}.conv3', h, h) | bn(f'{p}.bn3', h)
            else:
                out |= conv(f'{p}.conv1', i, 1, 3) | bn(f'{p}.bn1', i) | conv(f'{p}.conv2', h, i) | bn(f'{p}.bn2', h)
                out |= conv(f'{p}.conv3', h, i) | bn(f'{p}.bn3', h) | conv(f'{p}.conv4', h, 1, 3) | bn(f'{p}.bn4', h) | conv(f'{p}.conv5', h, h) | bn(f'{p}.bn5', h)
        i = w
    return out | conv('conv2', 1024, 464) | bn('bn2', 1024) | linear('linear', 1024)

def layout_resnet50():
    out, i = conv('conv1', 64, 3, 3) | bn('bn1', 64), 64
    for s, (w, n) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for b in range(n):
            p = f'layer{s}.{b}'
            out |= conv(f'{p}.conv1', w, i) | bn(f'{p}.bn1', w) | conv(f'{p}.conv2', w, w, 3) | bn(f'{p}.bn2', w) | conv(f'{p}.conv3', 4*w, w) | bn(f'{p}.bn3', 4*w)
            if b == 0: out |= conv(f'{p}.shortcut.0', 4*w, i) | bn(f'{p}.shortcut.1', 4*w)
            i = 4*w
    return out | linear('linear', 2048)

LAYOUTS = dict(mobilenetv2_half=layout_mobilenetv2_half, shufflenetv1=layout_shufflenetv1, shufflenetv2=layout_shufflenetv2, resnet50=layout_resnet50)

def weights(name, dtype=torch.float32):
    "Synthetic weights of the published layout; their scale keeps the signal alive"
    g = torch.Generator().manual_seed(0)
    def make(k, s):
        if not s: return torch.tensor(3)
        if k.endswith('running_var'): return torch.rand(s, generator=g, dtype=dtype) + .5
        if len(s) == 1: return torch.randn(s, generator=g, dtype=dtype)*.1 + k.endswith('weight')
        return torch.randn(s, generator=g, dtype=dtype)*(2/torch.tensor(s[1:]).prod())**.5
    return {k: make(k, s) for k, s in LAYOUTS[name]().items()}

# The papers' formulas

class Net:
    "Layers by name, each written out"
    def __init__(self, w): self.w = w
    def conv(self, x, name, stride=1, groups=1):
        w = self.w[f'{name}.weight']
        k = w.shape[-1]
        cols = F.unfold(x, k, padding=k//2, stride=stride)                  # (B, C k², L): convolution as a product of matrices
        b, side, c = len(x), (x.shape[-1] - 1)//stride + 1, x.shape[1]//groups
        parts = [torch.einsum('oi,bil->bol', w.flatten(1)[g*len(w)//groups:(g + 1)*len(w)//groups], cols[:, g*c*k*k:(g + 1)*c*k*k]) for g in range(groups)]
        return torch.cat(parts, 1).reshape(b, len(w), side, side)
    def depthwise(self, x, name, stride=1):
        w, x = self.w[f'{name}.weight'], F.pad(x, (1, 1, 1, 1))
        n = (x.shape[-1] - 3)//stride + 1
        at = lambda d: slice(d, d + (n - 1)*stride + 1, stride)
        return sum(w[:, 0, i, j][:, None, None]*x[:, :, at(i), at(j)] for i in range(3) for j in range(3))
    def bn(self, x, name):
        mean, var, a, b = (self.w[f'{name}.{k}'][:, None, None] for k in ('running_mean', 'running_var', 'weight', 'bias'))
        return a*(x - mean)/(var + 1e-5).sqrt() + b
    def head(self, x, name): return x.mean((2, 3)) @ self.w[f'{name}.weight'].T + self.w[f'{name}.bias']

relu = lambda x: x*(x > 0)

def shuffled(x, g):
    "Zhang et al., fig. 1: (g, n) channels, transposed"
    n = x.shape[1]//g
    return torch.stack([x[:, k*n + i] for i in range(n) for k in range(g)], 1)

def mobilenetv2_half(x, w):
    n = Net(w)
    x = relu(n.bn(n.conv(x, 'conv1.0', 2), 'conv1.1'))
    for s, ((t, o, blocks), stride) in enumerate(zip(MOBILE, (1, 1, 2, 2, 1, 2, 1))):
        for b in range(blocks):
            p = f'blocks.{s}.{b}.conv'
            y = relu(n.bn(n.conv(x, f'{p}.0'), f'{p}.1'))
            y = relu(n.bn(n.depthwise(y, f'{p}.3', 1 if b else stride), f'{p}.4'))
            y = n.bn(n.conv(y, f'{p}.6'), f'{p}.7')                        # linear bottleneck
            x = y + x if b else y                                          # the first block of every stage changes the shape
    return n.head(relu(n.bn(n.conv(x, 'conv2.0'), 'conv2.1')), 'classifier.0')

def mean_of_nine(x):
    "3×3 average with stride 2; the border's zeros count"
    x = F.pad(x, (1, 1, 1, 1))
    n = (x.shape[-1] - 3)//2 + 1
    at = lambda d: slice(d, d + 2*n - 1, 2)
    return sum(x[:, :, at(i), at(j)] for i in range(3) for j in range(3))/9

def shufflenetv1(x, w):
    n = Net(w)
    x = relu(n.bn(n.conv(x, 'conv1'), 'bn1'))
    for s, units in enumerate((4, 8, 4), 1):
        for b in range(units):
            p, g = f'layer{s}.{b}', 1 if (s, b) == (1, 0) else 3
            y = shuffled(relu(n.bn(n.conv(x, f'{p}.conv1', groups=g), f'{p}.bn1')), g)
            y = relu(n.bn(n.depthwise(y, f'{p}.conv2', 1 if b else 2), f'{p}.bn2'))
            y = n.bn(n.conv(y, f'{p}.conv3', groups=3), f'{p}.bn3')
            x = relu(x + y) if b else relu(torch.cat([y, mean_of_nine(x)], 1))
    return n.head(x, 'linear')

def shufflenetv2(x, w):
    n = Net(w)
    x = relu(n.bn(n.conv(x, 'conv1'), 'bn1'))
    for s, units in enumerate((4, 8, 4), 1):
        for b in range(units):
            p = f'layer{s}.{b}'
            if b:
                h = x.shape[1]//2
                y = relu(n.bn(n.conv(x[:, h:], f'{p}.conv1'), f'{p}.bn1'))
                y = n.bn(n.depthwise(y, f'{p}.conv2'), f'{p}.bn2')
                left, right = x[:, :h], relu(n.bn(n.conv(y, f'{p}.conv3'), f'{p}.bn3'))
            else:
                left = n.bn(n.depthwise(x, f'{p}.conv1', 2), f'{p}.bn1')
                left = relu(n.bn(n.conv(left, f'{p}.conv2'), f'{p}.bn2'))
                y = relu(n.bn(n.conv(x, f'{p}.conv3'), f'{p}.bn3'))
                right = relu(n.bn(n.conv(n.bn(n.depthwise(y, f'{p}.conv4', 2), f'{p}.bn4'), f'{p}.conv5'), f'{p}.bn5'))
            x = shuffled(torch.cat([left, right], 1), 2)
    return n.head(relu(n.bn(n.conv(x, 'conv2'), 'bn2')), 'linear')

def resnet50(x, w):
    n = Net(w)
    x = relu(n.bn(n.conv(x, 'conv1'), 'bn1'))
    for s, units in enumerate((3, 4, 6, 3), 1):
        for b in range(units):
            p, stride = f'layer{s}.{b}', 2 if s > 1 and b == 0 else 1
            y = relu(n.bn(n.conv(x, f'{p}.conv1'), f'{p}.bn1'))
            y = relu(n.bn(n.conv(y, f'{p}.conv2', stride), f'{p}.bn2'))
            y = n.bn(n.conv(y, f'{p}.conv3'), f'{p}.bn3')
            x = relu(y + (x if b else n.bn(n.conv(x[:, :, ::stride, ::stride], f'{p}.shortcut.0'), f'{p}.shortcut.1')))
    return n.head(x, 'linear')

FORWARD = dict(mobilenetv2_half=mobilenetv2_half, shufflenetv1=shufflenetv1, shufflenetv2=shufflenetv2, resnet50=resnet50)

@pytest.fixture(params=LAYOUTS)
def published(request, tmp_path):
    "A file as the two repositories save it"
    f = tmp_path/'ckpt_epoch_240.pth'
    w = weights(request.param)
    torch.save(dict(epoch=240, model=w, best_acc=torch.tensor(79.3)), f)
    return request.param, w, f

def test_published_files_load_and_give_the_published_logits(published):
    name, w, f = published
    net = create_teacher(name, n_class=K, small_input=True, ckpt=f).eval().double()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = FORWARD[name](x, {k: v.double() if v.is_floating_point() else v for k, v in w.items()})
    with torch.no_grad(): ours = net(x)['logit']
    assert theirs.std() > .01 and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('name, found', [('shufflenetv1', ('shufflenetv1', K, False)), ('resnet50', ('timm:resnet50', K, True))])
def test_files_are_recognised(name, found, tmp_path):
    torch.save(dict(model=weights(name)), f := tmp_path/'ckpt_epoch_240.pth')
    assert identify(f) == found

@pytest.mark.parametrize('name', [n for n in LAYOUTS if n != 'resnet50'])
def test_names_and_shapes(name):
    with torch.device('meta'): ours = create_zoo(name, K).state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == LAYOUTS[name]()

def test_another_network_is_still_refused(tmp_path):
    torch.save(weights('resnet50'), f := tmp_path/'r50.pth')
    with pytest.raises(CheckpointError, match='another architecture'): create_teacher('resnet18', n_class=K, small_input=True, ckpt=f)

@pytest.mark.parametrize('name', [n for n in LAYOUTS if n != 'resnet50'])
def test_a_student_learns_and_starts_as_its_authors_start_it(name):
    "Gradients everywhere; MobileNetV2: N(0, 2/(k² c_out)) for convolutions"
    torch.manual_seed(0)
    net = create_student(name, n_class=10, img_size=32, in_chans=1).train()
    F.cross_entropy(net(torch.randn(4, 1, 32, 32))['logit'], torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    if name == 'mobilenetv2_half':
        w = net.model.blocks[6][0].conv[6].weight
        assert abs(w.std()/(2/len(w))**.5 - 1) < .05 and not net.model.classifier[0].bias.any()

@pytest.mark.parametrize('student, lr', [('shufflenetv1', .01), ('mobilenetv2_half', .01), ('resnet8x4', .05)])
def test_light_students_have_a_smaller_learning_rate(student, lr):
    assert resolve(preset='schedule/cifar_240', student_type=student)[0].student_lr == lr
    assert resolve(preset='schedule/cifar_240_light', student_type=student)[0].student_lr == .01
