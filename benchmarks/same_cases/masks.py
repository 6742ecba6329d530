"Cases of one-shot pruning, masks and schedules"

import itertools
import pickle
from functools import partial

import numpy as np
import torch
from fastai.basics import set_seed
from torch import nn

from .common import (
    RETRAINING,
    SCOPES,
    UNITS,
    OddNet,
    case,
    copies,
    each,
    fp,
    learner,
    or_error,
    trained,
    weights_and_masks,
)


@each(fp.CRITERIA)
def prune(criterion, folder):
    "All scopes and granularities"
    learn = learner(folder)
    first = copies(learn)
    learn.fit(1, 0.02)
    last, res = copies(learn), {}
    steps = 3 if criterion is fp.synflow else None

    def masks(scope, units, **kwargs):
        learn.remove_masks()
        learn.model.load_state_dict(last)
        set_seed(0)
        learn.prune(0.5, criterion, scope, units, iterations=steps, initial=first, **kwargs)
        return [learn.masks, learn.model.state_dict()]

    for scope in SCOPES:
        res[scope] = {u: or_error(masks, scope, u) for u in UNITS}
    res['n_batches'] = or_error(masks, 'global', 'weight', n_batches=2)
    res['min_density'] = or_error(masks, 'global', 'weight', min_density=0.4)
    return res


@case
def prune_in_steps(folder):
    learn, res = trained(folder), {}
    for name, s in {'0.3': 0.3, 'by name': {'*': 0.5, nn.Linear: 0.2}, '0.8': 0.8, 'recovered': 0.6}.items():
        learn.prune(s, fp.taylor, n_batches=3, recover=name != '0.8')
        res[name] = [copies(learn), learn.masks, learn.sparsity_report()]
    learn.prune(0.9, fp.synflow, scope='global')
    return {**res, **weights_and_masks(learn), 'report': learn.sparsity_report()}


@case
def prune_odd_layers(folder):
    learn, res = learner(folder, OddNet()), {}
    for scope in SCOPES:
        for units in UNITS:
            learn.remove_masks()
            res[f'{scope} {units}'] = [or_error(learn.prune, 0.5, scope=scope, granularity=units), learn.masks]
    return {**res, 'report': learn.sparsity_report(), 'weights': learn.model.state_dict()}


SCORES = {
    'conv': (16, 8, 3, 3),
    'linear': (40, 64),
    'first': (8, 1, 3, 3),
    'one dimension': (8, 12, 5),
    'large': (300, 256),
    'turned': (8, 4, 2, 2),
}
KINDS = {
    'normal': lambda x: x,
    'ties': lambda x: (x * 2).round(),
    'infinite': lambda x: torch.where(x > 2, torch.inf, x),
    'zeros': lambda x: x * (x > 0.5),
}
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


@each({f'{k}, {str(d)[6:]}': (f, d) for k, f in KINDS.items() for d in DTYPES})
def compute_masks(how, folder):
    kind, dtype = how
    gen = torch.Generator().manual_seed(0)
    scores = {n: kind(torch.randn(shape, generator=gen)).to(dtype) for n, shape in SCORES.items()}
    keep = {n: torch.rand(s.shape, generator=gen) < 0.7 for n, s in scores.items()}
    res = {scope: {} for scope in SCOPES}
    for scope, units in itertools.product(SCOPES, UNITS):
        least = 1 if units == 'weight' else 2 if ':' in units else 3
        some = {
            n: s for n, s in scores.items() if s.ndim >= least and (least == 1 or n not in ('first', 'one dimension'))
        }
        for s, absolute, inside in itertools.product((0.0, 0.3, 0.5, 0.9), (False, True), (None, keep)):
            args = some, s, scope, units, inside, absolute, {'turned': 2}
            res[scope][f'{units} {s} {absolute} {inside is not None}'] = or_error(fp.compute_masks, *args)
    return {**res, 'by name': fp.compute_masks(scores, {'*': 0.9, 'conv': 0.1})}


@case
def masks(folder):
    gen = torch.Generator().manual_seed(1)
    scores = {n: torch.randn(shape, generator=gen) for n, shape in SCORES.items()}
    a, b = fp.compute_masks(scores, 0.5), fp.compute_masks(scores, 0.8, 'global', absolute=True)
    a.save(folder / 'masks')
    res = dict(file_size=(folder / 'masks').stat().st_size, loaded=fp.Masks.load(folder / 'masks'))
    res['numbers'] = [a.sparsity, b.density, a.n_kept, a.jaccard(b), a == b]
    res['applied'] = fp.Masks.from_zeros(a.apply_(scores))
    return res | dict(pickled=pickle.loads(pickle.dumps(b)))


@case
def counts(folder):
    "The number of weights that each scope keeps in a tensor"
    sparsities = (0.1, 0.5, 0.9, 0.99)
    return {k: {s: fp.layer_counts(SCORES, s, k) for s in sparsities} for k in ('erk', 'balanced')}


SHAPES = dict(
    fp.SCHEDULES,
    window=fp.window(fp.cosine, 0.2, 0.7),
    cyclical=fp.cyclical(fp.cubic, 4, 0.3),
    steps=partial(fp.iterative, n_steps=7),
    late=partial(fp.ocp, α=10, β=3),
)


@each(SHAPES)
def schedule(shape, folder):
    return dict(values=[shape(i / 200) for i in range(201)])


@each(SHAPES)
def schedule_updates(shape, folder):
    progress = [shape(i / 200) for i in range(1, 201)]
    return dict(steps={i: fp.update_steps(progress, i) for i in (None, 1, 7, 50)})


@case
def rates(folder):
    history = [0.01 * (i + 1) if i < 5 else 0.05 / (i - 3) for i in range(20)]
    made = dict(
        constant=fp.lr_constant(0.1),
        decay=fp.lr_decay(0.1, end=0.8),
        cyclical=fp.lr_cyclical(np.array([0.1, 0.2]), low=0.01, half=20, iters=100),
        warmup=fp.lr_warmup(0.1, 0.1, (0.5, 0.75)),
        **{k: fp.lr_retrain(k, history, 0.5, 0.7) for k in RETRAINING},
    )
    values = {k: [f(i / 100) for i in range(100)] for k, f in made.items()}
    largest = [fp.s_cyc_max_lr(m, 0.03, 0.04, 5.0, 1.0, p) for m in range(20) for p in (0.1, 0.2, 0.5)]
    a = {'w': torch.arange(12.0)}
    discounts = [fp.allr_discount(a, {'w': a['w'] * (a['w'] > k)}, k / 12, 0.1) for k in range(1, 12)]
    rounds = fp.lr_rounds(partial(fp.lr_warmup, drops=(0.5,)), partial(fp.s_cyc_max_lr, eps=0.03, delta=0.04), 5)
    return dict(values=values, largest=largest, discounts=discounts, rounds=[f(0.3) for f in rounds])
