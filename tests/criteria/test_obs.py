"Optimal Brain Surgeon for each layer: numpy's scores for each kind of layer, and what it is for"

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from helpers import Conv1D
from torch import nn
from torch.nn import functional as F

from fastprune.all import CRITERIA, SparsifyCallback, obs, prunable_weights
from fastprune.core.protocol import as_batches
from fastprune.learner.batches import undisturbed


def learner(model, *shape, n=24):
    set_seed(0)
    items = [(torch.randn(*shape), torch.randint(0, 4, ())) for _ in range(n)]
    dls = DataLoaders.from_dsets(items, items, bs=8, device='cpu', num_workers=0)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat())


def inputs(learn, n):
    with undisturbed(learn):
        return torch.cat([b[0] for b in as_batches(learn).take(n)]).double()


LAYERS = {
    'linear': (lambda: nn.Linear(6, 4), (6,)),
    'in out': (lambda: Conv1D(6, 4), (6,)),
    'conv': (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 6, 6)),
    'groups': (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
}


@pytest.mark.parametrize('kind', LAYERS)
def test_scores_are_numpys(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    learn = learner(nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(4)), *shape)
    learn.model(learn.dls.one_batch()[0])
    x, groups = inputs(learn, 2), getattr(layer, 'groups', 1)
    found = obs({'w': layer.weight}, learn, 2, damping=0.05)['w']
    if len(shape) == 1:
        columns = x.T[None]
    else:
        columns = F.unfold(x, 3, padding=layer.padding, stride=layer.stride).unflatten(1, (groups, -1))
        columns = columns.permute(1, 2, 0, 3).flatten(2)
    weight = layer.weight.detach().double()
    rows = (weight.T if kind == 'in out' else weight).reshape(groups, -1, columns.shape[1]).numpy()
    want = []
    for row, c in zip(rows, columns.numpy(), strict=True):
        h = c @ c.T / c.shape[1]
        inverse = np.linalg.inv(h + 0.05 * np.diag(h).mean() * np.eye(len(h)))
        want.append(row**2 / np.diag(inverse))
    want = np.concatenate(want)
    want = want.T if kind == 'in out' else want.reshape(layer.weight.shape)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-5)


def test_it_is_the_error_that_is_left():
    "Without damping, the score is what the best other weights of the row can not make up for"
    torch.manual_seed(0)
    learn = learner(nn.Sequential(nn.Linear(5, 4)), 5)
    layer, x = learn.model[0], inputs(learn, 3).numpy()
    scores = obs({'w': layer.weight}, learn, 3, damping=1e-12)['w'].numpy()
    w = layer.weight.detach().double().numpy()
    for r, i in ((0, 0), (2, 3)):
        others = [j for j in range(5) if j != i]
        _, (left,), *_ = np.linalg.lstsq(x[:, others], x @ w[r], rcond=None)
        assert np.isclose(scores[r, i], left / len(x), rtol=1e-6)


def test_it_prunes_at_once_and_in_training():
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), 6)
    learn.prune(0.5, obs)
    assert learn.masks.sparsity == 0.5 and CRITERIA['obs'] is obs
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(0.75, criterion=obs))
    assert learn.masks.sparsity == 0.75


def test_dead_inputs_and_what_it_refuses():
    learn = learner(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4)), 6)
    with torch.no_grad():
        learn.model[0].bias.fill_(-100)
    weights = prunable_weights(learn.model)
    scores = obs(weights, learn)
    assert not scores['2.weight'].any() and scores['0.weight'].all()
    with pytest.raises(ValueError, match='damping=0: needs a number above 0'):
        obs(weights, learn, damping=0)
    with pytest.raises(ValueError, match="no input reaches 'idle'"):
        learn.model[1].idle = nn.Linear(2, 2)
        obs({'idle': learn.model[1].idle.weight}, learn)
    recurrent = learner(nn.Sequential(nn.LSTM(6, 4)), 3, 6)
    with pytest.raises(ValueError, match='and .0.weight_ih_l0. is of another kind: leave it out'):
        obs(prunable_weights(recurrent.model), recurrent)
