"Common parts of the benchmarks: interleaved timing, other libraries, and CSV files that name their machine"

import contextlib
import csv
import fcntl
import io
import math
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch

here = Path(__file__).parent


def machine():
    "One line about the machine and the versions"
    cpu = next(
        (l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')),
        platform.processor(),
    )
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    return (
        f'{cpu}, {os.cpu_count()} cores{gpu}; Python {platform.python_version()}, torch '
        f'{torch.__version__}, fastai {version("fastai")}'
    )


def device_name(device):
    "What the column `device` says: 'cpu', or the name of the GPU"
    return 'cpu' if str(device) == 'cpu' else torch.cuda.get_device_name(device)


def synchronize():
    "Wait until GPUs have done all that they were asked to"
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(f):
    synchronize()
    start = time.perf_counter()
    f()
    synchronize()
    return time.perf_counter() - start


def host_seconds(f):
    "The time until `f` returns, while a GPU may still be at work"
    synchronize()
    start = time.perf_counter()
    f()
    taken = time.perf_counter() - start
    synchronize()
    return taken


def interleaved(sides, rounds, limit=math.inf):
    """Run all sides in turn, `rounds` times after a warm-up, or fewer where another round would end after `limit`
    seconds; returns name -> list of seconds"""
    res, start = {name: [] for name in sides}, time.perf_counter()
    for i in range(rounds + 1):
        begin = time.perf_counter()
        for name, f in sides.items():
            t = seconds(f)
            if i:
                res[name].append(t)
        now = time.perf_counter()
        if i and now - start + (now - begin) > limit:
            break
    return res


def spread(ts):
    return statistics.median(ts), min(ts), max(ts)


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# the columns that say what a row is of, besides its device
KEYS = {
    'overhead': ('network', 'side'),
    'mask_update': ('network', 'scores', 'scope', 'side'),
    'mask_update_growth': ('weights', 'scores', 'scope'),
    'inference': ('network', 'sparsity', 'batch', 'side'),
    'inference_peers': ('network', 'sparsity', 'batch', 'side'),
    'graph_parts': ('network', 'sparsity', 'batch', 'part'),
    'connectivity': ('what', 'side'),
    'tuning': ('network', 'variant'),
    'checks': ('stage', 'case'),
}


def read_rows(path):
    "The rows of a CSV file, none if there is no file"
    if not path.exists():
        return []
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def write_rows(path, rows):
    "Write rows, dicts with more or less the same keys; the machine comes last"
    columns = dict.fromkeys(k for r in rows for k in r)
    with open(path, 'w', newline='') as f:
        names = [*(k for k in columns if k not in ('device', 'machine')), 'device', 'machine']
        out = csv.DictWriter(f, names, lineterminator='\n')
        out.writeheader()
        out.writerows(rows)


def write(name, rows, device='cpu', folder=here):
    "Write `rows` of a device to `name`.csv, in place of all its rows of that device"
    path, device = Path(folder) / f'{name}.csv', device_name(device)
    old = [r for r in read_rows(path) if r['device'] != device]
    write_rows(path, [*old, *({'machine': machine(), **r, 'device': device} for r in rows)])


@contextlib.contextmanager
def alone_in(folder):
    "Other processes wait, so that several may write to the same file"
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Rows:
    "Writes each row to `name`.csv as it comes, in place of the row with the same device and key"

    def __init__(self, name, device='cpu', folder=here):
        self.name, self.device, self.path = name, device_name(device), Path(folder) / f'{name}.csv'
        self.machine = machine()

    def add(self, **row):
        row |= {'device': self.device, 'machine': self.machine}
        key = lambda r: [str(r.get(k, '')) for k in ('device', *KEYS[self.name])]
        with alone_in(self.path.parent):
            write_rows(self.path, [*(r for r in read_rows(self.path) if key(r) != key(row)), row])
        print(*(f'{k}: {v},' for k, v in row.items() if v != '' and k not in ('device', 'machine')), flush=True)
