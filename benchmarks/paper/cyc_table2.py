"Cyclical Pruning, table 2: one-shot, gradual and cyclical pruning of a trained ResNet-20, each layer to the same sparsity."
from fastai.metrics import ValueMetric
from harness import *

rate = lr_warmup(1e-2, warmup=0., drops=(0.75,))
start = dict(bs=256)


def interval(run):
    "The paper's, where there are its epochs"
    return 100 if run.scale.times >= 1 else 10


def classes(learn):
    "Classes with a weight left in the last layer; all others are constants to the network, of which one at most can ever be its answer"
    return int((list(prunable_weights(learn.model).values())[-1] != 0).any(1).sum())


def pruned(learn): return [('', 'classes', classes(learn)), *result(learn)]


@method('one-shot')
def one_shot_(run):
    learn = run.learner(**start, trained=run.scale.dense)
    learn.prune(run.sparsity)
    learn.fit(run.epochs, cbs=ParamScheduler({'lr': rate}))
    return pruned(learn)


@method('gradual')
def gradual(run):
    learn = run.learner(**start, trained=run.scale.dense)
    learn.fit_cyclical(1, run.epochs, run.sparsity, lr_max=1e-2, interval=interval(run))
    return pruned(learn)


def by_cycle(run, cycles=5, **kwargs):
    "`fit_cyclical`, with accuracy, the distance to the first cycle's mask and the classes left at each cycle's end"
    learn = run.learner(**start, trained=run.scale.dense)
    learn.metrics.append(ValueMetric(partial(classes, learn), 'classes'))
    learn.fit_cyclical(cycles, run.epochs//cycles, run.sparsity, lr_max=1e-2, interval=interval(run), track=True, **kwargs)
    at = {n: learn.recorder.metric_names.index(n)-1 for n in ('accuracy', 'mask_distance', 'classes')}
    ends = learn.recorder.values[run.epochs//cycles-1::run.epochs//cycles]
    rows = [(str(c), w, float(v)) for c, e in enumerate(ends, 1) for w, v in (('cycle accuracy', 100*e[at['accuracy']]), ('mask distance', e[at['mask_distance']]), ('cycle classes', e[at['classes']]))]
    return rows+pruned(learn)


METHODS['cyclical'] = by_cycle

sparsities, methods = (0.9, 0.95, 0.98, 0.99), ('one-shot', 'gradual', 'cyclical')


def epochs(scale): return 5*scale.epochs_of(20)
def needs(scale): return dense_cells('resnet20', scale)
def cells(scale, df):
    return [*(Cell('resnet20', m, s, epochs(scale), seed) for seed in range(scale.seeds) for s in reversed(sparsities) for m in methods),
            *dense_cells('resnet20', scale, range(1, scale.seeds))]

# ---- what came out

title = 'Cyclical Pruning, table 2: ResNet-20'
source = 'Srinivas et al. 2022, table 2: 100 epochs after training, cyclical 5 of 20; SGD with momentum, batches of 256, 1e-2 and 1e-3 from 75% on; local. All from the same trained network. Here gradual has the ramp of a cycle, up to 80%, and masks change every 100 iterations ("about 100" in the paper) where there are 100 epochs, every 10 in shorter trainings'
paper = {0.9: ('90.10 ± 0.2', '90.78 ± 0.4', '90.90 ± 0.1'), 0.95: ('86.52 ± 0.9', '89.14 ± 0.2', '89.29 ± 0.2'),
         0.98: ('78.55 ± 0.2', '83.44 ± 0.1', '85.79 ± 0.1'), 0.99: ('33.43 ± 0.0', '50.77 ± 2.7', '66.04 ± 2.4')}


def mine(df): return rows_of(df, 'resnet20', ('dense', *methods))


def show(df):
    rows = [(f'{100*s:g}%', [(p, ours(values(df, m, s))) for p, m in zip(paper[s], methods)]) for s in sparsities]
    return [f"Dense: paper 92.24, ours {ours(values(df, 'dense'))}.", side_by_side('sparsity', methods, rows),
            "At 99% the paper's two tables differ: gradual pruning of 100 epochs has 50.77 here, and in table 5 a first cycle of 20 epochs, which is gradual pruning too, has 62.74. So of the 15 points between gradual and cyclical, 5 are later cycles' (62.74 to 67.56)."]


def claims(df):
    pairs = lambda a, b, at: [(f'{100*s:g}%', values(df, a, s), values(df, b, s)) for s in at]
    return [Claim('The dense network is within 2 points of 92.24', [('dense', values(df, 'dense'), [90.24]*len(values(df, 'dense')))]),
            Claim('Gradual is better than one-shot at 98 and 99%', pairs('gradual', 'one-shot', (0.98, 0.99))),
            Claim('Gradual is better than one-shot at 90 and 95%', pairs('gradual', 'one-shot', (0.9, 0.95))),
            Claim('Cyclical is better than gradual at 98 and 99%', pairs('cyclical', 'gradual', (0.98, 0.99))),
            Claim('Cyclical is no worse than gradual at 90 and 95%', pairs('cyclical', 'gradual', (0.9, 0.95)), no_worse=True)]


def figure(df, ax):
    at = ran(df, sparsities)
    for m in methods: line(ax, [f'{100*s:g}' for s in at], [values(df, m, s) for s in at], m)
    ax.set(xlabel='sparsity (%)', ylabel='test accuracy (%)')
