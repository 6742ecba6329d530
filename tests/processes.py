"""Code in other processes.

Importing torch, fastai and fastprune takes five seconds. So one process of each pytest worker has imported them, and
others are forked from it: they are as clean as new ones, and start at once. It is a copy of the worker before its first
test (`serve`), or a process of its own. What is about the start itself, or about what is not imported, takes
`subprocess` or `torchrun`.

They see no GPU, since CUDA does not survive a fork."""

import atexit
import contextlib
import faulthandler
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

tests = Path(__file__).resolve().parent
forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['warm'])
HIDDEN = {'CUDA_VISIBLE_DEVICES': ''}


def serve():
    "From now on, processes are forked from a copy of this one, as it is now: nothing is imported once more"
    importlib.import_module('warm')
    with mock.patch('multiprocessing.util.spawnv_passfds', _copy):
        multiprocessing.forkserver.ensure_running()


def _copy(path, args, passed):
    "As the function of multiprocessing, in a copy of this process, which has its files of `passed` alone"
    if pid := os.fork():
        return pid
    try:
        faulthandler.disable()  # it writes to a file that is closed below
        last = max(passed)
        for fd in {*range(3, last)} - {*passed}:
            with contextlib.suppress(OSError):
                os.close(fd)
        os.closerange(last + 1, os.sysconf('SC_OPEN_MAX'))
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')  # not those that pytest reads
        atexit._clear()
        exec(args[-1], {})
    except SystemExit:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def _run(script, args, env, folder, stdin, stdout, stderr):
    "In the new process: runs a file, or code, as Python does with `-W ignore`"
    for stream, fd in ((stdin, 0), (stdout, 1), (stderr, 2)):
        if stream is not None:
            os.dup2(stream.fileno() if hasattr(stream, 'fileno') else os.open(stream, os.O_WRONLY | os.O_CREAT), fd)
    if stdin is not None:
        sys.stdin = open(0, closefd=False)
    faulthandler.enable(2)  # where a signal ends it, says in which line
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    warnings.simplefilter('ignore')
    multiprocessing.set_start_method('fork', force=True)  # workers of a DataLoader need not import all that again
    is_file = isinstance(script, Path)
    sys.argv = [str(script) if is_file else '-c', *args]
    sys.path[:0] = [str(script.parent)] if is_file else []
    try:
        if is_file:
            runpy.run_path(str(script), run_name='__main__')
        else:
            main = sys.modules['__main__'] = types.ModuleType('__main__')
            exec(compile(script, '<string>', 'exec'), main.__dict__)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


class Running:
    "A process that runs a file (a `Path`) or code, with pipes: `.stdin`, `.stdout`"

    def __init__(self, script, *args, env=(), folder=None, paths=()):
        (their_in, my_in), (my_out, their_out) = forks.Pipe(False), forks.Pipe(False)
        self.process = start(script, args, env, folder, their_in, their_out, None, paths)
        their_in.close()
        their_out.close()
        self.stdin, self.stdout = os.fdopen(os.dup(my_in.fileno()), 'w'), os.fdopen(os.dup(my_out.fileno()))
        my_in.close()
        my_out.close()
        self.pid = self.process.pid

    def send_signal(self, sig):
        os.kill(self.pid, sig)

    def wait(self, timeout=300):
        "The exit status; minus the signal where one has ended it"
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self):
        "Ends the process, whether it still runs or not"
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def start(script, args, env, folder, stdin, stdout, stderr, paths=()):
    "Forks a process that runs `script`, with `env` besides the environment of this one"
    environment = {**os.environ, **HIDDEN, **dict(env)}
    before = sys.path[:]
    sys.path[:0] = [*map(str, paths), str(tests)]  # the new process gets these
    try:
        process = forks.Process(
            target=_run, args=(script, [*map(str, args)], environment, str(folder or Path.cwd()), stdin, stdout, stderr)
        )
        found = os.pathsep.join(filter(None, (str(tests), os.environ.get('PYTHONPATH'))))
        with mock.patch.dict(os.environ, HIDDEN | {'PYTHONPATH': found}):  # for what the others are forked from
            process.start()
    finally:
        sys.path[:] = before
    return process


class Ended(subprocess.CompletedProcess):
    "With how each process failed, `ends`, and whether a signal `crashed` one"

    def __init__(self, code, out, err, ends, crashed):
        super().__init__([], code, out, err)
        self.ends, self.crashed = ends, crashed


def _said(err):
    "The part of an output that tells most: the line in which a signal came, else the end"
    before, fatal, after = err.partition('Fatal Python error')
    return (fatal + after)[:2000] if fatal else before[-2000:]


def _outcome(processes, outputs, timeout):
    "What came of them when all have ended, or at once where one has failed. Those that are killed here did not crash"
    end, left = time.monotonic() + timeout, {p.sentinel: p for p in processes}
    while left and time.monotonic() < end:
        for sentinel in wait(list(left), end - time.monotonic()):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode:
                end = min(end, time.monotonic() + 10)  # the others wait for it in vain
    crashed = any(p.exitcode < 0 for p in processes if p not in left.values())
    for process in left.values():
        process.kill()
        process.join()
    out, err = ([p.read_text() for p in paths] for paths in zip(*outputs, strict=True))
    codes = [p.exitcode for p in processes]
    ends = [f'rank {i} ended with {c}: {_said(e)}' for i, (c, e) in enumerate(zip(codes, err, strict=True)) if c]
    code = next(filter(None, codes), 0)
    return Ended(code, '\n'.join(filter(None, out)), '\n'.join(filter(None, err)), ends, crashed)


def python(script, *args, env=(), folder=None, paths=(), timeout=300):
    "Runs a file (a `Path`) or code in another process; `paths` are added to those that it imports from"
    return ranks(1, script, *args, env=env, folder=folder, paths=paths, timeout=timeout, group=False)


def ranks(n, script, *args, env=(), folder=None, paths=(), timeout=300, group=True):
    "`n` processes of a group, on a CPU, as `torchrun` starts them"
    with socket.socket() as s, tempfile.TemporaryDirectory() as temp:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
        s.close()
        processes, outputs = [], []
        for rank in range(n):
            of_rank = dict(env)
            if group:
                of_rank |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
                of_rank |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
            outputs.append((Path(temp) / f'out{rank}', Path(temp) / f'err{rank}'))
            for path in outputs[-1]:
                path.touch()
            processes.append(start(script, args, of_rank, folder, None, *map(str, outputs[-1]), paths=paths))
        return _outcome(processes, outputs, timeout)


def torchrun(n, *args, use_cpu=True):
    """`n` processes of a script, as `torchrun` starts them, that have ended; with `ACCELERATE_USE_CPU` in their
    environment, or without it"""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'CUDA_VISIBLE_DEVICES': ''}
    env |= {'ACCELERATE_USE_CPU': 'true'} if use_cpu else {}
    r = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    crashed = 'terminate called without an active exception' in r.stderr
    return Ended(r.returncode, r.stdout, r.stderr, [r.stderr[-3000:]], crashed)


def printed(f, n, *args, **kwargs):
    """What `n` processes print. They start again where a signal ended one, not an error in Python: now and then, on a
    busy machine, torch's gloo aborts, such as where one of its threads is not joined at the end"""
    for _ in range(3):
        r = f(n, *args, **kwargs)
        if not r.crashed:
            break
    assert r.returncode == 0, '\n\n'.join(r.ends)
    return r.stdout
