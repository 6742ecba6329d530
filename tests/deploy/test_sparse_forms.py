"Sparse recurrent layers and transposed convolutions give what PyTorch's layers give, and are tried in a model"

import copy
import io
import itertools

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastprune.all import compute_masks, prunable_weights, sparse_inference
from fastprune.deploy import inference, timing
from fastprune.deploy.forms import layer_forms
from fastprune.deploy.recurrent_form import SparseRecurrent
from fastprune.deploy.transposed_form import SparseTransposed
from fastprune.learner.inputs import tensors_in

pytestmark = pytest.mark.cpu_only  # the kernel is for the CPU


def pruned(model, sparsity=0.9):
    weights = prunable_weights(model)
    compute_masks(weights, sparsity, absolute=True).apply_({n: p.data for n, p in weights.items()})
    return model.eval().requires_grad_(False)


def assert_same(a, b, tol=1e-5):
    a, b = tensors_in(a), tensors_in(b)
    assert [t.shape for t in a] == [t.shape for t in b]
    for x, y in zip(a, b, strict=True):
        assert not y.numel() or (x - y).abs().max() <= tol * max(1.0, float(y.abs().max()))


@pytest.fixture
def forced(monkeypatch):
    "`sparse_inference` with each layer in its sparse form where it has one, whatever is faster"

    def run(model, *inputs):
        with monkeypatch.context() as m:
            m.setattr(timing.LayerTrial, 'best', lambda t: 'sparse' if 'sparse' in t.forms else 'dense')
            m.setattr(
                inference, 'latency', lambda models, *_: pd.DataFrame({'ms': {n: float(n != 'sparse') for n in models}})
            )
            return sparse_inference(model, inputs, seconds=0.01)

    return run


class Tagger(nn.Module):
    "A recurrent layer that is called with a state, by name, and whose weight is looked at"

    def __init__(self, kind, **kwargs):
        super().__init__()
        self.rnn, self.head = kind(12, 20, batch_first=True, **kwargs), nn.Linear(20, 5)

    def forward(self, x):
        zeros = self.rnn.weight_hh_l0.new_zeros(self.rnn.num_layers, len(x), self.rnn.hidden_size)
        self.rnn.flatten_parameters()
        out, _ = self.rnn(x, hx=(zeros, zeros) if self.rnn.mode == 'LSTM' else zeros)
        return self.head(out)


kinds = [(nn.LSTM, {}), (nn.LSTM, dict(proj_size=6)), (nn.GRU, {}), (nn.RNN, {}), (nn.RNN, dict(nonlinearity='relu'))]


@pytest.mark.sample(10)
@pytest.mark.parametrize('kind,more', kinds)
@pytest.mark.parametrize('layers,two_ways,first,bias', list(itertools.product((1, 2), *[(False, True)] * 3)))
def test_options_of_recurrent_layers(kind, more, layers, two_ways, first, bias):
    torch.manual_seed(0)
    options = dict(num_layers=layers, bias=bias, batch_first=first, bidirectional=two_ways, **more)
    layer = kind(12, 37, dropout=0.5 if layers > 1 else 0.0, **options)
    sparse = SparseRecurrent(pruned(layer))
    for batch, steps in ((3, 5), (1, 130), (70, 2)):
        x = torch.randn(batch, steps, 12) if first else torch.randn(steps, batch, 12)
        out, state = layer(x)
        assert_same(sparse(x), (out, state))
        assert_same(sparse(x, state), layer(x, state))
    state = tuple(t[:, 0] for t in state) if kind is nn.LSTM else state[:, 0]
    x = torch.randn(9, 12)
    assert_same(sparse(x), layer(x))
    assert_same(sparse(x, state), layer(x, state))
    for name, p in layer.named_parameters():
        if name.startswith('weight'):
            assert torch.equal(getattr(sparse, name), p)
        elif kind is not nn.GRU:
            other = name.replace('ih', 'hh') if 'ih' in name else name.replace('hh', 'ih')
            assert_same(getattr(sparse, name) + getattr(sparse, other), p + getattr(layer, other))
    assert hasattr(sparse, 'bias_ih_l0') == bias and not hasattr(sparse, 'weight_ih_l9')


@pytest.mark.parametrize('threads', [1, 3])
def test_many_units_in_threads(threads):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    layer = pruned(nn.LSTM(300, 256))
    sparse, x = SparseRecurrent(layer), torch.randn(70, 80, 300)
    try:
        torch.set_num_threads(threads)
        assert_same(sparse(x), layer(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('first', [False, True])
def test_inputs_that_are_views(first):
    torch.manual_seed(0)
    layer = pruned(nn.LSTM(8, 16, batch_first=first))
    sparse, big = SparseRecurrent(layer), torch.randn(5, 3, 20)
    one_step = torch.randn(1, 7, 16).chunk(2, -1)[1]
    for x in (big[..., :8], big[:, :1, 4:12], big[:1, :, 4:12], torch.randn(1, 1, 8).expand(50, 1, 8), one_step):
        assert_same(sparse(x), layer(x))


def test_numbers_at_the_edges():
    torch.manual_seed(0)
    layer = pruned(nn.LSTM(8, 16))
    sparse, x = SparseRecurrent(layer), torch.randn(4, 2, 8)
    for scale in (1e30, -1e30, 1e-40):
        assert_same(sparse(x * scale), layer(x * scale))
    x[1, 0] = float('nan')
    out, want = sparse(x)[0], layer(x)[0]
    assert torch.equal(out.isnan(), want.isnan()) and out[:, 0].isnan().any() and not out[:, 1].isnan().any()
    strided = torch.randn(2, 8, 4).permute(2, 0, 1)
    assert_same(sparse(strided), layer(strided))
    assert_same(sparse(x[:, :0]), layer(x[:, :0]))


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda s, x: s(x[..., :5]), 'the layer takes 8 features'),
        (lambda s, x: s(x[None]), 'the layer takes 8 features, got an input of shape'),
        (lambda s, x: s(x[:0]), 'one step or more'),
        (lambda s, x: s(x.double()), 'takes float32 on a CPU, got float64'),
        (lambda s, x: s(x, x), 'hx=Tensor: needs a tuple of state and cell'),
        (lambda s, x: s(x, (x,)), 'hx=tuple: needs a tuple of state and cell'),
        (lambda s, x: s(x, (torch.zeros(1, 3, 16),) * 2), r'hx: needs a state of shape \(1, 2, 16\)'),
        (lambda s, x: s(pack_padded_sequence(x, [4, 2])), 'got a PackedSequence'),
        (lambda s, x: torch.jit.trace(s, (x,)), "can't be traced"),
    ],
)
def test_bad_input_of_recurrent_layers(call, says):
    sparse = SparseRecurrent(pruned(nn.LSTM(8, 16)))
    with pytest.raises(ValueError, match=says):
        call(sparse, torch.randn(4, 2, 8))
    with pytest.raises(ValueError, match='takes float32 on a CPU'):
        SparseRecurrent(nn.LSTM(8, 16).double())
    with pytest.raises(ValueError, match='no gradients'):
        sparse(torch.randn(4, 2, 8, requires_grad=True))


@pytest.mark.parametrize('kind,layers', [(nn.LSTM, 1), (nn.GRU, 2), (nn.RNN, 1)])
def test_recurrent_layer_in_a_model(kind, layers, forced):
    torch.manual_seed(0)
    model, x = pruned(Tagger(kind, num_layers=layers)), torch.randn(3, 7, 12)
    res = forced(model, x)
    assert isinstance(res.rnn, SparseRecurrent) and res.inference_report.form['rnn'] == 'sparse'
    file = io.BytesIO()
    torch.save(res, file)
    file.seek(0)
    other = torch.randn(20, 90, 12)
    with torch.no_grad():
        for m in (res, copy.deepcopy(res), torch.load(file, weights_only=False)):
            assert_same(m(x), model(x))
            assert_same(m(other), model(other))
        again = SparseRecurrent(pruned(Tagger(kind, num_layers=layers)).rnn)
        again.load_state_dict(res.rnn.state_dict())
        assert_same(again(x), model.rnn(x))


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(12, 20, batch_first=True)

    def forward(self, x):
        return self.rnn(pack_padded_sequence(x, [7, 5, 2], batch_first=True))[1]


def test_packed_sequences_stay_dense(forced):
    model, x = pruned(Packs()), torch.randn(3, 7, 12)
    res = forced(model, x)
    row = res.inference_report.loc['rnn']
    assert row.form == 'dense' and 'got a PackedSequence' in row.why and type(res.rnn) is nn.GRU
    assert_same(res(x), model(x))


def test_awd_lstm(forced):
    from fastai.text.models.awdlstm import AWD_LSTM

    torch.manual_seed(0)
    model = AWD_LSTM(50, 16, 24, 2)
    x = torch.randint(2, 50, (3, 9))
    model.train()(x)  # leaves weights with dropout in the layers
    pruned(model)
    model.reset()
    want = model(x)
    res = forced(model, x)
    report = res.inference_report
    assert list(report.form[['rnns.0', 'rnns.1']]) == ['sparse'] * 2
    for batch in (x, x[:2]):
        model.reset()
        res.reset()
        for _ in range(2):  # the state goes on from one call to the next
            want = model(batch)
            with torch.no_grad():
                assert_same(res(batch), want)


@pytest.mark.sample(10)
@pytest.mark.parametrize('stride,dilation,padding', list(itertools.product((1, 2, 3), (1, 2), (0, 1))))
@pytest.mark.parametrize('kernel,groups,bias', [(1, 1, True), (2, 2, False), (3, 1, True), (4, 2, True)])
def test_options_of_transposed_convolutions(kernel, stride, dilation, padding, groups, bias):
    torch.manual_seed(0)
    for make, size in ((nn.ConvTranspose1d, (19,)), (nn.ConvTranspose2d, (7, 10))):
        for extra in range(min(max(stride, dilation), 3)):
            options = dict(stride=stride, dilation=dilation, padding=padding, output_padding=extra)
            layer = pruned(make(8, 6, kernel, groups=groups, bias=bias, **options), 0.8)
            sparse = SparseTransposed(layer)
            assert torch.equal(sparse.weight, layer.weight)
            for x in (torch.randn(2, 8, *size), torch.randn(8, *size), torch.randn(0, 8, *size)):
                assert_same(sparse(x), layer(x))


def test_uneven_transposed_convolutions():
    torch.manual_seed(0)
    layer = pruned(nn.ConvTranspose2d(8, 6, (3, 5), (2, 3), (1, 2), (1, 0), dilation=(1, 2)), 0.8)
    sparse, x = SparseTransposed(layer), torch.randn(2, 8, 6, 9)
    assert_same(sparse(x), layer(x))
    size = layer(x).shape[2:]
    for wanted in ((size[0] - 1, size[1]), (2, 6, size[0], size[1] + 2)):
        assert_same(sparse(x, output_size=wanted), layer(x, output_size=wanted[-2:]))
    turned = x.to(memory_format=torch.channels_last)
    assert_same(sparse(turned), layer(turned))


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda s, x: s(x[:, :5]), 'takes 8 channels over 2 dimensions'),
        (lambda s, x: s(x[0, 0]), 'takes 8 channels over 2 dimensions'),
        (lambda s, x: s(x.half()), 'takes float32 on a CPU, got float16'),
        (lambda s, x: s(x, output_size=(99, 9)), r'output_size=\(99, 9\): needs at least'),
        (lambda s, x: s(x, output_size=(9,)), r'output_size=\(9,\): needs 2 numbers'),
        (lambda s, x: s(x[..., :0]), 'too small'),
        (lambda s, x: torch.jit.trace(s, (x,)), "can't be traced"),
    ],
)
def test_bad_input_of_transposed_convolutions(call, says):
    sparse = SparseTransposed(pruned(nn.ConvTranspose2d(8, 6, 3, 2)))
    with pytest.raises(ValueError, match=says):
        call(sparse, torch.randn(2, 8, 5, 5))


def test_transposed_convolution_in_a_model(forced):
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 2, 2)))
    x, other = torch.randn(2, 8, 5, 5), torch.randn(9, 8, 7, 3)
    res = forced(model, x)
    assert list(res.inference_report.form[:2]) == ['sparse', 'sparse']
    file = io.BytesIO()
    torch.save(res, file)
    file.seek(0)
    with torch.no_grad():
        for m in (res, copy.deepcopy(res), torch.load(file, weights_only=False)):
            assert_same(m(x), model(x))
            assert_same(m(other), model(other))
    with pytest.raises(ValueError, match='from the model that it was made from|sparse'):
        torch.jit.trace(res, (x,))


def test_forms_of_new_kinds():
    for layer in (nn.GRU(4, 4), nn.ConvTranspose2d(4, 4, 2)):
        forms, why = layer_forms(layer)
        assert list(forms) == ['dense', 'sparse'] and not why and forms['dense'] is layer
    forms, why = layer_forms(nn.LSTM(4, 4).double())
    assert list(forms) == ['dense'] and 'takes float32' in why['sparse']
    model = pruned(nn.Sequential(nn.ConvTranspose3d(2, 2, 2)))
    res = sparse_inference(model, torch.randn(1, 2, 3, 3, 3), seconds=0.01)
    assert res.inference_report.why['0'] == 'ConvTranspose3d has no sparse form'


def test_conv1d_of_transformers(forced):
    "GPT-2's `Conv1D` becomes a linear layer, which is tried; its attributes are there"
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=40, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = pruned(transformers.GPT2Model(config))
    ids = torch.randint(0, 40, (2, 9))
    res = forced(model, ids)
    report = res.inference_report
    names = [f'h.{i}.{n}' for i in (0, 1) for n in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')]
    assert (report.form[names] == 'sparse').all()
    for x in (ids, torch.randint(0, 40, (5, 20))):
        with torch.no_grad():
            assert_same(res(x).last_hidden_state, model(x).last_hidden_state)
    if hasattr(model.h[0].mlp.c_fc, 'nf'):
        assert (res.h[0].mlp.c_fc.nf, res.h[0].mlp.c_fc.nx) == (128, 32)
