"""The network of the scale *trained*, and how it is trained: the layout of airbench (Jordan 2024, arXiv:2404.00498) at
half its width, which a CPU can train well"""

from functools import partial
from itertools import pairwise

import torch
from fastai.basics import LabelSmoothingCrossEntropyFlat, OptimWrapper
from fastai.callback.schedule import ParamScheduler, SchedLin, combine_scheds
from torch import nn
from torch.nn import functional as F

from fastprune.all import FlipAndShift

NAME = 'airbench-half'  # as the CSV has it
WIDTHS, SHIFT = (32, 128, 128), 2  # channels of the blocks; pixels that images are shifted by at most
BATCH, RATE, MOMENTUM, DECAY = 250, 0.4, 0.85, 1e-3


class Whiten(nn.Module):
    """Patches of 2x2 pixels along their principal axes, each divided by its standard deviation, with both signs. It is
    fixed, so its weights are no parameters, and never pruned"""

    def __init__(self, channels=3, size=2):
        super().__init__()
        n = channels * size**2
        self.register_buffer('weight', torch.zeros(2 * n, channels, size, size))

    def fit(self, x):
        "From images [n,channels,height,width]"
        n, size = len(self.weight) // 2, self.weight.shape[-1]
        patches = F.unfold(x, size).transpose(1, 2).reshape(-1, n)
        variances, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
        axes = (axes / (variances + 5e-4).sqrt()).T.reshape(n, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([axes, -axes]))

    def forward(self, x):
        return F.conv2d(x, self.weight)


def conv(n_in, n_out):
    "As many filters as there are channels pass them on at first"
    layer = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:n_in])
    return layer


def block(n_in, n_out):
    return nn.Sequential(
        conv(n_in, n_out), nn.MaxPool2d(2), nn.BatchNorm2d(n_out), nn.GELU(),
        conv(n_out, n_out), nn.BatchNorm2d(n_out), nn.GELU(),
    )  # fmt: skip


class Scaled(nn.Linear):
    "Its outputs are a ninth, as in airbench: the largest of 3x3 positions are large"

    def forward(self, x):
        return super().forward(x) / 9


def build(widths=WIDTHS):
    "For images of 32 pixels; its first layer has to be fit to some"
    first = Whiten()
    channels = [len(first.weight), *widths]
    blocks = [block(a, b) for a, b in pairwise(channels)]
    return nn.Sequential(first, nn.GELU(), *blocks, nn.MaxPool2d(3), nn.Flatten(), Scaled(widths[-1], 10, bias=False))


def random_filters(learn):
    """PyTorch's own first weights. Of `conv`'s, 94% are 0: a method that prunes while it trains would start there, and
    what a threshold zeroes gets no gradient"""
    for layer in learn.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()


def whiten(learn, images=2_000):
    "Fit the first layer to training images, normalised as the network gets them and not augmented"
    x = learn.dls.train_ds.x[:: max(1, len(learn.dls.train_ds.x) // images)]
    with torch.no_grad():
        learn.model[0].fit(normalised(learn.dls, x))


def normalised(dls, x):
    norm = next(t for t in dls.train.after_batch.fs if hasattr(t, 'mean'))
    return (x.float() / 255 - norm.mean) / norm.std


def shift_less(dls):
    "Images are shifted by 2 pixels at most instead of 4: for short trainings"
    next(t for t in dls.train.after_batch.fs if isinstance(t, FlipAndShift)).most = SHIFT


nesterov = partial(OptimWrapper, opt=torch.optim.SGD, nesterov=True, momentum=MOMENTUM)


def fit(learn, epochs):
    "A rate that rises for a quarter of the training and falls for the rest, with smoothed labels"
    learn.loss_func = LabelSmoothingCrossEntropyFlat(eps=0.2)
    rate = combine_scheds([0.25, 0.75], [SchedLin(0.2 * RATE, RATE), SchedLin(RATE, 0.02 * RATE)])
    learn.fit(epochs, RATE, wd=DECAY, cbs=ParamScheduler({'lr': rate}))
