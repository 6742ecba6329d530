"""What recipes and studies do with arguments and with a Learner's past: what is given counts, what does not fit is
refused before a step is trained, and nothing of a study is left behind"""

import random
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
    set_seed,
)
from fastai.callback.all import EarlyStoppingCallback, ProgressCallback, SaveModelCallback
from helpers import Tagger
from torch import nn

from fastprune.all import (
    Checkpoint,
    Distill,
    Masks,
    RigL,
    SparsifyCallback,
    Ticket,
    cubic,
    cyclical,
    digits_dls,
    linear,
    paper_methods,
    prunable_weights,
    random_score,
    search_strength,
    sweep,
)
from fastprune.core.names import tied_names
from fastprune.learner.states import load_into, seed_round
from fastprune.recipes import store
from fastprune.recipes.planning import count_steps


def make(model=None, **kwargs):
    set_seed(0)
    items = [(torch.randn(16), torch.tensor(i % 4)) for i in range(32)]
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items[:8], bs=8))
    model = model or nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    return quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs))


def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = lambda *args: None
    return learn


def tagger():
    set_seed(0)
    items = [(torch.randint(0, 24, (5,)), torch.tensor(i % 24)) for i in range(16)]
    return quiet(
        Learner(DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)), Tagger(), nn.CrossEntropyLoss())
    )


def fit(learn, cbs):
    learn.fit(1, cbs=cbs)


class NeverTrained(Callback):
    def before_batch(self):
        raise AssertionError('a batch is trained or evaluated')


def refuses(says, f, learn, *args, **kwargs):
    learn.add_cb(NeverTrained())
    with pytest.raises(ValueError, match=says):
        f(*args, **kwargs)
    learn.remove_cb(NeverTrained)


def test_the_first_rate_is_that_of_the_optimizer_function():
    learn = make(opt_func=partial(SGD, lr=0.1))
    for _ in range(2):
        learn.fit_cycles(1, 1)
        assert max(learn.recorder.lrs) == pytest.approx(0.1)


def test_controls_change_tied_weights_under_all_names():
    learn = tagger()
    ticket = learn.find_tickets(1, fit)[1]
    fresh = ticket.reinit(1)
    learn.load_ticket(fresh)
    assert torch.equal(learn.model.emb.weight, fresh.state['emb.weight'])
    assert not torch.equal(learn.model.emb.weight, ticket.state['emb.weight'])
    assert learn.model.emb.weight is learn.model.out.weight


def test_masks_of_tied_weights_hold_under_all_names_on_a_path():
    set_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    learn = make(model)
    ticket = learn.find_tickets(1, fit, prune_rate=0.5)[1].replace()
    weights = prunable_weights(learn.model)
    assert list(weights) == ['0.weight'] and ticket.end is None
    learn.load_ticket(ticket)
    loss = learn.validate()[0]
    assert learn.linear_path(ticket, ticket, n=2).losses[0] == pytest.approx(loss, rel=1e-5)
    learn.load_ticket(ticket.dense())
    assert (learn.model[2].weight != 0).all()


def test_a_training_that_stops_early_is_on_record():
    learn = make()
    learn.fit(1, 1e-3)
    learn.fit_one_cycle(6, 0.1, cbs=EarlyStoppingCallback(min_delta=9, patience=1))
    assert learn.recorder.epoch == 1
    learn.prune(0.5)
    learn.retrain(1, 'slr')
    assert max(learn.recorder.lrs) > 0.01
    fresh = make()
    fresh.prune(0.5)
    fresh.retrain(5, 'llr', history=[0.1] * 10, cbs=EarlyStoppingCallback(min_delta=9, patience=1))
    fresh.retrain(1, 'llr')  # as the first one, from the history that it had
    assert max(fresh.recorder.lrs) == pytest.approx(0.1, rel=0.2)


def test_the_original_epochs_that_are_given_count_in_each_retraining():
    learn = make()
    learn.fit_one_cycle(3)
    learn.prune(0.8)
    learn.retrain(1, 'llr')
    refuses('which had 3', learn.retrain, learn, 5, 'lrw')
    learn.retrain(5, 'lrw', original_epochs=20)


def test_retraining_after_other_trainings_is_that_of_the_last_own_one():
    learn = make()
    learn.fit_one_cycle(2, 0.1)
    rates = learn._fit_lrs
    learn.prune(0.5)
    learn.instability(None, lambda learn, cbs: learn.fit(1, 1e-5, cbs=cbs))
    assert learn._fit_lrs is rates and learn.opt is None
    learn.retrain(1, 'llr')
    assert max(learn.recorder.lrs) > 0.05
    learn = make()
    learn.find_tickets(1, fit)
    learn.retrain(1, 'llr')


def test_an_interval_without_a_ramp_within_rounds_is_refused():
    learn = make()
    refuses('interval=5: needs a `schedule` within rounds', learn.iterative_prune, learn, 2, 1, interval=5)


def test_metrics_of_training_beside_those_of_validation():
    learn = make()
    learn.recorder.train_metrics = True
    rounds = learn.iterative_prune(1, 1, early_stop=True, monitor='accuracy')
    assert {'accuracy', 'train_accuracy', 'valid_loss', 'train_loss'} <= {*rounds.columns}
    rounds = learn.s_cyc_oracle(1, 1, [0.1], early_stop=True)
    assert 'accuracy' in rounds
    learn = make()
    learn.recorder.train_metrics = True
    learn.fit(1, 0.1)
    assert len(learn.envelope((1,), (1,), 0.5, seeds=0)) == 1


@pytest.mark.parametrize(
    'args, kwargs, says',
    [
        (([0.01, 0.1],), dict(feasible=-0.01), 'feasible=-0.01: needs a number of at least 0'),
        (([0.1, float('nan')],), {}, r'lrs=\[0.1, nan\]: needs positive rates to try'),
        ((0.1,), {}, 'lrs=0.1: needs positive rates to try'),
        (([],), {}, r'lrs=\[\]: needs positive rates to try'),
    ],
)
def test_the_oracle_refuses(args, kwargs, says):
    learn = make()
    refuses(says, learn.s_cyc_oracle, learn, 1, 1, *args, **kwargs)


def test_data_without_targets_are_refused():
    learn = make()
    dl = DataLoader([(x,) for x, _ in learn.dls.valid_ds], bs=8)
    says = 'its batches have no targets: make it by `dls.test_dl'
    refuses(f'test_dl: {says}', learn.iterative_prune, learn, 1, 1, test_dl=dl)
    refuses(f'test_dl: {says}', learn.find_tickets, learn, 1, fit, test_dl=dl)
    refuses(f'dl: {says}', learn.instability, learn, None, fit, dl=dl)
    refuses(f'dl: {says}', learn.instability_by_rewind, learn, [0], fit, dl=dl)


def test_seeds_are_whole_numbers_of_any_kind(tmp_path):
    learn = make()
    ticket = learn.find_tickets(1, fit, seed=np.int64(1), folder=tmp_path)[1]
    says = "seeds=.*'a'.*: needs a whole number, or a list of them"
    refuses(says, learn.compare_tickets, learn, ticket, fit, seeds=(0, 'a'))
    refuses("seeds='a': needs a whole number", learn.instability, learn, None, fit, seeds=(0, 'a'))
    assert len(learn.compare_tickets(ticket, fit, seeds=np.arange(2), kinds=('ticket',))) == 2
    learn.instability(None, fit, seeds=np.arange(2), n=2)
    learn.instability_by_round([ticket], fit, seeds=[(np.int64(0), 1)], n=2)


def test_numbers_of_numpy_are_numbers(tmp_path):
    learn, two = make(), np.int64(2)
    search = partial(learn.find_tickets, 1, fit, prune_rate=np.float32(0.25), rewind_to=two, rewind='weights')
    ticket = search(folder=tmp_path / 'a')[1]
    ticket.reinit(np.int64(1)).save(tmp_path / 'ticket')
    assert Ticket.load(tmp_path / 'ticket').story['rewind_to'] == 2
    assert search(folder=tmp_path / 'a')[1].masks == ticket.masks
    learn.fit(two, cbs=Checkpoint(tmp_path / 'fit.safetensors'))
    rounds = partial(
        learn.iterative_prune, None, np.int64(1), 0.5, sparsity=np.float32(0.5), schedule=linear, interval=two
    )
    assert len(rounds(folder=tmp_path / 'b')) == len(rounds(folder=tmp_path / 'b')) == 2
    learn.find_tickets(1, lambda l, cbs: l.fit(two, cbs=cbs))
    learn.remove_masks()
    learn.fit_cycles(two, np.int64(1))
    learn.fit_cyclical(two, 1, 0.5)
    learn.fit_sculpt(0.8, 0.5, two, 1)
    learn.fit_bimp(np.int64(4), 0.9, np.float64(2))
    learn.retrain(
        np.int64(1), history=[0.1] * 5, discount=np.float64(0.5), lr_scale=np.float64(0.5), warmup=np.float32(0.1)
    )
    paper_methods(np.int64(4), np.float64(0.1), 'ocp')['ocp'](make(), 0.5, 0)


def test_looking_at_a_fit_leaves_the_optimizer_alone():
    learn = make()
    learn.fit(1)
    opt, state = learn.opt, {p: dict(s) for p, s in learn.opt.state.items()}
    assert count_steps(learn, fit) == 4
    assert learn.opt is opt and {p: dict(s) for p, s in opt.state.items()} == state


def test_an_envelope_needs_a_validation_set():
    learn = make()
    learn.fit_one_cycle(2)
    learn.dls = DataLoaders(learn.dls.train, learn.dls.valid.new([]))
    refuses('metric=None: this Learner has no validation set', learn.envelope, learn, (1,), iter((1, 2)), 0.9)


def test_lists_are_lists():
    learn = make()
    refuses('seeds=0: needs two seeds, or pairs', learn.instability_by_rewind, learn, [0], fit, seeds=0)
    refuses('seeds=0: needs two, one for each copy', learn.instability, learn, None, fit, seeds=0)
    refuses('steps=5: needs a list of whole numbers', learn.instability_by_rewind, learn, 5, fit)


def test_an_envelope_finds_what_does_not_fit_before_it_trains():
    learn = make()
    learn.fit_one_cycle(3)
    for says, lengths, kwargs in (
        ("epochs=10: 'lrw' replays the last epochs", (1, 10), dict(schedule='lrw')),
        ("schedule='best' is unknown", (1,), dict(schedule='best')),
        ("params='x': needs", (1,), dict(params='x')),
        ('warmup', (1,), dict(warmup=2)),
    ):
        refuses(says, learn.envelope, learn, (1,), lengths, 0.9, **kwargs)


def test_tickets_that_start_behind_the_end_of_fit_are_refused_at_once():
    learn = make()
    long = lambda learn, cbs: learn.fit(4, cbs=cbs)
    tickets = learn.find_tickets(1, long, rewind='weights', rewind_to=10)
    assert [t.start for t in tickets] == [0, 10]
    refuses('start', learn.instability_by_round, learn, tickets, fit)


def test_instability_of_a_model_with_extra_state():
    class Counter(nn.Module):
        def get_extra_state(self):
            return {'n': 0}

        def set_extra_state(self, state):
            pass

        def forward(self, x):
            return x

    learn = make(nn.Sequential(nn.Linear(16, 4), Counter()))
    assert len(learn.instability(None, fit, n=2).losses) == 2


def test_equal_extra_state_is_not_tied():
    class Counter(nn.Module):
        n = 0

        def get_extra_state(self):
            return self.n

        def set_extra_state(self, state):
            self.n = state

    model = nn.Sequential(Counter(), Counter())
    assert not tied_names(model)
    load_into(Learner(DataLoaders([], []), model, nn.MSELoss()), {'0._extra_state': 3, '1._extra_state': 5})
    assert [m.n for m in model] == [3, 5]


def test_a_sweep_leaves_random_numbers_alone():
    def numbers():
        return np.random.rand(), random.random(), torch.rand(1).item()

    def seed():
        np.random.seed(1), random.seed(1), torch.manual_seed(1)

    seed()
    want = numbers()
    seed()
    sweep(lambda seed: make(), {'none': lambda learn, s, seed: learn.prune(s)}, (0.5,), seeds=(0,), bar=False)
    assert numbers() == want


def test_a_plane_refuses_no_batches():
    learn = make()
    states = [make(nn.Linear(16, 4)).model for _ in range(3)]
    refuses('n_batches=0: needs', learn.plane, learn, *states, bn='recalibrate', n_batches=0)


@pytest.mark.parametrize(
    'loss, kwargs, says',
    [
        ('hint', dict(layers='1', axis=2), "axis=2: loss='hint' has no axis: leave it out"),
        ('logits', dict(multi_label=True), "multi_label=True: loss='logits' has no multi_label"),
    ],
)
def test_distillation_refuses_what_its_loss_does_not_have(loss, kwargs, says):
    with pytest.raises(ValueError, match=says):
        Distill(nn.Linear(1, 1), loss, **kwargs)
    assert Distill(nn.Linear(1, 1), 'soft_target', axis=2, multi_label=True).axis == 2


RECIPES = {
    'fit_cyclical': lambda learn, **kw: learn.fit_cyclical(1, 1, 0.5, **kw),
    'fit_cycles': lambda learn, **kw: learn.fit_cycles(1, 1, **kw),
    'fit_bimp': lambda learn, **kw: learn.fit_bimp(2, 0.5, **kw),
    'fit_sculpt': lambda learn, **kw: learn.fit_sculpt(0.5, 0.3, 1, 1, **kw),
    'iterative_prune': lambda learn, **kw: learn.iterative_prune(1, 1, **kw),
    's_cyc_oracle': lambda learn, **kw: learn.s_cyc_oracle(1, 1, [1e-2], **kw),
    'retrain': lambda learn, **kw: learn.retrain(1, 'llr', **kw),
}


@pytest.mark.parametrize('name', RECIPES)
def test_wrong_callbacks_and_decays_change_nothing(name):
    learn = make()
    if name == 'retrain':
        learn.fit(1)
        learn.prune(0.5)
    learn.opt = None
    before, cbs, held = {n: p.clone() for n, p in learn.model.named_parameters()}, list(learn.cbs), learn.masks
    for o in ('abc', [None], 3):
        refuses('cbs=.*needs a Callback, or a list of them', RECIPES[name], learn, learn, cbs=o)
    for o in ('abc', float('nan'), -1, True, object(), [0.1, 0.1]):
        refuses('wd=.*needs a number of at least 0', RECIPES[name], learn, learn, wd=o)
    assert list(learn.cbs) == cbs and learn.masks == held and learn.opt is None
    assert all(torch.equal(p, before[n]) for n, p in learn.model.named_parameters())


@pytest.mark.parametrize('wd', [np.float32(0.25), torch.tensor(0.25), [0.25]])
def test_decays_of_numpy_and_torch_count(wd):
    learn = make()
    learn.fit_cycles(1, 1, wd=wd, cbs=iter([Callback()]))
    assert learn.opt.hypers[0]['wd'] == 0.25


def test_callbacks_that_are_none_leave_none_behind():
    learn = make()
    before = list(learn.cbs)
    with pytest.raises(AttributeError):
        learn.fit(1, cbs=[SparsifyCallback(0.5), 'x'])
    assert list(learn.cbs) == before and 'sparsify' not in vars(learn)


def test_a_refused_call_leaves_the_optimizer_to_be_chosen():
    learn = make()
    refuses("lr_max='abc'", learn.fit_cyclical, learn, 1, 1, 0.5, lr_max='abc')
    refuses("^scope='abc'", learn.fit_bimp, learn, 2, 0.5, scope='abc')
    refuses("^start_scope='abc'", learn.fit_sculpt, learn, 0.5, 0.3, 1, 1, start_scope='abc')
    learn.opt_func = partial(SGD, mom=0.5)
    learn.fit(1, 1e-2)
    assert learn.opt.hypers[0]['mom'] == 0.5


@pytest.mark.parametrize('wrong', ['abc', [1.0, 2.0], 5, torch.zeros(8, 16)], ids=str)
def test_what_is_no_dataloader_is_refused_first(wrong):
    learn = make()
    for name in ('iterative_prune', 's_cyc_oracle'):
        refuses('test_dl: a .* is no DataLoader', RECIPES[name], learn, learn, test_dl=wrong)
    refuses('test_dl: a .* is no DataLoader', learn.find_tickets, learn, 1, fit, test_dl=wrong)
    refuses('dl: a .* is no DataLoader', learn.instability, learn, None, fit, n=3, dl=wrong)
    refuses('dl: a .* is no DataLoader', learn.sensitivity, learn, dl=wrong)


def test_a_data_set_is_no_dataloader():
    learn = Learner(digits_dls(), nn.Linear(64, 10), CrossEntropyLossFlat())
    refuses('test_dl: a .* is no DataLoader', learn.iterative_prune, learn, 1, 1, test_dl=learn.dls.valid_ds)


def test_metrics_are_checked_before_training():
    learn = make()
    states = learn.model.state_dict(), learn.model.state_dict()
    for wrong in ('accuracy', [3], (m for m in [accuracy])):
        refuses('metrics=.*needs a metric', learn.instability, learn, None, fit, n=3, metrics=wrong)
        refuses('metrics=.*needs a metric', learn.instability_by_rewind, learn, [0], fit, n=3, metrics=wrong)
        refuses('metrics=.*needs a metric', learn.linear_path, learn, *states, 3, metrics=wrong)


def test_lists_may_be_generators():
    learn = make()
    assert list(learn.sensitivity(s for s in (0.5, 0.9)).columns) == [0.0, 0.5, 0.9]
    ticket = learn.find_tickets(1, fit)[1]
    table = learn.compare_tickets(iter([ticket]), fit, 0, kinds=(k for k in ('ticket', 'dense')))
    assert list(table.kind) == ['ticket', 'dense']
    for o in ((), None, 3):
        refuses(r'kinds=.*needs any of ticket', learn.compare_tickets, learn, ticket, fit, 0, kinds=o)
        refuses('sparsities=.*needs a list of sparsities', learn.sensitivity, learn, o)
    for o in (None, 5):
        refuses(f'tickets={o}: needs a Ticket', learn.compare_tickets, learn, o, fit)
        refuses(f'tickets={o}: needs a Ticket', learn.instability_by_round, learn, o, fit)


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(measure='abc'), "measure='abc' is not a function"),
        (dict(ray=True), "ray=True: needs the address"),
        (dict(folder=5), 'folder=5: needs a folder'),
        (dict(sparsities=[]), r'sparsities=\[\]: needs a list with at least one value'),
        (dict(seeds=()), r'seeds=\(\): needs a list with at least one value'),
    ],
)
def test_a_sweep_is_checked_before_its_first_run(wrong, says):
    def never(learn, sparsity, seed):
        raise AssertionError('a run begins')

    with pytest.raises(ValueError, match=says):
        sweep(lambda seed: make(), {'a': never}, **dict(sparsities=[0.5], seeds=[0], bar=False) | wrong)


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(tol='abc'), "tol='abc'"),
        (dict(tol=float('nan')), 'tol=nan'),
        (dict(tol=-1), 'tol=-1'),
        (dict(steps='abc'), "steps='abc'"),
        (dict(steps=2.5), 'steps=2.5'),
        (dict(steps=-3), 'steps=-3'),
        (dict(low='1e-6'), "low='1e-6'"),
        (dict(low=0), 'low=0'),
        (dict(low=2), 'low=2 and high=1'),
    ],
)
def test_a_search_for_a_strength_is_checked_before_it_trains(wrong, says):
    def never(strength):
        raise AssertionError('a training begins')

    with pytest.raises(ValueError, match=says):
        search_strength(never, **dict(sparsity=0.5, low=1e-6, high=1) | wrong)
    with pytest.raises(ValueError, match='train=None is not a function'):
        search_strength(None, 0.5, 1e-6, 1)


def test_seeds_of_numpy_are_seeds():
    learn = make()
    seed = np.int64(3)
    learn.fit(1, 1e-2, cbs=RigL(0.5, seed=seed))
    assert learn.masks == Masks(learn.masks)
    weights = prunable_weights(learn.model)
    assert all(torch.equal(a, b) for a, b in zip(*(random_score(weights, s).values() for s in (3, seed)), strict=True))
    learn.remove_masks()
    assert learn.hessian_spectrum(seed=seed) == learn.hessian_spectrum(seed=3)
    learn.hessian_spectrum(seed=-1)
    for wrong in (1.5, 'x', None, True, 2**70):
        refuses(f'seed={wrong!r}: needs a whole number', learn.hessian_spectrum, learn, seed=wrong)
        refuses('seed=.*whole number', learn.instability_by_rewind, learn, [0], fit, n=3, seed=wrong)
        with pytest.raises(ValueError, match='seed=.*whole number'):
            RigL(0.5, seed=wrong)
        with pytest.raises(ValueError, match='seed=.*whole number'):
            random_score(weights, wrong)


def test_an_interruption_before_skipped_batches_leaves_the_learner_usable():
    class Stops(Callback):
        n = 0

        def before_train(self):
            self.n += 1
            if self.n == 3:
                raise KeyboardInterrupt

    learn = make()
    with pytest.raises(KeyboardInterrupt):
        learn.iterative_prune(1, 2, lr=1e-2, rewind='weights', rewind_to=2, cbs=Stops())
    assert 'all_batches' not in vars(learn)
    learn.validate()
    learn.fit(1)


def channels(**kwargs):
    return SparsifyCallback(0.5, schedule=cyclical(cubic, 2), granularity='channel', **kwargs)


def test_copies_of_a_training_have_the_values_of_cut_channels(monkeypatch):
    "With the seed of the training, a copy from any step ends where the training ends"
    learn = make(opt_func=partial(SGD, mom=0.0), wd=0.0)
    train = lambda learn, cbs: learn.fit(3, 0.3, cbs=[channels(), *cbs])
    losses, path = [], Learner.linear_path
    monkeypatch.setattr(Learner, 'linear_path', lambda *a, **kw: losses.append((p := path(*a, **kw)).losses) or p)
    learn.instability_by_rewind([0, 2, 7, 11], train, seeds=(0, 0), n=2, seed=0)
    assert len({float(x) for both in losses for x in both}) == 1


def test_copies_of_a_pruned_learner_start_from_its_own_channels():
    learn = make(opt_func=partial(SGD, mom=0.0), wd=0.0)
    learn.fit(1, 0.3)
    learn.prune(0.5, granularity='channel')
    train = lambda learn, cbs: learn.fit(3, 0.3, cbs=[channels(initial=None), *cbs])
    path = learn.instability(None, train, seeds=(0, 0), n=2)
    seed_round(learn, 0)
    learn.opt = None
    train(learn, [])
    assert path.losses[0] == pytest.approx(float(learn.validate()[0]), rel=1e-6)


def test_rows_are_of_the_epoch_that_is_loaded(tmp_path):
    learn = make(path=tmp_path)
    table = learn.iterative_prune(1, 4, lr=0.3, cbs=SaveModelCallback(monitor='accuracy'))
    assert table.accuracy.iloc[-1] == pytest.approx(float(learn.validate()[1]))
    assert table.valid_loss.iloc[-1] == pytest.approx(float(learn.validate()[0]), rel=1e-5)


def test_trackers_of_the_learner_leave_measurements_alone():
    learn = make(cbs=EarlyStoppingCallback(monitor='accuracy', patience=5))
    table = learn.iterative_prune(1, 1, lr=1e-2, test_dl=learn.dls.valid)
    assert table.test_accuracy.iloc[-1] == pytest.approx(table.accuracy.iloc[-1])
    learn.iterative_prune(1, 1, lr=1e-2, train_first=False, rewind='lr')
    make_tracked = lambda seed: make(cbs=EarlyStoppingCallback(monitor='accuracy', patience=5))
    assert len(sweep(make_tracked, {'a': lambda learn, s, seed: learn.fit(1)}, [0.5], [0], bar=False)) == 1


def test_the_oracle_leaves_the_rates_of_its_best_training():
    learn = make()
    best = learn.s_cyc_oracle(1, 1, [1e-2, 1e-6]).max_lr.iloc[-1]
    assert max(learn._fit_lrs) == pytest.approx(best)


def test_a_round_that_cannot_be_written_gives_the_first_weights_back(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    learn = make()
    first = {n: p.clone() for n, p in learn.model.named_parameters()}
    with monkeypatch.context() as m:
        m.setattr(store, 'save_state', failing)
        with pytest.raises(OSError):
            learn.iterative_prune(1, 1, lr=1e-2, folder=tmp_path)
    assert all(torch.equal(p, first[n]) for n, p in learn.model.named_parameters())
    again = learn.iterative_prune(1, 1, lr=1e-2, folder=tmp_path)
    whole = make().iterative_prune(1, 1, lr=1e-2)
    assert list(again.valid_loss) == list(whole.valid_loss)


class Carries(nn.Module):
    "A recurrent network that goes on from batch to batch"

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 4)

    def reset(self):
        self.hidden = None

    def forward(self, x):
        y, hidden = self.rnn(x[:, None], self.hidden)
        self.hidden = hidden.detach()
        return self.out(y[:, 0])


def test_the_memory_for_batches_changes_no_number():
    learn = make(Carries())
    learn.dls.valid = DataLoader(list(learn.dls.valid_ds) * 4, bs=8)
    a, b = learn.model.state_dict(), {n: t + 1 for n, t in learn.model.state_dict().items()}
    few, many = (learn.linear_path(a, b, 3, memory=m) for m in (0, 2**30))
    assert list(few.losses) == list(many.losses)
    assert many.losses[0] == pytest.approx(float(learn.validate()[0]), rel=1e-5)


def test_the_hessian_of_some_batches_is_a_mean_over_their_items():
    class EverySecond(Callback):
        def before_batch(self):
            if self.iter % 2:
                raise CancelBatchException

    learn = make()
    batches = list(learn.dls.train)
    learn.dls.train = batches  # in the same order at each pass
    whole = make()
    whole.model.load_state_dict(learn.model.state_dict())
    whole.dls.train = batches[::2]
    learn.add_cb(EverySecond())
    assert learn.hessian_spectrum(n_batches=None) == pytest.approx(whole.hessian_spectrum(n_batches=None), rel=1e-2)
