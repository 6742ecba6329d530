"SynFlow, linear paths and tickets"

import copy

import torch
from common import Rows, interleaved, quiet, spread
from connectivity import bare, restorer
from fastai.basics import Learner, OptimWrapper, accuracy, partial, set_seed
from overhead import make, same_batches
from torch import nn

from fastprune.all import CRITERIA, synflow
from fastprune.learner.states import seed_round

NETWORK = 'torchvision resnet18'


def learner(run, batches):
    set_seed(0)
    dls = same_batches(batches, 4 if run.small else 64, 32, run.device)
    dls.loaders[1] = dls.loaders[0]  # as many batches to validate on
    return Learner(
        dls,
        make(NETWORK).to(run.device),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        metrics=accuracy,
    )


def compare(run, what, sides, rounds):
    "Rows of all sides; ratios are paired with the last one"
    rows, times = Rows('connectivity', run.device, run.out), interleaved(sides, rounds)
    last = list(times.values())[-1]
    for side, ts in times.items():
        med, lo, hi = (round(t, 4) for t in spread(ts))
        ratio = round(spread([a / b for a, b in zip(ts, last, strict=True)])[0], 3)
        rows.add(what=what, side=side, seconds=med, min=lo, max=hi, ratio=ratio, runs=len(ts))


def flows(run):
    "100 steps of SynFlow, and the passes that they cannot do without"
    learn, steps = learner(run, 2), 3 if run.small else 100
    again, x = restorer(learn), torch.ones(1, 3, 32, 32, device=run.device)

    def ours():
        again()
        with quiet():
            learn.prune(0.95, criterion=synflow, scope='global', iterations=steps)

    def passes():
        again()
        learn.model.eval()
        for _ in range(steps):
            learn.model.zero_grad()
            learn.model(x).sum().backward()

    compare(run, f'SynFlow, {steps} steps', {'learn.prune': ours, 'forward and backward passes': passes}, 3)
    others = {}
    for name in ('snip', 'grasp', 'wanda'):

        def once(name=name):
            again()
            with quiet():
                learn.prune(0.9, criterion=CRITERIA[name], scope='global', n_batches=2)

        others[name] = once
    compare(run, 'learn.prune, 2 batches', others, 3)


def paths(run):
    points = 3 if run.small else 11
    learn = learner(run, 2 if run.small else 20)
    other = copy.deepcopy(learn.model.state_dict())
    for t in other.values():
        if t.is_floating_point():
            t.add_(0.01 * torch.randn_like(t))

    def path():
        with quiet(), learn.no_bar():
            learn.linear_path(learn, other, n=points)

    compare(run, f'{points} points', {'linear_path': path, 'forward passes': bare(learn, points)}, 3)


def tickets(run):
    rounds, batches = (1, 2) if run.small else (3, 40)
    learn = learner(run, batches)
    again = restorer(learn)

    def fit(learn, cbs):
        with quiet(), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3, cbs=cbs)

    def ours():
        again()
        with quiet():
            learn.find_tickets(rounds, fit, measure='none')

    def plain():
        again()
        for m in range(rounds):
            learn.opt = None
            seed_round(learn, m)
            fit(learn, [])

    compare(run, f'{rounds} rounds of {batches} batches', {'find_tickets': ours, 'plain fits': plain}, 3)


def recipes(run):
    check = run.checks('recipes')
    for part in (flows, paths, tickets):
        try:
            part(run)
            check(part.__name__, 'measured')
        except Exception as e:
            check(part.__name__, 'FAILED', f'{type(e).__name__}: {e}'[:500])
