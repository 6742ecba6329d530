"Trackers compare epochs from the final sparsity on, and the best epoch comes back with its masks"

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CancelFitException, CancelStepException, CrossEntropyLossFlat, Learner
from fastai.callback.all import (
    EarlyStoppingCallback,
    GradientAccumulation,
    ProgressCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TrackerCallback,
)
from fastai.data.load import DataLoader
from fastai.learner import DataLoaders, Metric
from torch import nn

from fastprune.all import (
    DPF,
    DST,
    GSM,
    STR,
    Checkpoint,
    RigL,
    SparsifyCallback,
    cubic,
    cyclical,
    linear,
    ocp,
    one_shot,
    prunable_weights,
)
from fastprune.learner.states import BestEpoch

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit
EPOCHS, STEPS = 8, 4


class Given(Metric):
    "A metric with a given value for each epoch"

    name = 'given'

    def __init__(self, values):
        self.values = values

    def reset(self):
        pass

    def accumulate(self, learn):
        self.epoch = learn.epoch

    @property
    def value(self):
        return self.values[self.epoch]


class Ends(Callback):
    "The sparsity and the weights at the end of each epoch"

    order = 59  # before trackers

    def before_fit(self):
        self.sparsities, self.states, self.snapshots = [], [], []

    def after_epoch(self):
        self.snapshots.append(self.learn.masks)
        self.sparsities.append(self.learn.masks.sparsity if self.learn.masks else 0.0)
        self.states.append({n: t.clone() for n, t in self.model.state_dict().items()})


def toy(values, path=None, model=None, **kwargs):
    torch.manual_seed(0)
    items = [(torch.randn(20), torch.tensor(i % 4)) for i in range(4 * STEPS)]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items[:8], bs=8))
    model = model or nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 4))
    kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=Given(values), path=path, opt_func=SGD) | kwargs
    learn = Learner(dls, model, **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn


def train(learn, *cbs, n=EPOCHS, **kwargs):
    ends = Ends()
    with learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        learn.fit(n, kwargs.pop('lr', 0.1), cbs=[ends, *cbs], **kwargs)
    return ends


def same(learn, state):
    return all(torch.equal(t, state[n]) for n, t in learn.model.state_dict().items())


def is_exact(learn, sparsity=0.9):
    weights = prunable_weights(learn.model)
    counts = all(int((~m).sum()) == round(sparsity * m.numel()) for m in learn.masks.values())
    return counts and not any(weights[n][~m].any() for n, m in learn.masks.items())


# the best epoch

falling, middle, last = [9, 8, 7, 6, 5, 4, 3, 2], [9, 8, 7, 6, 5, 4, 3, 1], [9, 8, 7, 6, 5, 4, 1, 2]


@pytest.mark.parametrize('values, best', [(middle, 6), (last, 7)], ids=['at 99.9%', 'the last'])
@pytest.mark.parametrize('make', [SaveModelCallback, BestEpoch])
def test_the_best_epoch_at_the_final_sparsity(tmp_path, values, best, make):
    learn = toy(values, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        tracker = make('given')
        ends = train(learn, SparsifyCallback(0.9), tracker)
    assert same(learn, ends.states[best]) and is_exact(learn)
    assert tracker.best == values[best]
    assert ends.sparsities[5] < ends.sparsities[6] == ends.sparsities[7] == learn.masks.sparsity


def test_fits_without_a_tracker_stay_as_they_are(tmp_path):
    plain, saves = toy(falling, tmp_path), toy(falling, tmp_path)
    for learn, cbs in ((plain, []), (saves, [SaveModelCallback('given', every_epoch=True)])):
        ends = train(learn, SparsifyCallback(0.9), *cbs)
        assert 0.899 < ends.sparsities[6] < ends.sparsities[7]
    assert same(saves, ends.states[7]) and same(plain, dict(saves.model.named_parameters()))
    at_end = toy(falling, tmp_path)
    train(at_end, SparsifyCallback(0.9), SaveModelCallback('given', at_end=True))
    assert same(at_end, dict(plain.model.named_parameters()))
    tracked = toy(falling, tmp_path)
    now = train(tracked, SparsifyCallback(0.9), EarlyStoppingCallback('given', patience=9))
    assert same_states(now.states[5], ends.states[5]) and not same_states(now.states[7], ends.states[7])


def same_states(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'schedule, first',
    [(ocp, 6), (linear, 7), (cubic, 7), (one_shot, 0), (cyclical(ocp, 2), 7), (cyclical(one_shot, 2), 0)],
    ids=['ocp', 'linear', 'cubic', 'one_shot', 'cyclical', 'constant cycles'],
)
def test_where_the_ramp_ends(tmp_path, schedule, first):
    seen = []

    class Mine(TrackerCallback):
        def after_epoch(self):
            super().after_epoch()
            seen.append((self.epoch, self.learn.masks.n_kept))

    restart = 'cycl' in str(schedule) and first == 0
    schedule = cyclical(one_shot, 2, restart=1.0) if restart else schedule
    train(toy(falling, tmp_path), SparsifyCallback(0.9, schedule=schedule), Mine('given'))
    assert [e for e, _ in seen] == list(range(first, EPOCHS)) and {n for _, n in seen} == {100 + 20}


def test_few_channels_are_final_before(tmp_path):
    "An epoch with as many channels as at the end is compared, though the schedule asks for 48%, say"
    learn = toy(falling, tmp_path, nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)))
    ends = train(learn, SparsifyCallback(0.5, granularity='channel'), SaveModelCallback('given'))
    first = ends.sparsities.index(ends.sparsities[-1])
    assert first < 6 and same(learn, ends.states[first]) and learn.masks == ends.snapshots[first]


def test_a_short_fit_ends_with_its_last_epoch(tmp_path):
    for n in (1, 2):
        learn = toy(falling, tmp_path)
        ends = train(learn, SparsifyCallback(0.9), SaveModelCallback('given'), n=n)
        assert same(learn, ends.states[-1]) and is_exact(learn)


def test_patience_counts_from_the_final_sparsity(tmp_path):
    learn, stop = toy(falling, tmp_path), EarlyStoppingCallback('given', patience=1)
    assert len(train(learn, SparsifyCallback(0.9), stop).states) == 8 and is_exact(learn)
    learn = toy([*range(20, 0, -1)], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        ends = train(learn, SparsifyCallback(0.9), stop, n=20)
    assert len(ends.states) == 18 and is_exact(learn)  # epoch 16 is the first at 99.9%
    again = train(learn, stop, n=20)  # the masks are fixed: as usual
    assert len(again.states) == 2


def test_rates_are_not_reduced_before(tmp_path):
    learn, rates = toy([*range(20, 0, -1)], tmp_path), []

    class Rates(Callback):
        def before_epoch(self):
            rates.append(self.opt.hypers[-1]['lr'])

    plateau = ReduceLROnPlateau('given', patience=1, factor=2.0)
    train(learn, SparsifyCallback(0.9), plateau, Rates(), n=20)
    assert rates[:18] == [0.1] * 18 and rates[18:] == pytest.approx([0.05, 0.025])


def test_all_trackers_and_the_order_of_callbacks(tmp_path):
    class Early(SaveModelCallback):
        order = 52  # between the Recorder and SparsifyCallback

    learn = toy(middle, tmp_path)
    cbs = [Early('given', fname='early'), SaveModelCallback('given'), EarlyStoppingCallback('given', patience=1)]
    ends = train(learn, *cbs, SparsifyCallback(0.9))
    assert same(learn, ends.states[6]) and is_exact(learn)
    for name in ('early', 'model'):
        learn.load(name)
        assert same(learn, ends.states[6])


# options


def test_best_of_an_earlier_fit_is_of_another_sparsity(tmp_path):
    learn, save = toy([99, *falling[1:]], tmp_path), SaveModelCallback('given', reset_on_fit=False, with_opt=True)
    train(learn, save, n=2)
    assert save.best == 99
    ends = train(learn, SparsifyCallback(0.9), save)
    assert save.best == 3 and same(learn, ends.states[6]) and is_exact(learn)
    learn.metrics[0].values = [4] * 8
    ends = train(learn, SparsifyCallback(0.9), save, n=2)  # starts at the final sparsity
    assert save.best == 4 and same(learn, ends.states[0])


def test_with_fixed_masks_all_epochs_count(tmp_path):
    learn = toy(falling, tmp_path)
    learn.prune(0.9)
    for cbs in ([], [SparsifyCallback(0.9)]):
        ends = train(learn, *cbs, SaveModelCallback('given'), n=3)
        assert same(learn, ends.states[0]) and is_exact(learn)


def test_a_fit_that_ends_before_the_ramp_loads_nothing(tmp_path):
    class Stop(Callback):
        order = 90

        def after_epoch(self):
            if self.epoch == 2:
                raise CancelFitException

    learn = toy(falling, tmp_path)
    train(learn, SaveModelCallback('given'), n=1)  # leaves a file
    with pytest.warns(UserWarning, match='the fit was stopped') as notes:
        ends = train(learn, SparsifyCallback(0.9), SaveModelCallback('given'), Stop())
    assert len(notes) == 1 and same(learn, ends.states[-1]) and learn.masks == ends.snapshots[-1]


def test_in_fine_tune_and_lr_find(tmp_path):
    model = nn.Sequential(nn.Linear(20, 50), nn.Sequential(nn.ReLU(), nn.Linear(50, 4)))
    learn = toy(middle, tmp_path, model, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())])
    ends, save = Ends(), SaveModelCallback('given')
    with learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        learn.fine_tune(EPOCHS, 0.1, cbs=[SparsifyCallback(0.9), save, ends])
    assert same(learn, ends.states[6]) and is_exact(learn)
    learn.add_cb(SaveModelCallback('given'))
    before = dict(learn.model.named_parameters())
    with learn.no_logging(), learn.no_bar():
        learn.lr_find(show_plot=False, num_it=5)
    assert same(learn, before)


# epochs whose last step is skipped


class SkipLast(Callback):
    order = 0

    def before_step(self):
        if self.iter >= self.n_iter - 3:
            raise CancelStepException


@pytest.mark.sample(2)
@pytest.mark.parametrize('method', [SparsifyCallback, GSM, DPF, lambda s: SparsifyCallback(s, criterion=taylor_like)])
@pytest.mark.parametrize('skip', [SkipLast, lambda: GradientAccumulation(16)], ids=['skipped', 'accumulated'])
def test_skipped_steps(tmp_path, skip, method):
    learn = toy(middle, tmp_path, wd=1e-3)
    best = 7 if method is GSM else 6
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'interval=')
        cb = method(0.9)
        if method is DPF:
            cb.scope, cb.schedule = 'local', ocp
        if method is GSM:
            cb.scope = 'local'
        ends = train(learn, cb, skip(), SaveModelCallback('given'))
    assert same(learn, ends.states[best]) and is_exact(learn)


def taylor_like(weights):
    return {n: p.detach().abs() if p.grad is None else (p.detach() * p.grad).abs() for n, p in weights.items()}


# masks that move


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'method, values, best',
    [
        (lambda: RigL(0.9, interval=5, scope='local'), [1, 2, 9, 3, 4, 5, 6, 7], 2),
        (lambda: DPF(0.9, schedule=one_shot, scope='local', interval=1), [1, 2, 9, 3, 4, 5, 6, 7], 2),
        (lambda: STR(0.9, s_init=-7, scope='local'), falling, 7),
        (lambda: DST(), falling, 7),
    ],
    ids=['RigL', 'DPF', 'STR', 'DST'],
)
def test_masks_of_the_best_epoch(tmp_path, method, values, best):
    for make in (SaveModelCallback, BestEpoch):
        learn = toy(values, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            warnings.filterwarnings('ignore', 'DST: thresholds')
            ends = train(learn, method(), make('given'))
        assert same(learn, ends.states[best]) and learn.masks == ends.snapshots[best]
        if best == 2:
            assert learn.masks != ends.snapshots[-1] and learn.masks.sparsity == 0.9


def test_channels_of_the_best_epoch(tmp_path):
    values = [1, 2, 9, 3, 4, 5, 6, 7]
    make = lambda: nn.Sequential(nn.Linear(20, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 4))
    learn = toy(values, tmp_path, make())
    chance = lambda weights: {n: torch.rand_like(p) for n, p in weights.items()}
    pruner = SparsifyCallback(0.5, one_shot, chance, granularity='channel', refresh=True, interval=1)
    ends = train(learn, pruner, SaveModelCallback('given'))
    assert learn.masks == ends.snapshots[2] != ends.snapshots[-1] and same(learn, ends.states[2])
    kept = learn.keep_masks.cut.kept[0]
    assert torch.equal(kept, learn.masks['0.bias']) and int(kept.sum()) == 25
    state = {n: t.clone() for n, t in learn.model.state_dict().items()}
    learn.validate()
    assert all(torch.equal(t, state[n]) for n, t in learn.model.state_dict().items())


# checkpoints


class Crash(Callback):
    order = 300

    def __init__(self, epoch):
        self.at = epoch

    def before_epoch(self):
        if self.epoch == self.at:
            raise RuntimeError('power')


@pytest.mark.parametrize(
    'method, values, epochs',
    [
        (lambda: SparsifyCallback(0.9), middle, (3, 6, 7)),
        (lambda: RigL(0.9, interval=5, scope='local'), [1, 2, 9, 3, 4, 5, 6, 7], (2, 6)),
    ],
    ids=['ocp', 'RigL'],
)
def test_resume(tmp_path, method, values, epochs):
    def run(name, *cbs):
        learn = toy(values, tmp_path / name)
        save = SaveModelCallback('given')
        ends = train(learn, method(), save, EarlyStoppingCallback('given', patience=7), *cbs)
        return learn, save, ends

    whole, save, _ = run('whole')
    for at in epochs:
        part = f'part {at}'
        with pytest.raises(RuntimeError, match='power'):
            run(part, Checkpoint('run'), Crash(at))
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            again, resumed, _ = run(part, Checkpoint('run'))
            done, *_ = run(part, Checkpoint('run'))  # nothing is trained again
        for learn in (again, done):
            assert same(learn, dict(whole.model.named_parameters())) and learn.masks == whole.masks
        assert resumed.best == save.best


def test_a_tracker_belongs_to_the_fit(tmp_path):
    with pytest.raises(RuntimeError, match='power'):
        train(toy(falling, tmp_path), SparsifyCallback(0.9), SaveModelCallback('given'), Checkpoint('run'), Crash(7))
    with pytest.raises(ValueError, match='SaveModelCallback'):
        train(toy(falling, tmp_path), SparsifyCallback(0.9), Checkpoint('run'))


def test_best_is_a_number_from_the_start(tmp_path):
    learn, save = toy(falling, tmp_path), SaveModelCallback('given')
    seen = []

    class Look(Callback):
        order = 90

        def after_epoch(self):
            seen.append((save.new_best, save.best))

    train(learn, SparsifyCallback(0.9), save, Look())
    assert seen == [(False, -np.inf)] * 6 + [(True, 3), (False, 3)]
