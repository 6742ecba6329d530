"""Time and outputs of pruned networks on a CPU: dense, sparse, shrunk, and in onnxruntime.
`python benchmarks/inference.py [NETWORK ...]`

Weights are random, and each tensor is pruned by magnitude. BatchNorm has the statistics of a random batch. Shrunk
networks are pruned by whole filters (neurons of linear layers) to the same sparsity."""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime
import pandas as pd
import torch
import torchvision
from common import here, machine
from torch import nn

from fastprune.all import compute_masks, latency, prunable_weights, shrink, sparse_inference, to_onnx


def mlp():
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True), 4)


networks = {
    'MLP': (mlp, (1024,)),
    'Transformer encoder': (encoder, (64, 768)),
    **{n: (getattr(torchvision.models, n), (3, 224, 224)) for n in ('mobilenet_v2', 'resnet18', 'resnet50')},
}
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
    forms = sparse.inference_report.form.drop('total').value_counts().to_dict()
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
            forms=' '.join(f'{k}:{v}' for k, v in forms.items()) if side == 'sparse_inference' else '',
            trial_s=round(trial, 1) if side == 'sparse_inference' else '',
            machine=machine(),
        )


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('networks', nargs='*', default=[])
    p.add_argument('--sparsities', type=float, nargs='*', default=[0.8, 0.9, 0.95, 0.98])
    p.add_argument('--batches', type=int, nargs='*', default=[1, 16, 32])
    p.add_argument('--seconds', type=float, default=4.0, help='for the trial of forms')
    a = p.parse_args()
    path = here / 'inference.csv'
    for name in a.networks or networks:
        for sparsity in a.sparsities:
            with tempfile.TemporaryDirectory() as d:
                made = sides(name, sparsity, Path(d))
            for bs in a.batches:
                rows = pd.DataFrame(cell(name, sparsity, bs, a.seconds, *made))
                print(
                    rows[
                        ['network', 'sparsity', 'batch', 'side', 'ms', 'speedup', 'relative_difference', 'forms']
                    ].to_string(index=False, header=False),
                    flush=True,
                )
                if path.exists():  # new measurements replace old ones
                    old = pd.read_csv(path)
                    rows = pd.concat(
                        [old[~((old.network == name) & (old.sparsity == sparsity) & (old.batch == bs))], rows]
                    )
                rows.to_csv(path, index=False)
