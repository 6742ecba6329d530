"What every sparsifying callback has to hold: a new method gets these checks by a line in `methods`"

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from fastai.basics import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelStepException,
    CancelTrainException,
    L,
    OptimWrapper,
    load_learner,
    params,
    ranger,
)
from fastai.callback.all import (
    ChannelsLast,
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
)
from helpers import FEW, METHODS, SGDM, Check, OwnStep, each_class, equal, zeros_and_masks_agree
from torch import nn

from fastprune.all import (
    DPF,
    DST,
    GSM,
    LC,
    SET,
    SNFS,
    STR,
    GradualL2,
    RigL,
    SparsifyCallback,
    digits_convnet,
    one_shot,
    prunable_weights,
)
from fastprune.methods.budgeted import BudgetedCallback

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


@pytest.fixture
def quick(learner):
    "For what is trained with each method"
    return partial(learner, **FEW)


every = pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)


def is_exact(learn, s=0.8):
    n = sum(m.numel() for m in learn.masks.values())
    local = all(int((~m).sum()) == round(s * m.numel()) for m in learn.masks.values())
    shares = sum(
        m.numel() - round(s * m.numel()) for m in learn.masks.values()
    )  # SNFS moves what local scope has shared out
    return zeros_or_masks(learn) and (learn.masks.n_kept in (n - round(s * n), shares) or local)


def zeros_or_masks(learn):
    "Pruned weights are zero; what has just been grown may be so, too"
    ps = dict(learn.model.named_parameters())
    return all(bool((ps[n][~m] == 0).all()) for n, m in learn.masks.items())


def is_plain(learn):
    "Nothing is left of a fit in the optimizer or the model"
    mine = {id(p) for p in learn.model.parameters()}
    return (
        all(id(p) in mine for p, *_ in learn.opt.all_params())
        and len(L(learn.opt.all_params())) == len(mine)
        and not any(s.get('do_wd') is False and p.ndim > 1 for p, _, s, _ in learn.opt.all_params())
    )


@pytest.mark.sample(2)
@every
def test_exact_at_the_end_and_kept(quick, fit, method):
    learn, check, cb = quick(opt_func=SGDM, wd=0.01), Check(), method(0.8)
    keys, kind = list(learn.model.state_dict()), type(learn.model)
    fit(learn, 2, 0.02, cbs=[cb, check])
    assert is_exact(learn) and is_plain(learn) and check.steps == 16
    assert (
        list(learn.model.state_dict()) == keys
        and type(learn.model) is kind
        and [n for n, _ in learn.model.named_parameters()]
        == [k for k in keys if 'running' not in k and 'num_' not in k]
    )
    assert (
        abs(dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))['sparsity'] - 0.8)
        < 1e-3
    )
    assert len(cb.iters) == len(cb.reached) == 16 and abs(cb.reached[-1] - 0.8) < 1e-3
    cb.plot()
    masks = learn.masks
    fit(learn, 1, 0.02, cbs=check)
    assert learn.masks == masks and is_exact(learn)
    fit(learn, 1, 0.02, cbs=method(0.8))  # once more, from masks
    assert is_exact(learn) and is_plain(learn)


@pytest.mark.sample(2)
@each_class
def test_validation_sees_the_pruned_model(quick, fit, method):
    class Seen(Callback):
        ok, n = True, 0

        def before_validate(self):
            self.n += 1
            if self.learn.masks is not None:
                self.ok = self.ok and zeros_or_masks(self.learn)

    seen = Seen()
    learn = fit(quick(opt_func=SGDM, wd=0.01), 2, 0.02, cbs=[method(0.8), seen])
    with learn.no_bar():
        loss = learn.validate()[0]
    assert (
        seen.ok
        and seen.n == 2
        and loss == pytest.approx(learn.recorder.values[-1][0] if learn.recorder.values else loss, rel=1e-5)
    )


@pytest.mark.sample(2)
@each_class
def test_lr_find_leaves_no_trace(quick, method):
    learn = quick(opt_func=SGDM, wd=0.01)
    before = copy.deepcopy(learn.model.state_dict())
    learn.add_cb(method(0.8))
    with learn.no_bar():
        learn.lr_find(num_it=4, show_plot=False)
    assert learn.masks is None and is_plain(learn)
    assert all(equal(a, b) for a, b in zip(before.values(), learn.model.state_dict().values(), strict=True))


@pytest.mark.sample(2)
@each_class
def test_frozen_then_fine_tuned(quick, method):
    learn = quick(opt_func=SGDM, wd=0.01, splitter=lambda m: [params(m[:2]), params(m[2:])])
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        with pytest.warns(UserWarning, match='frozen'):
            learn.fit(1, 0.02, cbs=method(0.8))
        assert learn.masks is None
        learn.fine_tune(1, 0.02, cbs=method(0.8))
    assert is_exact(learn) and is_plain(learn)


class SkipSome(Callback):
    "As loss scaling does after an overflow"

    order = 10

    def before_step(self):
        if self.iter % 4 == 3 or self.iter == self.n_iter - 1:
            raise CancelStepException()


class Mixed(MixedPrecision):
    """fastai's mixed precision is one of GPUs: here with autocast and loss scaling of any device, from a scale so high
    that the first steps overflow"""

    def before_fit(self):
        super().before_fit()
        kind = next(self.model.parameters()).device.type
        self.skipped_steps, self.autocast, self.learn.scaler = (
            0,
            torch.autocast(kind, torch.float16 if self.kwargs['enabled'] else torch.bfloat16),
            torch.amp.GradScaler(kind, init_scale=2.0**24, growth_interval=4, **self.kwargs),
        )

    def after_cancel_step(self):
        self.skipped_steps += 1


class Average(Callback):
    "An exponential moving average of the weights, as torch's own"

    order, run_valid = 75, False

    def before_train(self):
        if self.epoch == 0:
            self.avg = torch.optim.swa_utils.AveragedModel(
                self.learn.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
            )

    def after_step(self):
        self.avg.update_parameters(self.learn.model)


class WithReset(nn.Sequential):
    n_resets = 0

    def reset(self):
        self.n_resets += 1


@pytest.mark.sample(2)
@each_class
def test_overflow_in_fp16(quick, fit, method):
    "The first steps are skipped, and those after each doubling of the scale that was too much"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    learn, mixed = quick(model, opt_func=SGDM, wd=0.01), Mixed()
    fit(
        learn,
        2,
        0.02,
        cbs=[method(0.8), mixed, GradientClip(1.0), ParamScheduler({'lr': SchedCos(0.02, 0.001)}), Zeros()],
    )
    assert (
        mixed.skipped_steps >= 3
        and is_exact(learn)
        and is_plain(learn)
        and all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in learn.model.parameters())
    )


@pytest.mark.sample(2)
@each_class
def test_among_friends(quick, fit, method):
    learn, average = quick(WithReset(*digits_convnet(widths=(8, 16, 16))), opt_func=SGDM, wd=0.01), Average()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(
            learn,
            3,
            0.02,
            cbs=[
                method(0.8),
                Mixed('bf16'),
                MixUp(0.4),
                ChannelsLast(),
                ModelResetter(),
                average,
                SaveModelCallback(at_end=True),
                EarlyStoppingCallback(patience=9),
                Zeros(),
            ],
        )
    assert is_exact(learn) and is_plain(learn) and learn.model.n_resets > 5
    ps = dict(average.avg.module.named_parameters())
    gone = {n: ~m for n, m in learn.masks.items()}
    assert all(not ps[n][m].any() for n, m in gone.items())


@pytest.mark.sample(2)
@each_class
def test_compiled(quick, fit, method):
    learn = fit(
        quick(torch.compile(digits_convnet(widths=(8, 16, 16)), backend='eager'), opt_func=SGDM, wd=0.01),
        2,
        0.02,
        cbs=[method(0.8), GradientAccumulation(64)],
    )
    ps = dict(learn.model._orig_mod.named_parameters())
    assert (
        set(learn.masks) <= set(ps)
        and all(not ps[n][~m].any() for n, m in learn.masks.items())
        and learn.masks.sparsity == pytest.approx(0.8, abs=2e-3)
    )


class Zeros(Callback):
    order = 99

    def after_batch(self):
        assert (self.learn.masks is None or zeros_or_masks(self.learn)) and is_plain(self.learn)

    def after_train(self):
        self.after_batch()


class CancelLate(Callback):
    "After the callback's own before_step"

    order = 95

    def before_step(self):
        if (self.epoch, self.iter) == (0, 6):
            raise CancelTrainException()
        if self.iter % 5 == 2:
            raise CancelBatchException()
        if self.iter % 5 == 4:
            raise CancelStepException()


class CancelBetween(Callback):
    "Between the optimizer's step and what sets pruned weights to zero"

    def __init__(self, order):
        self.order = order

    def after_step(self):
        if self.iter % 3 == 1:
            raise CancelBatchException()
        if (self.epoch, self.iter) == (0, 6):
            raise CancelTrainException()
        if (self.epoch, self.iter) == (1, 5):
            raise CancelEpochException()


SKIPPED = {'skipped and cancelled': lambda: [SkipSome(), CancelLate()], 'between': lambda: CancelBetween(60)}
ALONE = {
    'accumulation': lambda: [GradientAccumulation(64), GradientClip(0.5)],
    'skipped': lambda: SkipSome(),
    'cancelled': lambda: CancelLate(),
    'before': lambda: CancelBetween(0),
}  # what other tests have together with something else


@pytest.mark.sample(2)
@each_class
@pytest.mark.parametrize(
    'cbs',
    [*SKIPPED.values(), *(pytest.param(o, marks=pytest.mark.slow) for o in ALONE.values())],
    ids=[*SKIPPED, *ALONE],
)
def test_steps_that_do_not_happen(quick, fit, method, cbs):
    learn = quick(opt_func=SGDM, wd=0.01)
    fit(learn, 2, 0.02, cbs=[method(0.8), Zeros(), *L(cbs())])
    assert is_exact(learn) and is_plain(learn)


AT_ANY = ('before_batch', 'after_backward', 'before_step', 'after_step', 'after_validate')


@pytest.mark.sample(2)
@each_class
@pytest.mark.parametrize(
    'events,order',
    [
        (AT_ANY[::2], -99),
        (AT_ANY[1::2], 99),
        pytest.param(AT_ANY[1::2], -99, marks=pytest.mark.slow),
        pytest.param(AT_ANY[::2], 99, marks=pytest.mark.slow),
    ],
    ids=['first', 'last', 'the others first', 'the others last'],
)
def test_interruption(quick, fit, method, events, order):
    "At one event after the other, each time in a new fit of the dense model"

    def stop(self):
        if self.event == 'after_validate' or self.training and self.iter == 6:
            raise KeyboardInterrupt

    learn = quick(opt_func=SGDM, wd=0.01)
    dense = copy.deepcopy(learn.model)
    for event in events:
        if event == 'before_step' and order > 0 and method is OwnStep:
            continue  # it takes the step itself, and ends this event
        stopping = type('Stop', (Callback,), {'order': order, 'event': event, event: stop})()
        learn.remove_masks()
        learn.model, learn.opt = copy.deepcopy(dense), None
        with pytest.raises(KeyboardInterrupt):
            fit(learn, 2, 0.02, cbs=[method(0.8), stopping])
        assert (learn.masks is None or zeros_or_masks(learn)) and is_plain(learn) and len(learn.cbs) <= 5, event
    fit(learn, 1, 0.02, cbs=method(0.8))
    assert is_exact(learn) and is_plain(learn)


@pytest.mark.sample(2)
@each_class
def test_copies_and_files(quick, fit, method, tmp_path):
    cb = pickle.loads(pickle.dumps(method(0.8)))
    learn = quick(opt_func=SGDM, wd=0.01, cbs=cb)
    twin = copy.deepcopy(learn)
    fit(learn, 1, 0.02)
    fit(twin, 1, 0.02)
    assert twin.masks.keys() == learn.masks.keys() and is_exact(twin)
    learn.export('a.pkl')
    back = load_learner(tmp_path / 'a.pkl')
    assert back.masks == learn.masks
    assert all(
        equal(a, b) for a, b in zip(back.model.state_dict().values(), learn.model.state_dict().values(), strict=True)
    )


@pytest.mark.sample(2)
@each_class
def test_torch_optimizers(quick, fit, method):
    learn = fit(quick(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), 1, 1e-3, cbs=method(0.8))
    assert (
        is_exact(learn)
        and len(list(learn.opt.all_params())) == len(list(learn.model.parameters()))
        and len(learn.opt.opt.state) == len(list(learn.model.parameters()))
    )


@pytest.mark.sample(2)
@each_class
def test_other_types_and_parts(quick, fit, method):
    learn = quick(digits_convnet(widths=(8, 16, 16)).to(torch.bfloat16), opt_func=SGDM, wd=0.01)

    class Cast(Callback):
        def before_batch(self):
            self.learn.xb = tuple(x.to(torch.bfloat16) for x in self.xb)

        def after_pred(self):
            self.learn.pred = self.pred.float()

    fit(learn, 1, 0.02, cbs=[method(0.8, exclude=['0.*']), Cast()])
    assert is_exact(learn) and '0.0.weight' not in learn.masks and len(learn.masks) == 3


@each_class
def test_bad_input(quick, fit, method):
    for s, msg in ((90, 'did you mean 0.9'), (-0.1, 'sparsity=-0.1'), ('x', "sparsity='x'"), (1.0, 'sparsity=1')):
        with pytest.raises(ValueError, match=msg):
            method(s)
    with pytest.raises(ValueError, match='wrong'):
        fit(quick(wd=0.01), 1, cbs=method(0.8, include='wrong'))
    learn = quick(wd=0.01)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='two SparsifyCallbacks'):
        fit(learn, 1, cbs=[method(0.8), SparsifyCallback(0.5)])
    assert (
        all(equal(a, b) for a, b in zip(before.values(), learn.model.state_dict().values(), strict=True))
        and learn.masks is None
        and is_plain(learn)
    )


@pytest.mark.parametrize(
    'make,msg',
    [
        (lambda: STR(s_init='x'), "s_init='x'"),
        (lambda: STR(decay=-1), 'decay=-1'),
        (lambda: DST(alpha=-1), 'alpha=-1'),
        (lambda: LC(0.9, growth=0.5), 'growth=0.5'),
        (lambda: GradualL2(0.9, penalty=-1), 'penalty=-1'),
        (lambda: GradualL2(0.9, growth=3), 'growth=3'),
        (lambda: RigL(0.9, fraction=0), 'fraction=0'),
        (lambda: RigL(0.9, end=2), 'end=2'),
        (lambda: SET(0.9, interval=0), 'interval=0'),
        (lambda: SNFS(0.9, momentum=1), 'momentum=1'),
        (lambda: DPF(0.9, interval=0), 'interval=0'),
        (lambda: RigL(0.9, interval=2.5), 'interval=2.5'),
    ],
)
def test_bad_arguments(make, msg):
    with pytest.raises(ValueError, match=msg):
        make()


def test_what_does_not_fit_the_learner(learner, fit):
    with pytest.raises(ValueError, match='LC needs weight decay'):
        fit(learner(opt_func=SGDM), 1, cbs=LC(0.8))
    with pytest.raises(ValueError, match="torch's"):
        fit(learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD), wd=0.1), 1, cbs=STR(decay=0.1))
    with pytest.warns(UserWarning, match='weight decay'):
        fit(learner(opt_func=SGDM), 1, cbs=GSM(0.8))
    learn = learner(opt_func=SGDM, wd=1e-3)
    first = next(iter(learn.model.parameters()))
    first.requires_grad_(False)
    learn.create_opt()
    first.requires_grad_(True)
    for method in (LC(0.8), STR(0.8, s_init=-5)):
        with pytest.raises(ValueError, match=r'is not in the optimizer.*`learn.create_opt\(\)`'):
            fit(learn, 1, cbs=method)
    with pytest.raises(ValueError, match='BudgetedCallback sets the rates itself.*use `learn.fit`'):
        learner().fit_one_cycle(2, 0.1, cbs=BudgetedCallback(0.8, dense=0.5, cycles=1, lr_max=0.1))
    learn = learner(opt_func=SGDM)
    learn.prune(0.9)
    with pytest.raises(ValueError, match='sparser'):
        fit(learn, 1, cbs=RigL(0.8, scope='local'))


@pytest.mark.sample(2)
@pytest.mark.parametrize('method', [GSM, LC, partial(STR, s_init=-7)], ids=['GSM', 'LC', 'STR'])
@pytest.mark.parametrize(
    'tracker',
    [EarlyStoppingCallback, SaveModelCallback, partial(SaveModelCallback, at_end=True), ReduceLROnPlateau],
    ids=['stop', 'save', 'at end', 'plateau'],
)
def test_trackers_beside_a_hard_step(quick, fit, method, tracker):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = fit(quick(opt_func=SGDM, wd=0.01), 2, 0.02, cbs=[method(0.8), tracker()])
    assert is_exact(learn)


@pytest.mark.parametrize('method', [partial(RigL, interval=3), SET, SNFS])
def test_rows_under_weight_norm_stay(learner, fit, method):
    model = nn.Sequential(
        nn.Flatten(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 20)), nn.ReLU(), nn.Linear(20, 10)
    )
    learn = fit(learner(model, opt_func=SGDM), 2, 0.02, cbs=method(0.95))
    assert all(torch.isfinite(p).all() for p in learn.model.parameters()) and learn.masks.sparsity == pytest.approx(
        0.95, abs=1e-3
    )
    with pytest.raises(ValueError, match='weight_norm'):
        fit(learn, 1, cbs=STR(0.95))


def test_thresholds_reach_each_target_of_local_scope(learner, fit):
    for target in ({'0*': 0.05, '1*': 0.9, '2*': 0.9, '5*': 0.3}, {'0*': 0.6, '1*': 0.1, '2*': 0.1, '5*': 0.3}):
        learn = fit(learner(opt_func=SGDM), 1, 0.02, cbs=STR(target, scope='local', s_init=-3.5, decay=0.0))
        for n, m in learn.masks.items():
            assert int((~m).sum()) >= round(target[n[0] + '*'] * m.numel())
        assert zeros_and_masks_agree(learn)


def test_where_masks_leave_no_room(learner, fit):
    learn = learner(opt_func=SGDM)
    learn.prune({'0*': 0.95}, scope='local')
    with pytest.raises(ValueError, match='do not allow this'):
        fit(learn, 1, cbs=RigL(0.5))
    for method in (RigL, SNFS, SET):
        assert fit(learner(opt_func=SGDM), 1, cbs=method(0.0)).masks.sparsity == 0
    with pytest.warns(UserWarning, match='a greater strength is needed'):
        fit(learner(opt_func=SGDM), 1, 0.02, cbs=STR())


def test_one_after_the_other_with_lookahead(learner, fit):
    learn = learner(opt_func=ranger)
    fit(learn, 2, 0.01, cbs=STR(s_init=-4, decay=0.1))
    assert all(len(s) == len(ps) for s, ps in zip(learn.opt.slow_weights, learn.opt.param_lists, strict=True))
    fit(learn, 1, 0.01, cbs=STR(s_init=-8, decay=0.1))
    fit(learn, 1, 0.01, cbs=DPF(0.9))
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-3) and is_plain(learn)


def test_lc_under_torch_optimizers(learner, fit):
    "The largest weights are not decayed, by decoupled decay or by that in gradients"
    for opt in (partial(torch.optim.SGD, lr=0.1), torch.optim.AdamW):
        learn = learner(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), opt_func=partial(OptimWrapper, opt=opt)
        )
        learn.loss_func = lambda out, y: (out * 0).sum()
        w = learn.model[1].weight.detach().clone()

        class Look(Callback):
            order = 54

            def after_step(self):
                self.w = self.model[1].weight.detach().clone()

        learn.dls.train.n, look = 64, Look()
        fit(learn, 1, 0.1, cbs=[LC(0.8), ShortEpochCallback(0.01), look], wd=0.5)
        large = w.abs() >= w.abs().flatten().kthvalue(round(0.8 * 640) + 1).values
        done = learn.masks['1.weight']
        assert equal(done, large) and torch.allclose(learn.model[1].weight[large], w[large], rtol=1e-6)


def test_dpf_keeps_dense_weights_behind(learner, fit):
    cb, seen = DPF(0.9, schedule=one_shot), []

    class Look(Callback):
        order = 99

        def after_step(self):
            seen.append(
                [
                    (int((cb.dense[n] != 0).sum()), int((p != 0).sum()), bool(equal(cb.dense[n][m], p[m])))
                    for n, p in prunable_weights(self.model).items()
                    for m in [self.learn.masks[n]]
                ]
            )

    learn = fit(learner(opt_func=SGDM), 2, 0.02, cbs=[cb, Look()])
    assert all(same for row in seen for _, _, same in row) and all(
        sum(d for d, _, _ in row) > 5 * sum(p for _, p, _ in row) for row in seen
    )
    assert cb.dense is None and zeros_and_masks_agree(learn)


@pytest.mark.parametrize('make', [lambda: STR(s_init=-4, decay=0.1), lambda: DST(alpha=0.02)], ids=['STR', 'DST'])
def test_thresholds_by_themselves(learner, fit, make):
    """Without a target the sparsity is what thresholds reach, there is no last step, and the optimizer has them while
    it runs"""
    learn, cb, n = learner(opt_func=SGDM), make(), []

    class Look(Callback):
        order = 99

        def before_step(self):
            n.append(len(list(self.learn.opt.all_params())))

        def after_step(self):
            assert is_plain(self.learn)  # whoever saves the optimizer finds it so

    fit(learn, 2, 0.05, cbs=[cb, Look()])
    assert 0 < learn.masks.sparsity < 1 and cb.hard is None and is_plain(learn) and zeros_and_masks_agree(learn)
    assert n[0] == len(list(learn.model.parameters())) + 4


def test_thresholds_beyond_the_target_stay(learner, fit):
    learn, cb = learner(opt_func=SGDM), STR(0.1, s_init=-1, decay=0.1)
    fit(learn, 1, 0.05, cbs=cb)
    assert learn.masks.sparsity > 0.2 and cb.hard is None


@pytest.mark.sample(2)
@pytest.mark.parametrize('method', [GSM, LC, GradualL2, partial(STR, s_init=-7)], ids=['GSM', 'LC', 'GradualL2', 'STR'])
def test_the_hard_step_is_measured(learner, fit, method):
    "Before and after; and measuring changes nothing else"
    learn, cb = learner(opt_func=SGDM, wd=0.01), method(0.8)
    fit(learn, 1, 0.02, cbs=cb)
    with learn.no_bar():
        loss, acc = learn.validate()
    assert (
        list(cb.hard.index) == ['before', 'after']
        and cb.hard.sparsity['before'] < 0.8
        and cb.hard.sparsity['after'] == pytest.approx(0.8, abs=1e-3)
    )
    assert cb.hard.valid_loss['after'] == pytest.approx(loss, rel=1e-4) and cb.hard.accuracy['after'] == pytest.approx(
        acc, abs=1e-6
    )
    alone = learner(opt_func=SGDM, wd=0.01)
    alone.dls.loaders = alone.dls.loaders[:1]
    other = method(0.8)

    class NoValid(Callback):
        def before_validate(self):
            raise CancelBatchException

    alone._do_epoch_validate = lambda *a, **k: None
    fit(alone, 1, 0.02, cbs=other)
    assert list(other.hard.columns) == ['sparsity']
    assert all(equal(a, b) for a, b in zip(alone.model.parameters(), learn.model.parameters(), strict=True))


def test_rigl_drops_along_a_cosine(learner, fit):
    import math

    learn, cb = learner(opt_func=SGDM), RigL(0.8, fraction=0.4, interval=7, end=0.8, scope='local')
    fit(learn, 3, 0.02, cbs=cb)
    T = 3 * len(learn.dls.train)
    assert [c['iteration'] for c in cb.changes] == [t for t in range(7, T, 7) if t < 0.8 * T]
    for c in cb.changes:
        for n, m in learn.masks.items():
            k = m.numel() - round(0.8 * m.numel())
            assert (
                c['dropped'][n]
                == c['grown'][n]
                == round(0.2 * (1 + math.cos(math.pi * c['iteration'] / (0.8 * T))) * k)
                and int(m.sum()) == k
            )
