"For test_distributed: a fit that is stopped in all processes goes on, to the bit; what each process evaluates of a path; fits that find tickets. `whole`, `stopped`, `again` or `alone` is the part that is run"

import json
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from fastai.basics import *
from fastai.distributed import *

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
    unwrap,
)

out, part = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
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


def learner(bs=64):
    set_seed(7 + rank, reproducible=True)  # not the same random numbers in each process
    model = nn.Sequential(digits_convnet(widths=(8, 16, 16))[:-1], nn.Dropout(0.2), nn.Linear(16, 10))
    torch.manual_seed(3), model.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)
    return Learner(
        digits_dls(bs=bs, device='cpu'),
        model,
        loss_func=CrossEntropyLossFlat(),
        opt_func=partial(SGD, mom=0.9),
        metrics=accuracy,
        path=out,
    )


def fit(learn, cbs):
    learn.fit_one_cycle(1, 0.05, cbs=cbs)


for name, cb in (
    dict(OCP=partial(SparsifyCallback, criterion=taylor), RigL=partial(RigL, interval=5)).items()
    if part != 'alone'
    else ()
):
    learn = learner()
    if part == 'again':
        random.seed(99), np.random.seed(99), torch.manual_seed(99)
    # else DDP sums up in another order after its first batch, which three and more numbers show in their last bits
    same_order = DistributedDataParallelKwargs(find_unused_parameters=True)
    with learn.distrib_ctx(sync_bn=False, kwargs_handlers=[same_order]), learn.no_bar(), learn.no_logging():
        try:
            learn.fit_one_cycle(
                3,
                0.02,
                cbs=[
                    cb(0.8),
                    *([Checkpoint(f'run {name}')] if part != 'whole' else []),
                    *([Crash()] if part == 'stopped' else []),
                ],
            )
        except RuntimeError as e:
            assert 'power is out' in str(e) and part == 'stopped'
        state = unwrap(learn.model).state_dict()
    if part != 'stopped':
        torch.save({**state, **{f'mask {n}': m for n, m in learn.masks.items()}}, out / f'{name} {part} {rank}.pth')


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


if part == 'whole':
    for name, criterion in CRITERIA.items():
        learn, same = learner(bs=256), Same()
        with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging():
            learn.fit(
                1,
                0.02,
                cbs=[SparsifyCallback(0.8, schedule=linear, criterion=criterion, interval=2, scope='global'), same],
            )
        assert same.changes >= 2 and abs(learn.masks.sparsity - 0.8) < 1e-3, name
    learn, count = learner(), Count()
    with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging():
        tickets = learn.find_tickets(2, fit, 0.5, folder=out / 'tickets')
        learn.add_cb(count)
        path = learn.linear_path(tickets[0].state, tickets[2].state, n=3)
        seen = count.n
        stable = learn.instability(tickets[1], fit, n=3)
    (out / f'numbers {rank}.json').write_text(
        json.dumps(
            dict(
                seen=seen,
                losses=list(map(float, path.losses)),
                instability=float(stable.instability),
                sparsity=[t.sparsity for t in tickets],
                accuracy=[float(t.metrics['accuracy']) for t in tickets],
            )
        )
    )
    torch.save(
        {f'{i} {n}': m for i, t in enumerate(tickets) for n, m in (t.masks or {}).items()}, out / f'tickets {rank}.pth'
    )
    for i, t in enumerate(tickets):
        t.save(out / f'ticket {i}.safetensors')
    learn = learner()
    if rank:
        learn.model.apply(
            lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None
        )  # the first process's count
    with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging():
        again = learn.find_tickets(2, fit, 0.5, folder=out / 'tickets')
    assert [t.masks for t in again] == [t.masks for t in tickets]

if part == 'alone':  # the same path in one process
    learn, (a, b) = learner(), [Ticket.load(out / f'ticket {i}.safetensors') for i in (0, 2)]
    with learn.no_bar(), learn.no_logging():
        path = learn.linear_path(a.state, b.state, n=3)
    (out / 'alone.json').write_text(json.dumps(list(map(float, path.losses))))
