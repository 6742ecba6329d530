"The networks of the tables, and what each needs to be trained"

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import airbench
from fastai.basics import noop

from fastprune.all import cifar_resnet


def one_cycle(learn, epochs):
    learn.fit_one_cycle(epochs, 0.2, pct_start=0.3, div=10)


@dataclass(frozen=True)
class Network:
    "How it is built, and how it is trained as well as the epochs allow"

    build: Callable
    start: dict = field(default_factory=lambda: dict(bs=128, wd=5e-4))  # of `Run.learner`; the batch at every scale
    fit: Callable = one_cycle  # (learn, epochs)
    batches: Callable = noop  # changes the DataLoaders
    ready: Callable = noop  # changes the Learner, before all else
    no_zeros: Callable = noop  # the same, where a table prunes from scratch
    scaled: bool = False  # does the paper scale its images up?
    pixels: int | None = None  # a side of its images, where they are scaled down
    moves_weights: bool = False  # more than images, on a CPU, which then is faster in float32 and not compiled
    compiles: bool = True  # is it faster on a CPU when compiled?


def resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


NETWORKS = {
    # steps (batches of 16) take 124 ms as they are, 145 with `Precision`, 138 compiled
    'resnet18': Network(resnet18, scaled=True, moves_weights=True, compiles=False),
    'resnet20': Network(partial(cifar_resnet, 20)),
    # a step of 32 images takes 46 ms, and 153 ms of 32 pixels a side
    'resnet20, 16 pixels': Network(partial(cifar_resnet, 20), pixels=16),
    'resnet56': Network(partial(cifar_resnet, 56)),
    # steps of 500 images take 0.67 s, and 0.81 s compiled
    airbench.NAME: Network(
        airbench.build,
        dict(bs=airbench.BATCH, opt=airbench.nesterov),
        airbench.fit,
        airbench.shift_less,
        airbench.whiten,
        airbench.random_filters,
        compiles=False,
    ),
}
