"Shortcuts that put channels of zeros beside their input: the whole residual stream of such a ResNet can be cut"

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, Learner
from torch import nn

from fastprune.all import SparsifyCallback, cifar_resnet, digits_dls, load_shrunk, one_shot, save_shrunk
from fastprune.core.channel_cost import ChannelCosts, flop_counts, weight_costs
from fastprune.core.channel_graph import find_channels
from fastprune.core.channel_index import ChannelIndex, channel_scores
from fastprune.core.channel_zeros import check_zeros
from fastprune.core.channels import channel_masks
from fastprune.core.masks import Masks
from fastprune.deploy.channel_cut import cut_groups, groups_left
from fastprune.deploy.costs import count_flops
from fastprune.zoo.models import _Shortcut

pytestmark = pytest.mark.cpu_only  # groups are found on the CPU
image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(depth=20):
    "With norms and statistics at random"
    torch.manual_seed(0)
    model = cifar_resnet(depth).eval()
    for n, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and t.ndim < 2:
            t.data.uniform_(0.5, 1.5) if n.endswith(('weight', 'var')) else t.data.normal_()
    return model


def drawn(groups, seed=0, part=0.5):
    "Some channels of each group, at random"
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(g.n, generator=rng).argsort() < max(1, round(part * g.n)) for g in groups]


def by_name(groups):
    return {g.name: g for g in groups}


def positions(group, name, dim=0):
    return next(p.positions.tolist() for p in group.places if (p.name, p.dim) == (name, dim))


def test_groups_of_a_resnet():
    groups = find_channels(network(), image)
    # the inner channels of nine blocks, and the stream: channels in all stages, from the second and in the third
    inner = {f'{i}.convs.0.0.weight': 16 * 2 ** ((i - 1) // 3) for i in range(1, 10)}
    stream = {'0.0.weight': 16, '4.convs.1.0.weight': 16, '7.convs.1.0.weight': 32}
    assert {g.name: g.n for g in groups} == inner | stream
    one, two, three = (by_name(groups)[n] for n in stream)
    assert positions(one, '0.0.weight') == list(range(16))
    assert positions(one, '4.convs.1.0.weight') == list(range(8, 24))
    assert positions(one, '7.convs.1.0.weight') == positions(one, '12.weight', 1) == list(range(24, 40))
    assert positions(two, '4.convs.1.0.weight') == [*range(8), *range(24, 32)]
    assert positions(two, '7.convs.1.0.weight') == [*range(16, 24), *range(40, 48)]
    assert positions(three, '7.convs.1.0.weight') == [*range(16), *range(48, 64)]
    filters = [sum(p.role == 'filter' for p in g.places) for g in (one, two, three)]
    assert filters == [1 + 3 + 3 + 3, 3 + 3, 3]
    assert all(len(p.positions) == g.n for g in groups for p in g.places)


@pytest.mark.parametrize('part', [0.5, 0.01], ids=['half', 'one'])
def test_half_of_the_channels(part, tmp_path):
    model = network()
    groups = find_channels(model, image)
    check_zeros(model, groups, image)
    kept = drawn(groups, part=part)
    Masks(channel_masks(groups, kept)).apply_(dict(model.named_parameters()))
    small = copy.deepcopy(model)
    cuts = cut_groups(small, groups, kept)
    a, b = model(image), small(image)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    n = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert n[1] <= 0.3 * n[0]
    stream = dict(zip([g.name for g in groups], kept, strict=True))
    middle, sides = stream['0.0.weight'], stream['4.convs.1.0.weight']
    assert small[4].shortcut.channel_padding == (int(sides[:8].sum()), int(sides[8:].sum()))
    assert small[4].convs[1][0].out_channels == int(middle.sum() + sides.sum())
    # the groups that are left are those of the smaller network
    left, again = groups_left(groups, kept, cuts), find_channels(small, image)
    assert [(g.name, g.n, g.shapes) for g in left] == [(g.name, g.n, g.shapes) for g in again]
    for g, h in zip(left, again, strict=True):
        for p, q in zip(g.places, h.places, strict=True):
            assert p.positions.tolist() == q.positions.tolist() and p.channels.tolist() == q.channels.tolist()
    save_shrunk(small, tmp_path / 'small.safetensors')
    loaded = load_shrunk(tmp_path / 'small.safetensors', cifar_resnet).eval()
    assert torch.equal(loaded(image), b) and loaded[7].shortcut.channel_padding == small[7].shortcut.channel_padding
    other = cifar_resnet()
    other[7].shortcut.channel_padding = 0, 0
    with pytest.raises(ValueError, match='channel_padding of .7.shortcut. is '):
        load_shrunk(tmp_path / 'small.safetensors', lambda: other.to('meta'))


def test_costs_by_counts_are_exact():
    model = network()
    groups = find_channels(model, image)
    flops, heads = flop_counts(groups, model, lambda m: m(image))
    costs, weights = ChannelCosts(groups, flops, by_group=heads), weight_costs(groups)
    for seed, part in ((1, 0.5), (2, 0.3), (3, 0.9)):
        kept, small = drawn(groups, seed, part), copy.deepcopy(model)
        cut_groups(small, groups, kept)
        counts = [int(k.sum()) for k in kept]
        assert costs.of(counts) == pytest.approx(count_flops(small, (image,)), rel=1e-9)
        shared = [p.numel() for n, p in small.named_parameters() if any(n in g.shapes for g in groups)]
        assert weights.of(counts) == pytest.approx(sum(shared), rel=1e-9)


def test_a_channel_is_ranked_by_its_own_positions():
    model = network(8)
    groups = find_channels(model, image)
    scores = {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    found = channel_scores(ChannelIndex(groups, torch.device('cpu')), scores)
    assert all(torch.allclose(s, torch.ones(())) for s in found)
    scores['0.0.weight'][3] = 5.0  # in the first stage alone
    name = [g.name for g in groups]
    s = channel_scores(ChannelIndex(groups, torch.device('cpu')), scores)[name.index('0.0.weight')]
    assert s.argmax() == 3 and (s > 1).sum() == 1


def learner(**kwargs):
    torch.manual_seed(0)
    dls = digits_dls(64, channels=3)
    return Learner(dls, cifar_resnet(8), CrossEntropyLossFlat(), **kwargs)


@pytest.mark.parametrize('scope', ['local', 'global'])
def test_trained_cut_and_trained_on(scope):
    learn = learner()
    options = dict(granularity='channel', scope=scope, min_channels=4, round_to=4)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(0.5, one_shot, **options))
        x = learn.dls.one_batch()[0]
        a = learn.model.eval()(x).detach()
        learn.shrink(n_items=4, repeats=0)
        assert (learn.model.eval()(x) - a).abs().max() <= 1e-5 * a.abs().max()
        widths = [learn.model[0][0].out_channels, learn.model[2].convs[1][0].out_channels]
        assert all(w % 4 == 0 for w in widths) and learn.model[0][0].out_channels >= 4
        if scope == 'local':
            assert [*widths, learn.model[3].convs[1][0].out_channels] == [8, 16, 32]
        learn.fit(1)
    assert torch.isfinite(learn.model.eval()(x)).all()


def test_the_largest_network_within_a_limit_of_flops():
    learn = learner()
    x = learn.dls.one_batch()[0][:1]
    dense = count_flops(learn.model.eval(), (x,))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(flops=0.4, schedule=one_shot, granularity='channel'))
        learn.shrink(n_items=4, repeats=0)
    assert 0.37 < count_flops(learn.model.eval(), (x,)) / dense <= 0.4


def test_excluding_one_stage_keeps_what_lies_in_it():
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(0.5, one_shot, granularity='channel', exclude='2.convs.1.0.weight'))
    learn.shrink(n_items=4, repeats=0)
    # the second stage has 32 channels, the third these and half of its own
    assert [learn.model[i].convs[1][0].out_channels for i in (1, 2, 3)] == [16, 32, 48]


# Modules of one's own


class Wider(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.channel_padding = before, after

    def forward(self, x):
        before, after = self.channel_padding
        return F.pad(x, (0, 0, 0, 0, before, after))


class Net(nn.Module):
    "Two layers, the first one's output added to the second one's"

    def __init__(self, pad, norm=None):
        super().__init__()
        self.a, self.pad, self.b = nn.Conv2d(3, 4, 1), pad, nn.Conv2d(4, 8, 1)
        self.norm, self.head = norm or nn.Identity(), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x).relu()
        x = (self.b(x) + self.pad(x)).mean((2, 3))
        return self.head(self.norm(x))


def test_a_module_of_ones_own():
    model = Net(Wider(1, 3))
    groups = find_channels(model, image)
    assert [(g.name, g.n) for g in groups] == [('a.weight', 4), ('b.weight', 4)]
    assert positions(groups[1], 'b.weight') == [0, 5, 6, 7]
    cut_groups(model, groups, [torch.tensor([True, False, True, False]), torch.tensor([False, True, False, True])])
    assert model.pad.channel_padding == (0, 2) and model(image).shape == (2, 2)


def test_norms_without_weights_over_both_groups():
    model = Net(Wider(2, 2), nn.LayerNorm(8, elementwise_affine=False))
    groups = find_channels(model, image)
    kept = [torch.tensor([True, False, True, True]), torch.tensor([False, True, False, True])]
    cut_groups(model, groups, kept)
    assert model.norm.normalized_shape == (5,) and model(image).shape == (2, 2)


class Weighted(Wider):
    "It says what it can't: its weight mixes channels"

    def __init__(self):
        super().__init__(2, 2)
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return super().forward(torch.einsum('nchw,cd->ndhw', x, self.mix))


class Constants(nn.Module):
    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 2, 2))


class More(Wider):
    "Another number of channels than it says"

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 2, 2))


@pytest.mark.parametrize('pad', [Constants(), Weighted(), More(1, 1)], ids=lambda m: type(m).__name__)
def test_what_a_smaller_network_could_not_run_stays_whole(pad):
    model = Net(pad)
    assert find_channels(model, image) == []


def group_normed(blocks):
    "The third stage ends in a norm over blocks of channels, and so does the stem"
    model = network(8)
    model[0][1], model[3].convs[1][1] = nn.GroupNorm(blocks, 16), nn.GroupNorm(blocks, 64)
    return model


def test_each_kind_of_channel_loses_equally_many_in_each_block():
    model = group_normed(2)
    groups = find_channels(model, image)
    stream = {g.name: (g.n, g.blocks) for g in groups if g.blocks > 1}
    assert stream == {'0.0.weight': (16, 2), '2.convs.1.0.weight': (16, 2), '3.convs.1.0.weight': (32, 2)}
    rng = torch.Generator().manual_seed(0)
    kept = [(torch.rand(g.blocks, g.n // g.blocks, generator=rng).argsort(1) < 3).flatten() for g in groups]
    small, counts = copy.deepcopy(model), [int(k.sum()) for k in kept]
    cut_groups(small, groups, kept)
    flops, _ = flop_counts(groups, model, lambda m: m(image))
    assert ChannelCosts(groups, flops).of(counts) == pytest.approx(count_flops(small, (image,)), rel=1e-9)


def test_blocks_that_do_not_fit_keep_the_stream():
    names = [g.name for g in find_channels(group_normed(8), image)]
    assert names == ['1.convs.0.0.weight', '2.convs.0.0.weight', '3.convs.0.0.weight']


def test_pickles_of_earlier_versions():
    new = _Shortcut(17, 2)
    state = {k: v for k, v in vars(new).items() if k != 'channel_padding'} | {'more': 17}
    old = _Shortcut.__new__(_Shortcut)
    old.__setstate__(copy.deepcopy(state))
    assert old.channel_padding == (8, 9) and not hasattr(old, 'more') and state['more'] == 17
    x = torch.randn(2, 4, 6, 6)
    padded = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 9))
    for m in (new, old, pickle.loads(pickle.dumps(old)), copy.deepcopy(new)):
        assert torch.equal(m(x), padded)
