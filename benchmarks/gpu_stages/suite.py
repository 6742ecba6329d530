"The tests, with data and models on the device"

import os
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from .run import verdict

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ('callback', 'kinds', 'distill', 'reconstruct', 'trackers', 'resume')
LEARNER = ('recalibrate', 'averages', 'passes')
TESTS = (
    *('core', 'engine', 'methods', 'criteria'),
    *(f'training/test_{n}.py' for n in TRAINING),
    *(f'learner/test_{n}.py' for n in LEARNER),
)
FEW = ('core/test_layouts.py',)
SLOWEST = 15  # tests that are named


class Results:
    "Writes each failure as it comes, and stops the session at the deadline"

    def __init__(self, run, check):
        self.run, self.check, self.counts, self.late = run, check, Counter(), False
        self.seconds = Counter()  # test -> seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_runtest_logreport(self, report):
        if report.when == 'call' or report.failed or report.skipped:
            self.counts[report.outcome] += 1
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            lines = str(report.longrepr).splitlines()
            errors = [line for line in lines if line.startswith('E ')] or lines
            self.check(report.nodeid, 'FAILED', ' '.join(errors[:3])[:400])
        if self.run.left < 5 and not self.late:
            self.late, self.session.shouldstop = True, 'the time is up'


def suite(run):
    "pytest, within the time that is left"
    check, start = run.checks('tests'), time.monotonic()
    has_option = "'--device'" in (ROOT / 'tests' / 'conftest.py').read_text()
    if not has_option and run.device != 'cpu':
        check('pytest --device', 'FAILED', 'tests/conftest.py has no option --device: the tests run on the CPU')
    tests = os.environ.get('TESTS', '').split() or (FEW if run.small else TESTS)
    chosen = [str(ROOT / 'tests' / t) for t in tests if (ROOT / 'tests' / t).exists()]
    many = ['-n', '2' if run.small else '12', '--dist', 'worksteal'] if find_spec('xdist') and not run.small else []
    args = [*chosen, '-q', '-o', 'addopts=', '-m', 'not slow', '-p', 'no:cacheprovider', '--rootdir', str(ROOT), *many]
    results = Results(run, check)
    code = pytest.main([*args, *(['--device', run.device] if has_option else [])], plugins=[results])
    ended = 'stopped by its deadline' if results.late else f'exit code {int(code)}'
    counts = ', '.join(f'{n} {outcome}' for outcome, n in sorted(results.counts.items()))
    slowest = ', '.join(f'{t:.1f} s {n.removeprefix("tests/")}' for n, t in results.seconds.most_common(SLOWEST))
    check('slowest', 'counted', f'{sum(results.seconds.values()):.0f} s in all: {slowest}')
    detail = f'{counts}; {ended}, {time.monotonic() - start:.0f} s'
    check('all', verdict(code == 0 or results.late and not results.counts['failed']), detail)
