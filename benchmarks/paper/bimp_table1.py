"""Budgeted IMP, table 1: six retraining schedules after one-shot pruning, for three sparsities and three budgets; a
ResNet-56 on CIFAR-10 instead of a ResNet-50 on ImageNet"""

from functools import partial

import airbench
from fastai.callback.schedule import ParamScheduler
from harness import METHODS, Cell, keep_baseline, method, result
from tell import Claim, line, markdown, ours, rows_of, run_at, values

from fastprune.all import RETRAINING, lr_warmup

sparsities, budgets = (0.7, 0.8, 0.9), (1 / 45, 1 / 18, 1 / 9)  # 2, 5 and 10 of 90 epochs
at_trained = (0.9,)  # at the scale *trained*
start = dict(bs=128, wd=5e-4)
original = lr_warmup(0.1, warmup=1 / 45, drops=(1 / 3, 2 / 3, 8 / 9))


def dense_epochs(scale):
    return scale.epochs_of(180, 18)


def epochs(scale, budget):
    return max(1, round(dense_epochs(scale) * budget))


@method('dense, stepped')
def stepped(run):
    learn = run.learner(**start, validate=run.epochs)
    learn.fit(run.epochs, cbs=ParamScheduler({'lr': original}))
    return [*keep_baseline(run, learn), *result(learn)]


def retraining(name, run):
    T = dense_epochs(run.scale)
    learn = run.learner(**start, trained=T, validate=run.epochs)
    learn.prune(run.sparsity, scope='global')
    learn.retrain(run.epochs, name, history=[original(t / (45 * T)) for t in range(45 * T)], original_epochs=T)
    return result(learn)


for name in RETRAINING:
    METHODS[f'retrain {name.upper()}'] = partial(retraining, name)
methods = [f'retrain {n.upper()}' for n in RETRAINING]


def needs(scale):
    return [Cell(scale.model('resnet56'), 'dense, stepped', 0.0, dense_epochs(scale), 0)]


def cells(scale, df):
    model = scale.model('resnet56')
    return [
        *(
            Cell(model, m, s, e, seed)
            for seed in range(scale.seeds)
            for s in reversed(at_trained if scale.network else sparsities)
            for e in dict.fromkeys(epochs(scale, b) for b in budgets)
            for m in methods
        ),
        *(Cell(model, 'dense, stepped', 0.0, dense_epochs(scale), seed) for seed in range(1, scale.seeds)),
    ]


# ---- what came out

title = 'Budgeted IMP, table 1: retraining schedules'
source = (
    "Zimmer et al. 2023, table 1, which has a ResNet-50 on ImageNet: its figures stand here for "
    "the order of schedules, not for the values; all start from the same trained network. "
    "Retraining for 2.22, 5.55 and 11.11% of the original epochs, at least one; those are 180 "
    "times the scale's `times`, 18 at least. The rate has its last drop at 8/9 of them, so in these budgets LRW is FT. "
    "SGD with momentum 0.9, weight decay 5e-4 and a largest rate of 0.1; all layers are pruned together"
)
paper = {
    'FT': ('73.51', '73.98', '74.44', '70.45', '71.81', '72.68', '56.75', '61.60', '64.61'),
    'LRW': ('73.50', '73.99', '74.45', '70.45', '71.82', '72.67', '56.75', '61.61', '64.60'),
    'SLR': ('70.93', '72.58', '73.69', '70.48', '72.37', '73.44', '67.19', '69.45', '70.80'),
    'CLR': ('72.22', '73.58', '74.49', '71.96', '73.30', '74.24', '68.72', '70.60', '71.51'),
    'LLR': ('72.39', '73.65', '74.34', '72.07', '73.41', '74.23', '68.90', '70.48', '71.53'),
    'ALLR': ('73.69', '74.37', '74.89', '72.96', '74.02', '74.71', '69.56', '71.19', '71.99'),
}


def grid(df, among=sparsities):
    "(sparsity, epochs) of each column; budgets that come to the same epochs at a small scale share a column"
    es = sorted({int(e) for e in df[df.method.isin(methods)].epochs})
    return [(s, e) for s in among for e in es]


def at(df, name, s, e):
    return values(df, f'retrain {name}', s, epochs=e)


def mine(df):
    return rows_of(df, 'resnet56', ('dense, stepped', *methods), also=(airbench.NAME,))


def show(df):
    shown = run_at(df, sparsities)
    cols = grid(df, shown)
    head = lambda s, e: f'{100 * s:g}%, {e} epoch{"s" * (e > 1)}'
    thirds = lambda vs, i: ' / '.join(vs[3 * i : 3 * i + 3])
    return [
        f"Dense: ours {ours(values(df, 'dense, stepped'))}. The paper's: ImageNet, after 2, 5 and 10 of 90 epochs.",
        markdown(
            ['schedule', *(f'{100 * s:g}%: paper' for s in shown), *(f'ours, {head(*c)}' for c in cols)],
            [
                [n, *(thirds(vs, sparsities.index(s)) for s in shown), *(ours(at(df, n, *c)) for c in cols)]
                for n, vs in paper.items()
            ],
        ),
    ]


def claims(df):
    best = lambda others, among: [
        (f'{n}, {100 * s:g}%, {e}', at(df, 'ALLR', s, e), at(df, n, s, e)) for n in others for s, e in grid(df, among)
    ]
    return [
        Claim(f'ALLR is better than {words} {where}', best(others, among))
        for words, others in (('FT', ['FT']), ('SLR, CLR and LLR', ['SLR', 'CLR', 'LLR']))
        for where, among in (('at 70 and 80%', (0.7, 0.8)), ('at 90%', (0.9,)))
    ]


def figure(df, ax):
    cols = grid(df, (0.9,))
    for n in paper:
        line(ax, [str(e) for _, e in cols], [at(df, n, *c) for c in cols], n)
    ax.set(xlabel='epochs of retraining, at 90%', ylabel='test accuracy (%)')
