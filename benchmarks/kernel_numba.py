"""Time of the sparse kernel in Numba against the older kernel in LLVM's language, on the networks of `inference.py`

`python benchmarks/kernel_numba.py [NETWORK ...]`. Both sides run in one process, in turn, layer by layer. The older
kernel comes from git: `fastprune/deploy/kernel.py` at the commit of `--before`. It needs llvmlite, which
Numba installs.

Each shape of linear layer and convolution is timed once, and counts as often as the network has it. Times are processor
times in one thread, which other work on the machine hardly changes. Both sides distribute tasks over threads in the
same way. `ratio` compares the shortest times of each layer."""

import argparse
import statistics
import subprocess
import time
import types
import warnings
from collections import Counter

import pandas as pd
import torch
from common import here, machine
from inference import networks, pruned
from torch import nn

from fastprune.deploy import kernel

BEFORE = 'cc1b801'


def kernel_before(commit):
    "Load the older module from git"
    text = subprocess.check_output(['git', 'show', f'{commit}:fastprune/deploy/kernel.py'], cwd=here, text=True)
    module = types.ModuleType('kernel_before')
    exec(compile(text, 'kernel_before', 'exec'), module.__dict__)
    return module


def projections(attention, x):
    "The linear layers inside an attention layer. It calls them as functions"
    width = attention.embed_dim
    joint = nn.Linear(width, 3 * width)
    joint.weight, joint.bias = attention.in_proj_weight, attention.in_proj_bias
    return [(joint, x), (attention.out_proj, x)]


def layers(model, x):
    "One layer of each shape with an input -> number of such layers in the model"
    found, shapes = {}, Counter()

    def see(layer, args):
        for one, arg in projections(layer, args[0]) if isinstance(layer, nn.MultiheadAttention) else [(layer, args[0])]:
            shape = repr(one).replace('NonDynamicallyQuantizable', ''), tuple(arg.shape)
            found.setdefault(shape, (one, arg.detach().clone()))
            shapes[shape] += 1

    kinds = nn.Linear, nn.Conv2d, nn.MultiheadAttention
    hooks = [m.register_forward_pre_hook(see) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return [(*found[shape], n) for shape, n in shapes.items()]


def sparse(module, layer):
    return (module.SparseLinear if isinstance(layer, nn.Linear) else module.SparseConv)(layer)


def timed(layer, x):
    start = time.thread_time()
    layer(x)
    return time.thread_time() - start


def compare(before, layer, x, seconds):
    "Seconds of each run of both sides, and whether the outputs are equal; three copies, at other addresses"
    res, equal = {'llvm': [], 'numba': []}, True
    for _ in range(3):
        sides = {'llvm': sparse(before, layer), 'numba': sparse(kernel, layer)}
        equal &= torch.equal(sides['llvm'](x), sides['numba'](x))
        end, runs = time.perf_counter() + seconds / 3, 0
        while runs < 2 or time.perf_counter() < end:
            for name in sorted(sides, reverse=runs % 2):
                res[name].append(timed(sides[name], x))
            runs += 1
    return res, equal


def row(name, sparsity, bs, seconds, model, before):
    total, worst, equal, count = Counter(), 0.0, True, 0
    with torch.no_grad():
        for layer, x, times in layers(model, torch.randn(bs, *networks[name][1])):
            res, same = compare(before, layer, x, seconds)
            for side, runs in res.items():
                total[side] += times * statistics.median(runs)
                total[side, 'min'] += times * min(runs)
            worst, equal, count = max(worst, min(res['numba']) / min(res['llvm'])), equal and same, count + times
    return dict(
        network=name,
        sparsity=sparsity,
        batch=bs,
        layers=count,
        llvm_ms=round(1e3 * total['llvm'], 3),
        numba_ms=round(1e3 * total['numba'], 3),
        ratio=round(total['numba', 'min'] / total['llvm', 'min'], 3),
        worst_layer=round(worst, 3),
        same_bits=equal,
        machine=machine(),
    )


def compile_row(before):
    "Compile time of the first sparse layer, on an idle processor"
    start = time.process_time()
    before._compiled()
    llvm = time.process_time() - start
    start = time.process_time()
    kernel.kernel_missing()
    ours = time.process_time() - start
    return dict(
        network='first use',
        sparsity=None,
        batch=None,
        llvm_ms=round(1e3 * llvm),
        numba_ms=round(1e3 * ours),
        machine=machine(),
    )


def save(rows):
    "Write rows to the table; they replace rows of the same network"
    path, new, order = here / 'kernel_numba.csv', pd.DataFrame(rows), {n: i for i, n in enumerate(networks)}
    print(new.drop(columns='machine').to_string(index=False, header=False), flush=True)
    if path.exists():
        new = pd.concat([pd.read_csv(path), new]).drop_duplicates(['network', 'sparsity', 'batch'], keep='last')
    keys = dict(by=['network', 'sparsity', 'batch'], key=lambda c: c.map(order) if c.name == 'network' else c)
    new.astype({'batch': 'Int64', 'layers': 'Int64'}).sort_values(**keys).to_csv(path, index=False)


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('networks', nargs='*', default=[])
    p.add_argument('--sparsities', type=float, nargs='*', default=[0.8, 0.9, 0.95, 0.98])
    p.add_argument('--batches', type=int, nargs='*', default=[1, 16, 32])
    p.add_argument('--seconds', type=float, default=0.2, help='seconds for each layer')
    p.add_argument('--before', default=BEFORE, help='the commit with the older kernel')
    a = p.parse_args()
    torch.set_num_threads(1)
    before = kernel_before(a.before)
    save([compile_row(before)])
    for name in a.networks or networks:
        for sparsity in a.sparsities:
            model = pruned(name, sparsity)
            for bs in a.batches:
                save([row(name, sparsity, bs, a.seconds, model, before)])
