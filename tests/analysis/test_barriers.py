"Barriers by both definitions, and the error half way"

from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, Learner, accuracy, error_rate
from helpers import quietly
from torch import nn

from fastprune.all import LinearPath, digits_dls, state_of

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def path(losses):
    return LinearPath(np.linspace(0, 1, len(losses)), np.array(losses), {'error_rate': np.array(losses)})


@pytest.mark.parametrize(
    'losses, frankle, line',
    [
        ([0.1, 0.2, 0.3], 0.1, 0.0),
        ([0.3, 0.2, 0.1], 0.1, 0.0),
        ([0.1, 0.301, 0.3], 0.101, 0.101),
        ([0.2, 0.2, 0.2], 0.0, 0.0),
        ([0.1, 0.5, 0.1], 0.4, 0.4),
        ([0.3, 0.1, 0.3], 0.0, 0.0),
        ([0.1, 0.15, 0.3], 0.1, 0.0),
        ([0.4, 0.5, 0.1, 0.1, 0.2], 0.2, 0.15),
        ([0.1, 0.3], 0.1, 0.0),
    ],
)
def test_both_barriers(losses, frankle, line):
    p = path(losses)
    for b, want in ((p.barrier, frankle), (p.line_barrier, line)):
        assert float(b) == b.loss and (b.loss, b.error) == pytest.approx((want, want), abs=1e-12)


def test_barriers_do_not_jump():
    "As a function of the errors they are continuous"
    rng = np.random.default_rng(0)
    for _ in range(200):
        y = rng.uniform(size=7)
        a, b = path(y), path(y + rng.uniform(-1e-6, 1e-6, 7))
        assert abs(a.barrier - b.barrier) < 3e-6 and abs(a.line_barrier - b.line_barrier) < 3e-6
        assert a.barrier >= abs(y[0] - y[-1]) / 2 - 1e-12 and a.line_barrier >= 0


def test_an_accuracy_is_an_error_and_no_number_is_none():
    p = LinearPath(np.linspace(0, 1, 3), np.array([1.0, 2, np.nan]), {'accuracy': np.array([0.9, 0.8, 0.7])})
    assert np.isnan(p.barrier) and np.isnan(p.line_barrier.loss)
    assert p.barrier.error == pytest.approx(0.1) and p.line_barrier.error == pytest.approx(0)
    assert np.isnan(LinearPath(np.linspace(0, 1, 3), np.ones(3), {}).barrier.error)


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    return Learner(
        digits_dls(bs=128),
        model,
        loss_func=CrossEntropyLossFlat(),
        metrics=[accuracy, error_rate],
        opt_func=partial(SGD, mom=0.9),
    )


@pytest.fixture(scope='module')
def pair():
    learns = [make(0), make(1)]
    for learn in learns:
        quietly(learn, learn.fit, 6, 0.1)
    return learns


def test_half_way_is_at_a_half_exactly(pair):
    "Whatever the number of points"
    a, b = pair
    half = {n: (t + state_of(b)[n]) / 2 for n, t in state_of(a).items()}
    want = a.linear_path(half, half, n=3).instability
    on_train = a.linear_path(half, half, n=3, dl=a.dls.train.new(shuffle=False, drop_last=False)).instability
    near = a.linear_path(a, b, n=2)
    assert abs(np.mean(near.errors) - want) > 0.01  # the mean of two neighbours is another number
    for n in (2, 3, 4, 8, 11):
        p = a.linear_path(a, b, n=n, train=True)
        assert p.instability == pytest.approx(want, abs=1e-6)
        assert len(p.alphas) == len(p.losses) == len(p.errors) == len(p.df) == n
        assert p.train.instability == pytest.approx(on_train, abs=1e-6)
    assert a.linear_path(a, b, n=4, metrics=error_rate).instability == pytest.approx(want, abs=1e-6)
    assert a.linear_path(a, b, n=2, bn='recalibrate', n_batches=2).instability == pytest.approx(want, abs=1e-6)


def test_tables_have_both_barriers_and_training_columns(pair):
    learn = make()
    with learn.no_bar(), learn.no_logging():
        ends = learn.fit_cycles(3, 1, lr=0.1, ends=True)
    plain, both = learn.cycle_paths(ends, n=4), learn.cycle_paths(ends, n=4, train=True)
    names = ['loss_barrier', 'error_barrier', 'loss_line_barrier', 'error_line_barrier', 'instability']
    assert list(plain.df) == names and list(both.df) == names + [f'train_{c}' for c in names]
    for i, p in enumerate(both):
        row = both.df.iloc[i]
        assert row.train_loss_barrier == p.train.barrier.loss
        assert row.train_error_line_barrier == p.train.line_barrier.error
        assert row.train_instability == p.train.instability and row.loss_barrier == plain.df.loss_barrier.iloc[i]
    assert list(both.df.index) == ['1 to 2', '2 to 3']
    table = learn.instability_by_rewind([0], lambda learn, cbs: quietly(learn, learn.fit, 1, 0.1, cbs=cbs), n=2)
    assert {'error_line_barrier', 'loss_line_barrier'} <= {*table}
    with pytest.raises(ValueError, match='error_line_barrier'):
        table.plot('barrier')
