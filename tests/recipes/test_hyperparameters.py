"Recipes train with the optimizer's own momentum and weight decay, whatever a fit before has left there"

from functools import partial

import pytest
import torch
from fastai.basics import SGD, Adam, Callback, CrossEntropyLossFlat, L, Learner, OptimWrapper, accuracy, params
from fastai.callback.schedule import ParamScheduler
from helpers import equal, quietly
from torch import nn

from fastprune.all import digits_dls
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

RECIPES = dict(
    cyclical=lambda l, **k: l.fit_cyclical(2, 1, 0.8, lr_max=1e-2, **k),
    cyclic=lambda l, **k: l.fit_cycles(2, 1, lr=1e-2, **k),
    sculpt=lambda l, **k: l.fit_sculpt(0.8, 0.4, 1, 1, lr=1e-2, **k),
    bimp=lambda l, **k: l.fit_bimp(2, 0.8, lr_max=1e-2, **k),
    retrain=lambda l, **k: (l.prune(0.8), l.retrain(2, 'slr', **k)),
    iterative=lambda l, **k: l.iterative_prune(1, 1, lr=1e-2, **k),
)
ADAM = partial(OptimWrapper, opt=partial(torch.optim.Adam, betas=(0.8, 0.99)))


class Seen(Callback):
    order = 70

    def __init__(self):
        self.hypers = []

    def before_step(self):
        self.hypers.append([dict(h) for h in self.opt.hypers])


def make(opt_func=partial(SGD, mom=0.9), **kwargs):
    torch.manual_seed(0)
    learn = Learner(
        digits_dls(bs=128),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)),
        loss_func=CrossEntropyLossFlat(),
        metrics=accuracy,
        opt_func=opt_func,
        **kwargs,
    )
    seed_round(learn, 0)
    return learn


def seen(learn, recipe, **kwargs):
    cb = Seen()
    quietly(learn, RECIPES[recipe], learn, cbs=cb, **kwargs)
    return cb.hypers


@pytest.mark.sample(2)
@pytest.mark.parametrize('recipe', list(RECIPES))
@pytest.mark.parametrize(
    'opt_func,mom', [(partial(SGD, mom=0.9), 0.9), (Adam, 0.9), (ADAM, 0.8)], ids=['SGD', 'Adam', 'torch']
)
def test_after_one_cycle(recipe, opt_func, mom):
    learn = make(opt_func)
    quietly(learn, learn.fit_one_cycle, 1, 1e-2, wd=0.3)
    assert learn.opt.hypers[0]['mom'] != mom and learn.opt.hypers[0]['wd'] == 0.3
    own = make(opt_func)
    own.create_opt()
    for hypers in seen(learn, recipe):
        for h in hypers:
            assert {k: v for k, v in h.items() if k != 'lr'} == {
                k: v for k, v in own.opt.hypers[0].items() if k != 'lr'
            }


@pytest.mark.sample(2)
@pytest.mark.parametrize('recipe', list(RECIPES))
def test_what_is_asked_for_counts(recipe):
    learn = make(wd=0.02)
    quietly(learn, learn.fit_one_cycle, 1, 1e-2, wd=0.3)
    assert {h['wd'] for hs in seen(learn, recipe) for h in hs} == {0.02}
    learn = make()
    quietly(learn, learn.fit_one_cycle, 1, 1e-2)
    assert {h['wd'] for hs in seen(learn, recipe, wd=0.04) for h in hs} == {0.04}


def test_a_schedule_of_momentum_given_with_the_recipe_works():
    learn, cb = make(), Seen()
    quietly(learn, learn.fit_one_cycle, 1, 1e-2)
    quietly(learn, learn.fit_cycles, 1, 1, lr=1e-2, cbs=[ParamScheduler({'mom': lambda pos: 0.5 + pos / 10}), cb])
    assert cb.hypers[0][0]['mom'] == 0.5 and cb.hypers[-1][0]['mom'] > 0.55


def test_groups_keep_their_own():
    def split(m):
        return L(params(m[:2]), params(m[2:]))

    def opt_func(groups, lr):
        opt = SGD(groups, lr=lr, mom=0.9)
        opt.set_hyper('mom', [0.7, 0.8])
        return opt

    learn = make(opt_func, splitter=split)
    quietly(learn, learn.fit_one_cycle, 1, 1e-2)
    assert {tuple(h['mom'] for h in hs) for hs in seen(learn, 'cyclic')} == {(0.7, 0.8)}


def test_an_optimizer_given_ready_made():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    opt = torch.optim.SGD(
        [dict(params=[model[1].weight], weight_decay=0.1), dict(params=[model[1].bias])], lr=1e-2, momentum=0.6
    )
    learn = Learner(
        digits_dls(), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=OptimWrapper(opt=opt)
    )
    quietly(learn, learn.fit_one_cycle, 1, 1e-2)
    assert {tuple((h['mom'], h['wd']) for h in hs) for hs in seen(learn, 'cyclic')} == {((0.6, 0.1), (0.6, 0))}


def test_cyclical_after_one_cycle_is_cyclical_with_a_new_optimizer():
    ends = []
    for new in (False, True):
        learn = make()
        quietly(learn, learn.fit_one_cycle, 1, 1e-2)
        learn.prune(0.5)
        seed_round(learn, 1)
        if new:
            learn.opt = None
        else:
            learn.opt.clear_state()
        quietly(learn, learn.fit_cycles, 2, 1, lr=0.1)
        ends.append(learn.model.state_dict())
    assert all(equal(ends[0][n], ends[1][n]) for n in ends[0])
