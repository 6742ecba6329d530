"Channels are cut out of a copy before a training, so that no training ends with a network that can't be cut"

import copy

import pytest
import torch
from channel_nets import Tower
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from torch import nn

from fastprune.all import Method, ShrinkCallback, Sparsifier, SparsifyCallback, one_shot
from fastprune.core.channel_graph import find_channels
from fastprune.deploy.channel_trial import check_cut
from fastprune.engine.channel_targets import CHANNEL_CHECKS

pytestmark = pytest.mark.cpu_only


class Flat(nn.Module):
    "Has the number of channels of its last convolution in its code"

    def __init__(self):
        super().__init__()
        self.first, self.a = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3)
        self.b, self.c = nn.Conv2d(4, 6, 3), nn.Linear(6 * 4, 3)

    def forward(self, x):
        return self.c(self.b(self.a(self.first(x).relu()).relu()).relu().view(-1, 6 * 4))


class Tokens(nn.Module):
    "A norm over channels of a residual stream, and a layer beside it whose width is in the code"

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.odd, self.back, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(x + self.back(self.odd(self.norm(x)).relu().reshape(-1, 6)))


def images(n=8):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def learner(model):
    dl = DataLoader(list(zip(images(), torch.arange(8) % 3, strict=True)), bs=4)
    return Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat())


def fit(learn, epochs, cbs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 0.01, cbs=cbs)


def test_a_width_in_the_code_is_an_error_before_the_first_step():
    learn = learner(Flat())
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=r"those of 'b\.weight': `exclude`"):
        fit(learn, 1, SparsifyCallback(0.5, granularity='channel'))
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
    fit(learn, 1, SparsifyCallback(0.5, granularity='channel', exclude='b'))
    assert learn.shrink(repeats=0).filters_after['first'] == 2


def test_a_plain_loop_with_an_example():
    model = Flat()
    with pytest.raises(ValueError, match="those of 'b.weight'"):
        Sparsifier(model, Method(0.5, granularity='channel'), 3, torch.optim.SGD(model.parameters()), example=images())


def test_outputs_that_depend_on_the_number_of_channels():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    model[1].forward = lambda x: x.relu() / x.shape[1]
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="other outputs without these channels.*'0.weight'"):
        check_cut(model, find_channels(model, x), x)


def test_only_the_group_in_the_way_is_named():
    "Norms average over the channels of other groups that are kept"
    model, x = Tokens(), torch.randn(2, 3)
    groups = find_channels(model, x)
    assert {g.name for g in groups} >= {'embed.weight', 'up.weight', 'odd.weight'}
    with pytest.raises(ValueError, match="without these channels, those of 'odd.weight': "):
        check_cut(model, groups, x)
    check_cut(model, [g for g in groups if g.name != 'odd.weight'], x)


def test_nothing_changes_and_a_check_runs_once(monkeypatch):
    learn, calls = learner(Tower(lambda n: nn.GroupNorm(2, n))), []
    learn.model.norm.eval()
    before, modes = copy.deepcopy(learn.model.state_dict()), [m.training for m in learn.model.modules()]
    monkeypatch.setitem(CHANNEL_CHECKS, 'cut', lambda *args: (calls.append(1), check_cut(*args)))
    state = torch.get_rng_state()
    for sparsity in (0.5, 0.25):
        SparsifyCallback(sparsity, granularity='channel').choose(learn.model, learn)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in learn.model.modules()]
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())


def test_a_fit_goes_on_with_masks_if_a_cut_fails(monkeypatch):
    monkeypatch.delitem(CHANNEL_CHECKS, 'cut')
    learn, shrinking = learner(Flat()), ShrinkCallback()
    pruning = SparsifyCallback(0.5, granularity='channel', schedule=one_shot, recover=False)
    with pytest.warns(UserWarning, match="goes on with masks: .*'b.weight'") as caught:
        fit(learn, 3, [pruning, shrinking])
    assert sum('goes on with masks' in str(w.message) for w in caught) == 1
    assert len(learn.recorder.values) == 3 and len(set(shrinking.weights)) == 1
    assert learn.masks is not None and learn.model.b.weight.shape[0] == 6
