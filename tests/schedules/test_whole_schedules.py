"Schedules give progress from 0 to 1; where a training starts in them, and where cycles restart"

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastai.callback.all import ProgressCallback, SchedCos, SchedExp, SchedLin, SchedPoly, combine_scheds
from helpers import equal
from torch import nn

from fastprune.all import (
    DPF,
    GMP,
    GradualL2,
    SparsifyCallback,
    cosine,
    cubic,
    cyclical,
    iterative,
    linear,
    lr_cyclical,
    ocp,
    plot_lrs,
    plot_schedules,
    window,
)

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def toy(steps=16, tmp=None):
    torch.manual_seed(0)
    items = [(torch.randn(64), torch.tensor(i % 4)) for i in range(4 * steps)]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    learn = Learner(
        DataLoaders(DataLoader(items, bs=4), DataLoader(items[:8], bs=4)),
        model,
        loss_func=CrossEntropyLossFlat(),
        path=tmp,
    )
    learn.remove_cb(ProgressCallback)
    return learn


def fit(learn, n, *cbs, **kwargs):
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n, 1e-2, cbs=list(cbs), **kwargs)
    return learn


# the end

falling = lambda p: 1 - p
low = lambda p: 0.7 * p


def bump(p):
    return math.sin(math.pi * p) if p < 1 else 0.0


@pytest.mark.parametrize(
    'schedule, end, remedy',
    [
        (
            SchedCos(0, 0.9),
            'SchedCos(0, 0.9) ends at 0.9',
            'a schedule gives progress from 0 to 1, not sparsity: use SchedCos(0,1)',
        ),
        (SchedLin(0.2, 0.5), 'SchedLin(0.2, 0.5) ends at 0.5', 'use SchedLin(0,1)'),
        (SchedExp(0.01, 0.9), 'SchedExp(0.01, 0.9) ends at 0.9', 'use SchedExp(0.001,1)'),
        (SchedPoly(0, 0.9, 3), 'ends at 0.9', 'divide it by its end'),
        (falling, 'ends at 0', 'turn it around, as `lambda pos: 1-schedule(pos)`'),
        (SchedCos(1, 0), 'ends at 0', 'use SchedCos(0,1)'),
        (low, 'ends at 0.7', '`lambda pos: schedule(pos)/0.7`'),
        (bump, 'ends at 0', 'let it rise to 1 at position 1'),
        (lambda p: 0.999, 'ends at 0.999', 'divide'),
        (lambda p: 0, 'ends at 0', 'let it rise'),
    ],
)
def test_schedules_that_do_not_end_at_one(schedule, end, remedy):
    "Are refused at the call, wherever a schedule is taken"
    learn = toy()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    run = lambda learn, cbs: learn.fit(1, cbs=cbs)
    for call in (
        lambda: SparsifyCallback(0.9, schedule=schedule),
        lambda: GMP(0.9, schedule=schedule),
        lambda: DPF(0.9, schedule=schedule),
        lambda: window(schedule, 0.2),
        lambda: cyclical(schedule, 3),
        lambda: learn.fit_cyclical(2, 1, 0.9, schedule=schedule),
        lambda: learn.find_tickets(1, run, schedule=schedule),
        lambda: plot_schedules(schedule),
    ):
        with pytest.raises(ValueError) as e:
            call()
        assert end in str(e.value) and remedy in str(e.value) and 'not sparsity' in str(e.value)
    for k, v in learn.model.state_dict().items():
        assert equal(v, before[k])


def test_a_schedule_that_is_changed_later():
    cb = SparsifyCallback(0.9)
    cb.schedule = low
    with pytest.raises(ValueError, match='ends at 0.7'):
        fit(toy(), 1, cb)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'schedule',
    [
        lambda p: p * (1 - 1e-9),
        lambda p: p * (1 + 1e-9),
        lambda p: np.float32(p) * np.float32(0.99999994),
        lambda p: torch.tensor(p) ** 2,
        lambda p: p - 1e-12,
        lambda p: 1 - (1 - p) ** 3 + 1e-15,
        SchedCos(0, 1),
        SchedCos(0.0, 1.0),
        combine_scheds([0.3, 0.7], [SchedCos(0, 0.5), SchedCos(0.5, 1)]),
        partial(ocp, α=10),
    ],
)
def test_rounding_is_none_of_it(schedule):
    "The end is exact all the same"
    for method in (SparsifyCallback, partial(SparsifyCallback, scope='global'), GMP):
        learn, cb = toy(), method(0.9, schedule=schedule)
        fit(learn, 1, cb)
        assert cb.asked[-1] == 0.9 and learn.masks.n_kept == 2176 - round(0.9 * 2176)
        assert all(0 <= a <= 0.9 for a in cb.asked)
    cyclical(window(schedule, 0, 0.8), 3)


def test_penalties_may_fall():
    fit(toy(), 1, GradualL2(0.9, growth=falling))
    with pytest.raises(ValueError, match='growth|schedule'):
        GradualL2(0.9, growth=lambda p: 2 * p)


@pytest.mark.parametrize('sparsity', [1e-9, 1e-12, 0.3, 0.999])
def test_budgeted_schedules_end_at_one(sparsity):
    from fastprune.methods.budgeted import _geometric

    for cycles in range(1, 9):
        assert _geometric(sparsity, 0.75, cycles, 1.0) == 1


def test_names_of_fastais_schedules():
    from fastprune.schedules.sparsity import schedule_name

    assert [schedule_name(s) for s in (SchedCos(0, 1), SchedLin(0.5, 1), window(SchedExp(1e-3, 1), 0.2))] == [
        'SchedCos(0, 1)',
        'SchedLin(0.5, 1)',
        'window(SchedExp(0.001, 1), 0.2, 1)',
    ]


# cycles on a sparse Learner


@pytest.mark.sample(2)
@pytest.mark.parametrize('scope', ['local', 'global'])
@pytest.mark.parametrize('start, initial', [(0.9, None), (0.5, None), (0.95, None), (0.0, 0.9), (0.9, 0.9), (0.0, 0.3)])
def test_cycles_restart_from_a_part_of_the_target(start, initial, scope):
    learn, cb = toy(12), SparsifyCallback(0.9, schedule=cyclical(cubic, 3, restart=0.5), scope=scope, initial=initial)
    if start:
        learn.prune(start, scope=scope)
    fit(learn, 1, cb)
    begin, p = start if initial is None else initial, [cyclical(cubic, 3)((t + 1) / 12) for t in range(12)]
    want = [begin + (0.9 - begin) * o for o in p[:4]] + [0.9 * o for o in p[4:]]
    assert cb.asked == pytest.approx(want, abs=2e-3) and cb.reached == pytest.approx(want, abs=2e-3)
    assert want[4] < 0.75 and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_weights_recover_in_cycles_on_a_sparse_learner():
    learn, cb = toy(12), SparsifyCallback(0.9, schedule=cyclical(cubic, 3), track=True)
    learn.prune(0.9)
    fit(learn, 1, cb)
    assert cb.recovered[3] == 0 and cb.recovered[4] > 0 and cb.mask_distance[-1] > 0


def test_nested_masks_stay_nested():
    learn, cb = toy(12), SparsifyCallback(0.9, schedule=cyclical(cubic, 3), recover=False)
    learn.prune(0.9)
    before = learn.masks
    fit(learn, 1, cb)
    assert learn.masks == before and min(cb.reached) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize('schedule', [linear, ocp, iterative, window(cyclical(cubic, 2), 0, 0.8)])
def test_from_nothing_all_is_as_before(schedule):
    cb = SparsifyCallback(0.9, schedule=schedule)
    fit(toy(), 1, cb)
    assert cb.asked == [0.9 * schedule((t + 1) / 16) if schedule((t + 1) / 16) < 1 else 0.9 for t in range(16)]


def test_up_to_the_first_fall_the_start_counts():
    cb, learn = SparsifyCallback(0.9, schedule=lambda p: p if p < 0.5 else 2 * p - 1), toy()
    learn.prune(0.6)
    fit(learn, 1, cb)
    assert cb.asked[:7] == pytest.approx([0.6 + 0.3 * (t + 1) / 16 for t in range(7)], abs=2e-3) and cb.asked[
        7:
    ] == pytest.approx([0.9 * (2 * (t + 1) / 16 - 1) for t in range(7, 16)], abs=1e-9)


# a later epoch


class Stop(Callback):
    def after_epoch(self):
        if self.epoch == 1:
            raise CancelFitException


@pytest.mark.sample(2)
@pytest.mark.parametrize('scope', ['local', 'global'])
@pytest.mark.parametrize(
    'schedule',
    [linear, cubic, ocp, cosine, cyclical(cubic, 2), cyclical(linear, 3), window(linear, 0.2, 0.9)],
    ids=lambda s: getattr(s, '__name__', '') or repr(s.args[1:]),
)
def test_a_fit_that_goes_on_at_a_later_epoch(schedule, scope, tmp_path):
    "Asks for what it would have without a stop, with masks and without"
    make, save = (
        lambda: SparsifyCallback(0.9, schedule=schedule, scope=scope),
        lambda l: (l.save_sparse(tmp_path / 'sparse'), l.save(tmp_path / 'weights')),
    )
    whole = make()
    fit(toy(6), 4, whole)
    save(fit(toy(6, tmp_path), 4, make(), Stop()))
    for load in (lambda l: l.load_sparse(tmp_path / 'sparse'), lambda l: l.load(tmp_path / 'weights')):
        again, rest = toy(6, tmp_path), make()
        load(again)
        fit(again, 4, rest, start_epoch=2)
        assert rest.asked == pytest.approx(whole.asked[12:], abs=1e-9) and rest.reached == pytest.approx(
            whole.reached[12:], abs=2e-3
        )


@pytest.mark.sample(2)
@pytest.mark.parametrize('start', [0.5, 0.85, 0.95])
def test_what_was_sparse_before_is_part_of_the_way(start):
    "From 0.5 on: half-way is 0.7, and so it goes on"
    learn = toy()
    learn.prune(start)
    first, rest = SparsifyCallback(0.9, schedule=linear), SparsifyCallback(0.9, schedule=linear)
    fit(learn, 4, first, Stop())
    fit(learn, 4, rest, start_epoch=2)
    want = [start + (0.9 - start) * (t + 1) / 64 for t in range(64)]
    assert first.asked + rest.asked == pytest.approx(want, abs=3e-3)


def test_dense_at_a_later_epoch():
    "The schedule goes by the epoch"
    cb = SparsifyCallback(0.9, schedule=linear)
    fit(toy(), 4, cb, start_epoch=2)
    assert cb.asked == pytest.approx([0.9 * (t + 1) / 64 for t in range(32, 64)])


def test_an_initial_sparsity_that_is_given_stands():
    learn, cb = toy(), SparsifyCallback(0.9, schedule=linear, initial=0.3)
    learn.prune(0.5)
    fit(learn, 4, cb, start_epoch=2)
    assert cb.asked == pytest.approx([0.3 + 0.6 * (t + 1) / 64 for t in range(32, 64)])


def test_by_layers_and_filters():
    learn, make = toy(), lambda: SparsifyCallback({'0': 0.75, '2': 0.5}, schedule=linear, granularity='row')
    fit(learn, 4, make(), Stop())
    rest = make()
    fit(learn, 4, rest, start_epoch=2)
    assert rest.asked == pytest.approx([(0.75 * 2048 + 0.5 * 128) / 2176 * (t + 1) / 64 for t in range(32, 64)])


def test_lower_rates_by_group():
    rates = lr_cyclical(1e-2, low=np.array([1e-4, 1e-3]), half=0.5)
    assert rates(0.0).tolist() == [1e-4, 1e-3] and rates(0.5).tolist() == pytest.approx([1e-2, 1e-2])
    for low in ([1e-4, 0.1], [1e-4, 1e-3, 1e-3]):
        with pytest.raises(ValueError, match='needs a rate from 0 to lr='):
            lr_cyclical([1e-2, 2e-2] if len(low) > 2 else 1e-2, low=low)


def test_rounds_and_one_training_in_a_picture():
    "In any order a single rate is drawn in all rounds, and both have the rounds as x"
    for named in ({'three': [linear] * 3, 'one': cubic}, {'one': cubic, 'three': [linear] * 3}):
        ax = plot_lrs(**named)
        for line in ax.lines:
            assert line.get_xdata()[-1] == pytest.approx(3, abs=0.01), line.get_label()
        assert ax.get_xlabel() == 'round'
    assert plot_lrs(cubic).lines[0].get_xdata()[-1] == pytest.approx(100, abs=1)
