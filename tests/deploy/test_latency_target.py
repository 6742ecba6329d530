"Sparsity by latency, with a clock that counts"

import random

import pytest
import torch
from fastai.basics import Adam, CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL
from torch import nn

from fastprune.all import SparsifyCallback, cifar_resnet, one_shot
from fastprune.core.channel_graph import find_channels
from fastprune.deploy import latency_target
from fastprune.deploy.latency_target import first_channels, least_sparsity, relative_latency
from fastprune.learner.inputs import as_inputs, call_model, tensors_in
from fastprune.zoo.data import TensorData

pytestmark = pytest.mark.cpu_only  # groups are found on the CPU


def network():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))


def learner(model):
    torch.manual_seed(0)
    random.seed(0)
    data = TensorData(torch.randn(40, 3, 16, 16), torch.randint(0, 2, (40,)), [0, 1])
    dls = DataLoaders(*(TfmdDL(data, bs=10, shuffle=s, num_workers=0) for s in (True, False)))
    return Learner(dls, model, CrossEntropyLossFlat(), Adam)


def width(model):
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.fixture
def clock(monkeypatch):
    "Times in proportion to the filters of all convolutions, and 10 more. A list of what was timed"
    timed = []

    def milliseconds(models, inputs, repeats):
        assert not any(m.training for net in models for m in net.modules())
        timed.append((*map(width, models), len(tensors_in(inputs)[0]), repeats))
        return [width(m) + 10 for m in models]

    monkeypatch.setattr(latency_target, 'milliseconds', milliseconds)
    return timed


def test_the_least_sparsity_that_is_fast_enough(clock):
    learn = learner(network())
    s = learn.sparsity_for(latency=0.6, n_items=4, repeats=3)
    assert all(t[0] == 40 and t[2:] == (4, 3) for t in clock)
    # 40 filters and 10 more take 50, so 30 are within the limit: 20 filters, half of each layer
    assert 0.47 < s <= 0.5 and len(clock) <= 9
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(s, one_shot, granularity='channel'))
        learn.shrink(repeats=0)
    assert width(learn.model) == 20


@pytest.mark.sample(2)
@pytest.mark.parametrize('latency', [0.4, 0.7, 0.9, 0.99])
@pytest.mark.parametrize('options', [{}, dict(round_to=4), dict(min_channels=6), dict(exclude='7.weight')], ids=str)
def test_no_lower_sparsity_is_fast_enough(clock, latency, options):
    learn = learner(network())
    least = {'min_channels': 12, 'round_to': 8, 'exclude': 25}.get(next(iter(options), ''), 2)
    if (least + 10) / 50 > latency:
        with pytest.raises(ValueError, match=f'latency={latency:g} is out of reach: .* {(least + 10) / 50:.3g} of'):
            learn.sparsity_for(latency, **options)
        return
    s = learn.sparsity_for(latency, **options)
    ratios = {}
    for t in (s, s - 1 / 64):
        with learn.no_bar(), learn.no_logging():
            other = learner(network())
            if t > 0:
                other.prune(t, granularity='channel', **options)
                if other.masks:
                    other.shrink(repeats=0)
        ratios[t] = (width(other.model) + 10) / 50
    assert ratios[s] <= latency + 1e-9
    assert ratios[s - 1 / 64] > latency or ratios[s - 1 / 64] == ratios[s]


def test_streams_with_padding(clock):
    learn = learner(cifar_resnet(8))
    s = learn.sparsity_for(0.5, n_items=2)
    assert 0.4 < s < 0.6 and width(learn.model) == 16 + 2 * (16 + 32 + 64)


def test_nothing_changes(clock):
    runs = []
    for asked in (False, True):
        learn = learner(network())
        learn.model[1].eval()
        before = {n: t.clone() for n, t in learn.model.state_dict().items()}
        state = torch.get_rng_state()
        if asked:
            learn.sparsity_for(0.5)
            assert torch.equal(torch.get_rng_state(), state) and learn.masks is None and learn.opt is None
            assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
            assert [m.training for m in learn.model] == [i != 1 for i in range(len(learn.model))]
            assert all(p.grad is None for p in learn.model.parameters())
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        runs.append(list(learn.model.parameters()))
    assert all(map(torch.equal, *runs))


def test_an_example_and_its_errors(clock):
    learn = learner(network())
    learn.sparsity_for(0.5, example=torch.randn(6, 3, 8, 8))
    assert clock[0][2] == 6
    for kwargs, says in (
        (dict(latency=0), 'latency=0'),
        (dict(latency=0.5, granularity='filter'), "granularity='filter'"),
        (dict(latency=0.5, granularity='head'), 'no attention heads'),
        (dict(latency=0.5, scope='global'), "scope='global'"),
        (dict(latency=0.5, repeats=0), 'repeats=0'),
        (dict(latency=0.5, round_to=100), 'round_to=100'),
        (dict(latency=0.5, include='nothing'), 'nothing'),
    ):
        with pytest.raises(ValueError, match=says):
            learn.sparsity_for(**kwargs)


class Fixed(nn.Module):
    "Its code has a number of channels in it"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x).mean((2, 3))
        return self.b(x.view(-1, 8))


def test_a_model_that_cannot_be_smaller(clock):
    learn = learner(Fixed())
    with pytest.raises(ValueError, match="Fixed can't run without these channels, those of 'a.weight': `exclude` them"):
        learn.sparsity_for(0.5)
    inputs = as_inputs(learn.dls.one_batch()[0], learn.model)
    groups = find_channels(learn.model, inputs, call_model)
    with pytest.raises(ValueError, match="Fixed can't run with fewer channels, `exclude` them"):
        relative_latency(learn.model, groups, first_channels(groups, {g.name: g.n // 2 for g in groups}), inputs, 1)


def test_the_first_channels_of_each_block():
    groups = find_channels(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2)), torch.randn(1, 3, 4, 4))
    kept = first_channels(groups, {g.name: 4 for g in groups})
    assert kept[0].tolist() == [True, True, False, False] * 2


def test_bisection_times_each_network_once():
    timed = []

    def time_of(counts):
        timed.append(counts['a'])
        return 1 - counts['a'] / 4

    assert round(4 * least_sparsity(0.5, lambda s: {'a': round(4 * s)}, time_of)) == 2
    assert len(timed) == len(set(timed))
