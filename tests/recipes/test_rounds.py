"What all procedures with rounds can do: one engine, so what one of them has, the others have, too"

import inspect
import itertools
import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy
from fastai.metrics import AvgMetric, top_k_accuracy
from helpers import equal, quietly
from torch import nn

from fastprune.all import (
    SparsifyCallback,
    cubic,
    cyclical,
    digits_dls,
    grasp,
    large_init_large_final,
    linear,
    lr_constant,
    lr_rounds,
    movement,
    prunable_weights,
    s_cyc_max_lr,
    state_of,
    window,
)
from fastprune.core.protocol import needs
from fastprune.recipes.round_training import REWINDS
from fastprune.schedules.rates import at_prune_rate

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

SC = partial(s_cyc_max_lr, eps=0.05, delta=0.1)


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    loss = CrossEntropyLossFlat()
    return Learner(digits_dls(bs=256), model, loss_func=loss, metrics=accuracy, opt_func=partial(SGD, mom=0.9))


def fit(learn, cbs, lr=0.1, epochs=1):
    quietly(learn, learn.fit, epochs, lr, cbs=cbs)


def tickets(learn, rounds, **kwargs):
    return learn.find_tickets(rounds, fit, measure='none', **kwargs)


def table(learn, rounds, **kwargs):
    return quietly(learn, learn.iterative_prune, rounds, 1, **{'lr': 0.1, **kwargs})


def oracle(learn, rounds, **kwargs):
    return quietly(learn, learn.s_cyc_oracle, rounds, 1, [0.05, 0.1], **kwargs)


def kept(found):
    return found.weights.tolist() if hasattr(found, 'weights') else [t.masks.n_kept for t in found]


def size(learn):
    return {n: p.numel() for n, p in prunable_weights(learn.model).items()}


class Steps(Callback):
    "The masks' sparsity after each step of each fit, and the rate"

    order = 96

    def __init__(self):
        self.fits, self.lrs, self.epochs = [], [], []

    def before_train(self):
        if self.epoch == 0:
            self.fits.append([])
            self.lrs.append([])
        self.epochs.append(len(self.fits))

    def after_batch(self):
        if self.training:
            self.fits[-1].append(self.learn.masks.sparsity if self.learn.masks else 0.0)
            self.lrs[-1].append(self.opt.hypers[-1]['lr'])


# A target


@pytest.mark.sample(2)
@pytest.mark.parametrize('search', [tickets, table, oracle])
@pytest.mark.parametrize('kw', [dict(), dict(scope='local'), dict(schedule=linear)], ids=['plain', 'local', 'schedule'])
def test_rounds_end_exactly_at_a_target(search, kw):
    learn = make()
    found = search(learn, None, prune_rate=0.5, sparsity=0.9, **kw)
    n = size(learn)
    for name, s in zip(range(5), (0, 0.5, 0.75, 0.875, 0.9), strict=True):
        local = sum(k - round(s * k) for k in n.values())
        assert kept(found)[name] == (
            local if kw.get('scope') == 'local' else sum(n.values()) - round(s * sum(n.values()))
        )
    assert len(found) == 5 and learn.masks.n_kept == kept(found)[-1]


@pytest.mark.parametrize(
    'p, s, rounds', [(0.2, 0.2, 1), (0.2, 0.36, 2), (0.2, 0.488, 3), (0.2, 0.49, 4), (0.6, 0.05, 1)]
)
def test_no_more_rounds_than_it_takes(p, s, rounds):
    assert len(table(make(), None, prune_rate=p, sparsity=s, train_first=False)) == rounds + 1


def test_a_target_of_a_network_that_is_sparse_already():
    learn = make()
    learn.prune(0.6, scope='global')
    found = table(learn, None, prune_rate=0.5, sparsity=0.85)
    assert np.allclose(found.sparsity, [0.6, 0.8, 0.85], atol=1e-3)
    assert kept(found)[-1] == 2220 - round(0.85 * 2220)
    with pytest.raises(ValueError, match='sparsity=0.5: the Learner is 85% sparse already'):
        table(learn, None, sparsity=0.5)
    assert len(tickets(learn, None, prune_rate=0.5, sparsity=0.5)) == 2  # a search for tickets starts dense


@pytest.mark.parametrize('search', [tickets, table])
@pytest.mark.parametrize(
    'rounds, kw, says',
    [
        (None, {}, 'rounds=None: needs a number of rounds, or the final `sparsity`'),
        (3, dict(sparsity=0.9), 'rounds=3, sparsity=0.9: needs one of the two'),
        (None, dict(sparsity=90), 'did you mean 0.9'),
        (None, dict(sparsity=0), 'sparsity=0: needs more than 0'),
        (None, dict(sparsity=0.999, scope='local'), "would leave no weight of the 300 in '3.weight'"),
        (3, dict(prune_rate=1.0), r'prune_rate=1.0: needs the fraction of the remaining weights'),
        (3, dict(recover='alive'), "recover='alive': needs True or False without a `schedule`"),
        (3, dict(track=True), 'track=True: needs a `schedule` within rounds'),
        (3, dict(max_lr=lambda m: 0.1 - 0.1 * m), 'it is 0.0 for round 1'),
        (3, dict(monitor='acc'), "monitor='acc' is not measured"),
        (3, dict(patience=0), 'patience=0'),
        (3, dict(rewind='weights', rewind_to='9 epochs'), 'is past the end of a round, which has 6 steps'),
        (3, dict(seed=0.5), 'seed=0.5: needs a whole number'),
    ],
)
def test_both_check_the_same(search, rounds, kw, says):
    learn = make()
    before = state_of(learn)
    fit_at = lambda learn, cbs, lr=0.1: fit(learn, cbs, lr)
    with pytest.raises(ValueError, match=says):
        learn.find_tickets(rounds, fit_at, **kw) if search is tickets else search(learn, rounds, **kw)
    assert all(equal(t, before[n]) for n, t in learn.model.state_dict().items())
    for name in ('initial', 'nothing'):
        with pytest.raises(TypeError, match=f'no argument {name!r}'):
            search(learn, 1, **{name: 0.1})


@pytest.mark.parametrize(
    'search, kw',
    [
        (tickets, dict(early_stop=True)),
        (table, dict(patience=1)),
        (table, dict(train_first=False)),
        (oracle, dict(monitor='accuracy')),
    ],
)
def test_what_needs_a_validation_set_says_so(search, kw):
    learn = make()
    learn.dls = DataLoaders(learn.dls.train, learn.dls.valid.new([]))
    before = state_of(learn)
    with pytest.raises(ValueError, match='needs a validation set, and this Learner has none'):
        search(learn, 1, **kw)
    assert all(equal(t, before[n]) for n, t in learn.model.state_dict().items())
    if 'train_first' not in kw:
        search(learn, 1, **{**kw, 'monitor': 'train_loss'})  # the remedy


@pytest.mark.parametrize('search', [tickets, table])
def test_a_criterion_has_its_own_number_of_batches(search):
    seen = []

    @needs('n_batches')
    def counts(weights, n_batches=None):
        seen.append(n_batches)
        return {n: p.detach().abs() for n, p in weights.items()}

    search(make(), 1, criterion=counts)
    assert set(seen) == {None}
    search(make(), 1, criterion=counts, n_batches=3)
    assert seen[-1] == 3
    search(make(), 1, criterion=partial(grasp, per_class=2))
    learn = make()
    with pytest.raises(ValueError, match='per_class=2 and n_batches=3: give one of them'):
        search(learn, 1, criterion=partial(grasp, per_class=2), n_batches=3)
    assert not learn.opt  # nothing has been trained


# A schedule inside of rounds


@pytest.mark.parametrize('search', [tickets, table, oracle])
def test_rounds_prune_while_they_train(search):
    learn, steps = make(), Steps()
    learn.add_cb(steps)
    found = search(learn, 2, prune_rate=0.5, schedule=linear, interval=1)
    fits = [f for f in steps.fits if f]
    first, second = (fits[0], fits[1]) if search is tickets else (fits[-3], fits[-1]) if search is oracle else fits[1:]
    for steps, (begin, end) in ((first, (0, 0.5)), (second, (0.5, 0.75))):
        assert np.allclose(steps, begin + (end - begin) * np.arange(1, 7) / 6, atol=1e-3)
    assert kept(found) == [2220 - round(s * 2220) for s in (0, 0.5, 0.75)]


@pytest.mark.parametrize('search', [tickets, table])
def test_rounds_take_all_arguments_of_the_callback(search, monkeypatch):
    made = []
    new = SparsifyCallback.__init__

    def init(self, *args, **kwargs):
        made.append(kwargs)
        new(self, *args, **kwargs)

    init.__signature__ = inspect.signature(new)
    monkeypatch.setattr(SparsifyCallback, '__init__', init)
    learn = make()
    search(learn, 1, prune_rate=0.5, schedule=linear, interval=2, refresh=True, track=True, recover='alive')
    assert any(
        kw.get('interval') == 2 and kw.get('refresh') and kw.get('track') and kw.get('recover') == 'alive'
        for kw in made
    )
    assert learn.masks.n_kept == 1110


@pytest.mark.parametrize('kw', [dict(), dict(rewind='weights'), dict(rewind='weights', rewind_to=3, train_first=True)])
def test_masks_of_scheduled_rounds_are_nested(kw):
    learn, seen = make(), []

    class See(Callback):
        order = 97

        def after_train(self):
            if self.learn.masks:
                seen.append(self.learn.masks)

    learn.add_cb(See())
    table(learn, 3, prune_rate=0.4, schedule=linear, **kw)
    assert len(seen) == 3
    for a, b in itertools.pairwise(seen):
        assert all(not (b[n] & ~a[n]).any() for n in a)


# Early stopping, test sets, rates, rewinding


@pytest.mark.sample(2)
@pytest.mark.parametrize('within', [False, True])
@pytest.mark.parametrize('search', ['tickets', 'table'])
def test_a_round_ends_at_its_best_epoch(search, within):
    "With a schedule inside, among those epochs that are at the round's sparsity"
    learn, seen = make(), []

    class Losses(Callback):
        order = 97

        def after_epoch(self):
            if self.learn.masks:
                seen.append((self.learn.masks.sparsity, self.recorder.values[-1][1]))

    def train(learn, cbs):
        fit(learn, cbs, 0.5, 4)

    kw = dict(prune_rate=0.5, early_stop=True, test_dl=learn.dls.valid)
    if within:
        kw['schedule'] = window(linear, 0, 0.5)
    learn.add_cb(Losses())
    if search == 'tickets':
        found = learn.find_tickets(1, train, rewind='lr', **kw)
        row = found[-1].metrics
    else:
        row = quietly(learn, learn.iterative_prune, 1, 4, lr=0.5, shape=lr_constant, **kw).iloc[-1]
    full = [loss for s, loss in seen if s >= 0.5 - 1e-3]
    losses = full[-4:] if search == 'tickets' or not within else full
    assert row['valid_loss'] == min(losses)
    assert row['test_loss'] == pytest.approx(row['valid_loss'], abs=1e-5)
    assert row['test_accuracy'] == pytest.approx(row['accuracy'], abs=1e-5)


def test_patience_stops_a_round_of_a_search_for_tickets():
    learn, steps = make(), Steps()
    learn.add_cb(steps)
    learn.find_tickets(1, partial(fit, lr=1e-9, epochs=6), measure='none', patience=1, monitor='accuracy')
    assert steps.epochs.count(len(steps.fits)) == 2  # the first epoch, and one that is no better


def test_a_number_for_the_largest_rate_of_tickets():
    learn, used = make(), []

    def train(learn, cbs, lr):
        used.append(lr)
        fit(learn, cbs, lr)

    learn.find_tickets(1, train, max_lr=0.07, measure='none')
    assert set(used) == {0.07}


@pytest.mark.parametrize('rewind_to, steps', [(3, 3), (0.5, 6), ('1 epoch', 6)])
def test_rounds_rewind_to_fractions_and_epochs(rewind_to, steps):
    learn, seen = make(), Steps()
    learn.add_cb(seen)
    quietly(learn, learn.iterative_prune, 1, 2, lr=0.1, rewind='weights', rewind_to=rewind_to)
    assert [len(f) for f in seen.fits] == [12, 12 - steps]


def test_any_function_with_a_free_p_gets_the_rate_of_rounds():
    def mine(m, p=0.2):
        return s_cyc_max_lr(m, 0.05, 0.1, p=p)

    want = [s_cyc_max_lr(m, 0.05, 0.1, p=0.5) for m in range(4)]
    for f in (mine, SC, partial(partial(s_cyc_max_lr, eps=0.05), delta=0.1)):
        assert list(table(make(), 3, prune_rate=0.5, max_lr=f).max_lr) == want
        assert [s(0) for s in lr_rounds(lr_constant, f, 4, prune_rate=0.5)] == want
    for f in (partial(mine, p=0.3), lambda p: 0.1, lambda m, *, p: 0.1, 0.1):
        assert at_prune_rate(f, 0.5) is f


# Names


def test_old_names_warn():
    learn = make()
    with pytest.warns(FutureWarning, match="iterative_prune: 'rate' is now called 'prune_rate'"):
        old = table(learn, 1, rate=0.5)
    assert np.array_equal(old.values, table(make(), 1, prune_rate=0.5).values)
    with pytest.warns(FutureWarning, match="s_cyc_oracle: 'rate' is now called"):
        oracle(make(), 1, rate=0.5)
    with pytest.warns(FutureWarning, match='fit_cyclic is now called fit_cycles'):
        ends = quietly(learn, learn.fit_cyclic, 2, 1, lr=0.1, ends=True)
    assert len(ends) == 2
    with pytest.warns(FutureWarning, match="'rate' is now called"):
        assert at_prune_rate(SC, rate=0.5).keywords['p'] == 0.5
    with pytest.raises(TypeError, match="use 'prune_rate' alone"):
        table(learn, 1, rate=0.5, prune_rate=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error', FutureWarning)
        table(make(), 1, prune_rate=0.5)
        quietly(learn, learn.fit_cycles, 1, 1, lr=0.1)


def test_the_ways_to_rewind_exist_once():
    import fastprune.recipes.iterative as a
    import fastprune.recipes.lottery as b

    assert sorted(REWINDS) == ['finetune', 'lr', 'weights']
    assert not {'REWIND', 'REWINDS'} & {*a.__all__, *b.__all__}


# Folders


class Crash(Callback):
    "Ends the search after two rounds, in the middle of the third training"

    order = 97

    def __init__(self, rounds=2):
        self.rounds = rounds

    def after_batch(self):
        done = getattr(self.learn, 'tickets', None) or getattr(self.learn, 'rounds', ())
        if len(done) == self.rounds and self.train_iter > 2:
            raise InterruptedError('stopped')


@pytest.mark.sample(2)
@pytest.mark.parametrize('search', [tickets, table, oracle])
@pytest.mark.parametrize(
    'kw',
    [dict(), dict(schedule=linear, rewind='weights'), dict(early_stop=True)],
    ids=['plain', 'schedule', 'early stop'],
)
def test_a_search_to_a_target_goes_on(tmp_path, search, kw):
    kw = dict(prune_rate=0.5, sparsity=0.9, **kw)
    want = search(make(), None, **kw)
    for same in (False, True):
        learn = make()
        learn.add_cb(Crash())
        with pytest.raises(InterruptedError):
            search(learn, None, folder=tmp_path / str(same), **kw)
        learn.remove_cb(Crash)
        learn = learn if same else make()
        again = search(learn, None, folder=tmp_path / str(same), **kw)
        assert kept(again) == kept(want)
        if search is tickets:
            assert [t.masks for t in again] == [t.masks for t in want]
        else:
            assert np.array_equal(again.values, want.values)
        assert kept(search(learn, None, folder=tmp_path / str(same), **kw)) == kept(want)
    with pytest.raises(ValueError, match='sparsity was 0.9 there, and is 0.8 now'):
        search(make(), None, folder=tmp_path / 'False', **{**kw, 'sparsity': 0.8})


@pytest.mark.parametrize('search', [table, oracle])
def test_the_first_round_begins_again_with_the_first_weights(tmp_path, search):
    "In the same Learner, which has trained a part of that round"

    def sparse():
        learn = make()
        learn.prune(0.3)
        return learn

    want = search(sparse(), 2, rewind='weights')
    learn = sparse()
    before, masks = state_of(learn), learn.masks
    with pytest.raises(InterruptedError):
        search(learn, 2, rewind='weights', folder=tmp_path, cbs=Crash(0))
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items()) and learn.masks == masks
    again = search(learn, 2, rewind='weights', folder=tmp_path)
    assert np.array_equal(again.values, want.values)
    assert np.array_equal(search(sparse(), 2, rewind='weights', folder=tmp_path).values, want.values)


@pytest.mark.parametrize('search', [table, oracle])
def test_channels_that_may_come_back_go_on_to_the_same_table(tmp_path, search):
    def net():
        learn = make()
        torch.manual_seed(1)
        learn.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10)
        )
        return learn

    kw = dict(granularity='channel', recover=True, prune_rate=0.4)
    whole, learn, again = net(), net(), net()
    want = search(whole, 3, **kw)
    learn.add_cb(Crash())
    with pytest.raises(InterruptedError):
        search(learn, 3, folder=tmp_path, **kw)
    assert np.array_equal(search(again, 3, folder=tmp_path, **kw).values, want.values)
    assert again.masks == whole.masks


def test_rates_of_the_oracle_start_alike():
    "Also with channels that come back within a training, so that their order does not count"

    def chosen(lrs):
        learn = make()
        kw = dict(granularity='channel', recover=True, schedule=cyclical(cubic, 2), monitor='valid_loss')
        quietly(learn, learn.s_cyc_oracle, 2, 1, lrs, **kw)
        return learn.rounds.drop(columns=['feasible_min', 'feasible_max'], errors='ignore').values

    assert np.array_equal(chosen([0.05, 0.1]), chosen([0.1, 0.05]))


@pytest.mark.parametrize('search', [tickets, table])
def test_criteria_of_a_training_are_refused_before_it(search):
    for criterion, what in ((large_init_large_final, 'initial'), (movement, 'initial|previous')):
        learn = make()
        before = state_of(learn)
        with pytest.raises(ValueError, match=f'asks for `({what})`.*use a `schedule` within rounds'):
            search(learn, 1, criterion=criterion)
        assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
    assert len(kept(search(make(), 1, criterion=movement, schedule=linear))) == 2


def test_metrics_of_classes_and_of_one_name():
    "Those that are not one number are left out, and the second of a name has a number"

    class Each(AvgMetric):
        value = property(lambda self: np.ones(3))

    learn = make()
    learn.metrics = [Each(accuracy), accuracy, partial(top_k_accuracy, k=1), top_k_accuracy]
    df = table(learn, 1, test_dl=learn.dls.valid)
    assert 'accuracy' not in df.columns and (df.accuracy_2 == df.test_accuracy_2).all()
    assert (df.top_k_accuracy == df.accuracy_2).all() and (df.top_k_accuracy_2 > df.top_k_accuracy).all()


NEW = dict(
    tickets=('sparsity', 'monitor', 'early_stop', 'patience', 'test_dl', 'options'),
    table=('sparsity', 'schedule', 'progress', 'interval', 'options'),
    oracle=('sparsity', 'schedule', 'progress', 'interval', 'options'),
)


@pytest.mark.sample(2)
@pytest.mark.parametrize('search', [tickets, table, oracle])
def test_a_folder_of_the_version_before_goes_on(tmp_path, search):
    want = search(make(), 3, prune_rate=0.5)
    search(make(), 1, prune_rate=0.5, folder=tmp_path)
    path = tmp_path / 'rounds.json'
    old = json.loads(path.read_text())
    for name in NEW[search.__name__]:
        del old['config'][name]
    if search is not tickets:
        old['config']['rate'] = old['config'].pop('prune_rate')
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match='prune_rate was 0.5 there, and is 0.4 now'):
        search(make(), 3, prune_rate=0.4, folder=tmp_path)
    with pytest.raises(ValueError, match='interval was None there, and is 2 now|schedule was'):
        search(make(), 3, prune_rate=0.5, folder=tmp_path, schedule=linear, interval=2)
    again = search(make(), 3, prune_rate=0.5, folder=tmp_path)
    assert kept(again) == kept(want)
    del old['config']['criterion']
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match='another version of fastprune wrote it: it does not record criterion'):
        search(make(), 3, prune_rate=0.5, folder=tmp_path)


@pytest.mark.parametrize('search', [table, oracle])
def test_masks_of_an_earlier_run_are_not_taken_over(tmp_path, search):
    "A dense round 0, in a folder where a run has left files and no table"
    want = search(make(), 2, prune_rate=0.5)
    search(make(), 2, prune_rate=0.5, folder=tmp_path)
    (tmp_path / 'rounds.json').unlink()
    (old,) = tmp_path.glob('masks*1.safetensors')
    (stale := tmp_path / old.name.replace('1.', '0.')).write_bytes(old.read_bytes())
    search(make(), 1, prune_rate=0.5, folder=tmp_path)
    again = search(make(), 2, prune_rate=0.5, folder=tmp_path)
    assert not stale.exists() and kept(again) == kept(want)
