"How often masks change by default, in short trainings and in long ones"

import itertools
import warnings
from functools import partial

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, set_seed
from fastai.callback.all import GradientAccumulation, ProgressCallback
from torch import nn

from fastprune.all import (
    DNW,
    DPF,
    GMP,
    GSM,
    SET,
    SNFS,
    GradualL2,
    RigL,
    SparsifyCallback,
    cubic,
    digits_convnet,
    digits_dls,
    iterative,
    linear,
    ocp,
    one_shot,
)
from fastprune.engine.begin import method_plan
from fastprune.schedules.sparsity import update_steps


def toy(steps=23, bs=4):
    "A Learner with so many steps an epoch"
    torch.manual_seed(0)
    items = [(torch.randn(64), torch.tensor(i % 4)) for i in range(bs * steps)]
    dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items[:bs], bs=bs))
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat())
    learn.remove_cb(ProgressCallback)
    return learn


def quiet(learn, n, cbs, how='fit', **kwargs):
    with learn.no_logging():
        getattr(learn, how)(n, 1e-2, cbs=cbs, **kwargs)
    return learn


def messages(caught):
    return [str(o.message) for o in caught if 'interval=' in str(o.message)]


def updates(cb):
    "Iterations after which the sparsity that is reached changes"
    return [t for t in range(1, len(cb.reached)) if cb.reached[t] != cb.reached[t - 1]]


def test_ten_steps_follow_the_schedule():
    cb = SparsifyCallback(0.9)
    quiet(toy(10), 1, cb)
    assert cb.reached == pytest.approx([0.9 * ocp((t + 1) / 10) for t in range(10)], abs=1e-3)


@pytest.mark.parametrize('n, interval', [(1, 1), (999, 1), (1999, 1), (2000, 2), (5000, 5), (5999, 5), (100_000, 100)])
def test_the_default_interval(n, interval):
    progress = [linear((t + 1) / n) for t in range(n)]
    assert update_steps(progress) == update_steps(progress, interval)
    if n > 1:
        assert update_steps(progress)[1] == min(interval, n - 1)


def test_the_default_in_a_long_training():
    "2,000 iterations, masks at every second"
    assert method_plan(SparsifyCallback(0.9, schedule=linear), 2000).updates == [*range(0, 2000, 2), 1999]


@pytest.mark.parametrize('method', [GMP, partial(GMP, scope='local'), DPF])
def test_methods_of_long_trainings_in_short_ones(method):
    cb = method(0.9)
    quiet(toy(23), 1, cb)
    want = [0.9 * cubic((t + 1) / 23) for t in range(23)]
    assert cb.reached == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize('n, interval', [(23, 1), (99, 1), (250, 2), (1600, 16), (10_000, 16)])
def test_dpf_keeps_the_papers_interval_where_there_is_time(n, interval):
    assert DPF(0.9).usual_interval(n) == interval


def test_recipes_have_the_default():
    learn = toy(23)
    with learn.no_logging():
        cb = learn.fit_cyclical(2, 1, 0.9)
    assert cb.interval is None and cb.reached[:18] == pytest.approx(
        [0.9 * min(1, cubic(min(1, (t + 1) / 23 / 0.8))) for t in range(18)], abs=2e-3
    )


def test_tickets_have_the_default_and_can_be_told():
    def reached(**kwargs):
        seen = []

        def fit(learn, cbs):
            learn.fit(1, 1e-2, cbs=cbs)
            seen.extend(list(cb.reached) for cb in cbs if isinstance(cb, SparsifyCallback))

        learn = toy(23)
        with learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.find_tickets(1, fit, prune_rate=0.9, schedule=linear, measure='none', **kwargs)
        return seen[-1]

    assert reached() == pytest.approx([0.9 * (t + 1) / 23 for t in range(23)], abs=1e-3)
    told = reached(interval=11)
    assert [t for t in range(1, 23) if told[t] != told[t - 1]] == [11, 22]
    with pytest.raises(ValueError, match='interval=0'):
        toy().find_tickets(1, lambda learn, cbs: learn.fit(1, cbs=cbs), schedule=linear, interval=0)


@pytest.mark.parametrize(
    'method, until',
    [(RigL, 0.75), (SET, 1.0), (SNFS, 1.0), (partial(RigL, end=1.0), 1.0), (partial(RigL, end=0.5), 0.5)],
)
@pytest.mark.parametrize(
    'steps, epochs', [(4, 5), (23, 1), (23, 4), (100, 1), (5, 20), (5, 21), (50, 4), (3, 60), (1, 101), (67, 2)]
)
def test_moves(method, until, steps, epochs):
    "At most every fifth step, at least 20 where there are 100, evenly, and what has come is trained"
    at, T = list(method(0.8).planned_moves(steps * epochs, steps)), steps * epochs
    allowed = sum(t < until * T for t in range(T))
    gaps = {b - a for a, b in itertools.pairwise(at)}
    assert len(gaps) <= 1 and all(k >= 5 for k in gaps) and all(0 < t < until * T for t in at)
    assert len(at) >= (20 if allowed >= 100 else allowed // 5) and at[-1] < T - 1


@pytest.mark.parametrize('method, n', [(RigL, 3), (SET, 4), (SNFS, 4)])
def test_moves_in_an_epoch(method, n):
    cb = method(0.8)
    quiet(toy(23), 1, cb)
    assert len(cb.changes) == n and all(
        c['dropped'] and sum(c['dropped'].values()) == sum(c['grown'].values()) for c in cb.changes
    )


@pytest.mark.parametrize(
    'method, epochs, every, until',
    [(SET, 30, 23, 690), (SNFS, 21, 23, 483), (RigL, 174, 100, 3002), (partial(RigL, end=0.5), 174, 100, 2001)],
)
def test_moves_at_the_papers_interval_where_there_is_time(method, epochs, every, until):
    assert list(method(0.8).planned_moves(23 * epochs, 23)) == list(range(every, until, every))


def test_moves_while_gradients_add_up():
    "Steps come at every fourth iteration, so that a move waits for the next one"
    cb = RigL(0.8)
    quiet(toy(40, bs=1), 1, [cb, GradientAccumulation(n_acc=4)])
    assert [c['iteration'] for c in cb.changes] == [3, 7, 15, 19, 23, 27]  # moves are due at 2, 7, 12, 17, 22 and 27


@pytest.mark.parametrize(
    'method, interval, n, what',
    [
        (SparsifyCallback, 10, 4, 'mask updates'),
        (GMP, 100, 2, 'mask updates'),
        (DPF, 16, 3, 'mask updates'),
        (RigL, 10, 1, 'moves'),
        (SET, 23, 0, 'moves'),
    ],
)
def test_an_interval_too_large_is_told_once(method, interval, n, what):
    cb = method(0.8, interval=interval)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        quiet(toy(23), 1, cb)
    (message,) = messages(caught)
    assert (
        message.startswith(f'interval={interval} in a training of 23 iterations gives {n} {what}')
        and 'leave `interval` out' in message
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'cb',
    [
        SparsifyCallback(0.8),
        SparsifyCallback(0.8, interval=2),
        SparsifyCallback(0.8, schedule=one_shot, interval=10),
        SparsifyCallback(0.8, schedule=iterative, interval=5),
        SparsifyCallback(0.0),
        GMP(0.8),
        DPF(0.8),
        DNW(0.8),
        GSM(0.8),
        GradualL2(0.8),
        RigL(0.8),
        SET(0.8),
        SNFS(0.8),
    ],
    ids=lambda cb: f'{type(cb).__name__} {cb.interval}',
)
def test_no_warning_where_it_is_not_the_interval(cb):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        quiet(toy(23), 1, cb)
    assert not messages(caught)


def test_rounds_of_tickets_warn_once():
    learn = toy(23)
    with learn.no_logging(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.find_tickets(3, lambda learn, cbs: learn.fit(1, cbs=cbs), schedule=linear, interval=10, measure='none')
    assert len(messages(caught)) == 1


@pytest.mark.parametrize('method', [SparsifyCallback, GMP, DPF, RigL, SET, SNFS])
def test_wrong_intervals(method):
    for interval in (0, -1, 2.5, True, '10'):
        with pytest.raises(ValueError, match='interval='):
            method(0.9, interval=interval)


def test_digits_at_90_percent_by_defaults(fit):
    "One epoch of 23 iterations, two seeds; with masks at every tenth it is 30%"
    res = []
    for seed in range(2):
        set_seed(seed, True)
        learn = Learner(digits_dls(), digits_convnet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        res.append(fit(learn, 1, how='fit_one_cycle', cbs=SparsifyCallback(0.9)).recorder.values[-1][2])
    assert sum(res) / 2 > 0.6
