"""Time of `fit_one_cycle` with One-Cycle Pruning to 90% over plain training: ResNet-18, 32x32 images, fastprune and
fasterai in turn in one process. `python benchmarks/overhead.py [--rounds 5] [--batches 40] [--bs 64] [--defaults]`.
`--defaults` measures only the default intervals of trainings of 200 and of 5,000 iterations against plain training,
without fasterai, and keeps the other rows. A run is a part of such a training with the same interval, so its steps
cost the same"""

import csv
import warnings

warnings.filterwarnings('ignore')
import torch
from common import here, interleaved, quiet, spread, write
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL, set_seed
from fastcore.script import call_parse
from torch import nn
from torchvision.models import resnet18

from fastprune.all import SparsifyCallback
from fastprune.zoo.data import TensorData


def fasterai(scope):
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import one_cycle
    from fasterai.sparse.sparsify_callback import SparsifyCallback

    return SparsifyCallback(0.9, 'weight', scope, large_final, one_cycle, layer_type=(nn.Conv2d, nn.Linear))


def learner(batches, bs):
    set_seed(0)
    data = lambda n: TensorData(torch.rand(n, 3, 32, 32), torch.randint(10, (n,)), list(range(10)))
    dls = DataLoaders(
        TfmdDL(data(batches * bs), bs=bs, shuffle=True, num_workers=0), TfmdDL(data(bs), bs=bs, num_workers=0)
    )
    return Learner(dls, resnet18(num_classes=10), loss_func=CrossEntropyLossFlat())


def side(make, batches, bs):
    learn = learner(batches, bs)

    def run():
        learn.remove_masks()
        with quiet(), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3, cbs=make())

    return run


def by_interval(scope, interval):
    return lambda: SparsifyCallback(0.9, scope=scope, interval=interval, initial=0.0)


def every_side():
    "The measured sides, plain training first"
    sides = {'plain training': lambda: None}
    for scope in ('local', 'global'):
        for interval in (10, 1):
            sides[f'fastprune, {scope}, interval {interval}'] = by_interval(scope, interval)
        sides[f'fasterai, {scope}'] = lambda s=scope: fasterai(s)
    return sides


def default_sides():
    "The sides with default intervals, which depend on the length of the training"
    sides = {'plain training, beside the defaults': lambda: None}
    for scope in ('local', 'global'):
        for n in (200, 5000):
            sides[f'fastprune, {scope}, default of {n:,} iterations: interval {max(1, n // 1000)}'] = by_interval(
                scope, max(1, n // 1000)
            )
    return sides


def others(rows):
    "Rows of overhead.csv that the new rows do not replace"
    with open(here / 'overhead.csv', newline='') as f:
        return [r for r in csv.DictReader(f) if r['side'] not in {o['side'] for o in rows}]


@call_parse
def main(
    rounds: int = 5,  # Timed runs of each side
    batches: int = 40,  # Batches in a run
    bs: int = 64,  # Batch size
    defaults: bool = False,  # Measure only the default intervals?
):
    "Write overhead.csv"
    sides = default_sides() if defaults else every_side()
    times, rows = interleaved({n: side(f, batches, bs) for n, f in sides.items()}, rounds), []
    plain = times[next(iter(sides))]
    for n, ts in times.items():
        med, lo, hi = spread(ts)
        rows.append(
            dict(
                side=n,
                ms_per_batch=round(1000 * med / batches, 1),
                min=round(1000 * lo / batches, 1),
                max=round(1000 * hi / batches, 1),
                ratio=round(spread([a / b for a, b in zip(ts, plain, strict=True)])[0], 3),
                runs=rounds,
                batches=batches,
                bs=bs,
            )
        )
        print(rows[-1], flush=True)
    kept = others(rows)
    write('overhead', [*kept, *rows] if defaults else [*rows, *kept])
