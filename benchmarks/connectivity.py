"""Time of `linear_path` against forward passes and `validate`, time of `find_tickets` against plain fits, and the size
of a ticket on disk. `python benchmarks/connectivity.py [--rounds 5]`"""

import warnings

warnings.filterwarnings('ignore')
import copy
import os
import tempfile

import torch
from common import interleaved, quiet, spread, write
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL, accuracy, set_seed
from fastcore.script import call_parse
from torch.nn import functional as F
from torchvision.models import resnet18

from fastprune.learner.states import seed_round
from fastprune.zoo.data import TensorData


class Slow(TensorData):
    "Items that take time to load: random photographs, scaled down"

    def __getitem__(self, i):
        x = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(i))
        return F.interpolate(x, size=(32, 32), mode='bicubic')[0], self.y[i]


def learner(kind, n, bs):
    set_seed(0)
    data = lambda k: kind(torch.rand(k, 3, 32, 32), torch.randint(10, (k,)), list(range(10)))
    dls = DataLoaders(TfmdDL(data(n), bs=bs, shuffle=True, num_workers=0), TfmdDL(data(n), bs=bs, num_workers=0))
    return Learner(dls, resnet18(num_classes=10), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def restorer(learn):
    "A function that gives a Learner its present weights back, and no masks"
    first = copy.deepcopy(learn.model.state_dict())

    def again():
        learn.remove_masks()
        learn.model.load_state_dict(first)

    return again


def bare(learn, points):
    "Forward passes over batches in memory"
    batches = list(learn.dls.valid)

    def run():
        learn.model.eval()
        with torch.no_grad():
            for _ in range(points):
                for xb, _ in batches:
                    learn.model(xb)

    return run


def validate(learn, points):
    def run():
        with learn.no_bar(), learn.no_logging():
            for _ in range(points):
                learn.validate()

    return run


@call_parse
def main(
    rounds: int = 5,  # Timed runs of each side
    points: int = 11,  # Number of points on a path
    batches: int = 40,  # Batches in a round
):
    "Write connectivity.csv"
    rows = []

    def compare(what, sides, target, of):
        times = interleaved(sides, rounds)
        for side, ts in times.items():
            med, lo, hi = spread(ts)
            ratio = spread([a / b for a, b in zip(ts, times[of], strict=True)])[0]
            rows.append(
                dict(
                    what=what,
                    side=side,
                    seconds=round(med, 2),
                    min=round(lo, 2),
                    max=round(hi, 2),
                    ratio=round(ratio, 3),
                    target='' if side == of else target,
                    runs=rounds,
                )
            )
            print(rows[-1], flush=True)

    learn = learner(TensorData, 512, 64)
    other = copy.deepcopy(learn.model.state_dict())
    for t in other.values():
        if t.is_floating_point():
            t.add_(0.01 * torch.randn_like(t))
    compare(
        f'{points} points, data in memory',
        {'linear_path': lambda: learn.linear_path(learn, other, n=points), 'forward passes': bare(learn, points)},
        1.15,
        'forward passes',
    )
    slow = learner(Slow, 256, 64)
    compare(
        f'{points} points, data to be made',
        {'linear_path': lambda: slow.linear_path(slow, other, n=points), 'validate': validate(slow, points)},
        0.5,
        'validate',
    )

    def fit(learn, cbs):
        with quiet(), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3, cbs=cbs)

    small = learner(TensorData, 64 * batches, 64)
    again = restorer(small)

    def tickets():
        again()
        with quiet():
            small.find_tickets(10, fit, measure='none')

    def plain():
        again()
        for m in range(10):
            small.opt = None
            seed_round(small, m)
            fit(small, [])

    compare(f'10 rounds of {batches} batches', {'find_tickets': tickets, 'plain fits': plain}, 1.05, 'plain fits')
    again()
    with tempfile.TemporaryDirectory() as d:
        with quiet():
            t = small.find_tickets(1, fit, 0.95, measure='none')[1]
        t.save(f'{d}/ticket')
        t.masks.save(f'{d}/masks')
        torch.save(t.state, f'{d}/dense')
        size = {n: os.path.getsize(f'{d}/{n}') for n in ('ticket', 'dense', 'masks')}
        size['one bit a weight'] = sum(m.numel() for m in t.masks.values()) // 8
    for side, of, target in (('ticket', 'dense', 1.05), ('masks', 'one bit a weight', 1.0)):
        rows.append(
            dict(
                what='bytes on disk, 95%',
                side=side,
                seconds='',
                min=size[side],
                max=size[of],
                ratio=round(size[side] / size[of], 4),
                target=target,
                runs=1,
            )
        )
        print(rows[-1])
    write('connectivity', rows)
