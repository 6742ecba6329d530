"Channels by a target of FLOPs"

import pytest
import torch
from channel_nets import RandomNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastprune.all import SparsifyCallback, cyclical, linear
from fastprune.core.channel_cost import ChannelCosts, flop_counts
from fastprune.core.channel_granularity import Channels
from fastprune.core.channel_graph import find_channels
from fastprune.core.channels import kept_channels
from fastprune.engine.method import Method
from fastprune.engine.sparsifier import Sparsifier


class Block(nn.Module):
    def __init__(self, n, groups=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(n, 2 * n, 3, padding=1, groups=groups), nn.Conv2d(2 * n, n, 1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


def network(groups=1):
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)
    return nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), Block(24, groups), Block(24), *head)


def widths(groups, masks):
    return {g.name: int(k.sum()) for g, k in zip(groups, kept_channels(groups, masks), strict=True)}


def flops_of(kept, groups=1):
    "FLOPs of a network with these widths, counted by torch"
    stem, a, b = (kept[n] for n in ('0.weight', '1.a.weight', '2.a.weight'))
    net = network()
    net[0] = nn.Conv2d(3, stem, 3, padding=1)
    for i, n, g in ((1, a, groups), (2, b, 1)):
        net[i].a, net[i].b = nn.Conv2d(stem, n, 3, padding=1, groups=g), nn.Conv2d(n, stem, 1)
    net[5] = nn.Linear(stem, 5)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        net(torch.zeros(2, 3, 8, 8))
    return counted.get_total_flops()


def train(method, groups=1, steps=12):
    net = network(groups)
    opt = torch.optim.SGD(net.parameters(), 0.05)
    s = Sparsifier(net, method, steps, opt, example=torch.zeros(2, 3, 8, 8))
    for _ in range(steps):
        opt.zero_grad()
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        s.step()
    s.finish()
    return s


@pytest.mark.sample(2)
@pytest.mark.parametrize('schedule', [linear, cyclical(linear, 2)])
@pytest.mark.parametrize('options', [{}, dict(round_to=4), dict(min_channels=5)])
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('scope', ['local', 'global'])
def test_the_largest_network_within_the_target(scope, groups, options, schedule):
    method = Method(flops=0.3, scope=scope, granularity='channel', schedule=schedule, **options)
    s = train(method, groups)
    channels = s.granularity
    kept = widths(channels.channels, s.masks)
    dense = flops_of({g.name: g.n for g in channels.channels}, groups)
    assert flops_of(kept, groups) <= 0.3 * dense
    if scope == 'local':
        for g in channels.channels:  # no group can have more
            more = {**kept, g.name: kept[g.name] + max(g.blocks, options.get('round_to', 1))}
            assert more[g.name] > g.n or flops_of(more, groups) > 0.3 * dense
    if 'round_to' in options:
        assert all(k % 4 == 0 for k in kept.values())


def test_a_global_target_is_just_reached():
    s = train(Method(flops=0.3, scope='global', granularity='channel', cost='flops'))
    channels = s.granularity
    kept = widths(channels.channels, s.masks)
    dense = flops_of({g.name: g.n for g in channels.channels})
    reached = flops_of(kept)
    largest = max(flops_of({**kept, g.name: kept[g.name] + 1}) - reached for g in channels.channels)
    assert reached <= 0.3 * dense < reached + largest


@pytest.mark.parametrize('scope', ['local', 'global'])
def test_a_learner_reaches_it(scope, learner):
    learn = learner()
    learn.fit_one_cycle(1, cbs=SparsifyCallback(flops=0.4, scope=scope, granularity='channel'))
    table = learn.flops()
    assert table['nonzero']['total'] <= 0.4 * table.dense['total']
    again = learner()
    again.prune(flops=0.4, scope=scope, granularity='channel')
    assert again.flops()['nonzero']['total'] <= 0.4 * table.dense['total']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(flops=30, granularity='channel'), 'flops=30'),
        (dict(flops=0.3), "flops=0.3 is about whole channels"),
        (dict(sparsity=0.5, flops=0.3, granularity='channel'), 'two targets'),
        (dict(granularity='channel'), 'sparsity=None'),
    ],
)
def test_wrong_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsifyCallback(**arguments)


def test_out_of_reach(learner):
    learn = learner()
    with pytest.raises(ValueError, match='flops=0.0001 is out of reach: .* Use at least'):
        learn.fit(1, cbs=SparsifyCallback(flops=1e-4, granularity='channel'))
    assert learn.masks is None and Channels('channel', flops=0.5).flops == 0.5


def test_a_linear_layer_costs_less_with_fewer_inputs():
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2)),
        torch.ones(3, 8),
    )
    groups = find_channels(model, x)
    flops, _ = flop_counts(groups, model, lambda m: m(x))
    assert ChannelCosts(groups, flops).of([4, 6]) == 2 * 3 * (8 * 4 + 4 * 6 + 6 * 2)


@pytest.mark.parametrize('seed', range(6))
def test_the_least_that_is_named_is_in_reach(learner, seed):
    learn = learner(RandomNet(seed))
    with pytest.raises(ValueError, match='out of reach') as e:
        learn.prune(flops=1e-5, granularity='channel')
    least = float(str(e.value).split('Use at least ')[1])
    learn.prune(flops=least, granularity='channel')
    table = learn.flops()
    assert table['nonzero']['total'] <= least * table.dense['total']
