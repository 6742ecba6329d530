"""For test_distributed, in all processes of a group: gradients are the mean of those by hand in each process, adapters
are the same everywhere, and a fit that was stopped goes on, to the bit"""

import importlib
from copy import deepcopy

import torch
import torch.nn.functional as F
from accelerate import DistributedDataParallelKwargs
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, num_distrib, rank_distrib, set_seed
from helpers import SGDM, Crash

from fastprune.all import Checkpoint, Distill, SparsifyCallback, digits_convnet, digits_dls
from fastprune.core.names import unwrap
from fastprune.training.distill_layers import new_adapter

importlib.import_module('fastai.distributed')  # adds learn.distrib_ctx
# else DDP sums up in another order after its first batch
SAME_ORDER = dict(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])


class ByHand(Callback):
    "Compares the gradients of the first batch with a loop by hand"

    order, run_valid, compared = 90, False, False

    def __init__(self, teacher):
        self.of_teacher = teacher

    def before_batch(self):
        if not self.compared:
            self.start = deepcopy(unwrap(self.learn.model))

    def after_backward(self):
        if self.compared:
            return
        self.compared, found = True, {}
        model, teacher = self.start.train(), self.of_teacher.eval()
        for name, network in (('s', model), ('t', teacher)):
            network[1].register_forward_hook(lambda m, args, out, name=name: found.update({name: out}))
        s = model(self.x)
        with torch.no_grad():
            teacher(self.x)
        weight, bias = new_adapter(0, found['s'].detach(), found['t']).values()
        hint = F.mse_loss(F.conv2d(found['s'], weight[:, :, None, None], bias), found['t'])
        (F.cross_entropy(s, self.y) + hint).backward()
        adapters = self.learn.distill._run.adapters.parameters
        now = dict(unwrap(self.learn.model).named_parameters())
        pairs = [(p, now[n]) for n, p in model.named_parameters()]
        for p, q in [*pairs, *zip((weight, bias), adapters.values(), strict=True)]:
            torch.distributed.all_reduce(p.grad)
            assert torch.allclose(p.grad / num_distrib(), q.grad, atol=1e-6)


class Adapters(Callback):
    "After each batch"

    order, run_valid = 80, False

    def __init__(self):
        self.seen = []

    def after_batch(self):
        self.seen.append({n: p.detach().clone() for n, p in self.learn.distill._run.adapters.parameters.items()})


def train(out, part, *cbs):
    set_seed(7 + rank_distrib(), reproducible=True)  # not the same random numbers in each process
    torch.manual_seed(3)
    model, teacher = digits_convnet(widths=(4, 8, 8)), digits_convnet(widths=(4, 12, 8))
    learn = Learner(digits_dls(bs=128, device='cpu'), model, CrossEntropyLossFlat(), opt_func=SGDM, path=out)
    cbs = [SparsifyCallback(0.5), Distill(teacher, 'hint', layers='1'), look := Adapters(), *cbs]
    cbs += [ByHand(deepcopy(teacher))] if part == 'whole' else [Checkpoint('run')]
    with learn.distrib_ctx(sync_bn=False, **SAME_ORDER), learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.02, cbs=cbs)
    rows = torch.tensor([list(v) for v in learn.recorder.values])
    return {**unwrap(learn.model).state_dict(), **look.seen[-1], 'rows': rows}


def distill(out):
    whole = train(out, 'whole')
    try:
        train(out, 'stopped', Crash(1, 1))
    except RuntimeError as e:
        assert 'power is out' in str(e)
    again, every = train(out, 'again'), [None] * num_distrib()
    rows, of_again = whole.pop('rows'), again.pop('rows')
    torch.distributed.all_gather_object(every, (whole, rows))
    for n, t in whole.items():
        assert torch.equal(t, again[n]), n  # resumed to the bit
        assert all(torch.equal(t, o[n]) for o, _ in every) or 'running' in n, n
    assert all(torch.equal(r[:, -2:], rows[:, -2:]) for r in (of_again, *(r for _, r in every)))
