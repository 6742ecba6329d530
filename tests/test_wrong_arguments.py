"Arguments of functions that need no Learner: what does not fit is refused by its name and value"

import re

import numpy as np
import pytest
import torch
from helpers import mlp_learner
from torch import nn

from fastprune.all import (
    Checkpoint,
    GradualL2,
    Sparsifier,
    SparsifyCallback,
    allr_discount,
    cifar_mobilenet,
    cifar_resnet,
    cifar_vgg,
    digits_convnet,
    digits_dls,
    from_torch_prune,
    latency,
    load_sparse,
    lr_cyclical,
    lr_decay,
    lr_retrain,
    lr_rounds,
    lr_warmup,
    make_model,
    plot_lrs,
    plot_schedules,
    prunable_weights,
    save_shrunk,
    save_sparse,
    save_state,
    shrink,
    sparse_inference,
    to_onnx,
    to_semi_structured,
    to_torch_prune,
)
from fastprune.analysis.sparse_regression import draw_regressions

STATE = {'weight': torch.ones(2, 2)}
WRONG = {
    'digits_convnet(n_out=0)': lambda: digits_convnet(n_out=0),
    'digits_convnet(c_in=1.0)': lambda: digits_convnet(c_in=1.0),
    'digits_convnet(widths=())': lambda: digits_convnet(widths=()),
    'digits_convnet(widths=8)': lambda: digits_convnet(widths=8),
    "digits_convnet(widths[1]='a')": lambda: digits_convnet(widths=(8, 'a')),
    'cifar_resnet(n_out=0)': lambda: cifar_resnet(n_out=0),
    'cifar_resnet(width=0)': lambda: cifar_resnet(width=0),
    'cifar_vgg(n_out=0)': lambda: cifar_vgg(n_out=0),
    'cifar_mobilenet(n_out=0)': lambda: cifar_mobilenet(0),
    'digits_dls(bs=None)': lambda: digits_dls(bs=None),
    'digits_dls(size=None)': lambda: digits_dls(size=None),
    'make_model(arch=None)': lambda: make_model(None, 2, 32),
    'make_model(n_out=0)': lambda: make_model('resnet18', 0, 32),
    "make_model(size='abc')": lambda: make_model('resnet18', 2, 'abc'),
    'lr_rounds(shape=None)': lambda: lr_rounds(None, 0.1, 2),
    'lr_rounds(max_lr=None)': lambda: lr_rounds(lr_decay, None, 2),
    'lr_rounds(rounds=0)': lambda: lr_rounds(lr_decay, 0.1, 0),
    'lr_rounds(rounds=1.5)': lambda: lr_rounds(lr_decay, 0.1, 1.5),
    'plot_lrs(None, 1=None)': lambda: plot_lrs(lr_decay(0.1), mine=None),
    'plot_lrs(rounds=1.5)': lambda: plot_lrs(lr_decay(0.1), rounds=1.5),
    'plot_schedules(n=0)': lambda: plot_schedules(n=0),
    'lr_warmup(drops[0]=None)': lambda: lr_warmup(0.1, drops=None),
    "lr_retrain(name='abc')": lambda: lr_retrain('abc', [0.1]),
    'lr_retrain(scale=nan)': lambda: lr_retrain('llr', [0.1], scale=float('nan')),
    'lr_retrain(scale=-1)': lambda: lr_retrain('llr', [0.1], scale=-1),
    "lr_retrain(scale='abc')": lambda: lr_retrain('llr', [0.1], scale='abc'),
    'allr_discount(after=NoneType)': lambda: allr_discount([torch.ones(2)], None, 0.5),
    'GradualL2(growth=0.5)': lambda: GradualL2(0.5, growth=0.5),
    "SparsifyCallback(refresh='no')": lambda: SparsifyCallback(0.5, refresh='no'),
    "SparsifyCallback(track='false')": lambda: SparsifyCallback(0.5, track='false'),
    "Checkpoint(resume='no')": lambda: Checkpoint('x', resume='no'),
    'draw_regressions(seed=1.5)': lambda: draw_regressions(2, repeats=2, seed=1.5),
    'save_state(path=3)': lambda: save_state(STATE, 3),
    "save_state(path='')": lambda: save_state(STATE, ''),
    "save_state(metadata='x')": lambda: save_state(STATE, 'unused', metadata='x'),
    'save_sparse(path=3)': lambda: save_sparse(STATE, 3),
    "save_sparse(half='no')": lambda: save_sparse(STATE, 'unused', half='no'),
    'save_sparse(masks=str)': lambda: save_sparse(STATE, 'unused', masks='abc'),
    'load_sparse(path=2)': lambda: load_sparse(2),
    "load_sparse(path='')": lambda: load_sparse(''),
}


@pytest.mark.parametrize('call', WRONG)
def test_the_argument_and_its_value_are_named(call):
    shown = re.escape(re.search(r'\((?:.*, )?(.*)\)', call)[1].removeprefix('1='))
    with pytest.raises(ValueError, match=shown.replace('None', '.*') if 'plot_lrs(None' in call else shown):
        WRONG[call]()


@pytest.mark.parametrize(
    'f',
    [
        shrink,
        sparse_inference,
        to_onnx,
        to_torch_prune,
        from_torch_prune,
        to_semi_structured,
        save_shrunk,
        prunable_weights,
        Sparsifier,
    ],
)
def test_a_learner_or_a_state_is_no_module(f, tmp_path):
    learn = mlp_learner()
    x = torch.zeros(2, 1, 8, 8)
    more = {
        'shrink': (x,),
        'sparse_inference': (x,),
        'to_onnx': (x, tmp_path / 'a.onnx'),
        'to_torch_prune': ({},),
        'to_semi_structured': (x,),
        'save_shrunk': (tmp_path / 'a.pth',),
        'Sparsifier': (SparsifyCallback(0.5), 10),
    }.get(f.__name__, ())
    if f is not save_shrunk:  # which takes a Learner
        with pytest.raises(ValueError, match='Learner: needs a module, as `learn.model`'):
            f(learn, *more)
    with pytest.raises(ValueError, match='OrderedDict: needs a module'):
        f(learn.model.state_dict(), *more)


def test_latency_blames_the_model_that_is_none():
    learn = mlp_learner()
    with pytest.raises(ValueError, match=r"Learner: needs a module, as `learn\.model`"):
        latency({'a': learn}, torch.zeros(2, 1, 8, 8))


def test_numbers_of_numpy_and_torch_fit():
    assert torch.equal(draw_regressions(2, repeats=2, seed=np.int64(1)).w, draw_regressions(2, repeats=2, seed=1).w)
    assert lr_retrain('llr', [0.1], scale=np.float32(2))(0.5) == lr_retrain('llr', [0.1], scale=2)(0.5)
    assert lr_cyclical(0.1, low=torch.tensor(0.05))(0.0) == pytest.approx(0.05)
    assert isinstance(digits_convnet(n_out=np.int64(4))[-1], nn.Linear)
    assert lr_rounds(lr_decay, np.float64(0.1), np.int64(2))[1](0.5) == pytest.approx(0.05)
