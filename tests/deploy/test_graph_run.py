"A segment gives what torch gives: each operation, shape and number of images, and whatever shares memory"

import copy
import gc
import itertools
import math
import pickle
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastprune.core import machine_code
from fastprune.deploy import graph_plan
from fastprune.deploy.graph_ops import ACTIVATIONS, Op, run_ops
from fastprune.deploy.graph_run import Segment

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures('seeded_and_without_gradients')]

RELU = dict(act='clamp', low=0.0, high=math.inf)
COUNTS = (1, 3, 17)  # one image, few images one by one, 16 images at once and the rest


def weight(*shape, sparsity=0.7):
    "Random weights that keep the size of what they are applied to"
    keep = torch.rand(shape) >= sparsity
    return torch.randn(shape) * keep / max(1, keep.sum() / shape[0]) ** 0.5


def conv(out, inputs, *shape, sparsity=0.7, bias=True, **kwargs):
    return Op('conv', out, inputs, weight(*shape, sparsity=sparsity), torch.randn(shape[0]) if bias else None, **kwargs)


def close(got, want):
    "Equal within 1e-5 of the largest number, with NaN and inf at the same places"
    assert got.shape == want.shape and got.dtype == want.dtype
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~finite & ~want.isnan()], want[~finite & ~want.isnan()])
    if finite.any():
        difference = (got[finite].double() - want[finite].double()).abs().max()
        assert difference <= 1e-5 * want[finite].abs().max(), float(difference / want[finite].abs().max())


def agrees(segment, ops, inputs, outputs, ranks, tensors):
    "Does a segment give what torch gives?"
    before = [t.clone() for t in tensors]
    got = segment(*tensors)
    want = run_ops(ops, inputs, outputs, ranks, tensors)
    assert isinstance(got, tuple) == (len(outputs) > 1)
    for g, w in zip(got if len(outputs) > 1 else [got], want, strict=True):
        close(g, w)
    assert all(torch.equal(t.nan_to_num(), b.nan_to_num()) for t, b in zip(tensors, before, strict=True))


def check(ops, *shapes, outputs=None, counts=COUNTS, ranks=None, scale=1):
    "A segment of `ops` on random numbers of the given shapes (without the batch), for each number of images"
    inputs, outputs = list(range(len(shapes))), [ops[-1].out] if outputs is None else outputs
    ranks = ranks or [4] * len(outputs)
    segment = Segment(ops, inputs, outputs, ranks)
    for n in counts:
        agrees(segment, ops, inputs, outputs, ranks, [torch.randn(n, *s) * scale for s in shapes])


# kernel, stride, padding, dilation
WINDOWS = [
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((1, 1), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (3, 3), (1, 1), (1, 1)),
    ((1, 7), (1, 1), (0, 3), (1, 1)),
    ((7, 1), (1, 1), (3, 0), (1, 1)),
    ((1, 5), (1, 2), (0, 2), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((3, 3), (1, 1), (2, 2), (1, 1)),
    ((3, 3), (3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 1), (1, 0), (1, 3)),
    ((3, 2), (1, 2), (0, 0), (2, 1)),
    ((2, 2), (1, 1), (1, 1), (2, 2)),
    ((2, 2), (2, 2), (0, 0), (1, 1)),
    ((2, 2), (2, 2), (1, 1), (1, 1)),
    ((4, 4), (4, 4), (2, 2), (1, 1)),
    ((7, 7), (2, 2), (3, 3), (1, 1)),
    ((7, 7), (1, 1), (3, 3), (1, 1)),
    ((5, 5), (3, 2), (4, 4), (1, 2)),
]
SIZES = [(1, 1), (1, 9), (5, 1), (2, 3), (7, 7), (13, 17), (12, 33)]


def places(size, window):
    "Places of a window in both directions"
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *window, strict=True)]


@pytest.mark.sample(2)
@pytest.mark.parametrize('window', WINDOWS, ids=str)
def test_windows_of_convolutions(window):
    kernel, stride, padding, dilation = window
    kwargs = dict(stride=stride, padding=padding, dilation=dilation)
    op, plain = conv(1, (0,), 6, 4, *kernel, **kwargs, **RELU), conv(1, (0,), 6, 4, *kernel, **kwargs, bias=False)
    segments, taken = [Segment([o], [0], [1], [4]) for o in (op, plain)], 0
    for size, n in itertools.product(SIZES, COUNTS):
        if min(places(size, window)) > 0:
            for o, segment in zip((op, plain), segments, strict=True):
                agrees(segment, [o], [0], [1], [4], [torch.randn(n, 4, *size)])
            taken += 1
    assert taken


PAIRS = [w for w in WINDOWS if w[1] == (2, 2)] + [
    ((3, 3), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (3, 2)),
    ((5, 3), (2, 2), (2, 1), (1, 2)),
    ((1, 3), (2, 2), (1, 2), (1, 1)),
    ((2, 4), (2, 2), (3, 0), (2, 1)),
]


@pytest.mark.parametrize('width', [49, 63, 64, 112, 257])
@pytest.mark.parametrize('window', PAIRS, ids=str)
def test_a_convolution_writes_what_a_stride_of_two_reads(window, width):
    kernel, stride, padding, dilation = window
    kwargs = dict(stride=stride, padding=padding, dilation=dilation)
    ops = [conv(1, (0,), 5, 3, 3, 3, padding=(1, 1), **RELU), conv(2, (1,), 6, 5, *kernel, **kwargs)]
    for height in (11, 14):
        segment = Segment(ops, [0], [2], [4])
        for n in (1, 2, 1):
            agrees(segment, ops, [0], [2], [4], [torch.randn(n, 3, height, width)])
        assert list(segment.plan([(3, height, width)], 1).sorted) == [1]


def test_values_that_others_read_are_not_written_sorted():
    first = conv(1, (0,), 4, 4, 1, 1, **RELU)
    after = conv(2, (1,), 4, 4, 3, 3, stride=(2, 2), padding=(1, 1))
    curved, residual = (conv(1, (0,), 4, 4, 1, 1, act='silu'), conv(1, (0, 0), 4, 4, 1, 1))
    uneven = conv(2, (1,), 4, 4, 3, 3, stride=(2, 1), padding=(1, 1))
    cases = [([first, after], [1, 2]), ([first, after, Op('act', 3, (1,), act='tanh')], [2, 3])]
    cases += [([curved, after], [2]), ([residual, after], [2]), ([first, uneven], [2])]
    for ops, outputs in cases:
        segment, ranks = Segment(ops, [0], outputs, [4] * len(outputs)), [4] * len(outputs)
        agrees(segment, ops, [0], outputs, ranks, [torch.randn(1, 4, 9, 70)])
        assert not segment.plan([(4, 9, 70)], 1).sorted


@pytest.mark.parametrize('groups, shape', [(2, (6, 4)), (4, (8, 2)), (8, (8, 1)), (8, (16, 1))])
def test_groups(groups, shape):
    for kernel, stride, padding in [(1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 2, 2), (3, 1, 0)]:
        op = conv(1, (0,), *shape, kernel, kernel, groups=groups, stride=(stride,) * 2, padding=(padding,) * 2, **RELU)
        check([op], (8, 9, 11))


@pytest.mark.parametrize('count', [1, 2, 7, 8, 15, 16, 18, 32, 40])
def test_numbers_of_images(count):
    ops = [conv(1, (0,), 8, 3, 3, 3, padding=(1, 1)), conv(2, (1,), 5, 8, 3, 3, stride=(2, 2), act='silu')]
    check(ops, (3, 11, 10), outputs=[1, 2], counts=[count])


def test_a_large_image():
    ops = [
        conv(1, (0,), 8, 3, 7, 7, stride=(2, 2), padding=(3, 3), **RELU),
        conv(2, (1,), 8, 8, 3, 3, padding=(1, 1)),
        Op('maxpool', 3, (2,), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    ]
    check(ops, (3, 70, 50), outputs=[2, 3], counts=(1, 16))


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_activations(act):
    low, high = {'clamp': (-0.3, 0.5), 'leaky': (0.1, math.inf)}.get(act, (-math.inf, math.inf))
    kwargs = dict(act=act, low=low, high=high)
    ops = [
        conv(1, (0,), 6, 4, 3, 3, padding=(1, 1), **kwargs),
        conv(2, (0, 1), 6, 4, 1, 1, **kwargs),
        conv(3, (0,), 6, 4, 3, 3, stride=(2, 2), **kwargs),
        Op('add', 4, (1, 2), **kwargs),
        Op('act', 5, (0,), **kwargs),
        Op('mean', 6, (2,), **kwargs),
        conv(7, (6,), 5, 6, 1, 1, **kwargs),
        Op('maxpool', 8, (0,), kernel=(2, 2), stride=(2, 2), **kwargs),
        Op('concat', 9, (0, 5), **kwargs),
        Op('mul', 10, (2, 6), **kwargs),
    ]
    check(ops, (4, 7, 19), outputs=list(range(1, 11)))


@pytest.mark.parametrize('act', ACTIVATIONS)
@pytest.mark.parametrize('scale', [1e-4, 30, 1e4])
def test_activations_of_small_and_large_numbers(act, scale):
    low, high = {'clamp': (0.0, 6.0), 'leaky': (0.01, math.inf)}.get(act, (-math.inf, math.inf))
    check([Op('act', 1, (0,), act=act, low=low, high=high)], (3, 5, 20), scale=scale)


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_activations_of_nan_and_inf(act):
    low, high = {'clamp': (0.0, math.inf), 'leaky': (0.1, math.inf)}.get(act, (-math.inf, math.inf))
    x = torch.randn(17, 2, 3, 17)
    x[:, 0, 0, ::5], x[:, 1, 2, ::4] = math.nan, math.inf
    kwargs = dict(act=act, low=low, high=high)
    identity = torch.eye(2)[:, :, None, None]
    ops = [Op('act', 1, (0,), **kwargs), Op('conv', 2, (0,), identity, **kwargs)]
    for xs in (x, x[:1]):
        want = run_ops(ops[:1], [0], [1], [4], [xs])[0]
        want[xs.isinf()] = 1 if act in ('sigmoid', 'hardsigmoid', 'tanh') else math.inf  # torch's GELU may give NaN
        for got in Segment(ops, [0], [1, 2], [4, 4])(xs):
            close(got, want)


def test_minus_inf_and_nan_pass_limits():
    x = torch.tensor([-math.inf, -1, -0.0, 2, 9, math.inf, math.nan])[None, None, None]
    relu = Segment([Op('conv', 1, (0,), torch.ones(1, 1, 1, 1), **RELU)], [0], [1], [4])
    six = Segment([Op('act', 1, (0,), act='clamp', low=0.0, high=6.0)], [0], [1], [4])
    for n in (1, 16):
        got, less = relu(x.expand(n, 1, 1, 7)), six(x.expand(n, 1, 1, 7))
        for g in got:
            assert g[0, 0, :6].tolist() == [0, 0, 0, 2, 9, math.inf] and g[0, 0, 6].isnan()
        for g in less:
            assert g[0, 0, :6].tolist() == [0, 0, 0, 2, 6, 6] and g[0, 0, 6].isnan()


POOLS = [
    dict(kernel=(2, 2), stride=(2, 2)),
    dict(kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    dict(kernel=(3, 2), stride=(1, 3), padding=(1, 0)),
    dict(kernel=(3, 3), stride=(1, 1), padding=(1, 1)),
    dict(kernel=(7, 9), stride=(1, 1)),
    dict(kernel=(7, 9), stride=(7, 9), padding=(3, 4)),
    dict(kernel=(5, 5), stride=(5, 5), padding=(2, 2)),
]


@pytest.mark.parametrize('channels', [1, 3, 8, 64])
def test_pools(channels):
    ops = [Op('mean', 1, (0,)), Op('maxpool', 2, (0,))]
    for p in POOLS:
        ops += [Op('maxpool', len(ops) + 1, (0,), **p), Op('avgpool', len(ops) + 2, (0,), **p)]
        ops += [Op('avgpool', len(ops) + 1, (0,), count_pad=False, **p)]
    ops += [Op('maxpool', len(ops) + 1, (0,), kernel=(2, 3), stride=(2, 1), dilation=(3, 2), padding=(1, 1))]
    ops += [Op('maxpool', len(ops) + 1, (0,), kernel=(3, 3), stride=(2, 2), dilation=(4, 4), padding=(1, 1))]
    check(ops, (channels, 10, 19), outputs=list(range(1, len(ops) + 1)), counts=(1, 16))


@pytest.mark.sample(2)
@pytest.mark.parametrize('size', [(1, 1), (2, 2), (3, 3), (4, 6), (5, 5), (7, 9), (8, 23)])
def test_windows_of_pools_at_the_edge(size):
    kinds = [('maxpool', {}), ('maxpool', dict(ceil=True)), ('avgpool', {}), ('avgpool', dict(count_pad=False))]
    for k, s, p, (kind, more) in itertools.product((2, 3, 5), (1, 2, 3, 5), (0, 1, 2), kinds):
        if p <= k // 2 and min(size) + 2 * p >= k:
            check([Op(kind, 1, (0,), kernel=(k, k), stride=(s, s), padding=(p, p), **more)], (3, *size), counts=(1, 16))
    for d, ceil in itertools.product((2, 3), (False, True)):
        if min(size) + 2 > 2 * d:
            kwargs = dict(kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(d, d), ceil=ceil)
            check([Op('maxpool', 1, (0,), **kwargs)], (3, *size), counts=(1, 16))


def test_pools_of_nan_and_inf():
    x = torch.randn(16, 3, 9, 18)
    x[:, 0, 4, 3], x[:, 1, 0, 0], x[:, 2, 8, 17], x[:, 2, 0] = math.nan, math.inf, -math.inf, -math.inf
    ops = [
        Op('maxpool', 1, (0,), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        Op('maxpool', 2, (0,), kernel=(1, 2), stride=(1, 1)),
        Op('maxpool', 3, (0,)),
        Op('avgpool', 4, (0,), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        Op('mean', 5, (0,)),
    ]
    segment = Segment(ops, [0], [1, 2, 3, 4, 5], [4] * 5)
    for xs in (x, x[:1]):
        agrees(segment, ops, [0], [1, 2, 3, 4, 5], [4] * 5, [xs])


def test_residuals():
    block = [
        conv(1, (0,), 6, 6, 3, 3, padding=(1, 1), **RELU),
        conv(2, (1, 0), 6, 6, 3, 3, padding=(1, 1), **RELU),
        conv(3, (2,), 6, 6, 1, 1, act='silu'),
        conv(4, (3, 2), 6, 6, 3, 3, padding=(1, 1), act='gelu'),
    ]
    check(block, (6, 9, 7))
    check(block, (6, 9, 7), outputs=[4, 2, 0])  # the residual is kept


def test_a_residual_that_is_the_input():
    for kernel, padding in ((1, 0), (3, 1)):
        ops = [conv(1, (0, 0), 6, 6, kernel, kernel, padding=(padding,) * 2), Op('act', 2, (1,), **RELU)]
        check(ops, (6, 5, 8))
        check(ops, (6, 5, 8), outputs=[1, 0, 2])
        check(ops, (6, 1, 1))


def test_residuals_of_strided_and_unpadded_convolutions():
    ops = [
        conv(1, (0,), 6, 4, 1, 1, stride=(2, 2)),
        conv(2, (0, 1), 6, 4, 3, 3, stride=(2, 2), padding=(1, 1), **RELU),
        conv(3, (2,), 6, 6, 3, 3),
        Op('avgpool', 4, (2,), kernel=(3, 3), stride=(1, 1)),
        conv(5, (2, 4), 6, 6, 3, 3, act='tanh'),
        Op('add', 6, (5, 3)),
    ]
    check(ops, (4, 13, 11))


def test_values_that_are_used_again():
    ops = [
        Op('act', 1, (0,), **RELU),
        Op('add', 2, (1, 0)),  # the input is used below
        Op('mul', 3, (2, 1)),
        Op('add', 4, (3, 3)),
        Op('mul', 5, (4, 4)),
        Op('act', 6, (5,), act='tanh'),
        Op('add', 7, (6, 0), **RELU),
        Op('add', 8, (7, 2)),
    ]
    check(ops, (3, 5, 6))
    check(ops, (3, 5, 6), outputs=[8, 2, 6, 0, 8])


def test_inputs_that_are_returned():
    for count in (1, 16):
        x, y = torch.randn(count, 3, 4, 5), torch.randn(count, 6)
        segment = Segment([Op('act', 2, (0,), act='tanh')], [0, 1], [0, 2, 1], [4, 4, 2])
        same, changed, vector = segment(x, y)
        assert torch.equal(same, x) and torch.equal(vector, y) and same.data_ptr() != x.data_ptr()
        close(changed, x.tanh())
        same.zero_()
        assert x.any()


def test_the_same_tensor_twice():
    ops = [conv(2, (0, 1), 4, 4, 3, 3, padding=(1, 1)), Op('add', 3, (2, 0)), Op('mul', 4, (3, 1))]
    segment = Segment(ops, [0, 1], [4], [4])
    for n in COUNTS:
        x = torch.randn(n, 4, 6, 7)
        agrees(segment, ops, [0, 1], [4], [4], [x, x])


def test_concatenation():
    ops = [
        conv(2, (0,), 5, 4, 3, 3, padding=(1, 1), **RELU),
        Op('concat', 3, (2, 0, 1)),
        conv(4, (3,), 3, 12, 3, 3, padding=(1, 1)),
        Op('concat', 5, (3, 4, 4), act='tanh'),
        Op('mean', 6, (5,)),
        Op('concat', 7, (6, 6)),
        Op('concat', 8, (0,)),
    ]
    check(ops, (4, 6, 9), (3, 6, 9), outputs=[5, 7, 8])
    check(ops, (4, 1, 1), (3, 1, 1), outputs=[5, 7, 8])


@pytest.mark.parametrize('size', [(1, 1), (1, 6), (9, 18)])
def test_squeeze_excitation(size):
    ops = [
        conv(1, (0,), 12, 1, 3, 3, groups=12, padding=(1, 1), act='hardswish'),
        Op('mean', 2, (1,)),
        conv(3, (2,), 4, 12, 1, 1, **RELU),
        conv(4, (3,), 12, 4, 1, 1, act='hardsigmoid'),
        Op('mul', 5, (1, 4)),
        conv(6, (5, 0), 12, 12, 1, 1),
    ]
    check(ops, (12, *size))
    check(ops, (12, *size), outputs=[6, 4, 1])


def test_a_scale_that_comes_in():
    ops = [Op('mul', 2, (0, 1), act='tanh'), conv(3, (2,), 3, 5, 3, 3, padding=(1, 1)), Op('mul', 4, (0, 0))]
    check(ops, (5, 6, 17), (5, 1, 1), outputs=[2, 3, 4])
    check(ops, (5, 1, 1), (5, 1, 1), outputs=[2, 3, 4])
    segment = Segment(ops[:1], [0, 1], [2], [4])
    for n in COUNTS:  # [N,C]
        agrees(segment, ops[:1], [0, 1], [2], [4], [torch.randn(n, 5, 6, 17), torch.randn(n, 5)])


@pytest.mark.parametrize('sparsity', [0, 1])
@pytest.mark.parametrize('kernel', [1, 3])
def test_no_zeros_and_nothing_but_zeros(sparsity, kernel):
    kwargs = dict(sparsity=sparsity, padding=(kernel // 2,) * 2)
    for stride in ((1, 1), (2, 2)):
        check([conv(1, (0,), 7, 5, kernel, kernel, stride=stride, **kwargs, **RELU)], (5, 6, 7))
        check([conv(1, (0,), 7, 5, kernel, kernel, stride=stride, **kwargs, act='silu')], (5, 1, 1))
    check([conv(1, (0,), 7, 5, kernel, kernel, bias=False, **kwargs)], (5, 6, 7))


def test_rows_without_weights():
    op = conv(1, (0,), 9, 4, 3, 3, padding=(1, 1))
    op.weight[[0, 3, 4, 8]] = 0
    check([op], (4, 6, 7))
    linear = conv(1, (0,), 40, 30, 1, 1)
    linear.weight[::3] = 0
    check([linear], (30, 1, 1))


def test_single_channels():
    ops = [
        conv(1, (0,), 1, 1, 3, 3, padding=(1, 1), sparsity=0, **RELU),
        conv(2, (1, 0), 1, 1, 1, 1, sparsity=0),
        conv(3, (2,), 1, 1, 3, 3, stride=(2, 2), sparsity=0),
        Op('mean', 4, (3,)),
        conv(5, (4,), 1, 1, 1, 1, sparsity=0, act='sigmoid'),
        Op('mul', 6, (2, 5)),
    ]
    check(ops, (1, 7, 19), outputs=[2, 3, 5, 6])


@pytest.mark.parametrize('count', [1, 5, 16, 33])
def test_linear_layers(count):
    ops = [
        conv(1, (0,), 70, 50, 1, 1, **RELU),
        conv(2, (1,), 300, 70, 1, 1, act='gelu'),
        conv(3, (2, 2), 300, 300, 1, 1, sparsity=0.98),
        conv(4, (3,), 3, 300, 1, 1),
    ]
    segment = Segment(ops, [0], [4, 2, 0], [2, 4, 2])
    agrees(segment, ops, [0], [4, 2, 0], [2, 4, 2], [torch.randn(count, 50)])


def test_several_inputs_and_outputs():
    ops = [
        conv(3, (0,), 6, 4, 3, 3, padding=(1, 1), **RELU),
        conv(4, (1, 3), 6, 5, 1, 1, act='silu'),
        Op('mean', 5, (4,)),
        Op('concat', 6, (5, 2)),
        conv(7, (6,), 10, 13, 1, 1),
    ]
    check(ops, (4, 8, 9), (5, 8, 9), (7, 1, 1), outputs=[7, 4, 5, 3], ranks=[2, 4, 2, 4])


def random_graph(generator):
    "Operations on two images, and the values that are returned"
    shapes, ops = {0: (4, 11, 9), 1: (4, 11, 9)}, []
    for out in range(2, 2 + generator.randint(6, 10)):
        x = generator.choice(list(shapes)[-4:])
        c, h, w = shapes[x]
        same = [v for v, s in shapes.items() if s == (c, h, w)]
        kind = generator.choice(['conv', 'conv', 'conv', 'pool', 'mean', 'add', 'mul', 'act', 'concat'])
        act = generator.choice([dict(act=a) for a in ('none', 'silu', 'tanh', 'hardswish')] + [RELU])
        pair, shape = (x, generator.choice(same)), (c, h, w)
        if kind == 'conv':
            k, s = generator.choice([(1, 1), (3, 1), (3, 2), (1, 2), (5, 1)])
            groups = generator.choice([1, 1, 1, c])
            new = c if groups == c else generator.choice([4, 6])
            size, window = dict(stride=(s, s), padding=(k // 2, k // 2), groups=groups, **act), ((k, k), (s, s))
            shape = (new, *places((h, w), (*window, (k // 2, k // 2), (1, 1))))
            like = [v for v, s in shapes.items() if s == shape]
            args = (x, generator.choice(like)) if like and generator.random() < 0.5 else (x,)
            ops.append(conv(out, args, new, c // groups, k, k, **size))
        elif kind == 'pool':
            window, kind = ((3, 3), (2, 2), (1, 1), (1, 1)), generator.choice(['maxpool', 'avgpool'])
            shape = (c, *places((h, w), window))
            ops.append(Op(kind, out, (x,), kernel=(3, 3), stride=(2, 2), padding=(1, 1), **act))
        elif kind == 'mean':
            shape = (c, 1, 1)
            ops.append(Op(kind, out, (x,), **act))
        elif kind == 'concat':
            near = [v for v, s in shapes.items() if s[1:] == (h, w) and s[0] + c < 30] or [x]
            args = (x, generator.choice(near))
            shape = (c + shapes[args[1]][0], h, w)
            ops.append(Op(kind, out, args, **act))
        elif kind == 'mul':
            scales = [v for v, s in shapes.items() if s == (c, 1, 1)]
            ops.append(Op(kind, out, (x, generator.choice(scales or same)), **act))
        else:
            ops.append(Op(kind, out, pair if kind == 'add' else (x,), **act))
        shapes[out] = shape
    return ops, sorted({ops[-1].out, *generator.sample(list(shapes), 2)})


@pytest.mark.parametrize('seed', range(30))
def test_random_graphs(seed):
    torch.manual_seed(seed)
    ops, outputs = random_graph(random.Random(seed))
    inputs, ranks = [0, 1], [4] * len(outputs)
    segment = Segment(ops, inputs, outputs, ranks)
    for n in (2, 17):
        tensors = [torch.randn(n, 4, 11, 9) / 2 for _ in range(2)]
        agrees(segment, ops, inputs, outputs, ranks, tensors)
        segment(*[torch.full_like(t, math.nan) for t in tensors])  # which nothing may be left of
        agrees(segment, ops, inputs, outputs, ranks, tensors)


@pytest.mark.sample(10)
@pytest.mark.parametrize('seed', range(100, 120))
def test_strips_of_random_graphs(seed, monkeypatch):
    monkeypatch.setattr(graph_plan, 'LARGE', 1)
    monkeypatch.setattr(graph_plan, 'STRIP', random.Random(seed).choice([2000, 8000]))
    test_random_graphs(seed)
    torch.set_num_threads(3)
    test_random_graphs(seed)


def test_strips(monkeypatch):
    monkeypatch.setattr(graph_plan, 'LARGE', 1)
    monkeypatch.setattr(graph_plan, 'STRIP', 3000)
    for ops in (
        [
            *small(),
            Op('mean', 4, (3,)),
            Op('maxpool', 5, (2,)),
            conv(6, (2,), 4, 6, 5, 3, stride=(2, 2), padding=(2, 1)),
        ],
        [
            *small()[:2],
            Op('avgpool', 3, (1,), kernel=(7, 7), stride=(1, 1), padding=(3, 3)),
            Op('add', 4, (3, 2), **RELU),
        ],
        [
            *small()[:2],
            Op('maxpool', 3, (2,), kernel=(3, 3), stride=(1, 1), dilation=(3, 3)),
            Op('act', 4, (3,), **RELU),
        ],
        [
            conv(1, (0,), 4, 4, 1, 1),
            Op('avgpool', 2, (1,), kernel=(20, 3), stride=(20, 3)),
            conv(3, (1,), 2, 4, 3, 3, dilation=(7, 1)),
        ],
    ):
        outputs = [op.out for op in ops][-2:]
        plan = graph_plan.GraphPlan([op.compressed() for op in ops], {0: (4, 20, 9)}, outputs, 16)
        assert len(plan.table) > 2 * len(ops)
        for number in (1, 3):
            torch.set_num_threads(number)
            check(ops, (4, 20, 9), outputs=outputs, counts=(16, 19))


def small():
    "A residual block with a pool"
    return [
        conv(1, (0,), 6, 4, 3, 3, padding=(1, 1), **RELU),
        conv(2, (1, 1), 6, 6, 3, 3, padding=(1, 1), act='silu'),
        Op('maxpool', 3, (2,), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    ]


def test_sizes_that_change():
    ops = small()
    segment = Segment(ops, [0], [3], [4])
    sizes = [(1, 8, 8), (16, 8, 8), (1, 5, 9), (20, 5, 9), (2, 12, 3), (16, 7, 7), (3, 1, 1)]
    order = random.Random(0)
    for n, h, w in sizes + sizes[::-1] + order.choices(sizes, k=10):
        agrees(segment, ops, [0], [3], [4], [torch.randn(n, 4, h, w)])
        assert len(segment.plans) <= 4


def test_plans_of_large_images_are_freed():
    segment = Segment(small(), [0], [3], [4])
    segment(torch.randn(1, 4, 60, 60))
    (plan,) = segment.plans.values()
    memory = [weakref.ref(p.memory) for p in plan.places.values()] + [weakref.ref(plan)]
    del plan
    for n in range(3, 7):
        segment(torch.randn(1, 4, n, n))
    gc.collect()
    assert not any(m() is not None for m in memory)


def test_results_are_not_overwritten():
    segment = Segment(small(), [0], [3, 0], [4, 4])
    for n in COUNTS:
        x = torch.randn(n, 4, 6, 5)
        first = segment(x)
        copies = [t.clone() for t in first]
        again = segment(torch.randn(n, 4, 6, 5))
        assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
        assert not torch.equal(again[0], first[0])
        assert torch.equal(segment(x)[0], first[0])


def test_nothing_stays_from_a_call_with_nan():
    segment = Segment(small(), [0], [3], [4])
    for n in COUNTS:
        x = torch.randn(n, 4, 7, 9)
        before = segment(x)
        assert segment(torch.full_like(x, math.nan)).isnan().all()
        assert torch.equal(segment(x), before)


def test_other_weights_are_taken_over():
    "In place, and as new tensors"
    torch.manual_seed(0)
    a, b = ([conv(1, (0,), 8, 8, 3, 3, sparsity=0)] for _ in range(2))
    segment, other, x = Segment(a, [0], [1], [4]), Segment(b, [0], [1], [4]), torch.randn(3, 8, 6, 6)
    want = other(x)
    assert not torch.equal(segment(x), want)
    for assign in (True, False):
        segment.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(segment(x), want)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=['copy', 'pickle'])
def test_copies_and_pickles(duplicate):
    ops = small()
    segment = Segment(ops, [0], [3], [4])
    before = segment(torch.ones(2, 4, 7, 7))
    other = duplicate(segment)
    assert not other.plans and segment.plans
    del segment
    assert torch.equal(other(torch.ones(2, 4, 7, 7)), before)
    agrees(other, ops, [0], [3], [4], [torch.randn(17, 4, 8, 9)])


def test_weights_are_copied():
    ops = small()
    segment, x = Segment(ops, [0], [3], [4]), torch.randn(2, 4, 6, 6)
    want = run_ops(ops, [0], [3], [4], [x])[0]
    for op in ops[:2]:
        op.weight.zero_()
        op.bias.zero_()
    close(segment(x), want)


def many(channels=12):
    "Steps that wait for each other, and some that don't"
    return [
        conv(1, (0,), channels, channels, 3, 3, padding=(1, 1), **RELU),
        conv(2, (0,), channels, channels, 1, 1, act='silu'),
        Op('maxpool', 3, (0,), kernel=(3, 3), stride=(1, 1), padding=(1, 1)),
        Op('concat', 4, (1, 2, 3)),
        conv(5, (4, 1), channels, 3 * channels, 3, 3, padding=(1, 1)),
        Op('mean', 6, (5,)),
        conv(7, (6,), channels, channels, 1, 1, act='sigmoid'),
        Op('mul', 8, (5, 7), **RELU),
        conv(9, (8, 0), channels, channels, 3, 3, padding=(1, 1)),
    ]


@pytest.mark.parametrize('number', [1, 3])
@pytest.mark.parametrize('openmp', [True, False])
def test_threads(number, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(machine_code, '_openmp', lambda: None)
    ops = many()
    segment = Segment(ops, [0], [9], [4])
    for n in COUNTS:
        x = torch.randn(n, 12, 10, 11)
        torch.set_num_threads(1)
        want = segment(x)
        close(want, run_ops(ops, [0], [9], [4], [x])[0])
        torch.set_num_threads(number)
        for _ in range(3):
            assert torch.equal(segment(x), want)


@pytest.mark.parametrize('count', [1, 16])
def test_calls_at_once(count):
    segment = Segment(many(), [0], [9], [4])
    xs = [torch.randn(count, 12, 10 + i % 2, 11) for i in range(4)]
    want = [segment(x) for x in xs]

    def call(i):
        with torch.no_grad():
            return [torch.equal(segment(xs[j % 4]), want[j % 4]) for j in range(i, i + 30)]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(r) for r in pool.map(call, range(2)))


def test_layouts_of_inputs():
    ops = small()
    segment = Segment(ops, [0], [3], [4])
    for n in COUNTS:
        x = torch.randn(n, 4, 7, 9)
        for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, 1:, ::2], x.flip(3)):
            agrees(segment, ops, [0], [3], [4], [other])
        agrees(segment, ops, [0], [3], [4], [x[:, :1].expand(n, 4, 7, 9)])


def test_no_images():
    ops = small()
    assert Segment(ops, [0], [3], [4])(torch.randn(0, 4, 7, 9)).shape == (0, 6, 4, 5)


def test_inputs_that_are_refused():
    segment = Segment(small(), [0], [3], [4])
    with pytest.raises(ValueError, match='float32 on a CPU, got float64'):
        segment(torch.randn(1, 4, 7, 7, dtype=torch.float64))
    with torch.enable_grad(), pytest.raises(ValueError, match='no gradients'):
        segment(torch.randn(1, 4, 7, 7, requires_grad=True))
    with pytest.raises(RuntimeError, match='4 channels'):  # torch's own errors where sizes don't fit
        segment(torch.randn(1, 3, 7, 7))
    with pytest.raises(RuntimeError, match='greater than actual input size'):
        Segment([conv(1, (0,), 2, 2, 5, 5)], [0], [1], [4])(torch.randn(1, 2, 4, 9))
    with pytest.raises(RuntimeError, match='must match'):
        Segment([Op('add', 2, (0, 1))], [0, 1], [2], [4])(torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 6))
    with pytest.raises(ValueError, match='as many images each'):
        Segment([Op('add', 2, (0, 1))], [0, 1], [2], [4])(torch.randn(2, 2, 5, 5), torch.randn(1, 2, 5, 5))
    with pytest.raises(ValueError, match='dimensions got shape'):
        Segment([Op('add', 2, (0, 1))], [0, 1], [2], [4])(torch.randn(2, 2, 5, 5), torch.randn(2, 5, 5))
    agrees(segment, segment.ops, [0], [3], [4], [torch.randn(1, 4, 7, 7)])


def test_what_has_no_kernel_runs_by_torch():
    ops = [Op('avgpool', 1, (0,), kernel=(2, 2), stride=(2, 2), ceil=True)]
    agrees(Segment(ops, [0], [1], [4]), ops, [0], [1], [4], [torch.randn(1, 2, 5, 5)])


@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_calls_after_inference_mode(mode):
    segment = Segment(small(), [0], [3], [4])
    for n in COUNTS:
        x = torch.randn(n, 4, 7, 9)
        with torch.inference_mode():
            first = segment(x)
        with mode():
            assert torch.equal(segment(x), first)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype):
    ops, xs = small(), [torch.randn(n, 4, 7, 9) for n in COUNTS]
    want = [run_ops(ops, [0], [3], [4], [x])[0] for x in xs]
    torch.set_default_dtype(dtype)
    try:
        segment = Segment(ops, [0], [3], [4])
        got = [segment(x) for x in xs]
    finally:
        torch.set_default_dtype(torch.float32)
    for g, w in zip(got, want, strict=True):
        close(g, w)


def test_an_input_that_is_not_used():
    ops = [Op('act', 2, (1,), act='tanh')]
    for n in COUNTS:
        agrees(
            Segment(ops, [0, 1], [2], [4]), ops, [0, 1], [2], [4], [torch.randn(n, 3, 4, 5), torch.randn(n, 2, 6, 3)]
        )


def test_no_operations():
    for n in COUNTS:
        agrees(Segment([], [0], [0], [4]), [], [0], [0], [4], [torch.randn(n, 3, 4, 5)])


def test_many_weights():
    dense = conv(1, (0,), 64, 80, 3, 3, padding=(1, 1), sparsity=0, **RELU)  # several blocks of rows
    check([dense, conv(2, (1,), 400, 64, 1, 1)], (80, 5, 6), outputs=[1, 2], counts=(1, 16))
    check([conv(1, (0,), 700, 300, 1, 1, sparsity=0.1, act='gelu')], (300, 1, 1), counts=(1, 16))
