"No event of fastprune waits for the GPU in a step"

import contextlib
from collections import Counter
from functools import partial

import torch
from fastai.basics import Learner, OptimWrapper
from overhead import make, same_batches
from torch import nn

from fastprune.all import BASELINES, SparsifyCallback, compute_masks, prunable_weights, taylor
from fastprune.learner.keep import KeepMasks
from fastprune.methods import always_sparse, thresholds
from fastprune.methods.dense_until_end import HardEnd

from .run import verdict
from .watch import excepted, forbidden, watched

STEP = {
    *('before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step'),
    *('after_cancel_step', 'after_cancel_backward', 'after_batch'),
}
SIDES = {
    **{
        f'{scope}, interval {i}': partial(SparsifyCallback, 0.9, scope=scope, interval=i, initial=0.0)
        for scope in ('local', 'global')
        for i in (1, 5)
    },
    'track': partial(SparsifyCallback, 0.9, interval=1, track=True),
    'taylor': partial(SparsifyCallback, 0.9, interval=1, criterion=taylor),
    'recover=False': partial(SparsifyCallback, 0.9, interval=1, recover=False),
    "recover='alive'": partial(SparsifyCallback, 0.9, interval=1, recover='alive'),
    'filters': partial(SparsifyCallback, 0.5, interval=1, granularity='filter'),
    '2:4': partial(SparsifyCallback, 0.5, interval=1, granularity='2:4'),
    'refresh': partial(SparsifyCallback, 0.9, interval=1, refresh=True),
    **{name: partial(method, 0.8) for name, method in BASELINES.items()},
    'masks alone': lambda: None,
}
# the last step of some methods asks whether thresholds have pruned enough, and measures the model on the validation
# set; SNFS distributes growth over tensors by their mean momentum
READING = ((thresholds, 'falls_short'), (HardEnd, 'hard_step'), (always_sparse, 'mean_momentum'))


@contextlib.contextmanager
def but_for_exceptions(device, calls):
    "Let the functions that have to read do so, and count their calls"
    old = [getattr(owner, name) for owner, name in READING]

    def allowed(f, name):
        def call(*args, **kwargs):
            calls[name] += 1
            with excepted(device):
                return f(*args, **kwargs)

        return call

    try:
        for (owner, name), f in zip(READING, old, strict=True):
            setattr(owner, name, allowed(f, name))
        yield
    finally:
        for (owner, name), f in zip(READING, old, strict=True):
            setattr(owner, name, f)


@contextlib.contextmanager
def events_in(context):
    "Enter `context(event)` around each event of fastprune's callbacks"
    classes = [KeepMasks, SparsifyCallback]
    old = {c: c.__call__ for c in classes}

    def wrapped(f):
        def call(self, event):
            with context(event):
                return f(self, event)

        return call

    own = {c: '__call__' in vars(c) for c in classes}
    for c in classes:
        c.__call__ = wrapped(old[c])
    try:
        yield
    finally:
        for c in classes:
            if own[c]:
                c.__call__ = old[c]
            else:
                del c.__call__


def learner(device, steps):
    torch.manual_seed(0)
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2), nn.BatchNorm2d(b), nn.ReLU())
    model = nn.Sequential(conv(3, 32), conv(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12))
    return Learner(
        same_batches(steps, 16, 32, device),
        model.to(device),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
    )


def fit(run, callback, context):
    "Train one epoch, with `context(event)` around fastprune's events; `callback` makes its callback, or None"
    learn, cb = learner(run.device, 6 if run.small else 12), callback()
    if cb is None:
        learn.prune(0.9)
    with events_in(context), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3, cbs=cb)


def side(run, check, name, callback):
    "Two fits: one lists synchronisations, and one forbids them"
    found, calls = Counter(), Counter()

    @contextlib.contextmanager
    def listing(event):
        lines = []
        try:
            with watched(run.device, lines):
                yield
        finally:  # a method that replaces the optimizer's step cancels it
            found.update((event if event in STEP else 'outside of steps', line) for line in lines)

    @contextlib.contextmanager
    def forbidding(event):
        with forbidden(run.device) if event in STEP else contextlib.nullcontext():
            yield

    with but_for_exceptions(run.device, calls):
        fit(run, callback, listing)
    inside = {k: n for k, n in found.items() if k[0] in STEP}
    outside = sum(n for k, n in found.items() if k[0] not in STEP)
    worst = '; '.join(f'{n}x {event} {line}' for (event, line), n in Counter(inside).most_common(6))
    passed = 'excepted' if calls else 'passed'
    result = 'counted' if run.device == 'cpu' else 'FAILED' if inside else passed  # a CPU has nothing to wait for
    exceptions = ''.join(f', {n} calls of {f} left out' for f, n in calls.items())
    check(name, result, f'{sum(inside.values())} in steps{exceptions}, {outside} outside of them. {worst}')
    try:
        with but_for_exceptions(run.device, calls):
            fit(run, callback, forbidding)
        check(f'{name}, forbidden', passed)
    except Exception as e:
        result = 'counted' if run.device == 'cpu' else 'FAILED'
        check(f'{name}, forbidden', result, f'{type(e).__name__}: {e}'[:300])


def one_update(run, check):
    "Synchronisations of `compute_masks` alone, which has to raise an error for NaN at once"
    name = 'torchvision resnet18' if run.small else 'torchvision resnet50'
    weights = {n: p.detach() for n, p in prunable_weights(make(name).to(run.device)).items()}
    for scope in ('local', 'global'):
        for what in ('first', 'next'):
            lines = []
            with watched(run.device, lines):
                masks = compute_masks(weights, 0.9, scope, absolute=True)
            check(
                f'{what} compute_masks of {name}, {scope}', 'counted', f'{len(lines)} {Counter(lines).most_common(3)}'
            )
        lines = []
        with watched(run.device, lines):
            masks.apply_(weights)
        check(f'apply_ of {name}, {scope}', verdict(not lines), f'{len(lines)} {Counter(lines).most_common(3)}')


def syncs(run):
    check = run.checks('syncs')
    try:
        one_update(run, check)
    except Exception as e:
        check('one update', 'FAILED', f'{type(e).__name__}: {e}'[:300])
    for name, callback in SIDES.items():
        try:
            side(run, check, name, callback)
        except Exception as e:
            check(name, 'FAILED', f'{type(e).__name__}: {e}'[:300])
