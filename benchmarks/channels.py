"""Accuracy, FLOPs and latency of networks that lose channels while they train, at equal FLOPs and epochs: fastprune,
fasterai's PruneCallback and Torch-Pruning's MagnitudePruner, from the same trained networks.
`python benchmarks/channels.py --data FOLDER_OF_CIFAR10 [--models resnet20 mobilenet_v2] [--seeds 3] [--flops 0.5]`.
Each side's learning rate, and the peers' ratio that meets the FLOPs, are searched; the former on a part of the training
images, with the first seed"""

import argparse
import copy
import statistics
import warnings
from functools import partial
from pathlib import Path

import torch
from common import here, interleaved, machine, quiet, read_rows, spread, write_rows
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, noop, set_seed
from fastai.callback.progress import ProgressCallback
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastprune.all import SparsifyCallback, cifar10_dls, cifar_resnet

warnings.filterwarnings('ignore')
RATES = 3e-3, 1e-2
BATCH = 32  # images in a batch of training


def network(name):
    from torchvision.models import mobilenet_v2

    return _resnet20() if name == 'resnet20' else mobilenet_v2(num_classes=10)


def _resnet20():
    "ResNet-20 with convolutions as shortcuts (option B), since the peers can't follow channels that are padded"
    net = cifar_resnet(20)
    for block in net.modules():
        if (shortcut := getattr(block, 'shortcut', None)) is not None and not isinstance(shortcut, nn.Identity):
            conv = block.convs[0][0]
            c_in, c_out, stride = conv.in_channels, conv.out_channels, conv.stride
            block.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
    return net


def learner(dls, model, seed):
    set_seed(1000 + seed)
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


@torch.no_grad()
def flops_of(model):
    "FLOPs for one image, those of convolutions and linear layers, as torch counts them"
    with FlopCounterMode(display=False) as counted:
        copy.deepcopy(model).eval()(torch.randn(1, 3, 32, 32))
    return counted.get_total_flops()


# ---- sides: function of Learner, ratio, FLOPs, epochs and rate; each ends with the small model in the Learner


def ours(learn, ratio, flops, epochs, lr, scope='local'):
    learn.fit_one_cycle(epochs, lr, cbs=SparsifyCallback(flops=flops, scope=scope, granularity='channel', cost='flops'))
    learn.shrink(repeats=0)


def fasterai(learn, ratio, flops, epochs, lr):
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import one_cycle
    from fasterai.prune.prune_callback import PruneCallback

    example = torch.randn(1, 3, 32, 32)
    learn.fit_one_cycle(epochs, lr, cbs=PruneCallback(ratio, one_cycle, 'local', large_final, example_inputs=example))


def torch_pruning_pruner(model, ratio, steps=1):
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    return tp.pruner.MagnitudePruner(
        model,
        torch.randn(1, 3, 32, 32),
        tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
        iterative_steps=steps,
    )


def torch_pruning(learn, ratio, flops, epochs, lr):
    "As its README does: prune the trained network, then train on"
    torch_pruning_pruner(learn.model, ratio).step()
    learn.fit_one_cycle(epochs, lr)


SIDES = {
    'fastprune, local': ours,
    'fastprune, global': partial(ours, scope='global'),
    'fasterai PruneCallback': fasterai,
    'Torch-Pruning MagnitudePruner': torch_pruning,
}


def ratio_for(model, flops):
    "The smallest ratio at which Torch-Pruning, which fasterai calls, leaves at most this part of the FLOPs"
    low, high, dense = 0.0, 0.95, flops_of(model)
    for _ in range(12):
        ratio, small = (low + high) / 2, copy.deepcopy(model)
        torch_pruning_pruner(small, ratio).step()
        low, high = (low, ratio) if flops_of(small) <= flops * dense else (ratio, high)
    return high


def run(side, dls, state, args, model, seed, lr):
    "Accuracy in percent, part of the FLOPs, and the small network"
    net = network(model)
    net.load_state_dict(state)
    ratio, dense = ratio_for(net, args.flops), flops_of(net)
    learn = learner(dls, net, seed)
    with quiet():
        SIDES[side](learn, ratio, args.flops, args.epochs, lr)
        reached = 100 * float(learn.validate()[1])
    return reached, flops_of(learn.model) / dense, learn.model.eval()


def data(args, valid_pct=0.0):
    return cifar10_dls(args.data, bs=BATCH, n_train=args.images, n_test=args.test, valid_pct=valid_pct)


def trained(model, dls, epochs, seed):
    set_seed(seed)
    learn = learner(dls, network(model), seed)
    with quiet():
        learn.fit_one_cycle(epochs, 1e-2)
    return {k: v.clone() for k, v in learn.model.state_dict().items()}, 100 * float(learn.validate()[1])


def search(model, args):
    "The best of `RATES` for each side, on a fifth of the training images and with the first seed"
    dls = data(args, 0.2)
    state, _ = trained(model, dls, args.dense, 0)
    return {side: max(RATES, key=lambda lr: run(side, dls, state, args, model, 0, lr)[0]) for side in SIDES}


def train(model, args):
    "Rows of a network; the small networks of the first seed are kept in a folder, for `latencies`"
    found, reached = search(model, args), {}
    for seed in range(args.seeds):
        dls = data(args)
        state, base = trained(model, dls, args.dense, seed)
        net = network(model)
        net.load_state_dict(state)
        start = {'dense, as the sides start': (base, 1.0, net.eval())}
        for side, result in (start | {s: run(s, dls, state, args, model, seed, lr) for s, lr in found.items()}).items():
            reached.setdefault(side, []).append(result[:2])
            if not seed:
                torch.save(result[2], args.nets / f'{model} {side}.pt')
    rows = []
    for side, values in reached.items():
        scores = [s for s, _ in values]
        std = round(statistics.stdev(scores), 2) if len(scores) > 1 else ''
        row = dict(network=model, side=side, accuracy=round(statistics.mean(scores), 2), std=std, seeds=len(scores))
        row |= dict(each=' '.join(f'{s:.2f}' for s in scores), flops=round(max(p for _, p in values), 4))
        row |= dict(rate=found.get(side, ''), images=args.images, test=args.test, dense_epochs=args.dense)
        rows.append(row | dict(epochs=args.epochs, device='cpu', machine=machine()))
    old = [r for r in read_rows(here / 'channels.csv') if r['network'] != model]
    write_rows(here / 'channels.csv', [*old, *rows])


@torch.no_grad()
def latencies(args):
    "Milliseconds of a forward pass with one image and with 64, of each network in turns"
    rows = read_rows(here / 'channels.csv')
    for model in args.models:
        mine = {r['side']: r for r in rows if r['network'] == model}
        nets = {side: torch.load(args.nets / f'{model} {side}.pt', weights_only=False).eval() for side in mine}
        for n in (1, 64):
            x = torch.randn(n, 3, 32, 32)
            for side, ts in interleaved({k: partial(net, x) for k, net in nets.items()}, 40).items():
                mine[side][f'ms_{n}'] = round(1000 * spread(ts)[0], 3)
    write_rows(here / 'channels.csv', rows)


def main(args):
    args.nets.mkdir(parents=True, exist_ok=True)
    if not args.only_latency:
        for model in args.models:
            train(model, args)
    latencies(args)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--data', required=True)
    p.add_argument('--models', nargs='+', default=['resnet20', 'mobilenet_v2'])
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--flops', type=float, default=0.5)
    p.add_argument('--images', type=int, default=5_000)
    p.add_argument('--test', type=int, default=2_000)
    p.add_argument('--dense', type=int, default=12)
    p.add_argument('--epochs', type=int, default=6)
    p.add_argument('--nets', type=Path, default='nets', help='folder of the small networks')
    p.add_argument('--only-latency', action='store_true')
    main(p.parse_args())
