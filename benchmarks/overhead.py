"""Time of `fit_one_cycle` with One-Cycle Pruning to 90% over plain training, fastprune and fasterai in turn in one
process. `python benchmarks/overhead.py [--device cuda] [--rounds 5] [--batches 40] [--bs 64] [--defaults]`.

On a CPU the network is ResNet-18 on 32x32 images. `--defaults` measures only the default intervals of trainings of 200
and of 5,000 iterations against plain training, without fasterai. A run is a part of such a training with the same
interval, so its steps cost the same. On a GPU the networks are those of `GPU_SETUPS`; each batch is the same one, which
lies on the GPU already"""

import math
import warnings
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

warnings.filterwarnings('ignore')
import torch
from common import Rows, here, interleaved, quiet, spread
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, TfmdDL, set_seed
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastcore.script import call_parse
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastprune.all import SparsifyCallback
from fastprune.zoo.data import TensorData

HAS_FASTERAI = find_spec('fasterai') is not None


class Setup(NamedTuple):
    "A training to measure"

    network: str  # 'torchvision' or 'timm', and the name of the network there
    bs: int
    px: int  # Images are px x px
    batches: int  # In a run
    bf16: bool = False  # bfloat16 by autocast, in channels_last


GPU_SETUPS = {
    'ResNet-18, 32 px, batch 64, float32': Setup('torchvision resnet18', 64, 32, 60),
    'ResNet-50, 224 px, batch 64, bfloat16': Setup('torchvision resnet50', 64, 224, 40, bf16=True),
    'ViT-S, 224 px, batch 128, bfloat16': Setup('timm vit_small_patch16_224', 128, 224, 40, bf16=True),
}
SMALL_SETUPS = {'ResNet-18, 32 px, batch 4, float32': Setup('torchvision resnet18', 4, 32, 2)}


def make(network):
    "A network with 10 classes, by its library and name"
    library, name = network.split()
    if library == 'timm':
        import timm

        return timm.create_model(name, num_classes=10)
    from torchvision import models

    return getattr(models, name)(num_classes=10)


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
    return Learner(dls, make('torchvision resnet18'), loss_func=CrossEntropyLossFlat())


class SameBatch(Dataset):
    "`n` times the same random batch, which lies on its device"

    def __init__(self, n, bs, px, device):
        self.n = n
        self.batch = torch.randn(bs, 3, px, px, device=device), torch.randint(10, (bs,), device=device)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        return self.batch


def same_batches(n, bs, px, device):
    "DataLoaders of a training on `n` batches and a validation on one"
    return DataLoaders(*(DataLoader(SameBatch(k, bs, px, device), batch_size=None) for k in (n, 1)))


def learner_on(device, setup):
    "A Learner with AdamW, whose model and data are on `device`"
    set_seed(0)
    learn = Learner(
        same_batches(setup.batches, setup.bs, setup.px, device),
        make(setup.network).to(device),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
    )
    if setup.bf16:
        learn.add_cbs([MixedPrecision(amp_mode=AMPMode.BF16), ChannelsLast()])
    return learn


def side(learn, callback, lr=1e-3, masks=False):
    "A function that trains once. `masks`: leave those that the Learner has"

    def run():
        if not masks:
            learn.remove_masks()
        with quiet(), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, lr, cbs=callback())

    return run


def by_interval(scope, interval):
    return lambda: SparsifyCallback(0.9, scope=scope, interval=interval, initial=0.0)


def every_side(with_fasterai=True):
    "The measured sides, plain training first"
    sides = {'plain training': lambda: None}
    for scope in ('local', 'global'):
        for interval in (10, 1):
            sides[f'fastprune, {scope}, interval {interval}'] = by_interval(scope, interval)
        if with_fasterai:
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


def add_rows(rows, network, times, batches, bs):
    "A row for each side; ratios are paired, round by round, with the first side"
    plain = next(iter(times.values()))
    for n, ts in times.items():
        med, lo, hi = (round(1000 * t / batches, 2) for t in spread(ts))
        ratio = round(spread([a / b for a, b in zip(ts, plain, strict=True)])[0], 3)
        counts = dict(runs=len(ts), batches=batches, bs=bs)
        rows.add(network=network, side=n, ms_per_batch=med, min=lo, max=hi, ratio=ratio, **counts)


def measure(device, setups, rounds, out=here, left=lambda: math.inf):
    "Overheads of trainings that are on `device` with all that they need. They share the seconds that are `left()`"
    rows = Rows('overhead', device, out)
    for i, (network, setup) in enumerate(setups.items()):
        sides = {n: side(learner_on(device, setup), cb, 1e-4) for n, cb in every_side(HAS_FASTERAI).items()}
        masked = learner_on(device, setup)
        masked.prune(0.9)
        sides['masks alone'] = side(masked, lambda: None, 1e-4, masks=True)
        limit = (left() - 5) / (len(setups) - i)
        add_rows(rows, network, interleaved(sides, rounds, limit), setup.batches, setup.bs)
        del sides, masked
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@call_parse
def main(
    rounds: int = 5,  # Timed runs of each side
    batches: int = 40,  # Batches in a run, on a CPU
    bs: int = 64,  # Batch size, on a CPU
    defaults: bool = False,  # Measure only the default intervals, on a CPU?
    device: str = 'cpu',  # 'cpu' or 'cuda'
):
    "Write overhead.csv"
    if device != 'cpu':
        return measure(device, GPU_SETUPS, rounds)
    sides = default_sides() if defaults else every_side(HAS_FASTERAI)
    runs = {n: side(learner(batches, bs), cb) for n, cb in sides.items()}
    if not defaults:
        masked = learner(batches, bs)
        masked.prune(0.9)
        runs['masks alone'] = side(masked, lambda: None, masks=True)
    times = interleaved(runs, rounds)
    add_rows(Rows('overhead'), f'ResNet-18, 32 px, batch {bs}', times, batches, bs)
