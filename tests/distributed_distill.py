"""For test_distill, in both processes of a group: gradients are the mean of those by hand in each process, adapters
are the same everywhere, and a fit that was stopped goes on, to the bit"""

import importlib
import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import DistributedDataParallelKwargs
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, rank_distrib, set_seed
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
            assert torch.allclose(p.grad / 2, q.grad, atol=1e-6)


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


if __name__ == '__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    torch.save(train(out, 'whole'), out / f'whole {rank_distrib()}.pth')
    try:
        train(out, 'stopped', Crash(1, 2))
    except RuntimeError as e:
        assert 'power is out' in str(e)
    torch.save(train(out, 'again'), out / f'again {rank_distrib()}.pth')
