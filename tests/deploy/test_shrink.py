"Filters of zeros, cut out: outputs stay the same, whatever the network does with the constants that they leave behind"

import copy
import random
import sys

import pytest
import torch
from fastai.basics import Callback, load_learner
from helpers import equal
from torch import nn
from torch.nn import functional as F

from fastprune.all import SparsifyCallback, digits_convnet, shrink
from fastprune.core.names import unwrap

pytest.importorskip('torch_pruning')

pytestmark = pytest.mark.cpu_only  # networks of timm and torchvision are made there, and followed layer by layer
layers = (nn.modules.conv._ConvNd, nn.Linear)


def disturb(model, zero=lambda n: True, frac=0.5, seed=0):
    "Norms and biases that make constants matter, filters of zeros in the layers that `zero` chooses; in eval mode"
    gen = torch.Generator().manual_seed(seed)
    rand = lambda t: torch.randn(t.shape, generator=gen).to(t)
    with torch.no_grad():
        for n, m in model.named_modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t, a, b in ((m.running_mean, 0.2, 0), (m.weight, 0.5, 1), (m.bias, 0.5, 0)):
                    t.copy_(a * rand(t) + b)
                m.running_var.copy_(0.5 + rand(m.running_var) ** 2)
            if isinstance(m, layers) and 'weight' in m._parameters:
                if m.bias is not None:
                    m.bias.copy_(0.3 * rand(m.bias))
                if zero(n):
                    w = m.weight.transpose(0, 1) if getattr(m, 'transposed', False) and m.groups == 1 else m.weight
                    w[torch.randperm(len(w), generator=gen)[: int(len(w) * frac)]] = 0
    return model.eval()


def flat(out):
    return (
        [out]
        if isinstance(out, torch.Tensor)
        else [t for o in (out.values() if isinstance(out, dict) else out) for t in flat(o)]
    )


def apart(a, b, *x):
    with torch.no_grad():
        return max(float((p - q).abs().max() / p.abs().max()) for p, q in zip(flat(a(*x)), flat(b(*x)), strict=True))


def check(model, *x, tol=1e-10):
    "The same outputs, on other inputs too; attributes that agree with shapes; gradients; the original as it was"
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    small, report = shrink(model, x, repeats=0)
    assert all(equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)) and modes == [
        m.training for m in model.modules()
    ] == [m.training for m in small.modules()]
    other = tuple(3 * torch.randn_like(t) + 0.5 if t.is_floating_point() else t.flip(0) for t in x)
    assert max(apart(model, small, *x), apart(model, small, *other)) < tol
    for a, b in zip(model.parameters(), small.parameters(), strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
    for m in small.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features) and min(m.weight.shape) > 0
        elif isinstance(m, nn.modules.conv._ConvNd):
            assert type(m).__name__.startswith(('Conv2dSame', 'StdConv')) or m.weight.shape[:2] == (
                (m.in_channels, m.out_channels // m.groups)
                if m.transposed
                else (m.out_channels, m.in_channels // m.groups)
            )
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert {m.num_features} == {len(t) for t in (m.weight, m.bias, m.running_mean, m.running_var)}
    sum(t.float().square().mean() for t in flat(small.train()(*(t.repeat_interleave(2, 0) for t in x)))).backward()
    rows = report.drop('total')
    assert (rows.filters_after >= 1).all() and report.loc['total'].weights_after == sum(
        p.numel() for p in small.parameters()
    )
    return small.eval(), report


def conv(i, o, k=3, **kw):
    return nn.Sequential(nn.Conv2d(i, o, k, **({'padding': k // 2} | kw)), nn.BatchNorm2d(o), nn.ReLU())


x2 = torch.randn(3, 3, 16, 12, generator=torch.Generator().manual_seed(0)).double()
kinds = {
    'bias folds into a linear layer after a flatten': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 7 * 5, 6)
        ),
        x2,
        '0',
        {'0': 4},
    ),
    'a linear layer without bias': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 14 * 10, 6, bias=False)
        ),
        x2,
        '0',
        {'0': 5},
    ),
    'zeros around the image': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 6, 3, padding=1)),
        x2,
        '0',
        {'0': 5},
    ),
    'no zeros around the image': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 6, 3)),
        x2,
        '0',
        {'0': 4},
    ),
    'mirrored around the image': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 6, 3, padding=1, padding_mode='reflect')),
        x2,
        '0',
        {'0': 4},
    ),
    'the same by name': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 6, 3, padding='same')),
        x2,
        '0',
        {'0': 5},
    ),
    'into a running mean': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)),
        x2,
        '0',
        {'0': 4},
    ),
    'not past an activation': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 6, 1, bias=False), nn.ReLU(True), nn.BatchNorm2d(6)
        ),
        x2,
        '0',
        {'0': 5},
    ),
    'zeros, not constants': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        x2,
        '0',
        {'0': 4},
    ),
    '1d': (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(80, 3)),
        torch.randn(3, 4, 12).double(),
        '0',
        {'0': 4},
    ),
    '3d': (
        lambda: nn.Sequential(
            nn.Conv3d(2, 8, 3, stride=2), nn.BatchNorm3d(8), nn.SiLU(), nn.Conv3d(8, 4, 3, padding=1)
        ),
        torch.randn(2, 2, 9, 7, 8).double(),
        '0',
        {'0': 5},
    ),
    'transposed': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.PReLU(),
            nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1),
            nn.InstanceNorm2d(12, affine=True),
            nn.SiLU(),
            nn.ConvTranspose2d(12, 4, 3),
        ),
        x2,
        '02',
        {'0': 5, '2': 12 - 6 + 1},
    ),
    'neurons': (
        lambda: nn.Sequential(
            nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3)
        ),
        torch.randn(4, 12).double(),
        '03',
        {'0': 10, '3': 5, '5': 3},
    ),
    'depthwise, zeros around': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 1),
        ),
        x2,
        '0',
        {'0': 8},
    ),
    'depthwise filters take what is before them': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 1),
        ),
        x2,
        '2',
        {'0': 4, '2': 4},
    ),
    'groups': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        x2,
        '01',
        {'0': 8, '1': 8},
    ),
    'GroupNorm mixes': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 3)),
        x2,
        '0',
        {'0': 8},
    ),
    'softmax mixes': (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 4, 3)), x2, '0', {'0': 8}),
    'pixels from channels': (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 4, 3)),
        x2,
        '0',
        {'0': 16},
    ),
    'outputs': (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), x2, '0', {'0': 8}),
    'a lone layer': (lambda: nn.Linear(4, 6), torch.randn(3, 4).double(), '', {'': 6}),
}


@pytest.mark.parametrize('kind', kinds)
def test_constants(kind):
    "In float64 to the last digits, and just as many filters as can go"
    make, x, zero, left = kinds[kind]
    torch.manual_seed(0)
    small, report = check(disturb(make().double(), lambda n: n in zero), x)
    assert report.filters_after[list(left)].to_dict() == left


class Net(nn.Module):
    "Layers a, b, ... by size, and a forward of its own"

    def __init__(self, run, **parts):
        super().__init__()
        for n, m in parts.items():
            setattr(self, n, m)
        self.run = run

    def forward(self, *x):
        return self.run(self, *x)


def test_all_that_are_added_have_to_be_zero():
    net = disturb(
        Net(
            lambda s, x: s.c((s.a(x) + s.b(x)).relu()), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 3), c=nn.Conv2d(8, 4, 3)
        ).double(),
        lambda n: False,
    )
    with torch.no_grad():
        net.a.weight[[0, 1, 2]], net.b.weight[[1, 2, 3]] = 0, 0
    small, report = check(net, x2)
    assert (
        small.a.out_channels == small.b.out_channels == small.c.in_channels == 6
        and report.why['a'] == '1: joined by what is not zero'
    )
    assert equal(small.a.weight, net.a.weight[[0, 3, 4, 5, 6, 7]])


def test_concatenation_with_itself_and_with_the_input():
    net = disturb(
        Net(
            lambda s, x: s.c(torch.cat([y := s.a(x).tanh(), s.b(x).relu(), y.relu(), x], 1)),
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(3, 6, 3, padding=1),
            c=nn.Conv2d(25, 4, 3),
        ).double(),
        lambda n: n in 'ab',
    )
    check(net, x2)
    net = disturb(
        Net(
            lambda s, x: s.c(torch.cat([y := s.a(x).tanh(), s.b(x).relu(), y.relu()], 1)),
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(3, 6, 3, padding=1),
            c=nn.Conv2d(22, 4, 3),
        ).double(),
        lambda n: n in 'ab',
    )
    small, report = check(net, x2)
    assert (small.a.out_channels, small.b.out_channels, small.c.in_channels) == (4, 3, 11)


def test_takers_that_see_different_constants():
    "One sees what the other's ReLU has set to zero: each has a carrier that is not"
    net = (
        Net(
            lambda s, x: s.b(y := s.a(x)) + s.c(y.relu()) + s.d((-y).relu()),
            a=nn.Conv2d(3, 8, 1),
            **{n: nn.Conv2d(8, 4, 3, padding=1) for n in 'bcd'},
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        net.a.weight[:6], net.a.bias[:6] = 0, torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -4.0])
    small, report = check(net, x2)
    assert small.a.out_channels == 4 and report.why['a'] == '2: carries constants'


def test_no_constant_by_chance():
    "A channel that is dead on the example is not dead for all data"
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    with torch.no_grad():
        net[0].bias[:4], net[0].weight[7] = -100, 0
    small, report = check(net, x2)
    assert small[0].out_channels == 7


@pytest.mark.parametrize(
    'why,run',
    {
        'outputs would change': lambda s, x: s.c(s.a(x).relu()[:, :8]),
        "part of the model's output": lambda s, x: s.a(x) * 2,
        'is not used just once': lambda s, x: s.c(s.a(x)[:, :8]) + s.c(s.a(x + 1)[:, :8]),
        'p goes along': lambda s, x: s.c((s.a(x) * s.p)[:, :8]),
    }.items(),
)
def test_what_stays(why, run):
    net = disturb(
        Net(run, a=nn.Conv2d(3, 16, 3), c=nn.Conv2d(8, 4, 3), p=nn.Parameter(torch.rand(16, 1, 1))).double(),
        lambda n: n == 'a',
    )
    small, report = shrink(net, x2, repeats=0)
    assert why in report.why['a'] and small.a.out_channels == 16


def test_features_that_are_outputs():
    net = disturb(
        Net(
            lambda s, x: {'f': (f := s.a(x)), 'y': [s.c(s.b(f.relu()).relu())]},
            a=nn.Conv2d(3, 8, 3),
            b=nn.Conv2d(8, 8, 3),
            c=nn.Conv2d(8, 4, 3),
        ).double(),
        lambda n: n in 'ab',
    )
    small, report = check(net, x2)
    assert small.a.out_channels == 8 and small.b.out_channels == 4 and 'outputs would change' in report.why['a']


def test_a_head_of_zeros_hides_nothing():
    "Outputs are equal whatever is cut: what layers get is compared, too"
    net = disturb(
        Net(
            lambda s, x: s.h(s.b(s.a(x)[:, 2:10].relu()).mean((2, 3))),
            a=nn.Conv2d(3, 12, 3),
            b=nn.Conv2d(8, 8, 3),
            h=nn.Linear(8, 3),
        ).double(),
        lambda n: n == 'a',
    )
    nn.init.zeros_(net.h.weight)
    small, report = shrink(net, x2, repeats=0)
    nn.init.ones_(net.h.weight)
    nn.init.ones_(small.h.weight)
    assert apart(net, small, x2) < 1e-10


def test_heads_for_training_alone():
    net = disturb(
        Net(
            lambda s, x: (
                (s.c(s.b(z := s.a(x).relu()).relu()), s.aux(z)) if s.training else s.c(s.b(s.a(x).relu()).relu())
            ),
            a=nn.Conv2d(3, 8, 3),
            b=nn.Conv2d(8, 8, 3),
            c=nn.Conv2d(8, 4, 3),
            aux=nn.Conv2d(8, 2, 3),
        ).double(),
        lambda n: n in 'ab',
    )
    small, report = shrink(net, x2, repeats=0)
    assert small.a.out_channels == 8 and small.b.out_channels == 4 and len(small.train()(x2)) == 2


def test_tied_and_reparametrised_weights_stay():
    net = Net(
        lambda s, x: s.o((s.a(x).relu() + s.b(x)).relu()) + s.w(s.v(x).relu()),
        a=nn.Linear(12, 6),
        b=nn.Linear(12, 6),
        o=nn.Linear(6, 3),
        v=nn.Linear(12, 6),
        w=nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
    )
    net.b.weight = net.a.weight
    small, report = check(disturb(net.double(), lambda n: n in 'av'), torch.randn(4, 12).double())
    assert small.a.weight is small.b.weight and 'tied' in report.why['a'] and 'reparametrised' in report.why['v']


def test_all_filters_are_zero():
    net = disturb(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double(),
        lambda n: n in '02',
        1.0,
    )
    small, report = check(net, x2)
    assert report.filters_after.tolist()[:3] == [1, 1, 4] and report.why['0'] == '1: a layer needs one'


def test_nothing_to_do():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).train()
    small, report = shrink(net, x2.float())
    assert (
        report.index.tolist() == ['total']
        and report.why['total'] == 'no filter is entirely zero, and no mask cuts a channel'
        and small is not net
        and small[1].training
    )
    assert report.loc['total'].ms > 0 and report.weights['total'] == report.weights_after['total'] == 112


def random_net(seed):
    "Blocks in a random order, with additions, concatenations, gates and separable convolutions"
    r = random.Random(seed)

    class Block(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.kind, self.out = r.choice(['plain', 'add', 'cat', 'gate', 'separable', 'transition']), c
            act = r.choice([nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish])
            one = lambda i, o, k=3: nn.Sequential(
                nn.Conv2d(
                    i,
                    o,
                    k,
                    padding=r.choice([0, k // 2]) if self.kind in ('plain', 'transition') else k // 2,
                    bias=r.random() < 0.5,
                    padding_mode=r.choice(['zeros', 'zeros', 'circular']),
                ),
                nn.BatchNorm2d(o),
                act(),
            )
            if self.kind == 'add':
                self.a, self.b = one(c, c), one(c, c, r.choice([1, 3]))
            elif self.kind == 'cat':
                self.a, self.out = one(c, 5), c + 5
            elif self.kind == 'gate':
                self.a, self.b, self.c = one(c, c), nn.Conv2d(c, 3, 1), nn.Conv2d(3, c, 1)
            elif self.kind == 'separable':
                self.a = nn.Sequential(
                    nn.BatchNorm2d(c),
                    act(),
                    nn.Conv2d(c, c, 3, padding=1, groups=c),
                    nn.BatchNorm2d(c),
                    nn.Conv2d(c, 8, 1, bias=False),
                    nn.BatchNorm2d(8),
                )
                self.out = 8
            else:
                self.a, self.out = one(c, 7), 7

        def forward(self, x):
            y = self.a(x)
            if self.kind == 'add':
                return y + self.b(x) if y.shape[-1] % 3 else F.relu(x + self.b(y))
            if self.kind == 'cat':
                return torch.cat([y, x] if y.shape[-1] % 2 else [x, y], 1)
            if self.kind == 'gate':
                return y * self.c(self.b(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
            return y

    blocks, c = [conv(3, 6)], 6
    for _ in range(5):
        blocks.append(Block(c))
        c = blocks[-1].out
    tail = (
        [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 10), nn.ReLU(), nn.Linear(10, 3)]
        if seed % 2
        else [nn.Conv2d(c, 3, 3, padding=1)]
    )
    return nn.Sequential(*blocks, *tail)


@pytest.mark.sample(2)
@pytest.mark.parametrize('seed', [pytest.param(s, marks=[pytest.mark.slow] * (s > 11)) for s in range(24)])
def test_random_networks(seed):
    torch.manual_seed(seed)
    r = random.Random(seed)
    net = disturb(random_net(seed).double(), lambda n: r.random() < 0.8, 0.6, seed)
    small, report = check(net, torch.randn(2, 3, 17, 16).double())
    assert not report.why.str.contains('outputs would change').any()
    again, report = check(small, torch.randn(2, 3, 17, 16).double())


def made(name):
    if name.startswith('timm'):
        net = pytest.importorskip('timm').create_model(name.split()[1], num_classes=5)
    else:
        models = pytest.importorskip('torchvision.models')
        if name == 'densenet':
            net = models.DenseNet(8, (3, 3, 3), 16, num_classes=5)
        else:
            kwargs = dict(init_weights=False) if name == 'vgg11_bn' else {}  # of 100 million weights
            net = getattr(models, name)(num_classes=5, **kwargs)
    for n, p in net.named_parameters():
        if 'layer_scale' in n:
            nn.init.normal_(p)
    return net


MOST = {
    'resnet18': 0.6,
    'mobilenet_v2': 0.3,
    'mobilenet_v3_small': 0.5,
    'vgg11_bn': 0.3,
    'densenet': 0.4,
    'squeezenet1_1': 0.3,
    'regnet_y_400mf': 1.0,
    'convnext_tiny': 0.6,
    'timm resnet26': 0.5,
    'timm efficientnet_b0': 0.6,
    'timm tf_mobilenetv3_small_minimal_100': 0.4,
}  # of its weights are left


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'name,most',
    [
        pytest.param(n, most, marks=[pytest.mark.slow] * (n in ('vgg11_bn', 'regnet_y_400mf')))
        for n, most in MOST.items()
    ],
)
def test_well_known_networks(name, most):
    torch.manual_seed(0)
    net = made(name)
    if name == 'vgg11_bn':
        net.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Linear(32, 5))
    last = [n for n, m in net.named_modules() if isinstance(m, layers)][-1]
    small, report = check(disturb(net, lambda n: n != last), torch.randn(2, 3, 64, 64), tol=1e-5)
    total = report.loc['total']
    assert total.weights_after < most * total.weights and total.MB_after < total.MB


def test_blocks_first_convolutions():
    "Half the filters of each block's first convolution: halved but for one that carries the constants"
    small, report = check(
        disturb(made('resnet18'), lambda n: n.endswith('conv1') and n != 'conv1'), torch.randn(2, 3, 64, 64), tol=1e-5
    )
    rows = report[report.why != '']
    assert (
        len(rows) == 8
        and (rows.filters_after == rows.filters // 2 + 1).all()
        and (rows.why == '1: carries constants').all()
    )


def test_what_can_not_be_followed():
    net = disturb(made('shufflenet_v2_x1_0'))
    with pytest.raises(ValueError, match="ShuffleNetV2 can't be followed by Torch-Pruning"):
        shrink(net, torch.randn(2, 3, 64, 64))

    class Broken(nn.Linear):
        def forward(self, x):
            if x.isnan().any():
                raise RuntimeError('NaN')
            return super().forward(x)

    with pytest.raises(ValueError, match="can't be followed"):
        shrink(disturb(nn.Sequential(Broken(3, 4), nn.Linear(4, 2))), torch.randn(2, 3))
    noisy = Net(lambda s, x: s.b(s.a(x)) + random.random(), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with pytest.raises(ValueError, match='does not give the same outputs twice'):
        shrink(disturb(noisy), torch.randn(2, 3))
    dropped = Net(lambda s, x: s.b(F.dropout(s.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert shrink(disturb(dropped), torch.randn(2, 3))[0].a.out_features >= 2


def test_integers_and_several_inputs():
    net = Net(
        lambda s, i, x: s.c(torch.cat([s.e(i).mean(1), s.b(x)], 1).relu()),
        e=nn.Embedding(9, 4),
        b=nn.Linear(5, 8),
        c=nn.Linear(12, 3),
    ).double()
    small, report = check(disturb(net, lambda n: n == 'b'), torch.randint(0, 9, (4, 6)), torch.randn(4, 5).double())
    assert small.c.in_features == 8


def test_attention(learner):
    "What is inside of attention stays, the neurons of the layers between don't have to"
    small, report = check(
        disturb(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2).double()),
        torch.randn(3, 5, 16).double(),
    )
    assert report.filters_after.tolist() == [16, 16, 16] * 2 + [96]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    net = disturb(
        nn.Sequential(conv(3, 8), conv(8, 8), nn.Flatten(), nn.Linear(8 * 8 * 8, 3)).to(dtype), lambda n: n != '3'
    )
    small, report = shrink(net, torch.randn(4, 3, 8, 8, dtype=dtype), repeats=0)
    assert small[0][0].weight.dtype == dtype and small[0][0].out_channels == 5 and small[1][0].out_channels == 4


def test_modes_gradients_and_random_numbers():
    net = disturb(nn.Sequential(conv(3, 8), nn.Dropout(), conv(8, 8), nn.Conv2d(8, 3, 1)), lambda n: n != '3')
    net[1].train()
    net[0][0].weight.requires_grad_(False)
    state = torch.get_rng_state()
    small, report = shrink(net, torch.randn(2, 3, 8, 8, generator=torch.Generator()), repeats=2)
    assert torch.equal(state, torch.get_rng_state()) and small[1].training and not small[0].training
    assert (
        not small[0][0].weight.requires_grad and small[2][0].weight.requires_grad and small[0][0].weight.shape[0] == 5
    )
    assert all(p.grad is None for p in net.parameters()) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in [*net.modules(), *small.modules()]
    )


def test_errors(learner, monkeypatch):
    net = nn.Sequential(nn.Linear(4, 3))
    for wrong, match in (
        (dict(example='x'), 'example=str'),
        (dict(example=torch.ones(2, 5)), "can't take the example"),
        (dict(tol=0), 'tol=0'),
        (dict(tol=2), 'tol=2'),
        (dict(repeats=-1), 'repeats=-1'),
        (dict(repeats=1.5), 'repeats=1.5'),
    ):
        with pytest.raises(ValueError, match=match):
            shrink(net, **{'example': torch.ones(2, 4)} | wrong)
    with pytest.raises(ValueError, match='n_items=0'):
        learner().shrink(n_items=0)
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(ImportError, match=r'fastprune\[shrink\]'):
        shrink(net, torch.ones(2, 4))


def convnet():
    return nn.Sequential(
        digits_convnet(widths=(8, 16, 16))[:3],
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 30),
        nn.BatchNorm1d(30),
        nn.ReLU(),
        nn.Linear(30, 10),
    )


def test_learner(learner, fit, tmp_path):
    "Shrink, train on, export, save"
    learn = learner(convnet())
    fit(learn, 2, cbs=SparsifyCallback(0.5, granularity='filter', exclude=['3', '6']))
    learn.prune({'3': 0.3}, granularity='row')
    with learn.no_bar(), learn.no_logging():
        before = learn.get_preds()[0]
    model, state = learn.model, torch.get_rng_state()
    report = learn.shrink(repeats=1)
    assert learn.model is model and torch.equal(state, torch.get_rng_state()) and learn.opt is None
    with learn.no_bar(), learn.no_logging():
        assert torch.allclose(before, learn.get_preds()[0], atol=1e-5)
    assert (
        [m.weight.shape[0] for m in model.modules() if isinstance(m, layers)]
        == report.filters_after.tolist()[:-1]
        == [5, 9, 8, 21, 10]
    )
    held = learn.masks.copy()
    assert {n: m.shape for n, m in held.items()} == {n: p.shape for n, p in model.named_parameters() if n in held}
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(learn, 1)
    assert (
        learn.masks == held
        and all((p[~held[n]] == 0).all() for n, p in model.named_parameters() if n in held)
        and not torch.equal(old['6.weight'], model[6].weight)
    )
    learn.save_sparse(tmp_path / 'small')
    learn.export('small.pkl')
    x, _ = learn.dls.one_batch()
    assert equal(load_learner(tmp_path / 'small.pkl').model(x), model.eval()(x))
    fit(learn, 1, cbs=SparsifyCallback(0.8))
    assert learn.masks.sparsity == pytest.approx(0.8, abs=1e-3)


def test_masks_of_what_carries_constants(learner, fit):
    "Weights that a mask prunes take constants over, and are kept from then on; masks of other tensors are as they were"
    learn = learner(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=True),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 10),
        )
    )
    a, c = learn.model[0], learn.model[2]
    first, second = torch.ones_like(a.weight, dtype=torch.bool), torch.ones_like(c.weight, dtype=torch.bool)
    first[:3] = False
    second[:, 1] = False
    with torch.no_grad():
        a.bias[:3] = torch.tensor([0.5, 2.0, 1.0])
    learn.masks = {'0.weight': first, '2.weight': second}
    with learn.no_bar():
        before = learn.get_preds()[0]
    learn.shrink(repeats=0)
    assert (
        a.out_channels == 4
        and learn.masks['2.weight'].all()
        and learn.masks['0.weight'].flatten(1).all(1).tolist() == [False, True, True, True]
    )
    with learn.no_bar():
        assert torch.allclose(before, learn.get_preds()[0], atol=1e-5)
    fit(learn, 1)
    assert (a.weight[0] == 0).all() and learn.masks['0.weight'].shape == a.weight.shape


@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda m: torch.compile(m, backend='eager')])
def test_wrapped_models_and_frozen_learners(learner, fit, wrap):
    learn = learner()
    learn.prune({'1.0.weight': 0.5}, granularity='filter')
    learn.model = wrap(learn.model)
    learn.shrink(repeats=0)
    assert learn.model is not unwrap(learn.model) and unwrap(learn.model)[1][0].out_channels == 9
    learn = learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.prune({'1.0.weight': 0.5}, granularity='filter')
    learn.freeze()
    learn.shrink(repeats=0)
    assert learn.opt.frozen_idx == 1 and not learn.model[1][0].weight.requires_grad
    fit(learn, 1)


def test_not_during_a_fit(learner, fit):
    class Shrinks(Callback):
        def after_step(self):
            self.learn.shrink()

    with pytest.raises(ValueError, match='a fit is running'):
        fit(learner(), 1, cbs=Shrinks())
