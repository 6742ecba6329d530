"For test_distributed, in all processes of a group: low-rank terms are the same everywhere"

import importlib

import torch
from distributed import in_group, learner
from fastai.basics import Callback, num_distrib
from fastai.callback.all import GradientAccumulation, GradientClip

from fastprune.core.names import unwrap

importlib.import_module('fastai.distributed')  # adds learn.distrib_ctx


def everywhere(t):
    "Is a tensor the same in each process?"
    every = [torch.empty_like(t) for _ in range(num_distrib())]
    torch.distributed.all_gather(every, t.detach().contiguous())
    return all(torch.equal(o, every[0]) for o in every)


class Same(Callback):
    order, run_valid, steps, items = 99, False, 0, []

    def after_batch(self):
        self.items = [*self.items, self.x.sum().item()]

    def after_step(self):
        terms = self.low_rank.terms
        assert terms and all(everywhere(p) for t in terms.values() for p in (*t.parameters, t.first, t.weight))
        self.steps += 1


def retrain(out):
    learn, same = learner(out, bs=64), Same()
    learn.create_opt()
    learn.prune(0.8)
    with in_group(learn):
        cbs = [same, GradientClip(1.0), GradientAccumulation(128)]
        learn.retrain(1, history=[0.05], params='lora', rank=3, cbs=cbs)
    weights = dict(unwrap(learn.model).named_parameters())
    assert same.steps >= 2 and not everywhere(torch.tensor(same.items))
    assert all((weights[n][~m] == 0).all() for n, m in learn.masks.items())
    assert 'parameters' not in vars(learn) and all(p.requires_grad for p in weights.values())
