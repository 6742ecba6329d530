"""What recipes and studies do with arguments and with a Learner's past: what is given counts, what does not fit is
refused before a step is trained, and nothing of a study is left behind"""

import random
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, set_seed
from fastai.callback.all import EarlyStoppingCallback, ProgressCallback
from helpers import Tagger
from torch import nn

from fastprune.all import Checkpoint, Distill, Ticket, linear, paper_methods, prunable_weights, sweep
from fastprune.core.names import tied_names
from fastprune.learner.states import load_into
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
