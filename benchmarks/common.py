"Common parts of the benchmarks: interleaved timing, other libraries, and CSV files that name their machine"

import contextlib
import csv
import io
import os
import platform
import statistics
import time
from pathlib import Path

import fastai
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
        f'{torch.__version__}, fastai {fastai.__version__}'
    )


def seconds(f):
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(sides, rounds):
    "Run all sides in turn, `rounds` times after a warm-up; returns name -> list of seconds"
    res = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, f in sides.items():
            t = seconds(f)
            if i:
                res[name].append(t)
    return res


def spread(ts):
    return statistics.median(ts), min(ts), max(ts)


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def write(name, rows):
    "Write `rows`, dicts with the same keys, to `name`.csv beside the scripts"
    with open(here / f'{name}.csv', 'w', newline='') as f:
        out = csv.DictWriter(f, [*(k for k in rows[0] if k != 'machine'), 'machine'])
        out.writeheader()
        for r in rows:
            out.writerow({'machine': machine(), **r})  # rows of an earlier run name their own machine
