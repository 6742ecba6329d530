"Common parts of the cases: the package's names, Learners on digits, and the results of a fit"

import pkgutil
import warnings
from copy import deepcopy
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy, noop, params, set_seed
from fastai.callback.all import ProgressCallback
from torch import nn

import fastprune


class Names:
    "The package's names: of `fastprune.all` first, then of any module at this commit"

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = [m.name for m in pkgutil.walk_packages(fastprune.__path__, 'fastprune.')]
            self.modules = [import_module(name) for name in ['fastprune.all', *found]]

    def __getattr__(self, name):
        for m in self.modules:
            x = getattr(m, name, None)
            ours = getattr(x, '__module__', 'fastprune').startswith('fastprune')
            if x is not None and ours and not isinstance(x, ModuleType):
                return x
        raise AttributeError(f'fastprune has no {name}')


fp = Names()
sparsify = fp.SparsifyCallback
SGDM = partial(SGD, mom=0.9)
CASES = {}
SCOPES = 'local global erk balanced lamp'.split()
BASELINES = 'GMP DPF DNW GSM LC GradualL2 STR DST RigL SNFS SET'.split()
RETRAINING = 'ft lrw slr clr llr allr'.split()
UNITS = 'weight row column kernel filter 2:4 1:4'.split()


def case(func):
    "Register a function as one case"
    CASES[func.__name__] = func
    return func


def each(variants):
    "Register a function as a case for each value of a dict"

    def register(func):
        CASES.update({f'{func.__name__} {k}': partial(func, v) for k, v in variants.items()})
        return func

    return register


def learner(folder, model=None, splitter=params, **kwargs):
    "A Learner on digits, with 20 steps an epoch"
    set_seed(42, reproducible=True)
    model = model or fp.digits_convnet(widths=(8, 16, 16))
    kwargs = dict(opt_func=SGDM, wd=0.01, splitter=splitter, metrics=accuracy) | kwargs
    learn = Learner(fp.digits_dls(bs=72), model, loss_func=CrossEntropyLossFlat(), path=folder, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def trained(folder, **kwargs):
    learn = learner(folder, **kwargs)
    learn.fit(1, 0.02)
    return learn


class Trace(Callback):
    "Records weights and masks after each batch"

    order, run_valid = 200, False

    def __init__(self):
        self.seen = []

    def after_batch(self):
        weights = torch.cat([p.detach().flatten() for p in self.learn.model.parameters()])
        self.seen.append([weights, {n: m.clone() for n, m in (self.learn.masks or {}).items()}])


class Crash(Callback):
    "Ends a fit in its second epoch"

    def after_step(self):
        if (self.epoch, self.iter) == (1, 7):
            raise InterruptedError('stopped')


def copies(learn):
    "A copy of the model's present state"
    return {n: t.clone() for n, t in learn.model.state_dict().items()}


HISTORY = 'iters asked reached lrs recovered mask_distance changes discounts'.split()


def weights_and_masks(learn):
    return dict(weights=copies(learn), masks=learn.masks)


def outcome(learn, cb=None, trace=None):
    "All results of a fit"
    rec, hard = learn.recorder, getattr(cb, 'hard', None)
    columns = [n for n in rec.metric_names if n not in ('epoch', 'time')]
    res = dict(table=[columns, rec.values, rec.lrs, rec.losses], hard=hard, **weights_and_masks(learn))
    res['optimizer'] = None if learn.opt is None else deepcopy(learn.opt.state_dict())
    res['history'] = {k: list(getattr(cb, k, None) or []) for k in HISTORY}
    return res if trace is None else {**res, 'steps': trace.seen}


def fitted(learn, cb, *cbs, lr=0.02, n=2, **kwargs):
    "The outcome of 40 steps with a callback"
    trace = Trace()
    learn.fit(n, lr, cbs=[cb, trace, *cbs], **kwargs)
    return outcome(learn, cb, trace)


class OddNet(nn.Module):
    "Layers with unusual layouts or computed weights"

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 3, padding=1))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.mid = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=4, groups=2))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rnn = nn.GRU(16, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.mid(self.up(self.first(x))).flatten(2).transpose(1, 2)
        return self.head(self.rnn(x + self.attention(x, x, x)[0])[0].mean(1))


def or_error(func, *args, **kwargs):
    "The result of a function, or the type of its error"
    try:
        return func(*args, **kwargs)
    except (ValueError, TypeError) as e:
        return type(e).__name__


def short(learn, cbs, lr=0.02):
    learn.fit_one_cycle(2, lr, cbs=cbs)
