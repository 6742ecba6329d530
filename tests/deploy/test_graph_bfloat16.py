"Graphs in bfloat16 give what float32 gives, up to the rounding of values"

import io

import pandas as pd
import pytest
import torch
from torch import nn

from fastprune.all import compute_masks, prunable_weights, sparse_inference
from fastprune.deploy import graph_choice, inference
from fastprune.deploy.graph_code import has_bfloat16
from fastprune.deploy.graph_conv import paired, with_places
from fastprune.deploy.graph_ops import Op, run_ops
from fastprune.deploy.graph_run import Segment
from fastprune.deploy.threads import kernel_missing

pytestmark = pytest.mark.cpu_only  # graphs are for the CPU
needs_bfloat16 = pytest.mark.skipif(
    kernel_missing() is not None or not has_bfloat16(), reason='this processor has no AVX512-BF16'
)
RELU = dict(act='clamp', low=0.0, high=float('inf'))


def weight(*shape):
    w = torch.randn(shape) / (shape[1] * shape[2] * shape[3] * 0.2) ** 0.5
    return w * (torch.rand_like(w) < 0.2)


def operations():
    "One of each kind that reads or writes memory in its own way"
    return [
        Op('conv', 1, (0,), weight(12, 12, 3, 3), torch.randn(12), padding=(1, 1), **RELU),
        Op('conv', 2, (1, 0), weight(12, 12, 1, 1), None, act='silu'),
        Op('conv', 3, (2,), weight(12, 1, 5, 5), torch.randn(12), stride=(2, 2), padding=(2, 2), groups=12),
        Op('maxpool', 4, (3,), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        Op('mean', 5, (4,)),
        Op('conv', 6, (5,), weight(12, 12, 1, 1), torch.randn(12), act='sigmoid'),
        Op('mul', 7, (4, 6)),
        Op('concat', 8, (7, 4)),
        Op('act', 9, (8,), act='gelu'),
    ]


@needs_bfloat16
@pytest.mark.parametrize('count', (1, 2, 16, 19))
@pytest.mark.parametrize('size', ((9, 13), (14, 14)))
def test_operations(count, size):
    torch.manual_seed(0)
    ops, outputs, x = operations(), list(range(1, 10)), torch.randn(count, 12, *size)
    ranks = [4] * len(outputs)
    made = Segment(ops, [0], outputs, ranks, torch.bfloat16)(x)
    for op, got, want in zip(ops, made, run_ops(ops, [0], outputs, ranks, (x,)), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 0.02 * want.abs().max(), op.kind
        assert not torch.equal(got, want), f'{op.kind} was not rounded'


@needs_bfloat16
@pytest.mark.parametrize('width', (65, 112))
def test_a_convolution_writes_what_a_stride_of_two_reads(width):
    torch.manual_seed(0)
    ops = [Op('conv', 1, (0,), weight(12, 12, 1, 1), torch.randn(12), **RELU)]
    ops += [Op('conv', 2, (1,), weight(12, 1, 3, 3), torch.randn(12), stride=(2, 2), padding=(1, 1), groups=12)]
    x = torch.randn(1, 12, 9, width)
    segment = Segment(ops, [0], [2], [4], torch.bfloat16)
    got, (want,) = segment(x), run_ops(ops, [0], [2], [4], (x,))
    assert list(segment.plan([(12, 9, width)], 1).sorted) == [1]
    assert (got - want).abs().max() < 0.02 * want.abs().max()


@needs_bfloat16
@pytest.mark.parametrize('count', (1, 7, 8, 33))
def test_linear_layers(count):
    torch.manual_seed(0)
    ops = [Op('conv', 1, (0,), weight(50, 300, 1, 1), torch.randn(50), **RELU)]
    ops += [Op('conv', 2, (1,), torch.zeros(3, 50, 1, 1), torch.randn(3))]
    x = torch.randn(count, 300)
    made = Segment(ops, [0], [1, 2], [2, 2], torch.bfloat16)(x)
    for got, want in zip(made, run_ops(ops, [0], [1, 2], [2, 2], (x,)), strict=True):
        assert (got - want).abs().max() < 0.01 * want.abs().max()


@needs_bfloat16
def test_values_that_are_not_finite():
    op = Op('conv', 1, (0,), torch.ones(2, 3, 1, 1), torch.zeros(2))
    x = torch.ones(1, 3, 4, 4)
    x[0, 0, 0, 0], x[0, 1, 0, 1] = float('nan'), 3e38
    got = Segment([op], [0], [1], [4], torch.bfloat16)(x)[0, 0]
    assert got[0, 0].isnan() and got[0, 1] > 2.9e38 and (got[1:] == 3).all()


def test_pairs_of_values():
    start = torch.tensor([0, 0, 1, 4, 6], dtype=torch.int32)
    offset, value = torch.arange(1, 7, dtype=torch.int32), torch.arange(1.0, 7.0)
    starts, offsets, values = paired(start, offset, value)
    assert starts.tolist() == [0, 0, 1, 3, 4]
    assert offsets.tolist() == [1, 1, 2, 3, 4, 4, 5, 6] and values.tolist() == [1, 0, 2, 3, 4, 0, 5, 6]


def test_values_with_places():
    value, place = torch.randn(1000), torch.randint(2**16, (1000,))
    bits = with_places(value, place)
    assert torch.equal(bits.long() & 0xFFFF, place)
    assert ((bits.view(torch.float32) - value).abs() <= 2**-8 * value.abs()).all()
    with pytest.raises(ValueError, match='at most 65536 inputs, got 65537'):
        with_places(value[:1], torch.tensor([2**16]))


def network():
    torch.manual_seed(0)
    res = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 9)
    )
    weights = prunable_weights(res)
    compute_masks(weights, 0.9, absolute=True).apply_({n: p.data for n, p in weights.items()})
    return res.eval()


def choose(monkeypatch, *order):
    "Let the first of these forms be the fastest"
    monkeypatch.setattr(
        inference, 'latency', lambda models, *_: pd.DataFrame({'ms': {n: 1.0 + (n not in order) for n in models}})
    )


@needs_bfloat16
def test_the_report_tells_the_difference(monkeypatch):
    model, x = network(), torch.randn(4, 3, 16, 16)
    choose(monkeypatch, 'bfloat16')
    fast = sparse_inference(model, x, seconds=0.01, dtype='bfloat16')
    total = fast.inference_report.loc['total']
    with torch.no_grad():
        d = float((fast(x) - model(x)).abs().max() / model(x).abs().max())
        again = torch.load(io.BytesIO(saved(fast)), weights_only=False)
        assert torch.equal(again(x), fast(x))
    assert total.form == 'bfloat16' and f'outputs differ by {d:.1g} of the largest' in total.why
    assert 1e-5 < d < 0.05


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@needs_bfloat16
def test_outputs_that_differ_too_much(monkeypatch):
    choose(monkeypatch, 'bfloat16', 'graph')
    report = sparse_inference(network(), torch.randn(4, 3, 16, 16), 0.5, 0.01, 1e-4, 'bfloat16').inference_report
    assert report.form['total'] == 'graph' and 'bfloat16 would change the outputs, by ' in report.why['total']


@needs_bfloat16
def test_float32_where_it_is_faster(monkeypatch):
    choose(monkeypatch, 'graph')
    report = sparse_inference(network(), torch.randn(4, 3, 16, 16), seconds=0.01, dtype='bfloat16').inference_report
    assert report.form['total'] == 'graph' and 'bfloat16 takes 2.00 of its time' in report.why['total']


def test_types_that_cannot_be(monkeypatch):
    model, x = network(), torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="dtype='half' is unknown: use one of float32, bfloat16"):
        sparse_inference(model, x, dtype='half')
    with pytest.raises(ValueError, match=r'on a GPU use model.bfloat16\(\)'):
        graph_choice.check_type('bfloat16', torch.device('cuda'))
    monkeypatch.setattr(graph_choice, 'kernel_missing', lambda: None)
    monkeypatch.setattr(graph_choice, 'has_bfloat16', lambda: False)
    with pytest.raises(ValueError, match=r"has no instructions for it \(AVX512-BF16\); use dtype='float32'"):
        sparse_inference(model, x, dtype='bfloat16')
