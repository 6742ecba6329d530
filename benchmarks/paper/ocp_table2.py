"""One-Cycle Pruning, table 2: four schedules while a ResNet-18 is trained from scratch, each layer to the same
sparsity, from the paper's starts and from starts that are searched; and fasterai's OCP beside ours"""

from functools import partial

import airbench
import torch
from fastai.basics import Adam, OptimWrapper
from harness import (
    METHODS,
    SEARCH_SEEDS,
    SEARCHES,
    Cell,
    Scale,
    at_number,
    epochs_at,
    method,
    result,
    search_cells,
    search_seeds,
    searched,
)
from tell import Claim, line, line_over, markdown, mean, ours, rows_of, run_at, values

from fastprune.all import SparsifyCallback, agp, iterative, ocp, one_shot, window

STARTS = {
    'one-shot': (one_shot, 0.4),
    'iterative': (iterative, 0.2),
    'AGP': (agp, 0.2),
    'OCP': (ocp, 0.0),
}  # schedule, and when it starts in the paper
SCHEDULES = {n: window(*how) for n, how in STARTS.items()}
CHOICES = (0.0, 0.1, 0.2, 0.4)  # Starts to choose from, for all but OCP, which has none by its definition
others = list(STARTS)[:3]
PAPERS_START = ", the paper's start"
STEPS = 5  # Of iterative pruning


fused = partial(
    OptimWrapper, opt=torch.optim.AdamW, fused=True, betas=(0.9, 0.99), eps=1e-5
)  # fastai's Adam, but that norms and biases decay too; half of a step is the optimizer's


def learner(run, opt=Adam, valid_pct=0.0):
    return run.learner(bs=64, opt=opt, wd=1e-2, moms=(0.95, 0.85, 0.95), valid_pct=valid_pct, prunes_from_scratch=True)


def train(run, cb, opt=Adam, valid_pct=0.0):
    learn = learner(run, opt, valid_pct)
    learn.fit_one_cycle(run.epochs, 1e-3, cbs=cb)
    return result(learn)


def during(schedule, run, **kwargs):
    return train(run, SparsifyCallback(run.sparsity, schedule=schedule, **kwargs))


def from_start(schedule, run, number, **kwargs):
    return train(run, SparsifyCallback(run.sparsity, schedule=window(schedule, number)), **kwargs)


def start_name(n):
    return f'train {n}, start'


for name, schedule in SCHEDULES.items():
    METHODS[f'train {name}, every batch'] = partial(during, schedule)  # the default, in trainings of fewer than 2,000
for name in others:
    METHODS[start_name(name)] = partial(from_start, STARTS[name][0])
    METHODS[SEARCHES + start_name(name)] = partial(from_start, STARTS[name][0], valid_pct=0.2)
METHODS['train OCP'] = partial(during, ocp, interval=10)
METHODS['train OCP, nested'] = partial(during, ocp, recover=False)  # what is pruned stays pruned, as with fasterai


@method('train OCP, fasterai')
def fasterai(run):
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_onecycle
    from fasterai.sparse.sparsify_callback import SparsifyCallback

    return train(
        run,
        SparsifyCallback(
            run.sparsity,
            'weight',
            'local',
            large_final,
            Schedule(partial(sched_onecycle, β=5)),
            layer_type=(torch.nn.Conv2d, torch.nn.Linear),
        ),
    )


@method('train dense')
def plain(run):
    return train(run, None)


sparsities = (0.8, 0.9, 0.95)
at_trained = (0.95,)  # at the scale *trained*, without variants of OCP
methods, usual, nested, peer = (
    {n: f'train {n}, every batch' for n in SCHEDULES},
    'train OCP',
    'train OCP, nested',
    'train OCP, fasterai',
)
trained = (*methods.values(), usual, nested, peer)


def search_of(n, sparsity, epochs, model='resnet18', seeds=SEARCH_SEEDS):
    "The trainings that choose a schedule's start"
    return search_cells(start_name(n), CHOICES, model, sparsity, epochs, seeds)


def start_of(df, n, sparsity, epochs):
    "The start that was chosen; None before that. `df` has the rows of one scale"
    return 0.0 if n == 'OCP' else searched(df, start_name(n), sparsity, epochs, CHOICES)


def named(df, prefix, schedules, epochs, searched):
    """Schedule -> its method at 95%, a prefix and its name, from the start that was searched; from the paper's while
    some search of `searched` is not finished. And whether all are"""
    found = {n: start_of(df, n, 0.95, epochs) for n in searched}
    done = None not in found.values()
    moved = {n: x for n, x in found.items() if done and x != STARTS[n][1]}
    name = lambda n: f'{prefix} {n}'
    return {n: at_number(name(n), moved[n]) if n in moved else name(n) for n in schedules}, done


def lacks_steps(start, epochs, paper):
    "Why iterative pruning was not given its chance, or ''; `paper`: the paper's epochs"
    step, theirs = ((1 - x) * n / STEPS for x, n in ((start, epochs), (STARTS['iterative'][1], paper)))
    return '' if step >= 1 else f'a step of iterative pruning has {step:.2g} epochs, and {theirs:.2g} in {paper} epochs'


def searches_of(df, sparsity, epochs):
    "What the searches of starts found, in words, or ''"
    if any(start_of(df, n, sparsity, epochs) is None for n in others):
        return ''
    seeds = search_seeds(df.images.max())
    at = lambda n, x: mean(values(df, SEARCHES + at_number(start_name(n), x), sparsity, epochs=epochs))
    return (
        f'{100 * sparsity:g}% ({epochs} epochs, seed{"s" * (len(seeds) > 1)} {" and ".join(map(str, seeds))}): '
        + ', '.join(f'{n} {" / ".join(f"{at(n, x):.1f}" for x in CHOICES)}' for n in others)
    )


def told_searches(df, at, epochs):
    "A sentence on what the searches found at these sparsities, or ''"
    found = [t for s in at if (t := searches_of(df, s, epochs))]
    starts = ' / '.join(f'{100 * x:g}' for x in CHOICES)
    return f' Validation accuracies of the search, from {starts}%, at {"; at ".join(found)}.' if found else ''


def needs(scale):
    return []


def cells(scale, df):
    epochs = scale.epochs_of(50, 2)
    model, at, run = scale.model('resnet18'), sparsities, trained
    if scale.network:
        at, run = at_trained, methods.values()
    cell = lambda m, s, seed: Cell(model, m, s, epochs, seed)
    chosen = {(n, s): start_of(df, n, s, epochs) for n in others for s in at}
    return [
        *(c for s in reversed(at) for n in others for c in search_of(n, s, epochs, model, scale.search_seeds)),
        *(
            c
            for seed in range(scale.seeds)
            for c in (
                *(cell(m, s, seed) for s in reversed(at) for m in run),
                *(cell(name_from(n, x), s, seed) for (n, s), x in chosen.items() if x is not None),
                cell('train dense', 0.0, seed),
            )
        ),
    ]


def name_from(n, start):
    return methods[n] if start == STARTS[n][1] else at_number(start_name(n), start)


# ---- what came out

title = 'One-Cycle Pruning, table 2: four schedules'
source = (
    'Hubens et al. 2021, table 2: 50 epochs from scratch on images scaled to 224, one-cycle rate up to 1e-3. The '
    'paper searched the starts at its 50 epochs: one-shot at 40%, iterative and AGP at 20%, OCP at 0 by its '
    'definition. Where a column says so they are searched here at the epochs that are run, of '
    + ', '.join(f'{100 * x:g}' for x in CHOICES)
    + '% of the training, with two seeds of their own (one where there are 50,000 images), measured on a fifth of the '
    'training images that is not trained on; 0%, which is chosen mostly, is the least there is. '
    'The paper\'s own starts stand '
    'beside them. Masks at every batch; Adam, weight decay 1e-2, batches of 64 and five steps of iterative pruning, '
    'which the paper doesn\'t give; '
    'flipped and shifted images without rotation or warping. Pruned weights may come back, but where it says '
    '"nested": the paper doesn\'t say, and in fasterai, which it used, they stay pruned. OCP has the paper\'s α and β, '
    'not searched here. Dense and fasterai (0.4.1, with the paper\'s β=5) are not in the paper'
)
paper = {
    0.8: ('93.10 ± 0.03', '93.13 ± 0.03', '93.22 ± 0.22', '93.49 ± 0.14'),
    0.9: ('92.42 ± 0.21', '91.72 ± 0.08', '92.85 ± 0.09', '93.31 ± 0.20'),
    0.95: ('91.58 ± 0.04', '87.54 ± 0.39', '92.04 ± 0.07', '92.76 ± 0.16'),
}
sides = {
    'fastprune, every 10th batch': usual,
    'fastprune, every batch': methods['OCP'],
    'fastprune, every batch, nested': nested,
    'fasterai': peer,
}


def is_search(df, names, paper, least=1):
    "Is a row of a search of these schedules' starts, at a table's own epochs? Other tables search at others"
    tried = [c.method for n in names for c in search_of(n, 0.95, 1)]
    return df.method.isin(tried) & (df.epochs == df.times.map(partial(epochs_at, paper=paper, least=least)))


def mine(df):
    names = [start_name(n) for n in others]
    rows = rows_of(
        df, 'resnet18', ('train dense', *trained, *names, *(SEARCHES + n for n in names)), also=(airbench.NAME,)
    )
    return rows[~rows.method.str.startswith(SEARCHES) | is_search(rows, others, 50, 2)]


def best(df, n, s):
    "Its start that was chosen, and the accuracies from there"
    start = None if df.empty else start_of(df, n, s, Scale.of(df).epochs_of(50, 2))
    return start, {} if start is None else values(df, name_from(n, start), s)


def show(df):
    def cell(n, s):
        start, vals = best(df, n, s)
        return ours(vals) if start is None else f'{ours(vals)} from {100 * start:g}%'

    rows = [
        [f'{100 * s:g}%']
        + [o for p, n in zip(paper[s], others, strict=False) for o in (p, ours(values(df, methods[n], s)), cell(n, s))]
        + [paper[s][-1], ours(values(df, methods['OCP'], s))]
        for s in run_at(df, sparsities)
    ]
    header = [o for n in others for o in (f'{n}: paper', f'ours, from {100 * STARTS[n][1]:g}%', 'ours, searched')]
    epochs = Scale.of(df).epochs_of(50, 2)
    seconds = lambda m, s: (
        df[(df.method == m) & ((df.sparsity - s).abs() < 1e-9) & (df.what == 'accuracy')]
        .set_index('seed')
        .seconds.to_dict()
    )
    beside = [
        (who, *(ours(values(df, m, s)) for s in sparsities), ours(seconds(m, 0.95), 0))
        for who, m in sides.items()
        if any(values(df, m, s) for s in sparsities)
    ]
    with_others = [
        (
            'OCP with fastprune and with fasterai; the same Learner and budget. What fasterai has pruned stays '
            'pruned, as in fastprune where it says *nested*. Seconds are of a whole training with its evaluation, '
            'one on each core. With the masks of '
            '`compute_masks` at the moments when fasterai makes its own, its network comes out to the bit.'
        ),
        markdown(['OCP with', *(f'{100 * s:g}%' for s in sparsities), 'seconds at 95%'], beside),
    ]
    return [
        f"Dense: ours {ours(values(df, 'train dense'))}.{told_searches(df, run_at(df, sparsities), epochs)}",
        markdown(['sparsity', *header, 'OCP: paper', 'ours, from 0%'], rows),
        *(with_others if len(beside) > 1 else ()),
    ]


def claims(df):
    at = [f'{100 * s:g}%' for s in sparsities]
    pairs = lambda a, b: [(w, values(df, a, s), values(df, b, s)) for w, s in zip(at, sparsities, strict=True)]
    found = {(n, s): best(df, n, s) for n in others for s in sparsities}
    rival = {n_at: vals for n_at, (_, vals) in found.items()}
    lacks = '' if any(rival.values()) else 'starts not searched'
    if lacks:
        rival = {(n, s): values(df, methods[n], s) for n, s in rival}
    ocp_at = {s: values(df, methods['OCP'], s) for s in sparsities}
    starts = [found['iterative', s][0] for s in sparsities]
    short = next((t for x in starts if x is not None and (t := lacks_steps(x, Scale.of(df).epochs_of(50, 2), 50))), '')
    return [
        *(
            Claim(
                f'OCP is better than {n}',
                [(w, ocp_at[s], rival[n, s]) for w, s in zip(at, sparsities, strict=True)],
                lacks=lacks or (short if n == 'iterative' else ''),
            )
            for n in others
        ),
        Claim(
            'Iterative is the worst at 95%',
            [
                (n, vals, rival['iterative', 0.95])
                for n, vals in (*((n, rival[n, 0.95]) for n in ('one-shot', 'AGP')), ('OCP', ocp_at[0.95]))
            ],
            lacks=lacks or short,
        ),
        Claim(
            'OCP with fastprune, masks at every batch, is no worse than with fasterai',
            pairs(methods['OCP'], peer),
            no_worse=True,
            of_paper=False,
        ),
        Claim(
            'OCP with fastprune, nested, is no worse than with fasterai',
            pairs(nested, peer),
            no_worse=True,
            of_paper=False,
        ),
        Claim('OCP is better where what is pruned stays pruned', pairs(nested, methods['OCP']), of_paper=False),
        Claim(
            'OCP with masks at every 10th batch is no worse than at every batch',
            pairs(usual, methods['OCP']),
            no_worse=True,
            of_paper=False,
        ),
    ]


def figure(df, ax):
    at = run_at(df, sparsities)
    for i, (n, m) in enumerate(methods.items()):
        line_over(ax, df, sparsities, m, n + PAPERS_START * (n in others), color=f'C{i}')
        found = [best(df, n, s)[1] for s in at]
        if n in others and any(found):
            line(ax, [f'{100 * s:g}' for s in at], found, f'{n}, searched', color=f'C{i}', ls='--', mfc='white')
    more = {'OCP, every 10th batch': usual, 'OCP, nested': nested, 'OCP, fasterai': peer}
    for i, (n, m) in enumerate(more.items(), len(methods)):
        line_over(ax, df, sparsities, m, n, color=f'C{i}', ls=':')
    ax.set(xlabel='sparsity (%)', ylabel='test accuracy (%)')
