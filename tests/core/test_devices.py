"Devices without float64, and devices whose numbers take a while to read"

import copy

import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat
from helpers import quietly
from modes import forbid_float64, forbid_reads
from torch import nn

from fastprune.all import GSM, SignFlips, allr_discount, compute_masks, prunable_weights, synflow, taylor
from fastprune.core.devices import pretend
from fastprune.core.later import Checks, delayed_checks
from fastprune.core.scopes import lamp
from fastprune.criteria.flows import wanda
from fastprune.criteria.gradients import grasp, snip
from fastprune.criteria.ranking import ranked
from fastprune.criteria.weights import random_score
from fastprune.recipes.ticket import weight_distributions
from fastprune.zoo.learners import digits_learner
from fastprune.zoo.models import digits_convnet


def moved(learn):
    "The state of a Learner's model, and the same with other weights"
    a = learn.model.state_dict()
    return copy.deepcopy(a), {n: t + 0.1 if t.is_floating_point() else t for n, t in a.items()}


def scores_of(criterion, **kwargs):
    return lambda learn: criterion(prunable_weights(learn.model), learn, **kwargs)


def pruned(*args, **kwargs):
    def f(learn):
        learn.prune(*args, **kwargs)
        return {**learn.masks, 'change': torch.tensor(learn.keep_masks.change)}

    return f


def hard_end(learn):
    cb = GSM(0.8)
    quietly(learn, learn.fit, 1, 1e-3, cbs=cb)
    return torch.tensor(cb.hard.values.tolist())


def discount(learn):
    a, b = moved(learn)
    return torch.tensor(allr_discount(a, b, 0.5))


def shrunk(learn):
    learn.prune(0.5, granularity='filter', exclude='*.1.*')
    learn.shrink()
    return {n: t.detach().clone() for n, t in learn.model.state_dict().items()}


WIDE = {
    'wanda': scores_of(wanda, n_batches=3),
    'synflow': scores_of(synflow),
    'learn.prune by synflow': pruned(0.9, synflow, 'global', iterations=3),
    'lamp': lambda learn: lamp({n: p.abs() for n, p in prunable_weights(learn.model).items()}),
    'scope lamp': pruned(0.8, scope='lamp'),
    'scope lamp, min_density': pruned(0.8, scope='lamp', min_density=0.05),
    'allr_discount': discount,
    'linear_path': lambda learn: torch.tensor(learn.linear_path(*moved(learn), n=3).losses),
    'plane': lambda learn: torch.tensor(learn.plane(*moved(learn), digits_convnet(widths=(8, 16, 16)), n=2).losses),
    'sensitivity': lambda learn: torch.tensor(learn.sensitivity([0.5], metric='loss').values),
    'hessian_spectrum': lambda learn: torch.tensor(learn.hessian_spectrum(1).copy()),
    'hard end': hard_end,
    'shrink': shrunk,
    'weight_distributions': lambda learn: torch.tensor(
        [o[:2] for o in weight_distributions(dict(learn.model.named_parameters())).values()]
    ),
}


def same_numbers(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(same_numbers(a[n], b[n]) for n in a)
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize('name', WIDE)
def test_no_float64_on_a_device_without_it(name, tmp_path):
    want = WIDE[name](digits_learner(tmp_path))
    learn = digits_learner(tmp_path)
    with forbid_float64():
        got = WIDE[name](learn)
    assert same_numbers(want, got)


def selecting(*args, **kwargs):
    "`compute_masks`, in which everything may be read"
    return compute_masks(*args, **kwargs)


def reads_of(steps, folder, monkeypatch, criterion=synflow, **kwargs):
    "What is read from the device in `learn.prune` with so many steps"
    monkeypatch.setattr('fastprune.training.prune.compute_masks', selecting)
    learn = digits_learner(folder)
    with forbid_reads(most=100, except_in=[selecting]) as reads:
        learn.prune(0.9, criterion, 'global', iterations=steps, **kwargs)
    return reads.found


@pytest.mark.parametrize('kwargs', [{}, dict(min_density=0.01), dict(recover=False)], ids=str)
def test_reads_only_at_the_end_of_all_steps(kwargs, tmp_path, monkeypatch):
    few, many = (reads_of(n, tmp_path, monkeypatch, **kwargs) for n in (2, 30))
    assert few == many, many
    print(many)
