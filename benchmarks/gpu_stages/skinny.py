"The kernel for few rows of inputs beside the dense product, and whether it is right"

import torch
import torch.nn.functional as F
from common import Rows
from torch import nn

from fastprune.deploy.skinny import MOST_ROWS, SkinnyLinear

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ENOUGH = 200_000_000  # bytes of weights in turn, so that no cache holds them


def layer(out, columns, sparsity, dtype, device):
    linear = nn.Linear(columns, out, device=device).requires_grad_(False)
    linear.weight.mul_(torch.rand_like(linear.weight) >= sparsity)
    return linear.to(dtype).eval()


def error(y, linear, x):
    want = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    return float((y.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))


def eager_ms(calls, repeats):
    "Milliseconds of a call, the host's launches included"
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            for f in calls:
                f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / repeats / len(calls))
    return sorted(times)[2]


def graph_ms(calls, repeats):
    "Milliseconds of a call inside of a CUDA graph"
    for f in calls:
        f()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in calls:
            f()
    return eager_ms([graph.replay], repeats) / len(calls)


@torch.no_grad()
def exact(run):
    "Odd shapes, empty and full rows, 1 to 33 rows of inputs"
    check, wrong = run.checks('skinny'), []
    shapes = ((3, 5), (40, 33)) if run.small else ((1, 1), (3, 5), (1000, 777), (17, 40000))
    for dtype, most in ROUNDING.items():
        for out, columns in shapes:
            for sparsity in (0.0, 0.9, 1.0):
                linear = layer(out, columns, sparsity, dtype, run.device)
                skinny = SkinnyLinear(linear)
                for rows in (1, 3, 8, MOST_ROWS, MOST_ROWS + 1):
                    x = torch.randn(rows, columns, device=run.device).to(dtype)
                    if not (e := error(skinny(x), linear, x)) <= most:
                        wrong.append((str(dtype), out, columns, sparsity, rows, e))
    check('outputs are those of the dense product', 'FAILED' if wrong else 'passed', wrong[:5])


@torch.no_grad()
def times(run):
    table = Rows('inference', run.device, run.out)
    for out, columns in ((4096, 4096), (11008, 4096)):
        for dtype in (torch.float16, torch.float32):
            for sparsity in (0.5, 0.9, 0.95):
                n = max(2, ENOUGH // (out * columns * dtype.itemsize))
                dense = [layer(out, columns, sparsity, dtype, run.device) for _ in range(n)]
                skinny = [SkinnyLinear(linear) for linear in dense]
                for rows in (1, 8, MOST_ROWS):
                    if run.left < 10:
                        return
                    x = torch.randn(rows, columns, device=run.device).to(dtype)
                    network = f'linear {columns}-{out}, {str(dtype)[6:]}'
                    of = dict(network=network, sparsity=sparsity, batch=rows)
                    for way, measure in (('', eager_ms), (', in a graph', graph_ms)):
                        ms = {}
                        for side, layers in (('dense', dense), ('skinny', skinny)):
                            calls = [lambda linear=linear, x=x: linear(x) for linear in layers]
                            ms[side] = measure(calls, 10)
                            speedup = round(ms['dense'] / ms[side], 2)
                            table.add(**of, side=side + way, ms=round(ms[side], 5), speedup=speedup)


def skinny(run):
    exact(run)
    if run.device != 'cpu':
        times(run)
