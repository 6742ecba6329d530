"Fits with any options can be resumed, and what was interrupted is not counted as finished"

from functools import partial

import pytest
import torch
from fastai.basics import Callback, OptimWrapper
from fastai.callback.all import ShortEpochCallback
from helpers import FEW, Crash, same, stopped
from torch import nn

from fastprune.all import (
    DST,
    STR,
    BudgetedCallback,
    Checkpoint,
    Sparsifier,
    SparsifyCallback,
    digits_convnet,
    linear,
    plot_schedules,
    wanda,
)
from fastprune.engine.method import Method

pytestmark = pytest.mark.usefixtures('deterministic')


def train(learn, *cbs, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 0.02, cbs=list(cbs), **kwargs)


@pytest.mark.sample(2)
@pytest.mark.filterwarnings('ignore:granularity=')
@pytest.mark.parametrize(
    'options, kwargs',
    [
        (dict(sparsity=0.5, granularity='2:4'), {}),
        (dict(flops=0.5, granularity='channel'), {}),
        (dict(sparsity=0.8), dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD))),
        (dict(sparsity=0.8), dict(opt_func=partial(OptimWrapper, opt=torch.optim.RMSprop))),
    ],
    ids=['layers left whole', 'flops', 'SGD whose momentum is scheduled', 'RMSprop'],
)
def test_resumes_to_the_bit(learner, options, kwargs):
    def make():
        torch.manual_seed(0)
        return learner(digits_convnet(widths=(8, 16, 16)), **FEW, **kwargs)

    assert same(*stopped(make, lambda learn, *cbs: train(learn, SparsifyCallback(**options), *cbs), epoch=1, i=3))


def test_thresholds_resume_where_torchs_momentum_is_scheduled(learner):
    def make():
        torch.manual_seed(0)
        sgd = partial(OptimWrapper, opt=torch.optim.SGD)
        return learner(digits_convnet(widths=(8, 16, 16)), opt_func=sgd, **FEW)

    def str_and(learn, *cbs):
        train(learn, STR(0.5, s_init=-5), *cbs)

    assert same(*stopped(make, str_and, epoch=1, i=3))


def test_a_checkpoint_that_has_seen_a_fit_says_how_to_repeat_the_call(learner):
    learn = learner(digits_convnet(widths=(8, 16, 16)), cbs=Checkpoint('run'), **FEW)
    train(learn)
    with pytest.raises(RuntimeError, match='power'):
        train(learn, Crash(1, 3))
    with pytest.raises(ValueError, match='has seen an earlier fit: .* make a new one'):
        train(learn, pct_start=0.5)


def test_the_same_call_again_resumes_with_a_checkpoint_of_the_learner(learner):
    def make(*cbs):
        torch.manual_seed(0)
        return learner(digits_convnet(widths=(8, 16, 16)), cbs=[SparsifyCallback(0.8), *cbs], **FEW)

    whole = make()
    train(whole)
    learn = make(Checkpoint('run'))
    for _ in range(2):
        with pytest.raises(RuntimeError, match='power'):
            train(learn, Crash(1, 3))
    train(learn)
    assert same(whole, learn)
    later = make(Checkpoint('run'))  # the same program once more: nothing is trained, and the end is loaded
    train(later, Crash(0, 0))
    states = [learn.model.state_dict() for learn in (whole, later)]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items()) and later.masks == whole.masks


def test_a_criterion_that_reads_no_gradients_ranks_after_a_short_epoch(learner):
    def by_place(weights, initial):
        return {n: torch.arange(p.numel(), dtype=torch.float32).view(p.shape) for n, p in weights.items()}

    learn = learner(**FEW)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[SparsifyCallback(0.9, criterion=by_place, interval=99), ShortEpochCallback(0.3)])
    for m in learn.masks.values():
        assert m.flatten()[-round(0.1 * m.numel()) :].all() and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    'args, says',
    [
        ((0.9, 0.5, -1, 0.1), 'cycles=-1: needs'),
        ((0.9, 0.5, 0, 0.1), 'cycles=0: needs'),
        ((0.9, 1.0, 2, 0.1), 'dense=1.0: needs'),
        ((0.0, 0.5, 2, 0.1), 'sparsity=0.0: needs'),
        ((0.9, 0.5, 2, -0.1), 'lr_max=-0.1: a learning rate is a positive number'),
        ((0.9, 0.5, 2, slice(1e-3, 1e-2)), 'lr_max=slice'),
    ],
)
def test_a_budget_checks_its_arguments(args, says):
    with pytest.raises(ValueError, match=says):
        BudgetedCallback(*args)
    assert BudgetedCallback(0.9, 0.5, 2, [1e-3, 1e-2]).lr_max.tolist() == [1e-3, 1e-2]


def test_thresholds_rest_with_their_layer():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.turn = nn.Linear(8, 8), nn.Linear(8, 8), 0

        def forward(self, x):
            return (self.a, self.b)[self.turn](x)

    torch.manual_seed(0)
    model = Either()
    opt, method = torch.optim.SGD(model.parameters(), lr=0.5), DST(alpha=0.1)
    sparsifier = Sparsifier(model, method, 8, opt)
    for t in range(4):
        model.turn = t % 2
        resting = 'ba'[t % 2] + '.weight'
        before = method.thresholds[resting].detach().clone()
        opt.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        sparsifier.step()
        assert torch.equal(method.thresholds[resting], before)


def test_wanda_sums_the_inputs_of_all_layers_of_a_tied_weight(learner):
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
        model[3].weight = model[1].weight
        return nn.Sequential(model, nn.Linear(64, 10))

    learn, inputs = learner(tied(), **FEW), []
    x = learn.dls.train.one_batch()[0]

    class Record(Callback):
        def before_batch(self):
            inputs.append(self.xb[0])

    learn.add_cb(Record())
    scores = wanda({'0.1.weight': learn.model[0][1].weight}, learn)['0.1.weight']
    w, x = learn.model[0][1].weight.detach(), inputs[-1].flatten(1).as_subclass(torch.Tensor)
    second = (x @ w.T).relu()
    norm = (x.square().sum(0) + second.square().sum(0)).double().sqrt()
    assert torch.allclose(scores.double(), w.abs() * norm, rtol=1e-4)


def test_a_method_belongs_to_one_sparsifier():
    models = [nn.Linear(8, 4) for _ in range(2)]
    opts, method = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models], Method(0.5)
    first, second = (Sparsifier(m, method, 4, o) for m, o in zip(models, opts, strict=True))
    models[0](torch.randn(2, 8)).sum().backward()
    with pytest.raises(ValueError, match='another Sparsifier uses it now: give each one its own'):
        first.step()
    first.close()
    models[1](torch.randn(2, 8)).sum().backward()
    second.step()


def test_schedules_of_one_name_are_all_drawn():
    ax = plot_schedules(lambda p: p, lambda p: p**2, linear=linear)
    assert len(ax.lines) == 3
