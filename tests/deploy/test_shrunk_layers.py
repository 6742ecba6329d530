"What is cut, or stays, where layers count channels in ways of their own; and what a shrunk network is told by"

import warnings

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner
from torch import nn
from torch.nn import functional as F

from fastprune.all import digits_dls, load_shrunk, save_shrunk
from fastprune.deploy.graph_ops import Op, run_ops
from fastprune.deploy.graph_run import Segment
from fastprune.deploy.headline import attempt
from fastprune.deploy.kernel import SparseConv

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures('seeded_and_without_gradients')]


def learner_of(*layers):
    "On digits; the first convolution has 8 channels"
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = Learner(digits_dls(valid_pct=0.1, test_pct=0.8), model, loss_func=CrossEntropyLossFlat())

    return learn


def shrunk(learn):
    "Half of the channels are cut; outputs stay"
    x = torch.rand(4, 1, 8, 8)
    learn.prune(0.5, granularity='channel')
    before = learn.model.eval()(x)
    learn.shrink(repeats=0)
    assert torch.allclose(learn.model.eval()(x), before, atol=1e-5)
    return learn.model


class Scaled(nn.Conv2d):
    "As timm's convolutions with standardised weights: a gain for each filter"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding)


class LowRank(nn.Conv2d):
    "Has more weights, which its rule does not know"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.a = nn.Parameter(torch.zeros(self.out_channels, 2))
        self.b = nn.Parameter(torch.rand(2, self.weight[0].numel()))

    def forward(self, x):
        return F.conv2d(x, self.weight + (self.a @ self.b).view_as(self.weight), self.bias, padding=self.padding)


class Halves(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a * b] * 8, 1)


def conv(n_in, n_out, **kwargs):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


@pytest.mark.parametrize(
    'layers,widths',
    [
        ((conv(1, 8), nn.GroupNorm(8, 8), nn.ReLU(), conv(8, 6), conv(6, 8)), (8, 3)),
        ((conv(1, 8), conv(8, 4, groups=4), conv(4, 8)), (4, 4)),
        ((conv(1, 8), conv(8, 2), Halves(), conv(8, 8)), (4, 2)),
        ((Scaled(1, 8, 3, padding=1), nn.ReLU(), conv(8, 8)), (4, 4)),
        ((LowRank(1, 8, 3, padding=1), nn.ReLU(), conv(8, 6), conv(6, 8)), (8, 3)),
        ((conv(1, 8), nn.InstanceNorm2d(8), nn.ReLU(), conv(8, 6), conv(6, 8)), (4, 3)),
    ],
    ids=['a group a channel', 'two inputs a filter', 'chunks of one', 'gains', 'more weights', 'no tensors'],
)
def test_layers_that_count_channels_in_their_own_way(layers, widths):
    learn = learner_of(*layers)
    model = shrunk(learn)
    assert tuple(m.out_channels for m in model if isinstance(m, nn.Conv2d))[:2] == widths


def test_a_norm_without_tensors_follows_more_than_once():
    learn = learner_of(conv(1, 8), nn.InstanceNorm2d(8), nn.ReLU(), conv(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        shrunk(learn)
        assert learn.model[1].num_features == learn.model[0].out_channels == 4
        shrunk(learn)
    assert learn.model[1].num_features == learn.model[0].out_channels == 2


class Counting(nn.Sequential):
    steps = 0

    def forward(self, x):
        self.steps = self.steps + 1
        return super().forward(x)


def test_what_a_module_counts_is_not_its_architecture(tmp_path):
    make = lambda: nn.Sequential(Counting(conv(1, 8), nn.ReLU()), conv(8, 8))
    learn = learner_of(*make())
    model = shrunk(learn)
    save_shrunk(learn, tmp_path / 'small')
    wide = lambda: learner_of(*make()).model
    x = torch.rand(2, 1, 8, 8)
    assert model[0].steps > 0 and torch.equal(load_shrunk(tmp_path / 'small', wide).eval()(x), model.eval()(x))


def test_a_loaded_network_is_known_to_be_shrunk(tmp_path):
    learn = learner_of(conv(1, 8), nn.ReLU(), conv(8, 8))
    wide = {n: t.clone() for n, t in learn.model.state_dict().items()}
    shrunk(learn)
    save_shrunk(learn, tmp_path / 'small')
    small = load_shrunk(tmp_path / 'small', lambda: learner_of(conv(1, 8), nn.ReLU(), conv(8, 8)).model)
    with pytest.raises(ValueError, match='was shrunk: load the file into a model made anew'):
        small.load_state_dict(wide)
    learn.model = small
    table = learn.compare(seconds=0)
    assert table.before.weights != table.after.weights
    with pytest.raises(ValueError, match="costs are not known, so compare with `dense`"):
        table.plot()


@pytest.mark.parametrize('size', [(9, 140), (5, 70), (4, 97)])
@pytest.mark.parametrize('n', [1, 3, 17])
def test_a_residual_is_not_sorted_for_the_layer_that_adds_it(size, n):
    "As in ResNets, whose residual is made before the strided convolution beside it, on images wider than 48"
    weight = lambda *shape: torch.randn(shape) * (torch.rand(shape) < 0.4)
    half = tuple(-(-s // 2) for s in size)
    ops = [
        Op('conv', 2, (1,), weight(4, 4, 3, 3), None, padding=(1, 1)),
        Op('conv', 3, (0, 2), weight(4, 4, 1, 1), None, stride=(2, 2), act='clamp', low=0.0),
    ]
    tensors = [torch.randn(n, 4, *size), torch.randn(n, 4, *half)]
    (want,) = run_ops(ops, [0, 1], [3], [4], tensors)
    assert torch.allclose(Segment(ops, [0, 1], [3], [4])(*tensors), want, atol=1e-4)


def test_no_kernel_for_volumes():
    with pytest.raises(ValueError, match='one or two dimensions, and the layer 3'):
        SparseConv(nn.Conv3d(2, 2, 3))


def test_any_error_of_what_is_measured_is_a_reason():
    def metric():
        raise KeyError('a metric of your own')

    assert 'a metric of your own' in attempt(metric).why
