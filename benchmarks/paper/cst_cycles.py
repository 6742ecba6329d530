"""Cyclic Sparse Training: masks from before training, trained in cycles or in one; SCULPT; learning-rate rewinding.
All of them for the same epochs, from scratch, ResNet-20"""

from functools import partial

from harness import METHODS, Cell, method, result
from tell import Claim, Control, line_over, markdown, ours, rows_of, values

from fastprune.all import lr_warmup, random_score, snip, synflow

shape, cycles = partial(lr_warmup, warmup=0.1, drops=(0.5, 0.75)), 5
start = dict(bs=128, wd=5e-4)


def at_start(criterion, scope, n, run):
    "A mask from before training, then `n` cycles"
    learn = run.learner(**start, validate=run.epochs)
    if run.sparsity:
        learn.prune(run.sparsity, criterion=criterion(run.seed), scope=scope)
    learn.fit_cycles(n, run.epochs // n, lr=0.1, shape=shape)
    return result(learn)


MASKS = {
    'random': (lambda seed: partial(random_score, seed=seed), 'erk'),
    'SNIP': (lambda seed: snip, 'global'),
    'SynFlow': (lambda seed: synflow, 'global'),
}
for name, how in MASKS.items():
    METHODS[f'{name}, one cycle'], METHODS[f'{name}, cyclic'] = (
        partial(at_start, *how, 1),
        partial(at_start, *how, cycles),
    )
METHODS['nothing pruned, one cycle'], METHODS['nothing pruned, cyclic'] = (
    partial(at_start, None, None, 1),
    partial(at_start, None, None, cycles),
)


@method('SCULPT')
def sculpt(run):
    learn = run.learner(**start, validate=run.epochs)
    learn.fit_sculpt(
        run.sparsity,
        max(0.0, 1 - 2 * (1 - run.sparsity)),
        cycles - 1,
        run.epochs // cycles,
        lr=0.1,
        shape=shape,
        criterion=partial(random_score, seed=run.seed),
    )
    return result(learn)


@method('LRR')
def lrr(run):
    learn = run.learner(**start, validate=run.epochs)
    learn.iterative_prune(
        cycles - 1,
        run.epochs // cycles,
        1 - (1 - run.sparsity) ** (1 / (cycles - 1)),
        lr=0.1,
        shape=shape,
        seed=1000 * run.seed,
    )
    return result(learn)


sparsities = (0.67, 0.9, 0.95, 0.98)
CYCLES_HURT = 'cycling hurts the dense network'
methods = [*(f'{n}, {how}' for n in MASKS for how in ('one cycle', 'cyclic')), 'SCULPT', 'LRR']


def needs(scale):
    return []


def cells(scale, df):
    e = cycles * scale.epochs_of(40)
    return [
        c
        for seed in range(scale.seeds)
        for c in (
            *(Cell('resnet20', m, s, e, seed) for s in reversed(sparsities) for m in methods),
            *(Cell('resnet20', m, 0.0, e, seed) for m in ('nothing pruned, one cycle', 'nothing pruned, cyclic')),
        )
    ]


# ---- what came out

title = 'Cyclic Sparse Training: cycles from scratch'
source = (
    'Gadhikar et al. 2024. Our copy of the paper has its claims and no tables, so there are no '
    'figures to put beside ours. Everything has the same epochs: one cycle, five cycles, SCULPT '
    '4 + 1 from a random mask of twice the density, LRR 5 trainings. Short cycles can cost '
    'accuracy by themselves, so all that is trained in cycles has a control: the dense network must be no worse in '
    'five cycles than in one. SGD with momentum 0.9 and weight decay 5e-4; random masks have ERK densities; '
    'SNIP, SynFlow and LRR rank all layers together'
)


def mine(df):
    return rows_of(df, 'resnet20', ('nothing pruned, one cycle', 'nothing pruned, cyclic', *methods))


def show(df):
    compared = control(df).claim
    dense = [
        (
            f"The control, nothing pruned: one cycle {ours(values(df, 'nothing pruned, one cycle'))}, five cycles "
            f"{ours(values(df, 'nothing pruned, cyclic'))}; {compared.evidence}, {compared.verdict()}."
        )
    ]
    return [
        *dense,
        markdown(
            ['method', *(f'{100 * s:g}%' for s in sparsities)],
            [[m, *(ours(values(df, m, s)) for s in sparsities)] for m in methods],
        ),
    ]


def control(df):
    "Cycles must not hurt the dense network; where they do, how a mask fares in cycles says nothing of masks"
    dense = [('dense', values(df, 'nothing pruned, cyclic'), values(df, 'nothing pruned, one cycle'))]
    return Control(Claim('The dense network is no worse in cycles', dense, no_worse=True), CYCLES_HURT)


def claims(df):
    at = lambda a, b, levels: [(f'{100 * s:g}%', values(df, a, s), values(df, b, s)) for s in levels]
    claim = partial(Claim, control=control(df))
    return [
        *(
            claim(f'Cycles are better than one cycle for {n} masks', at(f'{n}, cyclic', f'{n}, one cycle', sparsities))
            for n in MASKS
        ),
        claim('A random mask in cycles is better than LRR at 67%', at('random, cyclic', 'LRR', (0.67,))),
        claim('A random mask in cycles is worse than LRR at 98%', at('LRR', 'random, cyclic', (0.98,))),
        claim(
            'SCULPT is better than a random mask in cycles at 95 and 98%', at('SCULPT', 'random, cyclic', (0.95, 0.98))
        ),
        claim('SCULPT is no worse than LRR at 95 and 98%', at('SCULPT', 'LRR', (0.95, 0.98)), no_worse=True),
    ]


def figure(df, ax):
    for i, n in enumerate(MASKS):
        for how, ls in (('one cycle', ':'), ('cyclic', '-')):
            line_over(ax, df, sparsities, f'{n}, {how}', f'{n}, {how}', color=f'C{i}', ls=ls)
    for n, c in (('SCULPT', 'C3'), ('LRR', 'k')):
        line_over(ax, df, sparsities, n, n, color=c)
    ax.set(xlabel='sparsity (%)', ylabel='test accuracy (%)')
