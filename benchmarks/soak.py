"""Train random configurations, and check fastprune's promises after every step:
`python benchmarks/soak.py --seconds 3600`

The script prints its seed. `--seed SEED --case 17` runs case 17 again, alone. Results go into soak.csv."""

import argparse
import contextlib
import copy
import json
import random
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import write
from fastai.basics import (
    SGD,
    Adam,
    CrossEntropyLossFlat,
    L,
    Learner,
    OptimWrapper,
    RMSProp,
    accuracy,
    load_learner,
    ranger,
    set_seed,
)
from fastai.callback.all import (
    BnFreeze,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    ChannelsLast,
    CSVLogger,
    CutMix,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    MixedPrecision,
    MixUp,
    ModelResetter,
    ParamScheduler,
    ReduceLROnPlateau,
    SaveModelCallback,
    SchedCos,
    ShortEpochCallback,
    TerminateOnNaNCallback,
)
from torch import nn

from fastprune.all import (
    BASELINES,
    DST,
    STR,
    Checkpoint,
    Masks,
    SparsifyCallback,
    Ticket,
    cosine,
    cubic,
    cyclical,
    digits_convnet,
    digits_dls,
    iterative,
    linear,
    magnitude,
    magnitude_increase,
    movement,
    ocp,
    one_shot,
    prunable_weights,
    random_score,
    taylor,
    updating_movement,
    window,
)
from fastprune.core.names import unwrap
from fastprune.core.scopes import SCOPES
from fastprune.criteria.weights import squared_magnitude
from fastprune.training.optimizer_state import opt_state
from fastprune.training.state import pack

# ---- the choices


class Rows(nn.Module):
    "Classifies digits, as sequences of 8 rows of 8 pixels, with `body`"

    def __init__(self, body, width):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 10)

    def reset(self):
        "For ModelResetter"

    def forward(self, x):
        y = self.body(x.squeeze(1).to(self.head.weight.dtype))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1)).float()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def mlp():
    return Rows(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)), 16)


def convs():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(200, 10),
    )


models = {  # and what is pruned together there, with names to leave out
    'convnet': (
        lambda: digits_convnet(widths=(8, 16, 16)),
        {'weight': None, 'row': '5*', 'kernel': '5*', 'filter': '5*'},
    ),
    'grouped and transposed': (convs, {'weight': None, 'filter': '8*', 'kernel': '8*'}),
    'mlp': (mlp, {'weight': None, 'row': None, 'column': None, '2:4': None, '1:4': None}),
    'encoder': (
        lambda: Rows(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
            ),
            8,
        ),
        {'weight': None, '2:4': None},
    ),
    'LSTM': (lambda: Rows(nn.LSTM(8, 6, 2, batch_first=True), 6), {'weight': None}),
    'weight_norm': (lambda: Rows(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), 16), {'weight': None}),
    'tied': (lambda: Rows(Tied(), 8), {'weight': None, 'row': None}),
    '10 weights': (lambda: nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(1, 10)), {'weight': None}),
    'compiled': (lambda: torch.compile(digits_convnet(widths=(8, 8)), backend='eager'), {'weight': None}),
}
optimizers = {
    'SGD': partial(SGD, mom=0.9),
    'plain SGD': SGD,
    'Adam': Adam,
    'RMSProp': RMSProp,
    'ranger': ranger,
    'torch AdamW': partial(OptimWrapper, opt=torch.optim.AdamW),
    'torch SGD': partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9)),
}
schedules = {
    'one_shot': one_shot,
    'iterative': iterative,
    'linear': linear,
    'cosine': cosine,
    'cubic': cubic,
    'ocp': ocp,
    'window': window(cubic, 0.2, 0.8),
    'cyclical': cyclical(cubic, 2),
    'cyclical, 3': cyclical(linear, 3, restart=0.2),
}
criteria = {
    f.__name__: f
    for f in (magnitude, squared_magnitude, random_score, taylor, movement, magnitude_increase, updating_movement)
}
baselines = {**BASELINES, 'STR': partial(STR, s_init=-7), 'DST': partial(DST, alpha=1e-3)}
fits = {
    'fit': lambda l, n, **kw: l.fit(n, 0.02, **kw),
    'fit_one_cycle': lambda l, n, **kw: l.fit_one_cycle(n, 0.02, **kw),
    'fit_flat_cos': lambda l, n, **kw: l.fit_flat_cos(n, 0.02, **kw),
    'fit_sgdr': lambda l, n, **kw: l.fit_sgdr(min(n, 2), 1, 0.02, **kw),
}
precisions = ['float32'] * 3 + ['float64', 'bfloat16', 'float16', 'fp16', 'bf16']
stops = [
    KeyboardInterrupt,
    RuntimeError,
    CancelFitException,
    CancelEpochException,
    CancelTrainException,
    CancelValidException,
    CancelBatchException,
    CancelStepException,
]
events = [
    'before_fit',
    'before_epoch',
    'before_train',
    'before_batch',
    'after_pred',
    'after_loss',
    'before_backward',
    'after_backward',
    'before_step',
    'after_step',
    'after_cancel_step',
    'after_batch',
    'after_train',
    'before_validate',
    'after_validate',
    'after_epoch',
]
lives = ['fit again', 'sparser', 'denser', 'prune', 'removed', 'copied', 'exported', 'saved', 'looked at', 'tickets']


def draw(rng):
    "Draw a configuration: a dict of names and numbers"
    model = rng.choice(list(models))
    c = dict(
        model=model,
        granularity=rng.choice(list(models[model][1])) if rng.random() < 0.4 else 'weight',
        optimizer=rng.choice(list(optimizers)),
        wd=rng.choice([0.0, 0.01]),
        method=rng.choice(['SparsifyCallback'] * 12 + list(baselines)),
        schedule=rng.choice(list(schedules)),
        criterion=rng.choice(list(criteria)),
        scope=rng.choice(SCOPES[:4]),
        sparsity=rng.choice([0.0, 0.3, 0.5, 0.8, 0.9, 0.97, round(rng.random() * 0.98, 4)]),
        interval=rng.choice([1, 2, 3, 10, 50]),
        initial=rng.choice([None] * 4 + [0.2]),
        recover=rng.choice([True] * 4 + ['alive'] * 3 + [False] * 3),
        refresh=rng.random() < 0.3,
        track=rng.random() < 0.3,
        fit=rng.choice(list(fits)),
        epochs=rng.choice([1, 2, 3]),
        bs=rng.choice([64, 128, 256]),
        precision=rng.choice(precisions),
        others=sorted(rng.sample(list(beside), rng.choice([0, 0, 1, 2]))),
        stop=None,
        life=rng.choice(lives),
        before=rng.choice([None] * 5 + ['prune', 'fit', 'validate', 'lr_find']),
    )
    if c['granularity'] in ('2:4', '1:4'):
        c['sparsity'] = rng.choice([0.3, 0.5])
    if c['precision'] in ('float16', 'bfloat16', 'fp16'):
        c['precision'] = (
            c['precision'] if model in ('mlp', 'tied', '10 weights') else 'bf16'
        )  # CPUs have no such LSTMs and BatchNorms
    if model in ('weight_norm', 'encoder') and c['precision'] == 'bf16':
        c['precision'] = 'float32'
    c['others'] = [
        k
        for k in c['others']
        if not (
            k in ('MixUp', 'CutMix')
            and c['precision'] in ('float64', 'float16', 'bfloat16')
            or k == 'average of weights'
            and model == 'weight_norm'
            or k == 'ModelResetter'
            and not hasattr(models[model][0](), 'reset')
        )
    ]
    if rng.random() < 0.5:
        c['stop'] = [
            rng.choice(stops).__name__,
            rng.choice(events),
            rng.choice([-99, 0, 52, 57, 65, 75, 99]),
            rng.randrange(c['epochs']),
            rng.randrange(1437 // c['bs']),
        ]
    elif rng.random() < 0.4:
        c['stop'] = [
            'resumed',
            'after_step',
            rng.choice([0, 57, 99]),
            rng.randrange(c['epochs']),
            rng.randrange(1437 // c['bs']),
        ]
    if c['stop'] or len({'MixUp', 'CutMix'} & {*c['others']}) == 2:
        c['others'] = [k for k in c['others'] if k not in ('MixUp', 'CutMix')]  # they fail then
    return c


# ---- the run of a case


class Cast(Callback):
    "Casts batches to the model's type, and predictions to float32"

    order = -50

    def before_batch(self):
        self.learn.xb = tuple(x.to(next(self.learn.model.parameters()).dtype) for x in self.xb)

    def after_pred(self):
        self.learn.pred = self.pred.float()


class OnCPU(MixedPrecision):
    """fastai's mixed precision with the CPU's autocast and loss scaling. The first scale is so high that the first
    steps overflow and are skipped"""

    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = (
            torch.autocast('cpu', torch.float16 if self.kwargs['enabled'] else torch.bfloat16),
            torch.amp.GradScaler('cpu', init_scale=2.0**30, growth_interval=5, **self.kwargs),
        )


class Average(Callback):
    "An exponential moving average of the weights"

    order, run_valid, avg = 75, False, None

    def before_train(self):
        if self.avg is None:
            self.avg = torch.optim.swa_utils.AveragedModel(
                self.learn.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
            )

    def after_step(self):
        self.avg.update_parameters(self.learn.model)

    def after_fit(self):
        self.avg = None


beside = {
    'accumulation': lambda: GradientAccumulation(300),
    'clipping': lambda: GradientClip(0.3),
    'MixUp': lambda: MixUp(0.4),
    'CutMix': lambda: CutMix(1.0),
    'channels_last': ChannelsLast,
    'early stopping': lambda: EarlyStoppingCallback(patience=1),
    'best at the end': lambda: SaveModelCallback(at_end=True),
    'best': SaveModelCallback,
    'every epoch': lambda: SaveModelCallback(every_epoch=True, with_opt=True),
    'plateau': lambda: ReduceLROnPlateau(patience=1),
    'ParamScheduler': lambda: ParamScheduler({'lr': SchedCos(0.03, 0.001)}),
    'CSVLogger': CSVLogger,
    'ModelResetter': ModelResetter,
    'average of weights': Average,
    'short epochs': lambda: ShortEpochCallback(0.5),
    'BnFreeze': BnFreeze,
    'ends at NaN': TerminateOnNaNCallback,
}


def make(c, path):
    "Make the Learner of a configuration, with the same weights each time"
    set_seed(c['seed'], reproducible=True)
    model = models[c['model']][0]()
    if dtype := dict(float64=torch.float64, bfloat16=torch.bfloat16, float16=torch.float16).get(c['precision']):
        model.to(dtype)
    learn = Learner(
        digits_dls(bs=c['bs']),
        model,
        loss_func=CrossEntropyLossFlat(),
        opt_func=optimizers[c['optimizer']],
        metrics=accuracy,
        wd=c['wd'],
        path=path,
    )
    if dtype:
        learn.add_cb(Cast())
    if c['precision'] in ('fp16', 'bf16'):
        learn.add_cb(OnCPU(c['precision']))
    return learn


def method(c, sparsity=None):
    kw = dict(scope=c['scope'], exclude=models[c['model']][1][c['granularity']])
    s = c['sparsity'] if sparsity is None else sparsity
    if c['method'] != 'SparsifyCallback':
        return baselines[c['method']](s, **kw)
    return SparsifyCallback(
        s,
        schedules[c['schedule']],
        criteria[c['criterion']],
        granularity=c['granularity'],
        interval=c['interval'],
        initial=c['initial'],
        recover=c['recover'],
        refresh=c['refresh'],
        track=c['track'],
        **kw,
    )


class Broken(AssertionError):
    "A promise of fastprune does not hold"


def hold(ok, what):
    if not ok:
        raise Broken(what)


def is_sound(learn):
    "Check that masks fit the model, pruned weights are zero, and the optimizer has only the model's parameters"
    ps = dict(unwrap(learn.model).named_parameters())
    for n, m in (learn.masks or {}).items():
        hold(n in ps and m.dtype == torch.bool and m.shape == ps[n].shape, f'a mask for {n}')
        hold(
            not ps[n].detach()[~m].any(),
            f'{int(ps[n].detach()[~m].count_nonzero())} pruned weights of {n} are not zero',
        )
    if learn.opt is not None:
        mine = {id(p) for p in ps.values()}
        hold(all(id(p) in mine for p, *_ in learn.opt.all_params()), 'a stranger in the optimizer')


def totals(masks):
    return sum(m.numel() - int(m.count_nonzero()) for m in masks.values()), sum(m.numel() for m in masks.values())


class Watch(Callback):
    "Checks the promises after every step"

    order, run_valid, steps = 98, False, 0

    def __init__(self, c, cb):
        self.c, self.cb = c, cb

    def before_batch(self):
        self.before = self.learn.masks

    def after_step(self):
        type(self).steps += 1
        is_sound(self.learn)
        masks, old, c = self.learn.masks, self.before, self.c
        if masks is None or masks is old:
            return
        if old is not None and c['method'] == 'SparsifyCallback' and not c['recover']:
            hold(
                all(not (m & ~old[n]).any() for n, m in masks.items() if n in old),
                'weights came back in spite of recover=False',
            )
        if c['method'] == 'SparsifyCallback' and c['granularity'] == 'weight' and self.cb.asked and self.cb.active:
            pruned, n = totals({k: masks[k] for k in self.cb.engine.weights})
            room = len(masks) if c['scope'] == 'local' else 1
            hold(
                abs(pruned - self.cb.asked[-1] * n) <= room or not c['recover'] and pruned > self.cb.asked[-1] * n,
                f'{pruned} of {n} pruned, {self.cb.asked[-1]} asked for',
            )

    def after_batch(self):
        is_sound(self.learn)


class Stop(Callback):
    def __init__(self, c):
        name, event, self.order, *self.at = c['stop']
        self.ex, self.done = {e.__name__: e for e in stops}.get(name, RuntimeError), False
        setattr(self, event, self.stop)

    def stop(self):
        if self.done:
            return
        if (
            'epoch' not in self.learn.__dict__
            or self.epoch >= self.at[0]
            and self.learn.__dict__.get('iter', 0) >= self.at[1]
        ):
            self.done = True
            raise self.ex('on purpose')


def fit(learn, c, *cbs, n=None):
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(None):
        warnings.simplefilter('ignore')
        try:
            fits[c['fit']](learn, n or c['epochs'], cbs=L(*cbs) + [beside[k]() for k in c['others']])
        finally:
            if torch.is_autocast_enabled(
                'cpu'
            ):  # an exception between a batch's beginning and its loss has left it open
                torch.set_autocast_enabled('cpu', False)
                while torch.autocast_decrement_nesting() > 0:
                    pass
                torch.clear_autocast_cache()


def is_exact(learn, c, s, cb):
    "Check that the masks at the end of a fit have the target sparsity"
    if learn.masks is None and round(s * sum(p.numel() for p in prunable_weights(learn.model).values())) == 0:
        return
    hold(learn.masks is not None, 'no masks')
    masks = {n: m for n, m in learn.masks.items()}
    pruned, n = totals(masks)
    if c['granularity'] != 'weight':
        return
    if c['scope'] == 'local' and c['method'] != 'SNFS':
        low = all(m.numel() - int(m.count_nonzero()) >= round(s * m.numel()) for m in masks.values())
    else:
        low = abs(pruned - round(s * n)) <= len(masks) or pruned > s * n
    hold(low, f'{pruned} of {n} pruned at the end, asked for {s}')
    over = pruned > round(s * n) + len(masks)
    if over:
        hold(
            c['method'] in ('STR', 'DST', 'RigL', 'SET', 'SNFS') or not c['recover'] or c['before'] in ('prune', 'fit'),
            f'{pruned} of {n} pruned at the end, more than {s}',
        )


def equal(a, b):
    for (n, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        hold(torch.equal(x, y) or x.isnan().any(), f'{n} differs after going on')
    hold(a.masks == b.masks, 'masks differ after going on')
    x, y = {}, {}
    hold(
        json.dumps(pack(opt_state(a), x)) == json.dumps(pack(opt_state(b), y))
        and all(torch.equal(x[k].nan_to_num(), y[k].nan_to_num()) for k in x),
        'the optimizer differs after going on',
    )


def run(c, path):
    "Run one case, and return its end as a word"
    learn, cb = make(c, path), method(c)
    keys = list(learn.model.state_dict())
    if c['before'] == 'prune':
        learn.prune(min(0.2, c['sparsity']))
    if c['before'] == 'fit':
        try:
            fit(learn, {**c, 'others': []}, SparsifyCallback(min(0.2, c['sparsity'])), n=1)
        except ValueError as e:
            if has_diverged(e):
                return 'diverged'
            raise
    if c['before'] == 'validate':
        with learn.no_bar():
            learn.validate(cbs=cb)
        hold(learn.masks is None, 'validate has pruned')
    if c['before'] == 'lr_find':
        with learn.no_bar():
            learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
        hold(learn.masks is None, 'lr_find has pruned')
    start, was = copy.deepcopy(learn.model.state_dict()), Watch.steps
    state = 'finished'
    watch = Watch(c, cb)
    try:
        if c['stop'] and c['stop'][0] == 'resumed':
            return resumed(c, path)
        fit(learn, c, cb, watch, *([Stop(c)] if c['stop'] else []))
    except ValueError as e:
        if has_diverged(e):
            return 'diverged'
        hold(Watch.steps == was, f'refused after {Watch.steps - was} steps: {e}')
        hold(
            all(torch.equal(a, b) for a, b in zip(start.values(), learn.model.state_dict().values(), strict=True)),
            f'refused, but the weights have changed: {e}',
        )
        return 'refused: ' + str(e).split(':')[0][:60]
    except AttributeError as e:  # fastai's Recorder, where the first epoch was cancelled before it began
        if not c['stop'] or "'log'" not in str(e):
            raise
        state = 'stopped'
    except (IndexError, FileNotFoundError) as e:  # fastai's trackers, where an epoch had no validation or no loss
        hold(c['stop'] or 'model.pth' in str(e) or 'short epochs' in c['others'], repr(e))
        state = 'stopped'
    except (KeyboardInterrupt, RuntimeError, *stops[2:]) as e:
        if 'since the last update()' in str(e) and c['stop']:
            return 'stopped'  # fastai's loss scaling, cancelled in the middle
        if not c['stop'] or 'on purpose' not in str(e) and type(e) is RuntimeError:
            raise
        state = 'stopped'
    is_sound(learn)
    hold(list(learn.model.state_dict()) == keys, 'the state_dict has other names')
    hold(cb.engine is None, 'something of the fit is left in the callback')
    if (
        state == 'finished'
        and not c['stop']
        and not {'best', 'best at the end', 'early stopping', 'short epochs', 'ends at NaN'} & {*c['others']}
    ):
        is_exact(learn, c, c['sparsity'], cb)
    after(learn, c, path)
    return state


def has_diverged(e):
    return isinstance(e, ValueError) and (re.search(r"scores\['.+'\] has NaN", str(e)) or 'has died' in str(e))


trackers = (
    'best',
    'best at the end',
    'early stopping',
    'plateau',
    'every epoch',
    'short epochs',
)  # which fail where an epoch had no loss


def after(learn, c, path):
    "Do what a user may do after a fit"
    life, held, c = c['life'], learn.masks, {**c, 'others': [k for k in c['others'] if k not in trackers]}
    # fastai keeps the predictions of a fit that was stopped, which can't be copied, and MixUp its loss
    learn._end_cleanup()
    learn.loss_func, learn.loss_grad = CrossEntropyLossFlat(), None
    if life == 'fit again':
        fit(learn, c, n=1)
        hold(learn.masks == held, 'a later fit has changed the masks')
    if life in ('sparser', 'denser'):
        s = (
            (1 + c['sparsity']) / 2
            if life == 'sparser' and ':' not in c['granularity']
            else c['sparsity'] / 2
            if life == 'denser'
            else c['sparsity']
        )
        try:
            fit(learn, {**c, 'others': []}, again := method(c, s), n=1)
        except ValueError as e:
            hold(any(o in str(e) for o in ('room', 'sparser', 'NaN', 'exclude', 'died')), f'second fit refused: {e}')
        else:
            is_exact(learn, {**c, 'before': 'fit'}, s, again)
    if life == 'prune':
        try:
            learn.prune(0.6, exclude=models[c['model']][1][c['granularity']], scope=c['scope'])
        except ValueError as e:
            hold('NaN' in str(e), f'prune refused: {e}')
    if life == 'removed':
        learn.remove_masks()
        fit(learn, c, n=1)
        hold(learn.masks is None, 'masks came back')
    if life == 'copied':
        twin = copy.deepcopy(learn)
        fit(twin, {**c, 'others': []}, n=1)
        hold(learn.masks == held and twin.masks == held, 'a copy has other masks')
        is_sound(twin)
    if life == 'exported' and c['model'] not in ('weight_norm', 'compiled') and c['precision'] != 'fp16':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.export('export.pkl')
            back = load_learner(path / 'export.pkl')
        hold(back.masks == held, 'an exported Learner has other masks')
        is_sound(back)
    if life == 'saved':
        learn.save('again')
        learn.load('again')
        if held is not None:
            held.save(path / 'masks.safetensors')
            hold(Masks.load(path / 'masks.safetensors') == held, 'saved masks differ')
    if life == 'looked at':
        with learn.no_bar():
            learn.validate()
            learn.get_preds()
            learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
        report = learn.sparsity_report()
        hold(
            learn.masks == held and (held is None or report.loc['total', 'sparsity'] <= 1),
            'looking has changed the masks',
        )
    if life == 'tickets':
        learn.remove_masks()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                tickets = learn.find_tickets(1, lambda l, cbs: fit(l, {**c, 'others': []}, *L(cbs), n=1), 0.5)
            except ValueError as e:
                hold('NaN' in str(e) or 'diverged' in str(e), f'tickets refused: {e}')
                return
        tickets[1].save(path / 'ticket.safetensors')
        learn.load_ticket(Ticket.load(path / 'ticket.safetensors'))
        hold(learn.masks == tickets[1].masks, 'a loaded ticket has other masks')
    is_sound(learn)


def resumed(c, path):
    "Stop at some step, continue in a new Learner, and compare with an uninterrupted fit"
    c = {**c, 'others': [k for k in c['others'] if k not in ('average of weights', 'short epochs')]}
    whole = make(c, path)
    fit(whole, c, method(c))
    try:
        fit(make(c, path), c, method(c), Checkpoint('run'), Stop(c))
    except (IndexError, FileNotFoundError) as e:
        hold('after_epoch' in str(e) or 'model.pth' in str(e), repr(e))
    except RuntimeError as e:
        hold('on purpose' in str(e), f'{e}')
    again = make(c, path)
    if (path / 'models' / 'run.safetensors').exists():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # as another process would have them
    cb = method(c)
    fit(again, c, cb, Watch(c, cb), Checkpoint('run'))
    equal(whole, again)
    return 'gone on'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=3600, help='duration')
    parser.add_argument('--seed', type=int, default=None, help='seed of the configurations; random if None')
    parser.add_argument('--case', type=int, default=None, help='run only this case')
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print('seed', seed, flush=True)
    start, counts, ends, failed, i = time.time(), defaultdict(Counter), Counter(), 0, args.case or 0
    while time.time() - start < args.seconds:
        c = {**draw(random.Random(f'{seed} {i}')), 'seed': i}
        if args.case is not None:
            print(json.dumps(c))
        steps = Watch.steps
        with tempfile.TemporaryDirectory() as path:
            try:
                with contextlib.redirect_stdout(None):
                    end = run(c, Path(path))
            except Exception as e:
                end, failed = 'failed', failed + 1
                last = [f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(e.__traceback__)][-3:]
                print(
                    f'case {i} failed, {type(e).__name__}: {str(e)[:300]} ({" ".join(last)})\n   {json.dumps(c)}',
                    flush=True,
                )
                if args.case is not None:
                    traceback.print_exc()
        ends[end.split(':')[0]] += 1
        for k, v in c.items():
            for o in v if k == 'others' else [v[0] if k == 'stop' and v else v]:
                if k in (
                    'model',
                    'granularity',
                    'optimizer',
                    'method',
                    'schedule',
                    'criterion',
                    'scope',
                    'fit',
                    'precision',
                    'others',
                    'stop',
                    'life',
                ):
                    counts[k, str(o)].update(cases=1, steps=Watch.steps - steps, failed=end == 'failed')
        if end.startswith('refused') and args.case is not None:
            print(end)
        i += 1
        if args.case is not None:
            break
        if i % 100 == 0:
            print(f'{i} cases, {Watch.steps} steps, {dict(ends)}, {time.time() - start:.0f} s', flush=True)
    if args.case is None:
        write(
            'soak',
            [
                dict(
                    what='all',
                    value=f'seed {seed}, {time.time() - start:.0f} s',
                    cases=i,
                    steps=Watch.steps,
                    failed=failed,
                ),
                *(dict(what='end', value=k, cases=n, steps='', failed='') for k, n in sorted(ends.items())),
                *(dict(what=k, value=v, **n) for (k, v), n in sorted(counts.items())),
            ],
        )
