"Selection with other sizes of its kernels, and without a CUDA graph"

import contextlib
import sys
from functools import partial

import torch
from common import Rows, host_seconds, seconds, spread
from overhead import make

from fastprune.all import prunable_weights

NARROW = dict(
    DIGITS=((24, 8), (16, 8), (8, 8), (0, 8)), PASSES={torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}, BINS=256
)
VARIANTS = {  # variant -> constants of the modules of `modules`; the most promising first
    'as it is': {},
    'BLOCK 2^9, 4 warps': dict(BLOCK=2**9),
    'BLOCK 2^9, 2 warps': dict(BLOCK=2**9, WARPS=2),
    '2 warps': dict(WARPS=2),
    'BLOCK 2^11, 8 warps': dict(BLOCK=2**11, WARPS=8),
    'CHUNK 2^15': dict(CHUNK=2**15),
    'CHUNK 2^13': dict(CHUNK=2**13),
    'digits of 8 bits': NARROW,
    'no graph': dict(graph=False),
}
# a network with 303 million weights, whose shapes are those of ViT-L, and one with many smaller ones
VIT_L = [(1024, 3, 16, 16), *[(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)] * 24]
NETWORKS = {'ViT-L': VIT_L, 'ResNet-50': 'torchvision resnet50'}


@contextlib.contextmanager
def constants(modules, values):
    "Give constants other values, each in the modules that have it"
    old = [(m, k, getattr(m, k)) for k in values for m in modules if hasattr(m, k)]
    for m, k, _ in old:
        setattr(m, k, values[k])
    try:
        yield
    finally:
        for m, k, v in old:
            setattr(m, k, v)


def modules():
    "The modules that have constants. Kernels are new, since they keep those that they are compiled with"
    from fastprune.core import selection_triton, triton_programs, triton_search

    sys.modules.pop('fastprune.core.radix', None)
    return triton_programs.kernels(), triton_programs, triton_search, selection_triton


def measure(weights, values):
    "(masks, projection, masks with zeros, host time of masks), each a list of seconds, and the masks"
    import triton.language as tl

    from fastprune.core.selection_triton import Search, TritonSelection

    tensors, rounds, values = list(weights.values()), 7, dict(values)
    ks = [round(0.9 * w.numel()) for w in tensors]
    record, find_again = values.pop('graph', True), Search.find_again
    if 'BINS' in values:
        values['BINS'] = tl.constexpr(values['BINS'])
    with constants(modules(), values):
        selection = TritonSelection()
        if not record:
            Search.find_again = Search.find
        try:
            masks = partial(selection.lowest, tensors, ks, True)
            for _ in range(4):  # compiles, and records a graph
                kept, _ = masks()
            before = [w.clone() for w in tensors]
            project = partial(selection.project, tensors, kept)
            fused = partial(selection.lowest, tensors, ks, True, None, tensors)
            times = []
            for timer, f in (seconds, masks), (seconds, project), (seconds, fused), (host_seconds, masks):
                f()
                times.append([])
                for _ in range(rounds):
                    torch._foreach_copy_(tensors, before)
                    times[-1].append(timer(f))
            torch._foreach_copy_(tensors, before)
            return times, kept
        finally:
            Search.find_again = find_again
            sys.modules.pop('fastprune.core.radix')


def weights_of(network, device):
    "Weights of a network by its name, or random ones of given shapes"
    if not isinstance(network, str):
        return {str(i): torch.randn(shape, device=device) for i, shape in enumerate(network)}
    return {n: p.detach() for n, p in prunable_weights(make(network).to(device)).items()}


def tuning(run):
    check = run.checks('tuning')
    rows = Rows('tuning', run.device, run.out)
    networks = {'small': [(5, 9)]} if run.small else NETWORKS
    variants = {v: VARIANTS[v] for v in ('as it is', 'no graph')} if run.small else VARIANTS
    models, first = {n: weights_of(of, run.device) for n, of in networks.items()}, {}
    for variant, values in variants.items():
        for network, weights in models.items():
            if run.left < 10:
                return check(f'{variant}, {network}', 'no time is left')
            try:
                times, kept = measure(weights, values)
            except Exception as e:
                check(f'{variant}, {network}', 'FAILED', f'{type(e).__name__}: {e}'[:300])
                continue
            masks, zeros, both, host = (round(1000 * spread(ts)[0], 4) for ts in times)
            first.setdefault(network, kept)
            same = all(map(torch.equal, kept, first[network]))
            ms = dict(masks_ms=masks, projection_ms=zeros, masks_and_zeros_ms=both, host_ms=host)
            rows.add(network=network, variant=variant, **ms, same=same)
