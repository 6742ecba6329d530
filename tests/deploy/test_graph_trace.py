"Traced models give the same, for other sizes too, and what can't be traced stays as it was"

import copy
import pickle

import pytest
import torch
from torch import nn

from fastprune.all import compute_masks, prunable_weights
from fastprune.deploy.fold import fold_batchnorm
from fastprune.deploy.graph_ops import Op, run_ops
from fastprune.deploy.graph_run import Segment
from fastprune.deploy.graph_trace import trace_graph
from fastprune.learner.inputs import as_inputs

pytestmark = pytest.mark.cpu_only  # segments are for the CPU


def traced(model, *sizes, pixels=64):
    "The traced model and the model that it was; inputs of [batch, pixels] are compared"
    weights = prunable_weights(model)
    compute_masks(weights, 0.9, absolute=True).apply_({n: p.data for n, p in weights.items()})
    model.eval().requires_grad_(False)
    x = torch.randn(1, 3, pixels, pixels)
    fold_batchnorm(model, as_inputs(x, model))
    before = copy.deepcopy(model.state_dict())
    res, why = trace_graph(model, as_inputs(x, model))
    assert why is None
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with torch.no_grad():
        for shape in (x.shape, *sizes):
            x = torch.randn(shape)
            torch.testing.assert_close(res(x), model(x), rtol=1e-4, atol=1e-5)
    return res


def segments(model):
    return [m for m in model.modules() if isinstance(m, Segment)]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'name', ['resnet18', 'mobilenet_v2', 'mobilenet_v3_large', 'squeezenet1_1', 'shufflenet_v2_x0_5']
)
def test_networks_of_torchvision(name):
    models = pytest.importorskip('torchvision').models
    res = traced(getattr(models, name)(), (3, 3, 64, 64), (1, 3, 96, 64))
    assert len(segments(res)) == (17 if name.startswith('shuffle') else 1)


def test_a_residual_network_is_fused():
    models = pytest.importorskip('torchvision').models
    (segment,) = segments(traced(models.resnet18()))
    kinds = [op.kind for op in segment.ops]
    assert kinds.count('conv') == 21 and sorted(set(kinds)) == ['conv', 'maxpool', 'mean'] and len(kinds) == 23
    assert sum(len(op.inputs) == 2 and op.act == 'clamp' for op in segment.ops) == 8


def test_a_traced_model_can_be_copied_and_pickled():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.Conv2d(8, 4, 1)
    )
    res, x = traced(net), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for other in (copy.deepcopy(res), pickle.loads(pickle.dumps(res))):
            assert torch.equal(other(x), res(x))
    assert len(segments(res)) == 2


class Squeeze(nn.Module):
    "Squeeze-excitation as it is often written"

    def __init__(self, keep_sizes):
        super().__init__()
        self.keep_sizes, self.conv, self.fc = (
            keep_sizes,
            nn.Conv2d(3, 8, 3),
            nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()),
        )

    def forward(self, x):
        x = self.conv(x)
        b, c, _, _ = x.size()
        y = self.fc(x.mean((2, 3)).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x) if self.keep_sizes else x * y


@pytest.mark.parametrize('keep_sizes', [False, True])
def test_squeeze_excitation_is_one_segment(keep_sizes):
    (segment,) = segments(traced(Squeeze(keep_sizes), (3, 3, 32, 48)))
    assert [op.kind for op in segment.ops] == ['conv', 'mean', 'conv', 'mul']


class Stateful(nn.Module):
    "What its forward pass does depends on values, a hook and what it changed in place"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, mask=None):
        y = self.a(x)
        if y.sum() > 1e9:
            return y
        before = self.b(y)
        return before + self.relu(y) + y if mask is None else mask


def test_children_of_what_cannot_be_traced():
    res = traced(Stateful(), (2, 3, 40, 40))
    assert isinstance(res, Stateful) and len(segments(res)) == 1


def test_modules_with_hooks_stay():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1))
    seen = []
    net[1][0].register_forward_hook(lambda *_: seen.append(1))
    res = traced(net)
    seen.clear()
    res(torch.randn(1, 3, 8, 8))
    assert seen == [1] and len(segments(res)) == 2


class InPlace(nn.Module):
    "Its shortcut is changed in place"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x, mask=None):
        y = self.a(x)
        return self.b(self.relu(y)) + y if mask is None else mask


def test_in_place_changes_reach_later_readers():
    res = traced(InPlace(), (2, 3, 8, 8))
    assert [(op.kind, len(op.inputs)) for op in segments(res)[0].ops] == [('conv', 1), ('conv', 2)]
    with pytest.raises(ValueError, match='mask=1: the model was made for mask=None'):
        res(torch.randn(1, 3, 8, 8), mask=1)


def test_flatten_of_an_image_of_one_pixel_stays():
    "At another size it is more than one pixel"
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).eval()
    assert traced(net, (2, 3, 10, 10), pixels=8)(torch.randn(1, 3, 9, 9)).shape == (1, 16)


class Layer(nn.TransformerEncoderLayer):
    "It may do something else"


def test_subclasses_of_transformers_are_left():
    model = nn.TransformerEncoder(Layer(16, 2, 32, batch_first=True), 1).eval()
    res, why = trace_graph(model, as_inputs(torch.randn(2, 5, 16), model))
    assert res is None and 'no part of the model' in why


def test_a_pool_over_everything():
    x = torch.randn(2, 3, 5, 7)
    (y,) = run_ops([Op('maxpool', 1, (0,))], [0], [1], [2], (x,))
    assert torch.equal(y, x.amax((2, 3)))
