"GraSP as its authors run it: a balanced batch, and a temperature"

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MSELossFlat, before_batch_cb
from helpers import quietly
from torch import nn
from torch.nn import functional as F

from fastprune.all import SparsifyCallback, digits_dls, grasp, prunable_weights
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def make(items=None, loss=None, n_out=10, bs=64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, n_out)).double()
    if items is None:
        dls = digits_dls(bs=bs)
        for dl in dls:
            dl.dataset.x = dl.dataset.x.double()
    else:
        dls = DataLoaders(*[DataLoader(items, bs=16)] * 2)
    learn = Learner(dls, model, loss_func=loss or CrossEntropyLossFlat())
    seed_round(learn, 0)
    return learn


def scores(learn, *args, **kwargs):
    return torch.cat([s.flatten() for s in grasp(prunable_weights(learn.model), learn, *args, **kwargs).values()])


def by_hand(learn, bs, loss_func):
    weights = prunable_weights(learn.model)

    def loss(flat):
        parts = {
            n: p.view_as(w)
            for (n, w), p in zip(weights.items(), flat.split([w.numel() for w in weights.values()]), strict=True)
        }
        return sum(loss_func(torch.func.functional_call(learn.model, parts, (x,)), y) for x, y in bs)

    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    return flat * (torch.func.hessian(loss)(flat) @ torch.func.grad(loss)(flat))


def balanced(learn, per_class, size):
    "The first items of each class of the training batches, the classes in turns"
    found = {c: [] for c in range(10)}
    for x, y in learn.dls.train:
        for i, c in zip(x, y.tolist(), strict=True):
            found[c].append(i)
    seed_round(learn, 0)
    rows = [(found[c][j], c) for j in range(per_class) for c in range(10)]
    parts = [rows[k[0] : k[-1] + 1] for k in np.array_split(range(len(rows)), math.ceil(len(rows) / size))]
    return [(torch.stack([x for x, _ in part]), torch.tensor([c for _, c in part])) for part in parts]


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-9 * float(b.detach().abs().max()))


@pytest.mark.parametrize(
    'given,per_class,temperature',
    [
        ({}, 25, 200),
        (dict(temperature=1), 25, 1),
        (dict(per_class=3), 3, 200),
        (dict(per_class=4, temperature=50.0), 4, 50),
    ],
)
def test_balanced_batch_and_temperature_by_hand(given, per_class, temperature):
    learn = make()
    want = by_hand(learn, balanced(learn, per_class, 64), lambda out, y: F.cross_entropy(out / temperature, y))
    assert close(scores(learn, **given), want)


@pytest.mark.parametrize('loader', [DataLoader, partial(torch.utils.data.DataLoader, batch_size=16)])
def test_no_batch_is_much_smaller_than_another(loader):
    "33 items, for BatchNorm, which can't train on a single one"
    items = [(torch.randn(64), torch.tensor(i % 3)) for i in range(33)]
    bs = dict(bs=16) if loader is DataLoader else {}
    model = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    learn = Learner(DataLoaders(*[loader(items, **bs)] * 2), model, loss_func=CrossEntropyLossFlat())
    seen = []
    learn.add_cb(before_batch_cb(lambda self, xb, yb: seen.append(len(yb[0])) or (xb, yb)))
    assert scores(learn).isfinite().all()
    assert set(seen) == {11}


@pytest.mark.parametrize('given,temperature', [({}, 1), (dict(temperature=200), 200)])
def test_batches_as_they_are(given, temperature):
    learn = make()
    bs = [b for _, b in zip(range(2), learn.dls.train, strict=False)]
    seed_round(learn, 0)
    assert close(scores(learn, 2, **given), by_hand(learn, bs, lambda out, y: F.cross_entropy(out / temperature, y)))


def test_rare_classes_give_what_they_have():
    items = [(torch.randn(64).double(), torch.tensor(0 if i < 61 else 1)) for i in range(64)]
    learn = make(items, n_out=2)
    x, y = (torch.stack(o) for o in zip(*items, strict=True))
    rows = [0, 61, 1, 62, 2, 63, 3, 4]
    assert close(scores(learn, per_class=5, temperature=1), by_hand(learn, [(x[rows], y[rows])], F.cross_entropy))


@pytest.mark.parametrize(
    'y,loss,n_out',
    [
        (lambda i: torch.randn(4).double(), nn.MSELoss(), 4),
        (lambda i: torch.tensor(i), MSELossFlat(), 1),
        (lambda i: torch.rand(3).round().double(), nn.BCEWithLogitsLoss(), 3),
    ],
)
def test_targets_that_are_no_classes(y, loss, n_out):
    "One training batch, and predictions as they are"
    items = [(torch.randn(64).double(), y(i)) for i in range(64)]
    learn = make(items, loss, n_out)
    xs, ys = (torch.stack(o[:16]) for o in zip(*items, strict=True))
    assert close(scores(learn), by_hand(learn, [(xs, ys)], loss))
    with pytest.raises(ValueError, match='per_class=2: the targets of the training batches are not whole numbers'):
        scores(learn, per_class=2)


def test_same_masks_again_and_in_a_fit():
    masks = []
    for _ in range(2):
        learn = make()
        rng = torch.get_rng_state()
        learn.prune(0.5, criterion=partial(grasp, per_class=5), scope='global')
        assert torch.equal(rng, torch.get_rng_state())
        masks.append(learn.masks)
    assert masks[0] == masks[1]
    learn.prune(0.6, criterion=partial(grasp, temperature=10), n_batches=2, recover=False)
    quietly(learn, learn.fit, 1, 1e-2, cbs=SparsifyCallback(0.8, criterion=grasp, interval=10))
    assert learn.masks.sparsity == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    'kwargs,msg',
    [
        (dict(temperature=0), 'temperature=0: needs a positive number'),
        (dict(temperature='hot'), "temperature='hot'"),
        (dict(temperature=float('nan')), 'temperature=nan'),
        (dict(per_class=0), 'per_class=0'),
        (dict(per_class=2.5), 'per_class=2.5'),
        (dict(per_class=2, n_batches=1), 'give one of them'),
    ],
)
def test_wrong_values(kwargs, msg):
    learn = make()
    n = kwargs.pop('n_batches', None)
    with pytest.raises(ValueError, match=msg):
        learn.prune(0.5, criterion=partial(grasp, **kwargs), n_batches=n)
    assert learn.masks is None


def test_temperature_needs_logits():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Linear(64, 10)

        def forward(self, x):
            return self.m(x.flatten(1)), x

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = Learner(digits_dls(), Two(), loss_func=lambda out, y: F.cross_entropy(out[0], y))
    with pytest.raises(ValueError, match='use temperature=1'):
        learn.prune(0.5, criterion=grasp)
    learn.prune(0.5, criterion=partial(grasp, temperature=1))
