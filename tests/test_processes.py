"Code in other processes: which of them failed, and how, and when they start again"

import signal

import pytest
from processes import printed, python, ranks

start = 'import os, sys, time; from pathlib import Path\nrank, mark = int(os.environ["RANK"]), Path(sys.argv[1])\n'
crash = 'mark.exists() or (mark.touch(), os.abort())'


def code(rank0, rank1):
    return f'{start}\nif rank == 0:\n    {rank0}\nelse:\n    {rank1}'


def test_starts_again_where_a_signal_ended_one(tmp_path):
    crashes = code('time.sleep(0 if mark.exists() else 1); print("done")', crash)
    r = ranks(2, crashes, tmp_path / 'a')
    assert r.crashed and r.returncode and f'rank 1 ended with -{signal.SIGABRT.value}' in r.ends[-1]
    assert 'Fatal Python error: Aborted' in r.ends[-1]
    assert printed(ranks, 2, crashes, tmp_path / 'b').split() == ['done']


def test_an_error_in_python_fails_at_once(tmp_path):
    with pytest.raises(
        AssertionError, match=r'(?s)rank 0 ended with 1: .*division by zero.*rank 1 ended with 1: .*as a result'
    ):
        printed(ranks, 2, code('1 / 0', 'time.sleep(1); raise OSError("as a result")'), tmp_path / 'a')


def test_a_time_limit_is_no_crash():
    r = python('import time; time.sleep(60)', timeout=1)
    assert r.returncode == -9 and not r.crashed
