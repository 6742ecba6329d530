"A GPU is not waited for: in a step, in an update of the masks, and in all that a method does in between"

import contextlib
import copy
import pickle

import pytest
import torch
from fastai.basics import Callback
from helpers import METHODS
from modes import forbid_reads
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastprune.all import SparsifyCallback, linear, one_shot, prunable_weights
from fastprune.core import backends
from fastprune.core import masks as masks_module
from fastprune.core.devices import pretend
from fastprune.core.later import Pending
from fastprune.core.masks import Masks
from fastprune.engine import hooks
from fastprune.engine.keep import MaskKeeper
from fastprune.engine.method import Method
from fastprune.engine.sparsifier import Sparsifier
from fastprune.methods.dense_until_end import HardEnd
from fastprune.methods.moves import mean_momentum
from fastprune.methods.thresholds import falls_short

# the last step of some methods asks whether thresholds have pruned enough, and measures the model. SNFS distributes
# growth over tensors by their mean momentum
READING = (falls_short, HardEnd.hard_step, mean_momentum)
STEPS, EPOCH = 40, 20


def network(normed=False):
    torch.manual_seed(0)
    last = nn.Linear(40, 10)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), spectral_norm(last) if normed else last),
    )


def train(make, on_gpu, normed=False, lr=0.05, **kwargs):
    "Train in a plain loop. With `on_gpu` the CPU passes for a GPU, and the method's part of a step must not read"
    model, gen = network(normed), torch.Generator().manual_seed(0)
    lr = lr.clone() if isinstance(lr, torch.Tensor) else lr
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    method = make(0.8, **kwargs)
    step = (lambda: forbid_reads(except_in=READING)) if on_gpu else contextlib.nullcontext
    elsewhere = pretend if on_gpu else contextlib.nullcontext
    with elsewhere():
        pruner = Sparsifier(model, method, STEPS, optimizer, steps_per_epoch=EPOCH)
    pending = 0
    for t in range(STEPS):
        with step():
            pruner.before_forward()
        x, y = torch.randn(32, 1, 8, 8, generator=gen), torch.randint(10, (32,), generator=gen)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with step():
            go = pruner.before_step()
        if go:
            optimizer.step()
        with step():
            pruner.after_step()
        pending += sum(isinstance(o, Pending) for o in (*method.reached[-1:], *method.recovered[-1:]))
        if not (t + 1) % EPOCH:
            with elsewhere():
                pruner.epoch_end()
        if isinstance(lr, torch.Tensor):
            lr.mul_(0.9)
    masks = pruner.masks
    with elsewhere():
        pruner.finish()
    history = method.iters, method.asked, method.reached, method.lrs, method.recovered, method.mask_distance
    assert all(isinstance(o, (int, float)) for os in history for o in os)
    return model.state_dict(), masks, [repr(os) for os in history], pending


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', METHODS)
@pytest.mark.filterwarnings('ignore')
def test_no_step_reads(name):
    "And the masks, the weights and the history are those of a CPU, to the bit"
    on_cpu, on_gpu = train(METHODS[name], False), train(METHODS[name], True)
    assert on_gpu[1] == on_cpu[1]
    assert on_gpu[2] == on_cpu[2]
    for n, w in on_cpu[0].items():
        assert torch.equal(w, on_gpu[0][n]), n


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', ['OCP', 'GSM', 'LC'])
@pytest.mark.filterwarnings('ignore')
def test_a_rate_that_is_a_tensor_is_not_read(name):
    "It is on a GPU for graphs, and changes in place"
    on_cpu, on_gpu = (train(METHODS[name], gpu, lr=torch.tensor(0.05)) for gpu in (False, True))
    assert on_gpu[1] == on_cpu[1] and on_gpu[2] == on_cpu[2] and on_cpu[2][3].startswith('[0.05')
    assert all(torch.equal(w, on_gpu[0][n]) for n, w in on_cpu[0].items())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(interval=1, scope='global'),
        dict(interval=1, granularity='filter', exclude=['6', '8']),
        dict(granularity='2:4', exclude='0'),
        dict(scope='erk', recover=False, track=True),
        dict(granularity='row', scope='global', recover=False, track=True),
        dict(refresh=True, initial=0.5, interval=3),
        dict(normed=True, interval=1),
        dict(normed=True, scope='lamp', interval=1),
    ],
)
@pytest.mark.filterwarnings('ignore')
def test_no_update_reads(kwargs):
    "With any scope and granularity"
    make = lambda sparsity, **kw: SparsifyCallback(0.5 if kw.get('granularity') == '2:4' else sparsity, **kw)
    on_cpu, on_gpu = train(make, False, **kwargs), train(make, True, **kwargs)
    assert on_gpu[1] == on_cpu[1] and on_gpu[2] == on_cpu[2]


def test_counts_are_known_beforehand():
    "Counts that follow from the schedule are numbers at once; those that depend on scores are read at an epoch's end"
    assert train(SparsifyCallback, True)[3] == 0
    assert train(SparsifyCallback, True, scope='global')[3] == 0
    assert 0 < train(SparsifyCallback, True, scope='global', recover=False)[3] <= EPOCH
    assert train(SparsifyCallback, True, track=True)[3] > 0


def step(pruner, model):
    pruner.before_forward()
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    pruner.step()


def in_training(method=None, **kwargs):
    "A model on an accelerator, and its training"
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = method or SparsifyCallback(0.8, interval=1, scope='global', recover=False, schedule=linear)
    return model, Sparsifier(model, method, STEPS, optimizer, **kwargs)


def test_numbers_that_wait_are_copied_and_pickled():
    "A callback in the middle of a fit, too"
    with pretend():
        model, pruner = in_training()
        for _ in range(3):
            step(pruner, model)
        reached = pruner.method.reached
        assert isinstance(reached[-1], Pending)
        for again in (copy.deepcopy(pruner.method), pickle.loads(pickle.dumps(pruner.method))):
            assert again.engine is None and type(again.reached[-1]) is float and again.reached == reached
        assert f'{reached[-1]:.4f}' == f'{pruner.sparsity:.4f}' and reached[-1]


def test_no_state_of_a_training_that_has_diverged():
    with pretend():
        model, pruner = in_training()
        model[6].weight.data[0, 0] = float('nan')
        step(pruner, model)
        with pytest.raises(ValueError, match='has NaN'):
            pruner.state_dict()


class Elsewhere(MaskKeeper):
    "Another keeper: it knows nothing of weights that are zero already"

    def hold(self, masks, origin=None):
        super().hold({n: ~m for n, m in masks.items()}, origin)


class FromOutside:
    "Not a `MaskKeeper` at all"

    def __init__(self, model):
        self.inner = Elsewhere(model)

    def hold(self, masks, origin=None):
        self.inner.hold(masks, origin)

    def __getattr__(self, name):
        if name in ('inner', 'takes_zeroed'):
            raise AttributeError(name)
        return getattr(self.inner, name)


class Opposite(SparsifyCallback):
    "Changes the masks"

    def new_masks(self, scores, sparsity, present):
        return Masks({n: ~m for n, m in super().new_masks(scores, sparsity, present).items()})


def assert_zeros_are_where_masks_say(model, masks):
    weights = dict(model.named_parameters())
    assert masks and all(torch.equal(weights[n] != 0, m) for n, m in masks.items())


@pytest.mark.parametrize('keeper', [MaskKeeper, Elsewhere, FromOutside])
@pytest.mark.parametrize('make', [SparsifyCallback, Opposite])
def test_zeros_come_only_with_masks_that_are_held(make, keeper):
    "Not with masks that a method or a keeper changes"
    with pretend():
        model = network()
        pruner = Sparsifier(model, make(0.8, interval=1, schedule=one_shot), STEPS, keeper=keeper(model))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        pruner.after_step()
    assert_zeros_are_where_masks_say(model, pruner.masks)
    assert all(torch.equal(p[pruner.masks[n]], before[n][pruner.masks[n]]) for n, p in pruner.weights.items())


def test_a_step_with_new_masks_projects_once(monkeypatch):
    "And one with the masks of the step before projects, too"
    projected = []
    project = backends.project
    monkeypatch.setattr(masks_module, 'project', lambda ws, ms: projected.append(len(ws)) or project(ws, ms))
    with pretend():
        model, pruner = in_training(Method(0.8, interval=2, schedule=linear))
        for due in (1, 0, 1, 0):
            projected.clear()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)  # as an optimizer does
            pruner.after_step()
            assert [n for n in projected if n] == ([] if due else [4])
            assert_zeros_are_where_masks_say(model, pruner.masks)


def test_masks_of_an_update_that_fails_are_forgotten(monkeypatch):
    "Masks that are held after it get their zeros"
    with pretend():
        model, pruner = in_training(Method(0.8, interval=1, schedule=one_shot))
        with monkeypatch.context() as patch, pytest.raises(ValueError, match='no masks'):
            patch.setattr(pruner.method, 'scores', lambda weights: {n: p.detach() for n, p in weights.items()})
            patch.setattr(hooks, 'compute_masks', raising(ValueError('no masks')))
            pruner.after_step()
        pruner.hold({n: torch.arange(p.numel()).view(p.shape) % 2 > 0 for n, p in pruner.weights.items()})
    assert_zeros_are_where_masks_say(model, pruner.masks)


def raising(error):
    def f(*args, **kwargs):
        raise error

    return f


class Guarded(Callback):
    "Forbids reads in fastprune's callbacks during batches"

    order = -100

    def before_train(self):
        for cb in self.learn.cbs:
            if cb.name == 'keep_masks' or isinstance(cb, SparsifyCallback):
                self.guard(cb)

    def guard(self, cb):
        call = type(cb).__call__
        batch = {'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step'}

        class Watched(type(cb)):
            def __call__(self, event):
                in_batch = event in batch | {'after_step', 'after_batch', 'after_cancel_batch'}
                with forbid_reads() if in_batch else pretend():
                    return call(self, event)

        if type(cb).__name__ != 'Watched':
            cb.__class__ = Watched


@pytest.mark.parametrize('kwargs', [{}, dict(interval=1, scope='global', track=True, recover=False)])
def test_in_a_learner(learner, fit, kwargs):
    "With a held mask, too, and a last fit without SparsifyCallback"
    masks = []
    for cbs in ([], [Guarded()]):
        learn = learner(bs=256, cbs=cbs)
        fit(learn, 2, cbs=SparsifyCallback(0.9, **kwargs))
        fit(learn, 1)
        masks.append(learn.masks)
        zeros = {n: p for n, p in prunable_weights(learn.model).items()}
        assert all(not p[~learn.masks[n]].any() for n, p in zeros.items())
    assert masks[0] == masks[1]


@pytest.mark.parametrize('kwargs', [{}, dict(scope='global', interval=1)])
def test_nan_is_an_error_by_the_end_of_the_epoch(kwargs):
    "The error names the tensor. It may come at the next update, if the flag is there by then"
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pretend():
        pruner = Sparsifier(model, SparsifyCallback(0.8, **kwargs), STEPS, optimizer, steps_per_epoch=EPOCH)
        with pytest.raises(ValueError, match=r"scores\['6.weight'\] has NaN"):
            for _ in range(EPOCH):
                pruner.before_forward()
                model(torch.randn(4, 1, 8, 8)).sum().backward()
                model[6].weight.grad[0, 0] = float('nan')
                pruner.step()
            pruner.epoch_end()
