"Channels of groups are ranked, counted and masked exactly"

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import forbid_float64, forbid_reads
from torch import nn

from fastprune.core.channel_cost import ChannelCosts
from fastprune.core.channel_counts import channel_counts, fewest, steps_of
from fastprune.core.channel_granularity import Channels
from fastprune.core.channel_graph import find_channels
from fastprune.core.channel_index import ChannelIndex, channel_scores
from fastprune.core.channel_norms import KeptNorm
from fastprune.core.channels import ChannelGroup, Places, channel_masks
from fastprune.core.compute import compute_masks
from fastprune.core.devices import pretend
from fastprune.core.later import Checks, delayed_checks
from fastprune.core.masks import Masks
from fastprune.core.unit_counts import counted


def group(n, name='a.weight', blocks=1, inputs=3):
    i = torch.arange(n)
    places = (
        Places(name, 0, i, i, 'filter'),
        Places(f'{name}.bias', 0, i, i, 'other'),
        Places(f'{name}.next', 1, i, i, 'input'),
    )
    shapes = {name: (n, inputs), f'{name}.bias': (n,), f'{name}.next': (5, n)}
    return ChannelGroup(name, n, places, shapes, blocks)


def scores_of(groups, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = {p.name: g.shapes[p.name] for g in groups for p in g.places if p.role in ('filter', 'input')}
    return {n: torch.randn(s, generator=gen) for n, s in shapes.items()}


def by_hand(g, scores):
    "The mean over rows and columns of their mean |score|, over that of the tensor"
    a, b = (scores[n].abs() for n in (g.name, f'{g.name}.next'))
    return (a.mean(1) / a.mean() + b.mean(0) / b.mean()) / 2


@given(
    n=st.integers(1, 12).map(lambda k: 4 * k),
    s=st.floats(0, 0.99),
    blocks=st.sampled_from([1, 2, 4]),
    least=st.integers(1, 6),
    round_to=st.sampled_from([1, 2, 3, 8]),
)
def test_counts(n, s, blocks, least, round_to):
    g = group(n, blocks=blocks)
    kept = n - channel_counts([g], {'a.weight': s}, least, round_to)['a.weight']
    step = steps_of(g, round_to)
    assert fewest(g, least, round_to) <= kept <= n
    assert kept == n or kept % step == 0
    exact = n - round(s * n / blocks) * blocks
    if round_to == 1:
        assert kept == max(exact, fewest(g, least))
    elif fewest(g, least, round_to) <= kept < n and n >= step:
        nearest = min(range(step, n + 1, step), key=lambda k: abs(k - exact))
        assert abs(kept - exact) == abs(nearest - exact) or kept == fewest(g, least, round_to)


@settings(deadline=None)
@given(s=st.floats(0, 0.9), seed=st.integers(0, 99), absolute=st.booleans())
def test_local_masks_cut_the_lowest(s, seed, absolute):
    groups = [group(8), group(12, 'b.weight')]
    scores = scores_of(groups, seed)
    scores = scores if absolute else {n: x.abs() for n, x in scores.items()}
    bound = Channels('channel').bind(groups)
    masks = compute_masks(scores, s, granularity=bound, absolute=absolute)
    kept = bound.kept(masks)
    assert masks == channel_masks(groups, kept)
    for g, k in zip(groups, kept, strict=True):
        assert int(k.sum()) == g.n - round(s * g.n)
        x = by_hand(g, scores)
        assert k.all() or x[~k].max() <= x[k].min() + 1e-6


def test_equal_scores_go_by_position():
    bound = Channels('channel').bind([group(6)])
    ones = {n: torch.ones_like(x) for n, x in scores_of(bound.channels).items()}
    assert bound.kept(compute_masks(ones, 0.5, granularity=bound))[0].tolist() == [False] * 3 + [True] * 3


@settings(deadline=None)
@given(s=st.floats(0, 0.9), seed=st.integers(0, 99), least=st.integers(1, 5), blocks=st.sampled_from([1, 2]))
def test_global_counts(s, seed, least, blocks):
    groups = [group(8, blocks=blocks), group(12, 'b.weight', inputs=30), group(4, 'c.weight')]
    bound = Channels('channel', min_channels=least).bind(groups)
    masks = compute_masks(scores_of(groups, seed), s, 'global', bound, absolute=True)
    kept = [int(k.sum()) for k in bound.kept(masks)]
    limits = [fewest(g, least) for g in groups]
    assert all(k >= low for k, low in zip(kept, limits, strict=True))
    wanted, most = round(s * 24), 24 - sum(limits)
    assert abs(24 - sum(kept) - min(wanted, most)) <= (blocks - 1) and kept[0] % blocks == 0


def test_global_compares_what_cutting_saves():
    cheap, dear = group(4, 'a.weight', inputs=2), group(4, 'b.weight', inputs=200)
    bound = Channels('channel').bind([cheap, dear])
    masks = compute_masks(scores_of([cheap, dear]), 0.375, 'global', bound, absolute=True)
    assert [int(k.sum()) for k in bound.kept(masks)] == [4, 1]
    costs = ChannelCosts([cheap, dear], {'a.weight': 1e6, 'a.weight.next': 1e6, 'b.weight': 1})
    flops = Channels('channel', cost='flops').bind([cheap, dear], costs=costs)
    masks = compute_masks(scores_of([cheap, dear]), 0.375, 'global', flops, absolute=True)
    assert [int(k.sum()) for k in flops.kept(masks)] == [1, 4]


@pytest.mark.parametrize('scope', ['local', 'global'])
@pytest.mark.parametrize('blocks', [1, 4])
def test_what_is_cut_stays_cut(scope, blocks):
    groups = [group(8, blocks=blocks), group(12, 'b.weight')]
    bound, keep = Channels('channel').bind(groups), None
    for step, s in enumerate((0.2, 0.4, 0.7)):
        masks = compute_masks(scores_of(groups, step), s, scope, bound, keep, absolute=True)
        if keep is not None:
            assert all(not (masks[n] & ~keep[n]).any() for n in masks)
        keep = masks
    if scope == 'local':
        assert [int(k.sum()) for k in bound.kept(masks)] == [8 - round(0.7 * 8 / blocks) * blocks, 4]


@pytest.mark.parametrize('scope', ['local', 'global'])
def test_round_to(scope):
    groups = [group(24), group(32, 'b.weight'), group(6, 'c.weight')]
    bound = Channels('channel', round_to=8).bind(groups)
    for s in (0.1, 0.4, 0.8):
        masks = compute_masks(scores_of(groups), s, scope, bound, absolute=True)
        kept = [int(k.sum()) for k in bound.kept(masks)]
        assert kept[2] == 6 and kept[0] % 8 == kept[1] % 8 == 0 and min(kept[:2]) >= 8


def test_blocks_lose_equally_many():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Flatten(), nn.Linear(8, 2))
    groups = find_channels(model, torch.zeros(1, 3, 1, 1))
    assert [g.blocks for g in groups] == [4, 4]
    bound = Channels('channel').bind(groups)
    weights = {n: p.detach() for n, p in model.named_parameters() if n.endswith('weight')}
    for scope in ('local', 'global'):
        for k in bound.kept(compute_masks(weights, 0.5, scope, bound, absolute=True)):
            assert len(set(k.view(4, -1).sum(1).tolist())) == 1


@pytest.mark.parametrize('scope', ['local', 'global'])
def test_nothing_is_read_from_a_device(scope):
    groups = [group(24, blocks=2), group(32, 'b.weight')]
    scores, here = scores_of(groups), Channels('channel', round_to=4).bind(groups)
    first = compute_masks(scores, 0.3, scope, here, absolute=True)
    with pretend(float64=False):
        there = Channels('channel', round_to=4).bind(groups)
        there.index(torch.device('cpu'))
        with delayed_checks(Checks()), forbid_reads(), forbid_float64():
            masks = compute_masks(scores, 0.3, scope, there, absolute=True)
            nested = compute_masks(scores, 0.6, scope, there, masks, absolute=True)
            counted(there).sparsity_later(nested)
    assert masks == first


def test_odd_scores():
    bound = Channels('channel').bind([group(4)])
    scores = scores_of(bound.channels)
    for bad in (math.nan,):
        scores['a.weight'][1, 1] = bad
        with pytest.raises(ValueError, match="NaN|not numbers"):
            compute_masks(scores, 0.5, granularity=bound, absolute=True)
    scores['a.weight'][1, 1] = math.inf  # a weight that has to stay
    assert bound.kept(compute_masks(scores, 0.75, granularity=bound))[0].tolist() == [False, True, False, False]
    zeros = {n: torch.zeros_like(x) for n, x in scores.items()}
    assert int(bound.kept(compute_masks(zeros, 0.5, granularity=bound))[0].sum()) == 2
    half = {n: x.bfloat16() for n, x in scores_of(bound.channels).items()}
    assert channel_scores(ChannelIndex(bound.channels, torch.device('cpu')), half, True)[0].dtype == torch.float32


def test_errors():
    scores = {'a.weight': torch.ones(4, 3)}
    with pytest.raises(ValueError, match='needs the groups of channels of a model'):
        compute_masks(scores, 0.5, granularity='channel')
    bound = Channels('channel').bind([group(4)])
    with pytest.raises(ValueError, match="scope='erk'"):
        compute_masks(scores_of(bound.channels), 0.5, 'erk', bound)
    with pytest.raises(ValueError, match='a.weight.next.* is missing'):
        compute_masks(scores, 0.5, granularity=bound)
    with pytest.raises(ValueError, match="widest, 'a.weight', has 4"):
        Channels('channel', round_to=8).bind([group(4)])
    with pytest.raises(ValueError, match='min_channels=0'):
        Channels('channel', min_channels=0)
    with pytest.raises(ValueError, match='cost='):
        Channels('channel', cost='latency')


def smaller(norm, kept):
    "A norm of the kept channels alone"
    k = int(kept.sum())
    res = {
        nn.LayerNorm: lambda: nn.LayerNorm(k),
        nn.RMSNorm: lambda: nn.RMSNorm(k),
        nn.GroupNorm: lambda: nn.GroupNorm(norm.num_groups, k) if isinstance(norm, nn.GroupNorm) else None,
    }[type(norm)]()
    for p, q in zip(res.parameters(), norm.parameters(), strict=True):
        p.data = q.data[kept]
    return res


@pytest.mark.parametrize(
    'norm, dim', [(nn.LayerNorm(8), -1), (nn.RMSNorm(8), -1), (nn.GroupNorm(1, 8), 1), (nn.GroupNorm(2, 8), 1)]
)
def test_norms_are_those_of_a_smaller_norm(norm, dim):
    kept = torch.tensor([True, False, True, True, True, True, False, True])
    for p in norm.parameters():
        nn.init.normal_(p)
    little = smaller(norm, kept)
    hook = KeptNorm(norm)
    hook.update(kept)
    norm.register_forward_hook(hook)
    shape = [1] * 3
    shape[dim] = 8
    x = (torch.randn(4, 8, 8) * kept.view(shape)).requires_grad_()
    index = kept.nonzero().flatten()
    out, expected = norm(x).index_select(dim, index), little(x.index_select(dim, index))
    assert torch.allclose(out, expected, atol=1e-5)
    weights = torch.randn_like(out)
    a, b = (torch.autograd.grad((o * weights).sum(), x, retain_graph=True)[0] for o in (out, expected))
    assert torch.allclose(a.index_select(dim, index), b.index_select(dim, index), atol=1e-4)
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(x.bfloat16()).dtype in (torch.float32, torch.bfloat16)


def test_masks_are_copied_with_bound_channels():
    bound = Channels('channel', round_to=2).bind([group(4)])
    bound.compute(scores_of(bound.channels), 0.5, 'local', absolute=True)
    for again in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert again == bound and again.round_to == 2 and not again._index
    assert bound != Channels('channel').bind([group(4)])
    assert isinstance(bound.compute(scores_of(bound.channels), 0.5, 'local'), Masks)
