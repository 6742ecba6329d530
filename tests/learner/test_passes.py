"Batches on the side run as in a fit: with callbacks that take part in the loss, and without a trace"

import sys
import types
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import (
    SGD,
    Callback,
    CancelBatchException,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Learner,
    accuracy,
    before_batch_cb,
)
from fastai.callback.all import (
    CSVLogger,
    GradientAccumulation,
    GradientClip,
    ParamScheduler,
    SaveModelCallback,
    SchedCos,
)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.rnn import rnn_cbs
from fastai.callback.training import BnFreeze
from helpers import equal, quietly
from torch import nn
from torch.nn import functional as F

from fastprune.all import SparsifyCallback, digits_dls, grasp, magnitude, prunable_weights, snip, synflow, taylor, wanda
from fastprune.core.shards import is_dtensor
from fastprune.learner import batches as passes
from fastprune.learner import gradients as grads
from fastprune.learner.batches import undisturbed
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

GRADIENTS = dict(snip=dict(criterion=snip), grasp=dict(criterion=grasp), taylor=dict(criterion=taylor, n_batches=2))
CRITERIA = dict(**GRADIENTS, synflow=dict(criterion=synflow), wanda=dict(criterion=wanda))


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def make(model=None, cbs=None, dls=None, **kwargs):
    torch.manual_seed(0)
    learn = Learner(
        dls or digits_dls(),
        model or net(),
        cbs=cbs,
        **{**dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=partial(SGD, mom=0.9)), **kwargs},
    )
    seed_round(learn, 0)
    return learn


class Answers(nn.Module):
    "Inputs by name in, outputs by name out, as HuggingFace's"

    def __init__(self):
        super().__init__()
        self.m = net()

    def forward(self, x):
        return dict(logits=self.m(x['pixels'] if isinstance(x, dict) else x), attentions=None)


class PickLogits(Callback):
    def after_pred(self):
        self.learn.pred = self.pred['logits']


class ByName(Callback):
    def before_batch(self):
        self.learn.xb = (dict(pixels=self.xb[0], mask=torch.ones(len(self.xb[0]))),)


def named():
    return make(Answers(), cbs=[ByName(), PickLogits()])


def answers():
    return make(Answers(), cbs=PickLogits())


def dicts():
    "Batches whose inputs are dicts"

    def dl():
        return DataLoader(
            [(dict(pixels=torch.randn(8, 8)), torch.tensor(i % 10)) for i in range(64)], bs=16, create_batch=collate
        )

    def collate(b):
        return dict(pixels=torch.stack([x['pixels'] for x, _ in b])), torch.stack([y for _, y in b])

    return make(Answers(), cbs=PickLogits(), dls=DataLoaders(dl(), dl()))


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', [answers, named, dicts])
@pytest.mark.parametrize('name', list(CRITERIA))
def test_criteria_where_callbacks_read_the_output(kind, name):
    learn = kind()
    learn.prune(0.5, **CRITERIA[name])
    assert learn.masks.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', [answers, named, dicts])
def test_analyses_where_callbacks_read_the_output(kind):
    learn = kind()
    assert len(learn.gradient_histogram(n_batches=2).hidden) == 2 * 12 * (16 if kind is dicts else 64)
    assert np.isfinite(learn.hessian_spectrum(tol=0.1)).all()
    assert learn.flops().loc['total', 'dense'] == 2 * (64 * 12 + 12 * 10)
    assert learn.sensitivity((0.5,)).shape == (2, 2)
    assert len(quietly(learn, learn.linear_path, learn.model, deepcopy(learn.model), n=3).losses) == 3


def test_same_scores_as_of_the_model_inside():
    learn, plain = answers(), make()
    plain.model.load_state_dict(learn.model.m.state_dict())
    for criterion in (snip, grasp, synflow, wanda):
        scores = []
        for l in (learn, plain):
            seed_round(l, 3)
            scores.append(list(criterion(prunable_weights(l.model), l).values()))
        for a, b in zip(*scores, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=0)


class Halve(Callback):
    def before_batch(self):
        self.learn.xb = (self.xb[0] / 2,)


class Penalty(Callback):
    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.loss_grad + sum(p.square().sum() for p in self.model.parameters())


class Late(Callback):
    def before_backward(self):
        self.learn.loss_grad = 3 * self.loss_grad


@pytest.mark.parametrize(
    'cb,loss',
    [
        (Halve, lambda m, x, y: F.cross_entropy(m(x / 2), y)),
        (Late, lambda m, x, y: 3 * F.cross_entropy(m(x), y)),
        (Penalty, lambda m, x, y: F.cross_entropy(m(x), y) + sum(p.square().sum() for p in m.parameters())),
    ],
)
@pytest.mark.parametrize('later', [False, True])
def test_gradients_are_those_of_the_callbacks_loss(cb, loss, later):
    learn = make(cbs=cb())
    if later:
        quietly(learn, learn.fit, 1, 1e-2)
    with undisturbed(learn):
        seed_round(learn, 1)
        x, y = next(iter(learn.dls.train))
    seed_round(learn, 1)
    scores, weights = snip(prunable_weights(learn.model), learn), prunable_weights(learn.model)
    for s, w, g in zip(
        scores.values(),
        weights.values(),
        torch.autograd.grad(loss(learn.model, x, y), list(weights.values())),
        strict=True,
    ):
        assert torch.allclose(s, (w * g).abs(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    'cbs',
    [
        [GradientAccumulation(n_acc=1000)],
        [ParamScheduler({'lr': SchedCos(1.0, 0.0)})],
        [SparsifyCallback(0.5)],
        [GradientClip(1e-3)],
    ],
)
def test_callbacks_that_schedule_scale_or_prune_stay_out(cbs):
    grads = []
    for some in (None, cbs):
        learn = make(cbs=some)
        seed_round(learn, 0)
        grads.append(snip(prunable_weights(learn.model), learn))
    for n in grads[0]:
        assert equal(grads[0][n], grads[1][n])


def test_who_takes_part():
    class Logs(Callback):
        remove_on_fetch = True

        def after_loss(self):
            raise AssertionError

    class Pruner(SparsifyCallback):
        def before_batch(self):
            raise AssertionError

    learn = make(
        cbs=[
            CSVLogger(),
            SaveModelCallback(),
            GradientAccumulation(),
            MixUp(),
            PickLogits(),
            Logs(),
            Pruner(0.5),
            before_batch_cb(lambda self, xb, yb: (xb, yb)),
        ]
    )
    assert {cb.name for cb in learn.cbs if passes.takes_part(cb)} == {
        'cast_to_tensor',
        'mix_up',
        'pick_logits',
        'callback',
    }


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('criterion', [snip, grasp, partial(taylor)], ids=['snip', 'grasp', 'taylor'])
def test_frozen_norms_run_as_in_training(criterion, inside):
    "BnFreeze keeps norms without gradients in evaluation mode, in passes, too"
    model, modes = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)), []
    for p in model[2].parameters():
        p.requires_grad_(False)
    learn = make(model, BnFreeze())
    model[2].register_forward_hook(lambda m, *_: modes.append(m.training) if learn.__dict__.get('_in_pass') else None)
    if inside:
        quietly(learn, learn.fit, 1, 1e-3, cbs=SparsifyCallback(0.5, criterion=criterion, interval=10))
    else:
        learn.prune(0.5, criterion=criterion, n_batches=1)
    assert not any(modes) and (modes or inside and criterion.__class__ is partial)


class Counts(Callback):
    "Remembers all sorts of things"

    def __init__(self):
        self.n, self.events, self.seen = 0, [], {}

    def before_fit(self):
        self.events.append('before_fit')

    def before_batch(self):
        self.n += 1
        self.events.append('before_batch')
        self.seen[self.n] = self.training

    def after_batch(self):
        self.events.append('after_batch')

    def after_fit(self):
        self.events.append('after_fit')


def state(learn):
    own = {k: v for k, v in learn.__dict__.items() if k not in ('lock', 'opt', 'dls', 'model', 'cbs')}
    seen = [deepcopy({k: v for k, v in vars(cb).items() if k != 'learn'}) for cb in learn.cbs if isinstance(cb, Counts)]
    return (
        own,
        list(learn.cbs),
        seen,
        learn.opt and deepcopy(list(learn.opt.hypers)),
        {(cb.name, k): id(v) for cb in learn.cbs for k, v in vars(cb).items()},
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize('fitted', [False, True])
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_learner_and_callbacks_are_as_before(fitted, mix):
    learn = make(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 10)),
        cbs=[Counts(), mix(), GradientAccumulation(64)],
    )
    if fitted:
        quietly(learn, learn.fit_one_cycle, 1, 1e-2)
    weights, rng, before = deepcopy(learn.model.state_dict()), torch.get_rng_state(), state(learn)
    grads = [p.grad if p.grad is None else p.grad.clone() for p in learn.model.parameters()]
    snip(prunable_weights(learn.model), learn)
    grasp(prunable_weights(learn.model), learn)
    wanda(prunable_weights(learn.model), learn)
    learn.gradient_histogram(n_batches=2), learn.hessian_spectrum(), learn.flops()
    after = state(learn)
    assert before[1:] == after[1:]
    assert {k: v for k, v in before[0].items() if v is not after[0].get(k)} == {} and before[0].keys() == after[
        0
    ].keys()
    assert torch.equal(rng, torch.get_rng_state()) and all(
        equal(t, weights[n]) for n, t in learn.model.state_dict().items()
    )
    assert all(p.grad is g is None or equal(p.grad, g) for p, g in zip(learn.model.parameters(), grads, strict=True))


def test_mixup_mixes_in_training_alone():
    learn = make(cbs=MixUp(0.4))
    plain = make()
    for l in (learn, plain):
        seed_round(l, 0)
    assert not torch.allclose(*[snip(prunable_weights(l.model), l)['1.weight'] for l in (learn, plain)])
    assert np.allclose(learn.hessian_spectrum(), plain.hessian_spectrum(), rtol=1e-3)
    for l in (learn, plain):
        seed_round(l, 0)
    assert torch.allclose(*[wanda(prunable_weights(l.model), l)['1.weight'] for l in (learn, plain)])


@pytest.mark.parametrize('criterion', [snip, grasp])
def test_in_the_middle_of_a_fit(criterion):
    "The fit goes on as if nothing had been: callbacks hear of its start once"
    rows = []
    for c in (magnitude, criterion):
        counts = Counts()
        learn = make(cbs=[counts, MixUp()])

        class Look(Callback):
            order, looks = 90, c is criterion

            def after_batch(self):
                if self.looks and self.training and self.iter % 8 == 0:
                    criterion(prunable_weights(self.model), self.learn)

        quietly(learn, learn.fit, 1, 1e-2, cbs=Look())
        assert counts.events.count('before_fit') == 1
        rows.append((counts.n, learn.recorder.losses[-1], learn.recorder.values[-1][1]))
    assert rows[0] == rows[1]
    quietly(learn, learn.fit, 1, 1e-2, cbs=SparsifyCallback(0.5, criterion=criterion, interval=10))
    assert learn.masks.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_fit_by_callbacks_of_text_models():
    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.r, self.o = nn.Embedding(20, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 20)
            self.resets = 0

        def reset(self):
            self.resets += 1

        def forward(self, x):
            h, _ = self.r(self.e(x))
            return self.o(h), h, h

    def dl():
        return DataLoader([(torch.randint(20, (5,)), torch.randint(20, (5,))) for _ in range(32)], bs=8)

    learn = make(LM(), cbs=rnn_cbs(2, 1), dls=DataLoaders(dl(), dl()), metrics=None)
    quietly(learn, learn.fit, 1, 1e-2)
    learn.prune(0.5, criterion=snip)
    learn.prune(0.6, criterion=grasp)
    assert len(learn.gradient_histogram(n_batches=1).hidden) == 8 * 5 * 16


def test_batches_that_a_callback_cancels_do_not_count():
    class First(Callback):
        def before_batch(self):
            if self.iter > 0:
                raise CancelBatchException

    learn, plain = make(cbs=First()), make()
    for l in (learn, plain):
        seed_round(l, 0)
    a, b = snip(prunable_weights(learn.model), learn, 3), snip(prunable_weights(plain.model), plain, 1)
    assert all(equal(a[n], b[n]) for n in a)

    class Never(Callback):
        def before_batch(self):
            raise CancelBatchException

    for criterion in (snip, grasp):
        with pytest.raises(ValueError, match='cancel'):
            make(cbs=Never()).prune(0.5, criterion=criterion)


def test_inputs_as_the_model_gets_them():
    learn = named()
    with undisturbed(learn):
        (x,) = passes.a_batch(learn)
        assert list(x) == ['pixels', 'mask'] and x['pixels'].shape == (64, 1, 8, 8)
        with passes.as_in_fit(learn, False):
            assert passes.forward(learn, learn.dls.train.one_batch()).shape == (64, 10)
        with passes.as_in_fit(learn):
            assert grads.loss_of(learn, learn.dls.train.one_batch()).requires_grad
        assert len(list(grads.gradients(learn, 2))) == 2
    no_targets = make(dls=DataLoaders(*[DataLoader([(torch.randn(64),)] * 8, bs=4)] * 2), metrics=None)
    no_targets.dls.n_inp = 1
    with pytest.raises(ValueError, match='have only inputs'):
        no_targets.prune(0.5, criterion=snip)


@pytest.mark.parametrize('where', ['prune', 'fit'])
def test_a_criterion_of_ones_own_may_take_gradients(where):
    def fisher(weights, learn):
        x, y = learn.dls.one_batch()
        return {
            n: (p * g).square()
            for (n, p), g in zip(
                weights.items(),
                torch.autograd.grad(learn.loss_func(learn.model(x), y), list(weights.values())),
                strict=True,
            )
        }

    def rooted(weights):
        return {n: p.abs().sqrt() for n, p in weights.items()}

    for criterion in (fisher, rooted):
        learn = make()
        if where == 'prune':
            learn.prune(0.5, criterion=criterion)
        else:
            quietly(learn, learn.fit, 1, 1e-2, cbs=SparsifyCallback(0.5, criterion=criterion))
        assert learn.masks.sparsity == pytest.approx(0.5, abs=1e-3) and not any(
            m.requires_grad for m in learn.masks.values()
        )


def test_a_loss_with_weights_of_its_own():
    class Weighted(nn.CrossEntropyLoss):
        moved = None

        def to(self, device):
            Weighted.moved = device
            return super().to(device)

    make(loss_func=Weighted(torch.ones(10))).prune(0.5, criterion=snip)
    assert Weighted.moved is not None


def test_mixed_precision_is_left_to_the_fit():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = make().to_bf16()
        learn.prune(0.5, criterion=snip)
        assert not any(passes.takes_part(cb) for cb in learn.cbs if cb.name == 'mixed_precision')
        quietly(learn, learn.fit, 1, 1e-2, cbs=SparsifyCallback(0.5, criterion=snip, interval=10))


def test_a_module_that_another_thread_is_importing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.distributed.tensor', types.ModuleType('torch.distributed.tensor'))
    assert not is_dtensor(torch.ones(2))
    make().prune(0.5)
