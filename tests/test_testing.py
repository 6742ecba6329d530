"`check_method` finds what is broken, and says which promise it breaks"

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastprune.all import Masks, RigL, SparseMethod, SparsifyCallback
from fastprune.testing import CHECKS, check_method


class Inexact(SparseMethod):
    "Keeps a few weights more than it may"

    def new_masks(self, scores, sparsity, present):
        masks = super().new_masks(scores, sparsity, present)
        name, mask = next(iter(masks.items()))
        mask = mask.clone()
        mask.view(-1)[(~mask).flatten().nonzero()[:5]] = True
        return Masks({**masks, name: mask})


class Alive(SparseMethod):
    "Pruned weights come back between the steps"

    def epoch_end(self):
        for p in self.engine.weights.values():
            p.data.add_(0.1)


class Forgotten(SparseMethod):
    "Prunes by an average of magnitudes that no checkpoint keeps"

    def initial_masks(self, weights):
        self.mean = {n: p.detach().abs() for n, p in weights.items()}

    def scores(self, weights):
        for n, p in weights.items():
            self.mean[n].lerp_(p.detach().abs(), 0.1)
        return self.mean


class Kept(Forgotten):
    "The same, but it is declared"

    lasting = dict(mean=dict[str, torch.Tensor])


class TouchedOptimizer(SparseMethod):
    "Leaves a parameter of its own in the optimizer"

    def initial_masks(self, weights):
        self.engine.optimizer.groups[0].append(nn.Parameter(torch.zeros(1)))


class ChangedModel(SparseMethod):
    "Leaves a buffer in the model"

    def initial_masks(self, weights):
        self.engine.model.register_buffer('mask', torch.ones(1))


class ChangedClass(SparseMethod):
    "Makes the model one of another class"

    def initial_masks(self, weights):
        self.engine.model.__class__ = type('Sparse', (type(self.engine.model),), {})


class NoCancel(SparseMethod):
    "Gives the optimizer a parameter for each step, and takes it away after the step alone"

    def before_step(self, weights):
        self.engine.optimizer.groups[0].append(nn.Parameter(torch.zeros(1)))

    def after_step(self, weights):
        self.engine.optimizer.groups[0].pop()
        super().after_step(weights)


class Eager(SparsifyCallback):
    "Prunes while the Learner is frozen"

    def before_train(self):
        if self.learn.opt.frozen_idx:
            self.learn.prune(0.5)
        super().before_train()


class AnySparsity(SparsifyCallback):
    "Takes every sparsity"

    def __init__(self, sparsity, **kwargs):
        super().__init__(sparsity if sparsity in (0.8, 0.5) else 0.5, **kwargs)


broken = [
    (Inexact, 'exact_end', 'the sparsity is not exact'),
    (Alive, 'exact_end', 'weights of .* that `learn.masks` prunes are not zero'),
    (Forgotten, 'resumption', 'is there state not in `lasting`'),
    (TouchedOptimizer, 'exact_end', "the optimizer has 1 parameters that are not the model's"),
    (ChangedModel, 'exact_end', "the names in the model's state_dict have changed"),
    (ChangedClass, 'exact_end', 'the class of the model has changed to Sparse'),
    (NoCancel, 'interruption', "the optimizer has 1 parameters that are not the model's"),
    (Eager, 'standing_aside', 'a frozen Learner is pruned'),
    (AnySparsity, 'bad_input', 'sparsity=90 is not refused'),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize('method, check, message', broken, ids=lambda o: getattr(o, '__name__', None))
def test_a_broken_method_fails_by_its_check(method, check, message):
    with pytest.raises(AssertionError, match=f'(?s)^{check}: .*{message}'):
        check_method(method, checks=check)


def test_the_first_check_that_fails_is_named():
    with pytest.raises(AssertionError, match='^exact_end: '):
        check_method(Inexact)


def test_what_is_declared_lasts():
    check_method(Kept, checks='resumption')


def test_functions_that_make_methods_and_other_sparsities_pass():
    check_method(partial(RigL, interval=5), 0.5, checks=['exact_end'])


def test_random_numbers_go_on_as_before():
    def drawn():
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    drawn()
    expected = torch.rand(1), np.random.rand(), random.random()
    drawn()
    check_method(SparsifyCallback, checks='bad_input')
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_what_cannot_be_checked_is_an_error():
    with pytest.raises(ValueError, match="'exact' is unknown: use some of exact_end"):
        check_method(RigL, checks='exact')
    with pytest.raises(ValueError, match='needs a class'):
        check_method(RigL(0.9))
    assert {check for _, check, _ in broken} <= CHECKS.keys()
