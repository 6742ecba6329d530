"Fisher scores: exact gradients of single examples, as in validation"

from functools import partial

import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastai.callback.mixup import MixUp
from helpers import quietly
from torch import nn
from torch.nn import functional as F

from fastprune.all import SparsifyCallback, digits_dls, fisher, prunable_weights
from fastprune.learner.batches import undisturbed
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def make(model=None, dls=None, loss_func=None, **kwargs):
    torch.manual_seed(0)
    model = model or nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 10)
    )
    learn = Learner(dls or digits_dls(bs=32), model, loss_func=loss_func or CrossEntropyLossFlat(), **kwargs)
    seed_round(learn, 0)
    return learn


def by_hand(learn, n_batches, size):
    "A loop over groups of examples; leaves the next shuffle as it was"
    with undisturbed(learn):
        taken = [b for _, b in zip(range(n_batches), learn.dls.train, strict=False)]
    seed_round(learn, 0)
    learn.model.eval()
    ws = list(prunable_weights(learn.model).values())
    groups = [g for x, y in taken for g in zip(x.split(size), y.split(size), strict=True)]
    grads = [torch.autograd.grad(F.cross_entropy(learn.model(x), y), ws) for x, y in groups]
    learn.model.train()
    return [
        w.detach() ** 2 * torch.stack(g).square().mean(0) for w, g in zip(ws, zip(*grads, strict=True), strict=True)
    ]


@pytest.mark.sample(2)
@pytest.mark.parametrize('n_batches,size', [(1, 1), (2, 1), (2, 12)])
def test_a_loop_over_single_examples_by_hand(n_batches, size):
    learn = make(cbs=MixUp())  # training alone mixes images
    quietly(learn, learn.fit, 1, 1e-2)
    seed_round(learn, 0)
    want = by_hand(learn, n_batches, size)
    got = fisher(prunable_weights(learn.model), learn, n_batches, size)
    for s, w in zip(got.values(), want, strict=True):
        assert (s - w).abs().max() <= 1e-6 * w.max()
    assert learn.model.training


def test_groups_of_one_example_are_the_default_and_none_is_a_group_of_all():
    learn, scores = make(), []
    for kwargs in ({}, dict(group_size=1), dict(group_size=32), dict(group_size=None)):
        seed_round(learn, 0)
        scores.append(fisher(prunable_weights(learn.model), learn, **kwargs))
    one, same, all32, whole = scores
    assert all(torch.equal(one[n], same[n]) and torch.equal(all32[n], whole[n]) for n in one)
    assert all(all32[n].sum() < one[n].sum() for n in one)  # the mean's square is below the mean of squares


class Dicts(nn.Module):
    "A recurrent model with inputs by name, whose second weight only long texts reach"

    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.extra = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        h = self.rnn(x['a'])[0].mean(1)
        return self.head(h) + self.extra(h) if x['b'].any() else self.head(h)


def collate(items):
    x, y = zip(*items, strict=True)
    return {k: torch.stack([o[k] for o in x]) for k in 'ab'}, torch.tensor(y)


def test_any_layer_and_inputs_by_name():
    torch.manual_seed(0)
    items = [(dict(a=torch.randn(5, 3), b=torch.tensor([i % 2])), i % 2) for i in range(8)]
    dls = DataLoaders(*[DataLoader(items, bs=8, create_batch=collate)] * 2)
    learn = make(Dicts(), dls)
    weights = prunable_weights(learn.model)
    got, want = fisher(weights, learn), {n: torch.zeros_like(p) for n, p in weights.items()}
    learn.model.eval()
    for item in items:
        x, y = collate([item])
        grads = torch.autograd.grad(F.cross_entropy(learn.model(x), y), list(weights.values()), allow_unused=True)
        for n, g in zip(weights, grads, strict=True):
            want[n] += 0 if g is None else g**2 / 8
    assert {'rnn.weight_hh_l0', 'extra.weight'} <= set(got)
    for n, s in got.items():
        assert torch.allclose(s, want[n] * weights[n].detach() ** 2, rtol=1e-5, atol=1e-12)


def test_squares_of_small_gradients_do_not_underflow():
    learn = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half(), loss_func=lambda x, y: 1e-4 * x.float().sum())
    learn.dls.train.dataset.x = learn.dls.train.dataset.x.half()
    (score,) = fisher(prunable_weights(learn.model), learn).values()
    assert score.dtype == torch.float32 and (score > 0).sum() > 300


def test_in_steps_and_in_training(fit):
    learn = make()
    learn.prune(0.9, fisher, 'global', iterations=3)
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    learn.remove_masks()
    fit(learn, 1, cbs=SparsifyCallback(0.8, criterion=partial(fisher, group_size=8), interval=5))
    assert all(int((~m).sum()) == round(0.8 * m.numel()) for m in learn.masks.values())


class NoBatch(Callback):
    "Cancels all batches"

    def before_batch(self):
        raise CancelBatchException


def unequal():
    "Batches with a tensor for all examples"

    def batch(items):
        x, y = zip(*items, strict=True)
        return dict(x=torch.stack(x), shared=torch.ones(3)), torch.tensor(y)

    return DataLoaders(*[DataLoader([(torch.randn(8, 8), i % 10) for i in range(16)], bs=8, create_batch=batch)] * 2)


def test_bad_input():
    learn = make()
    weights = prunable_weights(learn.model)
    for kwargs, message in [
        (dict(group_size=0), 'group_size=0: needs a whole number of examples'),
        (dict(group_size=1.5), 'group_size=1.5: needs'),
        (dict(n_batches=0), 'n_batches=0: needs'),
    ]:
        with pytest.raises(ValueError, match=message):
            fisher(weights, learn, **kwargs)
    with pytest.raises(ValueError, match=r"lengths \[3, 8\]: use DataLoaders with bs=1"):
        fisher(weights, make(dls=unequal()))
    with pytest.raises(ValueError, match='fisher: the training DataLoader has no batches, or callbacks cancel them'):
        fisher(weights, make(cbs=NoBatch()))
    dead = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU()))
    dead.model[1].weight.data.zero_()
    dead.model[1].bias.data.fill_(-1)
    with pytest.raises(ValueError, match='fisher: all gradients are 0'):
        dead.prune(0.5, fisher)
    learn.model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="fisher needs gradients, and '0.weight' is frozen"):
        learn.prune(0.5, fisher)
