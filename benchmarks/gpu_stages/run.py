"What the stages of gpu.py share: where they run, and where their rows go"

import time
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

    def checks(self, stage):
        "A function (case, result, detail) that writes a row of checks.csv"
        rows = Rows('checks', self.device, self.out)

        def check(case, result, detail=''):
            rows.add(stage=stage, case=case, result=result, detail=' '.join(str(detail).split()))

        return check


def verdict(ok):
    return 'passed' if ok else 'FAILED'
