"What the stages of gpu.py share: where they run, and where their rows go"

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import Rows


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

    def stage(self, name):
        "Run another stage in a process of its own, within the time that is left"
        script = Path(__file__).resolve().parents[1] / 'gpu.py'
        limit = max(2, self.left - 2)
        args = ['--device', self.device, '--out', self.out, '--limit', f'{limit}', *['--small'] * self.small]
        try:
            subprocess.run([sys.executable, str(script), name, *args], timeout=limit + 1)
        except subprocess.TimeoutExpired:
            self.checks('stages')(name, 'FAILED: its time is up')

    def checks(self, stage):
        "A function (case, result, detail) that writes a row of checks.csv"
        rows = Rows('checks', self.device, self.out)

        def check(case, result, detail=''):
            rows.add(stage=stage, case=case, result=result, detail=' '.join(str(detail).split()))

        return check


def verdict(ok):
    return 'passed' if ok else 'FAILED'
