"Cases of each method for 40 steps, and of the options of `SparsifyCallback`"

import contextlib
from functools import partial

import torch
from fastai.basics import (
    Adam,
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelStepException,
    OptimWrapper,
    params,
    ranger,
)
from fastai.callback.all import GradientAccumulation, GradientClip, MixUp, SaveModelCallback
from torch import nn

from .common import (
    BASELINES,
    SCOPES,
    UNITS,
    Crash,
    OddNet,
    Trace,
    case,
    each,
    fitted,
    fp,
    learner,
    outcome,
    sparsify,
    trained,
    weights_and_masks,
)

METHODS = {
    'OCP': sparsify,
    'PGD': partial(sparsify, schedule=fp.one_shot, interval=1, refresh=True, scope='global'),
    'cyclical': partial(sparsify, schedule=fp.cyclical(fp.cubic, 2), track=True),
    'taylor': partial(sparsify, criterion=fp.taylor, scope='global', recover=False),
    'alive': partial(sparsify, schedule=fp.cyclical(fp.cubic, 2), criterion=fp.taylor, scope='global', recover='alive'),
    'GMP': partial(fp.GMP, interval=5),
    'DPF': fp.DPF,
    'DPF local': partial(fp.DPF, scope='local', criterion=fp.taylor),
    'DNW': fp.DNW,
    'GSM': fp.GSM,
    'LC': fp.LC,
    'LC local': partial(fp.LC, scope='local', growth=1.1),
    'GradualL2': fp.GradualL2,
    'STR': partial(fp.STR, s_init=-7),
    'STR local': partial(fp.STR, s_init=-5, decay=0.1, scope='local'),
    'DST': partial(fp.DST, alpha=1e-3),
    'RigL': partial(fp.RigL, interval=5),
    'RigL usual': fp.RigL,
    'SNFS': fp.SNFS,
    'SNFS erk': partial(fp.SNFS, interval=6, scope='erk', fraction=0.3),
    'SET': fp.SET,
    'SET global': partial(fp.SET, interval=5, scope='global'),
}


@each(METHODS)
def method(make, folder):
    return fitted(learner(folder), make(0.8))


@each(METHODS)
def method_by_one_cycle_then_again(make, folder):
    "A second fit keeps the masks, and a third one starts from them"
    learn, cb, trace = learner(folder), make(0.8), Trace()
    learn.fit_one_cycle(2, 0.02, cbs=[cb, trace])
    learn.fit(1, 0.01)
    return outcome(learn, cb, trace) | {f'again {k}': v for k, v in fitted(learn, make(0.8), n=1).items()}


@each({'STR': partial(fp.STR, s_init=-5, decay=0.5), 'DST': partial(fp.DST, alpha=1e-3)})
def method_without_target(make, folder):
    return fitted(learner(folder), make())


OPTIMIZERS = dict(Adam=Adam, ranger=ranger, AdamW=partial(OptimWrapper, opt=torch.optim.AdamW))


@each(
    {f'{k}, {o}': (m, f) for k, m in METHODS.items() for o, f in OPTIMIZERS.items() if (k, o) != ('STR local', 'AdamW')}
)
def method_with_optimizer(how, folder):
    make, opt_func = how
    return fitted(learner(folder, opt_func=opt_func), make(0.8), lr=2e-3)


BY_NAME = {k: getattr(fp, k) for k in BASELINES if k not in ('STR', 'DST')}


@each(BY_NAME)
def method_by_name(make, folder):
    "Give the first layer its own sparsity"
    return fitted(learner(folder), make({'*': 0.8, '0.*': 0.3}, scope='local'))


@each({k: getattr(fp, k) for k in BASELINES})
def method_on_a_part(make, folder):
    return fitted(learner(folder), make(0.7, include=['1.*', nn.Linear], exclude='2.*'))


class SkipSome(Callback):
    "Cancels steps and batches"

    order = 95

    def before_step(self):
        if self.iter % 5 == 2:
            raise CancelBatchException()
        if self.iter % 5 == 4:
            raise CancelStepException()


class Stop(Callback):
    order = 99

    def __init__(self, at):
        self.at = at

    def after_step(self):
        if (self.epoch, self.iter) == (1, self.at):
            raise CancelFitException()


BESIDE = dict(
    accumulation=lambda: [GradientAccumulation(144), GradientClip(0.5)],
    skipped=lambda: [SkipSome()],
    stopped=lambda: [Stop(11)],
    saved=lambda: [SaveModelCallback(at_end=True), MixUp(0.4)],
)


@each({f'{k}, {o}': (m, f) for k, m in METHODS.items() for o, f in BESIDE.items()})
def method_beside(how, folder):
    make, cbs = how
    return fitted(learner(folder), make(0.8), *cbs())


@each(METHODS)
def method_resumed(make, folder):
    "Stop a fit, and resume it in a new Learner by `Checkpoint`"
    first = learner(folder)
    with contextlib.suppress(InterruptedError):
        first.fit_one_cycle(2, 0.02, cbs=[make(0.8), fp.Checkpoint('run'), Crash()])
    learn, cb = learner(folder), make(0.8)
    learn.fit_one_cycle(2, 0.02, cbs=[cb, fp.Checkpoint('run')])
    return outcome(learn, cb) | {'stopped': weights_and_masks(first)}


@each({k: m for k, m in METHODS.items() if k in ('OCP', 'DPF', 'LC', 'STR', 'RigL', 'SNFS')})
def method_in_fine_tune_and_lr_find(make, folder):
    learn = learner(folder, splitter=lambda m: [params(m[:2]), params(m[2:])])
    cb = make(0.8)
    learn.add_cb(cb)
    found = learn.lr_find(num_it=6, show_plot=False)
    before = dict(found=list(found), losses=learn.recorder.losses, **weights_and_masks(learn))
    learn.fine_tune(1, 0.02)
    return outcome(learn, cb) | {'lr_find': before}


@each({k: m for k, m in METHODS.items() if not k.startswith(('STR', 'DST'))})
def method_on_odd_layers(make, folder):
    "Weight norm, groups, a transposed convolution, attention, a recurrent layer, and one that is left out"
    return fitted(learner(folder, OddNet(), wd=0.001), make(0.6, exclude='head'))


# Options of SparsifyCallback

SETTINGS = {
    **{f'schedule {k}': dict(schedule=s) for k, s in fp.SCHEDULES.items()},
    'schedule window': dict(schedule=fp.window(fp.one_shot, 0.4)),
    'schedule window iterative': dict(schedule=fp.window(partial(fp.iterative, n_steps=3), 0.2, 0.8), scope='global'),
    'schedule cyclical': dict(schedule=fp.cyclical(fp.ocp, 3, restart=0.3), recover=False),
    **{f'criterion {k}': dict(criterion=c, interval=8) for k, c in fp.CRITERIA.items()},
    **{f'criterion {k}, global': dict(criterion=fp.CRITERIA[k], scope='global') for k in ('taylor', 'updating_movmag')},
    **{f'{s} {u}': dict(scope=s, granularity=u, sparsity=0.5) for s in SCOPES for u in UNITS},
    **{f'{u}, alive': dict(granularity=u, recover='alive', schedule=fp.cyclical(fp.cubic, 2)) for u in UNITS[:-2]},
    **{f'{u}, nested': dict(granularity=u, recover=False, scope='global', interval=3) for u in UNITS[:-2]},
    'initial': dict(initial=0.3, track=True),
    'initial by name': dict(initial={'*': 0.2, '2.0.weight': 0.1}, scope='local'),
    'by name': dict(sparsity={'*': 0.9, '0.*': 0.2, nn.Linear: 0.5}),
    'by name, rows': dict(sparsity={'1.*': 0.5, '2.*': 0.6}, granularity='filter'),
    'include': dict(include=['1.*', nn.Linear], scope='global'),
    'exclude': dict(exclude=['0.*'], interval=7, refresh=True),
    'track': dict(track=True, schedule=fp.cyclical(fp.cubic, 4), scope='global'),
}


@each(SETTINGS)
def sparsify_callback(settings, folder):
    return fitted(learner(folder), sparsify(**{'sparsity': 0.8, **settings}))


@case
def own_masks(folder):
    "Masks that the user sets: a fit keeps them, then they are removed"
    learn = trained(folder)
    learn.masks = fp.compute_masks(fp.prunable_weights(learn.model), 0.7, absolute=True)
    learn.fit(1, 0.02)
    kept = outcome(learn)
    learn.remove_masks()
    learn.fit(1, 0.02)
    return kept | {f'forgotten {k}': v for k, v in outcome(learn).items()}


@case
def sparsify_from_a_later_epoch(folder):
    learn = learner(folder)
    learn.prune(0.3)
    return fitted(learn, sparsify(0.8, schedule=fp.cubic), n=3, start_epoch=1)


@case
def sparsify_in_bfloat16(folder):
    class Cast(Callback):
        def before_batch(self):
            self.learn.xb = tuple(x.to(torch.bfloat16) for x in self.xb)

        def after_pred(self):
            self.learn.pred = self.pred.float()

    learn = learner(folder, fp.digits_convnet(widths=(8, 16, 16)).to(torch.bfloat16))
    return fitted(learn, sparsify(0.8, scope='global'), Cast())
