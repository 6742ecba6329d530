"Channels that belong together are cut together while a network trains in a plain loop"

import copy
import pickle

import pytest
import torch
from channel_nets import Attending, RandomNet, Tower
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import forbid_float64, forbid_reads
from torch import nn

from fastprune.core.channel_counts import channel_counts
from fastprune.core.channel_graph import find_channels
from fastprune.core.channel_norms import KeptNorm
from fastprune.core.channels import channel_masks
from fastprune.core.devices import pretend
from fastprune.criteria.weights import magnitude
from fastprune.engine.method import Method
from fastprune.engine.sparsifier import Sparsifier
from fastprune.schedules.sparsity import cyclical, linear, ocp, one_shot

STEPS = 24


def inputs(t=0, n=8):
    gen = torch.Generator().manual_seed(t)
    return torch.randn(n, 1, 6, 6, generator=gen), torch.randint(10, (n,), generator=gen)


def sparsifier(model, method, steps=STEPS, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return Sparsifier(model, method, steps, optimizer, **{'example': inputs()[0], **kwargs})


def steps(pruner, first=0, last=STEPS, each=lambda: None):
    for t in range(first, last):
        pruner.optimizer.inner.zero_grad()
        pruner.before_forward()
        x, y = inputs(t)
        nn.functional.cross_entropy(pruner.model(x), y).backward()
        pruner.step()
        each()


def check_whole(pruner):
    "Masks are those of whole channels, pruned weights are zero, and the counts are exact"
    masks, bound = pruner.masks, pruner.granularity
    if masks is None:
        assert not any(pruner.count(pruner.asked).values())
        return
    kept = bound.kept(masks)
    assert masks == channel_masks(bound.channels, kept)
    weights = dict(pruner.model.named_parameters())
    assert not any(weights[n][~m].count_nonzero() for n, m in masks.items())
    cut = channel_counts(bound.channels, pruner.asked, bound.min_channels, bound.round_to)
    assert [g.n - int(k.sum()) for g, k in zip(bound.channels, kept, strict=True)] == list(cut.values())
    assert pruner.sparsity == pytest.approx(sum(cut.values()) / bound.n_channels)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    s=st.floats(0.1, 0.9),
    schedule=st.sampled_from([ocp, linear, one_shot, cyclical(ocp, 2)]),
    least=st.integers(1, 3),
    round_to=st.sampled_from([1, 2]),
)
def test_groups_are_whole_at_every_step(seed, s, schedule, least, round_to):
    torch.manual_seed(seed)
    options = dict(granularity='channel', min_channels=least, round_to=round_to)
    pruner = sparsifier(RandomNet(seed), Method(s, schedule, **options), 12)
    steps(pruner, last=12, each=lambda: check_whole(pruner))
    pruner.finish()
    check_whole(pruner)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), s=st.floats(0.1, 0.9), scope=st.sampled_from(['local', 'global']))
def test_without_recovery_masks_are_nested(seed, s, scope):
    torch.manual_seed(seed)
    pruner = sparsifier(RandomNet(seed), Method(s, scope=scope, granularity='channel', recover=False), 12)
    last = {}

    def nested():
        if pruner.masks is None:
            return
        assert pruner.masks == channel_masks(pruner.granularity.channels, pruner.granularity.kept(pruner.masks))
        assert all(not (m & ~last.get(n, m)).any() for n, m in pruner.masks.items())
        last.update({n: m.clone() for n, m in pruner.masks.items()})

    steps(pruner, last=12, each=nested)
    assert not pruner.keeper.cut.values  # nothing comes back, so that nothing is stored


def test_cut_channels_are_zero_downstream():
    model = Tower()
    pruner = sparsifier(model, Method(0.5, granularity='channel'))
    steps(pruner)
    kept = dict(zip(pruner.granularity.group_names, pruner.granularity.kept(pruner.masks), strict=True))
    seen = {}
    model.norm.register_forward_hook(lambda m, args, out: seen.update(stream=out))
    model.norm_up.register_forward_hook(lambda m, args, out: seen.update(up=out))
    model.eval()(inputs()[0])
    assert not seen['stream'][:, ~kept['stem.weight']].any() and not seen['up'][:, ~kept['up.weight']].any()
    assert int(kept['stem.weight'].sum()) == 4 and int(kept['up.weight'].sum()) == 6


def last_channels(weights):
    "A criterion that changes its mind: scores by a number that the test sets"
    return {n: p.detach().abs() * last_channels.factor.get(n, 1) for n, p in weights.items()}


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n)])
def test_a_returned_channel_has_its_values_and_trains(norm):
    torch.manual_seed(0)
    model = Tower(norm)
    pruner = sparsifier(model, Method(0.5, cyclical(linear, 2), granularity='channel'))
    at = []

    def watch():
        kept = pruner.granularity.kept(pruner.masks)[1] if pruner.masks else torch.ones(12).bool()
        state = {n: t.clone() for n, t in model.state_dict().items() if n.split('.')[0] in ('up', 'norm_up')}
        at.append((kept.clone(), state))

    watch()
    steps(pruner, each=watch)
    back = next(i for i in range(1, len(at)) if (at[i][0] & ~at[i - 1][0]).any())
    returned = (at[back][0] & ~at[back - 1][0]).nonzero().flatten()
    for c in returned.tolist():
        cut = max(i for i in range(1, back) if at[i - 1][0][c] and not at[i][0][c])
        weight = at[back][1]['up.weight'][c]
        assert weight.any() and not at[back - 1][1]['up.weight'][c].any()
        # the optimizer has made a step between the last state with the channel and the cut
        was = at[cut - 1][1]['up.weight'][c]
        both = (was != 0) & (weight != 0)  # input channels may be cut in one of them
        assert both.any() and (weight - was)[both].abs().max() < 0.02
        if norm is nn.BatchNorm2d:
            assert at[back][1]['norm_up.running_var'][c] == at[cut][1]['norm_up.running_var'][c]
    later = at[min(back + 2, len(at) - 1)]
    stayed = returned[later[0][returned]]
    assert not torch.equal(later[1]['up.weight'][stayed], at[back][1]['up.weight'][stayed])


def test_values_are_those_of_the_cut():
    "Cut by hand, and back again: the values of weights, biases and running statistics return to the bit"
    torch.manual_seed(0)
    model = Tower()
    pruner = sparsifier(model, Method(0.5, granularity='channel'))
    steps(pruner, last=2)
    model.norm_up.running_mean.normal_()
    bound, keep = pruner.granularity, [torch.ones(8).bool(), torch.arange(12) >= 4]
    named = {n: t.detach().clone() for n, t in model.state_dict().items()}
    hold = lambda kept: pruner.hold(type(pruner.present())(channel_masks(bound.channels, kept)), None, pruner.origin)
    hold(keep)
    assert not model.up.weight[:4].any() and not model.norm_up.bias[:4].any()
    model.norm_up.running_mean.mul_(0.5)
    with torch.no_grad():
        model.up.weight[5] = 7
    hold([torch.ones(8).bool(), torch.arange(12) >= 1])
    assert not model.up.weight[:1].any() and (model.up.weight[5] == 7).all()
    for n in ('up.weight', 'up.bias', 'norm_up.weight', 'norm_up.bias', 'norm_up.running_mean', 'norm_up.running_var'):
        assert torch.equal(dict(model.state_dict())[n][1:4], named[n][1:4]), n
    assert torch.equal(model.down.weight[:, 1:4], named['down.weight'][:, 1:4])
    assert torch.equal(model.norm_up.running_mean[4:], named['norm_up.running_mean'][4:] * 0.5)


@pytest.mark.sample(2)
@pytest.mark.parametrize('scope', ['local', 'global'])
@pytest.mark.parametrize('track', [False, True])
def test_no_step_reads(scope, track):
    "And the masks, the weights and the history are those of a CPU, to the bit"
    results = []
    for on_gpu in (False, True):
        torch.manual_seed(0)
        model = Tower(lambda n: nn.GroupNorm(2, n))
        with pretend(float64=False) if on_gpu else torch.no_grad():
            pruner = sparsifier(model, Method(0.5, cyclical(ocp, 2), scope=scope, granularity='channel', track=track))
        for t in range(STEPS):
            x, y = inputs(t)
            pruner.optimizer.inner.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if on_gpu:
                with forbid_reads(), forbid_float64():
                    pruner.before_step()
                pruner.optimizer.step()
                with forbid_reads(), forbid_float64():
                    pruner.after_step()
            else:
                pruner.step()
        pruner.finish()
        results.append((model.state_dict(), pruner.masks, pruner.method.reached, pruner.method.recovered))
    a, b = results
    assert all(torch.equal(a[0][n], b[0][n]) for n in a[0])
    assert a[1:] == b[1:]


@pytest.mark.parametrize('recover', [True, False])
def test_resumes_to_the_bit(recover):
    make = lambda: Method(0.5, cyclical(ocp, 2), granularity='channel', recover=recover, track=True)
    torch.manual_seed(0)
    first = Tower(lambda n: nn.GroupNorm(2, n))
    whole = sparsifier(first, make())
    saved = {}

    def save():
        if whole.t == 15 and not saved:
            saved.update(
                state=copy.deepcopy(whole.state_dict()),
                model=copy.deepcopy(first.state_dict()),
                opt=copy.deepcopy(whole.optimizer.inner.state_dict()),
            )

    steps(whole, each=save)
    second = Tower(lambda n: nn.GroupNorm(2, n))
    again = sparsifier(second, make())
    steps(again, last=9)  # other masks and values, which are replaced
    second.load_state_dict(saved['model'])
    again.optimizer.inner.load_state_dict(saved['opt'])
    again.load_state_dict(saved['state'])
    assert again.t == 15
    steps(again, 15)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert whole.masks == again.masks and whole.method.reached == again.method.reached
    assert whole.method.recovered == again.method.recovered


def test_other_states_are_rejected():
    pruner = sparsifier(Tower(), Method(0.5, granularity='channel'))
    steps(pruner)
    state = pruner.state_dict()
    again = sparsifier(Tower(), Method(0.5, granularity='channel'))
    for cut in ({'no.weight': torch.ones(1)}, {'up.weight': torch.ones(1)}, 3):
        with pytest.raises(ValueError, match='cut has the wrong type or shape'):
            again.load_state_dict({**state, 'cut': cut})
    with pytest.raises(ValueError, match='masks has the wrong type or shape'):
        again.load_state_dict({**state, 'masks': {'up.weight': state['masks']['up.weight']}})


def test_attention_goes_by_heads():
    model = Attending(6)
    pruner = sparsifier(model, Method(0.5, granularity='head'), example=inputs()[0][:, 0])
    assert pruner.target == {'attention.in_proj_weight': 0.5}
    for t in range(STEPS):
        x, y = inputs(t)
        pruner.optimizer.inner.zero_grad()
        nn.functional.cross_entropy(model(x[:, 0]), y).backward()
        pruner.step()
    rows = pruner.masks['attention.in_proj_weight'].view(3, 4, 4, 16)
    assert rows.any(3).any(2).sum().item() == 6 and rows.all(3).all(2).sum().item() == 6


def test_norms_are_hooked_while_masks_are_held():
    model = Tower(lambda n: nn.GroupNorm(2, n))
    names = list(model.state_dict())
    pruner = sparsifier(model, Method(0.5, granularity='channel'))
    steps(pruner)
    (hook,) = model.norm._forward_hooks.values()
    kept = pruner.granularity.kept(pruner.masks)[0]
    assert isinstance(hook, KeptNorm) and torch.equal(hook.kept, kept)
    assert list(model.state_dict()) == names
    x = inputs()[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_targets():
    model, example = Tower(), inputs()[0]
    names = lambda **kwargs: list(sparsifier(model, Method(granularity='channel', **kwargs)).target)
    assert names(sparsity=0.5) == ['stem.weight', 'up.weight']
    assert names(sparsity=0.5, exclude='head') == ['up.weight']  # a reader keeps the whole stream
    assert names(sparsity=0.5, exclude='norm_up') == ['stem.weight']  # and so do norms and biases
    assert names(sparsity=0.5, exclude='stem.bias') == ['up.weight']
    assert names(sparsity=0.5, include=['up', 'down', 'stem']) == ['stem.weight', 'up.weight']
    assert names(sparsity={'up': 0.25}) == ['up.weight']
    with pytest.raises(ValueError, match="'stem.weight' gets 0.5 and 'down.weight' gets 0.25"):
        names(sparsity={'stem': 0.5, 'down': 0.25})
    with pytest.raises(ValueError, match='include and exclude leave no group'):
        names(sparsity=0.5, exclude='down')
    with pytest.raises(ValueError, match='include and exclude leave no group'):
        names(sparsity=0.5, include='stem')  # the stream is made by `down`, too
    with pytest.raises(ValueError, match='the model has no attention heads'):
        sparsifier(model, Method(0.5, granularity='head'))
    with pytest.raises(ValueError, match="widest, 'up.weight', has 12"):
        names(sparsity=0.5, round_to=16)
    with pytest.raises(ValueError, match="give the Sparsifier `example="):
        Sparsifier(Tower(), Method(0.5, granularity='channel'), 4)
    groups = find_channels(model, example)
    assert list(Sparsifier(Tower(), Method(0.5, granularity='channel'), 4, groups=groups[:1]).target) == ['stem.weight']


@pytest.mark.filterwarnings('ignore:Method leaves out what is frozen')
def test_a_frozen_member_keeps_its_group():
    model = Tower()
    model.head.requires_grad_(False)
    assert list(sparsifier(model, Method(0.5, granularity='channel')).target) == ['up.weight']
    with pytest.raises(ValueError, match='include: .*is frozen'):
        sparsifier(model, Method(0.5, granularity='channel', include=['up', 'stem', 'down']))


def test_arguments():
    for kwargs, message in (
        (dict(scope='erk'), "scope='erk' distributes"),
        (dict(scope='balanced'), "scope='balanced' distributes"),
        (dict(recover='alive'), "recover='alive'"),
        (dict(min_channels=0), 'min_channels=0'),
        (dict(round_to=0.5), 'round_to=0.5'),
        (dict(cost='seconds'), 'cost='),
    ):
        with pytest.raises(ValueError, match=message):
            Method(0.5, granularity='channel', **kwargs)
    for name, value in dict(min_channels=2, round_to=8, cost='flops').items():
        with pytest.raises(ValueError, match=f'{name}={value!r} is about whole channels'):
            Method(0.5, **{name: value})


def test_initial_and_present_sparsity():
    model = Tower()
    first = sparsifier(model, Method(0.25, one_shot, granularity='channel'))
    steps(first)
    first.finish()
    second = sparsifier(model, Method(0.75, linear, granularity='channel'), keeper=first.keeper)
    assert second.state.start_sparsity == {'stem.weight': 0.25, 'up.weight': 0.25} and second.sparsity == 0.25
    steps(second, each=lambda: check_whole(second))
    third = sparsifier(Tower(), Method(0.75, linear, granularity='channel', initial={'*': 0.25, 'up': 0.5}))
    assert third.state.start_sparsity == {'stem.weight': 0.25, 'up.weight': 0.5}


def test_criteria_see_the_values_of_cut_channels():
    seen = []

    def watched(weights):
        seen.append({n: p.detach().clone() for n, p in weights.items()})
        return magnitude(weights)

    torch.manual_seed(0)
    model = Tower()
    pruner = sparsifier(model, Method(0.5, one_shot, watched, granularity='channel', refresh=True, interval=1))
    steps(pruner, last=3)
    assert model.up.weight.flatten(1).any(1).sum() == 6
    assert seen[-1]['up.weight'].flatten(1).any(1).sum() == 12


def test_compiled_models_see_the_norms():
    torch.manual_seed(0)
    model, x = Tower(lambda n: nn.GroupNorm(2, n)), inputs()[0]
    compiled = torch.compile(model, backend='eager')
    compiled(x)  # compiled before there is any hook
    pruner = sparsifier(compiled, Method(0.5, linear, granularity='channel'), 4)
    for _ in range(4):
        compiled(x).square().mean().backward()
        pruner.step()
        assert torch.equal(compiled(x), model(x))


def test_groups_are_found_beside_norms_of_kept_channels():
    model = Tower(lambda n: nn.GroupNorm(2, n))
    steps(sparsifier(model, Method(0.25, one_shot, granularity='channel')))
    again = pickle.loads(pickle.dumps(model))  # with its hooks, and without groups that are known
    assert again.norm._forward_hooks
    pruner = sparsifier(again, Method(0.5, granularity='channel'))
    assert [g.n for g in pruner.granularity.channels] == [8, 12] and again.norm._forward_hooks


class Shifted(Tower):
    def forward(self, x):
        x = torch.sigmoid(self.norm(self.stem(x)))
        x = self.down(torch.relu(self.norm_up(self.up(x))))
        return self.head(x.mean((2, 3)))


def test_channels_that_are_not_zero_when_they_are_cut():
    with pytest.raises(ValueError, match='stem|sigmoid|up'):
        sparsifier(Shifted(), Method(0.5, granularity='channel'))
    pruner = sparsifier(Shifted(), Method(0.5, granularity='channel', exclude='stem'))
    assert 'up.weight' in pruner.target
