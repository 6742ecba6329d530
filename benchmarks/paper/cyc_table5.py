"""Cyclical Pruning, table 5: accuracy and mask distance by cycle, for three schedules and for fine-tuning alone,
ResNet-20 at 99%"""

from functools import partial

import airbench
import cyc_table2
from cyc_table2 import by_cycle, epochs, lacks
from harness import METHODS, Cell
from tell import Claim, line, ours, rows_of, side_by_side, values

from fastprune.all import linear, one_shot

needs = cyc_table2.needs
METHODS['cyclical linear'] = partial(by_cycle, schedule=linear)
METHODS['cyclical step'] = partial(by_cycle, schedule=one_shot)
METHODS['cyclical fine-tune'] = partial(by_cycle, prune_cycles=1)

methods = ('cyclical', 'cyclical linear', 'cyclical step', 'cyclical fine-tune')
at_trained = (0.99,)  # at the scale *trained*, as at all


def cells(scale, df):
    model = scale.model('resnet20')
    return [Cell(model, m, 0.99, epochs(scale), seed) for seed in range(scale.seeds) for m in methods]


# ---- what came out

title = 'Cyclical Pruning, table 5: 99%, by cycle'
source = (
    'Srinivas et al. 2022, table 5: 5 cycles of 20 epochs; mask distance: Jaccard, to the mask '
    'at the end of the first cycle. Fine-tune: the first cycle as cyclical, then cycles of the '
    'rate alone. Cubic is the cyclical of table 2, whose trainings are counted here too. All start from one trained '
    'network, of seed 0'
)
paper = {
    'cyclical': ((62.74, 65.89, 66.89, 67.23, 67.56), (0, 0.38, 0.49, 0.55, 0.58)),
    'cyclical linear': ((47.63, 52.04, 56.33, 57.65, 58.27), (0, 0.48, 0.58, 0.62, 0.64)),
    'cyclical step': ((39.88, 47.47, 50.94, 53.64, 55.36), (0, 0.46, 0.59, 0.65, 0.68)),
    'cyclical fine-tune': ((63.01, 63.73, 64.11, 63.8, 64.06), (0,) * 5),
}
labels = {'cyclical': 'cubic', 'cyclical linear': 'linear', 'cyclical step': 'step', 'cyclical fine-tune': 'fine-tune'}
at = lambda df, m, c, what='cycle accuracy': values(df, m, 0.99, what, c)


def mine(df):
    return rows_of(df[(df.sparsity - 0.99).abs() < 1e-9], 'resnet20', methods, also=(airbench.NAME,))


def show(df):
    rows = [
        (f'{labels[m]}, {what}', [(p, ours(at(df, m, c + 1, w), 2)) for c, p in enumerate(paper[m][i])])
        for m in methods
        if at(df, m, 5)
        for i, (what, w) in enumerate((('accuracy', 'cycle accuracy'), ('mask distance', 'mask distance')))
    ]
    return [side_by_side('schedule', [f'cycle {c}' for c in range(1, 6)], rows)]


def claims(df):
    claim = partial(Claim, lacks=lacks(df))
    return [
        claim(
            'Accuracy rises from the first cycle to the last, whatever the schedule',
            [(labels[m], at(df, m, 5), at(df, m, 1)) for m in methods[:3]],
        ),
        claim(
            'Cubic is better than linear and step, after the last cycle',
            [(labels[m], at(df, 'cyclical', 5), at(df, m, 5)) for m in methods[1:3]],
        ),
        claim(
            'Cycles of pruning are better than cycles of fine-tuning alone',
            [('last cycle', at(df, 'cyclical', 5), at(df, 'cyclical fine-tune', 5))],
        ),
    ]


def figure(df, ax):
    for m in methods:
        line(ax, list(range(1, 6)), [at(df, m, c) for c in range(1, 6)], labels[m])
    ax.set(xlabel='cycle', ylabel='test accuracy (%)', xticks=range(1, 6))
