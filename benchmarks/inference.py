"""Time and outputs of pruned networks: dense, sparse, and on a CPU shrunk, and in onnxruntime.
`python benchmarks/inference.py [NETWORK ...] [--device cuda]`

Weights are random, and each tensor is pruned by magnitude. BatchNorm has the statistics of a random batch. Shrunk
networks are pruned by whole filters (neurons of linear layers) to the same sparsity. On a GPU, networks are in float16;
2:4 layers are those of an MLP, and "tokens" is its batch size."""

import argparse
import tempfile
import time
import warnings
from inspect import signature
from pathlib import Path

import pandas as pd
import torch
import torchvision
from common import Rows, here, machine, read_rows, write_rows
from torch import nn

from fastprune.all import (
    compute_masks,
    latency,
    prunable_weights,
    shrink,
    sparse_inference,
    to_onnx,
    to_semi_structured,
)


def mlp():
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))


def encoder(blocks=4):
    block = lambda: nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    res = nn.TransformerEncoder(block(), blocks)  # of copies; an exporter stores equal weights once
    res.layers = nn.ModuleList(block() for _ in range(blocks))
    return res


def wide(width=4096):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


networks = {
    'MLP': (mlp, (1024,)),
    'Transformer encoder': (encoder, (64, 768)),
    **{n: (getattr(torchvision.models, n), (3, 224, 224)) for n in ('mobilenet_v2', 'resnet18', 'resnet50')},
    'MLP 4096-16384-4096': (wide, (4096,)),
}
on_cpu = [n for n in networks if n != 'MLP 4096-16384-4096']
last = {'MLP': '4', 'Transformer encoder': None, 'mobilenet_v2': 'classifier', 'resnet18': 'fc', 'resnet50': 'fc'}


def network(name, seed=0):
    torch.manual_seed(seed)
    return networks[name][0]()


def settle(model, shape):
    "Give BatchNorm realistic statistics, as after training"
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(8, *shape))
    return model.eval()


def pruned(name, sparsity, granularity='weight'):
    model = network(name)
    if granularity == 'weight':
        weights = prunable_weights(model)
    else:
        weights = {
            n: p
            for n, p in prunable_weights(model, exclude=last[name]).items()
            if 'self_attn' not in n and 'linear2' not in n
        }
    by_dim = {4: 'filter', 2: 'row'} if granularity == 'filter' else {4: 'weight', 3: 'weight', 2: 'weight'}
    for dim, units in by_dim.items():
        some = {n: p for n, p in weights.items() if p.ndim == dim}
        if some:
            compute_masks(some, sparsity, granularity=units, absolute=True).apply_({n: p.data for n, p in some.items()})
    return settle(model, networks[name][1])


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    s = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    n = s.get_inputs()[0].name
    return lambda x: s.run(None, {n: x.numpy()})


def differ(a, b):
    return float(
        (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
    )  # some networks that lose 98% of each layer return zeros


def sides(name, sparsity, folder):
    "The sides, for any batch: the pruned model, one with pruned filters, its shrunk form, and onnxruntime"
    shape = networks[name][1]
    x, model, filters = torch.randn(2, *shape), pruned(name, sparsity), pruned(name, sparsity, 'filter')
    for m, f in ((settle(network(name), shape), 'dense'), (model, 'pruned')):
        to_onnx(m, x, folder / f'{f}.onnx')
    return (
        model,
        filters,
        shrink(filters, x, repeats=0)[0],
        {f'onnxruntime, {f}': session(folder / f'{f}.onnx') for f in ('dense', 'pruned')},
    )


def forms_of(report, column):
    "How many layers became what"
    counts = report[column].drop('total', errors='ignore').value_counts().to_dict()
    return ' '.join(f'{k}:{v}' for k, v in counts.items())


def cell(name, sparsity, bs, seconds, model, filters, small, onnx_sides):
    "One row for each side"
    x = torch.randn(bs, *networks[name][1])
    start = time.perf_counter()
    sparse = sparse_inference(model, x, seconds=seconds)
    trial = time.perf_counter() - start
    with torch.no_grad():
        want, filtered = model(x), filters(x)
    torch_sides = {'dense': model, 'sparse_inference': sparse, 'shrunk': small}
    with torch.no_grad():
        off = {
            'sparse_inference': differ(sparse(x), want),
            'shrunk': differ(small(x), filtered),
            'onnxruntime, pruned': differ(torch.from_numpy(onnx_sides['onnxruntime, pruned'](x)[0]), want),
        }
    parts = []
    for _ in range(2):  # one library after the other: idle threads of both libraries use the CPU while they wait
        for some in (torch_sides, onnx_sides):
            parts.append(latency(some, x, 0.8 * len(some)))
            time.sleep(0.2)
    ms = pd.concat(parts).groupby(level=0, sort=False).agg({'ms': 'median', 'min': 'min', 'max': 'max'})
    for side, r in ms.iterrows():
        yield dict(
            network=name,
            sparsity=sparsity,
            batch=bs,
            side=side,
            ms=round(r.ms, 3),
            min=round(r['min'], 3),
            max=round(r['max'], 3),
            speedup=round(ms.ms['dense'] / r.ms, 2),
            weights=sum(p.numel() for p in small.parameters())
            if side == 'shrunk'
            else sum(p.numel() for p in model.parameters()),
            relative_difference=f'{off[side]:.1e}' if side in off else '',
            forms=forms_of(sparse.inference_report, 'form') if side == 'sparse_inference' else '',
            trial_s=round(trial, 1) if side == 'sparse_inference' else '',
            device='cpu',
            machine=machine(),
        )


def compare(rows, network, sparsity, x, model, make, side, seconds=1.0):
    "Rows of `model` and of what `make` returns for an example, or the row of its error"
    of = dict(network=network, sparsity=sparsity, batch=len(x))
    weights = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    try:
        other, report, column = make(model, x)
    except Exception as e:
        return rows.add(**of, side=side, forms=f'{type(e).__name__}: {e}'[:300])
    trial = round(time.perf_counter() - start, 1)
    with torch.no_grad():
        off = differ(other(x).float(), model(x).float())
    ms = latency({'dense': model, side: other}, x, seconds)
    for s, r in ms.iterrows():
        own = dict(relative_difference=f'{off:.1e}', forms=forms_of(report, column), trial_s=trial) if s == side else {}
        spread = dict(ms=round(r.ms, 4), min=round(r['min'], 4), max=round(r['max'], 4))
        rows.add(**of, side=s, **spread, speedup=round(ms.ms['dense'] / r.ms, 3), weights=weights, **own)


def unstructured_on(device, names, sparsities, batches, seconds, out=here):
    "`sparse_inference` on a GPU, in float16"
    rows, dtype = Rows('inference', device, out), torch.float32 if device == 'cpu' else torch.float16

    def make(model, x):
        res = sparse_inference(model, x, seconds=seconds, rtol=1e-2)
        return res, res.inference_report, 'form'

    for name in names:
        for sparsity in sparsities:
            model = pruned(name, sparsity).to(device, dtype)
            for bs in batches:
                x = torch.randn(bs, *networks[name][1], device=device, dtype=dtype)
                compare(rows, name, sparsity, x, model, make, 'sparse_inference')


def semi_structured_on(device, width, tokens, out=here):
    "`to_semi_structured` on a GPU, in float16"
    rows, network = Rows('inference', device, out), f'MLP {width}-{4 * width}-{width}, 2:4'
    torch.manual_seed(0)
    model = wide(width).to(device, torch.float16).eval()
    weights = {n: p.data for n, p in prunable_weights(model).items()}
    compute_masks(weights, 0.5, granularity='2:4', absolute=True).apply_(weights)
    takes = signature(to_semi_structured).parameters

    def make(model, x):
        res = to_semi_structured(model, **{k: v for k, v in dict(example=x, seconds=1.0).items() if k in takes})
        return res, res.semi_structured_report, 'became'

    for n in tokens:
        x = torch.randn(n, width, device=device, dtype=torch.float16)
        compare(rows, network, 0.5, x, model, make, 'to_semi_structured')


def main(names, sparsities, batches, seconds):
    "The sides on a CPU"
    path = here / 'inference.csv'
    for name in names:
        for sparsity in sparsities:
            with tempfile.TemporaryDirectory() as d:
                made = sides(name, sparsity, Path(d))
            for bs in batches:
                rows = list(cell(name, sparsity, bs, seconds, *made))
                shown = ['network', 'sparsity', 'batch', 'side', 'ms', 'speedup', 'relative_difference', 'forms']
                print(pd.DataFrame(rows)[shown].to_string(index=False, header=False), flush=True)
                of = ['cpu', name, str(sparsity), str(bs)]  # new measurements replace old ones
                kept = [r for r in read_rows(path) if [r[k] for k in ('device', *shown[:3])] != of]
                write_rows(path, [*kept, *rows])


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('networks', nargs='*', default=[])
    p.add_argument('--sparsities', type=float, nargs='*', default=[0.8, 0.9, 0.95, 0.98])
    p.add_argument('--batches', type=int, nargs='*', default=[1, 16, 32])
    p.add_argument('--seconds', type=float, default=4.0, help='for the trial of forms')
    p.add_argument('--device', default='cpu')
    a = p.parse_args()
    if a.device == 'cpu':
        main(a.networks or on_cpu, a.sparsities, a.batches, a.seconds)
    else:
        unstructured_on(a.device, a.networks or networks, a.sparsities, a.batches, a.seconds)
        semi_structured_on(a.device, 4096, [64, 1024, 8192])
