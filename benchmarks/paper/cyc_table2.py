"""Cyclical Pruning, table 2: one-shot, gradual and cyclical pruning of a trained ResNet-20, each layer to the same
sparsity."""

from functools import partial

import airbench
from fastai.callback.schedule import ParamScheduler
from fastai.metrics import ValueMetric
from harness import METHODS, Cell, dense_cells, result
from tell import Claim, line_over, markdown, ours, rows_of, side_by_side, values

from fastprune.all import lr_warmup, prunable_weights

rate = lr_warmup(1e-2, warmup=0.0, drops=(0.75,))
start = dict(bs=256)


def interval(times):
    "Iterations between mask updates: the paper's, where there are its epochs"
    return 100 if times >= 1 else 10


def classes(of):
    """Classes with a weight left in the last layer of `.model`; all others are constants to the network, of which one
    at most can ever be its answer"""
    return int((list(prunable_weights(of.model).values())[-1] != 0).any(1).sum())


def pruned(learn):
    return [('', 'classes', classes(learn)), *result(learn)]


def one_shot_(run, **kwargs):
    learn = run.learner(**start, trained=run.scale.dense, validate=run.epochs)
    learn.prune(run.sparsity, **kwargs)
    learn.fit(run.epochs, cbs=ParamScheduler({'lr': rate}))
    return pruned(learn)


def gradual(run, **kwargs):
    learn = run.learner(**start, trained=run.scale.dense, validate=run.epochs)
    learn.fit_cyclical(1, run.epochs, run.sparsity, lr_max=1e-2, **{'interval': interval(run.scale.times), **kwargs})
    return pruned(learn)


def by_cycle(run, cycles=5, **kwargs):
    "`fit_cyclical`, with accuracy, the distance to the first cycle's mask and the classes left at each cycle's end"
    learn = run.learner(**start, trained=run.scale.dense, validate=run.epochs // cycles)
    learn.metrics.append(ValueMetric(partial(classes, learn), 'classes'))
    learn.fit_cyclical(
        cycles,
        run.epochs // cycles,
        run.sparsity,
        lr_max=1e-2,
        track=True,
        **{'interval': interval(run.scale.times), **kwargs},
    )
    at = {n: learn.recorder.metric_names.index(n) - 1 for n in ('accuracy', 'mask_distance', 'classes')}
    ends = learn.recorder.values[run.epochs // cycles - 1 :: run.epochs // cycles]
    rows = [
        (str(c), w, float(v))
        for c, e in enumerate(ends, 1)
        for w, v in (
            ('cycle accuracy', 100 * e[at['accuracy']]),
            ('mask distance', e[at['mask_distance']]),
            ('cycle classes', e[at['classes']]),
        )
    ]
    return rows + pruned(learn)


sparsities, methods = (0.9, 0.95, 0.98, 0.99), ('one-shot', 'gradual', 'cyclical')
at_trained = (0.99,)  # at the scale *trained*, without variants of the methods
wholes = {'last layer whole': '12', 'first and last layer whole': ['0.0', '12']}  # modules of ResNet-20
for name, f in zip(methods, (one_shot_, gradual, by_cycle), strict=True):
    METHODS[name] = f
    for how, layers in wholes.items():
        METHODS[f'{name}, {how}'] = partial(f, exclude=layers)
partly = [f'{m}, {how}' for how in wholes for m in methods]
intervals = {n: f'gradual, every {n}' for n in (1, 10, 100)}
nested = {n: f'{name}, nested' for n, name in intervals.items()}  # what is pruned stays pruned
for n in intervals:
    METHODS[intervals[n]], METHODS[nested[n]] = (
        partial(gradual, interval=n),
        partial(gradual, interval=n, recover=False),
    )
alive = {m: f'{m}, dead filters last' for m in ('gradual', 'cyclical', intervals[100])}
for m, name in alive.items():
    METHODS[name] = partial(METHODS[m], recover='alive')
ramps = {r: f'gradual, ramp {r:g}' for r in (0.4, 1.0)}  # gradual itself: 0.8
for r, name in ramps.items():
    METHODS[name] = partial(gradual, ramp=r)


def epochs(scale):
    return 5 * scale.epochs_of(20)


def lacks(df):
    "What cycles lack for a verdict, at scales where one is an epoch: in so short ones the network falls to chance"
    return 'a cycle is one epoch, of 20 in the paper' if len(df) and round(20 * df.times.iloc[0]) <= 1 else ''


def needs(scale):
    return dense_cells(scale.model('resnet20'), scale)


def cells(scale, df):
    usual = intervals[interval(scale.times)]
    controls = {
        0.98: [alive[m] for m in methods if m in alive],
        0.99: [
            *partly,
            *ramps.values(),
            *(name for m, name in alive.items() if m != usual),
            *(m for m in intervals.values() if m != usual),
            *nested.values(),
        ],
    }
    model, at = scale.model('resnet20'), sparsities
    if scale.network:
        controls, at = {}, at_trained
    return [
        *(
            Cell(model, m, s, epochs(scale), seed)
            for seed in range(scale.seeds)
            for s in reversed(at)
            for m in (*methods, *controls.get(s, ()))
        ),
        *dense_cells(model, scale, range(1, scale.seeds)),
    ]


# ---- what came out

title = 'Cyclical Pruning, table 2: one-shot, gradual and cyclical'
source = (
    'Srinivas et al. 2022, table 2: 100 epochs after training, cyclical 5 of 20; SGD with '
    'momentum, batches of 256, 1e-2 and 1e-3 from 75% on; local. Here all start from the same '
    'trained network, of seed 0 (at scale gpu, from that of their own seed); in gradual pruning '
    'sparsity rises over the first 80% of the '
    'training, as it does in a cycle; and masks change every 100 iterations ("about 100" in the '
    'paper) where there are 100 epochs, every 10 in shorter trainings. Weight decay 1e-4, which the paper doesn\'t '
    'give; images are flipped and shifted'
)
paper = {
    0.9: ('90.10 ± 0.2', '90.78 ± 0.4', '90.90 ± 0.1'),
    0.95: ('86.52 ± 0.9', '89.14 ± 0.2', '89.29 ± 0.2'),
    0.98: ('78.55 ± 0.2', '83.44 ± 0.1', '85.79 ± 0.1'),
    0.99: ('33.43 ± 0.0', '50.77 ± 2.7', '66.04 ± 2.4'),
}


notes = [
    (
        "At 99% the paper's two tables differ: gradual pruning of 100 epochs has 50.77 in table 2, and in table 5 a "
        "first cycle of 20 epochs, which is gradual pruning too, has 62.74. So of the 15 points between gradual and "
        "cyclical, about 5 are later cycles' (62.74 to 67.56)."
    ),
    (
        "Every layer is pruned alike, also the last one, of which 99% leave 6 of 640 weights in a ResNet-20, and 13 "
        "of 1,280 in the network of scale *trained*. A class without a "
        "weight there is a constant to the network, and of all constants one at most can ever be its answer: n "
        "classes with weights allow 10(n+1)% at most. The paper's ResNet-56, which has the same last layer, reaches "
        "70.99 at 99%, where 6 weights allow 70: so it kept more there. Some trainings of smaller scales have that "
        "layer whole, or the first one too: 1,062 weights more, beside some 2,700."
    ),
    (
        "A ResNet-20's first convolution keeps 4 of 432 weights at 99% (at scale *trained* the first layer is fixed, "
        "and not pruned), so most of its filters are dead. What comes out of one is constant, and BatchNorm divides it "
        "by the root of its eps: gradients there are some 170 times those of "
        "other filters (6.0 and 0.035 in the network of scale *eighth*, pruned to 97.8% at once), so dead filters can "
        "decide what comes back. *Dead filters last* is `recover='alive'`, which ranks their weights behind all "
        "others. Rows with it are of another machine than most without it."
    ),
    (
        "At scale *trained* a training has 5 epochs, so a cycle is one epoch, of 195 iterations; in the paper it is 20 "
        "epochs. Pruned to 99% in one, most networks fall to about chance, in some cycle, so there is no verdict on "
        "cycles at scales that have such short ones. The rate is the paper's for a ResNet-20, and was not searched for "
        "this network."
    ),
]


def mine(df):
    return rows_of(
        df,
        'resnet20',
        ('dense', *methods, *partly, *intervals.values(), *nested.values(), *alive.values(), *ramps.values()),
        also=(airbench.NAME,),
    )


def at_interval(n, usual):
    """Gradual pruning with so many iterations between mask updates: where weights may come back, where those of dead
    filters come last, and where none may; `usual` is that of gradual itself"""
    m = 'gradual' if n == usual else intervals[n]
    return m, alive.get(m), nested[n]


def show(df):
    rows = [
        (f'{100 * s:g}%', [(p, ours(values(df, m, s))) for p, m in zip(paper[s], methods, strict=True)])
        for s in sparsities
        if any(values(df, m, s) for m in methods)
    ]
    variants = {
        'dead filters last': (alive, (0.98, 0.99)),
        **{how: ({m: f'{m}, {how}' for m in methods}, (0.99,)) for how in wholes},
    }
    variants = {how: v for how, v in variants.items() if any(values(df, m, s) for m in v[0].values() for s in v[1])}
    beside = [
        (
            f'{100 * s:g}%',
            m,
            ours(values(df, m, s)),
            ours(values(df, m, s, 'classes'), 1),
            *(ours(values(df, of[m], s)) if m in of and s in at else '' for of, at in variants.values()),
        )
        for s in (0.99,)
        for m in methods
        if values(df, m, s, 'classes')
    ]
    usual = interval(df.times.iloc[0])
    rises = {r: v for r, m in sorted({**ramps, 0.8: 'gradual'}.items()) if (v := values(df, m, 0.99))}
    updates = [
        (str(n), *(ours(values(df, m, 0.99)) if m else '' for m in ms))
        for n in intervals
        for ms in [at_interval(n, usual)]
        if any(values(df, m, 0.99) for m in ms if m)
    ]
    return [
        f"Dense: paper 92.24, ours {ours(values(df, 'dense'))}.",
        *([side_by_side('sparsity', methods, rows)] if rows else []),
        *(
            [
                markdown(
                    [
                        'sparsity',
                        'method',
                        'accuracy',
                        'classes with a weight',
                        *(f'accuracy, {how}' for how in variants),
                    ],
                    beside,
                )
            ]
            if beside
            else []
        ),
        *(
            [
                'Gradual pruning at 99% by the iterations between mask updates; nested: what is pruned stays pruned.',
                markdown(['iterations', 'weights may come back', 'dead filters last', 'nested'], updates),
            ]
            if len(updates) > 1
            else []
        ),
        *(
            [
                (
                    "And by the part of training in which sparsity rises (the paper's equation 1 has all of it, "
                    "its section 5.2 four fifths of a cycle): "
                )
                + ', '.join(f'{100 * r:g}%: {ours(v)}' for r, v in rises.items())
                + '.'
            ]
            if len(rises) > 1
            else []
        ),
    ]


def claims(df):
    order = (('gradual', 'one-shot'), ('cyclical', 'gradual'), ('cyclical', 'one-shot'))
    pairs = lambda a, b, at: [(f'{100 * s:g}%', values(df, a, s), values(df, b, s)) for s in at]
    usual = interval(1.0 if df.empty else df.times.iloc[0])
    updates = {n: at_interval(n, usual) for n in intervals}
    of_cycles = lambda a, b: lacks(df) if 'cyclical' in (a, b) else ''
    how_often = lambda n: f"with masks at every {f'{n}th ' * (n > 1)}iteration"
    return [
        *(
            Claim(f'{a.capitalize()} is better than {b} at {100 * s:g}%', pairs(a, b, (s,)), lacks=of_cycles(a, b))
            for s in (0.98, 0.99)
            for a, b in order
        ),
        Claim('Gradual is better than one-shot at 90 and 95%', pairs('gradual', 'one-shot', (0.9, 0.95))),
        Claim(
            'Cyclical is no worse than gradual at 90 and 95%',
            pairs('cyclical', 'gradual', (0.9, 0.95)),
            no_worse=True,
            lacks=lacks(df),
        ),
        Claim(
            'gradual with masks at every iteration is better than one-shot at 99%',
            pairs(intervals[1], 'one-shot', (0.99,)),
            of_paper=False,
        ),
        *(
            Claim(
                f'gradual at 99% {how_often(n)} is better where weights may come back',
                pairs(back, none, (0.99,)),
                of_paper=False,
            )
            for n, (back, _, none) in updates.items()
        ),
        *(
            Claim(
                f'gradual at 99% {how_often(n)} is better where dead filters come last than where all weights may '
                'come back',
                pairs(last, back, (0.99,)),
                of_paper=False,
            )
            for n, (back, last, _) in updates.items()
            if last
        ),
        Claim(
            'cyclical at 99% is better where dead filters come last',
            pairs(alive['cyclical'], 'cyclical', (0.99,)),
            of_paper=False,
            lacks=lacks(df),
        ),
        *(
            Claim(
                f"{a} with dead filters last is better than {b}{' with dead filters last' * (b in alive)} at 99%",
                pairs(alive[a], alive.get(b, b), (0.99,)),
                of_paper=False,
                lacks=of_cycles(a, b),
            )
            for a, b in order
        ),
    ]


def figure(df, ax):
    for i, m in enumerate(methods):
        line_over(ax, df, sparsities, m, m, color=f'C{i}')
        if m in alive:
            line_over(ax, df, sparsities, alive[m], alive[m], color=f'C{i}', ls=':', mfc='white')
    ax.set(xlabel='sparsity (%)', ylabel='test accuracy (%)')
