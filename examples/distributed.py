"""Pruning, tickets and linear paths in several processes: `torchrun --nproc_per_node 2 examples/distributed.py out`

The processes use CPUs, or one GPU each. Each process trains on its part of each batch, and all have the same masks, to
the bit."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import torch
from fastai.basics import SGD, CrossEntropyLossFlat, Learner, accuracy, rank_distrib, set_seed

from fastprune.all import (
    DPF,
    STR,
    Checkpoint,
    RigL,
    SparsifyCallback,
    digits_convnet,
    digits_dls,
    fisher,
    grasp,
    random_score,
    snip,
    synflow,
    taylor,
    wanda,
)

importlib.import_module('fastai.distributed')  # adds learn.distrib_ctx


def learner():
    return Learner(
        digits_dls(bs=32),
        digits_convnet(widths=(8, 16, 16)),
        loss_func=CrossEntropyLossFlat(),
        opt_func=partial(SGD, mom=0.9),
        metrics=accuracy,
        path=out,
    )


def fit(learn, cbs):
    learn.fit_one_cycle(1, 0.05, cbs=cbs)


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(2 if rank_distrib() else 'usage: torchrun --nproc_per_node 2 examples/distributed.py FOLDER')
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    set_seed(rank_distrib())  # different random numbers in each process
    learn = learner()
    with learn.distrib_ctx(sync_bn=False):
        for name, cb in dict(
            OCP=SparsifyCallback(0.9, scope='global'),
            taylor=SparsifyCallback(0.9, criterion=taylor, interval=3),
            DPF=DPF(0.8, interval=4),
            RigL=RigL(0.8, interval=5),
            STR=STR(0.8, s_init=-5, decay=0.1),
        ).items():
            learn.remove_masks()
            learn.model.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)
            learn.fit_one_cycle(2, 0.05, cbs=[cb, Checkpoint(name)])
            learn.masks.save(out / f'{name}_{rank_distrib()}.safetensors')
        for criterion in (snip, grasp, fisher, wanda, synflow, random_score):
            learn.remove_masks()
            learn.prune(0.9, criterion=criterion, exclude='0*')
            learn.masks.save(out / f'{criterion.__name__}_{rank_distrib()}.safetensors')
        learn.remove_masks()
        tickets = learn.find_tickets(1, fit, 0.5, folder=out / 'tickets')
        path = learn.linear_path(tickets[0].state, tickets[1].state, n=3)
        stable = learn.instability(tickets[1], fit, n=3)
        (out / f'path_{rank_distrib()}.json').write_text(
            json.dumps([*map(float, path.losses), *map(float, path.metrics['accuracy']), float(stable.instability)])
        )
        tickets[1].save(out / 'ticket.safetensors')
