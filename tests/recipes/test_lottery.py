import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy, error_rate
from helpers import equal, quietly, text_learner
from processes import python
from torch import nn

from fastprune.all import (
    LinearPath,
    Masks,
    Ticket,
    Tickets,
    digits_convnet,
    digits_dls,
    ocp,
    prunable_weights,
    s_cyc_max_lr,
    state_of,
    taylor,
)
from fastprune.learner.states import load_into, seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

here = Path(__file__).parent


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))


def convnet():
    return digits_convnet(widths=(8, 8))


def make(model=mlp, seed=0, metrics=accuracy):
    torch.manual_seed(seed)
    return Learner(
        digits_dls(bs=256), model(), loss_func=CrossEntropyLossFlat(), metrics=metrics, opt_func=partial(SGD, mom=0.9)
    )


def fit(learn, cbs):
    quietly(learn, learn.fit_one_cycle, 2, 0.1, cbs=cbs)


class States(Callback):
    "The state after each step of the first fit, and at the start of each"

    order = 96

    def __init__(self):
        self.steps, self.starts = [], []

    def before_train(self):
        if self.epoch == 0:
            self.starts.append(state_of(self.learn))

    def after_batch(self):
        if self.training and len(self.starts) == 1:
            self.steps.append(state_of(self.learn))


@pytest.mark.sample(2)
@pytest.mark.parametrize('model', [mlp, convnet])
@pytest.mark.parametrize('rewind_to, step', [(0, 0), (3, 3), (0.5, 6), ('1 epoch', 6), (12, 12)])
def test_weights_rewind_to_the_bit(model, rewind_to, step):
    learn, states = make(model), States()
    first = state_of(learn)
    learn.add_cb(states)
    tickets = learn.find_tickets(3, fit, prune_rate=0.5, rewind_to=rewind_to)
    want = first if step == 0 else states.steps[step - 1]
    assert all(equal(tickets[0].state[n], first[n]) for n in first)
    for m in (1, 2, 3):
        t, start = tickets[m], states.starts[m]
        assert all(equal(t.state[n], want[n]) for n in want)
        for n, x in start.items():
            assert equal(x, want[n].cpu() * t.masks[n].cpu() if n in t.masks else want[n]), (m, n)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(scope='local'),
        dict(schedule=ocp),
        dict(rewind='lr'),
        dict(rewind='finetune'),
        dict(criterion=taylor, n_batches=2),
        dict(rewind='lr', schedule=ocp, scope='local'),
    ],
)
def test_sparsity_is_the_formula_and_masks_are_nested(kw):
    learn = make()
    tickets = learn.find_tickets(4, fit, prune_rate=0.3, measure='none', **kw)
    sizes = {n: p.numel() for n, p in prunable_weights(learn.model).items()}
    for m, t in enumerate(tickets):
        s = 1 - 0.7**m
        if kw.get('scope') == 'local':
            assert all(int((~t.masks[n]).sum()) == round(s * k) for n, k in sizes.items())
        else:
            assert t.masks.n_kept == sum(sizes.values()) - round(s * sum(sizes.values()))
        if m:
            assert all(not (t.masks[n] & ~tickets[m - 1].masks[n]).any() for n in sizes)
    assert (
        learn.masks == tickets[-1].masks
        and Masks.from_zeros(prunable_weights(learn.model)).n_kept <= learn.masks.n_kept
    )


def test_what_is_measured():
    trainings = []

    def counted(learn, cbs):
        trainings.append(1)
        fit(learn, cbs)

    for kw, n, rows in (
        (dict(), 1 + 3 + 1, [0, 1, 2, 3]),
        (dict(measure='none'), 1 + 3, [0, 1, 2]),
        (dict(schedule=ocp), 1 + 3 + 1, [3]),
        (dict(schedule=ocp, measure='all'), 1 + 3 + 4, [0, 1, 2, 3]),
    ):
        trainings.clear()
        tickets = make().find_tickets(3, counted, **kw)
        assert len(trainings) == n and [m for m, t in enumerate(tickets) if t.metrics] == rows
    df = tickets.df
    assert (
        list(df.columns) == ['round', 'seed', 'sparsity', 'weights', 'train_loss', 'valid_loss', 'accuracy']
        and len(df) == 4
    )
    with pytest.raises(ValueError, match="metric='acc' was not measured"):
        tickets.plot('acc')


def test_metrics_are_those_of_training_the_ticket_again():
    learn = make()
    tickets = learn.find_tickets(2, fit, prune_rate=0.5, seed=5, ends=True)
    for m in (1, 2):
        learn.load_ticket(tickets[m])
        seed_round(learn, 5 + m)
        fit(learn, [])
        assert learn.recorder.values[-1][2] == pytest.approx(tickets[m].metrics['accuracy'], abs=1e-9)
        assert all(equal(x, tickets[m].end[n]) for n, x in learn.model.state_dict().items())


def test_rate_of_each_round_and_the_last_rate():
    seen = []

    class Rates(Callback):
        order = 99

        def before_step(self):
            seen.append(self.opt.hypers[-1]['lr'])

    def at(learn, cbs, lr):
        quietly(learn, learn.fit, 1, lr, cbs=[*cbs, Rates()])

    make().find_tickets(2, at, prune_rate=0.5, max_lr=partial(s_cyc_max_lr, eps=0.1, delta=0.1, p=0.5))
    assert np.allclose(seen[::6], [s_cyc_max_lr(m, 0.1, 0.1, p=0.5) for m in range(3)])
    seen.clear()
    make().find_tickets(
        2, lambda learn, cbs: quietly(learn, learn.fit_one_cycle, 1, 0.1, cbs=[*cbs, Rates()]), rewind='finetune'
    )
    assert len(set(seen[:6])) == 6 and set(seen[6:]) == {seen[5]}


def test_tickets_travel(tmp_path):
    learn = make(convnet)
    t = learn.find_tickets(1, fit, prune_rate=0.95)[1]
    t.save(tmp_path / 't.safetensors')
    code = '''
import sys
from test_lottery import Masks, Ticket, convnet, fit, make, prunable_weights
learn, t = make(convnet, seed=3), Ticket.load(sys.argv[1])
learn.load_ticket(t)
fit(learn, [])
assert Masks.from_zeros(prunable_weights(learn.model)).n_kept <= learn.masks.n_kept == t.masks.n_kept
t.save(sys.argv[1])
'''
    done = python(code, tmp_path / 't.safetensors', paths=[here])
    assert done.returncode == 0, done.stderr
    again = Ticket.load(tmp_path / 't.safetensors')
    assert (
        again.masks == t.masks and again.story == t.story and again.metrics == t.metrics and again.initial == t.initial
    )
    assert all(equal(x, t.state[n]) for n, x in again.state.items())


def with_odd_parameters():
    "Parameters without elements, and one that is not a number"
    model = mlp()
    model.odd, model.empty = nn.Parameter(torch.tensor([math.nan, 1.0])), nn.Parameter(torch.empty(0, 4))
    return model


def test_tickets_of_parameters_without_elements_travel(tmp_path):
    learn = make(with_odd_parameters)
    ticket = learn.find_tickets(1, fit, folder=tmp_path / 'f')[1]
    assert ticket.initial['empty'] == (0.0, 0.0, 'constant') and 'odd' not in ticket.initial
    ticket.save(tmp_path / 't')
    other = Ticket.load(tmp_path / 't').reinit()
    assert other.state['empty'].shape == (0, 4) and other.state['odd'].isnan().tolist() == [True, False]
    again = make(with_odd_parameters).find_tickets(1, fit, folder=tmp_path / 'f')
    assert again[1].masks == ticket.masks


def test_size_on_disk(tmp_path):
    learn = make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 10)))
    t = learn.find_tickets(1, fit, prune_rate=0.95)[1]
    t.save(tmp_path / 't')
    torch.save(t.state, tmp_path / 'dense')
    t.masks.save(tmp_path / 'masks')
    assert (tmp_path / 't').stat().st_size <= 1.05 * (tmp_path / 'dense').stat().st_size
    assert (tmp_path / 'masks').stat().st_size <= sum(m.numel() for m in t.masks.values()) / 8 + 500


def test_controls_keep_what_they_should():
    learn = make(convnet)
    t = learn.find_tickets(2, fit, prune_rate=0.5)[2]
    fresh, other, moved = t.reinit(1), t.reinit(2), t.shuffle(1)
    assert fresh.masks == t.masks and not torch.equal(fresh.state['0.0.weight'], other.state['0.0.weight'])
    assert equal(fresh.state['0.0.weight'], t.reinit(1).state['0.0.weight'])
    for n, p in learn.model.named_parameters():
        assert float(fresh.state[n].std(unbiased=False)) == pytest.approx(
            float(t.state[n].std(unbiased=False)), rel=0.25, abs=1e-6
        ), n
        if t.initial[n][2] == 'constant':
            assert equal(fresh.state[n], torch.full_like(p, t.initial[n][0]))
    assert all(equal(x, t.state[n]) for n, x in moved.state.items())
    assert {n: int(m.sum()) for n, m in moved.masks.items()} == {
        n: int(m.sum()) for n, m in t.masks.items()
    } and moved.masks != t.masks
    kinds = {n: k for n, (_, _, k) in t.initial.items()}
    assert kinds['1.1.weight'] == 'constant' and kinds['4.weight'] == 'uniform'
    with pytest.raises(ValueError, match='how its network was initialised'):
        Ticket(t.state, t.masks).reinit(0)


def test_comparison_leaves_the_learner_alone():
    learn = make()
    t = learn.find_tickets(1, fit, prune_rate=0.5)
    before, masks = state_of(learn), learn.masks
    table = learn.compare_tickets(t[1], fit, seeds=(0, 1))
    assert all(equal(x, before[n]) for n, x in learn.model.state_dict().items()) and learn.masks == masks
    assert len(table) == 8 and set(table.kind) == {'ticket', 'reinit', 'shuffle', 'dense'} and len(table.summary()) == 4
    assert table[table.kind == 'dense'].sparsity.eq(0).all()
    for bad, msg in (
        (dict(seeds=()), r'seeds=\(\): needs a whole number'),
        (dict(kinds=('best',)), "'best' is unknown"),
    ):
        with pytest.raises(ValueError, match=msg):
            learn.compare_tickets(t[1], fit, **bad)


script = '''
import os, sys, torch
from test_lottery import Callback, convnet, fit, make
class Kill(Callback):
    def before_train(self):
        if len(getattr(self.learn, 'tickets', [])) == 3: os._exit(9)
learn = make(convnet)
if sys.argv[2] == '1': learn.add_cb(Kill())
else: torch.manual_seed(7)
learn.find_tickets(4, fit, prune_rate=0.4, folder=sys.argv[1], {kw}).df.to_csv(sys.argv[1]+'/table.csv')
'''


@pytest.mark.parametrize('kw', ['rewind_to=2', "rewind='finetune'"])
@pytest.mark.cpu_only  # the killed process was there
def test_a_killed_search_goes_on_to_the_same_table(tmp_path, kw):
    import pandas as pd

    run = lambda k: python(script.format(kw=kw), tmp_path / 'a', k, paths=[here])
    assert run(1).returncode == 9
    again = run(2)
    assert again.returncode == 0, again.stderr
    want = make(convnet).find_tickets(4, fit, prune_rate=0.4, **eval(f'dict({kw})')).df
    got = pd.read_csv(tmp_path / 'a' / 'table.csv', index_col=0)
    assert np.allclose(got.values, want.values, rtol=1e-9) and list(got.columns) == list(want.columns)
    trained = []
    tickets = make(convnet).find_tickets(
        4,
        lambda learn, cbs: (trained.append(1), fit(learn, cbs)),
        prune_rate=0.4,
        folder=tmp_path / 'a',
        **eval(f'dict({kw})'),
    )
    assert len(trained) == 1 and np.allclose(tickets.df.values, want.values)  # the dry run alone
    with pytest.raises(ValueError, match='first_weights was'):
        make(convnet, seed=7).find_tickets(4, fit, prune_rate=0.4, folder=tmp_path / 'a', **eval(f'dict({kw})'))
    with pytest.raises(ValueError, match='prune_rate was 0.4 there, and is 0.3 now'):
        make(convnet).find_tickets(4, fit, prune_rate=0.3, folder=tmp_path / 'a')


@pytest.mark.parametrize('within', [{}, dict(folder='f')], ids=['no folder', 'folder'])
def test_a_crash_leaves_what_was_found(tmp_path, monkeypatch, within):
    "And the network as it was then, not its first weights"
    monkeypatch.chdir(tmp_path)
    learn = make()
    first = {n: t.clone() for n, t in learn.model.state_dict().items()}

    class Crash(Callback):
        def after_epoch(self):
            if len(getattr(self.learn, 'tickets', [])) == 2:
                raise RuntimeError('no power')

    learn.add_cb(Crash())
    with pytest.raises(RuntimeError):
        learn.find_tickets(4, fit, prune_rate=0.5, **within)
    assert isinstance(learn.tickets, Tickets) and len(learn.tickets) == 2
    assert not any(torch.equal(t, first[n]) for n, t in learn.model.state_dict().items())


@pytest.mark.filterwarnings('error:You are shadowing')
def test_copies_from_a_point_of_a_training_warn_of_nothing():
    table = make().instability_by_rewind([0, 2], fit, seeds=((0, 1),))
    assert list(table.step) == [0, 2]


# linear paths


@pytest.fixture(scope='module')
def pair():
    res = [make(convnet, seed) for seed in (0, 1)]
    for learn in res:
        fit(learn, [])
    return res


def slow_path(learn, a, b, n, dl):
    "One model a point, by `validate`"
    res = []
    a, b = a.model.state_dict(), b.model.state_dict()
    for alpha in np.linspace(0, 1, n):
        other = make(convnet)
        other.model.load_state_dict(
            {
                k: ((1 - alpha) * a[k].double() + alpha * b[k].double()).to(a[k].dtype)
                if a[k].is_floating_point()
                else a[k]
                for k in a
            }
        )
        with other.no_bar(), other.no_logging():
            res.append(list(other.validate(dl=dl)))
    return np.array(res)


def test_path_is_that_of_validate(pair):
    a, b = pair
    for dl, memory in ((None, 2**30), (a.dls.train.new(shuffle=False, drop_last=False), 100_000)):
        path, want = (
            a.linear_path(a, b, n=5, dl=dl, memory=memory),
            slow_path(a, a, b, 5, a.dls.valid if dl is None else dl),
        )
        assert np.allclose(path.losses, want[:, 0], rtol=1e-4) and np.allclose(
            path.metrics['accuracy'], want[:, 1], atol=1e-6
        )
    assert np.allclose(a.linear_path(a, b, n=5, train=True).train.losses, path.losses)


def test_path_leaves_the_learner_as_it_was(pair):
    a, b = pair
    a.prune(0.5)
    a.model.train()
    before, masks, rng, order = state_of(a), a.masks, torch.get_rng_state(), a.dls.train.rng.getstate()
    for kw in (dict(), dict(bn='recalibrate', train=True)):
        a.linear_path(a, b, n=3, **kw)

    class Stop(Exception):
        pass

    def broken(p, y):
        raise Stop

    with pytest.raises(Stop):
        a.linear_path(a, b, n=3, metrics=broken)
    with pytest.raises(Stop):
        a.linear_path(a, b, n=3, metrics=broken, bn='recalibrate')
    assert all(equal(x, before[n]) for n, x in a.model.state_dict().items()) and a.masks == masks and a.model.training
    assert torch.equal(rng, torch.get_rng_state()) and order == a.dls.train.rng.getstate()
    assert not {'pred', 'dl'} & {k for k in a.__dict__ if k not in vars(b)}
    assert all(m.momentum is not None for m in a.model.modules() if isinstance(m, nn.BatchNorm2d))
    a.remove_masks()


def test_path_numbers():
    path = LinearPath(
        np.linspace(0, 1, 5), np.array([1.0, 2, 5, 2, 2]), {'accuracy': np.array([0.9, 0.8, 0.3, 0.8, 0.7])}
    )
    assert (
        path.barrier == path.barrier.loss == 3.5
        and path.barrier.error == pytest.approx(0.5)
        and path.instability == pytest.approx(0.7)
    )
    down = LinearPath(np.linspace(0, 1, 4), np.array([3.0, 2, 1.5, 1]), {'error_rate': np.array([0.3, 0.2, 0.15, 0.1])})
    assert down.barrier == 1 and down.barrier.error == pytest.approx(0.1) and down.instability == pytest.approx(0.175)
    assert down.line_barrier == 0 and down.line_barrier.error == 0
    assert list(down.df.columns) == ['loss', 'error_rate'] and down.df.index.name == 'alpha'


def test_error_metrics_and_none(pair):
    a, b = make(convnet, 0, metrics=error_rate), make(convnet, 1, metrics=error_rate)
    path = a.linear_path(a, b, n=3)
    assert np.allclose(path.errors, path.metrics['error_rate'])
    a.metrics = []
    assert np.isnan(a.linear_path(a, b, n=3).instability)


def test_recalibration_is_that_of_training_data(pair, device):
    "At the end points, statistics over all training batches"
    a, b = pair
    path = a.linear_path(a, b, n=2, bn='recalibrate')
    other = make(convnet)
    other.model.to(device).load_state_dict(a.model.state_dict())
    layers = [m for m in other.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in layers:
        m.reset_running_stats()
        m.momentum = None
    other.model.train()
    seed_round(a, 0), seed_round(other, 0)
    path = a.linear_path(a, b, n=2, bn='recalibrate')
    with torch.no_grad():
        for x, _ in other.dls.train:
            other.model(x)
    for m in layers:
        m.momentum = 0.1
    with other.no_bar(), other.no_logging():
        assert path.losses[0] == pytest.approx(other.validate()[0], rel=1e-4)


def test_equal_seeds_give_equal_copies_and_others_do_not():
    learn = make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Dropout(0.3), nn.ReLU(), nn.Linear(30, 10)))
    before = state_of(learn)
    same, other = learn.instability(None, fit, seeds=(4, 4), n=3), learn.instability(None, fit, seeds=(4, 5), n=3)
    assert same.barrier == 0 and same.barrier.error == 0 and len(set(same.losses)) == 1
    assert len(set(other.losses)) > 1
    assert all(equal(x, before[n]) for n, x in learn.model.state_dict().items())


def test_stability_of_tickets_keeps_their_masks():
    learn, seen = make(), []
    tickets = learn.find_tickets(2, fit, prune_rate=0.5)

    def watched(learn, cbs):
        fit(learn, cbs)
        seen.append(learn.masks.n_kept)

    table = learn.instability_by_round({'classic': tickets}, watched, n=3)
    kept = [t.masks.n_kept for t in tickets]
    assert [s for m in range(3) for s in seen[3 * m + 2 : 3 * m + 4]] == [
        k for k in kept for _ in range(2)
    ]  # a dry run; and for each a dry run, and two copies
    assert list(table['round']) == [0, 1, 2] and (table.instability >= 0).all()
    assert learn.masks == tickets[-1].masks


def test_connectivity_of_a_text_classifier(tmp_path):
    learn = text_learner(tmp_path)
    a = state_of(learn)
    quietly(learn, learn.fit, 1, 1e-2)
    path = learn.linear_path(a, learn, n=3)
    with learn.no_bar(), learn.no_logging():
        want = learn.validate()
    assert path.losses[-1] == pytest.approx(want[0], rel=1e-4) and path.metrics['accuracy'][-1] == pytest.approx(
        want[1]
    )


def test_plane_goes_through_its_states(pair):
    a, b = pair
    c = make(convnet, 2)
    plane = a.plane(a, b, c, n=3, margin=0.0)
    at = lambda state: a.linear_path(state, state, n=2).losses[0]
    assert plane.losses[0, 0 if plane.points[2, 0] >= 0 else list(plane.xs).index(0)] == pytest.approx(at(a), rel=1e-3)
    assert plane.losses.shape == (3, 3) and np.isfinite(plane.losses).all()


def test_bad_arguments_of_paths(pair):
    a, b = pair
    small = make(mlp)
    for f, args, kw, msg in (
        (a.linear_path, (a, b), dict(n=1), 'n=1'),
        (a.linear_path, (a, small), {}, 'b is of another model'),
        (a.linear_path, (a, 3), {}, 'b=int'),
        (a.instability, (small.model, fit), {}, 'start is of another model'),
        (a.instability, (None, fit), dict(seeds=(1,)), 'needs two'),
        (a.instability, (None, lambda learn, cbs: None), {}, 'trains nothing'),
        (a.instability_by_round, ([], fit), {}, 'there are none'),
        (a.instability_by_rewind, ([-1], fit), {}, r'steps=\[-1\]'),
        (a.plane, (a, a, b), {}, 'on one line'),
    ):
        with pytest.raises(ValueError, match=msg):
            f(*args, **kw)


# what a review found


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'start',
    [lambda l: l.model.state_dict(), lambda l: l.model, lambda l: l, lambda l: Ticket(l.model.state_dict(), {})],
)
def test_copies_of_the_present_state_both_start_there(start):
    learn = make(convnet)
    assert len(set(learn.instability(start(learn), fit, seeds=(0, 0), n=3).losses)) == 1


def test_a_search_after_another_starts_anew():
    learn = make()
    learn.find_tickets(2, fit, prune_rate=0.5, measure='none')
    again = learn.find_tickets(2, fit, prune_rate=0.5, schedule=ocp, measure='none')
    assert np.allclose([t.sparsity for t in again], [0, 0.5, 0.75], atol=1e-3)


def test_no_gradient_stays_from_the_training_before():
    from fastai.basics import params

    learn = make(convnet)
    learn.splitter = lambda m: [params(m[:1]), params(m[1:])]

    def tune(learn, cbs):
        learn.create_opt()
        quietly(learn, learn.fine_tune, 1, 1e-1, freeze_epochs=1, cbs=cbs, wd=0.1)

    assert len(set(learn.instability(None, tune, seeds=(0, 0), n=3).losses)) == 1


def test_metrics_that_need_the_loss_and_callbacks_that_change_batches():
    from fastai.metrics import Perplexity

    learn = make(metrics=[Perplexity(), accuracy])

    class Scale(Callback):
        def before_batch(self):
            self.learn.xb = (self.xb[0] * 3 - 1,)

    class Tuple(Callback):
        def after_pred(self):
            self.learn.pred = (self.pred, 1)[0]

    a = state_of(learn)
    fit(learn, [])
    learn.add_cbs([Scale(), Tuple()])
    path = learn.linear_path(a, learn, n=3)
    with learn.no_bar(), learn.no_logging():
        want = learn.validate()
    assert path.losses[-1] == pytest.approx(want[0], rel=1e-5) and path.metrics['accuracy'][-1] == pytest.approx(
        want[2]
    )
    assert np.allclose(path.metrics['perplexity'], np.exp(path.losses), rtol=1e-3)


def test_the_dry_run_leaves_nothing_behind(tmp_path):
    from fastai.callback.progress import CSVLogger
    from fastai.callback.tracker import SaveModelCallback

    learn = make()
    learn.path = tmp_path
    first = state_of(learn)
    learn.add_cb(CSVLogger())
    fit(learn, [])
    lines, values = (tmp_path / 'history.csv').read_text(), list(learn.recorder.values)
    with pytest.raises(ValueError, match='past the end'):
        learn.find_tickets(1, fit, rewind_to=999)
    assert (tmp_path / 'history.csv').read_text() == lines and list(learn.recorder.values) == values
    load_into(learn, first)
    saving = lambda learn, cbs: fit(learn, [*cbs, SaveModelCallback()])
    assert all(equal(t, first[n]) for n, t in learn.find_tickets(1, saving)[0].state.items())
    load_into(learn, first)
    twice = lambda learn, cbs: (fit(learn, []), fit(learn, cbs))
    assert all(equal(t, first[n]) for n, t in learn.find_tickets(1, twice)[0].state.items())


def test_controls_after_learning_rate_rewinding():
    learn = make()
    t = learn.find_tickets(3, fit, prune_rate=0.5, rewind='lr')[3]
    moved = t.shuffle(0)
    for n, m in moved.masks.items():
        assert int((moved.state[n].cpu() * m.cpu()).count_nonzero()) == int(
            (t.state[n] * t.masks[n]).count_nonzero()
        ) and not equal(m, t.masks[n])
    assert all((t.dense().state[n] != 0).float().mean() > 0.99 for n in t.masks)


def test_path_of_a_ticket_without_end_is_masked():
    learn = make()
    t = learn.find_tickets(1, fit, prune_rate=0.9)[1]
    with learn.no_bar(), learn.no_logging():
        want = learn.validate()
    assert t.end is None and learn.linear_path(t, t, n=2).losses[0] == pytest.approx(want[0], rel=1e-5)


def test_metrics_of_one_name_and_those_that_are_no_numbers():
    from fastai.metrics import F1Score

    learn = make(metrics=[F1Score(average='macro'), F1Score(average='micro')])
    path = learn.linear_path(learn, learn, n=2)
    assert len(path.metrics) == 2
    learn.metrics = F1Score(average=None)
    with pytest.raises(ValueError, match='is not a single number'):
        learn.linear_path(learn, learn, n=2)
    assert 'f1_score' not in learn.find_tickets(1, fit)[1].metrics


def test_errors_before_any_training():
    learn = make()
    t = learn.find_tickets(1, fit, measure='none')[1]
    trained = []

    def watched(learn, cbs):
        fit(learn, cbs)
        trained.append(bool(learn.recorder.values))

    for f, args, kw, msg in (
        (learn.instability, (None, watched), dict(n=2.5), 'n=2.5'),
        (learn.instability, (None, watched), dict(metric=1), 'metric'),
        (learn.instability, (None, watched), dict(bn='foo'), "bn='foo'"),
        (learn.instability_by_rewind, ([3], watched), dict(n=1), 'n=1'),
        (learn.instability_by_rewind, ([2.5], watched), {}, r'steps=\[2.5\]'),
        (learn.compare_tickets, (Ticket(t.state, t.masks), watched), {}, 'how its network was initialised'),
        (learn.compare_tickets, ([t, Ticket({}, {})], watched), {}, 'another model'),
        (learn.find_tickets, (1, None), {}, 'fit=None'),
        (learn.find_tickets, (1, lambda learn: 0), {}, "can't be called"),
        (learn.find_tickets, (1, watched), dict(seed='a'), "seed='a'"),
    ):
        with pytest.raises((ValueError, TypeError), match=msg):
            f(*args, **kw)
    assert not any(trained)
    frozen = make(convnet)
    frozen.splitter = lambda m: [list(m[:1].parameters()), list(m[1:].parameters())]
    frozen.freeze()
    with pytest.raises(ValueError, match='frozen'):
        frozen.instability(None, fit)


def test_a_flipped_bit_is_found(tmp_path):
    t = make().find_tickets(1, fit, measure='none')[1]
    t.save(tmp_path / 't')
    data = bytearray((tmp_path / 't').read_bytes())
    data[-40] ^= 1
    (tmp_path / 't').write_bytes(data)
    with pytest.raises(ValueError, match='damaged'):
        Ticket.load(tmp_path / 't')
