"""S-Cyc, table 2a: six learning-rate schedules while a ResNet-20 is pruned iteratively by the global gradient, with
early stopping on a validation set; and an oracle that searches the rate of each round"""

from functools import partial

from harness import METHODS, Cell
from tell import Claim, by_step, line, markdown, mean, ours, rows_of

from fastprune.all import lr_constant, lr_cyclical, lr_decay, lr_warmup, s_cyc_max_lr, taylor

warm = partial(lr_warmup, warmup=20 / 63, drops=(20 / 63, 25 / 63))
RATE, ROUNDS = 0.2, 18
s_cyc = partial(s_cyc_max_lr, eps=3e-2, delta=4e-2, beta=5.0, q=1, p=RATE)
SCHEDULES = {
    'constant': dict(shape=lr_constant, lr=1e-2),
    'decay': dict(shape=lr_decay, lr=2e-2),
    'cyclical': dict(shape=partial(lr_cyclical, half=8 / 63), lr=2.5e-2),
    'warmup-1': dict(shape=warm, lr=3e-2),
    'warmup-2': dict(shape=warm, lr=7e-2),
    'S-Cyc': dict(shape=warm, lr=3e-2, max_lr=s_cyc),
    'oracle': dict(shape=warm, lrs=[1e-2, 3e-2, 5e-2, 7e-2]),
}


def rounds(kind, run):
    learn = run.learner(bs=128, valid_pct=0.2)
    search = learn.s_cyc_oracle if 'lrs' in kind else learn.iterative_prune
    df = search(
        ROUNDS,
        run.epochs,
        prune_rate=RATE,
        criterion=taylor,
        scope='global',
        early_stop=True,
        monitor='accuracy',
        test_dl=learn.dls[2],
        seed=1000 * run.seed,
        **kind,
    )
    rows = [
        (str(m), w, float(v))
        for m, r in enumerate(df.to_dict('records'))
        for w, v in (
            ('round accuracy', 100 * r['test_accuracy']),
            ('left', 100 * (1 - r['sparsity'])),
            ('max_lr', r['max_lr']),
        )
    ]
    return [*rows, ('', 'accuracy', rows[-3][2]), ('', 'sparsity', df.sparsity.iloc[-1])]


for name, kind in SCHEDULES.items():
    METHODS[f'{ROUNDS} rounds, {name}'] = partial(rounds, kind)
NETWORK, SMALLER = 'resnet20', 'resnet20, 16 pixels'
names = {n: f'{ROUNDS} rounds, {n}' for n in SCHEDULES}
methods = list(names.values())
sparsity = round(1 - (1 - RATE) ** ROUNDS, 4)


def needs(scale):
    return []


def epochs(scale):
    "Of a round: the paper's where the scale has its epochs, else a fifth of what the scale gives, to pay for rounds"
    return scale.epochs_of(202 if scale.times >= 1 else 40)


def cells(scale, df):
    network = NETWORK if scale.images == 50_000 else SMALLER
    return [Cell(network, m, sparsity, epochs(scale), seed) for seed in range(scale.seeds) for m in methods]


# ---- what came out

title = 'S-Cyc, table 2a: global gradient'
source = (
    'Liu et al. 2021, table 2a: 63K iterations a round with batches of 128 (202 epochs), 25 rounds of 20%; its table '
    'ends at 2.03% of the weights. Here there are 18 rounds at every scale, which leave 1.80%, '
    'and a round has a fifth of the epochs that the scale would give it. Where a scale has fewer than 50,000 images, '
    'they have 16 pixels a side. Early stopping on the error of 20% of the training images, and 80% to train on, where '
    'the paper splits all images anew in each run into 60, 20 and 20%. In the last four schedules the '
    'rate is a hundredth of its largest from 25/63 of a round on: after 25,000 iterations in the paper; where a round '
    'has a few hundred, they are behind *decay* before anything is pruned. The oracle trains each round with four '
    'largest rates, 1e-2 to 7e-2, and goes on from the best on the validation set; where that is the lowest in most '
    'rounds, lower ones would have to be tried'
)
paper = {
    'constant': (89.4, 66.2),
    'decay': (90.0, 66.9),
    'cyclical': (89.6, 67.8),
    'warmup-1': (90.1, 68.9),
    'warmup-2': (89.7, 71.3),
    'S-Cyc': (90.0, 72.8),
}


def by_round(df, n, what='round accuracy'):
    return by_step(df, names[n], sparsity, what)


def left(df):
    return next(([mean(v) for v in by_round(df, n, 'left')] for n in SCHEDULES if by_round(df, n, 'left')), [])


def mine(df):
    return rows_of(df, NETWORK, methods, [SMALLER])


def show(df):
    ends = {n: by_round(df, n) or [{}] for n in SCHEDULES}
    some = range(0, ROUNDS + 1, 3)
    at = lambda vals, f: [f(vals[i]) for i in some if i < len(vals)]
    rates = {n: by_round(df, n, 'max_lr') for n in ('S-Cyc', 'oracle')}
    return [
        'By weights left, at every third round; the paper has 2.03% left after the last.',
        markdown(
            ['schedule', 'paper: 100%', '2.03%', *at(left(df), lambda x: f'ours: {x:.3g}%')],
            [
                *([n, *paper.get(n, ('', '')), *at(ends[n], ours)] for n in SCHEDULES),
                *([f'largest rate, {n}', '', '', *at(v, lambda x: ours(x, 3))] for n, v in rates.items()),
            ],
        ),
    ]


def claims(df):
    "The rates are the paper's, which were chosen for rounds of 63,000 iterations"
    lacks = '' if df.empty or df.times.iloc[0] >= 1 else 'rates are those of longer rounds, and not searched'
    claim = partial(Claim, lacks=lacks)
    end = lambda n, what='round accuracy': (by_round(df, n, what) or [{}])[-1]
    first = by_round(df, 'oracle', 'max_lr') or [{}]
    tried, chosen = SCHEDULES['oracle']['lrs'], [x for of_round in first for x in of_round.values()]
    at_edge = sum(x in (tried[0], tried[-1]) for x in chosen) > len(chosen) / 2
    return [
        claim(
            f'S-Cyc is better than all others after {ROUNDS} rounds',
            [(n, end('S-Cyc'), end(n)) for n in paper if n != 'S-Cyc'],
        ),
        claim(
            f'S-Cyc is better than warmup-1 and warmup-2, which have its shape, after {ROUNDS} rounds',
            [(n, end('S-Cyc'), end(n)) for n in ('warmup-1', 'warmup-2')],
        ),
        claim(
            f'The larger rate of warmup-2 is better than warmup-1 after {ROUNDS} rounds',
            [('last round', end('warmup-2'), end('warmup-1'))],
        ),
        claim(
            f'warmup-1 and warmup-2 are better than constant after {ROUNDS} rounds',
            [(n, end(n), end('constant')) for n in ('warmup-1', 'warmup-2')],
        ),
        claim(
            f'S-Cyc is no worse than the oracle after {ROUNDS} rounds',
            [('last round', end('S-Cyc'), end('oracle'))],
            no_worse=True,
        ),
        Claim(
            "The oracle's best rate is larger in the last round than in the first",
            [('rate', first[-1], first[0])],
            floor=-1,
            lacks='search ends at its edge' if at_edge else '',
        ),
    ]


def figure(df, ax):
    for n in SCHEDULES:
        line(ax, left(df)[: len(by_round(df, n))], by_round(df, n), n)
    ax.set(xlabel='weights left (%)', ylabel='test accuracy (%)', xscale='log')
    ax.invert_xaxis()
    shown = left(df)[::3]
    ax.set_xticks(shown, [f'{x:.3g}' for x in shown])
    ax.minorticks_off()
