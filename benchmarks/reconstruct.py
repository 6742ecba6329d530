"""Accuracy of a trained ResNet-20 that is pruned in one shot: with nothing after it, with BatchNorm's statistics
estimated again, with the kept weights reconstructed, and with both.
`python benchmarks/reconstruct.py --data FOLDER_OF_CIFAR10 --weights resnet20.pth [--device cuda]`.
The network is trained first unless the file of weights exists"""

import argparse
import itertools
import time
import warnings
from pathlib import Path

import torch
from common import quiet, synchronize, write
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, noop, set_seed
from fastai.callback.progress import ProgressCallback

from fastprune.all import CRITERIA, cifar10_dls, cifar_resnet

warnings.filterwarnings('ignore')


def learner(args):
    dls = cifar10_dls(args.data, bs=args.bs, n_train=args.images, n_test=args.test, device=args.device)
    learn = Learner(dls, cifar_resnet(20).to(args.device), CrossEntropyLossFlat(), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def reached(learn):
    "Accuracy in percent"
    with quiet():
        return 100 * float(learn.validate()[1])


def trained(learn, args):
    "The state of the trained network, from the file or from a training that writes it"
    if not args.weights.exists():
        set_seed(args.seed)
        with quiet():
            learn.fit_one_cycle(args.epochs, args.lr)
        torch.save(learn.model.state_dict(), args.weights)
    state = torch.load(args.weights, map_location=args.device, weights_only=True)
    return {n: t.clone() for n, t in state.items()}


def sides(args):
    "Name -> further arguments of `learn.prune`"
    again, fit = dict(recalibrate=args.recalibrate), dict(reconstruct=args.batches)
    return {'nothing': {}, 'recalibrate': again, 'reconstruct': fit, 'reconstruct, recalibrate': again | fit}


def run(learn, state, args, sparsity, criterion, more):
    "Accuracy, and seconds of one thread on a CPU, of one way to prune"
    learn.remove_masks()
    learn.model.load_state_dict(state)
    set_seed(args.seed)
    needs_data = {} if criterion == 'magnitude' else dict(n_batches=args.batches)
    clock = time.process_time if args.device == 'cpu' else time.perf_counter
    synchronize()
    start = clock()
    learn.prune(sparsity, CRITERIA[criterion], args.scope, **needs_data, **more)
    synchronize()
    taken = clock() - start
    return reached(learn), taken


def main(args):
    torch.set_num_threads(1)
    learn, rows = learner(args), []
    state = trained(learn, args)
    learn.model.load_state_dict(state)
    kind = dict(scope=args.scope, batches=args.batches, again=args.recalibrate, bs=args.bs)
    rows.append(dict(criterion='', sparsity=0.0, side='dense', accuracy=round(reached(learn), 2), seconds=0.0, **kind))
    print(rows[0], flush=True)
    for criterion, sparsity, (side, more) in itertools.product(args.criteria, args.sparsities, sides(args).items()):
        result, taken = run(learn, state, args, sparsity, criterion, more)
        row = dict(criterion=criterion, sparsity=sparsity, side=side, accuracy=round(result, 2))
        rows.append(row | dict(seconds=round(taken, 2)) | kind)
        print(*row.values(), f'{taken:.1f} s', flush=True)
        write('reconstruct', rows, args.device)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--data', required=True)
    p.add_argument('--weights', type=Path, required=True, help='file of the trained weights')
    p.add_argument('--sparsities', type=float, nargs='+', default=[0.6, 0.7, 0.8, 0.9, 0.95])
    p.add_argument('--criteria', nargs='+', default=['magnitude', 'wanda', 'obs'])
    p.add_argument('--scope', default='local')
    p.add_argument('--batches', type=int, default=16, help='training batches of reconstruction and criteria')
    p.add_argument('--recalibrate', type=int, default=50, help='training batches of recalibration')
    p.add_argument('--bs', type=int, default=128)
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--lr', type=float, default=1e-2)
    p.add_argument('--images', type=int, help='training images; all if not given')
    p.add_argument('--test', type=int, help='test images; all if not given')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cpu')
    main(p.parse_args())
