"For test_distributed, in all processes of a group: channels that are cut, their values, and norms over the others"

import importlib
import sys
from functools import partial
from pathlib import Path

import torch
from channel_nets import Tower
from fastai.basics import SGD, CrossEntropyLossFlat, Learner, rank_distrib, set_seed
from torch import nn

from fastprune.all import SparsifyCallback, cyclical, digits_dls, linear
from fastprune.core.names import unwrap

importlib.import_module('fastai.distributed')  # adds learn.distrib_ctx


def train(out, norm):
    "Train with recovery, and return the state, masks, values and norms of this process"
    set_seed(7, reproducible=True)
    learn = Learner(
        digits_dls(bs=64, device='cpu'), Tower(norm), CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), path=out
    )
    with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging():
        cb = SparsifyCallback(0.5, cyclical(linear, 2), granularity='channel', track=True)
        learn.fit(2, 0.02, cbs=cb)
    model, cut = unwrap(learn.model), learn.keep_masks.cut
    return dict(
        weights=dict(model.named_parameters()),
        masks=dict(learn.masks),
        values={n: t for n, t in cut.state(learn.masks).items() if 'running' not in n},
        norms=[h.kept for m in model.modules() for h in m._forward_hooks.values()],
        kept=[int(k.sum()) for k in cut.kept],
        recovered=max(cb.recovered),
    )


if __name__ == '__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for name, norm in dict(batch=nn.BatchNorm2d, group=partial(nn.GroupNorm, 2)).items():
        torch.save(train(out, norm), out / f'{name} {rank_distrib()}.pth')
