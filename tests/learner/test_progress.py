"Progress bars: seen on a terminal alone, quiet under `no_bar`, and without any effect on results"

import io
import time
from types import SimpleNamespace

import pytest
import torch
from fastprogress import fastprogress

from fastprune.all import SparsifyCallback, digits_convnet, sparse_inference, sweep
from fastprune.learner import progress as bars
from fastprune.zoo.learners import digits_learner, quiet_fit


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    "(value, comment) of each update of a bar, and 'end'; with no patience"
    seen = []

    class Bar(fastprogress.ProgressBar):
        def on_update(self, val, text):
            seen.append((val, self.comment))

        def on_iter_end(self):
            seen.append('end')

    monkeypatch.setattr(bars, 'progress_bar', Bar)
    monkeypatch.setattr(bars, '_patience', 0.0)
    monkeypatch.setattr(bars, '_pause', 0.0)
    monkeypatch.setattr(bars, 'IN_NOTEBOOK', False)
    monkeypatch.setattr(bars, 'sys', SimpleNamespace(stdout=Terminal()))
    return seen


def work():
    with bars.progress():
        for i in range(4):
            with bars.nth(i, 4, 'job'):
                bars.doing('its half', 0.5)


def values(shown):
    return [o[0] for o in shown if o != 'end']


def test_values_and_comments(shown):
    work()
    assert shown == [
        (0, ''),
        *[(1, 'job 1 of 4'), (12, 'its half'), (25, 'job 2 of 4'), (37, 'its half')],
        *[(50, 'job 3 of 4'), (62, 'its half'), (75, 'job 4 of 4'), (87, 'its half'), 'end'],
    ]


def test_a_bar_never_goes_back_and_ends_once(shown):
    with bars.progress():
        for share in (0.5, 0.2, 0.9, 5.0):
            bars.doing('this', share)
    assert shown == [(0, ''), (50, 'this'), (50, 'this'), (90, 'this'), (99, 'this'), 'end']


def test_a_bar_in_a_bar_is_its_part(shown):
    with bars.progress(), bars.part(0.5, 1.0):
        work()
    assert values(shown) == [0, 50, 56, 62, 68, 75, 81, 87, 93] and shown.count('end') == 1


def test_an_error_ends_it(shown):
    def fails():
        for i in bars.bar_over(None, range(3)):
            if i:
                raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert shown[-1] == 'end' and bars._present.get() is None


@pytest.mark.parametrize('why', ['no terminal', 'no stdout', 'NO_BAR', 'rank', 'patience', 'show'])
def test_silence(shown, monkeypatch, why):
    if why == 'no terminal':
        monkeypatch.setattr(Terminal, 'isatty', lambda self: False)
    elif why == 'no stdout':
        bars.sys.stdout = None
    elif why == 'NO_BAR':
        monkeypatch.setattr(fastprogress, 'NO_BAR', True)
    elif why == 'rank':
        monkeypatch.setenv('RANK', '1')
    elif why == 'patience':
        monkeypatch.setattr(bars, '_patience', 60.0)
    with bars.progress(show=why != 'show'):
        work()
    assert shown == []


@pytest.fixture(scope='module')
def pruned():
    learn = digits_learner()
    quiet_fit(learn, 1, cbs=SparsifyCallback(0.9))
    return learn


@pytest.fixture
def jobs(pruned, tmp_path):
    "Calls that take their time, by name"

    def tickets():
        learn = digits_learner()
        learn.find_tickets(2, lambda learn, cbs: quiet_fit(learn, 1, cbs=cbs), measure='none')

    def shrunk():
        learn = digits_learner()
        learn.prune(0.5, granularity='channel')
        learn.shrink(repeats=1)

    def rows(n_workers):
        return sweep(digits_learner_of, {'none': lambda learn, s, seed: None}, [0.5], [0, 1], n_workers=n_workers)

    return {
        'sparse_inference': (lambda: pruned.sparse_inference(seconds=0.1), 'timing'),
        'to_onnx': (lambda: pruned.to_onnx(tmp_path / 'a.onnx'), 'tracing'),
        'report': (lambda: pruned.report(tmp_path / 'a.html', seconds=0.1), 'counting FLOPs'),
        'shrink': (shrunk, 'cutting'),
        'find_tickets': (tickets, 'round 2 of 2'),
        'sweep': (lambda: rows(0), 'run 2 of 2'),
        'sweep by a worker': (lambda: rows(1), 'run 2 of 2'),
    }


def digits_learner_of(seed):
    return digits_learner(seed=seed)


all_jobs = ['sparse_inference', 'to_onnx', 'report', 'shrink', 'find_tickets', 'sweep', 'sweep by a worker']


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', all_jobs)
def test_each_has_one_bar(shown, jobs, name, monkeypatch):
    if name == 'to_onnx':
        pytest.importorskip('onnxscript', reason='it writes ONNX')
    if name == 'report':
        pytest.importorskip('plotly', reason='reports need plotly')
    call, what = jobs[name]
    comments, doing = [], bars._Bar.show
    monkeypatch.setattr(bars._Bar, 'show', lambda self, share, c: (comments.append(c), doing(self, share, c)))
    call()
    assert any(what in o[1] for o in shown if o != 'end')
    assert shown.count('end') == 1 and values(shown) == sorted(values(shown)) and len(set(comments)) < 40


def test_updates_have_a_pause(shown, monkeypatch):
    monkeypatch.setattr(bars, '_pause', 0.05)
    start = time.perf_counter()
    with bars.progress():
        for i in range(2000):
            bars.doing('timing', i / 2000)
    assert len(shown) - 2 <= 1 + (time.perf_counter() - start) / 0.05  # without the bar's own first and 'end'


def test_none_under_no_bar(shown, pruned, jobs):
    pytest.importorskip('plotly', reason='reports need plotly')
    with pruned.no_bar():
        for name in ('sparse_inference', 'report'):
            jobs[name][0]()
    assert shown == []


def test_functions_of_a_model_have_one_too(shown):
    sparse_inference(digits_convnet(), torch.rand(2, 1, 8, 8), seconds=0.1)
    assert shown.count('end') == 1


def test_results_are_the_same(shown, monkeypatch):
    "Tickets with a bar and without"

    def masks():
        learn = digits_learner()
        return learn.find_tickets(1, lambda learn, cbs: quiet_fit(learn, 1, cbs=cbs), measure='none')[-1].masks

    with_bar = masks()
    assert shown
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)
    without = masks()
    assert all(torch.equal(m, without[n]) for n, m in with_bar.items())
