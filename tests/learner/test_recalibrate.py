"BatchNorm's statistics are estimated again, and nothing else changes"

import contextlib
import random
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
from fastai.callback.all import CSVLogger, EarlyStoppingCallback, MixedPrecision, MixUp, SaveModelCallback
from torch import nn
from torch.optim.swa_utils import update_bn

from fastprune.all import digits_convnet, digits_dls, state_of

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


class Branched(nn.Module):
    "A network with dropout, a layer that no batch reaches, and one that is passed twice"

    def __init__(self):
        super().__init__()
        self.body, self.twice, self.unused = digits_convnet(widths=(8, 8))[:2], nn.BatchNorm2d(8), nn.BatchNorm1d(3)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x):
        return self.head(self.twice(torch.relu(self.twice(self.body(x)))))


def make(tmp_path, model=None, shuffle=True, **kwargs):
    set_seed(3, reproducible=True)
    dls = digits_dls(bs=128)
    if not shuffle:
        dls = DataLoaders(dls.train.new(shuffle=False, drop_last=False), dls.valid, device=dls.device)
    kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=partial(SGD, mom=0.9)) | kwargs
    return Learner(dls, digits_convnet(widths=(8, 8)) if model is None else model, path=tmp_path, **kwargs)


@contextlib.contextmanager
def quietly(learn):
    with learn.no_bar(), learn.no_logging():
        yield


def trained(learn, n=2, **kwargs):
    with quietly(learn):
        learn.fit(n, 0.05, **kwargs)
    return learn


def equal(a, b):
    "Are two dicts or lists of tensors, or of None, the same to the bit?"
    if isinstance(a, dict):
        return a.keys() == b.keys() and equal(list(a.values()), list(b.values()))
    return len(a) == len(b) and all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def by_torch(learn, n=None):
    "What torch's own function finds for a model without dropout, in order"
    model = deepcopy(learn.model)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    batches = [x for x, _ in learn.dls.train][:n]
    update_bn(batches, model)
    return model.state_dict()


@pytest.mark.sample(2)
@pytest.mark.parametrize('n', [None, 1, 3, 1000])
def test_statistics_are_those_of_a_pass(tmp_path, n):
    learn = trained(make(tmp_path, shuffle=False))
    learn.prune(0.8)
    want = by_torch(learn, n)
    assert not equal(want, learn.model.state_dict())
    learn.recalibrate(n)
    assert equal(want, learn.model.state_dict())
    first = norms(learn.model)[0]
    with torch.no_grad():
        xs = [learn.model[0][0](x) for x, _ in list(learn.dls.train)[:n]]
    means, variances = zip(*[(x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1)) for x in xs], strict=True)
    assert torch.allclose(first.running_mean, sum(means) / len(xs), atol=1e-6)
    assert torch.allclose(first.running_var, sum(variances) / len(xs), atol=1e-6)
    assert int(first.num_batches_tracked) == len(xs)


def test_accuracy_is_back(tmp_path):
    learn = trained(make(tmp_path, digits_convnet()), 4)
    other = deepcopy(learn.model)
    with quietly(learn):
        learn.prune(0.8)
        pruned = learn.validate()[1]
        learn.recalibrate()
        again = learn.validate()[1]
        assert again > pruned + 0.2
        learn.remove_masks()
        learn.model.load_state_dict(other.state_dict())
        learn.prune(0.8, recalibrate=True)
        assert learn.validate()[1] > pruned + 0.2
        learn.prune(0.9, recalibrate=2)
    assert all(int(m.num_batches_tracked) == 2 for m in norms(learn.model))


def everything(learn):
    "What has to be as it was, but for the statistics"
    rest = {n: t for n, t in state_of(learn).items() if 'running' not in n and 'num_batches' not in n}
    numbers = torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))
    shuffled = hash(str(random.getstate())), hash(str(learn.dls.train.rng.getstate()))
    optimizer = [t for s in learn.opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    grads = [p.grad for p in learn.model.parameters()]
    modes = [m.training for m in learn.model.modules()], [p.requires_grad for p in learn.model.parameters()]
    modes += ([m.momentum for m in norms(learn.model)],)
    recorded = list(learn.cbs), [list(v) for v in learn.recorder.values], list(map(float, learn.recorder.losses))
    return dict(rest=[*rest.values(), *numbers, *optimizer, *grads], plain=(shuffled, modes, recorded))


def test_nothing_else_changes(tmp_path):
    model = Branched()
    model.twice.momentum = 0.3
    cbs = [SaveModelCallback(), EarlyStoppingCallback(), CSVLogger(), MixUp()]  # these stay between fits
    learn = trained(make(tmp_path, model), cbs=[SaveModelCallback()])
    learn.add_cbs(cbs)
    history = tmp_path / 'history.csv'
    history.write_text('kept')
    learn.model.head.train()
    learn.model.unused.running_mean.fill_(5)
    before = everything(learn)
    learn.recalibrate(3)
    after = everything(learn)
    assert before['plain'] == after['plain'] and history.read_text() == 'kept'
    assert equal(before['rest'], after['rest'])
    assert (learn.model.unused.running_mean == 5).all() and int(learn.model.unused.num_batches_tracked) == 0
    assert int(learn.model.twice.num_batches_tracked) == 6


def test_an_interruption_changes_nothing(tmp_path):
    learn = trained(make(tmp_path))
    state = state_of(learn)
    learn.model[1].register_forward_hook(broken := lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn.recalibrate()
    assert broken and equal(state, state_of(learn))
    assert [m.momentum for m in norms(learn.model)] == [0.1] * 2


def test_inputs_are_those_of_validation(tmp_path):
    "MixUp mixes in training alone; it does not change the statistics"
    learn = trained(make(tmp_path, shuffle=False))
    learn.recalibrate()
    want = state_of(learn)
    learn.add_cb(MixUp())
    learn.recalibrate()
    assert equal(want, state_of(learn))


@pytest.mark.sample(2)
@pytest.mark.parametrize('how', ['freeze', 'train_bn', 'no gradients'])
def test_frozen_statistics(tmp_path, how):
    kwargs = dict(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())], train_bn=how != 'train_bn')
    learn = trained(make(tmp_path, shuffle=False, **kwargs))
    if how == 'no gradients':
        learn.model.requires_grad_(False)
    else:
        learn.freeze()
    trainable = [p.requires_grad for p in learn.model.parameters()]
    learn.prune(0.8)
    want = by_torch(learn)
    learn.recalibrate()
    assert equal(want, learn.model.state_dict())
    assert trainable == [p.requires_grad for p in learn.model.parameters()]


class Mixed(MixedPrecision):
    "fastai's, with autocast on the device of the tests"

    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler(self.learn.dls.device.type, enabled=False)
        self.autocast = torch.autocast(self.learn.dls.device.type, self.amp_mode)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_precision(tmp_path, dtype):
    learn, mixed = trained(make(tmp_path, shuffle=False)), Mixed()
    want, mixed.amp_mode = by_torch(learn), dtype
    learn.add_cb(mixed)
    learn.recalibrate()
    got = learn.model.state_dict()
    for n, t in got.items():
        assert t.dtype == want[n].dtype and torch.allclose(want[n].float(), t.float(), atol=0.05)
    assert not equal(want, got)  # activations are in half precision, as in training


def test_in_a_fit(tmp_path):
    "A callback may prune and recalibrate between epochs"

    class Halve(Callback):
        order, counts = 80, ()

        def before_validate(self):
            self.learn.prune(0.5, recalibrate=2)
            self.counts = [*self.counts, *(int(m.num_batches_tracked) for m in norms(self.model))]

    cb = Halve()
    learn = trained(make(tmp_path), cbs=cb)
    assert (
        cb.counts == [2] * 4
        and len(learn.recorder.values) == 2
        and learn.masks.sparsity == pytest.approx(0.5, abs=0.01)
    )


def test_channels_that_are_cut(tmp_path):
    "Their output is zero, and their statistics return with them"
    learn = trained(make(tmp_path))
    learn.prune(0.5, granularity='channel')
    first, stay = norms(learn.model)[0], learn.masks['0.1.weight']
    before, values = deepcopy(first.state_dict()), deepcopy(learn.keep_masks.cut.values)
    learn.recalibrate()
    assert torch.equal(first.running_mean[~stay], before['running_mean'][~stay])
    assert torch.equal(first.running_var[~stay], before['running_var'][~stay])
    assert not torch.equal(first.running_mean[stay], before['running_mean'][stay])
    assert equal(values, learn.keep_masks.cut.values)
    x = learn.dls.one_batch()[0]
    learn.model.eval()
    with torch.no_grad():
        assert (learn.model[0](x)[:, ~stay] == 0).all()
        whole = learn.model(x)
        learn.shrink(n_items=4, repeats=0)
        assert torch.allclose(whole, learn.model(x), atol=1e-5)
    learn.recalibrate()
    with torch.no_grad():
        learn.model.eval()
        assert learn.model(x).isfinite().all()


def test_errors(tmp_path):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10, track_running_stats=False))
    learn = make(tmp_path, plain)
    for call in (learn.recalibrate, partial(learn.prune, 0.5, recalibrate=True)):
        with pytest.raises(ValueError, match='no BatchNorm layer with running statistics.*leave it out'):
            call()
    assert learn.masks is None
    learn = make(tmp_path)
    for n in (0, -1, 1.5, 'all', None):
        with pytest.raises(ValueError, match=f'recalibrate={n!r}: needs True, False, or a whole number'):
            learn.prune(0.5, recalibrate=n)
    with pytest.raises(ValueError, match='n_batches=True: needs a whole number'):
        learn.recalibrate(True)
    assert learn.masks is None
    with torch.no_grad():
        learn.model[1][0].weight.mul_(float('inf'))
    state = state_of(learn)
    with pytest.raises(ValueError, match=r"recalibrate: the statistics of '1\.1' are not finite"):
        learn.recalibrate(2)
    assert equal([state[k] for k in state if 'running' in k], [t for k, t in state_of(learn).items() if 'running' in k])
