"float16 whose gradients overflow, and compiled models"

import torch
from fastai.basics import Callback, Learner, OptimWrapper, partial
from fastai.callback.fp16 import AMPMode, MixedPrecision
from overhead import make, same_batches
from torch import nn

from fastprune.all import SparsifyCallback, prunable_weights

from .run import verdict


class CountSkipped(Callback):
    "How many steps were skipped, because gradients overflowed"

    n = 0

    def after_cancel_step(self):
        self.n += 1


def is_exact(learn, sparsity):
    "Have masks and weights exactly as many zeros as asked for?"
    masks = learn.masks
    weights = prunable_weights(learn.model)
    counts = {n: round(sparsity * m.numel()) for n, m in masks.items()}
    return all(int((~m).sum()) == counts[n] for n, m in masks.items()) and all(
        not bool((weights[n].detach()[~m] != 0).any()) for n, m in masks.items()
    )


def learner(run, model, steps, cbs=()):
    torch.manual_seed(0)
    return Learner(
        same_batches(steps, 32, 32, run.device),
        model.to(run.device),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        cbs=list(cbs),
    )


def fit(learn, *cbs):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3, cbs=list(cbs))


def halves(run, check):
    steps = 6 if run.small else 40
    modes = {'float16': MixedPrecision(init_scale=2.0**26), 'bfloat16': MixedPrecision(amp_mode=AMPMode.BF16)}
    for name, cb in modes.items():
        skipped = CountSkipped()
        cbs = [skipped] if run.device == 'cpu' else [cb, skipped]
        learn = learner(run, make('torchvision resnet18'), steps, cbs)
        fit(learn, SparsifyCallback(0.9, interval=1))
        overflows = skipped.n > 0 or name == 'bfloat16' or run.device == 'cpu'
        check(
            name,
            verdict(is_exact(learn, 0.9) and overflows),
            f'{skipped.n} steps skipped, sparsity {learn.masks.sparsity}',
        )


def compiled(run, check):
    for way in ('wrapped', 'in place'):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
        )
        model(torch.zeros(1, 3, 32, 32))
        backend = 'eager' if run.device == 'cpu' else 'inductor'
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if way == 'wrapped':
            model = torch.compile(model, backend=backend)
        else:
            model.compile(backend=backend)
        learn = learner(run, model, 8)
        fit(learn, SparsifyCallback(0.8, interval=2))
        graphs = torch._dynamo.utils.counters['stats'].get('unique_graphs')
        check(f'torch.compile, {way}', verdict(is_exact(learn, 0.8)), f'{graphs} graphs')


def precision(run):
    check = run.checks('precision')
    for part in (halves, compiled):
        try:
            part(run, check)
        except Exception as e:
            check(part.__name__, 'FAILED', f'{type(e).__name__}: {e}'[:500])
