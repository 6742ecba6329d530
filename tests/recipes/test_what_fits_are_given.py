"Callbacks and fits that fastai takes: classes of callbacks, metrics by class, fits that read what they recorded"

import json

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, Metric, accuracy, set_seed
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from helpers import quietly

from fastprune.all import digits_convnet, digits_dls


def make(bs=16, metrics=accuracy, **kwargs):
    set_seed(0, reproducible=True)
    dls = digits_dls(bs=bs, valid_pct=0.1, test_pct=0.7)
    return Learner(
        dls, digits_convnet(widths=(4, 8)), loss_func=CrossEntropyLossFlat(), metrics=metrics, path='.', **kwargs
    )


def rounds(learn, n=1, **kwargs):
    return quietly(learn, learn.iterative_prune, n, 1, lr=1e-2, **kwargs)


def test_a_class_of_callbacks_is_counted_as_an_instance(tmp_path):
    starts = []
    for i, cb in enumerate((GradientAccumulation, GradientAccumulation(32))):
        rounds(make(), rewind='weights', rewind_to=0.25, cbs=cb, folder=tmp_path / str(i))
        starts.append(json.loads((tmp_path / str(i) / 'rounds.json').read_text())['notes']['start'])
    assert starts[0] == starts[1] > 0


def test_a_class_of_callbacks_is_a_part_of_the_experiment(tmp_path):
    rounds(make(), folder=tmp_path, cbs=MixUp)
    with pytest.raises(ValueError, match='MixUp'):
        rounds(make(), 2, folder=tmp_path)
    assert len(rounds(make(), 2, folder=tmp_path, cbs=MixUp())) == 3


class PerClass(Metric):
    name = 'per_class'

    def reset(self):
        pass

    def accumulate(self, learn):
        pass

    @property
    def value(self):
        return np.array([0.1, 0.2])


def test_a_rate_is_not_the_best_by_several_numbers():
    learn = make(metrics=[PerClass(), accuracy])
    with pytest.raises(ValueError, match="monitor='per_class' is no single number"):
        quietly(learn, learn.s_cyc_oracle, 1, 1, [1e-3])
    assert len(quietly(learn, learn.s_cyc_oracle, 1, 1, [1e-3], monitor='accuracy')) == 2


def fit_and_look(learn, cbs):
    learn.fit(1, 1e-2, cbs=cbs)
    learn.recorder.values[-1]


class Mine(Callback):
    def clear(self):
        pass


def fit_after_clearing(learn, cbs):
    learn.mine.clear()
    learn.fit(1, 1e-2, cbs=cbs)


@pytest.mark.parametrize('fit, says', [(fit_and_look, 'IndexError: list'), (fit_after_clearing, "no attribute 'mine'")])
def test_a_fit_that_fails_while_its_steps_are_counted(fit, says):
    learn = make(cbs=Mine())
    with pytest.raises(
        ValueError, match=f'fit={fit.__name__} is called once without training, .* fails there: .*{says}'
    ):
        quietly(learn, learn.instability, None, fit, n=2)


def test_no_batches_to_train_on():
    learn = make()
    learn.dls = DataLoaders(learn.dls.train.new(bs=4000, drop_last=True), learn.dls.valid)
    with pytest.raises(ValueError, match='the training DataLoader has no batches'):
        quietly(learn, learn.find_tickets, 1, lambda learn, cbs: learn.fit(1, 1e-2, cbs=cbs))


def test_the_optimizer_after_a_search_belongs_to_the_best_weights():
    after = []
    for lrs in ([1e-1, 1e-6], [1e-6, 1e-1]):
        learn = make()
        quietly(learn, learn.s_cyc_oracle, 1, 1, lrs)
        quietly(learn, learn.fit, 1, 1e-2)
        after.append(list(learn.model.parameters()))
    assert all(map(torch.equal, *after))
