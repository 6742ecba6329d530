"""Time and memory of one mask update of a Transformer with a billion float32 weights, in one process with at most
16 GiB, and in two processes with half of each weight: `python benchmarks/billion.py`"""

import os
import resource
import time
from multiprocessing import get_context

import torch
from common import write

from fastprune.core.compute import compute_masks

WIDTH, LAYERS, LIMIT = 2048, 20, 16 * 2**30


def shapes(width=WIDTH):
    w = width
    return {
        f'{i}.{n}': s
        for i in range(LAYERS)
        for n, s in dict(attention=(3 * w, w), out=(w, w), up=(4 * w, w), down=(w, 4 * w)).items()
    }


def model(parts=1):
    torch.manual_seed(0)
    return {n: torch.randn(a // parts, b) * 0.02 for n, (a, b) in shapes().items()}


def update(weights, scope, group=None):
    start = time.perf_counter()
    masks = compute_masks(weights, 0.9, scope, absolute=True, group=group)
    middle = time.perf_counter()
    masks.apply_(weights)
    return masks, middle - start, time.perf_counter() - middle


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(rank, size, port, queue, scope):
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    torch.set_num_threads(max(1, os.cpu_count() // size))
    group, sent = None, []
    if size > 1:
        torch.distributed.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=size)
        group, real = torch.distributed.group.WORLD, torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda t, **kw: sent.append(t.numel() * t.element_size()) or real(t, **kw)
    weights = model(parts=size)
    n = sum(w.numel() for w in weights.values())
    for kind in ('dense', '90% zeros'):  # the second update finds the weights that the first one pruned
        sent.clear()
        masks, t_masks, t_apply = update(weights, scope, group)
        kept = torch.tensor(masks.n_kept)
        if size > 1:
            real(kept)
        assert int(kept) == (
            size * n - round(0.9 * size * n)
            if scope == 'global'
            else sum(size * w.numel() - round(0.9 * size * w.numel()) for w in weights.values())
        )
        if not rank:
            queue.put(
                dict(
                    processes=size,
                    scope=scope,
                    weights=f'{size * n:,}',
                    found=kind,
                    masks_s=round(t_masks, 2),
                    zeros_s=round(t_apply, 2),
                    peak_GiB=round(peak() / 2**30, 2),
                    of_that_weights=round(4 * n / 2**30, 2),
                    summed_up_KiB=round(sum(sent) / 1024, 1),
                )
            )
    if size > 1:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    spawn, rows = get_context('spawn'), []
    for size in (1, 2):
        for scope in ('local', 'global'):
            queue = spawn.Queue()
            ps = [spawn.Process(target=run, args=(r, size, 29871, queue, scope)) for r in range(size)]
            for p in ps:
                p.start()
            rows += [queue.get(timeout=580), queue.get(timeout=580)]
            for p in ps:
                p.join()
            assert not any(p.exitcode for p in ps)
            print(*rows[-2:], sep='\n', flush=True)
    write('billion', rows)
