"Cyclical Pruning, table 2: one-shot, gradual and cyclical pruning of a trained ResNet-20, each layer to the same sparsity. `python benchmarks/paper/cyc_table2.py --scale tiny`"
from harness import *

rate = lr_warmup(1e-2, warmup=0., drops=(0.75,))
start = dict(bs=256)


@method('one-shot')
def one_shot_(run):
    learn = run.learner(**start, trained=run.scale.dense)
    learn.prune(run.sparsity)
    learn.fit(run.epochs, cbs=ParamScheduler({'lr': rate}))
    return result(learn)


@method('gradual')
def gradual(run):
    learn = run.learner(**start, trained=run.scale.dense)
    learn.fit_cyclical(1, run.epochs, run.sparsity, lr_max=1e-2)
    return result(learn)


def by_cycle(run, cycles=5, **kwargs):
    "`fit_cyclical`, with accuracy and the distance to the first cycle's mask at each cycle's end"
    learn = run.learner(**start, trained=run.scale.dense)
    learn.fit_cyclical(cycles, run.epochs//cycles, run.sparsity, lr_max=1e-2, track=True, **kwargs)
    at = {n: learn.recorder.metric_names.index(n)-1 for n in ('accuracy', 'mask_distance')}
    ends = learn.recorder.values[run.epochs//cycles-1::run.epochs//cycles]
    rows = [(str(c), w, float(v)) for c, e in enumerate(ends, 1) for w, v in (('cycle accuracy', 100*e[at['accuracy']]), ('mask distance', e[at['mask_distance']]))]
    return rows+result(learn)


METHODS['cyclical'] = by_cycle

sparsities, methods = (0.9, 0.95, 0.98, 0.99), ('one-shot', 'gradual', 'cyclical')


def epochs(scale): return 5*scale.epochs_of(20)
def needs(scale): return dense_cells('resnet20', scale)
def cells(scale, df):
    return [*(Cell('resnet20', m, s, epochs(scale), seed) for seed in range(scale.seeds) for s in reversed(sparsities) for m in methods),
            *dense_cells('resnet20', scale, range(1, scale.seeds))]
