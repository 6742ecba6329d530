"""One-Cycle Pruning, table 4 and figure 3: lottery tickets found with four schedules inside of rounds, and how stable
they are by round"""

import statistics
from functools import partial

from harness import METHODS, Cell
from ocp_table2 import fused, learner
from tell import Claim, line, markdown, ours, rows_of, side_by_side, steps, values

from fastprune.all import agp, iterative, ocp, one_shot, window

SCHEDULES = {
    'one-shot': one_shot,
    'iterative': window(iterative, 0.2),
    'AGP': window(agp, 0.2),
    'OCP': ocp,
}  # one-shot at a round's end is the usual IMP


def tickets(schedule, run):
    "By round: accuracy of the ticket, the mean of two trainings, and the error half-way between the two"
    learn, rounds = learner(run, fused), run.scale.rounds_of(10)

    def fit(learn, cbs):
        learn.fit_one_cycle(run.epochs, 1e-3, cbs=cbs)

    found = learn.find_tickets(
        rounds,
        fit,
        prune_rate=1 - (1 - run.sparsity) ** (1 / rounds),
        scope='local',
        schedule=schedule,
        interval=10,
        measure='none',
        seed=1000 * run.seed,
    )
    rows = []
    for m, ticket in enumerate(found):
        path = learn.instability(ticket, fit, seeds=(1000 * run.seed + 500, 1000 * run.seed + 501), n=3)
        ends = (path.errors[0] + path.errors[-1]) / 2
        rows += [
            (str(m), w, float(v))
            for w, v in (
                ('ticket accuracy', 100 * (1 - ends)),
                ('instability', 100 * path.instability),
                ('left', 100 * (1 - ticket.sparsity)),
            )
        ]
    return [*rows, ('', 'accuracy', rows[-3][2]), ('', 'sparsity', found[-1].sparsity)]


for name, schedule in SCHEDULES.items():
    METHODS[f'tickets {name}'] = partial(tickets, schedule)
methods = [f'tickets {n}' for n in SCHEDULES]


def needs(scale):
    return []


def cells(scale, df):
    return [Cell('resnet18', m, 0.95, scale.epochs_of(50), seed) for seed in range(scale.seeds) for m in methods]


# ---- what came out

title = 'One-Cycle Pruning, table 4 and figure 3: tickets of a ResNet-18'
source = (
    'Hubens et al. 2021, section 5: rounds of training from the first weights, each layer to the '
    'same sparsity, 95% after the last round; masks change every 10 iterations; the optimizer is '
    'PyTorch\'s fused AdamW; two trainings of each ticket, and the error of the weights half-way '
    'between them'
)
paper = {'one-shot': '72.213 ± 0.009', 'iterative': '85.778 ± 0.003', 'AGP': '86.114 ± 0.001', 'OCP': '89.239 ± 0.004'}


def by_round(df, n, what):
    return [(m, values(df, f'tickets {n}', 0.95, what, m)) for m in steps(df, f'tickets {n}', what)]


def above_ends(df, n):
    "By round: the error half-way less the mean error of the two trainings"
    return [
        (m, [half + a - 100 for half, a in zip(v, accuracy, strict=True)])
        for (m, v), (_, accuracy) in zip(
            by_round(df, n, 'instability'), by_round(df, n, 'ticket accuracy'), strict=True
        )
    ]


def mine(df):
    return rows_of(df, 'resnet18', methods)


def show(df):
    last = {n: by_round(df, n, 'ticket accuracy') or [(0, [])] for n in SCHEDULES}
    rounds = max(len(v) for v in last.values())
    left = by_round(df, next((n for n in SCHEDULES if steps(df, f'tickets {n}', 'left')), 'OCP'), 'left')
    table = lambda by: markdown(
        ['weights left', *(f'{statistics.mean(v):.1f}%' for _, v in left)],
        [[n, *(ours(v) for _, v in by(n))] for n in SCHEDULES if by(n)],
    )
    return [
        f"The last round's ticket, trained; {rounds - 1} rounds.",
        side_by_side('', list(SCHEDULES), [('accuracy (%)', [(paper[n], ours(last[n][-1][1])) for n in SCHEDULES])]),
        'Accuracy of tickets (%), by round:',
        table(lambda n: by_round(df, n, 'ticket accuracy')),
        'Instability, the error half-way between two trainings (%), by round:',
        table(lambda n: by_round(df, n, 'instability')),
        (
            "What of it is above the mean error of the two trainings (points). Where that is about 0 the "
            "two are linearly connected, and instability repeats the tickets' accuracy:"
        ),
        table(lambda n: above_ends(df, n)),
    ]


def claims(df):
    last = lambda n: (by_round(df, n, 'ticket accuracy') or [(0, [])])[-1][1]
    ends = lambda n: [100 - v for v in (by_round(df, n, 'instability') or [(0, [])])[-1][1]]
    return [
        Claim("OCP's last ticket is better than the others'", [(n, last('OCP'), last(n)) for n in list(SCHEDULES)[:3]]),
        Claim("One-shot's last ticket is the worst", [(n, last(n), last('one-shot')) for n in list(SCHEDULES)[1:]]),
        Claim(
            "OCP's last ticket is more stable than one-shot's and iterative's: the accuracy half-way is higher",
            [(n, ends('OCP'), ends(n)) for n in ('one-shot', 'iterative')],
        ),
    ]


def figure(df, ax):
    for n in SCHEDULES:
        groups = by_round(df, n, 'instability')
        line(ax, [m for m, _ in groups], [v for _, v in groups], n)
    ax.set(xlabel='round of pruning', ylabel='error half-way (%)', xticks=steps(df, 'tickets OCP', 'instability'))
