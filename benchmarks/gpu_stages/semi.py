"Which way to a 2:4 product ends in an error that costs a process its GPU. Each has a process of its own"

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .run import verdict
from .semi_step import STEPS

STEP = Path(__file__).with_name('semi_step.py')
LIMIT = 30  # seconds for each
SHOWN = 12  # lines of the output
ROWS = (64, 1024, 8192)


def tried(run, step):
    "The step, its exit code, its output, and the last line of its errors"
    size = ['64', '8'] if run.small else ['4096', *map(str, ROWS)]
    env = {**os.environ, 'CUDA_LAUNCH_BLOCKING': '1'}  # an error is raised by the kernel that it is of
    try:
        done = subprocess.run(
            [sys.executable, str(STEP), step, run.device, *size],
            capture_output=True,
            text=True,
            timeout=max(2, min(LIMIT, run.left - 3)),
            env=env,
        )
        code, out, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as e:
        code, out, errors = 'too late', e.stdout or '', ''
        out = out.decode() if isinstance(out, bytes) else out
    raised = [line for line in errors.splitlines() if 'Error' in line]
    return step, code, out.splitlines(), raised[-1][:200] if raised else ''


def semi(run):
    check = run.checks('semi')
    with ThreadPoolExecutor(5) as pool:
        for step, code, lines, error in pool.map(lambda s: tried(run, s), STEPS):
            result = 'counted' if run.device == 'cpu' else verdict(code == 0)
            shown = [*lines[:2], '...', *lines[2 - SHOWN :]] if len(lines) > SHOWN else lines
            check(step, result, f'exit code {code}; {"; ".join(shown)}; {error}')
