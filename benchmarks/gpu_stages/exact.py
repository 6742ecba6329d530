"Masks on the device equal those of the CPU to the bit"

import copy
import math
import traceback
import warnings
from itertools import product

import torch
from torch import nn

from fastprune.all import Masks, Method, Sparsifier, compute_masks, prunable_weights

from .run import verdict

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = {'a': (7,), 'b': (3, 5), 'c': (64, 64, 3, 3), 'd': (1000, 513), 'e': (300, 70, 3, 3), 'f': (16, 1)}
KINDS = {
    'random': lambda x: x - 0.5,
    'equal': torch.ones_like,
    'zeros': lambda x: x * (x > 0.93),
    'few values': lambda x: (x * 4).floor() - 1,
    'minus zero': lambda x: torch.where(x < 0.6, -torch.zeros_like(x), x - 0.8),
    'infinite': lambda x: torch.where(x < 0.01, -math.inf, torch.where(x > 0.9, math.inf, x)),
}
SCOPES = ('local', 'global', 'erk', 'balanced', 'lamp')
GRANULARITIES = ('row', 'column', 'filter', 'kernel', '2:4', '1:4', '4x4')


def scores(kind, dtype, small):
    gen = torch.Generator().manual_seed(0)
    shapes = {n: tuple(min(k, 12) for k in s) for n, s in SHAPES.items()} if small else SHAPES
    return {n: KINDS[kind](torch.rand(s, generator=gen)).to(dtype) for n, s in shapes.items()}


def moved(tensors, device):
    return {n: t.to(device) for n, t in tensors.items()}


def masks_or_error(f, *args, **kwargs):
    "Masks on the CPU, or the error as text"
    try:
        return moved(f(*args, **kwargs), 'cpu')
    except (ValueError, RuntimeError) as e:
        return f'{type(e).__name__}: {e}'


def same(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Cases:
    "Counts cases, and describes the first ones that differ"

    def __init__(self, check, device):
        self.check, self.device = check, device

    def compare(self, x, sparsity, keep=None, **kwargs):
        "Does `compute_masks` give the same on both devices, or the same error?"
        here, there = (
            masks_or_error(compute_masks, moved(x, d), sparsity, keep=keep and moved(keep, d), **kwargs)
            for d in ('cpu', self.device)
        )
        return same(here, there), there if isinstance(there, str) else ''

    def row(self, case, cases):
        "One row of checks.csv for cases, each (name, arguments)"
        bad = []
        for name, args in cases:
            ok, note = self.compare(**args)
            if not ok:
                bad.append(f'{name} {note}')
        self.check(case, verdict(not bad), f'{len(bad)} of {len(cases)} differ {bad[:8]}')


def masks(run, check):
    cases = Cases(check, run.device)
    sparsities = (0.1, 0.5, 0.9, 0.987)
    for dtype, kind in product(DTYPES, KINDS):
        x = scores(kind, dtype, run.small)
        absolute = kind != 'few values'
        plain = [
            (f'{scope} {s}', dict(x=x, sparsity=s, scope=scope, absolute=absolute))
            for scope, s in product(SCOPES, sparsities)
        ]
        of_two = {n: x[n] for n in 'ce'}
        units = [
            (g, dict(x={'c': of_two['c']} if ':' in g else of_two, sparsity=s, granularity=g, absolute=absolute))
            for g, s in zip(GRANULARITIES, (0.5, 0.3, 0.7, 0.9, 0.5, 0.75, 0.6), strict=True)
        ]
        first = moved(compute_masks(x, 0.3, 'local', absolute=absolute), 'cpu')
        kept = [
            (f'keep {scope} {s}', dict(x=x, sparsity=s, scope=scope, absolute=absolute, keep=first))
            for scope, s in product(('local', 'global'), (0.2, 0.5, 0.95))
        ]
        name = f'{str(dtype)[6:]}, {kind}'
        for what, some in (('scopes', plain), ('granularities', units), ('keep', kept)):
            cases.row(f'{name}: {what}', some)


def not_a_number(run, check):
    "NaN raises at once, and the error names the tensor"
    for scope in ('local', 'global'):
        x = scores('random', torch.float32, run.small)
        x['d'][1, 1] = math.nan
        found = masks_or_error(compute_masks, moved(x, run.device), 0.5, scope, absolute=True)
        check(f'NaN, {scope}', verdict(isinstance(found, str) and "'d'" in found), str(found)[:200])


def projected(run, check):
    "Pruned weights become +0.0, from infinities and NaN too"
    for dtype in DTYPES:
        w = scores('infinite', dtype, run.small)
        w['d'][:, 0] = math.nan
        gen = torch.Generator().manual_seed(1)
        kept = Masks({n: torch.rand(t.shape, generator=gen) < 0.3 for n, t in w.items()})
        there = moved(w, run.device)
        Masks(moved(kept, run.device)).apply_(there)
        wrong = [
            n
            for n, t in moved(there, 'cpu').items()
            if (t[~kept[n]] != 0).any()
            or t[~kept[n]].signbit().any()
            or not torch.equal(t[kept[n]].nan_to_num(7), w[n][kept[n]].nan_to_num(7))
        ]
        check(f'projection, {str(dtype)[6:]}', verdict(not wrong), f'wrong: {wrong}')


def training(run, check):
    "The engine has the same masks at each step, whether weights may come back or not"
    torch.manual_seed(0)
    start = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(256, 10))
    states = [{n: torch.randn(p.shape) for n, p in start.named_parameters()} for _ in range(6)]
    for recover, scope, granularity in product((True, False, 'alive'), ('local', 'global'), ('weight', 'filter')):
        seen = []
        for device in ('cpu', run.device):
            model = copy.deepcopy(start).to(device)
            method = Method(0.8, scope=scope, granularity=granularity, interval=1, recover=recover)
            engine = Sparsifier(model, method, len(states), torch.optim.SGD(model.parameters(), lr=0.0))
            seen.append([])
            for state in states:
                with torch.no_grad():
                    for n, p in model.named_parameters():
                        p.copy_(state[n])
                engine.step()
                zeros = {n: p.detach() != 0 for n, p in prunable_weights(model).items()}
                seen[-1].append((moved(engine.masks, 'cpu'), moved(zeros, 'cpu')))
        ok = all(same(a[0], b[0]) and same(a[1], b[1]) for a, b in zip(*seen, strict=True))
        check(f'recover={recover}, {scope}, {granularity}', verdict(ok))


def repeated(run, check):
    "Updates after the first one, where kernels may be replayed, see new weights and new sparsities"
    gen = torch.Generator().manual_seed(0)
    for scope in ('local', 'global'):
        w = scores('random', torch.float32, run.small)
        there, wrong = moved({n: t.clone() for n, t in w.items()}, run.device), []
        for i, sparsity in enumerate((0.2, 0.5, 0.9, 0.9, 0.1)):
            for n in w:
                w[n].copy_(torch.randn(w[n].shape, generator=gen))
                there[n].copy_(w[n])
            a, b = (compute_masks(x, sparsity, scope, absolute=True) for x in (w, there))
            if not same(dict(a), moved(b, 'cpu')):
                wrong.append(i)
        check(f'repeated updates of the same tensors, {scope}', verdict(not wrong), f'wrong: {wrong}')


def in_channels_last(run, check):
    "Weights of convolutions may be stored as [out, height, width, in]"
    for scope, dtype in product(('local', 'global'), (torch.float32, torch.bfloat16)):
        w = scores('random', dtype, run.small)
        there = moved(w, run.device)
        for n in 'ce':
            there[n] = there[n].to(memory_format=torch.channels_last)
        a, b = (compute_masks(x, 0.7, scope, absolute=True) for x in (w, there))
        a.apply_(w)
        b.apply_(there)
        ok = same(dict(a), moved(b, 'cpu')) and same(w, {n: t.cpu().contiguous() for n, t in there.items()})
        check(f'channels_last, {scope}, {str(dtype)[6:]}', verdict(ok))


def large(run, check):
    "Tensors of many programs, with many ties"
    n = 10**4 if run.small else 8 * 10**6
    for dtype, scope in product((torch.float32, torch.bfloat16), ('local', 'global')):
        gen = torch.Generator().manual_seed(0)
        x = {'a': torch.randn(n, generator=gen).to(dtype), 'b': torch.randn(n // 10, generator=gen).to(dtype)}
        ok, note = Cases(check, run.device).compare(x, 0.9, scope=scope, absolute=True)
        check(f'{n:,} numbers, {scope}, {str(dtype)[6:]}', verdict(ok), note)


def backend(run, check):
    "Do Triton's kernels run? Where they fail, PyTorch's sort takes their place with no more than a warning"
    from fastprune.core.backends import selection_for

    gpu = run.device != 'cpu'
    x = {n: t.to(run.device) for n, t in scores('random', torch.float32, run.small).items()}
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('always')
        compute_masks(x, 0.5, absolute=True).apply_(x)
    used = selection_for(torch.device(run.device))
    ok = getattr(used, 'works', not gpu)
    check('backend', verdict(ok), f'{type(used).__name__} {[str(n.message)[:600] for n in notes]}')
    if gpu and not ok:
        used.triton.lowest(list(x.values()), [1] * len(x), True)  # for its traceback


def exact(run):
    check = run.checks('exact')
    for part in (backend, repeated, in_channels_last, large, projected, not_a_number, training, masks):
        try:
            part(run, check)
        except Exception as e:
            traceback.print_exc()
            check(part.__name__, 'FAILED', f'{type(e).__name__}: {e}'[:500])
