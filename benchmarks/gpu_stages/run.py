"What the stages of gpu.py share: where they run, and where their rows go"

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import Rows

LEAST = 2  # seconds for a stage, even if no time is left


class Run(NamedTuple):
    "One run of a stage"

    device: str  # 'cpu' or 'cuda'
    small: bool  # Small sizes, to try the stage itself?
    out: str  # Folder of the CSV files
    deadline: float = float('inf')  # By `time.monotonic()`; stages with many cases stop before it

    @property
    def left(self):
        "Seconds until the deadline"
        return self.deadline - time.monotonic()

    def stage(self, name, seconds):
        "Run another stage in a process of its own, which is ended after so many seconds, with all that it has started"
        script = Path(__file__).resolve().parents[1] / 'gpu.py'
        limit = max(LEAST, seconds - 2)
        args = ['--device', self.device, '--out', self.out, '--limit', f'{limit}', *['--small'] * self.small]
        process = subprocess.Popen([sys.executable, str(script), name, *args], start_new_session=True)
        try:
            process.wait(limit + 1)
        except subprocess.TimeoutExpired:
            self.checks('stages')(name, 'FAILED: its time is up')
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def checks(self, stage):
        "A function (case, result, detail) that writes a row of checks.csv"
        rows = Rows('checks', self.device, self.out)

        def check(case, result, detail=''):
            rows.add(stage=stage, case=case, result=result, detail=' '.join(str(detail).split()))

        return check


def verdict(ok):
    return 'passed' if ok else 'FAILED'
