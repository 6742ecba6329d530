"""Checksums of the package's results, to compare two commits on one machine. A pure refactoring changes none of them.
`python benchmarks/same.py before.json` at one commit, `python benchmarks/same.py after.json` at the other, and
`python benchmarks/same.py before.json after.json` lists what differs. `--only 'method RigL*'` runs a part."""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatch
from numbers import Number
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='agg')

import numpy as np
import pandas as pd
import torch
from fastai.basics import set_seed
from fastcore.script import call_parse
from same_cases import CASES


def pieces(x):
    "The bytes of a value. Dicts are sorted by name, and numbers of different types count by value"
    if isinstance(x, torch.Tensor):
        x = x.detach().as_subclass(torch.Tensor).cpu().contiguous()
        yield f'{x.dtype} {tuple(x.shape)}'.encode()
        yield x.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(x, np.ndarray):
        yield f'{x.dtype} {x.shape}'.encode()
        yield x.tobytes()
    elif isinstance(x, pd.DataFrame):
        yield from pieces([list(x.columns), list(x.index), [x.iloc[:, i].tolist() for i in range(x.shape[1])]])
    elif isinstance(x, dict):
        yield f'{len(x)} names'.encode()
        for k in sorted(x, key=str):
            yield str(k).encode()
            yield from pieces(x[k])
    elif isinstance(x, bytes):
        yield x
    elif isinstance(x, (str, type(None))):
        yield repr(x).encode()
    elif isinstance(x, Number):
        yield float(x).hex().encode()
    elif isinstance(x, (list, tuple)) or hasattr(x, '__iter__'):
        x = list(x)
        yield f'{len(x)} items'.encode()
        for o in x:
            yield from pieces(o)
    else:
        raise TypeError(f'there is no checksum for a {type(x).__name__}')


def checksum(x):
    digest = hashlib.sha256()
    for piece in pieces(x):
        digest.update(f'{len(piece)} '.encode())
        digest.update(piece)
    return digest.hexdigest()


def run(name, case):
    "The checksums of a case, one for each part, or the error that it raises"
    torch.set_num_threads(1)
    set_seed(42, reproducible=True)
    silent = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), silent:
        warnings.simplefilter('ignore')
        try:
            return {f'{name}: {part}': checksum(x) for part, x in case(Path(folder)).items()}
        except Exception as e:
            return {name: f'error: {type(e).__name__}: {e}'.replace(folder, '')}


def differences(a, b):
    "One line for each difference between two tables of checksums"
    for k in sorted({**a, **b}):
        if k not in a or k not in b:
            yield f'{k}: only in the {"second" if k not in a else "first"} file'
        elif a[k] != b[k]:
            yield f'{k}: {a[k][:120]} and {b[k][:120]}'


@call_parse
def main(
    out: str,  # File to write, or the first of two to compare
    other: str = None,  # The second of two files to compare
    only: str = '*',  # Pattern for the names of the cases to run
):
    "Run all cases and write their checksums, or compare two files of them"
    if other:
        a, b = (json.loads(Path(f).read_text()) for f in (out, other))
        lines = list(differences(a, b))
        print('\n'.join([*lines, f'{len({**a, **b})} checksums, {len(lines)} differ']))
        sys.exit(bool(lines))
    chosen = {k: case for k, case in CASES.items() if fnmatch(k, only)}
    res, start = {}, time.perf_counter()
    for name, case in chosen.items():
        begin = time.perf_counter()
        res.update(run(name, case))
        print(f'{time.perf_counter() - begin:6.2f} s  {name}', file=sys.stderr)
    Path(out).write_text(json.dumps(res, indent=1))
    errors = sum(v.startswith('error') for v in res.values())
    print(f'{len(chosen)} cases, {len(res)} checksums, {errors} errors, {time.perf_counter() - start:.0f} s')
