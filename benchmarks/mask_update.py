"""Time of one mask update to 90% (scores, masks and zeros) in fastprune, fasterai and torch.nn.utils.prune, in turn in
one process. Also time and memory of global scope, from 1M to 500M weights. `python
benchmarks/mask_update.py [--device cuda] [--rounds 7] [--largest 500]`

On a GPU: updates and projections of `GPU_NETWORKS`, and time and memory of a billion weights"""

import gc
import warnings
from functools import partial

warnings.filterwarnings('ignore')
import torch
from common import Rows, here, host_seconds, quiet, seconds, spread, write
from fastcore.script import call_parse
from torch import nn
from torch.nn.utils import prune
from torchvision import models

from fastprune.all import Method, Sparsifier, compute_masks, prunable_weights

GPU_NETWORKS = {
    'resnet50': 'torchvision resnet50',
    'vit_large_patch16_224': 'timm vit_large_patch16_224',
    'resnet18': 'torchvision resnet18',
}
SMALL_NETWORKS = {'resnet18': 'torchvision resnet18'}


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

    def update():
        compute_masks(weights, 0.9, scope, absolute=True, zeros=weights)

    for _ in range(15):  # until it is worth compiling
        update()

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
                    scope='global',
                    weights=n,
                    scores=kind,
                    ms=round(1000 * med, 1),
                    ns_per_weight=round(1e9 * med / n, 2),
                    bytes_per_weight=round(peak / n, 2),
                )
            )
            print(rows[-1], flush=True)
    return rows


class Update:
    "The sides of a mask update on one device. Each call of `run` starts from the same weights"

    def __init__(self, model, first, scope):
        self.weights = {n: p.detach() for n, p in prunable_weights(model).items()}
        self.tensors, self.first, self.scope = list(self.weights.values()), first, scope
        torch._foreach_copy_(self.tensors, first)
        self.masks = compute_masks(self.weights, 0.9, scope, absolute=True)
        self.floats = [self.masks[n].to(p.dtype) for n, p in self.weights.items()]
        self.buffers = [p.clone() for p in self.tensors]
        method = Method(0.9, scope=scope, schedule=lambda pos: 1.0, interval=1, refresh=True)
        self.engine = Sparsifier(model, method, 10**5)

    def run(self, f, timer=seconds):
        "Seconds of `f`"
        torch._foreach_copy_(self.tensors, self.first)
        return timer(f)

    def update(self):
        compute_masks(self.weights, 0.9, self.scope, absolute=True).apply_(self.weights)

    def sides(self):
        "Name -> function that measures once"
        timed = {
            'compute_masks and apply_': self.update,
            'a step of the engine': self.engine.after_step,
            'projection': lambda: self.masks.apply_(self.weights),
            'foreach_mul_, float masks': lambda: torch._foreach_mul_(self.tensors, self.floats),
            'copy of the weights': lambda: torch._foreach_copy_(self.buffers, self.tensors),
        }
        sides = {side: partial(self.run, f) for side, f in timed.items()}
        for side in list(timed)[:3]:
            sides[f'{side}, host'] = partial(self.run, timed[side], host_seconds)
        return sides


def updates_on(device, networks, rounds, out=here):
    "Times of updates of networks on `device`. Host times are without waiting for the device"
    from overhead import make

    rows = Rows('mask_update', device, out)
    for network, name in networks.items():
        torch.manual_seed(0)
        model = make(name).to(device)  # to initialise a large one takes seconds
        for kind in ('dense', '90% zeros'):
            fill(model, kind)
            first = [p.detach().clone() for p in prunable_weights(model).values()]
            for scope in ('local', 'global'):
                update = Update(model, first, scope)
                weights = sum(p.numel() for p in first)
                for side, ts in in_turn(update.sides(), rounds).items():
                    ms, lo, hi = (round(1000 * t, 3) for t in spread(ts))
                    of = dict(network=network, weights=weights, scores=kind, scope=scope, side=side)
                    rows.add(**of, ms=ms, min_ms=lo, max_ms=hi, runs=rounds)
                torch._foreach_copy_(update.tensors, first)


def extra_memory(device, f, weights):
    "Peak memory during `f` on `device`, in bytes beyond `weights`"
    if str(device) == 'cpu':
        return peak_memory(f)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds(f)
    return torch.cuda.max_memory_allocated() - sum(w.nbytes for w in weights.values())


def billion_on(device, width, rounds, out=here):
    "Time and memory of an update of a Transformer with 20 layers; of width 2048 it has a billion weights"
    from billion import shapes

    rows = Rows('mask_update_growth', device, out)
    weights = {n: torch.randn(s, device=device) for n, s in shapes(width).items()}
    n = sum(w.numel() for w in weights.values())
    for kind in ('dense', '90% zeros'):
        for scope in ('local', 'global'):
            update = partial(compute_masks, weights, 0.9, scope, absolute=True)
            extra = extra_memory(device, update, weights)
            ms = 1000 * spread([seconds(update) for _ in range(rounds)])[0]
            per = dict(ns_per_weight=round(1e6 * ms / n, 4), bytes_per_weight=round(extra / n, 3))
            rows.add(scope=scope, weights=n, scores=kind, ms=round(ms, 3), **per)
        update().apply_(weights)


@call_parse
def main(
    rounds: int = 7,  # Timed runs of each side
    largest: int = 500,  # Largest number of weights, in millions, on a CPU
    device: str = 'cpu',  # 'cpu' or 'cuda'
):
    "Write mask_update.csv and mask_update_growth.csv"
    if device != 'cpu':
        updates_on(device, GPU_NETWORKS, rounds)
        return billion_on(device, 2048, rounds)
    write('mask_update_growth', growth(largest, rounds))
    write('mask_update', networks(rounds))
