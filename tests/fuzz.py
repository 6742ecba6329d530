"""Damaged and hostile files for all that fastprune loads.

`python tests/fuzz.py 5000` loads 5,000 files with random damage and all hand-made ones, and prints the most time and
memory that one took. Each file is loaded in a forked process that is watched. It may run no program and write to no
other place, take 2 seconds of a processor (more on a slow or busy one, see `allowed`), and allocate 80 times the size
of the file plus 1 MB. It has to load the file, or to raise a ValueError or OSError that names it."""

import contextlib
import ctypes
import gc
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback
from safetensors.torch import save
from torch import nn

from fastprune.all import (
    Checkpoint,
    Masks,
    SparsifyCallback,
    Ticket,
    Tickets,
    load_state,
    save_sparse,
    save_state,
    sweep,
)
from fastprune.core.files import state_crc
from fastprune.core.sparse_files import load_sparse_masks
from fastprune.deploy.compare_files import compare_files
from fastprune.deploy.report_file import report_file
from fastprune.deploy.weight_file import read_weights

SECONDS, TIMES, MORE = 2.0, 80, 2**20


@dataclass
class Format:
    "A kind of file: how to make good ones, which to damage, and how to load them"

    make: object  # Function (folder) that writes good files
    load: object  # Function (path of the damaged file) -> something to compare, or None
    files: str = 'it'  # Glob pattern of the files to damage
    checked: bool = True  # Does a checksum make sure that what loads is what was saved?
    more: int = MORE  # Bytes that loading takes in any case: some formats load by a training


@dataclass
class Result:
    name: str
    seconds: float = 0.0
    memory: int = 0  # bytes
    size: int = 0
    error: str = ''  # type of the error
    faults: list = field(default_factory=list)


def learner(folder):
    set_seed(0)
    items = [(torch.randn(8), torch.tensor(i % 4)) for i in range(8)]
    dls = DataLoaders(*(DataLoader(items, bs=4) for _ in range(2)))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=folder)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    return learn


def fit(learn, cbs):
    learn.fit(1, cbs=cbs)


def pruned(learn, sparsity, seed):
    learn.prune(sparsity)


def state_dict():
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(40, 30, generator=gen)
    w[w.abs() < 1.5] = 0
    return {
        'w': w,
        'bias': torch.randn(30, generator=gen),
        'steps': torch.tensor(7),
        'tied': w,
        'empty': torch.zeros(0, 3),
    }


def kept(state):
    return {'w': state['w'] != 0, 'bias': state['bias'] > 0}


def ticket():
    state = state_dict()
    state.pop('tied')
    return Ticket(state, {'w': state['w'] != 0}, {'accuracy': 0.5}, {'w': (0.0, 1.0, 'normal')}, round=1, seed=0)


def load_ticket(path):
    t = Ticket.load(path)
    if t.initial:
        t.reinit(0)
    t.shuffle(0), t.dense(), repr(t), Tickets([t]).df
    return {**t.state, **{f'mask {n}': m for n, m in t.masks.items()}}


def load_both(path):
    state, masks = load_sparse_masks(path)
    return {**state, **{f'mask {n}': m for n, m in masks.items()}}


def pruned_learner(folder):
    learn = learner(folder)
    learn.prune(0.5)
    learn.save_sparse(folder / 'it')


def load_learner(path):
    learn = learner(path.parent)
    learn.load_sparse(path)


def rounds(folder):
    learner(folder).iterative_prune(2, 1, folder=folder, rewind='weights', histograms=True)


def tickets(folder):
    learner(folder).find_tickets(2, fit, folder=folder, rewind='finetune', ends=True)


def swept(folder):
    sweep(lambda seed: learner(folder), {'a': pruned}, [0.5], [0], folder=folder, bar=False)


def checkpoint(folder):
    learner(folder).fit(1, cbs=[SparsifyCallback(0.5), Checkpoint('it', resume=False)])


def load_checkpoint(path):
    learner(path.parent.parent).fit(1, cbs=[SparsifyCallback(0.5), Checkpoint(path.stem)])


def saved(zipped):
    return lambda folder: torch.save(state_dict(), folder / 'it', _use_new_zipfile_serialization=zipped)


def show(path):
    "The page about a file, and its comparison with itself, as the command makes them"
    tempfile.tempdir = str(path.parent)
    report_file(path, out=path.parent / 'page.html', seconds=0)
    str(compare_files(path, path))


FORMATS = dict(
    masks=Format(lambda d: Masks(kept(state_dict())).save(d / 'it'), Masks.load),
    state=Format(lambda d: save_state(state_dict(), d / 'it'), load_state),
    sparse=Format(lambda d: save_sparse(state_dict(), d / 'it', masks=kept(state_dict())), load_both),
    ticket=Format(lambda d: ticket().save(d / 'it'), load_ticket),
    pth=Format(saved(True), lambda p: read_weights(p)[0], checked=False),
    legacy=Format(saved(False), lambda p: read_weights(p)[0], checked=False),
    foreign=Format(
        lambda d: (d / 'it').write_bytes(save(state_dict() | {'tied': torch.ones(2)})),
        lambda p: read_weights(p)[0],
        checked=False,
    ),
    shown=Format(lambda d: save_sparse(state_dict(), d / 'it'), show, checked=False, more=80 * MORE),
    learner=Format(pruned_learner, load_learner, checked=False, more=8 * MORE),
    rounds=Format(rounds, lambda p: rounds(p.parent), '*.*', False, 24 * MORE),
    tickets=Format(tickets, lambda p: tickets(p.parent), '*.*', False, 24 * MORE),
    sweep=Format(swept, lambda p: swept(p.parent), '*.json', False, 24 * MORE),
    checkpoint=Format(checkpoint, load_checkpoint, 'models/*', False, 24 * MORE),
)


# ---- damage

ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.5,
    1e308,
    math.nan,
    math.inf,
    '',
    'x',
    'w',
    '0',
    'é',
    '\ud800',
    [],
    {},
    [[]],
    {'a': 1},
    [1, 2, 3],
    'x' * 1000,
    [0] * 1000,
    {'as': 'w'},
]


def random_bytes(data, rng):
    "Change, remove or add random bits and bytes"
    data, n = bytearray(data), len(data)
    head = min(n, 8 + int.from_bytes(data[:8], 'little'))
    where = lambda: rng.randrange(max(1, head if rng.random() < 0.6 else n))
    kind = rng.randrange(7)
    if kind == 0:
        return bytes(data[: rng.randrange(n)])
    if kind == 1:
        for _ in range(rng.randrange(1, 4)):
            data[where()] ^= 1 << rng.randrange(8)
    if kind == 2:
        data[where()] = rng.randrange(256)
    if kind == 3:
        data[(i := where()) : i] = rng.randbytes(rng.randrange(1, 9))
    if kind == 4:
        data[:8] = rng.choice([0, 1, n, 2**31, 2**63]).to_bytes(8, 'little')
    if kind == 5:
        at = [i for i in range(min(n, head)) if data[i : i + 1] in b'0123456789,":[]{}']
        if at:
            data[(i := rng.choice(at)) : i + 1] = rng.choice(
                [b'9', b'-', b'99999999999', b'0', b'x', b'"', b'[', b'NaN', b'1e999']
            )
    if kind == 6:
        a, b = sorted((where(), where()))
        c = where()
        data[c:c] = data[a:b]
    return bytes(data)


def odd_json(obj, rng):
    "JSON with one odd value"
    if rng.random() < 0.25 or not isinstance(obj, (dict, list)) or not obj:
        return rng.choice(ODD)
    if isinstance(obj, dict):
        k = rng.choice(list(obj))
        if (kind := rng.random()) < 0.15:
            return {n: v for n, v in obj.items() if n != k}
        if kind < 0.25:
            return {(n + 'x' if n == k else n): v for n, v in obj.items()}
        return {n: odd_json(v, rng) if n == k else v for n, v in obj.items()}
    i = rng.randrange(len(obj))
    if (kind := rng.random()) < 0.15:
        return obj[:i] + obj[i + 1 :]
    if kind < 0.25:
        return obj + [obj[i]] * rng.choice([1, 1000])
    return [odd_json(v, rng) if j == i else v for j, v in enumerate(obj)]


def odd_tensor(t, rng):
    kind = rng.randrange(6)
    if kind == 0:
        return t.double() if t.dtype == torch.float32 else t.float()
    if kind == 1:
        return t.reshape(-1)[: t.numel() // 2]
    if kind == 2:
        return torch.zeros(rng.choice([(), (0,), (0, 5), (1, 1), (3, 0, 2**40)]))
    if kind == 3:
        return torch.full_like(t, rng.choice([math.nan, math.inf, 1e6, -1.0]) if t.is_floating_point() else 1)
    if kind == 4:
        return t.reshape(1, *t.shape)
    return t.to(rng.choice([torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float16, torch.float8_e4m3fn]))


def split(data):
    "Tensors and metadata of a safetensors file"
    n = int.from_bytes(data[:8], 'little')
    head = json.loads(data[8 : 8 + n])
    from safetensors.torch import load

    return load(data), head.get('__metadata__', {})


def sealed(tensors, meta):
    "A safetensors file with the right checksum"
    tensors = {n: t.clone().contiguous() for n, t in tensors.items()}
    meta = {k: v for k, v in meta.items() if k != 'checksum'}
    return save(tensors, {**meta, 'checksum': state_crc(tensors, meta)})


def random_parts(data, rng):
    "Other tensors or metadata, with the right checksum"
    tensors, meta = split(data)
    told = [k for k in meta if k != 'checksum']
    if tensors and (not told or rng.random() < 0.4):
        n = rng.choice(list(tensors))
        kind = rng.randrange(4)
        if kind == 0:
            tensors.pop(n)
        elif kind == 1:
            tensors[n + 'x'] = tensors[n]
        else:
            tensors[n] = odd_tensor(tensors[n], rng)
    else:
        k = rng.choice(told)
        try:
            meta[k] = json.dumps(odd_json(json.loads(meta[k]), rng))
        except ValueError:
            meta[k] = str(rng.choice(ODD))
        if rng.random() < 0.1:
            meta.pop(k)
    return sealed(tensors, meta)


def random_pth(data, rng):
    "An odd object, as torch would write it"
    state = state_dict()
    n = rng.choice(list(state))
    odd = rng.choice(
        [
            3,
            None,
            'x',
            [],
            {},
            state['w'].expand(1000, 40, 30),
            state['w'].T,
            state['w'].to_sparse(),
            torch.ones(1).expand(2**30),
            torch.zeros(2, device='meta'),
            odd_tensor(state[n], rng),
            torch.quantize_per_tensor(state['w'], 1.0, 0, torch.qint8),
            Path('x'),
        ]
    )
    state = rng.choice(
        [
            {**state, n: odd},
            {**state, 3: odd},
            {'model': odd},
            {'model': state, 'opt': odd},
            [state],
            odd,
            {'state_dict': {n: odd}},
        ]
    )
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=data[:2] == b'PK')
    return out.getvalue()


def damage(kind, path, data, rng):
    "Damage a file in one of several ways"
    if rng.random() < 0.55:
        return random_bytes(data, rng)
    try:
        if kind in ('pth', 'legacy'):
            return random_pth(data, rng)
        if path.suffix == '.json':
            return json.dumps(odd_json(json.loads(data), rng)).encode()
        return random_parts(data, rng)
    except (ValueError, RuntimeError, TypeError, NotImplementedError, OverflowError, KeyError):
        return random_bytes(data, rng)


# ---- watching


class Watch:
    "Notes what a process does that loading must not do"

    bad = (
        'os.system',
        'subprocess.Popen',
        'os.exec',
        'os.posix_spawn',
        'os.spawn',
        'pickle.find_class',
        'socket.connect',
    )

    def __init__(self):
        self.folder, self.seen = None, []

    def __call__(self, event, args):
        if self.folder is None:
            return
        if event in self.bad:
            self.seen.append(f'{event} {args!r}'[:200])
        if (
            event == 'open'
            and isinstance(args[0], (str, bytes))
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            where = os.path.realpath(os.fsdecode(args[0]))
            if not where.startswith((self.folder, '/dev/', '/proc/')):
                self.seen.append(f'writes {where}')


def status(key):
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024


def trim():
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def allowed():
    """Seconds that a file may take: 2, or on a slow or shared processor as many as 40 times a piece of work takes,
    which is a twentieth of a second where it isn't"""
    start = time.process_time()
    sum(i % 7 for i in range(1_000_000))
    return max(SECONDS, 40 * (time.process_time() - start))


def observe(fmt, path, watch, result):
    "Load a file, and measure time and memory"
    trim()
    Path('/proc/self/clear_refs').write_text('5')
    before, start = status('VmRSS'), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 30)
    watch.folder, watch.seen, back = os.path.realpath(path.parent.parent), [], None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            back = fmt.load(path)
    except (ValueError, OSError) as e:
        result.error = type(e).__name__
        if str(path) not in str(e) and str(path.parent) not in str(e):
            result.faults.append(f'{result.error} names no file: {e}'[:300])
    except BaseException as e:
        result.error = type(e).__name__
        result.faults.append(''.join(traceback.format_exception(e))[-1500:])
    finally:
        watch.folder = None
    signal.setitimer(signal.ITIMER_REAL, 0)
    result.seconds, result.memory = time.process_time() - start, status('VmHWM') - before
    if result.seconds > SECONDS and result.seconds > allowed():
        result.faults.append(f'takes {result.seconds:.1f} s')
    if result.memory > TIMES * result.size + fmt.more:
        result.faults.append(f'takes {result.memory:,} bytes for {result.size:,}')
    result.faults += watch.seen
    return back


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def in_child(kind, folder, jobs, made, out):
    "Load files one by one, and write the results to `out`"
    fmt, watch = FORMATS[kind], Watch()
    good = folder / 'good'
    fmt.make(good)
    names = [p for p in sorted(good.glob(fmt.files)) if p.is_file()]
    whole = fmt.load(names[0])
    gc.freeze()
    resource.setrlimit(resource.RLIMIT_AS, (status('VmSize') + 2**31,) * 2)
    sys.addaudithook(watch)
    warm = False
    for name, make in jobs:
        work = folder / 'work'
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good, work)
        table = good / 'rounds.json'
        path = table if table in names and name in made else random.Random(name).choice(names)
        path = work / path.relative_to(good)
        if not warm:  # what any load needs, right or wrong, is in memory then
            observe(fmt, path, watch, Result(''))
            rest = path.read_bytes()
            path.write_bytes(rest[: len(rest) // 2])
            observe(fmt, path, watch, Result(''))
            path.write_bytes(rest)
            warm = True
        data = make(kind, path, path.read_bytes())
        path.write_bytes(data)
        result = Result(f'{kind} {name} {path.name}', size=len(data))
        out.write(json.dumps(['begin', result.name]) + '\n')
        out.flush()
        back = observe(fmt, path, watch, result)
        if fmt.checked and back is not None and name.startswith('bytes') and not same(back, whole):
            result.faults.append('loads as something else')
        out.write(json.dumps(['end', result.__dict__]) + '\n')
        out.flush()


def watched(kind, folder, jobs, made=()):
    "Results of loading files in another process. A file that kills it is at fault, and a new process loads the rest"
    results = []
    while jobs:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / 'good').mkdir(parents=True)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.close(read)
                with os.fdopen(write, 'w') as out:
                    in_child(kind, folder, jobs, made, out)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as lines:
            lines = [json.loads(line) for line in lines]
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done = [Result(**o) for what, o in lines if what == 'end']
        results += done
        jobs = jobs[len(done) :]
        if not code:
            break
        begun = [o for what, o in lines if what == 'begin']
        if len(begun) <= len(done):
            raise RuntimeError(f'{kind}: the good file does not load')
        results.append(
            Result(begun[-1], faults=[f'the process ended with {code}: killed, crashed, or longer than 30 s'])
        )
        jobs = jobs[1:]
    return results


def random_job(seed):
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return f'bytes {seed}', lambda kind, path, data: random_bytes(data, rng)
    return f'parts {seed}', lambda kind, path, data: damage(kind, path, data, rng)


def run(n, folder, seed=0, kinds=None, hostile=None):
    """Results for `n` random files of each kind in turn, and for hand-made ones in `hostile`: kind -> name -> function
    (kind, path, data) -> bytes"""
    kinds, results = list(kinds or FORMATS), []
    for i, kind in enumerate(kinds):
        jobs = [(name, make) for name, make in (hostile or {}).get(kind, {}).items()]
        jobs += [random_job(f'{seed} {kind} {j}') for j in range(n // len(kinds) + (i < n % len(kinds)))]
        results += watched(kind, Path(folder) / kind, jobs, (hostile or {}).get(kind, {}))
    return results


def summary(results):
    "The largest time and memory, and the counts of results"
    errors = Counter(r.error or 'loads' for r in results)
    slow, big = max(results, key=lambda r: r.seconds), max(results, key=lambda r: r.memory / (TIMES * r.size + MORE))
    lines = [
        f'{len(results)} files: {dict(errors)}',
        f'slowest: {slow.seconds:.2f} s, {slow.name}',
        f'most memory: {big.memory:,} bytes for {big.size:,}, {big.name}',
    ]
    return lines + [f'FAULT {r.name}: {f}' for r in results for f in r.faults]


if __name__ == '__main__':
    from hostile import HOSTILE

    with tempfile.TemporaryDirectory() as d:
        kinds = sys.argv[3:] or None
        results = run(int(sys.argv[1]), d, sys.argv[2] if len(sys.argv) > 2 else 0, kinds, HOSTILE)
    print(*summary(results), sep='\n')
    sys.exit(any(r.faults for r in results))
