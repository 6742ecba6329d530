"The skinny kernel beside the dense product. `test_skinny.py` runs these tests where Triton interprets kernels"

import copy
import io

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from fastprune.deploy import forms, inference
from fastprune.deploy.skinny import MOST_ROWS, SkinnyLinear, skinny_missing


def sparse_linear(columns, rows, sparsity, bias=True, dtype=torch.float32):
    layer = nn.Linear(columns, rows, bias).requires_grad_(False)
    with torch.no_grad():
        layer.weight[torch.rand(rows, columns) < sparsity] = 0
    return layer.to(dtype).eval()


def same(a, b, dtype):
    "Both are sums in float32 that are rounded once"
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    return (
        a.dtype == b.dtype and a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6)
    )


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
sizes = dict(columns=st.integers(1, 700), rows=st.integers(1, 9), batch=st.integers(1, MOST_ROWS))


@settings(max_examples=6)
@given(**sizes, sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]), bias=st.booleans(), dtype=dtypes)
@example(columns=1, rows=1, batch=1, sparsity=0.0, bias=True, dtype=torch.float32)
@example(columns=40000, rows=3, batch=2, sparsity=0.99, bias=True, dtype=torch.float16)  # bases of 32 bits
@example(columns=700, rows=5, batch=3, sparsity=1.0, bias=False, dtype=torch.float32)
def test_equals_the_dense_product(columns, rows, batch, sparsity, bias, dtype):
    torch.manual_seed(0)
    layer, x = sparse_linear(columns, rows, sparsity, bias, dtype), torch.randn(batch, columns).to(dtype)
    skinny = SkinnyLinear(layer)
    assert skinny.takes(x) and same(skinny(x), layer(x), dtype)


@pytest.mark.parametrize('shape', [(300,), (1, 300), (2, 3, 300), (0, 300), (40, 300), (33, 300)])
def test_shapes_of_inputs(shape):
    torch.manual_seed(0)
    layer, x = sparse_linear(300, 7, 0.8), torch.randn(shape)
    skinny = SkinnyLinear(layer)
    assert same(skinny(x), layer(x), torch.float32) if x.numel() else skinny(x).shape == (0, 7)
    assert skinny.takes(x) == (0 < x.numel() // 300 <= MOST_ROWS)


def test_inputs_that_lie_otherwise_in_memory():
    torch.manual_seed(0)
    layer = sparse_linear(300, 7, 0.8)
    skinny = SkinnyLinear(layer)
    for x in (torch.randn(300, 5).t(), torch.randn(5, 600)[:, ::2], torch._neg_view(torch.randn(5, 300))):
        assert skinny.takes(x) and same(skinny(x), layer(x), torch.float32)
        assert same(skinny(x[:1]), layer(x[:1]), torch.float32)


def test_columns_do_not_touch_each_other():
    "Where the batch is no power of 2, the kernel has columns of memory as it was"
    torch.manual_seed(0)
    layer, x = sparse_linear(300, 7, 0.8), torch.randn(3, 300)
    x[1] = float('nan')
    out = SkinnyLinear(layer)(x)
    assert out[1].isnan().all() and same(out[[0, 2]], layer(x[[0, 2]]), torch.float32)


def test_uneven_rows():
    torch.manual_seed(0)
    layer = sparse_linear(1000, 11, 0.5)
    layer.weight.data[3], layer.weight.data[10] = 0, 0
    layer.weight.data[5] = torch.randn(1000)
    layer.weight.data[7, 1:] = 0
    x = torch.randn(2, 1000)
    assert same(SkinnyLinear(layer)(x), layer(x), torch.float32)


def test_dense_where_the_kernel_is_not_for_it():
    torch.manual_seed(0)
    layer = sparse_linear(64, 8, 0.5)
    skinny, x = SkinnyLinear(layer), torch.randn(3, 64, requires_grad=True)
    skinny(x).sum().backward()
    assert torch.equal(x.grad, layer.weight.sum(0).expand(3, 64))
    with torch.autocast('cpu', torch.bfloat16):
        assert skinny(x.detach()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match='shapes'):
        skinny(torch.randn(3, 63))
    exported = torch.export.export(skinny, (x.detach(),)).module()
    assert torch.equal(exported(x.detach()), layer(x.detach()))
    traced = torch.jit.trace(skinny, x.detach())
    assert torch.equal(traced(x.detach()), layer(x.detach()))
    double = copy.deepcopy(skinny).double()
    assert torch.equal(double(x.detach().double()), layer.double()(x.detach().double()))


def test_saved_copied_loaded_and_cast():
    torch.manual_seed(0)
    a, b, x = sparse_linear(300, 7, 0.8), sparse_linear(300, 7, 0.9), torch.randn(3, 300)
    skinny, file = SkinnyLinear(a), io.BytesIO()
    want = skinny(x)
    torch.save(skinny, file)
    file.seek(0)
    for again in (copy.deepcopy(skinny), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), want)
    assert skinny.state_dict().keys() == a.state_dict().keys()
    skinny.load_state_dict(b.state_dict())
    assert same(skinny(x), b(x), torch.float32) and torch.equal(a.weight, b.weight)  # they are shared
    half = copy.deepcopy(skinny).half()
    assert half.takes(x.half()) and same(half(x.half()), b.half()(x.half()), torch.float16)


def test_as_a_form(monkeypatch):
    "`sparse_inference` as on a GPU, with the kernel wherever it may run"
    monkeypatch.setattr(forms, 'FORM_DEVICES', {'sparse': 'cuda', '2:4': 'cuda'})
    monkeypatch.setattr(inference, '_on_gpu', lambda model: True)
    monkeypatch.setattr('fastprune.deploy.timing.LayerTrial.best', lambda t: list(t.forms)[-1])
    monkeypatch.setattr(inference, '_choose', lambda *args: 'sparse')
    monkeypatch.setattr('fastprune.deploy.graph_choice.kernel_missing', lambda: 'it is for the CPU')
    torch.manual_seed(0)
    model = nn.Sequential(sparse_linear(64, 8, 0.8), nn.ReLU(), sparse_linear(8, 3, 0.5))
    for n, form in ((4, 'skinny'), (40, 'csr')):
        x = torch.randn(n, 64)
        fast = inference.sparse_inference(model, x, min_sparsity=0.1, seconds=0.01)
        assert set(fast.inference_report.form[:-1]) == {form} and same(fast(x), model(x), torch.float32)
    layer = forms.layer_forms(model[0], rows=40)
    assert layer[1] == {'skinny': 'for at most 32 rows of inputs, the example has 40'}


def test_wrong_layers(monkeypatch):
    for layer, says in (
        (nn.Conv2d(3, 3, 1), 'is for nn.Linear, got Conv2d'),
        (nn.Linear(3, 3).double(), 'takes float16, bfloat16 and float32, got float64'),
        (nn.Linear(3, 0), r'needs a weight, got one of shape \(0, 3\)'),
    ):
        with pytest.raises(ValueError, match=says):
            SkinnyLinear(layer)
    monkeypatch.delenv('TRITON_INTERPRET')
    with pytest.raises(ValueError, match='runs on a GPU, and the layer is on the cpu'):
        SkinnyLinear(nn.Linear(3, 3))
    assert 'on the meta' in skinny_missing(torch.device('meta'))


def test_a_failing_kernel_is_a_runtime_error(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise AssertionError('no compiler here\nmore')

    skinny = SkinnyLinear(sparse_linear(64, 8, 0.5))
    monkeypatch.setattr('fastprune.deploy.skinny._kernel', Kernel)
    with pytest.raises(RuntimeError, match='the skinny kernel failed: .*no compiler here'):
        skinny(torch.randn(2, 64))
