"A fit that was stopped and started again ends with the same bits"

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Adam, Callback, OptimWrapper, params, ranger
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, SaveModelCallback
from helpers import FEW, METHODS, SGDM, Crash, each_class, equal, same, stopped
from processes import Running, python
from torch import nn

from fastprune.all import (
    GMP,
    Checkpoint,
    SparsifyCallback,
    cubic,
    cyclical,
    digits_convnet,
    load_state,
    movement,
    save_state,
    taylor,
    updating_movement,
)
from fastprune.core.files import load_tensors
from fastprune.training.state import pack, unpack

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def drop(learner, **kw):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(digits_convnet(widths=(8, 16, 16))[:-1], nn.Dropout(0.2), nn.Linear(16, 10))
        return learner(model, **(kw if 'bs' in kw else FEW | kw))

    return make


@pytest.mark.sample(2)
@each_class
def test_every_method(learner, method):
    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(3, 0.02, cbs=[method(0.8), *cbs])

    whole, again = stopped(drop(learner, opt_func=SGDM, wd=0.01), fit, epoch=1, i=4)
    assert same(whole, again) and again.recorder.iters == whole.recorder.iters
    np.testing.assert_array_equal(
        np.array(whole.recorder.values, dtype=float), np.array(again.recorder.values, dtype=float)
    )


OPTIMIZERS = {'Adam': Adam, 'ranger': ranger, 'torch AdamW': partial(OptimWrapper, opt=torch.optim.AdamW)}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'opt,epoch,i',
    [
        ('Adam', 1, 0),
        ('ranger', 3, 5),
        ('torch AdamW', 1, 5),
        pytest.param('Adam', 1, 5, marks=pytest.mark.slow),
        pytest.param('Adam', 3, 5, marks=pytest.mark.slow),
        pytest.param('ranger', 1, 5, marks=pytest.mark.slow),
        pytest.param('ranger', 1, 0, marks=pytest.mark.slow),
        pytest.param('torch AdamW', 1, 0, marks=pytest.mark.slow),
        pytest.param('torch AdamW', 3, 5, marks=pytest.mark.slow),
    ],
)
def test_optimizers_and_moments(learner, opt, epoch, i):
    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(4, 0.01, cbs=[SparsifyCallback(0.8, schedule=cyclical(cubic, 2), track=True), *cbs])

    assert same(*stopped(drop(learner, opt_func=OPTIMIZERS[opt]), fit, epoch, i))


@pytest.mark.parametrize('method', [METHODS['STR'], METHODS['DST']])
def test_thresholds_with_lookahead(learner, method):
    "It has slow weights of what joins the optimizer, for as long as that has joined"

    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 0.01, cbs=[method(0.8), *cbs])

    assert same(*stopped(drop(learner, opt_func=ranger), fit, 1, 3))


class Branch(nn.Module):
    "A layer that does not run after the first epoch"

    def __init__(self):
        super().__init__()
        self.body, self.branch, self.on = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Linear(10, 10), True

    def forward(self, x):
        x = self.body(x)
        return x + self.branch(x) if self.on else x


class TurnOff(Callback):
    def before_epoch(self):
        self.model.on = self.epoch == 0


def test_zero_gradients(learner):
    "fastai's optimizers step parameters that have them, by momentum and decay, and not those without gradients"

    def make():
        torch.manual_seed(0)
        return learner(Branch(), opt_func=SGDM, wd=0.01, cbs=TurnOff(), **FEW)

    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit(3, 0.1, cbs=[SparsifyCallback(0.8, criterion=taylor), *cbs])

    assert same(*stopped(make, fit, 1, 3))


def test_accumulation_over_the_end_of_an_epoch(learner):
    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(4, 0.02, cbs=[SparsifyCallback(0.8, criterion=taylor), GradientAccumulation(300), *cbs])

    class CrashAnyway(Crash):
        def after_batch(self):
            if self.training and (self.epoch, self.iter) == self.at:
                raise RuntimeError('power is out')

    make = drop(learner, opt_func=SGDM)
    whole = make()
    fit(whole)
    with pytest.raises(RuntimeError, match='power'):
        fit(make(), Checkpoint('run'), CrashAnyway(2, 3))
    again = make()
    fit(again, Checkpoint('run'))
    assert same(whole, again)


def test_bimp_sculpt_and_criteria_with_a_memory(learner):
    for how in (
        lambda l, *cbs: l.fit_bimp(4, 0.8, cycles=2, lr_max=0.02, cbs=list(cbs)),
        lambda l, *cbs: l.fit_sculpt(0.8, 0.6, 3, 1, lr=0.02, cbs=list(cbs)),
        lambda l, *cbs: l.fit(4, 0.02, cbs=[SparsifyCallback(0.8, criterion=movement), *cbs]),
        lambda l, *cbs: l.fit(4, 0.02, cbs=[SparsifyCallback(0.8, criterion=updating_movement), *cbs]),
    ):

        def fit(learn, *cbs, how=how):
            with learn.no_bar(), learn.no_logging():
                how(learn, *cbs)

        whole, again = stopped(drop(learner, opt_func=SGDM), fit)
        assert same(whole, again)
        (again.path / again.model_dir / 'run.safetensors').unlink()


def test_fine_tune_has_two_fits(learner):
    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(3, 0.02, freeze_epochs=1, cbs=[SparsifyCallback(0.8), *cbs])

    make = drop(learner, opt_func=SGDM, splitter=lambda m: [params(m[:1]), params(m[1:])])

    class Late(Crash):
        def after_step(self):
            if self.learn.n_epoch == 3:
                super().after_step()

    whole = make()
    fit(whole)
    for epoch in (0, 1):
        with pytest.raises(RuntimeError, match='power'):
            fit(make(), Checkpoint('run'), Late(epoch, 3))
    again = make()
    fit(again, Checkpoint('run'))
    assert same(whole, again)
    done = make()
    fit(done, Checkpoint('run'), Crash(0, 0))  # nothing is trained again
    assert (
        all(
            torch.equal(a, b)
            for a, b in zip(done.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
        )
        and done.masks == whole.masks
    )


def test_trackers_remember(learner):
    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit(6, 0.05, cbs=[EarlyStoppingCallback('valid_loss', patience=2, min_delta=10), *cbs])

    whole, again = stopped(drop(learner, opt_func=SGDM), fit, 1, 3)
    assert same(whole, again) and len(again.recorder.values) == len(whole.recorder.values) == 3


def test_a_tracker_in_the_same_learner(learner):
    "The stopped fit has left it sparse, which changes nothing in the plan"

    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit(5, 0.02, cbs=[SparsifyCallback(0.8), SaveModelCallback(), *cbs])

    make = drop(learner, opt_func=SGDM)
    whole = make()
    fit(whole)
    again = make()
    with pytest.raises(RuntimeError, match='power'):
        fit(again, Checkpoint('run'), Crash(2, 6))
    fit(again, Checkpoint('run'))
    assert same(whole, again)


class Validates(Callback):
    "Validates inside of an epoch, as for another data set"

    order, inside = 0, False

    def validate(self):
        if not self.inside:
            self.inside = True
            with torch.random.fork_rng(devices=[]):
                self.learn.validate()
            self.inside = False


@pytest.mark.sample(2)
@pytest.mark.parametrize('event', ['before_epoch', 'after_train', 'after_epoch'])
def test_a_validation_inside_of_an_epoch(learner, event):
    "It is no epoch: Checkpoint and trackers leave it out"
    here = type('Here', (Validates,), {event: Validates.validate})
    make = drop(learner, opt_func=SGDM)

    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit(3, 0.02, cbs=[SparsifyCallback(0.8), SaveModelCallback(), *cbs])

    alone = make()
    fit(alone)
    whole, again = stopped(make, lambda learn, *cbs: fit(learn, here(), *cbs), 1, 3)
    assert same(alone, whole) and same(whole, again)


def test_a_callback_that_is_off_stays_off(learner):
    class Off(Callback):
        run = False

        def after_step(self):
            raise AssertionError('it is off')

    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 0.02, cbs=[Off(), *cbs])

    stopped(drop(learner), fit, 1, 3)


def test_every_second_epoch_and_fastais_own_checkpoint(learner, tmp_path):
    make = drop(learner, opt_func=SGDM)

    def fit(learn, *cbs, **kw):
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(5, 0.02, cbs=[SparsifyCallback(0.8), *cbs], **kw)

    whole, again = stopped(make, fit, 3, 3, every=2)
    assert same(whole, again)
    (tmp_path / 'models' / 'run.safetensors').unlink()
    with pytest.raises(RuntimeError):
        fit(make(), SaveModelCallback(every_epoch=True, with_opt=True), Checkpoint('run'), Crash(3, 0))
    kept = (tmp_path / 'models' / 'model_1.pth').read_bytes()
    learn = make()
    learn.load('model_2', with_opt=True)
    fit(learn, Checkpoint('run'), SaveModelCallback(every_epoch=True, with_opt=True), start_epoch=3)
    assert (tmp_path / 'models' / 'model_1.pth').read_bytes() == kept  # epochs that are skipped write nothing
    assert same(whole, learn)


def test_lr_find_writes_nothing(learner, tmp_path):
    learn = learner(cbs=Checkpoint('run'), **FEW)
    weights, path = [p.detach().clone() for p in learn.model.parameters()], tmp_path / 'models/run.safetensors'
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=20, show_plot=False)  # 3 epochs
        assert not path.exists()
        assert all(torch.equal(a, b) for a, b in zip(weights, learn.model.parameters(), strict=True))
        learn.fit(1, 0.02)
        written = path.read_bytes()
        learn.lr_find(num_it=20, show_plot=False)
    assert path.read_bytes() == written


def test_bad_files_and_arguments(learner, tmp_path):
    with pytest.raises(ValueError, match='every=0'):
        Checkpoint('run', every=0)

    def fit(learn, n=2, cb=SparsifyCallback, **kw):
        with learn.no_bar(), learn.no_logging():
            learn.fit(n, 0.02, cbs=[cb(0.8), Checkpoint('run', **kw)])

    make, path = drop(learner, opt_func=SGDM), tmp_path / 'models' / 'run.safetensors'
    fit(make())
    good = path.read_bytes()
    before = make()
    keep = {n: t.clone() for n, t in before.model.state_dict().items()}
    head = good.index(b'grad_avg')
    for what, data, msg in (
        ('header', good[:head] + b'hrad_avg' + good[head + 8 :], 'damaged'),
        ('half', good[: len(good) // 2], 'damaged'),
        ('flipped', good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], 'damaged'),
        ('empty', b'', 'damaged'),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=msg):
            fit(before)
        assert before.masks is None and all(equal(keep[n], t) for n, t in before.model.state_dict().items()), what
    save_state({'a': torch.ones(1)}, path)
    with pytest.raises(ValueError, match='not a checkpoint'):
        fit(before)
    path.write_bytes(good)
    with pytest.raises(ValueError, match='epochs was 2 there, and is 3 now'):
        fit(before, 3)
    with pytest.raises(ValueError, match='pruning was'):
        fit(before, cb=GMP)
    with pytest.raises(ValueError, match='pruning was'):
        fit(before, cb=lambda s: SparsifyCallback(0.7))
    with pytest.raises(ValueError, match='optimizer was'):
        fit(drop(learner, opt_func=Adam)())
    with pytest.raises(ValueError, match='model was'):
        fit(learner(opt_func=SGDM))
    fit(before, 3, resume=False)
    assert before.masks is not None


def test_what_can_be_packed():
    obj = {
        'a': [1.5, None, True, 'x', {2: torch.arange(3)}],
        'n': [0.1 * i for i in range(20)],
        'i': list(range(30)),
        's': [torch.tensor(float(i)) for i in range(12)],
        'np': np.float32(3),
        'empty': [],
    }
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(obj, tensors))), tensors)
    assert (
        back['n'] == obj['n']
        and back['i'] == obj['i']
        and equal(back['a'][4][2], torch.arange(3))
        and back['a'][:4] == obj['a'][:4]
        and equal(torch.stack(back['s']), torch.arange(12.0))
        and back['empty'] == []
    )
    with pytest.raises(ValueError, match='a function'):
        pack({'f': lambda: 0}, {})


script = '''
import sys
from fastai.basics import *
from fastprune.all import *
set_seed(42, reproducible=True)
torch.set_num_threads(1)
model = digits_convnet(widths=(8, 16, 16))
learn = Learner(digits_dls(bs=256), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=sys.argv[1])
class Say(Callback):
    order = 99
    def after_epoch(self): print(self.epoch, flush=True)
with learn.no_bar(), learn.no_logging():
    learn.fit_one_cycle(12, 1e-2, cbs=[SparsifyCallback(0.9, scope='global'), Checkpoint('run'), Say()])
save_state(learn.model.state_dict(), Path(sys.argv[1])/'end.safetensors')
'''


@pytest.mark.parametrize('sig', [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_and_started_again(tmp_path, sig):
    "Wherever it is killed, what is on disk is whole, and the next start goes on"
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert not python(script, whole).returncode
    for n in (2, 3):
        p = Running(script, killed)
        for _ in range(n):
            p.stdout.readline()
        p.send_signal(sig)
        assert p.wait() == -sig
        p.kill()
        load_tensors(killed / 'models' / 'run.safetensors')
    assert not python(script, killed).returncode
    a, b = (load_state(o / 'end.safetensors') for o in (whole, killed))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_full_disk(learner, tmp_path, monkeypatch):
    "An error while writing leaves the file before it, and a consistent model"
    import fastprune.core.files as files

    make = drop(learner, opt_func=SGDM)
    path, real, calls = tmp_path / 'models' / 'run.safetensors', files.save_file, []

    def full(tensors, p, *args):
        calls.append(p)
        real(tensors, p, *args)
        if len(calls) == 2:
            os.truncate(p, 1000)
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files, 'save_file', full)
    learn = make()
    with pytest.raises(OSError, match='No space'):
        with learn.no_bar(), learn.no_logging():
            learn.fit(4, 0.02, cbs=[SparsifyCallback(0.8), Checkpoint('run')])
    assert all((p[~learn.masks[n]] == 0).all() for n, p in learn.model.named_parameters() if n in learn.masks)
    assert json.loads(load_tensors(path)[1]['fit'])['d'] and not list(path.parent.glob('*.part'))
