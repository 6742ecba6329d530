"What analyses leave behind, and what they are told about the Learner that they look at"

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, params, set_seed
from fastai.callback.all import ProgressCallback
from torch import nn

from fastprune.all import LC, Sparsifier, SparsifyCallback, lr_cyclical, sweep
from fastprune.analysis.paper_methods import paper_methods
from fastprune.analysis.paths import Barrier
from fastprune.analysis.states import point_setter
from fastprune.analysis.weights import SignFlips
from fastprune.core.devices import pretend
from fastprune.deploy.shrink_callback import ShrinkCallback
from fastprune.methods.budgeted import BudgetedCallback
from fastprune.schedules.retraining import allr_discount


def make(seed=0, model=None, **kwargs):
    set_seed(seed)
    items = [(torch.randn(16), torch.tensor(i % 4)) for i in range(32)]
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items[:8], bs=8))
    model = model or nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs)
    learn.remove_cbs(ProgressCallback)
    learn.logger = lambda *args: None
    return learn


def short(learn, cbs=None):
    learn.fit(1, 0.01, cbs=cbs)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight


def test_a_tied_weight_is_mixed_once_on_a_gpu():
    learn, states = (
        make(model=Tied()),
        [{n: torch.full((4, 4), x) for n in ('a.weight', 'b.weight')} for x in (1.0, 3.0)],
    )
    target = learn.model.state_dict()
    with pretend(), torch.no_grad():
        point_setter(learn, target, states, [], 'interpolate')((0.5, 0.5))
    assert torch.equal(learn.model.a.weight, torch.full((4, 4), 2.0))


@pytest.mark.parametrize(
    'look', [lambda l: l.instability(None, short), lambda l: l.envelope((1,), (1,), 0.5, seeds=(0,))]
)
def test_rates_of_groups_are_on_record_after_other_trainings(look):
    learn = make(splitter=lambda m: [params(m[:1]), params(m[1:])])
    learn.fit_one_cycle(1, slice(0.001, 0.1))
    look(learn)
    learn.prune(0.5, scope='global')
    learn.retrain(1)
    low, high = (h['lr'] for h in learn.opt.hypers)
    assert low == pytest.approx(high / 100)


def test_a_pruned_learner_can_still_be_retrained():
    learn = make()
    learn.fit_one_cycle(1, 0.1)
    learn.prune(0.9, scope='global')
    change = learn.keep_masks.change
    learn.instability(None, short)
    assert learn.keep_masks.change == change > 0
    learn.retrain(1)


def test_random_states_and_the_order_of_data_are_as_before():
    learn = make()
    state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    before, order, rng = state(), learn.dls.train.rng.getstate(), learn.dls.train.rng
    learn.instability(None, short)
    assert state() == before and learn.dls.train.rng is rng and rng.getstate() == order


def stopped_while_frozen(learn, cbs):
    learn.freeze()
    learn.fit(1, 0.01, cbs=cbs)
    raise KeyboardInterrupt


def test_the_same_parameters_are_frozen_after_other_trainings():
    learn = make(splitter=lambda m: [params(m[0]), params(m[2])])
    learn.model[0].bias.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        learn.instability(None, stopped_while_frozen)
    assert [p.requires_grad for p in learn.model.parameters()] == [True, False, True, True]
    learn.instability(None, lambda learn, cbs: learn.fine_tune(1, cbs=cbs), n=2)
    assert [p.requires_grad for p in learn.model.parameters()] == [True, False, True, True]


def test_a_plain_state_has_the_masks_of_the_learner():
    learn, kept = make(), []
    learn.prune(0.9)
    masks = learn.masks

    def fit(learn, cbs):
        short(learn, cbs)
        kept.append((learn.masks, float((learn.model[0].weight == 0).float().mean())))

    learn.instability(learn.model.state_dict(), fit)
    assert all(m == masks and zeros > 0.85 for m, zeros in kept) and len(kept) > 1


def test_the_rates_of_each_cycle_of_bimp_are_those_of_its_own_change(monkeypatch):
    "Pruned weights, which the last step has moved, are no part of it"
    learn, want = make(opt_func=SGD), []
    update = BudgetedCallback.update_masks

    def watched(self, weights):
        if not self.engine.is_due():
            return
        old = self.engine.present()
        before = {n: p.detach() * old[n] for n, p in weights.items()}
        update(self, weights)
        was, now = (sum(int(m.sum()) for m in masks.values()) for masks in (old, self.engine.present()))
        want.append(allr_discount(before, weights, 1 - now / was, self.budget))

    monkeypatch.setattr(BudgetedCallback, 'update_masks', watched)
    assert learn.fit_bimp(8, 0.9, cycles=2, lr_max=0.1).discounts == pytest.approx(want) and len(want) == 2


def test_a_barrier_can_be_copied():
    b = Barrier(1.5, 0.25)
    for c in (copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
        assert (c, c.loss, c.error) == (1.5, 1.5, 0.25)


def test_signs_are_counted_anew_after_channels_are_cut():
    learn, flips = make(), SignFlips(2)
    n = len(learn.dls.train)
    cbs = [SparsifyCallback(0.5, granularity='channel', recover=False), ShrinkCallback(), flips]
    learn.fit(3, 0.01, cbs=cbs)
    assert len(flips.flips) == 3 * n // 2


@pytest.mark.parametrize('name', ['imp', 'wr', 'lrr', 'bimp'])
def test_methods_of_the_papers_at_sparsity_0(name):
    learn = make()
    paper_methods(4, 0.01, name)[name](learn, 0.0, 0)
    assert not learn.masks and len(learn.recorder.values) == 4


@pytest.mark.parametrize(
    'values,error',
    [
        ({'sparsity': 1.0}, "measure.learn. has 'sparsity', which is a column"),
        ({'a': object()}, "measure.learn. has 'a', which can't be saved"),
        (3.0, 'returned a float: needs a dict'),
    ],
)
def test_what_measure_may_not_return(tmp_path, values, error):
    with pytest.raises(RuntimeError, match=f"'none' at sparsity 0.5 with seed 0 failed: ValueError: .*{error}"):
        sweep(_make, {'none': _nothing}, [0.5], [0], folder=tmp_path, measure=lambda l: values, bar=False)


def _nothing(learn, sparsity, seed):
    "Trains nothing"


def test_measured_numbers_of_numpy_and_torch_are_saved(tmp_path):
    values = {'a': torch.tensor(1.5), 'b': np.float32(2.5), 'c': np.int64(3)}
    call = lambda: sweep(_make, {'none': _nothing}, [0.5], [0], folder=tmp_path, measure=lambda l: values, bar=False)
    table = call()
    assert table[['a', 'b', 'c']].values.tolist() == [[1.5, 2.5, 3.0]] == call()[['a', 'b', 'c']].values.tolist()


def _make(seed):
    return make()


def test_growth_from_epoch_to_epoch_needs_epochs():
    model = nn.Linear(8, 8)
    opt = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    sparsifier = lambda **kw: Sparsifier(model, LC(0.5, growth=1.1), total_steps=4, optimizer=opt, **kw)
    with pytest.raises(ValueError, match=r'growth=1.1: .*give `steps_per_epoch`'):
        sparsifier()
    assert sparsifier(steps_per_epoch=2).step is not None


@pytest.mark.parametrize(
    'look',
    [
        lambda l, **kw: l.linear_path(l.model, l.model, **kw),
        lambda l, **kw: l.plane(l.model, l.model, l.model, **kw),
        lambda l, **kw: l.sensitivity([0.5], **kw),
    ],
)
def test_data_to_evaluate_on(look):
    learn = make()
    with pytest.raises(ValueError, match='dl: its batches have no targets'):
        look(learn, dl=torch.utils.data.DataLoader([(torch.zeros(16),)] * 4, 2))
    learn.dls = DataLoaders(learn.dls.train)
    with pytest.raises(ValueError, match='dl=None: this Learner has no validation set'):
        look(learn)


class Normalises(nn.Module):
    "A model that changes its input in place"

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.norm(x.sub_(0.5).div_(0.5)))


def test_a_model_that_changes_batches_in_place():
    learn = make(model=Normalises())
    loss = learn.validate()[0]
    assert learn.linear_path(learn, learn, n=3).losses == pytest.approx([loss] * 3)
    with learn.no_logging():
        learn.recalibrate()
    losses = learn.linear_path(learn, learn, n=3, bn='recalibrate').losses
    assert losses == pytest.approx([learn.validate()[0]] * 3)


def test_three_states_on_a_line():
    learn = make()
    a, b = learn.model.state_dict(), make(seed=1).model.state_dict()
    c = {n: (a[n] + b[n]) / 2 if a[n].is_floating_point() else a[n] for n in a}
    with pytest.raises(ValueError, match='the three states are on one line'):
        learn.plane(a, b, c)
    for kwargs, message in ((dict(n='15'), "n='15'"), (dict(n=None), 'n=None'), (dict(margin=-1), 'margin=-1')):
        with pytest.raises(ValueError, match=message):
            learn.plane(a, b, c, **kwargs)


def test_lower_bounds_of_cyclical_rates():
    rate = lr_cyclical([1e-3, 1e-2], low=[1e-4, 1e-3], half=0.5)
    assert np.allclose(rate(0.0), [1e-4, 1e-3]) and np.allclose(rate(0.5), [1e-3, 1e-2])
    for low in (float('nan'), [1e-4] * 3, [1e-2, 1e-2], -1.0):
        with pytest.raises(ValueError, match='low='):
            lr_cyclical([1e-3, 1e-2], low=low)
