"Hidden representations of all layers are pooled, each number once"

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, TfmdDL
from torch import nn
from torch.nn import functional as F

from fastprune.all import cifar_resnet, digits_convnet, digits_dls
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

XY = [(torch.randn(64, generator=torch.Generator().manual_seed(i)), torch.tensor(i % 4)) for i in range(40)]


def make(model, bs=8):
    torch.manual_seed(0)
    return Learner(DataLoaders(*[DataLoader(XY, bs=bs)] * 2), model, loss_func=CrossEntropyLossFlat())


class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act, self.a, self.b = act, nn.Linear(64, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


ACTS = [
    F.relu,
    torch.relu,
    torch.Tensor.relu,
    lambda x: x.clone().relu_(),
    lambda x: F.relu(x.clone(), inplace=True),
    F.gelu,
    F.silu,
    torch.tanh,
    lambda x: x.sigmoid(),
    F.elu,
    F.leaky_relu,
    F.hardswish,
    F.relu6,
    F.softplus,
    F.logsigmoid,
    F.mish,
    F.selu,
    F.tanhshrink,
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.GELU('tanh'),
    nn.SiLU(),
    nn.Mish(),
    nn.PReLU(),
    nn.Hardswish(),
    nn.LogSigmoid(),
]


@pytest.mark.parametrize('act', ACTS, ids=lambda a: getattr(a, '__name__', str(a)))
def test_each_activation_once(act, device):
    learn = make(Net(act))
    h = learn.gradient_histogram(n_batches=2)
    x = torch.stack([x for x, _ in XY[:16]]).to(device)
    with torch.no_grad():
        want = act(learn.model.a(x)).flatten()
    assert len(h.hidden) == 2 * 8 * 6 and np.allclose(np.sort(h.hidden), want.cpu().sort()[0], atol=1e-6)


def test_a_layer_of_several_functions_counts_by_its_output(device):
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    learn = make(Net(Swish()))
    h, x = learn.gradient_histogram(n_batches=1), torch.stack([x for x, _ in XY[:8]]).to(device)
    assert np.allclose(np.sort(h.hidden), F.silu(learn.model.a(x)).detach().cpu().flatten().sort()[0], atol=1e-6)


@pytest.mark.parametrize('n_values', [100, 1000, 100_000])
def test_all_layers_in_proportion(n_values):
    "The shares of three layers whose outputs are 0, 1 and 2"

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(64, 4)

        def forward(self, x):
            for k, n in enumerate((30, 600, 10)):
                F.relu(torch.full((len(x), n), float(k)))
            return self.l(x)

    h = make(Three()).gradient_histogram(n_batches=3, n_values=n_values)
    assert len(h.hidden) == 3 * min(n_values, 8 * 640)
    shares = np.array([np.mean(h.hidden == k) for k in range(3)])
    assert np.allclose(shares, np.array([30, 600, 10]) / 640, atol=0.5 / n_values * 2)


def test_small_batches_weigh_less():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(64, 4)

        def forward(self, x):
            F.relu(torch.full((len(x), 50), float(len(x))))
            return self.l(x)

    h = make(Constant(), bs=32).gradient_histogram(n_batches=None, n_values=200)
    assert np.mean(h.hidden == 8) == pytest.approx(8 / 40, abs=0.01) and set(h.hidden) == {8, 32}


def test_all_of_a_residual_network():
    learn = Learner(TfmdDLs(), cifar_resnet(20), loss_func=CrossEntropyLossFlat())
    h = learn.gradient_histogram(n_batches=1, n_values=10**6)
    sizes = [16 * 32 * 32] * 7 + [32 * 16 * 16] * 6 + [64 * 8 * 8] * 6
    assert len(sizes) == 19 and len(h.hidden) == 4 * sum(sizes) and (h.hidden >= 0).all()


def TfmdDLs():
    dl = TfmdDL([(torch.randn(3, 32, 32), torch.tensor(i)) for i in range(8)], bs=4, num_workers=0)
    return DataLoaders(dl, dl)


def test_what_the_loss_computes_is_not_hidden():
    learn = make(nn.Sequential(nn.Linear(64, 4)))
    learn.loss_func = lambda out, y: F.binary_cross_entropy(torch.sigmoid(out), F.one_hot(y, 4).float())
    h = learn.gradient_histogram(n_batches=1)
    assert len(h.hidden) == 0 and len(h.gradients) == 256
    assert h.plot()[1].get_title() == 'no activations'


def test_recurrent_layers_and_attention():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.a, self.o = (
                nn.GRU(8, 5, batch_first=True),
                nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
                nn.Linear(5, 4),
            )

        def forward(self, x):
            return self.o(self.r(self.a(x.view(-1, 8, 8)))[0][:, -1])

    h = make(Text()).gradient_histogram(n_batches=1)
    assert len(h.hidden) == 8 * 8 * (12 + 5)


def test_same_numbers_again_and_nothing_else_changes():
    learn = Learner(digits_dls(), digits_convnet(), loss_func=CrossEntropyLossFlat())
    seed_round(learn, 0)
    rng = torch.get_rng_state()
    a, b = (learn.gradient_histogram(n_batches=2, n_values=500) for _ in range(2))
    assert (
        np.array_equal(a.hidden, b.hidden)
        and np.array_equal(a.gradients, b.gradients)
        and torch.equal(rng, torch.get_rng_state())
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    with pytest.raises(ValueError, match='n_values=0'):
        learn.gradient_histogram(n_values=0)
