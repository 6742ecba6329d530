import itertools
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy, load_learner, params
from helpers import equal, mlp_learner, quietly, text_learner
from processes import python
from torch import nn

from fastprune.all import (
    Masks,
    Rounds,
    SparsifyCallback,
    allr_discount,
    lr_cyclical,
    lr_decay,
    lr_retrain,
    lr_warmup,
    one_shot,
    prunable_weights,
    s_cyc_max_lr,
    taylor,
)

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


@pytest.fixture
def learner(learner):
    "With 12 steps an epoch, half as many as there are by default"
    return partial(learner, bs=128)


def steps(learn):
    "Counts optimizer steps"

    class Count(Callback):
        n = 0

        def after_step(self):
            type(self).n += 1

    learn.add_cb(Count())
    return Count


def halves(m):
    return [params(m[:2]), params(m[2:])]


@pytest.mark.sample(2)
@pytest.mark.parametrize('lr_max', [0.1, slice(1e-3, 1e-1), [1e-3, 1e-1]])
def test_cyclical_restarts_rate_and_sparsity_together(learner, lr_max):
    learn = learner(splitter=halves, opt_func=partial(SGD, mom=0.9))
    cb = quietly(learn, learn.fit_cyclical, 3, 3, 0.9, lr_max=lr_max, interval=4)
    n = 3 * len(learn.dls.train)
    lrs, reached = np.array(cb.lrs), np.array(cb.reached)
    assert np.allclose(lrs[::n], 0.1) and np.allclose(lrs[n - 1 :: n], 0.01)
    up, down = np.flatnonzero(np.diff(lrs) > 0) + 1, np.flatnonzero(np.diff(reached) < 0) + 1
    assert up.tolist() == down.tolist() == [n, 2 * n]
    assert (reached[n - 1 :: n] == learn.masks.sparsity).all()
    for m in learn.masks.values():
        assert (~m).sum() == round(0.9 * m.numel())
    if lr_max != 0.1:
        assert learn.opt.hypers[0]['lr'] == pytest.approx(1e-4) and learn.opt.hypers[1]['lr'] == pytest.approx(1e-2)


def test_step_schedule_prunes_in_the_middle_of_each_cycle(learner):
    learn = learner()
    cb = quietly(learn, learn.fit_cyclical, 2, 2, 0.9, schedule=one_shot)
    n = 2 * len(learn.dls.train)
    final = learn.masks.sparsity
    assert [cb.reached[i] == final for i in (n // 2 - 2, n // 2 - 1, n - 1, n, n + n // 2 - 2, n + n // 2 - 1)] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]


def test_masks_move_between_cycles_but_not_while_fine_tuning(learner):
    for prune_cycles, moves in ((None, True), (1, False)):
        learn = learner(opt_func=partial(SGD, mom=0.9))
        cb = quietly(learn, learn.fit_cyclical, 2, 3, 0.9, lr_max=0.1, track=True, prune_cycles=prune_cycles)
        assert (cb.mask_distance[-1] > 0) == moves
        names = learn.recorder.metric_names
        assert names[-4:-1] == ['sparsity', 'recovered', 'mask_distance']
        assert learn.recorder.values[-1][-2:] == [cb.recovered[-1], cb.mask_distance[-1]]


def test_tracking_counts_what_came_back(learner, fit):
    "Against masks kept after each step"

    class Keep(Callback):
        order = 90
        masks = []

        def after_step(self):
            self.masks.append({n: m.clone() for n, m in (self.learn.masks or {}).items()})

    keep, cb = (
        Keep(),
        SparsifyCallback(
            0.9, schedule=lambda pos: 1 - abs(1 - 2.5 * pos) if pos < 0.6 else 1.0, interval=1, track=True
        ),
    )
    fit(learner(), 2, cbs=[cb, keep])
    ever = None
    for m, recovered in zip(keep.masks, cb.recovered, strict=True):
        if not m:
            continue
        ever = {n: ~k for n, k in m.items()} if ever is None else ever
        assert recovered == sum(int((k & ever[n]).sum()) for n, k in m.items())
        for n, k in m.items():
            ever[n] |= ~k
    first = next(i for i, (a, b) in enumerate(itertools.pairwise(cb.asked)) if b < a)
    assert cb.mask_distance[-1] == pytest.approx(Masks(keep.masks[-1]).jaccard(Masks(keep.masks[first])))


def test_refresh_moves_masks_at_constant_sparsity(learner, fit):
    class Keep(Callback):
        order = 90
        masks = []

        def after_step(self):
            self.masks.append(self.learn.masks.copy())

    for refresh in (True, False):
        Keep.masks, learn = [], learner(bs=64, data=dict(test_pct=0))
        fit(learn, 1, lr=1e-2, cbs=[SparsifyCallback(0.8, schedule=one_shot, interval=1, refresh=refresh), Keep()])
        assert all(m.n_kept == Keep.masks[0].n_kept for m in Keep.masks)
        assert (Keep.masks[0].jaccard(Keep.masks[-1]) > 0) == refresh


@pytest.mark.sample(2)
@pytest.mark.parametrize('epochs, dense, cycles', [(3, 1, 1), (4, 2.5, 3), (3, None, 2)])
def test_bimp_uses_the_budget_to_the_step(learner, epochs, dense, cycles):
    learn = learner()
    count = steps(learn)
    cb = quietly(learn, learn.fit_bimp, epochs, 0.95, dense_epochs=dense, cycles=cycles, lr_max=0.05)
    n = epochs * len(learn.dls.train)
    assert count.n == n == len(cb.lrs)
    assert len(cb.discounts) == cycles and all(0 < d <= 1 for d in cb.discounts)
    jumps = np.flatnonzero(np.diff(cb.reached) > 0) + 1
    at = [
        (dense or 0.75 * epochs) / epochs * n + (1 - (dense or 0.75 * epochs) / epochs) * n * c / cycles
        for c in range(cycles)
    ]
    assert jumps.tolist() == [int(np.ceil(round(a, 6))) - 1 for a in at]
    kept = [1 - cb.reached[j] for j in jumps]
    assert np.allclose(kept, [0.05 ** ((c + 1) / cycles) for c in range(cycles)], atol=1e-3)
    total = sum(m.numel() for m in learn.masks.values())
    assert learn.masks.n_kept == total - round(0.95 * total)
    assert cb.lrs[0] == pytest.approx(0.05) and cb.lrs[jumps[0] + 1] < 0.05 * cb.discounts[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', ['ft', 'lrw', 'slr', 'clr', 'llr', 'allr'])
def test_retrain_takes_its_rates_from_the_recorder(learner, name):
    learn = learner(splitter=halves)
    quietly(learn, learn.fit_one_cycle, 3, slice(1e-3, 1e-2))
    original = list(learn.recorder.lrs)
    learn.prune(0.9, scope='global')
    change = learn.keep_masks.change
    quietly(learn, learn.retrain, 2, name)
    n = len(learn.recorder.lrs)
    want = lr_retrain(name, original, 2 / 3, max(change, 2 / 3) if name == 'allr' else 1.0)
    assert np.allclose(learn.recorder.lrs, [want(i / n) for i in range(n)])
    assert learn.opt.hypers[0]['lr'] == pytest.approx(learn.opt.hypers[1]['lr'] / 10)
    assert (learn.masks.sparsity == pytest.approx(0.9, abs=1e-4)) and Masks.from_zeros(
        prunable_weights(learn.model)
    ).n_kept <= learn.masks.n_kept


def test_allr_needs_to_know_what_changed(learner):
    learn = learner()
    quietly(learn, learn.fit, 1)
    learn.prune(0.5)
    before = {n: p.detach().clone() for n, p in prunable_weights(learn.model).items()}
    learn.prune(0.9)
    pruned = sum(int((learn.model.get_parameter(n) == 0).sum()) for n in before) - sum(
        int((p == 0).sum()) for p in before.values()
    )
    want = allr_discount(
        before,
        dict(learn.model.named_parameters()) and {n: learn.model.get_parameter(n) for n in before},
        pruned / sum(int((p != 0).sum()) for p in before.values()),
    )
    assert learn.keep_masks.change == pytest.approx(want, rel=1e-4)
    quietly(learn, learn.retrain, 1)
    with pytest.raises(ValueError, match='right before, or give `discount`'):
        learn.retrain(1)
    quietly(learn, learn.retrain, 1, discount=0.3)
    assert max(learn.recorder.lrs) <= 0.3 * 1e-3 + 1e-9


class Ends(Callback):
    "The state at the start and the end of each fit"

    order = 95

    def __init__(self):
        self.starts, self.ends, self.rates = [], [], []

    def before_train(self):
        if self.epoch == 0:
            self.starts.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    def after_fit(self):
        if self.learn.training or self.epoch:
            self.ends.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        self.rates.append(list(self.learn.recorder.lrs))


@pytest.mark.parametrize('rewind', ['lr', 'finetune', 'weights'])
def test_what_a_round_starts_from(rewind):
    learn, ends = mlp_learner(), Ends()
    initial = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    kw = dict(rewind_to=3) if rewind == 'weights' else {}

    class At(Callback):
        def after_batch(self):
            if self.training and self.train_iter == 3 and not hasattr(learn, 'at3'):
                learn.at3 = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    table = quietly(learn, learn.iterative_prune, 2, 2, prune_rate=0.5, lr=0.1, rewind=rewind, cbs=[ends, At()], **kw)
    assert all(equal(p, initial[n]) for n, p in ends.starts[0].items())
    assert [r for r in table.weights] == [2368, 1184, 592]
    for m in (1, 2):
        frm = learn.at3 if rewind == 'weights' else ends.ends[m - 1]
        for n, p in ends.starts[m].items():
            assert equal(p, torch.where(p != 0, frm[n], p)), (m, n)
        kept = sum(int(p.count_nonzero()) for n, p in ends.starts[m].items() if n.endswith('weight'))
        assert kept == table.weights[m]
    first = ends.rates[0]
    assert ends.rates[1] == {'finetune': [first[-1]] * len(first), 'lr': first, 'weights': first[3:]}[rewind]


def test_masks_are_nested_over_rounds_and_exact():
    seen = []

    class Keep(Callback):
        def before_train(self):
            if self.epoch == 0:
                seen.append(self.learn.masks)

    for scope in ('local', 'global', 'erk'):
        seen.clear()
        learn = mlp_learner()
        table = quietly(
            learn,
            learn.iterative_prune,
            4,
            1,
            prune_rate=0.3,
            lr=0.1,
            scope=scope,
            criterion=taylor,
            n_batches=2,
            cbs=Keep(),
        )
        total = 64 * 32 + 320
        for a, b in itertools.pairwise(seen[1:]):
            for n in a:
                assert not (b[n] & ~a[n]).any()
        for m in range(1, 5):
            if scope != 'local':
                assert (
                    seen[m].n_kept == table.weights[m] == total - round((1 - 0.7**m) * total)
                    or scope == 'erk'
                    and abs(table.weights[m] - 0.7**m * total) <= 1
                )
            else:
                assert all(k.sum() == k.numel() - round((1 - 0.7**m) * k.numel()) for k in seen[m].values())


def test_early_stopping_and_test_metrics():
    learn = mlp_learner()
    table = quietly(
        learn, learn.iterative_prune, 1, 6, prune_rate=0.5, lr=0.5, monitor='accuracy', patience=1, test_dl=learn.dls[2]
    )
    assert {'test_loss', 'test_accuracy', 'valid_loss', 'accuracy', 'max_lr', 'sparsity', 'weights'} <= set(
        table.columns
    )
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[1] == pytest.approx(table.accuracy[1], abs=1e-6)
        assert learn.validate(dl=learn.dls[2])[1] == pytest.approx(table.test_accuracy[1], abs=1e-6)


def test_s_cyc_takes_the_rate_of_pruning_and_groups_keep_their_ratio():
    learn, rates = mlp_learner(splitter=lambda m: [params(m[:2]), params(m[2:])]), []

    class Rates(Callback):
        def before_step(self):
            rates.append([h['lr'] for h in self.opt.hypers])

    quietly(
        learn,
        learn.iterative_prune,
        2,
        1,
        prune_rate=0.5,
        lr=slice(1e-3, 1e-1),
        max_lr=partial(s_cyc_max_lr, eps=0.1, delta=0.1),
        shape=lr_decay,
        cbs=Rates(),
    )
    n = len(learn.dls.train)
    for m in range(3):
        assert np.allclose(rates[m * n], np.array([0.01, 1]) * s_cyc_max_lr(m, 0.1, 0.1, p=0.5))


def test_train_first_false_measures_the_trained_learner():
    learn = mlp_learner()
    quietly(learn, learn.fit, 3, 1e-2)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()
    table = quietly(learn, learn.iterative_prune, 1, 1, prune_rate=0.5, lr=0.05, train_first=False)
    assert table.accuracy[0] == pytest.approx(before[1]) and np.isnan(table.max_lr[0]) and len(table) == 2


script = '''
import os, sys, torch
from fastai.basics import Callback
from helpers import mlp_learner
class Kill(Callback):
    def before_train(self):
        if len(getattr(self.learn, 'rounds', [])) == 3: os._exit(9)
learn = mlp_learner()
torch.rand(int(sys.argv[2]))                                        # other random numbers than in the other process
with learn.no_bar(), learn.no_logging():
    kw = dict(prune_rate=0.3, lr=0.1, folder=sys.argv[1], histograms=True)
    table = learn.iterative_prune(5, 1, cbs=Kill() if sys.argv[2] == '1' else None, **kw)
table.to_csv(sys.argv[1]+'/table.csv')
'''


@pytest.mark.cpu_only  # the killed process was there
def test_a_killed_run_goes_on_to_the_same_table(tmp_path):
    import pandas as pd

    run = lambda k: python(script, tmp_path / 'a', k)
    assert run(1).returncode == 9
    assert not (tmp_path / 'a' / 'table.csv').exists() and (tmp_path / 'a' / 'state_02.safetensors').exists()
    again = run(2)
    assert again.returncode == 0, again.stderr
    learn = mlp_learner()
    want = quietly(learn, learn.iterative_prune, 5, 1, prune_rate=0.3, lr=0.1, histograms=True)
    got = pd.read_csv(tmp_path / 'a' / 'table.csv', index_col=0)
    assert np.allclose(got.values, want.values, rtol=1e-12, equal_nan=True) and list(got.columns) == list(want.columns)
    learn = mlp_learner()
    longer = quietly(learn, learn.iterative_prune, 6, 1, prune_rate=0.3, lr=0.1, folder=tmp_path / 'a', histograms=True)
    assert len(longer) == 7 and len(longer.histograms) == 7 and np.allclose(longer.values[:6], want.values)
    with pytest.raises(ValueError, match='rate was 0.3 there, and is 0.2 now'):
        learn.iterative_prune(5, 1, prune_rate=0.2, lr=0.1, folder=tmp_path / 'a', histograms=True)
    with pytest.raises(ValueError, match='another experiment: weights was'):
        other = Learner(
            learn.dls,
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            loss_func=CrossEntropyLossFlat(),
            metrics=accuracy,
        )
        other.iterative_prune(5, 1, prune_rate=0.3, lr=0.1, folder=tmp_path / 'a', histograms=True)


def test_a_crash_loses_its_round_alone():
    learn = mlp_learner()

    class Crash(Callback):
        def after_epoch(self):
            if len(getattr(self.learn, 'rounds', [])) == 2:
                raise RuntimeError('no power')

    with pytest.raises(RuntimeError):
        quietly(learn, learn.iterative_prune, 4, 1, prune_rate=0.5, lr=0.1, cbs=Crash())
    assert len(learn.rounds) == 2 and isinstance(learn.rounds, Rounds)
    assert Masks.from_zeros(prunable_weights(learn.model)).n_kept <= learn.masks.n_kept == 592


def test_an_emptied_layer_is_named():
    learn = mlp_learner()

    def last_first(weights):
        return {n: p.detach().abs() + (10 if n == '1.weight' else 0) for n, p in weights.items()}

    with pytest.warns(UserWarning, match=r"layer collapse: no weight is left in '3.weight'"):
        quietly(learn, learn.iterative_prune, 1, 1, prune_rate=0.5, lr=0.1, criterion=last_first)


def test_oracle_is_the_best_of_its_rates():
    learn = mlp_learner()
    table = quietly(learn, learn.s_cyc_oracle, 1, 1, [1e-4, 0.1, 0.2], prune_rate=0.5)
    assert (
        table.max_lr.isin([0.1, 0.2]).all()
        and (table.feasible_min <= table.max_lr).all()
        and (table.max_lr <= table.feasible_max).all()
    )
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[1] == pytest.approx(table.accuracy[1], abs=1e-6)
    assert Masks.from_zeros(prunable_weights(learn.model)) == learn.masks


def test_gradients_are_taken_on_the_side(learner):
    learn = learner()
    quietly(learn, learn.fit, 1)
    learn.model.eval()
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for p in learn.model.parameters():
        p.grad = torch.ones_like(p)
    rng, order = torch.get_rng_state(), learn.dls.train.rng.getstate()
    hist = learn.gradient_histogram(n_batches=3)
    learn.prune(0.5, criterion=taylor, n_batches=2)
    learn.remove_masks()
    assert len(hist.gradients) and len(hist.hidden) and not learn.model.training
    assert torch.equal(rng, torch.get_rng_state()) and order == learn.dls.train.rng.getstate()
    assert all((p.grad == 1).all() for p in learn.model.parameters())
    assert all(
        equal(v, state[k])
        for k, v in learn.model.state_dict().items()
        if k.split('.')[-1].startswith(('running', 'num'))
    )
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_histogram_of_known_gradients():
    "One batch of a linear model: the gradient by hand"
    learn = mlp_learner()
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    learn.prune(0.5)
    hist = learn.gradient_histogram(n_batches=1)
    assert len(hist.gradients) == 320 and len(hist.hidden) == 0 and hist.label == '50% left'


def test_text_learner_has_gradients_on_the_side(tmp_path):
    learn = text_learner(tmp_path)
    quietly(learn, learn.fit, 1, 1e-3)
    assert learn.gradient_histogram(n_batches=2).gradients.std() > 0


def test_frozen_learner_is_refused(learner):
    learn = learner(splitter=halves)
    learn.freeze()
    for f, args in ((learn.fit_cyclical, (2, 2, 0.9)), (learn.fit_bimp, (4, 0.9)), (learn.iterative_prune, (2, 1))):
        with pytest.raises(ValueError, match='frozen'):
            f(*args)


def test_recipes_check_before_training(learner):
    learn = learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for f, args, kw, msg in (
        (learn.fit_cyclical, (2, 2, 0.9), dict(lr_max=-1), 'lr_max=-1'),
        (learn.fit_cyclical, (2, 2, 0.9), dict(shape=partial(lr_warmup, drops=(1.5,))), r'drops\[0\]=1.5'),
        (learn.fit_cyclical, (2, 0, 0.9), {}, 'epochs_per_cycle=0'),
        (learn.fit_cyclical, (2, 2, 0.9), dict(exclude='nothing'), 'nothing'),
        (learn.fit_bimp, (4, {'*': 0.9}), {}, 'needs one number'),
        (learn.fit_bimp, (4, 0.9), dict(cycles=1000), 'cycles=1000'),
        (learn.fit_bimp, (4, 0.9), dict(dense_epochs=4), 'less than the budget'),
        (learn.fit_bimp, (4, None), {}, 'sparsity=None'),
        (learn.fit_bimp, (4, 0.9), dict(dense_epochs='2'), "dense_epochs='2'"),
        (learn.iterative_prune, (0, 2), {}, 'rounds=0'),
        (learn.iterative_prune, (2, 2), dict(prune_rate=1.0), 'prune_rate=1.0'),
        (learn.iterative_prune, (2, 2), dict(rewind='all'), "rewind='all'"),
        (learn.iterative_prune, (2, 2), dict(max_lr=partial(s_cyc_max_lr, eps=1, delta=0)), 'delta=0'),
        (learn.iterative_prune, (80, 1), {}, 'would leave no weight'),
        (learn.iterative_prune, (2, 2), dict(shape=partial(lr_cyclical, low=5.0)), 'low=5.0'),
        (learn.iterative_prune, (2, 2), dict(shape='decay'), "shape='decay'"),
        (learn.iterative_prune, (2, 2), dict(max_lr='s_cyc'), "max_lr='s_cyc'"),
        (learn.iterative_prune, (2, 2), dict(max_lr=lambda m: [0.1]), 'for round 0'),
        (learn.iterative_prune, (2, 2), dict(criterion=taylor, n_batches=0), 'n_batches=0'),
        (
            learn.iterative_prune,
            (9, 1),
            dict(prune_rate=0.5, granularity='filter', scope='local', exclude='5'),
            'round 4 would leave no weight of the 72',
        ),
        (learn.iterative_prune, (12, 1), dict(prune_rate=0.5, scope='erk'), 'would leave no weight of the'),
        (learn.fit_cyclical, (2, 2, 0.9), dict(shape=lr_decay(0.1)), 'shape='),
        (learn.fit_cyclical, (2, 2, 0.9), dict(lr_max=slice(None)), 'lr_max=slice'),
        (learn.fit_cyclical, (2, 2, 0.9), dict(ramp='a'), "ramp='a'"),
        (learn.fit_cyclical, (2, 2, 0.9), dict(restart='lr'), "restart='lr'"),
        (learn.iterative_prune, (2, 2), dict(patience=0), 'patience=0'),
        (learn.s_cyc_oracle, (2, 2, []), {}, 'lrs='),
        (learn.s_cyc_oracle, (2, 2, [0.1]), dict(rewnd='lr'), "no argument 'rewnd'"),
    ):
        with pytest.raises((ValueError, TypeError), match=msg):
            f(*args, **kw)
    assert all(equal(v, before[k]) for k, v in learn.model.state_dict().items()) and learn.masks is None


# what a review found


def test_the_same_learner_goes_on_too(tmp_path):
    "Masks that it has from the rounds before are no start from a sparse network"
    for oracle in (False, True):
        learn, folder = mlp_learner(), tmp_path / str(oracle)
        recipe, kw = (learn.s_cyc_oracle, dict(lrs=[0.1])) if oracle else (learn.iterative_prune, dict(lr=0.1))
        quietly(learn, recipe, 2, 1, prune_rate=0.2, folder=folder, **kw)
        found = quietly(learn, recipe, 4, 1, prune_rate=0.2, folder=folder, **kw)
        assert np.allclose(found.sparsity, [1 - 0.8**m for m in range(5)], atol=1e-3)
    sparse = mlp_learner()
    sparse.prune(0.5, scope='global')
    quietly(sparse, sparse.iterative_prune, 1, 1, lr=0.1, folder=tmp_path / 'sparse')
    fresh = mlp_learner()
    with pytest.raises(ValueError, match='first_masks was'):
        quietly(fresh, fresh.iterative_prune, 2, 1, lr=0.1, folder=tmp_path / 'sparse')
    fresh.prune(0.5, scope='global')
    assert np.allclose(
        quietly(fresh, fresh.iterative_prune, 2, 1, lr=0.1, folder=tmp_path / 'sparse').sparsity,
        [0.5, 0.6, 0.68],
        atol=1e-3,
    )


def test_scores_from_gradients_go_on_to_the_same_table(tmp_path):
    class Crash(Callback):
        def before_train(self):
            if len(self.learn.rounds) == 2:
                raise RuntimeError('no power')

    kw = dict(prune_rate=0.4, lr=0.1, criterion=taylor, n_batches=2)
    learn = mlp_learner()
    want = quietly(learn, learn.iterative_prune, 3, 1, **kw)
    learn = mlp_learner()
    with pytest.raises(RuntimeError):
        quietly(learn, learn.iterative_prune, 3, 1, folder=tmp_path, cbs=Crash(), **kw)
    torch.rand(7)
    learn = mlp_learner()
    assert np.array_equal(quietly(learn, learn.iterative_prune, 3, 1, folder=tmp_path, **kw).values, want.values)


def test_folders_know_their_experiment(tmp_path):
    learn = mlp_learner()
    run = lambda **kw: quietly(learn, learn.iterative_prune, 1, 1, **{**dict(lr=0.1, folder=tmp_path), **kw})
    run()
    for kw, what in (
        (dict(max_lr=lambda m: 0.2), 'rates'),
        (dict(shape=lr_decay), 'shape'),
        (dict(test_dl=learn.dls[2]), 'test_dl'),
    ):
        with pytest.raises(ValueError, match=f'another experiment: {what} was'):
            run(**kw)
    with pytest.raises(ValueError, match='another experiment'):
        quietly(learn, learn.s_cyc_oracle, 1, 1, [0.1], folder=tmp_path)
    learn.metrics = []
    with pytest.raises(ValueError, match='metrics was'):
        run()


def test_an_interrupted_retraining_is_not_the_original(learner):
    learn = learner()
    quietly(learn, learn.fit_one_cycle, 3, 0.01)
    original = list(learn.recorder.lrs)
    learn.prune(0.8, scope='global')

    class Stop(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quietly(learn, learn.retrain, 2, cbs=Stop())
    learn.remove_cb(Stop)
    quietly(learn, learn.retrain, 2, 'slr')
    assert learn._retrained['history'] == original


def test_other_batches_leave_the_original_epochs_alone(learner):
    learn = learner()
    quietly(learn, learn.fit_one_cycle, 3, 0.01)
    learn.dls = learner(bs=128).dls
    learn.prune(0.8)
    quietly(learn, learn.retrain, 3, 'lrw')
    assert learn._retrained['epochs'] == 3


def test_a_loaded_learner_without_batches_asks_for_the_original_epochs(learner, tmp_path):
    learn = learner()
    quietly(learn, learn.fit_one_cycle, 3, 0.01)
    del learn._fit_epochs  # as in a file of an older version
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    loaded.prune(0.5)
    with pytest.raises(ValueError, match='original_epochs=None: this Learner has no batches'):
        loaded.retrain(1, 'ft')
    with pytest.raises(ValueError, match='no batches: channels are found with a batch: give the Learner data'):
        loaded.prune(0.5, granularity='channel')


def test_the_change_of_half_precision_is_not_rounded(learner):
    learn = learner()
    learn.model.bfloat16()
    before = {n: p.detach().clone() for n, p in prunable_weights(learn.model).items()}
    learn.prune(0.2, scope='global')
    weights = prunable_weights(learn.model)
    pruned = sum(int((p == 0).sum()) for p in weights.values()) / sum(p.numel() for p in weights.values())
    assert learn.keep_masks.change == pytest.approx(allr_discount(before, weights, pruned), rel=1e-3)


def test_change_is_remembered_until_training(learner):
    learn = learner()
    learn.prune(0.8)
    change = learn.keep_masks.change
    learn.prune(0.8)
    assert learn.keep_masks.change == change > 0
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
    assert learn.keep_masks.change == change
    quietly(learn, learn.fit, 1)
    assert learn.keep_masks.change is None


def test_smaller_is_better_for_mse():
    from fastai.basics import rmse

    def make():
        torch.manual_seed(0)
        x = torch.randn(256, 5)
        from fastai.basics import DataLoader, DataLoaders, MSELossFlat

        dl = lambda: DataLoader(list(zip(x, x @ torch.ones(5, 1), strict=True)), bs=32, num_workers=0)
        return Learner(
            DataLoaders(dl(), dl()),
            nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)),
            loss_func=MSELossFlat(),
            metrics=rmse,
        )

    learn = make()
    assert (quietly(learn, learn.s_cyc_oracle, 1, 1, [1e-5, 1e-1], prune_rate=0.3).max_lr == 0.1).all()
    learn = make()
    assert (
        quietly(learn, learn.s_cyc_oracle, 1, 1, [1e30, 1e-1], prune_rate=0.3, monitor='valid_loss').max_lr == 0.1
    ).all()
    with pytest.raises(ValueError, match='is not measured'):
        learn.iterative_prune(1, 1, monitor='mae')


def test_bimp_without_a_step_to_prune_at(learner):
    from fastai.callback.training import GradientAccumulation

    learn = learner()
    learn.prune(0.8, scope='global')
    cb = quietly(learn, learn.fit_bimp, 2, 0.8)
    assert cb.reached[-1] == learn.masks.sparsity
    learn = learner()
    quietly(learn, learn.fit_bimp, 4, 0.8, cycles=3, cbs=GradientAccumulation(384))
    assert learn.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    learn = learner()
    n = len(learn.dls.train)
    cb = quietly(learn, learn.fit_bimp, 2, 0.8, cycles=n // 2)
    assert len(cb.discounts) == n // 2


def test_rewinding_past_an_early_stop_says_so():
    learn = mlp_learner()
    with pytest.raises(ValueError, match='the first training was stopped after'):
        quietly(
            learn,
            learn.iterative_prune,
            1,
            8,
            lr=5.0,
            rewind='weights',
            rewind_to=8 * len(learn.dls.train),
            patience=1,
            monitor='accuracy',
        )


def test_cycles_begin_anew_on_a_sparse_learner(learner):
    learn = learner(bs=64, data=dict(test_pct=0))
    quietly(learn, learn.fit_cyclical, 1, 2, 0.9, interval=2)
    cb = quietly(learn, learn.fit_cyclical, 2, 2, 0.9, interval=2, track=True)
    n = 2 * len(learn.dls.train)
    assert (
        cb.reached[0] < 0.2
        and 0.4 < cb.reached[n] < 0.5
        and cb.reached[-1] == cb.reached[n - 1] == learn.masks.sparsity
    )


def test_torch_dataloaders_have_gradients_too():
    from fastai.basics import DataLoaders

    learn = mlp_learner()
    data = [(learn.dls.train_ds.x[i], learn.dls.train_ds.y[i]) for i in range(200)]
    dl = lambda: torch.utils.data.DataLoader(data, batch_size=50)
    learn = Learner(DataLoaders(dl(), dl()), learn.model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    assert learn.gradient_histogram(n_batches=2).gradients.std() > 0
    learn.prune(0.5, criterion=taylor, n_batches=2)
    table = quietly(
        learn, learn.iterative_prune, 2, 1, prune_rate=0.5, lr=0.1, criterion=taylor, n_batches=1, train_first=False
    )
    assert len(table) == 3 and np.isfinite(learn.linear_path(learn, learn, n=2, train=True).train.losses).all()


def test_sculpt_says_no_before_it_prunes(learner):
    learn = learner()
    for kw, msg in (
        (dict(cbs=SparsifyCallback(0.5)), 'adds its own SparsifyCallback'),
        (dict(sparsity=90), 'did you mean 0.9'),
    ):
        with pytest.raises(ValueError, match=msg):
            learn.fit_sculpt(**{**dict(sparsity=0.9, start_sparsity=0.8, n_cycles=1, epochs_per_cycle=1), **kw})
        assert learn.masks is None
    learn.prune(0.85)
    with pytest.raises(ValueError, match='sparse already'):
        learn.fit_sculpt(0.9, 0.8, 1, 1)


def test_sculpt_leaves_frozen_weights_alone(learner):
    learn = learner()
    learn.model[1][0].weight.requires_grad_(False)
    before = learn.model[1][0].weight.detach().clone()
    with learn.no_bar(), learn.no_logging():
        learn.fit_sculpt(0.8, 0.6, 1, 1)
    assert equal(before, learn.model[1][0].weight) and learn.masks.sparsity == pytest.approx(0.8, abs=1e-3)


def test_ends_of_cycles_of_short_epochs(learner):
    from fastai.callback.all import ShortEpochCallback

    learn = learner()
    with learn.no_bar(), learn.no_logging():
        ends = learn.fit_cycles(3, 1, lr=0.01, ends=True, cbs=ShortEpochCallback(0.3, short_valid=False))
    assert len(ends) == 3
