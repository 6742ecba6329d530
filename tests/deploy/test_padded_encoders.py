"Encoders of torch's with padded sequences, while channels are pruned, cut and in sparse forms"

import copy

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from torch import nn

from fastprune.all import SparsifyCallback, load_shrunk, save_shrunk
from fastprune.core.channel_graph import find_channels
from fastprune.core.channel_zeros import check_zeros
from fastprune.core.encoders import ZeroPadding, fit_nested, leave_nested, return_nested
from fastprune.deploy.attention import without_fused_path
from fastprune.deploy.channel_cut import cut_groups

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')]


class Padded(nn.Module):
    "The mean over all positions, padded ones too, of words of which 0 is no word"

    def __init__(self, heads=4, norm=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, heads, 24, 0.0, batch_first=True)
        self.embed = nn.Embedding(12, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=x == 0).mean(1))


def words(n=8, seed=0):
    x = torch.randint(1, 12, (n, 7), generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        x[i, 3 + i % 5 :] = 0
    return x


def learner(model):
    pairs = list(zip(words(), torch.arange(8) % 3, strict=True))
    dl = DataLoader(pairs, bs=4)
    return Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat())


def outputs(model, x=None):
    with torch.no_grad():
        return model.eval()(words() if x is None else x)


@pytest.mark.parametrize('norm', [False, True])
def test_outputs_are_those_with_nested_tensors(norm):
    model = Padded(norm=norm)
    before, x = outputs(model), words()
    leave_nested(model)
    assert not model.encoder.use_nested_tensor and torch.allclose(outputs(model), before, atol=1e-5)
    assert torch.allclose(outputs(copy.deepcopy(model)), before, atol=1e-5)
    for mixed in (x.flip(1), torch.cat([0 * x[:1], x])):  # not left aligned; a sequence of padding alone
        want = Padded(norm=norm)
        want.load_state_dict(model.state_dict())
        assert torch.allclose(outputs(model, mixed), outputs(want, mixed), atol=1e-5, equal_nan=True)
    with_gradients = model.eval()(x)
    return_nested(model)
    assert model.encoder.use_nested_tensor and torch.equal(outputs(model), before)
    assert torch.allclose(with_gradients, model(x), atol=1e-5) and not torch.allclose(with_gradients, before, atol=1e-3)


def test_an_encoder_without_nested_tensors_stays_as_it_is():
    model = Padded()
    model.encoder.use_nested_tensor = False
    leave_nested(model)
    assert not model.encoder.layers[-1]._forward_hooks
    return_nested(model)
    assert not model.encoder.use_nested_tensor


@pytest.mark.parametrize('granularity', ['channel', 'head'])
def test_pruned_and_cut(granularity, tmp_path):
    torch.manual_seed(0)
    learn = learner(Padded())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.05, cbs=SparsifyCallback(0.5, granularity=granularity))
    before, loss = outputs(learn.model), learn.validate()[0]
    learn.shrink(repeats=0)
    assert torch.allclose(outputs(learn.model), before, atol=1e-5)
    assert learn.validate()[0] == pytest.approx(loss, abs=1e-5)
    save_shrunk(learn, tmp_path / 'small.safetensors')
    assert torch.allclose(outputs(load_shrunk(tmp_path / 'small.safetensors', Padded)), before, atol=1e-5)


def test_masks_are_removed():
    learn = learner(Padded())
    with learn.no_bar():
        learn.prune(0.5, granularity='channel')
        assert not learn.model.encoder.use_nested_tensor
        outputs(learn.model)
        learn.remove_masks()
    assert learn.model.encoder.use_nested_tensor
    assert not any(isinstance(h, ZeroPadding) for m in learn.model.modules() for h in m._forward_hooks.values())


def test_a_frozen_encoder_is_followed():
    model = Padded().requires_grad_(False)
    model.head.requires_grad_(True)
    groups = find_channels(model, words())
    check_zeros(model, groups, words())
    assert model.encoder.use_nested_tensor


def test_an_odd_number_of_heads(tmp_path):
    "torch's fused operation takes an even number"
    torch.manual_seed(0)
    model = Padded(heads=4).eval()
    groups = find_channels(model, words())
    kept = [torch.arange(g.n) < g.n // 4 * 3 for g in groups]
    cut_groups(model, groups, kept)
    assert model.encoder.layers[0].self_attn.num_heads == 3 and isinstance(
        model.encoder.layers[0].self_attn, nn.MultiheadAttention
    )
    fit_nested(model)
    assert len(model.encoder.layers[-1]._forward_hooks) == 1
    a = outputs(model)
    save_shrunk(model, tmp_path / 'small.safetensors')
    assert torch.equal(outputs(load_shrunk(tmp_path / 'small.safetensors', Padded)), a)


def test_sparse_forms_have_zeros_at_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    x = torch.randn(2, 5, 32)
    padding = torch.arange(5).expand(2, 5) > 2
    fast = copy.deepcopy(model)
    without_fused_path(fast)
    with torch.no_grad():
        want = model(x, src_key_padding_mask=padding)
        assert torch.allclose(fast(x, src_key_padding_mask=padding), want, atol=1e-5) and not want[:, 3:].any()
        mask = torch.ones(5, 5).triu(1).bool()  # with which torch makes no nested tensors
        want = model(x, mask, padding)
        assert torch.allclose(fast(x, mask, padding), want, atol=1e-5) and want[:, 3:].any()
