"Channels that belong together are cut together while a Learner trains"

import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from channel_nets import Attending, RandomNet, Tower
from fastai.basics import Callback, load_learner, params
from helpers import FEW, SGDM, same, stopped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastprune.all import (
    DPF,
    GMP,
    GSM,
    LC,
    Checkpoint,
    SparsifyCallback,
    Ticket,
    cyclical,
    linear,
    ocp,
    one_shot,
    taylor,
)
from fastprune.core.channel_norms import KeptNorm
from fastprune.core.channels import channel_masks
from fastprune.engine import channel_targets
from fastprune.engine.channel_targets import remember_groups

pytestmark = pytest.mark.usefixtures('deterministic')
grouped = partial(Tower, lambda n: nn.GroupNorm(2, n))


def made(learner, model=Tower, **kwargs):
    torch.manual_seed(0)
    return learner(model(), **(kwargs if 'bs' in kwargs else FEW | kwargs))


def fit(learn, epochs=2, *cbs, lr=0.02):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr, cbs=list(cbs))


def channels(learn):
    "Number of kept channels of each group; the masks have to be those of whole channels"
    bound = learn.keep_masks.channels
    kept = bound.kept(learn.masks)
    assert channel_masks(bound.channels, kept) == learn.masks
    parameters = dict(learn.model.named_parameters())
    assert not any(parameters[n][~m].count_nonzero() for n, m in learn.masks.items())
    return [int(k.sum()) for k in kept]


@pytest.mark.parametrize('recover', [True, False])
def test_groups_that_are_pruned_one_after_the_other_stay_whole(learner, recover):
    "Neighbours share tensors"
    learn = made(learner)
    for name, sparsity in ((['stem', 'down'], 0.25), ('up', 0.5)):
        learn.prune(sparsity, granularity='channel', include=name, recover=recover)
    assert channels(learn) == [6, 6]
    stem = learn.masks['stem.weight']
    fit(learn, 1, SparsifyCallback(0.75, granularity='channel', include='up', recover=recover, schedule=linear))
    assert channels(learn) == [6, 3] and torch.equal(learn.masks['stem.weight'], stem)


class Whole(Callback):
    "Checks after each batch that groups are whole"

    order, counts = 80, None

    def before_fit(self):
        self.counts = []

    def after_batch(self):
        if self.training:
            self.counts.append(channels(self.learn) if self.learn.masks else None)


@pytest.mark.sample(2)
@pytest.mark.parametrize('scope', ['local', 'global'])
@pytest.mark.parametrize('model', [Tower, grouped], ids=['BatchNorm', 'GroupNorm'])
def test_exact_counts(learner, model, scope):
    learn, cb, whole = made(learner, model), SparsifyCallback(0.5, scope=scope, granularity='channel'), Whole()
    fit(learn, 2, cb, whole)
    assert sum(channels(learn)) == 10 and whole.counts[-1] == channels(learn)
    if scope == 'local':
        assert channels(learn) == [4, 6]
    assert learn.recorder.metric_names[-2] == 'sparsity' and learn.recorder.values[-1][-1] == 0.5
    assert cb.reached[-1] == cb.asked[-1] == 0.5 and len(cb.reached) == len(whole.counts)
    for reached, kept in zip(cb.reached, whole.counts, strict=True):
        assert reached == (0 if kept is None else pytest.approx(1 - sum(kept) / 20))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), s=st.floats(0.2, 0.8), recover=st.booleans(), scope=st.sampled_from(['local', 'global'])
)
def test_random_networks(learner, seed, s, recover, scope):
    schedule = cyclical(linear, 2) if recover else ocp
    learn = made(learner, lambda: RandomNet(seed))
    fit(learn, 1, SparsifyCallback(s, schedule, scope=scope, granularity='channel', recover=recover), Whole())
    channels(learn)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'make',
    [
        partial(SparsifyCallback, schedule=cyclical(linear, 2), track=True),
        partial(SparsifyCallback, criterion=taylor, scope='global', recover=False),
        partial(SparsifyCallback, schedule=one_shot, interval=1, refresh=True, cost='flops', scope='global'),
        partial(SparsifyCallback, min_channels=2, round_to=2, initial=0.25),
        partial(GMP, interval=5),
        partial(LC, scope='local'),
        DPF,
        GSM,
    ],
    ids=['cyclical', 'taylor', 'PGD', 'options', 'GMP', 'LC', 'DPF', 'GSM'],
)
@pytest.mark.filterwarnings('ignore')
def test_methods_and_arguments(learner, make):
    learn, cb = made(learner, grouped, bs=128, opt_func=SGDM, wd=0.01), make(0.5, granularity='channel')
    fit(learn, 2, cb, Whole())
    assert sum(channels(learn)) == 10 and learn.recorder.values[-1][-1 - 2 * cb.track] == 0.5
    assert not cb.track or max(cb.recovered) > 0


def test_returned_channels_are_nonzero_and_train(learner):
    learn, seen = made(learner), []

    class Watch(Callback):
        order = 90

        def after_batch(self):
            if self.training and self.learn.masks:
                kept = self.learn.keep_masks.channels.kept(self.learn.masks)[1].clone()
                seen.append((kept, self.learn.model.up.weight.detach().clone()))

    fit(learn, 2, SparsifyCallback(0.5, cyclical(linear, 2), granularity='channel'), Watch())
    back = next(i for i in range(1, len(seen)) if (seen[i][0] & ~seen[i - 1][0]).any())
    new = seen[back][0] & ~seen[back - 1][0]
    assert seen[back][1][new].flatten(1).any(1).all() and not seen[back - 1][1][new].any()
    assert not torch.equal(seen[back][1][new], seen[back + 1][1][new])


def test_prune_and_return(learner):
    learn = made(learner)
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    learn.prune(0.75, granularity='channel')
    assert channels(learn) == [2, 3]
    learn.prune(0.25, granularity='channel')
    assert channels(learn) == [6, 9]
    parameters, state = dict(learn.model.named_parameters()), learn.model.state_dict()
    assert all(torch.equal(parameters[n], before[n] * m) for n, m in learn.masks.items())
    assert torch.equal(state['norm.running_var'], before['norm.running_var'])
    learn.prune(0.5, granularity='channel', recover=False, iterations=3)
    assert channels(learn) == [4, 6]
    learn.remove_masks()
    assert learn.masks is None


def test_an_error_leaves_zeros(learner):
    learn = made(learner)
    learn.prune(0.5, granularity='channel')

    def broken(weights):
        raise ValueError('no scores')

    with pytest.raises(ValueError, match='no scores'):
        learn.prune(0.25, broken, granularity='channel')
    assert channels(learn) == [4, 6]
    fit(learn, 1)
    assert channels(learn) == [4, 6]


def test_norms_of_a_learner(learner, tmp_path):
    learn = made(learner, grouped)
    names = list(learn.model.state_dict())
    fit(learn, 1, SparsifyCallback(0.5, granularity='channel'))
    assert [type(h) for h in learn.model.norm._forward_hooks.values()] == [KeptNorm]
    assert list(learn.model.state_dict()) == names
    x, values = learn.dls.one_batch()[0], learn.validate()
    learn.export(tmp_path / 'export.pkl')
    again = load_learner(tmp_path / 'export.pkl')
    with torch.no_grad():
        assert torch.equal(again.model.eval()(x), learn.model.eval()(x))
    assert not again.keep_masks.cut.values and learn.keep_masks.cut.values  # no part of an export
    assert np.array_equal(learn.validate(), values)
    state = {n: t.clone() for n, t in learn.model.state_dict().items()}
    other = made(learner, grouped)
    other.model.load_state_dict(state)
    with torch.no_grad():
        assert not torch.allclose(other.model.eval()(x), learn.model(x))  # without the hook
        other.masks = learn.masks  # recognised as those of channels
        assert torch.equal(other.model(x), learn.model(x))
    assert channels(other) == channels(learn)
    learn.remove_masks()
    assert not learn.model.norm._forward_hooks


HOW = {
    'track': dict(schedule=cyclical(linear, 2), track=True),
    'nested': dict(recover=False, scope='global'),
    'three cycles': dict(schedule=cyclical(ocp, 3)),
}


@pytest.mark.parametrize(
    'model,how',
    [
        pytest.param(Tower, 'track', marks=pytest.mark.slow),
        (grouped, 'nested'),
        (Tower, 'three cycles'),
        pytest.param(grouped, 'track', marks=pytest.mark.slow),
        pytest.param(Tower, 'nested', marks=pytest.mark.slow),
        pytest.param(grouped, 'three cycles', marks=pytest.mark.slow),
    ],
)
def test_checkpoint_resumes_to_the_bit(learner, model, how):
    def run(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(4, 0.02, cbs=[SparsifyCallback(0.5, granularity='channel', **HOW[how]), *cbs])

    whole, again = stopped(lambda: made(learner, model, opt_func=SGDM), run)
    assert same(whole, again)
    assert channels(whole) == channels(again)
    cut, other = whole.keep_masks.cut, again.keep_masks.cut
    assert cut.values.keys() == other.values.keys()
    assert all(torch.equal(t, other.state(again.masks)[n]) for n, t in cut.state(whole.masks).items())
    done = made(learner, model, opt_func=SGDM)
    run(done, Checkpoint('run'))  # a finished fit is loaded
    assert same(whole, done) and channels(done) == channels(whole)
    with torch.no_grad():
        x = whole.dls.valid.one_batch()[0]
        assert torch.equal(done.model.eval()(x), whole.model.eval()(x))


def test_a_second_fit_finds_the_same_groups(learner, monkeypatch):
    learn = made(learner)
    fit(learn, 1, SparsifyCallback(0.25, granularity='channel'))
    monkeypatch.setattr(channel_targets, 'trace_channels', None)  # not traced again
    fit(learn, 1, SparsifyCallback(0.5, granularity='channel'))
    assert channels(learn) == [4, 6]
    groups = learn.keep_masks.channels.channels
    remember_groups(learn.model, groups[:1])
    learn.remove_masks()
    learn.prune(0.5, granularity='channel')
    assert channels(learn) == [4]


def test_finding_groups_disturbs_nothing(learner):
    a, b = made(learner), made(learner)
    b.prune(0.25, granularity='channel')
    b.remove_masks()
    b.model.load_state_dict(a.model.state_dict())
    state = torch.get_rng_state()
    torch.manual_seed(1), fit(a, 1)
    torch.manual_seed(1), fit(b, 1)
    assert all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )
    assert len(state)


def test_frozen_body(learner):
    learn = made(
        learner, splitter=lambda m: [params(m.stem), params(nn.ModuleList([m.norm, m.up, m.norm_up, m.down, m.head]))]
    )
    learn.freeze_to(1)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        fit(learn, 1, SparsifyCallback(0.5, granularity='channel'))
    learn.unfreeze()
    fit(learn, 1, SparsifyCallback(0.5, granularity='channel'))
    assert channels(learn) == [4, 6] and w


def test_tickets_rewind_all_members(learner, tmp_path):
    learn = made(learner, grouped)
    start = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    run = lambda learn, cbs: fit(learn, 1, *cbs)
    tickets = learn.find_tickets(2, run, 0.25, granularity='channel', scope='local', folder=tmp_path / 'tickets')
    learn.load_ticket(tickets[-1])
    assert channels(learn) == [8 - 2 * round(0.4375 * 4), 12 - 2 * round(0.4375 * 6)]
    now = dict(learn.model.named_parameters())
    assert all(torch.equal(now[n], start[n] * m) for n, m in learn.masks.items())
    assert learn.model.norm._forward_hooks
    tickets[-1].save(tmp_path / 'ticket.safetensors')
    other = made(learner, grouped)
    other.load_ticket(Ticket.load(tmp_path / 'ticket.safetensors'))
    assert channels(other) == channels(learn) and other.model.norm._forward_hooks
    again = made(learner, grouped).find_tickets(
        2, run, 0.25, granularity='channel', scope='local', folder=tmp_path / 'tickets'
    )
    assert [t.masks for t in again] == [t.masks for t in tickets]


def test_recipes(learner):
    learn = made(learner, opt_func=SGDM)
    with learn.no_bar(), learn.no_logging():
        learn.fit_bimp(4, 0.5, cycles=2, lr_max=0.02, granularity='channel', scope='local')
        assert channels(learn) == [4, 6]
        learn.fit_cyclical(2, 2, 0.5, lr_max=0.02, granularity='channel')
    assert channels(learn) == [4, 6]


def test_heads(learner):
    learn = made(learner, partial(Attending, 8))
    fit(learn, 1, SparsifyCallback(0.5, granularity='head'))
    (group,) = learn.keep_masks.channels.channels
    assert group.kind == 'head' and channels(learn) == [2]
    learn.remove_masks()
    fit(learn, 1, SparsifyCallback(0.5, granularity='channel'), Whole())
    assert dict(zip(learn.keep_masks.channels.group_names, channels(learn), strict=True)) == {
        'embed.weight': 8,
        'attention.in_proj_weight': 2,
        'mlp.weight': 12,
    }


def test_copies(learner):
    learn = made(learner, grouped)
    learn.prune(0.5, granularity='channel')
    twin = copy.deepcopy(learn.keep_masks.cut)
    assert all(torch.equal(t, learn.keep_masks.cut.values[n]) for n, t in twin.values.items())
    assert not pickle.loads(pickle.dumps(learn.keep_masks.cut)).values


def test_errors(learner):
    def fails(message, sparsity=0.5, **kwargs):
        for prune in (
            lambda learn: learn.prune(sparsity, **{'granularity': 'channel', **kwargs}),
            lambda learn: fit(learn, 1, SparsifyCallback(sparsity, **{'granularity': 'channel', **kwargs})),
        ):
            with pytest.raises(ValueError, match=message):
                prune(made(learner))

    fails("scope='erk' distributes", scope='erk')
    fails('round_to=16 is above the channels of all groups: the widest, .up.weight., has 12', round_to=16)
    fails('the model has no attention heads', granularity='head')
    fails('include and exclude leave no group', exclude='down')
    fails("'stem.weight' gets 0.5 and 'down.weight' gets 0.25", {'stem': 0.5, 'down': 0.25})
    fails('min_channels=2 is about whole channels', granularity='weight', min_channels=2)
    with pytest.raises(ValueError, match='use `min_channels`'):
        made(learner).prune(0.5, granularity='channel', min_density=0.1)
    with pytest.raises(ValueError, match="recover='alive'"):
        SparsifyCallback(0.5, granularity='channel', recover='alive')


def test_other_masks_beside_channels(learner):
    learn = made(learner, grouped)
    learn.prune(0.5, granularity='channel')
    kept = channels(learn)
    learn.prune(0.8, recover=False)  # weights, within the kept channels
    assert learn.keep_masks.channels is None and learn.model.norm._forward_hooks
    assert [int(k.sum()) for k in learn.keep_masks.cut.kept] <= kept
    fit(learn, 1, SparsifyCallback(0.9, recover=False))
    assert learn.recorder.values[-1][-1] == pytest.approx(learn.sparsity_report().sparsity.total, abs=0.05)
