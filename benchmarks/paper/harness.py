"""What all tables share: scales, cells, how one is trained, and the CSV that they end up in. `run.py` runs them,
`report.py` makes RESULTS.md"""

import csv
import importlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean

import airbench
import pandas as pd
import torch
from fastai.basics import (
    SGD,
    Callback,
    CancelValidException,
    CrossEntropyLossFlat,
    Learner,
    accuracy,
    default_device,
    noop,
    set_seed,
)
from fastai.callback.progress import ProgressCallback
from joblib import cpu_count
from networks import NETWORKS

from fastprune.all import Masks, cifar10_dls, load_state, prunable_weights, save_state
from fastprune.deploy.graph_code import has_bfloat16
from fastprune.learner.batches import in_fit

here = Path(__file__).resolve().parent
sys.path.append(str(here.parent))
from common import machine, quiet


def epochs_at(times, paper, least=1):
    "Epochs at a scale of so many times the paper's"
    return max(least, round(paper * times))


@dataclass(frozen=True)
class Scale:
    "How much smaller than in the papers, for every method alike"

    scale: str  # Its name
    images: int  # Training images of 50,000
    test: int  # Test images of 10,000
    batch: float  # Images in a batch, times the papers'
    times: float  # Epochs, times the papers'
    dense: int  # Epochs of the trained ResNet-20 that methods start from
    pixels: int  # A side, where a paper scales images up to 224
    rounds: int  # Rounds of pruning of tickets at most; of 10, which the paper doesn't say
    seeds: int  # Five where a training takes less than five minutes
    network: str = ''  # In place of the tables' ResNets; '' for those

    @classmethod
    def of(cls, df):
        "What rows of one scale were run with, also if `SCALES` has changed since"
        seeds = df.seed[~df.method.str.startswith(SEARCHES)].nunique()
        network = airbench.NAME if (df.model == airbench.NAME).any() else ''
        return cls(**{f: df[f].iloc[0] for f in about if f != 'files'}, seeds=seeds, network=network)

    def model(self, usual):
        "The network of a table that has `usual` at other scales"
        return self.network or usual

    @property
    def search_seeds(self):
        return search_seeds(self.images)

    def epochs_of(self, paper, least=1):
        return epochs_at(self.times, paper, least)

    def rounds_of(self, paper):
        return min(paper, self.rounds)


SCALES = {
    s.scale: s
    for s in (
        Scale('tiny', 300, 300, 1 / 4, 0.02, 10, 32, 2, 2),
        Scale('small', 5_000, 2_000, 1 / 4, 0.05, 20, 32, 3, 5),
        Scale('eighth', 6_250, 2_000, 1 / 8, 0.2, 40, 32, 3, 5),  # an epoch has as many iterations as the papers'
        Scale('eighth-long', 6_250, 2_000, 1 / 8, 1.0, 40, 32, 3, 3),  # and their epochs too
        Scale('medium', 50_000, 10_000, 1.0, 0.05, 30, 32, 5, 3),
        Scale('large', 50_000, 10_000, 1.0, 0.2, 40, 64, 10, 3),
        Scale('trained', 50_000, 10_000, 1.0, 0.06, 12, 32, 5, 5, airbench.NAME),  # some tables alone: `tables_at`
        Scale('gpu', 50_000, 10_000, 1.0, 1.0, 40, 32, 5, 3),  # of gpu_tables.py
        Scale('full', 50_000, 10_000, 1.0, 1.0, 200, 224, 18, 3),
    )
}


@dataclass(frozen=True)
class Cell:
    "One training, or one chain of rounds, with one seed"

    model: str
    method: str
    sparsity: float = 0.0
    epochs: int = 1  # In all; of one round, where there are rounds
    seed: int = 0


def of_scale(df, scale, files=None):
    "Rows of a scale; of images that are kept as `files`, or as any"
    for f in about:
        wanted = files if f == 'files' else getattr(scale, f)
        df = df if wanted is None else df[df[f] == wanted]
    return df


about = [
    'scale',
    'images',
    'test',
    'batch',
    'times',
    'dense',
    'pixels',
    'rounds',
    'files',
]  # the setting: `files` is what images are kept as, such as jpg
key = [*about, 'model', 'method', 'sparsity', 'epochs', 'seed']
columns = [*key, 'step', 'what', 'value', 'seconds', 'commit', 'machine']

# ---- methods: name -> function (run) that returns rows (step, what, value); each table's script adds its own. One
# with a number, such as a start, takes it as its second argument: the cell's method is 'NAME at NUMBER'

METHODS = {}
SEARCH_SEEDS = (10, 11)  # Of searches; the trainings that are told have smaller ones


def search_seeds(images):
    "One is enough where there are so many training images that 10,000 are left to validate on"
    return SEARCH_SEEDS[:1] if images >= 50_000 else SEARCH_SEEDS


SEARCHES = 'search '  # Starts the names of methods that are trained to choose a number, and not told


def at_number(name, number):
    return f'{name} at {number:g}'


def number_of(method):
    return float(method.partition(' at ')[2])


def method_of(cell):
    "The function (run) of a cell"
    name, _, number = cell.method.partition(' at ')
    return partial(METHODS[name], number=float(number)) if number else METHODS[name]


def method(name):
    def add(f):
        METHODS[name] = f
        return f

    return add


@lru_cache
def bfloat16_is_fast():
    "Without instructions for it a CPU takes three to fifteen times as long as in float32"
    return (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if torch.cuda.is_available()
        else torch.backends.cpu.get_cpu_capability().startswith('AVX512') and has_bfloat16()
    )


def weights_count_most(cell):
    return NETWORKS[cell.model].moves_weights and default_device().type == 'cpu'


def can_compile():
    "Is there what torch.compile needs on a CPU?"
    return (
        shutil.which(os.environ.get('CXX', 'g++')) is not None
        and Path(sysconfig.get_path('include'), 'Python.h').exists()
    )


def compiles(cell, scale):
    """Long trainings on a CPU, or long rounds: torch.compile takes the better part of a minute, and a third less time
    after it"""
    return (
        can_compile()
        and NETWORKS[cell.model].compiles
        and scale.images * cell.epochs >= 50_000
        and default_device().type == 'cpu'
    )


class Precision(Callback):
    """Layers in bfloat16, where that is fast, and channels last; weights, masks and the loss stay in float32. The
    model's forward compiled, if `compiled`"""

    order = 5  # after what moves model and batch

    def __init__(self, compiled=False):
        self.compiled = compiled

    def before_fit(self):
        self.model.to(memory_format=torch.channels_last)
        if self.compiled:
            torch.compiler.reset()  # of other models in this process, which count towards a limit
            self.model.compile(dynamic=False)
            self.compiled = False

    def before_batch(self):
        self.learn.xb = tuple(x.contiguous(memory_format=torch.channels_last) for x in self.xb)
        self.autocast = torch.autocast(self.xb[0].device.type, torch.bfloat16, enabled=bfloat16_is_fast())
        self.autocast.__enter__()

    def after_pred(self):
        self.autocast.__exit__(None, None, None)
        self.learn.pred = self.pred.float()


class SeldomValidate(Callback):
    "Within a fit, validation at the end of each `every`th epoch alone: it takes a fifth of the time at small scales"

    def __init__(self, every):
        self.every = every

    def before_validate(self):
        if in_fit(self.learn) and (self.epoch + 1) % self.every:
            raise CancelValidException


sgd = partial(SGD, mom=0.9, decouple_wd=False)


@dataclass
class Run:
    "What a method has to work with"

    cell: Cell
    scale: Scale
    data: Path  # Folder of images
    cache: Path  # Folder of networks that methods start from

    def __getattr__(self, name):
        return getattr(self.cell, name)

    @property
    def network(self):
        return NETWORKS[self.cell.model]

    def dls(self, bs, valid_pct=0.0):
        s = self.scale
        dls = cifar10_dls(
            self.data,
            bs=round(bs * s.batch),
            n_train=None if s.images >= 50_000 else s.images,
            n_test=None if s.test >= 10_000 else s.test,
            valid_pct=valid_pct,
            size=s.pixels if self.network.scaled else self.network.pixels,
        )
        self.network.batches(dls)
        return dls

    def learner(
        self,
        bs=128,
        opt=sgd,
        wd=1e-4,
        moms=(0.9, 0.9, 0.9),
        trained=None,
        valid_pct=0.0,
        validate=1,
        prunes_from_scratch=False,
    ):
        """A new Learner; from the network that was trained for so many epochs, if `trained`. It validates at every
        `validate`th epoch while it trains"""
        set_seed(self.seed)
        learn = Learner(
            self.dls(bs, valid_pct),
            self.network.build(),
            CrossEntropyLossFlat(),
            opt,
            metrics=accuracy,
            wd=wd,
            moms=moms,
            cbs=SeldomValidate(validate),
        )
        self.network.ready(learn)
        if prunes_from_scratch:
            self.network.no_zeros(learn)
        if not weights_count_most(self.cell):
            learn.add_cb(Precision(compiles(self.cell, self.scale)))
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        if trained:
            learn.model.load_state_dict(load_state(baseline(self.cache, self.scale, self.model, trained)))
        set_seed(1000 + self.seed)
        return learn


def baseline(cache, scale, model, epochs):
    return cache / f'{scale.images}_{scale.batch:g}_{model}_{epochs}.safetensors'


def just_trained(path):
    return path.with_suffix('.new')


def norm(state):
    return sum(float(t.double().abs().sum()) for t in state.values())


def keep_baseline(run, learn):
    "The network of seed 0 is the one that methods start from, if the Runner finds that it may be. Returns its row"
    if run.seed:
        return []
    run.cache.mkdir(parents=True, exist_ok=True)
    state = learn.model.state_dict()
    save_state(state, just_trained(baseline(run.cache, run.scale, run.model, run.epochs)))
    return [('', 'norm', norm(state))]


def result(learn):
    masks = learn.masks or Masks.from_zeros(prunable_weights(learn.model))
    return [('', 'accuracy', 100 * float(learn.validate()[1])), ('', 'sparsity', masks.sparsity)]


@method('dense')
def dense(run):
    "A trained network, as good as the epochs allow"
    how = run.network.start
    learn = run.learner(**{**how, 'bs': how['bs'] / run.scale.batch}, validate=run.epochs)
    run.network.fit(learn, run.epochs)
    return [*keep_baseline(run, learn), *result(learn)]


def search_cells(name, numbers, model, sparsity, epochs, seeds=SEARCH_SEEDS):
    "Trainings with each number, without the test images and with seeds of their own"
    return [Cell(model, at_number(SEARCHES + name, x), sparsity, epochs, seed) for x in numbers for seed in seeds]


def searched(df, name, sparsity, epochs, numbers, within=1.0):
    """The number that is best on the validation split; None if some is not tried yet. With `within`, only numbers with
    a sparsity of at most so much above `sparsity` count, if there are any"""
    return best_of(df, {x: at_number(SEARCHES + name, x) for x in numbers}, sparsity, epochs, within)


def best_of(df, names, sparsity, epochs, within=1.0):
    "As `searched`; `names`: what to choose from -> the method that tried it"
    seeds = search_seeds(df.images.max())
    at = df.method.isin(names.values()) & (df.epochs == epochs) & df.seed.isin(seeds)
    df = df.loc[at & ((df.sparsity - sparsity).abs() < 1e-9), ['method', 'what', 'value']]
    found = defaultdict(list)
    for o in zip(df.method, df.what, df.value, strict=True):
        found[o[:2]].append(o[2])
    if any(len(found[m, 'accuracy']) < len(seeds) for m in names.values()):
        return None
    fit = [x for x, m in names.items() if mean(found[m, 'sparsity']) <= sparsity + within]
    return max(fit or names, key=lambda x: mean(found[names[x], 'accuracy']))


def dense_cells(model, scale, seeds=range(1)):
    return [Cell(model, 'dense', 0.0, scale.dense, seed) for seed in seeds]


# ---- running


@lru_cache
def commit():
    "Of the code that runs, with '+' if it has changes"

    def git(*args):
        try:
            return subprocess.run(['git', *args], cwd=here, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ''

    return (git('rev-parse', '--short', 'HEAD') or 'unknown') + (
        '+' if git('status', '--porcelain', '--', '../../fastprune', '*.py') else ''
    )


def _end_with_parent():
    parent_process().join()
    os._exit(1)


def _ready():
    """In each new process: the methods of all tables, and what they import. It ends with the process that started it,
    should that be killed"""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings('ignore')
    importlib.import_module('tables')
    with quiet():
        try:
            importlib.import_module('fasterai.sparse.all')
        except ImportError:
            pass


def run_cell(cell, scale, data, cache, threads):
    "In a process of its own: the cell's rows, and the seconds that it took"
    torch.set_num_threads(threads)
    run = Run(cell, scale, data, cache)
    run.dls(256)  # reads the images, if this process has not
    start = time.perf_counter()
    with quiet():
        rows = method_of(cell)(run)
    return rows, time.perf_counter() - start


class Results:
    "The CSV: rows are added, never changed"

    def __init__(self, path, files):
        self.path, self.files = Path(path), files

    @property
    def df(self):
        return read(self.path)

    def rows(self, scale):
        "Those of a scale, and of images that are kept as they are here"
        return of_scale(self.df, scale, self.files)

    def name(self, cell, scale):
        "What tells a cell from all others"
        return {k: v for k, v in {**asdict(scale), 'files': self.files, **asdict(cell)}.items() if k in key}

    def finished(self):
        return set(self.df[key].itertuples(index=False, name=None))

    def has(self, cell, scale, finished):
        name = self.name(cell, scale)
        return tuple(name[k] for k in key) in finished

    def of(self, cell, scale):
        "What is there of a cell as a whole: name -> value"
        df, name = self.df, self.name(cell, scale)
        df = df[(df[list(name)] == list(name.values())).all(axis=1) & (df.step == '')]
        return dict(zip(df.what, df.value, strict=True))

    def add(self, cell, scale, rows, seconds):
        "All of a cell at once, with the row last that says that it is whole"
        same = {
            **self.name(cell, scale),
            'seconds': round(seconds, 1),
            'commit': commit(),
            'machine': machine()
            + (', layers in float32' if weights_count_most(cell) or not bfloat16_is_fast() else '')
            + (', compiled' if compiles(cell, scale) else ''),
        }
        ordered = sorted(rows, key=lambda row: row[:2] == END)
        append(self.path, [{**same, 'step': step, 'what': what, 'value': f'{v:.6g}'} for step, what, v in ordered])


def append(path, rows):
    "Add rows to a CSV, after its last whole line"
    text, whole = io.StringIO(newline=''), whole_lines(path)
    out = csv.DictWriter(text, columns)
    if not whole:
        out.writeheader()
    elif not whole.endswith(b'\n'):
        text.write('\n')
    out.writerows(rows)
    with open(path, 'ab') as f:
        if f.tell() > len(whole) and not path.read_bytes().endswith(b'\n'):  # not what another process has just added
            f.truncate(len(whole))
        f.write(text.getvalue().encode())


END = ('', 'accuracy')  # Step and name of a cell's last row


def whole_lines(path):
    "The bytes of a CSV, without a last line that was cut off"
    data = Path(path).read_bytes() if Path(path).exists() else b''
    end = data.rfind(b'\n') + 1
    last = data[end:].decode(errors='replace')
    whole = last.count('"') % 2 == 0 and len(next(csv.reader([last]), [])) == len(columns)
    return data if whole or not end else data[:end]


def blocks_of(df):
    "The number of each row's block: rows of one cell that were written at once"
    block, before, there, numbers = 0, None, set(), []
    for *cell, step, what in df[[*key, 'step', 'what']].itertuples(index=False, name=None):
        if cell != before or (step, what) in there:
            block, before, there = block + 1, cell, set()
        there.add((step, what))
        numbers.append(block)
    return pd.Series(numbers, df.index, dtype=int)


def read(path):
    """The first of each cell, should files of two machines have been put together; without cells that were cut off
    while they were written. Raises `ValueError` for what is not such a CSV"""
    data = whole_lines(path)
    if not data:
        return pd.DataFrame(columns=columns)
    try:
        df = pd.read_csv(io.BytesIO(data), keep_default_na=False, dtype={'step': str, 'commit': str})
    except ValueError as e:  # as pandas' own errors and those of decoding are
        raise ValueError(f'{path}: is not a CSV of run.py: {e}') from e
    if list(df.columns) != columns:
        raise ValueError(
            f'{path}: its columns are {", ".join(df.columns)}; needs those of run.py: {", ".join(columns)}'
        )
    df['value'] = pd.to_numeric(df.value, errors='coerce')
    df = df[df.value.notna()]
    df = df.assign(block=blocks_of(df))
    df = df[df.block.isin(df.block[(df.step == END[0]) & (df.what == END[1])])]
    return df[df.block == df.groupby(key).block.transform('min')].drop(columns='block').reset_index(drop=True)


class Runner:
    "One pool of processes for everything: each reads the images once"

    def __init__(self, scale, data, results, workers, cache):
        self.scale, self.data, self.results, self.workers, self.cache, self.failed = (
            scale,
            data,
            results,
            workers,
            cache,
            [],
        )
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context('spawn'), initializer=_ready)
        commit()  # now: files may change while this runs

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=error[0] is not None)

    def todo(self, cells):
        finished = self.results.finished()
        return [
            c for c in dict.fromkeys(cells) if not self.results.has(c, self.scale, finished) and c not in self.failed
        ]

    def fill(self, needs, cells):
        """Run the cells that are not finished, after what they need, which is trained again if its network is lost,
        and must come out the same"""
        cells, new = self.todo(cells), self.todo(needs)
        kept = lambda c: baseline(self.cache, self.scale, c.model, c.epochs).exists()
        self._run([c for c in needs if c in new or cells and not kept(c) and c not in self.failed])
        if all(map(kept, needs)):
            self._run(cells)

    def _run(self, cells):
        if not cells:
            return
        new = set(self.todo(cells))
        threads = max(1, cpu_count() // min(self.workers, len(cells)))
        jobs = {self.pool.submit(run_cell, c, self.scale, self.data, self.cache, threads): c for c in cells}
        for n, job in enumerate(as_completed(jobs), 1):
            cell = jobs[job]
            what = (
                f'{n}/{len(cells)} {self.scale.scale} {cell.model} {cell.method} {cell.sparsity:g} epochs '
                f'{cell.epochs} seed {cell.seed}'
            )
            try:
                rows, seconds = job.result()
            except Exception as e:  # one that fails leaves the others alone
                self.failed.append(cell)
                print(f'{what}: failed, {type(e).__name__}: {e}', flush=True)
                traceback.print_exception(e)
                continue
            if why := self._another(cell, rows):
                self.failed.append(cell)
                print(f'{what}: {why}', flush=True)
                continue
            if cell in new:
                self.results.add(cell, self.scale, rows, seconds)
            print(
                f"{what}: {next((f'{v:.2f}' for _, w, v in reversed(rows) if w == 'accuracy'), '')} in {seconds:.0f} s",
                flush=True,
            )

    def _another(self, cell, rows):
        """Why a network that was just trained is not what rows in the CSV started from, or None if it is, or is the
        first: then it is kept. What starts from another one does not compare"""
        now = {w: v for _, w, v in rows}
        if 'norm' not in now:
            return
        was, path = self.results.of(cell, self.scale), baseline(self.cache, self.scale, cell.model, cell.epochs)
        new = just_trained(path)
        if path.exists():
            was['norm'] = norm(load_state(path))
        if other := [
            w for w in ('accuracy', 'norm') if w in was and f'{was[w]:.6g}' != f'{now[w]:.6g}'
        ]:  # as the CSV has them
            new.unlink()
            return (
                f'the trained network has {" and ".join(f"{w} {now[w]:g}, not {was[w]:g}" for w in other)} as '
                f'in {path if path.exists() else self.results.path}: another device or number of threads '
                'trains another network. '
                f'Put the first one into {path.parent}, or start another CSV with --out, without --cache'
            )
        new.replace(path)
