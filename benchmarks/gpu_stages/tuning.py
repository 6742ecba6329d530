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
VARIANTS = {  # variant -> constants of the modules of `modules`
    'as it is': {},
    'no graph': dict(graph=False),
    'CHUNK 2^13': dict(CHUNK=2**13),
    'CHUNK 2^15': dict(CHUNK=2**15),
    'CHUNK 2^16': dict(CHUNK=2**16),
    'BLOCK 2^10': dict(BLOCK=2**10),
    'BLOCK 2^12': dict(BLOCK=2**12),
    '4 warps': dict(WARPS=4),
    'BLOCK 2^10, 4 warps': dict(BLOCK=2**10, WARPS=4),
    'BLOCK 2^12, 16 warps': dict(BLOCK=2**12, WARPS=16),
    'digits of 8 bits': NARROW,
    'digits of 8 bits, BLOCK 2^12': dict(NARROW, BLOCK=2**12),
}
NETWORKS = {'resnet50': 'torchvision resnet50', 'vit_large_patch16_224': 'timm vit_large_patch16_224'}


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
    "(masks, projection, host time of masks), each a list of seconds, and the masks"
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
            project = partial(selection.project, tensors, kept)
            project()
            return [[timer(f) for _ in range(rounds)] for timer, f in _sides(masks, project)], kept
        finally:
            Search.find_again = find_again
            sys.modules.pop('fastprune.core.radix')


def _sides(masks, project):
    return (seconds, masks), (seconds, project), (host_seconds, masks)


def tuning(run):
    check = run.checks('tuning')
    rows = Rows('tuning', run.device, run.out)
    networks = {'small': None} if run.small else NETWORKS
    variants = {v: VARIANTS[v] for v in ('as it is', 'no graph')} if run.small else VARIANTS
    models, first = {}, {}
    for network, name in networks.items():
        made = torch.nn.Linear(9, 5) if name is None else make(name)
        models[network] = {n: p.detach() for n, p in prunable_weights(made.to(run.device)).items()}
    for variant, values in variants.items():
        for network, weights in models.items():
            if run.left < 10:
                return check(f'{variant}, {network}', 'no time is left')
            try:
                times, kept = measure(weights, values)
            except Exception as e:
                check(f'{variant}, {network}', 'FAILED', f'{type(e).__name__}: {e}'[:300])
                continue
            masks, zeros, host = (round(1000 * spread(ts)[0], 4) for ts in times)
            first.setdefault(network, kept)
            same = all(map(torch.equal, kept, first[network]))
            rows.add(network=network, variant=variant, masks_ms=masks, projection_ms=zeros, host_ms=host, same=same)
