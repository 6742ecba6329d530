"Tokens in graphs: LayerNorm, attention and Transformer encoders give what torch gives, for other sizes and masks, too"

import copy
import pickle

import pytest
import torch
from graph_models import chosen
from torch import nn

from fastprune.all import compute_masks, prunable_weights
from fastprune.deploy.attention import OpenAttention
from fastprune.deploy.graph_code import has_bfloat16
from fastprune.deploy.graph_encoder import TokenEncoder
from fastprune.deploy.graph_ops import Op, run_ops
from fastprune.deploy.graph_run import Segment
from fastprune.deploy.graph_trace import trace_graph
from fastprune.learner.inputs import as_inputs

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures('seeded_and_without_gradients')]


def pruned(model, sparsity=0.8):
    weights = prunable_weights(model)
    compute_masks(weights, sparsity, absolute=True).apply_({n: p.data for n, p in weights.items()})
    return model.eval().requires_grad_(False)


def close(a, b, most=1e-5):
    return a.shape == b.shape and (not b.numel() or float((a - b).abs().max()) <= most * float(b.abs().max()))


def segments(model):
    return [m for m in model.modules() if isinstance(m, Segment)]


def traced(model, x):
    res, why = trace_graph(model, as_inputs(x, model))
    assert why is None
    return res


def linear(out, inputs, n_out, n_in):
    weight = torch.randn(n_out, n_in, 1, 1) * (torch.rand(n_out, n_in, 1, 1) > 0.5) / n_in**0.5
    return Op('conv', out, inputs, weight, torch.randn(n_out))


def block(channels, heads):
    "LayerNorm, attention, an addition, an activation"
    norm = Op('norm', 1, (0,), torch.randn(channels, 1, 1, 1), torch.randn(channels), groups=channels, eps=1e-5)
    norm.weight[0] = 0
    attention = Op('attention', 3, (2,), heads=heads)
    inside, after = linear(2, (1,), 3 * channels, channels), linear(4, (3, 0), channels, channels)
    return [norm, inside, attention, after, Op('act', 5, (4,), act='gelu')]


@pytest.mark.parametrize('dtype,most', [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('heads,size', [(1, 5), (2, 8), (3, 20)])
def test_attention_of_sequences(heads, size, dtype, most):
    if dtype == torch.bfloat16 and not has_bfloat16():
        pytest.skip('this processor has no instructions for bfloat16')
    ops = block(heads * size, heads)
    segment = Segment(ops, [0], [3, 5], [3, 3], dtype=dtype)
    for tokens in (1, 3, 16, 33, 64, 200):
        for count in (1, 2, 5):
            x = 3 * torch.randn(count, tokens, heads * size)
            want = run_ops(ops, [0], [3, 5], [3, 3], (x,))
            assert all(map(close, segment(x), want, [most] * 2)), (tokens, count)


def test_attention_in_threads_and_of_large_scores():
    torch.set_num_threads(4)
    ops = block(24, 3)
    segment = Segment(ops, [0], [5], [3])
    for _ in range(20):
        x = torch.randn(2, 70, 24)
        assert close(segment(x), run_ops(ops, [0], [5], [3], (x,))[0])
    x = torch.randn(2, 150, 72)
    x[..., :48] *= 30  # scores of some hundreds
    ops = [Op('attention', 1, (0,), heads=3)]
    assert close(Segment(ops, [0], [1], [3])(x), run_ops(ops, [0], [1], [3], (x,))[0], 1e-3)


def test_inputs_that_do_not_fit():
    segment = Segment(block(24, 3), [0], [5], [3])
    with pytest.raises(ValueError, match=r'made for \[sequences, tokens, features\] got shape \(2, 24\)'):
        segment(torch.randn(2, 24))
    with pytest.raises(RuntimeError, match='24'):
        segment(torch.randn(2, 3, 23))
    assert segment(torch.randn(0, 3, 24)).shape == (0, 3, 24) and segment(torch.randn(3, 0, 24)).shape == (3, 0, 24)


def encoder(layers=2, norm=False, **kwargs):
    "Normalizations have random weights"
    kwargs = dict(batch_first=True) | kwargs
    layer = nn.TransformerEncoderLayer(24, 3, 40, **kwargs)
    res = nn.TransformerEncoder(layer, layers, nn.LayerNorm(24) if norm else None, enable_nested_tensor=False)
    for p in res.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return pruned(res)


KINDS = [
    dict(),
    dict(norm_first=True, norm=True, activation='gelu'),
    dict(batch_first=False, bias=False),
    dict(activation=nn.SiLU(), layer_norm_eps=0.1),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', KINDS, ids=['plain', 'norm_first', 'batch_second', 'silu'])
def test_an_encoder_is_one_segment(monkeypatch, kind):
    model = encoder(**kind)
    fast = chosen(monkeypatch, model, torch.randn(2, 7, 24))
    (segment,) = segments(fast)
    assert len(segment.ops) == 14 + kind.get('norm', False)
    for size in ((2, 7), (1, 1), (1, 64), (5, 30), (3, 90), (20, 3)):
        x = torch.randn(*size, 24)
        assert close(fast(x), model(x)), size
        y = torch.randn(24, *size).permute(1, 2, 0)
        assert close(fast(y), model(y)), size
    report = fast.inference_report
    assert report.form.tolist() == ['graph'] * 9
    assert 'layers.1.self_attn.in_proj_weight' in report.index and 'layers.0.linear2' in report.index


def test_calls_with_masks_run_as_without_a_graph(monkeypatch):
    model, x = encoder(), torch.randn(3, 6, 24)
    fast = chosen(monkeypatch, model, x)
    monkeypatch.setattr(Segment, 'forward', None)  # none of these calls takes it
    causal, padding = nn.Transformer.generate_square_subsequent_mask(6), torch.zeros(3, 6, dtype=torch.bool)
    padding[:, 4:] = True
    for args, kwargs in (
        ((causal,), {}),
        ((), dict(mask=causal, is_causal=True)),
        ((), dict(src_key_padding_mask=padding)),
        ((causal,), dict(src_key_padding_mask=padding.float() * -1e9)),
    ):
        assert close(fast(x, *args, **kwargs), model(x, *args, **kwargs))
    assert close(fast(x[0]), model(x[0]))
    torch.manual_seed(1)
    assert not close(fast.train()(x), model(x))  # dropout


def test_other_calls_have_the_layers_forms(monkeypatch):
    fast = chosen(monkeypatch, encoder(), torch.randn(3, 6, 24))
    assert isinstance(fast, TokenEncoder) and type(fast.whole) is nn.TransformerEncoder
    assert all(type(m.self_attn) is OpenAttention for m in fast.whole.layers)
    assert fast.num_layers == 2 and len(fast.layers) == 2  # attributes of the encoder


def test_copies_and_pickles_of_an_encoder(monkeypatch):
    model, x = encoder(norm=True), torch.randn(2, 9, 24)
    fast = chosen(monkeypatch, model, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), fast(x)) and len(other.inference_report) == 9
        mask = torch.zeros(2, 9, dtype=torch.bool)
        mask[:, 5:] = True
        assert close(other(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask))
    with pytest.raises(ValueError, match="export the model that it was made from"):
        torch.jit.trace(fast, x)


@pytest.mark.skipif(not has_bfloat16(), reason='this processor has no instructions for bfloat16')
def test_an_encoder_in_bfloat16(monkeypatch):
    model, x = encoder(), torch.randn(2, 40, 24)
    fast = chosen(monkeypatch, model, x, best='bfloat16', dtype='bfloat16')
    assert fast.inference_report.form['total'] == 'bfloat16' and segments(fast)[0].dtype == torch.bfloat16
    assert close(fast(x), model(x), 5e-2) and not close(fast(x), model(x), 1e-5)


class Own(nn.TransformerEncoderLayer):
    pass


def test_encoders_that_stay_as_they_are():
    hooked, x = encoder(), torch.randn(2, 5, 24)
    hooked.layers[1].linear1.register_forward_hook(lambda *_: None)
    for model in (hooked, Own(24, 3, 40, batch_first=True)):
        net = pruned(nn.Sequential(model, nn.Linear(24, 4)))
        res = traced(net, x)
        assert not any(isinstance(m, TokenEncoder) for m in res.modules())
        assert close(res(x), net(x))


def test_an_activation_without_a_kernel(monkeypatch):
    model = encoder(activation=torch.sin)
    fast, x = chosen(monkeypatch, model, torch.randn(2, 5, 24)), torch.randn(3, 4, 24)
    assert len(segments(fast)) == 3 and close(fast(x), model(x))


class Classifier(nn.Module):
    def __init__(self, masked=False):
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(6, 24), encoder(), nn.Linear(24, 3)
        self.masked = masked

    def forward(self, x):
        mask = (x[..., 0] > 1) if self.masked else None
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=mask).mean(1))


@pytest.mark.parametrize('masked', [False, True])
def test_an_encoder_inside_of_a_model(monkeypatch, masked):
    model = pruned(Classifier(masked))
    fast = chosen(monkeypatch, model, torch.randn(2, 5, 6))
    assert len(segments(fast)) == 3 - masked and any(isinstance(m, TokenEncoder) for m in fast.modules()) != masked
    for size in ((2, 5), (1, 20), (7, 3)):
        x = torch.randn(*size, 6)
        assert close(fast(x), model(x))


class Mixer(nn.Module):
    "A block as many networks have it, with its own code"

    def __init__(self):
        super().__init__()
        self.norm, self.plain = nn.LayerNorm(24), nn.LayerNorm(24, elementwise_affine=False)
        self.a, self.b, self.c = nn.Linear(24, 60), nn.Linear(60, 24), nn.Linear(48, 24)

    def forward(self, x):
        y = x + self.b(nn.functional.gelu(self.a(self.norm(x))))
        y = self.c(torch.cat([self.plain(y), x], -1)) * y
        return torch.cat([y, x], 1)


def test_blocks_of_tokens_with_their_own_code(monkeypatch):
    model = pruned(Mixer())
    fast = chosen(monkeypatch, model, torch.randn(2, 5, 24))
    assert {'norm', 'conv', 'concat', 'mul'} == {op.kind for s in segments(fast) for op in s.ops}
    for size in ((2, 5), (1, 1), (3, 80)):
        x = torch.randn(*size, 24)
        assert close(fast(x), model(x)), size


def test_normalization_over_another_dimension_than_features(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5), nn.LayerNorm((5, 6)), nn.Linear(6, 6))
    model[1].running_var.uniform_(1, 2)
    model, x = pruned(model), torch.randn(3, 5, 6)
    assert close(chosen(monkeypatch, model, x)(x), model(x))


@pytest.mark.parametrize('first', [(4, 30), (2, 4, 30)])
def test_an_mlp_takes_any_leading_dimensions(monkeypatch, first):
    model = pruned(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 7)))
    fast = chosen(monkeypatch, model, torch.randn(first))
    assert len(segments(fast)) == 1
    for size in ((), (1,), (3,), (40,), (2, 3), (5, 70), (2, 3, 4), (0, 5), (3, 0)):
        x = torch.randn(*size, 30)
        assert close(fast(x), model(x)), size
    with pytest.raises(RuntimeError, match='30'):
        fast(torch.randn(2, 3, 29))
    with pytest.raises(ValueError, match='with as many tokens each, got'):
        fast[0](torch.tensor(1.0)) if isinstance(fast, nn.Sequential) else segments(fast)[0](torch.tensor(1.0))
