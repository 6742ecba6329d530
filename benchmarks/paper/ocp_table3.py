"One-Cycle Pruning, table 3: epochs that each schedule needs at 95% to be as accurate as OCP, relative to OCP's"

from functools import partial

import airbench
from harness import METHODS, Cell, Scale
from ocp_table2 import STARTS, fused, is_search, lacks_steps, named, others, search_of, start_of, told_searches, train
from tell import FLOOR, Claim, compare, each, line, markdown, mean, ours, rows_of, side_by_side, values

from fastprune.all import SparsifyCallback, window

LADDER = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5)
methods = [f'budget {n}' for n in STARTS]
at_trained = (0.95,)  # at the scale *trained*, as at all


def base(scale):
    return scale.epochs_of(20, 2)


def rungs(scale):
    return list(dict.fromkeys(max(1, round(base(scale) * r)) for r in LADDER))


def within(schedule, start, run, number=None):
    "The epochs before pruning stay those of the base budget: what is after them grows or shrinks"
    when = min(0.9, (start if number is None else number) * base(run.scale) / run.epochs)
    return train(run, SparsifyCallback(run.sparsity, schedule=window(schedule, when)), fused)


for name, how in STARTS.items():
    METHODS[f'budget {name}'] = partial(within, *how)


def names(df, scale):
    return named(df, 'budget', STARTS, base(scale), others)


def accuracy_of(df, name, epochs, seeds):
    "Mean over seeds, if all of them are there"
    got = values(df, name, 0.95, epochs=epochs)
    return mean(got) if len(got) >= seeds else None


def target(df, scale):
    "90%, as in the paper, or what OCP reaches with the base budget if that is less"
    reached = accuracy_of(df, 'budget OCP', base(scale), scale.seeds)
    return None if reached is None else min(90.0, reached)


def needed(df, scale, name):
    "The fewest epochs that reach the target, and the next rung to try: one of them is None"
    for e in rungs(scale):
        got = accuracy_of(df, name, e, scale.seeds)
        if got is None:
            return None, e
        if got >= target(df, scale):
            return e, None
    return None, None


def needs(scale):
    return []


def cells(scale, df):
    model = scale.model('resnet18')
    todo = lambda name, e: [Cell(model, name, 0.95, e, seed) for seed in range(scale.seeds)]
    found, is_searched = names(df, scale)
    if not is_searched:
        return [c for n in others for c in search_of(n, 0.95, base(scale), model, scale.search_seeds)]
    if any(accuracy_of(df, name, base(scale), scale.seeds) is None for name in found.values()):
        return [c for name in found.values() for c in todo(name, base(scale))]
    return [c for name in found.values() for e in [needed(df, scale, name)[1]] if e for c in todo(name, e)]


# ---- what came out

title = 'One-Cycle Pruning, table 3: the budget that a schedule needs at 95%'
source = (
    (
        'Hubens et al. 2021, table 3: epochs to reach 90% on CIFAR-10, relative to OCP. The epochs '
        'before pruning stay those of the base budget, here for AGP too; the steps of iterative '
        'pruning take all that comes after them, and the cycle of the learning rate takes the whole '
        'budget. The optimizer is PyTorch\'s fused AdamW, with which a training takes two thirds of the time '
        'on a CPU, and which also decays norms and biases. Starts are those of table 2 at the base budget, '
        'once they are searched at this scale; that search trained with fastai\'s Adam. The target is 90%, or what OCP '
        'reaches with the base budget if that is less. Budgets are tried until one is enough, of '
    )
    + ', '.join(f'{r:g}' for r in LADDER)
    + ' times the base'
)
paper = {'one-shot': '2.5×', 'iterative': '4×', 'AGP': '1×', 'OCP': '1×'}


def outcome(df, scale, name):
    "What is known of the epochs that it needs, and relative to OCP's"
    if (goal := target(df, scale)) is None or goal <= FLOOR:
        return None, '–'
    method = names(df, scale)[0][name]
    got, ocp_needs = (needed(df, scale, n)[0] for n in (method, 'budget OCP'))
    if got is None:
        most = max((e for e in rungs(scale) if accuracy_of(df, method, e, scale.seeds) is not None), default=None)
        if not (most and ocp_needs):
            return None, '–'
        at_most, ocp = values(df, method, 0.95, epochs=most), values(df, 'budget OCP', 0.95, epochs=base(scale))
        behind = compare('', ocp if goal < 90 else each(lambda _: goal, at_most), at_most)
        return None, f'more than {most / ocp_needs:.3g}×' if behind.verdict == 'holds' else "can't tell"
    return got, f'{got / ocp_needs:.3g}×' if ocp_needs else '–'


def mine(df):
    budgets = rows_of(df, 'resnet18', methods, also=(airbench.NAME,))
    at_its_scales = df.scale.isin(budgets.scale.unique())
    return df[df.index.isin(budgets.index) | is_search(df, others, 20, 2) & at_its_scales]


def show(df):
    scale = Scale.of(df)
    out = {n: outcome(df, scale, n) for n in STARTS}
    goal = target(df, scale)
    found, is_searched = names(df, scale)

    def tried(n, e):
        got = out[n][0]
        return ours(values(df, found[n], 0.95, epochs=e)).replace(
            '–', 'not needed' if isinstance(got, int) else 'not run'
        )

    low = ', which is too near to chance to tell anything' if goal is not None and goal <= FLOOR else ''
    return [
        f'Target: {"–" if goal is None else f"{goal:.2f}"}{low}. Base budget: {base(scale)} epochs. '
        + (
            'Starts were searched.' + told_searches(df, (0.95,), base(scale))
            if is_searched
            else "Starts are the paper's, and were not searched."
        ),
        side_by_side('', list(STARTS), [('budget', [(paper[n], out[n][1]) for n in STARTS])]),
        'Accuracy by epochs tried:',
        markdown(['schedule', *map(str, rungs(scale))], [[n, *(tried(n, e) for e in rungs(scale))] for n in STARTS]),
    ]


def claims(df):
    if df.empty:
        found, is_searched, at = dict.fromkeys(STARTS, ''), False, None
    else:
        (found, is_searched), at = names(df, Scale.of(df)), base(Scale.of(df))
    vals = {n: values(df, m, 0.95, epochs=at) for n, m in found.items()}
    unsearched = '' if is_searched else 'starts not searched'
    short = unsearched or lacks_steps(start_of(df, 'iterative', 0.95, at), at, 20)
    why = {'one-shot': unsearched, 'iterative': short}
    return [
        *(
            Claim(
                f'{n} needs more than OCP: it is less accurate with the base budget',
                [('base', vals['OCP'], vals[n])],
                lacks=why[n],
            )
            for n in why
        ),
        Claim(
            'AGP needs no more than OCP: it is no worse with the base budget',
            [('base', vals['AGP'], vals['OCP'])],
            no_worse=True,
            lacks=unsearched,
        ),
    ]


def figure(df, ax):
    scale = Scale.of(df)
    for n, m in names(df, scale)[0].items():
        line(ax, rungs(scale), [values(df, m, 0.95, epochs=e) for e in rungs(scale)], n)
    if target(df, scale) is not None:
        ax.axhline(target(df, scale), color='grey', lw=1, ls=':', label='target')
    ax.set(xlabel='epochs', ylabel='test accuracy (%)', xticks=sorted({int(e) for e in mine(df).epochs}))
