"""Cyclical Pruning's tables 2 and 5 at one sparsity, with the paper's epochs, on one large GPU, all trainings side by
side. `bash benchmarks/paper/gpu.sh WHEELS OUT` runs it there, and `python benchmarks/paper/gpu_tables.py
OUT/results.csv` adds the rows of such a run to `results.csv`"""

import argparse
import csv
import math
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cyc_table2 import classes, rate
from fastai.callback.schedule import combined_cos
from harness import SCALES, Cell, Results, append, commit, here, set_seed
from side_by_side import Images, Training, compiled, run_round, train, wait

from fastprune.all import Method, cifar10_dls, cifar_resnet, compute_masks, cubic, linear, one_shot, prunable_weights
from fastprune.recipes.cyclical import cycle_schedule, repeat_rate

CYCLES, EPOCHS_OF_CYCLE, DENSE_EPOCHS, SEEDS = 5, 20, 40, 3


@dataclass(frozen=True)
class Sizes:
    "How much is trained"

    cycle: int = EPOCHS_OF_CYCLE
    dense: int = DENSE_EPOCHS
    images: int | None = None  # all
    bs: int = 256
    depth: int = 20
    interval: int = 100


SMALL = Sizes(1, 1, 60, 20, 8, 2)


restarted = repeat_rate(rate, CYCLES)
METHODS = {  # name -> schedule, rates; the first three are table 2, all but the first two are table 5
    'one-shot': (one_shot, rate),
    'gradual': (cycle_schedule(cubic, 1), rate),
    'cyclical': (cycle_schedule(cubic, CYCLES), restarted),
    'cyclical fine-tune': (cycle_schedule(cubic, CYCLES, prune_cycles=1), restarted),
    'cyclical linear': (cycle_schedule(linear, CYCLES), restarted),
    'cyclical step': (cycle_schedule(one_shot, CYCLES), restarted),
}


def images_of(data, device, sizes):
    "The images of a folder, or of a tar file with one"
    path = Path(data).expanduser()
    with tempfile.TemporaryDirectory() as tmp:
        if path.is_file():
            with tarfile.open(path) as f:
                f.extractall(tmp, filter='data')
            path = next(p.parent for p in sorted(Path(tmp).rglob('train')))
        return Images(cifar10_dls(path, sizes.bs, sizes.images, sizes.images, device='cpu'), device)


def dense(images, sizes, seeds, forward, limit):
    "A trained network for each seed"
    rates = combined_cos(0.3, 0.02, 0.2, 2e-6)
    trainings = []
    for seed in range(seeds):
        set_seed(seed)
        model = cifar_resnet(sizes.depth)
        trainings.append(Training(model, images, seed, sizes.dense, rates, sizes.bs, wd=5e-4, forward=forward))
    for o in trainings:
        o.record()
    train(trainings, limit=limit)
    return trainings


def start(states, images, sizes, methods, sparsity, forward):
    "(method, seed) -> a training that starts from the network of its seed"
    res = {}
    for name in methods:
        for seed, state in enumerate(states):
            schedule, rates = METHODS[name]
            model = cifar_resnet(sizes.depth)
            model.load_state_dict(state)
            epochs = CYCLES * sizes.cycle
            res[name, seed] = o = Training(model, images, seed, epochs, rates, sizes.bs, forward=forward)
            options = dict(schedule=schedule, interval=sizes.interval, initial=0.0, track=True)
            if name == 'one-shot':  # before the first step; then masks stay
                weights = prunable_weights(model)
                compute_masks(weights, sparsity, absolute=True).apply_(weights)
                options |= dict(initial=None, recover=False, track=False)
            cycle = sizes.cycle * o.steps
            o.prune(Method(sparsity, **options), range(cycle - 1, CYCLES * cycle, cycle))
            o.record()
    return res


class Report:
    "What there is to say at the end of each cycle. Methods that there is no time for are left out, the last first"

    def __init__(self, trainings, running, sizes, limit):
        self.trainings, self.running, self.sizes, self.limit = trainings, running, sizes, limit
        self.rows, self.last, self.took = {key: [] for key in trainings}, None, []

    def __call__(self, epoch):
        done, epochs = epoch + 1, CYCLES * self.sizes.cycle
        if done > 3:  # the first ones compile kernels
            self.took.append(time.monotonic() - self.last)
            self.drop(min(self.took[-2:]) * (epochs - done))
        if done % self.sizes.cycle == 0:
            for (name, seed), o in self.trainings.items():
                if name.startswith('cyclical'):
                    self.add(done // self.sizes.cycle, name, seed, o)
        self.last = time.monotonic()

    def add(self, cycle, name, seed, o):
        found = {'cycle accuracy': o.accuracy(), 'cycle classes': classes(o)}
        found['mask distance'] = float(o.engine.method.mask_distance[-1])
        self.rows[name, seed] += [(str(cycle), what, value) for what, value in found.items()]
        print(f'cycle {cycle}, {name}, seed {seed}: {found}', flush=True)

    def drop(self, seconds):
        "Leave methods out until the rest of the training, of so many seconds, fits"
        all_of_them = len(self.trainings)
        left = self.limit - time.monotonic() - 10
        if seconds > left:
            print(f'{all_of_them} trainings need {seconds:.0f} s more, and there are {left:.0f} s', flush=True)
        while len({name for name, _ in self.trainings}) > 1 and seconds * len(self.trainings) / all_of_them > left:
            last = [*self.trainings][-1][0]
            for key in [k for k in self.trainings if k[0] == last]:
                self.running.remove(self.trainings.pop(key))
            print(f'{last} is left out', flush=True)
            self.took = []


def fill(device, data, out, sparsity=0.99, methods=None, seeds=SEEDS, sizes=None, compile=True, limit=math.inf):
    "Train, and add the rows to results.csv in the folder `out`"
    sizes, begin = sizes or Sizes(), time.monotonic()
    forward = compiled() if compile else None
    images = images_of(data, device, sizes)
    print(f'{len(images):,} images after {time.monotonic() - begin:.0f} s', flush=True)
    scale, results = SCALES['gpu'], Results(Path(out) / 'results.csv', 'jpg')
    first = dense(images, sizes, seeds, forward, limit)
    seconds = (time.monotonic() - begin) / len(first)
    for seed, o in enumerate(first):
        rows = [('', 'accuracy', o.accuracy()), ('', 'sparsity', 0.0)]
        print(f'dense, seed {seed}: {rows[0][2]:.2f}, {time.monotonic() - begin:.0f} s', flush=True)
        results.add(Cell('resnet20', 'dense', 0.0, sizes.dense, seed), scale, rows, seconds)
    begin = time.monotonic()
    trainings = start([o.model.state_dict() for o in first], images, sizes, methods or [*METHODS], sparsity, forward)
    print(f'{len(trainings)} trainings are recorded after {time.monotonic() - begin:.0f} s', flush=True)
    running = [*trainings.values()]
    report = Report(trainings, running, sizes, limit)
    train(running, report, limit)
    seconds = (time.monotonic() - begin) / len(trainings)
    for (name, seed), o in trainings.items():
        found = {'classes': classes(o), 'accuracy': o.accuracy(), 'sparsity': o.engine.keeper.masks.sparsity}
        print(f'{name}, seed {seed}: {found}, {seconds * len(trainings):.0f} s', flush=True)
        cell = Cell('resnet20', name, sparsity, CYCLES * sizes.cycle, seed)
        results.add(cell, scale, report.rows[name, seed] + [('', *o) for o in found.items()], seconds)


def time_rounds(device, data, compile, trainings=(1, 9), rounds=200, sizes=None):
    "(trainings side by side, ms of a round) of some rounds, for each number of trainings"
    sizes, forward = sizes or Sizes(), compiled() if compile else None
    images = images_of(data, device, sizes)
    states = [cifar_resnet(sizes.depth).state_dict() for _ in range(max(trainings))]
    begin = time.monotonic()
    many = [*start(states, images, sizes, ['cyclical'], 0.9, forward).values()]
    yield 'seconds to record', time.monotonic() - begin
    t = 1
    for n in trainings:
        some = many[:n]
        for i in (2, rounds):
            wait(some)
            begin = time.perf_counter()
            for _ in range(i):
                run_round(some, t)
                t += 1
            wait(some)
        yield f'ms of a round of {n}', 1000 * (time.perf_counter() - begin) / rounds


def collect(path):
    "Add rows of a run to results.csv"
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    append(here / 'results.csv', [{**r, 'commit': commit() if r['commit'] == 'unknown' else r['commit']} for r in rows])
    print(f'{len(rows)} rows')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path)
    collect(parser.parse_args().csv)
