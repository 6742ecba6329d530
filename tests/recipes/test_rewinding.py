"Trainings that start in the middle of another: copies, rewound tickets and rounds train what is left of it"

from functools import partial

import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, SaveModelCallback
from helpers import equal, quietly
from torch import nn

from fastprune.all import SparsifyCallback, Ticket, digits_convnet, digits_dls, one_shot, state_of, window
from fastprune.learner.states import StartAt, StateAt, seed_round, starting_at
from fastprune.recipes.planning import count_steps

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

EPOCHS = 3


def make(model=None, seed=0, bs=128, opt=partial(SGD, mom=0.9), metrics=accuracy):
    torch.manual_seed(seed)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    return Learner(digits_dls(bs=bs), model, loss_func=CrossEntropyLossFlat(), metrics=metrics, opt_func=opt)


def fit(learn, cbs):
    quietly(learn, learn.fit_one_cycle, EPOCHS, 0.1, cbs=cbs)


class Log(Callback):
    "What each optimizer step of each fit is made with"

    order, run_valid = 90, False

    def __init__(self):
        self.fits = []

    def before_train(self):
        if self.epoch == 0:
            self.fits.append([])

    def before_batch(self):
        h = self.opt.hypers[-1]
        self.fits[-1].append(
            (
                self.epoch,
                self.iter,
                self.train_iter,
                round(self.pct_train, 9),
                round(h['lr'], 12),
                round(h['mom'], 12),
                float(self.xb[0].sum()),
            )
        )


def logged(learn, train, cbs=()):
    log = Log()
    learn.add_cb(log)
    train()
    learn.remove_cb(log)
    return [f for f in log.fits if f]


@pytest.mark.sample(2)
@pytest.mark.parametrize('k', [0, 1, 7, 12, 13, 24, 35, 36])
def test_a_training_starts_in_its_middle(k):
    "Positions, rates, momentum and, for equal seeds, batches are those of the whole training"
    learn = make()

    def train(*cbs):
        seed_round(learn, 5)
        fit(learn, list(cbs))

    (whole,) = logged(learn, train)
    rest = logged(learn, lambda: train(StartAt(k)))
    assert len(whole) == 36 and (rest[0] if k < 36 else rest) == whole[k:]
    assert len(learn.recorder.values) == max(1, 3 - k // 12) and 'all_batches' not in learn.__dict__
    assert all(cb.run for cb in learn.cbs)


@pytest.mark.sample(2)
@pytest.mark.parametrize('model', [None, lambda: digits_convnet(widths=(8, 8))], ids=['mlp', 'batchnorm'])
@pytest.mark.parametrize('seeds', [(0, 1), (7, 3)])
def test_no_instability_after_the_last_step(model, seeds):
    learn = make(model and model())
    table = learn.instability_by_rewind([36], fit, seeds=seeds, n=4)
    assert table.error_barrier[0] == table.loss_barrier[0] == table.error_line_barrier[0] == 0
    assert table.instability[0] == table.error[0]


def test_copies_train_the_rest_from_their_step():
    learn, starts = make(), []

    class Starts(Callback):
        order, run_valid = 90, False

        def before_batch(self):
            if self.learn.train_iter in (0, 15):
                starts.append((self.train_iter, state_of(self.learn)))

    learn.add_cb(Starts())
    fits = logged(learn, lambda: learn.instability_by_rewind([15], fit, n=2))
    assert [len(f) for f in fits] == [36, 21, 21]
    assert [[row[:6] for row in f] for f in fits[1:]] == [[row[:6] for row in fits[0][15:]]] * 2  # the same rates,
    assert fits[1][0][6] != fits[2][0][6]  # other batches
    (_, first), (_, parent), *copies = starts
    assert len(copies) == 2 and not torch.equal(first['1.weight'], parent['1.weight'])
    for i, copy in copies:
        assert i == 15 and all(equal(copy[n], t) for n, t in parent.items())


def test_the_copies_errors_are_those_of_trainings_by_hand():
    learn, k = make(), 20
    first = state_of(learn)
    table = learn.instability_by_rewind([k], fit, seeds=((3, 4),), seed=9, n=3)
    at = StateAt(k)
    seed_round(learn, 9)
    learn.opt = None
    fit(learn, [at])
    ends = []
    for seed in (3, 4):
        learn.model.load_state_dict(at.state)
        learn.opt = None
        seed_round(learn, seed)
        fit(learn, [StartAt(k)])
        ends.append(state_of(learn))
    path = learn.linear_path(*ends, n=3)
    assert table.instability[0] == path.instability and table.loss_barrier[0] == path.barrier.loss
    learn.model.load_state_dict(first)
    assert learn.instability(at.state, fit, seeds=(3, 4), n=3, skip=k).instability == path.instability


def test_copies_of_a_training_that_prunes():
    "They go on with the masks, sparsities and plans of their step"
    learn = make()

    def prune(learn, cbs):
        fit(learn, [SparsifyCallback(0.8, schedule=window(one_shot, 0.4), interval=1), *cbs])

    seen = []

    class Look(Callback):
        order, run_valid = 90, False

        def after_batch(self):
            seen.append((self.train_iter, self.learn.masks))

    learn.add_cb(Look())
    table = learn.instability_by_rewind([20, 36], prune, n=3)
    parent, copies = dict(seen[:36]), seen[36:]
    assert sorted(i for i, _ in copies) == sorted([*range(21, 37)] * 2)
    assert all(masks == parent[20] for _, masks in copies) and parent[20].sparsity == pytest.approx(0.8, abs=1e-3)
    assert table.error_barrier[1] == 0 and learn.masks is None


def test_fine_tune_is_one_training():
    from fastai.basics import params

    learn = make(digits_convnet(widths=(8, 8)))
    learn.splitter = lambda m: [params(m[:1]), params(m[1:])]

    def tune(learn, cbs):
        learn.create_opt()
        quietly(learn, learn.fine_tune, EPOCHS, 1e-1, freeze_epochs=1, cbs=cbs)

    assert count_steps(learn, tune) == 48
    fits = logged(learn, lambda: learn.instability_by_rewind([5, 12, 30, 48], tune, n=2))
    assert [len(f) for f in fits] == [12, 36, 7, 36, 7, 36, 36, 36, 18, 18]
    assert learn.instability_by_rewind([48], tune, n=2).loss_barrier[0] == 0


# lottery tickets and rounds


@pytest.mark.sample(2)
@pytest.mark.parametrize('rewind_to, step', [(0, 0), (5, 5), (0.5, 18), ('1 epoch', 12), (36, 36)])
def test_rewound_tickets_train_the_rest(rewind_to, step):
    learn = make()
    fits = logged(learn, lambda: learn.find_tickets(2, fit, prune_rate=0.5, rewind_to=rewind_to))
    assert [len(f) for f in fits] == [36, 36 - step, 36 - step] if step < 36 else [len(f) for f in fits] == [36]
    for f in fits[1:]:
        assert [row[:6] for row in f] == [row[:6] for row in fits[0][step:]]
    assert [t.start for t in learn.tickets] == [0, step, step]
    assert all(t.metrics['accuracy'] > 0 for t in learn.tickets)


def test_a_ticket_remembers_where_it_starts(tmp_path):
    learn = make()
    t = learn.find_tickets(1, fit, rewind_to=30, measure='none')[1]
    t.save(tmp_path / 't')
    again = Ticket.load(tmp_path / 't')
    assert again.start == t.start == again.shuffle().start == again.reinit().start == 30
    fits = logged(learn, lambda: learn.instability(again, fit, n=2))
    assert [len(f) for f in fits] == [6, 6]
    fits = logged(learn, lambda: learn.compare_tickets(again, fit, seeds=(0,)))
    assert [len(f) for f in fits] == [6] * 4
    short = lambda learn, cbs: quietly(learn, learn.fit_one_cycle, 2, 0.1, cbs=cbs)
    for f in (learn.instability, learn.compare_tickets):
        with pytest.raises(ValueError, match='has 24 batches, and 30'):
            f(again, short)
    with pytest.raises(ValueError, match='start=1.5'):
        assert Ticket(t.state, t.masks, start=1.5).start


def test_other_rewinding_trains_whole_rounds():
    for rewind in ('lr', 'finetune'):
        learn = make()
        fits = logged(learn, partial(learn.find_tickets, 1, fit, rewind=rewind))
        assert [len(f) for f in fits] == [36, 36]


def test_rounds_of_iterative_prune_train_the_rest(tmp_path):
    learn = make()
    kw = dict(prune_rate=0.5, lr=0.1, rewind='weights', rewind_to=7, folder=tmp_path)
    go = lambda rounds: quietly(learn, learn.iterative_prune, rounds, EPOCHS, **kw)
    fits = logged(learn, lambda: go(1))
    assert [len(f) for f in fits] == [36, 29] and fits[1][0][4] == fits[0][7][4]
    fits = logged(learn, lambda: go(2))  # stopped rounds go on alike
    assert [len(f) for f in fits] == [29]


def test_trackers_see_only_what_is_trained():
    learn = make()

    def patient(learn, cbs):
        fit(learn, [EarlyStoppingCallback('accuracy', patience=1), SaveModelCallback('accuracy', with_opt=False), *cbs])

    fits = logged(learn, lambda: learn.instability_by_rewind([25], patient, n=2))
    assert [len(f) for f in fits] == [36, 11, 11]


# steps are the optimizer's


@pytest.mark.sample(2)
@pytest.mark.parametrize('n_acc, bs', [(256, 128), (300, 128), (128, 128), (100, 64)])
def test_steps_under_gradient_accumulation(n_acc, bs):
    learn, seen = make(bs=bs), []

    class Steps(Callback):
        order, run_valid = 79, False

        def after_step(self):
            seen.append((self.train_iter, state_of(self.learn)))

    learn.add_cbs([GradientAccumulation(n_acc), Steps()])
    total = count_steps(learn, fit)
    tickets = learn.find_tickets(1, fit, rewind_to=4, measure='none')
    assert len(seen) == total and all(equal(t, seen[3][1][n]) for n, t in tickets[1].state.items())
    assert tickets[1].start == seen[3][0] + 1
    (whole,) = learn.find_tickets(1, fit, rewind_to='1 epoch', measure='none')[1:]
    n = len(learn.dls.train)
    assert whole.start == max(i for i, _ in seen[:total] if i < n) + 1
    assert learn.instability_by_rewind([total], fit, n=2).loss_barrier[0] == 0
    with pytest.raises(ValueError, match=f'which has {total} steps'):
        learn.find_tickets(1, fit, rewind_to=total + 1)
    with pytest.raises(ValueError, match=f'training has {total} steps'):
        learn.instability_by_rewind([total + 1], fit)


def test_accumulation_inside_of_fit_and_in_rounds():
    learn = make()
    inside = lambda learn, cbs: fit(learn, [GradientAccumulation(256), *cbs])
    assert count_steps(learn, inside) == 16
    assert learn.find_tickets(1, inside, rewind_to=4, measure='none')[1].start == 8
    kw = dict(lr=0.1, rewind='weights', cbs=GradientAccumulation(256))
    fits = logged(learn, lambda: quietly(learn, learn.iterative_prune, 1, EPOCHS, rewind_to=4, **kw))
    assert [len(f) for f in fits] == [36, 28]
    with pytest.raises(ValueError, match='has 16 steps'):
        learn.iterative_prune(1, EPOCHS, rewind_to=17, **kw)


@pytest.mark.sample(2)
@pytest.mark.parametrize('k', [7, 23, 30, 46])
def test_the_order_of_data_over_several_fits(learner, fit, k):
    "Epochs that are passed over have their order drawn, also where they are the last ones of a fit"

    def seen(k):
        learn, sums = learner(), []

        class See(Callback):
            def before_batch(self):
                if self.training:
                    sums.append(float(self.xb[0].sum()))

        seed_round(learn, 0)
        cbs = [See(), *starting_at(k)]
        for _ in range(2):
            fit(learn, 1, cbs=cbs)
        return sums

    assert seen(k) == seen(0)[k:]
