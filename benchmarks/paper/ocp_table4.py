"""One-Cycle Pruning, table 4 and figure 3: lottery tickets found with four schedules inside of rounds, and how stable
they are by round"""

from functools import partial

from harness import METHODS, Cell, Scale
from ocp_table2 import STARTS, fused, is_search, learner, named, search_of
from tell import Claim, by_step, each, line, markdown, mean, ours, rows_of, side_by_side

from fastprune.all import agp, iterative, ocp, one_shot, window

SCHEDULES = {
    'one-shot': one_shot,
    'iterative': iterative,
    'AGP': agp,
    'OCP': ocp,
}  # one-shot at a round's end is the usual IMP
with_start = ('iterative', 'AGP')


def tickets(schedule, start, run, number=None):
    "By round: accuracy of the ticket, the mean of two trainings, and the error half-way between the two"
    learn, rounds = learner(run, fused), run.scale.rounds_of(10)
    number = start if number is None else number
    if number is not None:
        schedule = window(schedule, number)

    def fit(learn, cbs):
        learn.fit_one_cycle(run.epochs, 1e-3, cbs=cbs)

    found = learn.find_tickets(
        rounds,
        fit,
        prune_rate=1 - (1 - run.sparsity) ** (1 / rounds),
        scope='local',
        schedule=schedule,
        interval=None if schedule is one_shot else 10,
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
    METHODS[f'tickets {name}'] = partial(tickets, schedule, STARTS[name][1] if name in with_start else None)
methods = [f'tickets {n}' for n in SCHEDULES]


def names(df, epochs):
    return named(df, 'tickets', SCHEDULES, epochs, with_start)


def needs(scale):
    return []


def cells(scale, df):
    epochs = scale.epochs_of(50)
    found, is_searched = names(df, epochs)
    if not is_searched:
        return [c for n in with_start for c in search_of(n, 0.95, epochs, seeds=scale.search_seeds)]
    seeds = range(min(scale.seeds, 3))  # a chain takes more than five minutes
    return [Cell('resnet18', m, 0.95, epochs, seed) for seed in seeds for m in found.values()]


# ---- what came out

title = 'One-Cycle Pruning, table 4 and figure 3: tickets'
source = (
    'Hubens et al. 2021, section 5: rounds of training from the first weights, each layer to the '
    'same sparsity, 95% after the last round; masks change every 10 iterations; starts within a round are those '
    'of table 2 at 95% and a round\'s epochs, once they are searched at this scale, with fastai\'s Adam; the '
    'optimizer of the tickets is PyTorch\'s fused AdamW; two trainings of each ticket, and the error of the weights '
    'half-way between them'
)
paper = {'one-shot': '72.213 ± 0.009', 'iterative': '85.778 ± 0.003', 'AGP': '86.114 ± 0.001', 'OCP': '89.239 ± 0.004'}


def mine(df):
    tickets = rows_of(df, 'resnet18', methods)
    at_its_scales = df.scale.isin(tickets.scale.unique())
    return df[df.index.isin(tickets.index) | is_search(df, with_start, 50) & at_its_scales]


def found(df):
    return names(df, Scale.of(df).epochs_of(50) if len(df) else None)


def by_round(df, n, what):
    return by_step(df, found(df)[0][n], 0.95, what)


def above_ends(df, n):
    "By round: the error half-way less the mean error of the two trainings"
    both = zip(by_round(df, n, 'instability'), by_round(df, n, 'ticket accuracy'), strict=True)
    return [each(lambda half, accuracy: half + accuracy - 100, *pair) for pair in both]


def show(df):
    last = {n: by_round(df, n, 'ticket accuracy') or [{}] for n in SCHEDULES}
    rounds = max(len(v) for v in last.values())
    left = next((v for n in SCHEDULES if (v := by_round(df, n, 'left'))), [])
    table = lambda by: markdown(
        ['weights left', *(f'{mean(v):.1f}%' for v in left)], [[n, *map(ours, by(n))] for n in SCHEDULES if by(n)]
    )
    starts = 'Starts were searched.' if found(df)[1] else "Starts are the paper's, and were not searched."
    return [
        f"The last round's ticket, trained; {rounds - 1} rounds. {starts}",
        side_by_side('', list(SCHEDULES), [('accuracy (%)', [(paper[n], ours(last[n][-1])) for n in SCHEDULES])]),
        (
            'Instability, the error half-way between two trainings, less the mean error of the two (points), by round. '
            'About 0: the two are linearly connected. The paper\'s figure 3 has the error half-way itself.'
        ),
        table(lambda n: above_ends(df, n)),
    ]


def claims(df):
    last = lambda n: (by_round(df, n, 'ticket accuracy') or [{}])[-1]
    connected = lambda n: each(lambda v: 100 - v, (above_ends(df, n)[1:] or [{}])[0])  # after the first pruning
    searched = found(df)[1]
    lacks = f"{'' if searched else 'starts and '}OCP's β not searched"
    stands = 'holds' if searched else ''  # another β could only help OCP
    return [
        Claim(
            "OCP's last ticket is better than the others'",
            [(n, last('OCP'), last(n)) for n in list(SCHEDULES)[:3]],
            lacks=lacks,
            stands=stands,
        ),
        Claim(
            "One-shot's last ticket is the worst",
            [(n, last(n), last('one-shot')) for n in list(SCHEDULES)[1:]],
            lacks='' if searched else 'starts not searched',
            stands='holds',  # one-shot has nothing to search; of two starts of others one would take the better one
        ),
        Claim(
            "OCP's tickets are stable earlier than one-shot's and iterative's (error half-way above the ends)",
            [(f'{n}, round 1', connected('OCP'), connected(n)) for n in ('one-shot', 'iterative')],
            lacks=lacks,
            stands=stands,
        ),
    ]


def figure(df, ax):
    for n in SCHEDULES:
        groups = by_round(df, n, 'instability')
        line(ax, list(range(len(groups))), groups, n)
    ax.set(
        xlabel='round of pruning', ylabel='error half-way (%)', xticks=range(len(by_round(df, 'OCP', 'instability')))
    )
