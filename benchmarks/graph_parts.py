"""Where the time goes in whole graphs: `python benchmarks/graph_parts.py [NETWORK ...]` writes graph_parts.csv

A graph is a table of steps. The time of a step is that of the first k+1 steps minus that of the first k, so that caches
are as they are at that place. Runs take turns, and the shortest counts."""

import argparse
import ctypes
import math
import time

import torch
from common import Rows
from inference import networks, pruned

from fastprune.all import sparse_inference
from fastprune.core.machine_code import in_threads
from fastprune.deploy.graph_program import program
from fastprune.deploy.graph_run import Segment
from fastprune.deploy.graph_steps import DONE, KIND, KINDS, OUTPUT

CASES = {'resnet50': [(0.9, 1)], 'mobilenet_v2': [(0.9, 1), (0.95, 1)], 'Transformer encoder': [(0.9, 1), (0.95, 1)]}
NAMES = {'phase': 'sorting of pixels', 'images': 'input', 'tokens_in': 'input', 'tokens_out': 'output'}


def part(plan, op, kind):
    "What a step of an operation is called in the table"
    if kind in NAMES:
        return NAMES[kind]
    if op.kind != 'conv':
        return {'mean': 'pools', 'maxpool': 'pools', 'avgpool': 'pools', 'norm': 'norms'}.get(op.kind, op.kind)
    if plan.tokens:
        return 'products'
    height = plan.shapes[op.out][1]
    if height == 1:
        return 'classifier'
    return f'{"depthwise convolutions" if op.sparse.groups > 1 else "convolutions"} to {height} px'


def timed(f):
    start = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - start)


def milliseconds(plan, dtype, whole, seconds):
    "The shortest time of each step of a plan, of all steps, and of `whole`"
    n, function, threads = len(plan.table), program(dtype), torch.get_num_threads()
    kinds = [KINDS[int(fields[KIND])] for fields in plan.fields]
    made = [torch.empty(plan.tokens, 4096) for _ in kinds]
    job = (ctypes.c_int64 * 3)(plan.table.data_ptr(), n, 0)

    def run(steps):
        for fields, kind, room in zip(plan.fields, kinds, made, strict=True):
            if kind == 'tokens_out':
                fields[OUTPUT] = room.data_ptr()  # the outputs of the last call are gone
        plan.fields[:, : DONE + 1] = 0
        job[1], job[2] = steps, 0
        return timed(lambda: in_threads(function, ctypes.addressof(job), threads))

    taken, start = [math.inf] * (n + 2), time.perf_counter()
    while math.isinf(taken[n]) or time.perf_counter() - start < seconds:
        for steps in range(n + 1):
            taken[steps] = min(taken[steps], run(steps))
        taken[n + 1] = min(taken[n + 1], timed(whole))
    taken = taken[:1] + [max(taken[: k + 1]) for k in range(1, n + 1)] + taken[n + 1 :]
    return [b - a for a, b in zip(taken[:n], taken[1 : n + 1], strict=True)], taken[n] - taken[0], taken[n + 1]


def measure(rows, name, sparsity, batch, seconds):
    model, x = pruned(name, sparsity), torch.randn(batch, *networks[name][1])
    fast = sparse_inference(model, x, seconds=4.0)
    segments = [m for m in fast.modules() if isinstance(m, Segment)]
    if len(segments) != 1:
        raise RuntimeError(f'{name} at {sparsity}, batch {batch}, is {len(segments)} graphs here: needs one')
    with torch.no_grad():
        fast(x)
        plan = list(segments[0].plans.values())[-1]
        steps, total, whole = milliseconds(plan, str(segments[0].dtype)[6:], lambda: fast(x), seconds)
    calls, parts = -(-batch // plan.images), {}
    for k, ms, fields in zip(plan.steps.order(), steps, plan.fields, strict=True):
        what = part(plan, plan.ops[plan.steps.ops[k][1]], KINDS[int(fields[KIND])])
        parts[what] = parts.get(what, 0) + calls * ms
    parts['Python and copies'] = whole - calls * total
    for what, ms in parts.items():
        rows.add(network=name, sparsity=sparsity, batch=batch, part=what, ms=round(ms, 3))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('networks', nargs='*', default=[])
    p.add_argument('--seconds', type=float, default=40.0, help='for each row of the table')
    a = p.parse_args()
    rows = Rows('graph_parts')
    for name in a.networks or CASES:
        for sparsity, batch in CASES[name]:
            measure(rows, name, sparsity, batch, a.seconds)


if __name__ == '__main__':
    main()
