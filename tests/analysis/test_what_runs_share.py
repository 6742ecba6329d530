"What the runs of an analysis start from is each run's own, and what they are measured by is told apart"

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from helpers import quietly
from torch import nn
from torch.nn import functional as F

from fastprune.all import Ticket, digits_convnet, digits_dls, paper_methods, swap_table, sweep
from fastprune.learner.evaluate import batch_chunks
from fastprune.learner.states import smaller_is_better
from fastprune.recipes.tickets import Tickets


def make(seed=0, model=None, metrics=accuracy):
    set_seed(seed, reproducible=True)
    model = model or digits_convnet(widths=(4, 8))
    dls = digits_dls(bs=64, valid_pct=0.1, test_pct=0.7)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=metrics)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(64, 16), nn.Linear(16, 10)
        self.mix = nn.Parameter(0.3 * torch.randn(16, 16, dtype=torch.cfloat))

    def forward(self, x):
        return self.leave((self.enter(x.flatten(1)).relu().to(torch.cfloat) @ self.mix).abs())


@pytest.fixture
def spectral():
    "Three Learners with complex weights"
    learners = []
    for seed in range(3):
        set_seed(seed)
        learners.append(make(seed, Spectral()))
    return learners


def test_paths_and_planes_of_complex_weights(spectral):
    a, b, c = spectral
    with a.no_bar(), b.no_bar():
        ends = [float(o.validate()[0]) for o in (a, b)]
    path = quietly(a, a.linear_path, a, b, n=3)
    assert [path.losses[0], path.losses[-1]] == pytest.approx(ends, rel=1e-5)
    drawn = quietly(a, a.plane, a, b, c, n=2, margin=0.0)
    squares = [(x - y).abs().pow(2).sum() for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True)]
    assert drawn.points[1][0] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)


def test_fresh_complex_weights_have_both_parts(spectral):
    learn = spectral[0]
    (start, *_) = found = quietly(learn, learn.find_tickets, 1, lambda learn, cbs: learn.fit(1, 1e-2, cbs=cbs))
    old, new = (t.state['mix'] for t in (start, found[1].reinit(0)))
    assert new.dtype == old.dtype and new.shape == old.shape
    for part in ('real', 'imag'):
        stds = [float(getattr(t, part).std()) for t in (old, new)]
        assert stds[1] == pytest.approx(stds[0], rel=0.2)


def test_each_run_of_a_swap_table_has_a_state_of_its_own():
    starts, source = [], make()
    source.prune(0.3)

    def fit(masks, state, seed):
        starts.append({n: t.clone() for n, t in state.items()})
        for o in (*state.values(), *masks.values()):
            o.zero_()
        return 0.5

    swap_table({'m': source.masks}, {'s': source}, fit, seeds=(0, 1), bar=False)
    assert all(torch.equal(a, b) for a, b in zip(starts[0].values(), starts[1].values(), strict=True))


@pytest.mark.parametrize('argument', ['dl', 'test_dl'])
def test_a_generator_is_no_loader(argument):
    learn = make()
    batches, fit = (b for b in learn.dls.valid), lambda learn, cbs: learn.fit(1, 1e-2, cbs=cbs)
    with pytest.raises(ValueError, match=f'{argument}: a generator is no DataLoader'):
        if argument == 'dl':
            learn.linear_path(learn, learn, n=2, dl=batches)
        else:
            learn.find_tickets(1, fit, test_dl=batches)
    assert len(list(batches)) == len(learn.dls.valid)


@pytest.mark.parametrize('name', ['cross_entropy', 'binary_cross_entropy', 'gaussian_nll', 'kl_div', 'brier_score'])
def test_losses_by_other_names(name):
    assert smaller_is_better(name) and not smaller_is_better('accuracy') and not smaller_is_better('f1_score')


def test_the_errors_of_a_path_by_a_loss_as_metric():
    a, b = make(0, metrics=F.cross_entropy), make(1, metrics=F.cross_entropy)
    path = quietly(a, a.linear_path, a, b, n=3)
    assert np.allclose(path.errors, path.losses, rtol=1e-4)


@pytest.mark.parametrize('what', ['Learner', 'model'])
def test_a_sweep_needs_new_networks(what):
    learn = make()
    one = lambda seed: learn if what == 'Learner' else make(seed, learn.model)
    with pytest.raises(RuntimeError, match='returned the model of an earlier run: needs a new Learner, with a new'):
        sweep(one, {'m': lambda learn, s, seed: learn.prune(s)}, [0.3], [0, 1], bar=False)


def named(name):
    def metric(out, y):
        return accuracy(out, y)

    metric.__name__ = name
    return metric


@pytest.mark.parametrize('name', ['seconds', 'reached', 'sparsity'])
def test_a_metric_may_not_be_a_column_of_a_sweep(name):
    methods = {'m': lambda learn, s, seed: pytest.fail('it ran')}
    with pytest.raises(RuntimeError, match=f"metrics: '{name}' is a column of the table already"):
        sweep(lambda seed: make(seed, metrics=named(name)), methods, [0.3], [0], bar=False)


@pytest.mark.parametrize('name', ['weights', 'sparsity', 'max_lr'])
def test_a_metric_may_not_be_a_column_of_rounds(name):
    learn = make(metrics=named(name))
    with pytest.raises(ValueError, match=f"metrics: '{name}' is a column of the table already"):
        learn.iterative_prune(1, 1, lr=1e-2)
    with pytest.raises(ValueError, match=f"metrics: '{name}' is a column of the table already"):
        learn.find_tickets(1, lambda learn, cbs: learn.fit(1, 1e-2, cbs=cbs))


def test_memory_counts_tensors_wherever_they_are():
    x, y = torch.zeros(16, 1, 8, 8), torch.zeros(16).long()
    for batch in ((x, y), ({'pixels': x}, y), ([x], {'y': y})):
        assert [len(o) for o in batch_chunks([batch] * 5, 2 * 16 * (64 * 4 + 8), torch.device('cpu'))] == [2, 2, 1]


def test_names_of_methods_may_come_from_a_generator():
    assert list(paper_methods(4, 1e-3, names=(n for n in ['agp', 'ocp']))) == ['agp', 'ocp']


def test_tickets_made_by_hand_are_drawn():
    state = dict(digits_convnet(widths=(4, 8)).state_dict())
    found = Tickets([Ticket(state, {}, metrics={'accuracy': a}) for a in (0.5, 0.6)])
    assert list(found.df['round']) == [0, 1] and len(found.plot().lines) >= 1
