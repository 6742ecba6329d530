"FLOPs of layers of all kinds go to their weights"

import pytest
import torch
from fastai.basics import DataLoader, DataLoaders, F, Learner, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from fastprune.all import SparsifyCallback as SparsifyCallback  # adds learn.prune and learn.flops
from fastprune.core.channel_cost import FlopCount, plain_operations


def learner(model, x):
    dl = DataLoader([(o, 0) for o in x], bs=len(x))
    return Learner(DataLoaders(dl, dl), model, loss_func=F.cross_entropy)


def test_attention_has_the_products_of_its_heads():
    "On each device: a CPU has an operation of its own for them, which torch's counter doesn't know"
    table = learner(nn.TransformerEncoderLayer(64, 4, batch_first=True), torch.randn(2, 10, 64)).flops()
    assert table.dense['other'] == 4 * 10 * 10 * 64
    q = torch.randn(2, 4, 10, 16)
    with torch.inference_mode(), plain_operations(), FlopCount() as counted:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        F.linear(q, q[0, 0])
    assert counted.flops == {'other': 4 * 2 * 4 * 10 * 10 * 16 + 2 * 2 * 4 * 10 * 10 * 16}


def test_a_layer_in_inference_mode():
    model = nn.Linear(4, 8)
    with torch.inference_mode(), plain_operations(), FlopCount({'w': model.weight}, model) as counted:
        model(torch.randn(3, 4))
    assert counted.flops == {'w': 2 * 3 * 4 * 8}


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_a_bilinear_layer(context):
    model = nn.Bilinear(4, 5, 6)
    with context(), plain_operations(), FlopCount({'w': model.weight}, model) as counted:
        model(torch.randn(3, 7, 4), torch.randn(3, 7, 5))
    assert counted.flops == {'w': 2 * 3 * 7 * 4 * 5 * 6}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((10, 1), 2.0))

    def forward(self, w):
        return w * self.scale * torch.tensor(2.0)


class Standardized(nn.Linear):
    def forward(self, x):
        w = self.weight.reshape(1, len(self.weight), -1)
        return F.linear(x, (w / w.std(-1, keepdim=True)).view_as(self.weight), self.bias)


@pytest.mark.parametrize(
    'compute',
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: register_parametrization(m, 'weight', Scaled()) or m,
        lambda m: Standardized(64, 10),
    ],
    ids=['weight_norm', 'spectral_norm', 'old_weight_norm', 'old_spectral_norm', 'scale', 'standardized'],
)
@pytest.mark.filterwarnings('ignore')
def test_computed_weights(compute):
    "The zeros of a weight save its FLOPs, whatever it is multiplied by before"
    learn = learner(nn.Sequential(nn.Flatten(), compute(nn.Linear(64, 10))), torch.randn(2, 1, 8, 8))
    learn.prune(0.9)
    table = learn.flops()
    assert len(table) == 3 and table.dense.iloc[0] == 2 * 64 * 10
    assert table.speedup.iloc[0] == pytest.approx(10, rel=0.02)


class Adds(nn.Module):
    "What is computed with an input is no weight, though as large as one, or in memory that a constant had"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.eye(4)), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        held = self.a * 1
        held.copy_(x + self.a)
        return self.b(torch.cat([(x + self.a) @ x, held @ x]))


def test_values_are_no_weights():
    model, x = Adds(), torch.randn(4, 4)
    with torch.no_grad(), FlopCount(dict(model.named_parameters()), model) as counted:
        model(x)
    assert counted.flops == {'other': 2 * 2 * 64, 'b.weight': 2 * 128}


def test_weights_in_one_storage():
    "As `vector_to_parameters` and recurrent layers on a GPU place them"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    table = learner(model, torch.randn(2, 1, 8, 8)).flops()
    assert table.dense.tolist() == [2 * 64 * 32, 2 * 32 * 10, 0, 2 * (64 * 32 + 32 * 10)]


def test_recurrent_layers():
    model = nn.LSTM(8, 16, batch_first=True)
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    with torch.no_grad(), plain_operations(), FlopCount(weights, model) as counted:
        model(torch.randn(1, 5, 8))
    assert counted.flops == {'weight_ih_l0': 2 * 5 * 8 * 64, 'weight_hh_l0': 2 * 5 * 16 * 64}


def test_tensors_without_a_storage():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer('graph', torch.eye(3).to_sparse())
    with torch.no_grad(), FlopCount({'w': model.weight}, model) as counted:
        torch.sparse.mm(model.graph, model(torch.randn(3, 4)))
    assert counted.flops['w'] == 2 * 3 * 4 * 4
