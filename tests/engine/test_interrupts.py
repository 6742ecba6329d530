"Ctrl-C at any line of an update: zeros and masks agree afterwards, and the training can go on"

import sys

import pytest
import torch
from torch import nn

import fastprune
from fastprune.all import Masks, linear
from fastprune.core import selection_host
from fastprune.core.selection_host import CompiledSelection, HostSelection
from fastprune.engine.method import Method
from fastprune.engine.sparsifier import Sparsifier

pytestmark = pytest.mark.cpu_only

PACKAGE = fastprune.__path__[0]
STEPS, BEFORE = 10, 5  # of the training, and before the step that is interrupted
STRIDE = 13  # every so many lines


def selection_by(how, monkeypatch):
    "Selection by machine code or by NumPy, for small networks, too"
    monkeypatch.setattr(selection_host, 'FEW', 0)
    selection = CompiledSelection() if how == 'machine code' else HostSelection()
    if how == 'machine code':
        selection.worth.seen = float('inf')
    monkeypatch.setattr('fastprune.core.backends._host', selection)


def interrupt_at(number):
    "Raise KeyboardInterrupt at a line of the package, by the count of lines that have run"
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        seen += event == 'line'
        if seen == number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)


def started(scope):
    "A training in the middle of a step: the optimizer has moved pruned weights"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Sparsifier(model, Method(0.8, linear, scope=scope, interval=1), total_steps=STEPS, optimizer=opt)
    for _ in range(BEFORE):
        begin_step(model, opt, pruner)
        pruner.after_step()
    begin_step(model, opt, pruner)
    return model, opt, pruner


def begin_step(model, opt, pruner):
    opt.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.arange(16) % 3).backward()
    pruner.before_step()
    opt.step()


def assert_consistent(model, masks):
    weights = {n: p for n, p in model.named_parameters() if n in masks}
    assert Masks.from_zeros(weights) == masks


@pytest.mark.sample(2)
@pytest.mark.parametrize('scope', ['local', 'global'])
@pytest.mark.parametrize('how', ['machine code', 'NumPy'])
def test_interrupted_at_any_line(how, scope, monkeypatch):
    selection_by(how, monkeypatch)
    line, found, is_interrupted = 1, set(), True
    while is_interrupted:
        model, opt, pruner = started(scope)
        is_interrupted, tracer = False, sys.gettrace()
        interrupt_at(line)
        try:
            pruner.after_step()
        except KeyboardInterrupt:
            is_interrupted = True
            pruner.keeper.project()  # as `close` does
        finally:
            sys.settrace(tracer)
        assert_consistent(model, pruner.masks)
        found.add(round(pruner.masks.sparsity, 3))
        if is_interrupted:
            pruner.after_step()
        while not pruner.has_ended:
            begin_step(model, opt, pruner)
            pruner.after_step()
        assert_consistent(model, pruner.masks)
        assert pruner.masks.sparsity == pytest.approx(0.8, abs=0.01)
        line += STRIDE
    assert line > 500
    assert (min(found), max(found)) == (0.4, 0.478)  # the masks before the update, and those after it


def test_kept_zeros_stay_kept(monkeypatch):
    "Where Ctrl-C comes before anything is written"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    model, opt, pruner = started('local')
    before = pruner.masks
    with torch.no_grad():
        model[0].weight[before['0.weight']] = 0
    monkeypatch.setattr('fastprune.engine.hooks.compute_masks', interrupt)
    with pytest.raises(KeyboardInterrupt):
        pruner.after_step()
    assert pruner.masks == before
