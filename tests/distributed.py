"""For test_distributed, in all processes of a group: a fit that is stopped goes on, to the bit; masks are the same
everywhere; what each process evaluates of a path; fits that find tickets, have a teacher, or retrain. `first` or
`again` is the part that is run"""

import contextlib
import importlib
import json
import random
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy, num_distrib, rank_distrib, set_seed
from torch import nn

from fastprune.all import (
    CRITERIA,
    Checkpoint,
    RigL,
    SparsifyCallback,
    Ticket,
    digits_convnet,
    digits_dls,
    linear,
    taylor,
)
from fastprune.core.names import unwrap

importlib.import_module('fastai.distributed')  # adds learn.distrib_ctx
rank = rank_distrib()


class Crash(Callback):
    def after_step(self):
        if (self.epoch, self.iter) == (1, 5):
            raise RuntimeError('power is out')


class Count(Callback):
    "Of validation: how many items this process has seen"

    n = 0

    def after_pred(self):
        if not self.training:
            self.n += len(self.x)


class Same(Callback):
    "After every step all processes have the same masks, and names are those of the model by itself"

    order, run_valid, changes, last = 99, False, 0, None

    def after_step(self):
        masks = self.learn.masks
        if masks is self.last:
            return
        mine = {n: zlib.crc32(m.numpy().tobytes()) for n, m in masks.items()}
        every = [None] * num_distrib()
        torch.distributed.all_gather_object(every, mine)
        assert all(o == mine for o in every) and not any('module.' in n for n in mine)
        self.last, self.changes = masks, self.changes + 1


def fresh(module):
    if hasattr(module, 'reset_parameters'):
        module.reset_parameters()


def learner(out, bs=64, **data):
    set_seed(7 + rank, reproducible=True)  # not the same random numbers in each process
    model = nn.Sequential(digits_convnet(widths=(8, 16, 16))[:-1], nn.Dropout(0.2), nn.Linear(16, 10))
    torch.manual_seed(3)
    model.apply(fresh)
    return Learner(
        digits_dls(bs=bs, device='cpu', **data),
        model,
        loss_func=CrossEntropyLossFlat(),
        opt_func=partial(SGD, mom=0.9),
        metrics=accuracy,
        path=out,
    )


def fit(learn, cbs):
    learn.fit_one_cycle(1, 0.05, cbs=cbs)


@contextlib.contextmanager
def in_group(learn, **kwargs):
    with learn.distrib_ctx(sync_bn=False, **kwargs), learn.no_bar(), learn.no_logging():
        yield learn


METHODS = dict(OCP=partial(SparsifyCallback, criterion=taylor), RigL=partial(RigL, interval=5))
# else DDP sums up in another order after its first batch, which three and more numbers show in their last bits
SAME_ORDER = dict(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])


def fits(out, part):
    "Fits that are not stopped (`whole`), that are (`stopped`), and that go on (`again`)"
    for name, method in METHODS.items():
        learn, cbs = learner(out, bs=24, valid_pct=0.05, test_pct=0.7), [method(0.8)]  # 9 steps in each epoch
        if part == 'again':
            random.seed(99)
            np.random.seed(99)
            torch.manual_seed(99)
        cbs += [Checkpoint(f'run {name}')] if part != 'whole' else []
        cbs += [Crash()] if part == 'stopped' else []
        with in_group(learn, **SAME_ORDER):
            try:
                learn.fit_one_cycle(2, 0.02, cbs=cbs)
            except RuntimeError as e:
                assert 'power is out' in str(e) and part == 'stopped'
            state = unwrap(learn.model).state_dict()
        if part != 'stopped':
            torch.save({**state, **{f'mask {n}': m for n, m in learn.masks.items()}}, out / f'{name} {part} {rank}.pth')


def same_masks(out):
    for name, criterion in CRITERIA.items():
        learn, same = learner(out, bs=24, valid_pct=0.05, test_pct=0.85), Same()  # 4 steps
        with in_group(learn):
            cb = SparsifyCallback(0.8, schedule=linear, criterion=criterion, interval=2, scope='global')
            learn.fit(1, 0.02, cbs=[cb, same])
        assert same.changes >= 2 and abs(learn.masks.sparsity - 0.8) < 1e-3, name


def statistics(out):
    "BatchNorm's, over the batches of all processes"
    learn, seen = learner(out), []
    bn = learn.model[0][0][1]
    bn.register_forward_pre_hook(lambda m, x: seen.append(x[0].mean((0, 2, 3))))
    with in_group(learn):
        learn.prune(0.5, recalibrate=3)
        every = [None] * num_distrib()
        torch.distributed.all_gather_object(every, (torch.stack(seen).mean(0), bn.running_mean))
    means, running = zip(*every, strict=True)
    assert len(seen) == 3 and all(torch.equal(o, running[0]) for o in running)
    assert torch.allclose(running[0], torch.stack(means).mean(0), atol=1e-6)
    assert not any(torch.equal(o, means[0]) for o in means[1:])


def search(out):
    """Tickets, the path between two of them, and how stable one is; the search is then done, whatever weights a
    process begins with"""
    learn, count = learner(out), Count()
    with in_group(learn):
        tickets = learn.find_tickets(2, fit, 0.5, folder=out / 'tickets')
        learn.add_cb(count)
        path = learn.linear_path(tickets[0].state, tickets[2].state, n=3)
        seen = count.n
        stable = learn.instability(tickets[1], fit, n=3)
    numbers = dict(
        seen=seen,
        losses=list(map(float, path.losses)),
        instability=float(stable.instability),
        sparsity=[t.sparsity for t in tickets],
        accuracy=[float(t.metrics['accuracy']) for t in tickets],
    )
    (out / f'numbers {rank}.json').write_text(json.dumps(numbers))
    masks = {f'{i} {n}': m for i, t in enumerate(tickets) for n, m in (t.masks or {}).items()}
    torch.save(masks, out / f'tickets {rank}.pth')
    for i, t in enumerate(tickets):
        t.save(out / f'ticket {i}.safetensors')
    learn = learner(out)
    if rank:
        learn.model.apply(fresh)  # the first process's count
    with in_group(learn):
        again = learn.find_tickets(2, fit, 0.5, folder=out / 'tickets')
    assert [t.masks for t in again] == [t.masks for t in tickets]


def losses_alone(out):
    "The losses of the same path in one process"
    learn, (a, b) = learner(out), [Ticket.load(out / f'ticket {i}.safetensors') for i in (0, 2)]
    with learn.no_bar(), learn.no_logging():
        path = learn.linear_path(a.state, b.state, n=3)
    return list(map(float, path.losses))


if __name__ == '__main__':
    torch.set_num_threads(1)
    out, part = Path(sys.argv[1]), sys.argv[2]
    if part == 'first':
        fits(out, 'whole')
        fits(out, 'stopped')
        same_masks(out)
        statistics(out)
        search(out)
        for name in ('distill', 'retrain'):  # these import this file
            getattr(importlib.import_module(f'distributed_{name}'), name)(out)
    else:
        fits(out, 'again')
