"Models that are sparser than what is asked for, fits that are stopped, and epochs that are left out"

import re
import warnings
from functools import partial

import pytest
import torch
from fastai.basics import Callback, CancelFitException, DataLoader, DataLoaders, Learner
from fastai.callback.tracker import TerminateOnNaNCallback
from torch import nn

import fastprune.all as fastprune
from fastprune.all import (
    BudgetedCallback,
    RigL,
    ShrinkCallback,
    Sparsifier,
    SparsifyCallback,
    digits_convnet,
    movement,
    prunable_weights,
    random_score,
    taylor,
)
from fastprune.criteria.outliers import outlier_shares, outlier_sparsities
from fastprune.deploy.latency_target import least_sparsity
from fastprune.engine.method import Method
from fastprune.schedules.rates import s_cyc_max_lr
from fastprune.schedules.retraining import allr_discount
from fastprune.schedules.sparsity import ocp, progress_at


def warned(f, *args, **kwargs):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(o.message) for o in found]


@pytest.mark.parametrize('before', [dict(sparsity=0.6), dict(sparsity=0.75, granularity='1:4')])
@pytest.mark.parametrize('scope', ['local', 'global'])
def test_zeros_anywhere_become_two_of_four(learner, fit, before, scope):
    learn = learner()
    learn.prune(**before)
    fit(learn, cbs=SparsifyCallback(0.5, granularity='2:4', scope=scope))
    assert learn.masks.sparsity == pytest.approx(0.5, abs=5e-3)  # the first layer has too few columns
    *_, last = learn.masks.values()
    assert (last.view(10, -1, 4).sum(-1) == 2).all()


def test_zeros_anywhere_become_two_of_four_without_fastai():
    model = digits_convnet(widths=(8, 16))
    for p in prunable_weights(model).values():
        p.data[torch.rand_like(p) < 0.7] = 0
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, Method(0.5, granularity='2:4'), 4, opt)
    for _ in range(4):
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        sparsifier.step()
    assert sparsifier.masks.sparsity == pytest.approx(0.5, abs=1e-2)


def test_what_stays_without_recovery_is_told(learner, fit):
    learn = learner()
    learn.prune(0.9)
    said = 'sparser before than what {} asked for, and nothing comes back with recover=False: the sparsity is 0.9'
    assert said.format('is') in warned(learn.prune, 0.5, recover=False)[0]
    (note,) = warned(fit, learn, cbs=SparsifyCallback(0.5, recover=False))
    assert said.format('was') in note and note.endswith('instead of 0.5')
    assert not warned(learn.prune, 0.95, recover=False)
    assert not warned(fit, learn, cbs=SparsifyCallback(0.97, recover=False))
    assert not warned(learn.prune, 0.5)


class Stop(Callback):
    def after_batch(self):
        if self.training and self.iter == 5:
            raise CancelFitException


@pytest.mark.parametrize(
    'options, call',
    [
        (dict(criterion=taylor), 'learn.prune(0.9, criterion=taylor, n_batches=1)'),
        (dict(criterion=movement), 'learn.prune(0.9)'),
        (
            dict(criterion=partial(random_score, seed=5)),
            'learn.prune(0.9, criterion=partial(random_score, seed=5), n_batches=1)',
        ),
        (
            dict(sparsity={nn.Conv2d: 0.9, nn.Linear: 0.900000001}, include=[nn.Conv2d, nn.Linear]),
            'learn.prune({nn.Conv2d: 0.9, nn.Linear: 0.900000001}, include=[nn.Conv2d, nn.Linear])',
        ),
        (
            dict(criterion=taylor, recover=False, exclude=nn.Linear),
            'learn.prune(0.9, criterion=taylor, exclude=nn.Linear, n_batches=1, recover=False)',
        ),
    ],
)
def test_the_call_that_a_stopped_fit_is_told_works(learner, fit, options, call):
    learn = learner()
    (note,) = warned(fit, learn, cbs=[SparsifyCallback(**{'sparsity': 0.9, **options}), Stop()])
    assert re.search('`(learn.prune.*)` now', note)[1] == call
    eval(call, dict(vars(fastprune), learn=learn, nn=nn, partial=partial))
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_shrinking_where_the_first_epoch_is_left_out(learner):
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2, cbs=[SparsifyCallback(0.5, granularity='channel'), ShrinkCallback()], start_epoch=1)
    assert sum(p.numel() for p in learn.model.parameters()) < 2000


class Diverges(Callback):
    order = 2

    def after_loss(self):
        if self.training and self.iter == 3:
            self.learn.loss_grad = self.learn.loss_grad * float('nan')
            self.learn.loss = self.loss_grad.clone()


@pytest.mark.parametrize('cb', [SparsifyCallback(0.9), RigL(0.9), SparsifyCallback(0.5, granularity='channel')])
def test_fastai_ends_a_fit_that_diverges(learner, fit, cb):
    learn = learner()
    notes = warned(fit, learn, 2, cbs=[Diverges(), TerminateOnNaNCallback(), cb])
    assert len(learn.recorder.losses) == 3 and not any('NaN' in o for o in notes)
    with pytest.raises(ValueError, match=r"scores\['0.0.weight'\] has NaN"):
        fit(learner(), 2, cbs=[Diverges(), SparsifyCallback(0.9)])


def test_channels_of_lazy_layers():
    x = torch.randn(32, 8)
    dls = DataLoaders(*[DataLoader([(x[i], torch.tensor(i % 3)) for i in range(32)], bs=8) for _ in range(2)])
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3))
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='has no weight yet: run a batch through the model first'):
        learn.prune(0.5, granularity='channel')


def test_steep_ramps_are_steps():
    steep = partial(ocp, α=2000, β=1000)
    assert [steep(p) for p in (0, 0.25, 0.75, 1)] == pytest.approx([0, 0, 1, 1], abs=1e-6)
    assert [ocp(p, α=10, β=1000) for p in (0.5, 1)] == pytest.approx([2.718281828459045**-5, 1])
    assert SparsifyCallback(0.9, schedule=steep).sparsity == 0.9
    assert s_cyc_max_lr(1, 0.1, 0.1, beta=100, q=0.5, p=0.001) == 0.1
    with pytest.raises(ValueError, match='schedule odd has no value at position 0: '):
        progress_at(odd, 0.0)


def odd(pos):
    return 1 / pos


def test_bimp_names_the_rates_before_training(learner, fit):
    with pytest.raises(ValueError, match=r'lr_max=.*: has 2 rates, and the optimizer 1 parameter groups'):
        fit(learner(), 4, cbs=BudgetedCallback(0.6, 0.25, 3, [1e-3, 1e-2]))


def test_two_of_a_kind_for_the_discount():
    for a, b in (({'a': torch.ones(3)}, [torch.ones(3)]), ([torch.ones(3)], {0: torch.ones(3)})):
        with pytest.raises(ValueError, match='before and after: one is a dict and the other a list'):
            allr_discount(a, b, 0.5)


def test_outliers_of_what_belongs_together():
    for shares, sizes in (({'a': 0.1}, {'a': 10, 'b': 10}), ({}, {})):
        with pytest.raises(ValueError, match='shares and sizes: need the same layers, at least one'):
            outlier_sparsities(shares, sizes, 0.5)
    with pytest.raises(ValueError, match=r"scores\['a'\] has numbers below 0"):
        outlier_shares({'a': -torch.rand(100)})


def test_a_network_that_gets_slower_is_not_asked_to_take_longer():
    for least, advice in ((0.8, 'Use at least that, fewer `min_channels`, or larger'), (1.2, 'Use larger batches')):
        with pytest.raises(ValueError, match=advice):
            least_sparsity(0.3, lambda s: {}, lambda counts, least=least: least)
