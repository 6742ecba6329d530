"""Time of one mask update to 90% (scores, masks and zeros) in fastprune, fasterai and torch.nn.utils.prune, in turn in
one process. Also time and memory of global scope, from 1M to 500M weights. `python
benchmarks/mask_update.py [--rounds 7] [--largest 500]`"""

import gc
import warnings
from functools import partial

warnings.filterwarnings('ignore')
import torch
from common import quiet, seconds, spread, write
from fastcore.script import call_parse
from torch import nn
from torch.nn.utils import prune
from torchvision import models

from fastprune.all import compute_masks, prunable_weights


def clones(state):
    return [p.clone() for p in state.values()]


def fill(model, kind):
    "Fill the weights: as initialised, 90% zeros, or all equal"
    with torch.no_grad():
        for p in prunable_weights(model).values():
            if kind == '90% zeros':
                p.masked_fill_(torch.rand_like(p) < 0.9, 0)
            if kind == 'all equal':
                p.fill_(0.5)


def ours(model, scope, state):
    weights = {n: p.detach() for n, p in prunable_weights(model).items()}
    compute_masks(weights, 0.9, scope, absolute=True)

    def update():
        compute_masks(weights, 0.9, scope, absolute=True).apply_(weights)

    return restored(update, model, state)


def fasterai(model, scope, state):
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    with quiet():
        sparsifier = Sparsifier(model, 'weight', scope, large_final, False, (nn.Conv2d, nn.Linear))

    def update():
        with quiet():
            sparsifier.sparsify_model(0.9)

    return restored(update, model, state)


def torch_prune(model, scope, state):
    layers = [(m, 'weight') for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def update():
        if scope == 'global':
            prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9)
        else:
            for m, name in layers:
                prune.l1_unstructured(m, name, 0.9)

    def plain():
        for m, name in layers:
            prune.remove(m, name)

    return restored(update, model, state, plain)


def restored(update, model, state, after=lambda: None):
    "Run `update` on the same weights each time"

    def run():
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in state:
                    p.copy_(state[n])
        t = seconds(update)
        after()
        return t

    return run


def in_turn(sides, rounds):
    res = {n: [] for n in sides}
    for i in range(rounds + 1):
        for n, f in sides.items():
            t = f()
            if i:
                res[n].append(t)
    return res


def networks(rounds):
    rows = []
    for arch in ('resnet18', 'resnet50'):
        for kind in ('dense', '90% zeros', 'all equal'):
            for scope in ('local', 'global'):
                torch.manual_seed(0)
                nets = {
                    side: getattr(models, arch)(num_classes=10)
                    for side in ('fastprune', 'fasterai', 'torch.nn.utils.prune')
                }
                fill(nets['fastprune'], kind)
                state = {n: p.detach().clone() for n, p in nets['fastprune'].named_parameters()}
                make = {'fastprune': ours, 'fasterai': fasterai, 'torch.nn.utils.prune': torch_prune}
                sides = {side: make[side](net, scope, state) for side, net in nets.items()}
                sides['copy of the weights'] = partial(seconds, partial(clones, state))
                for side, ts in in_turn(sides, rounds).items():
                    med, lo, hi = spread(ts)
                    rows.append(
                        dict(
                            network=arch,
                            weights=sum(p.numel() for n, p in state.items() if p.ndim > 1),
                            scores=kind,
                            scope=scope,
                            side=side,
                            ms=round(1000 * med, 1),
                            min_ms=round(1000 * lo, 1),
                            max_ms=round(1000 * hi, 1),
                            runs=rounds,
                        )
                    )
                print(arch, kind, scope, {r['side']: r['ms'] for r in rows[-4:]}, flush=True)
    return rows


def peak_memory(f):
    "Peak memory of the process during `f`, in bytes beyond its memory before"

    def read(key):
        return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))

    gc.collect()
    with open('/proc/self/clear_refs', 'w') as out:
        out.write('5')  # reset the peak
    before = read('VmRSS')
    f()
    return read('VmHWM') - before


def growth(largest, rounds):
    rows = []
    for millions in [m for m in (1, 5, 20, 100, 500) if m <= largest]:
        n = millions * 10**6
        for kind in ('dense', '90% zeros', 'all equal'):
            gen = torch.Generator().manual_seed(0)
            weights = {str(i): torch.empty(n // 10) for i in range(10)}
            for w in weights.values():
                w.normal_(generator=gen)
                if kind == '90% zeros':
                    w.masked_fill_(torch.rand(len(w), generator=gen) < 0.9, 0)
                if kind == 'all equal':
                    w.fill_(0.5)
            update = partial(compute_masks, weights, 0.9, 'global', absolute=True)
            if millions == 1:
                update()
            peak = peak_memory(update)
            med, lo, hi = spread([seconds(update) for _ in range(rounds if n <= 10**8 else 3)])
            rows.append(
                dict(
                    weights=n,
                    scores=kind,
                    ms=round(1000 * med, 1),
                    ns_per_weight=round(1e9 * med / n, 2),
                    bytes_per_weight=round(peak / n, 2),
                )
            )
            print(rows[-1], flush=True)
    return rows


@call_parse
def main(
    rounds: int = 7,  # Timed runs of each side
    largest: int = 500,  # Largest number of weights, in millions
):
    "Write mask_update.csv and mask_update_growth.csv"
    write('mask_update_growth', growth(largest, rounds))
    write('mask_update', networks(rounds))
