"What SparsifyCallback promises, step by step"

import contextlib
import copy
import io
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import (
    SGD,
    Adam,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CrossEntropyLossFlat,
    Lamb,
    Learner,
    OptimWrapper,
    Recorder,
    RMSProp,
    load_learner,
    params,
    ranger,
)
from fastai.callback.all import CSVLogger, GradientAccumulation, ProgressCallback, SaveModelCallback, ShortEpochCallback
from helpers import Check, OwnStep, zeros_and_masks_agree

from fastprune.all import (
    CRITERIA,
    SCHEDULES,
    SparsifyCallback,
    compute_masks,
    cubic,
    cyclical,
    digits_convnet,
    digits_dls,
    iterative,
    linear,
    magnitude,
    ocp,
    prunable_weights,
    random_score,
    taylor,
    window,
)
from fastprune.core.scopes import layer_counts
from fastprune.learner.keep import KeepMasks
from fastprune.schedules.sparsity import schedule_name

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

opts = dict(
    sgd=SGD,
    momentum=partial(SGD, mom=0.9),
    adam=Adam,
    decay=partial(Adam, wd=0.1, decouple_wd=False),
    rmsprop=partial(RMSProp, mom=0.9),
    lamb=Lamb,
    lookahead=ranger,
    torch_sgd=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
    torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW),
)


@pytest.mark.sample(2)
@pytest.mark.parametrize('opt', opts)
@pytest.mark.parametrize('scope', ['local', 'global'])
def test_zeros_after_every_step(learner, fit, opt, scope):
    learn, check = learner(opt_func=opts[opt], wd=0.01), Check()
    fit(learn, 1, 1e-3, cbs=[SparsifyCallback(0.8, scope=scope, interval=3), check])
    fit(learn, 1, 1e-3, cbs=check)
    assert check.steps == 24
    n = sum(m.numel() for m in learn.masks.values())
    if scope == 'global':
        assert learn.masks.n_kept == n - round(0.8 * n)
    else:
        assert all(int((~m).sum()) == round(0.8 * m.numel()) for m in learn.masks.values())
    assert zeros_and_masks_agree(learn)


def test_optimizer_state_is_left_alone(learner, fit):
    "With masks all True from start to end the run is plain training, to the bit; and pruning does not touch momentum"
    plain, same = fit(learner(), 2), fit(learner(), 2, cbs=SparsifyCallback(0.0))
    for a, b in zip(plain.model.state_dict().values(), same.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)

    class Peek(Callback):
        order = 54

        def after_step(self):
            self.state = copy.deepcopy(self.opt.state_dict())

    class Compare(Peek):
        order = 91

        def after_step(self):
            for a, b in zip(self.peek.state['state'], self.opt.state_dict()['state'], strict=True):
                for k in a:
                    assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k]

    fit(learner(), 1, cbs=[SparsifyCallback(0.9, interval=1), Peek(), Compare()])


def test_masks_stand_still_with_the_schedule(learner, fit):
    seen = []

    class Watch(Callback):
        order = 80

        def after_step(self):
            seen.append(self.learn.masks)

    fit(learner(), 2, cbs=[SparsifyCallback(0.9, schedule=iterative, interval=1), Watch()])
    changes = [t for t in range(1, len(seen)) if seen[t] is not seen[t - 1]]
    assert changes == [4, 9, 14, 19]  # 24 iterations, steps where ceil(5*(t+1)/24) goes up
    assert len(seen) == 24 and len({id(m) for m in seen}) == 5


@pytest.mark.sample(2)
@pytest.mark.parametrize('interval', [1, 7, 10, 1000])
@pytest.mark.parametrize(
    'schedule', [*SCHEDULES.values(), cyclical(cubic, 3), window(linear, 0.2, 0.71)], ids=schedule_name
)
def test_the_end_is_exact(learner, fit, schedule, interval):
    cb = SparsifyCallback(0.77, schedule=schedule, interval=interval)
    learn = fit(learner(), 1, cbs=cb)
    assert all(int((~m).sum()) == round(0.77 * m.numel()) for m in learn.masks.values())
    assert cb.asked[-1] == pytest.approx(0.77, abs=1e-12) and len(cb.asked) == 12


def test_cycles_recover(learner, fit):
    "At the restart half of the sparsity is given back, in the very next iteration, and each cycle ends at the target"
    cb = SparsifyCallback(0.9, schedule=cyclical(cubic, 2), interval=5)
    fit(learner(), 2, cbs=cb)
    assert cb.reached[11] == pytest.approx(0.9, abs=2e-3) and cb.reached[23] == cb.reached[11]
    assert cb.reached[12] == pytest.approx(cb.asked[12], abs=2e-3) and cb.asked[12] == pytest.approx(
        0.45 + 0.45 * cubic(1 / 12)
    )


def test_accumulated_gradients(learner, fit):
    """Steps come every 3 batches, never on a multiple of the interval, and not on the last batch; masks follow all the
    same"""
    cb, check = SparsifyCallback(0.9, schedule=linear, interval=4), Check()
    learn = fit(learner(data=dict(test_pct=0)), 2, cbs=[cb, check, GradientAccumulation(n_acc=192)])
    assert check.steps == 14 and cb.iters[-1] == 45 and len(cb.iters) == 15  # the last entry is the end, without a step
    assert all(abs(r - a) < 0.9 * 8 / 46 for r, a in zip(cb.reached, cb.asked, strict=True))
    assert all(int((~m).sum()) == round(0.9 * m.numel()) for m in learn.masks.values()) and zeros_and_masks_agree(learn)


def test_skipped_steps_change_nothing(learner, fit):
    class Skip(Callback):
        order, run_valid = 20, False

        def before_step(self):
            self.before = {k: v.clone() for k, v in self.learn.model.named_parameters()}, self.learn.masks
            if self.iter % 2:
                raise CancelStepException()

    class Same(Callback):
        order = 95

        def after_step(self):
            if self.iter % 2:
                assert self.learn.masks is self.skip.before[1]
                for k, v in self.learn.model.named_parameters():
                    assert torch.equal(v, self.skip.before[0][k])

    cb = SparsifyCallback(0.9, schedule=linear, interval=1)
    learn = fit(learner(), 1, cbs=[cb, Skip(), Same()])
    assert cb.iters == [*range(0, 12, 2), 11] and zeros_and_masks_agree(learn)


@pytest.mark.parametrize('at_last', ['random', 'gradient', 'gradient or 0'])
def test_a_skipped_last_step_keeps_a_criterion_that_needs_no_gradients(learner, fit, at_last):
    "One that needs them is replaced by magnitude"

    class SkipLast(Callback):
        order = 60

        def before_step(self):
            if self.iter == self.n_iter - 1:
                raise CancelStepException()

    def by_gradient(weights):
        zero = lambda p: torch.zeros_like(p) if at_last == 'gradient or 0' and p.grad is None else p.grad
        return {n: (zero(p) * p.detach()).abs() for n, p in weights.items()}

    criterion = partial(random_score, seed=3) if at_last == 'random' else by_gradient
    learn = learner()
    fit(learn, 1, cbs=[SparsifyCallback(0.9, schedule=linear, criterion=criterion), SkipLast()])
    weights = prunable_weights(learn.model)
    scores = random_score(weights, seed=3) if at_last == 'random' else weights
    assert learn.masks == compute_masks(scores, 0.9, absolute=at_last != 'random')


def test_a_replaced_step_is_a_step(learner, fit):
    "A method that replaces the step by the optimizer's own trains as one that does not, to the bit"
    check = Check()
    own, plain = (fit(learner(), 2, cbs=[m(0.9, interval=5), check]) for m in (OwnStep, SparsifyCallback))
    assert check.steps == 48 and own.masks == plain.masks
    for a, b in zip(own.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    'event,exc',
    [
        ('before_step', CancelStepException),
        ('before_step', CancelBatchException),
        ('before_batch', CancelBatchException),
        ('after_backward', CancelBatchException),
    ],
)
def test_steps_that_another_callback_makes_are_masked(learner, fit, event, exc):
    def step(self):
        if self.training:
            with torch.no_grad():
                for p in self.learn.model.parameters():
                    p.add_(1)
            raise exc()

    class Zeros(Callback):
        order = 95

        def after_batch(self):
            assert zeros_and_masks_agree(self.learn)

    learn = learner()
    learn.prune(0.9)
    fit(learn, 1, cbs=[type('Steps', (Callback,), {event: step})(), Zeros()])


class Boom(Callback):
    def __init__(self, event, order, exc, at=6):
        self.event, self.order, self.exc, self.at = event, order, exc, at

    def __call__(self, name):
        if name == self.event and self.training and self.iter == self.at:
            raise self.exc('boom')


@pytest.mark.sample(2)
@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    'event,order',
    [
        ('after_step', -100),
        ('after_step', 60),
        ('after_step', 99),
        ('before_step', 0),
        ('after_batch', 99),
        ('after_pred', 0),
    ],
)
def test_interrupted(learner, fit, event, order, exc):
    learn = learner()
    with pytest.raises(exc):
        fit(learn, 1, cbs=[SparsifyCallback(0.9, schedule=linear, interval=1), Boom(event, order, exc)])
    assert learn.masks.sparsity > 0.3 and zeros_and_masks_agree(learn)
    assert [m.name for m in learn.metrics] == ['accuracy'] and not hasattr(learn, 'sparsify')
    before = learn.masks
    fit(learn, 1)
    assert learn.masks == before and zeros_and_masks_agree(learn)


def test_dense_weights_loaded_after_an_interruption(learner, fit):
    "Are reported and set to zero before the first batch, as after any other fit"
    learn = learner()
    dense = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 1, cbs=[SparsifyCallback(0.9, interval=1), Boom('after_batch', 0, KeyboardInterrupt)])
    learn.model.load_state_dict(dense)
    with pytest.warns(UserWarning, match='were not zero, as after loading'):
        fit(learn, 1)
    assert zeros_and_masks_agree(learn)


@pytest.mark.parametrize('at', ['step', 'criterion', 'compute'])
def test_interrupted_inside(learner, fit, at, monkeypatch):
    "In the optimizer's step, in the criterion, and in the computation of masks"
    learn, calls = learner(), []

    def raise_at_6(f):
        def g(*args, **kwargs):
            calls.append(1)
            res = f(*args, **kwargs)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return res

        return g

    learn.create_opt()
    if at == 'step':
        learn.opt.step = raise_at_6(learn.opt.step)
    if at == 'compute':
        monkeypatch.setattr('fastprune.engine.hooks.compute_masks', raise_at_6(compute_masks))
    crit = raise_at_6(magnitude) if at == 'criterion' else magnitude
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 1, cbs=SparsifyCallback(0.9, schedule=linear, interval=1, criterion=crit))
    assert learn.masks.sparsity > 0.3 and zeros_and_masks_agree(learn)


def test_early_stopping_leaves_the_present_sparsity(learner, fit):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch == 1:
                raise CancelFitException

    cb = SparsifyCallback(0.9, schedule=linear)
    learn = fit(learner(), 4, cbs=[cb, Stop()])
    assert 0.4 < learn.masks.sparsity < 0.46 and zeros_and_masks_agree(learn)


def test_short_epochs_still_end_exactly(learner, fit):
    learn = fit(learner(), 2, cbs=[SparsifyCallback(0.9), ShortEpochCallback(pct=0.3)])
    assert all(int((~m).sum()) == round(0.9 * m.numel()) for m in learn.masks.values()) and zeros_and_masks_agree(learn)


def test_starting_at_a_later_epoch(learner, fit):
    "The schedule goes by the epoch, as fastai's own do"
    cb = SparsifyCallback(0.9, schedule=linear)
    learn = learner()
    learn.remove_cb(Recorder)  # fastai's Recorder fails on skipped epochs
    learn.remove_cb(ProgressCallback)
    learn.fit(4, 1e-2, cbs=cb, start_epoch=2)
    assert (
        cb.iters[0] == 24
        and cb.reached[0] == pytest.approx(0.9 * 25 / 48, abs=2e-3)
        and cb.reached[-1] == pytest.approx(0.9, abs=1e-3)
    )


@pytest.mark.parametrize('groups', [1, 2])
def test_fine_tune_prunes_once(learner, fit, groups):
    "Over the unfrozen phase, on a Learner with one parameter group too"
    split = {} if groups == 1 else dict(splitter=lambda m: [params(m[:2]), params(m[2:])])
    learn, log = learner(**split), []

    class EachStep(Callback):
        order = 80

        def after_step(self):
            log.append(self.learn.masks.sparsity if self.learn.masks else 0.0)

    cb = SparsifyCallback(0.9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learn, 2, how='fine_tune', cbs=[cb, EachStep()])
    assert log[:12] == [0] * 12 and 0 < log[13] < 0.1 and log[-1] == pytest.approx(0.9, abs=1e-3) and len(log) == 36
    assert len(cb.iters) == 24


def test_frozen_fit_says_so(learner, fit):
    learn = learner(splitter=lambda m: [params(m[:2]), params(m[2:])])
    learn.freeze()

    def fine_tune():
        "Of that name, but not fastai's, which unfreezes the Learner"
        fit(learn, 1, cbs=SparsifyCallback(0.9))

    for train in (fine_tune, lambda: fit(learn, 1, cbs=SparsifyCallback(0.9))):
        with pytest.warns(UserWarning, match='The Learner is frozen, so SparsifyCallback prunes nothing'):
            train()
    assert learn.masks is None and learn.recorder.values[-1][-1] == 0
    learn.unfreeze()
    fit(learn, 1, cbs=SparsifyCallback(0.9))
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_frozen_parameters_are_left_alone(learner, fit):
    learn = learner()
    learn.model[0].requires_grad_(False)
    fit(learn, 1, cbs=SparsifyCallback(0.9))
    assert '0.0.weight' not in learn.masks and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_lr_find_and_friends_leave_the_model_alone(learner, fit):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.5))
    learn.add_cb(SparsifyCallback(0.9))
    state, masks = copy.deepcopy(learn.model.state_dict()), learn.masks
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=15)
        learn.get_preds()
        learn.validate()
        learn.get_preds(ds_idx=0)
    assert learn.masks == masks and not any(m.name == 'sparsity' for m in learn.metrics)
    for k, v in learn.model.state_dict().items():
        assert torch.equal(v, state[k])


def test_silent(learner, capsys):
    learn = learner()
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit_one_cycle(1, 1e-2, cbs=SparsifyCallback(0.9))
        learn.fit(1)
        learn.prune(0.95)
        learn.remove_masks()
    assert capsys.readouterr().out == ''


def test_the_column(learner, tmp_path):
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2, cbs=[SparsifyCallback(0.9, schedule=linear, interval=1), CSVLogger()])
    csv = pd.read_csv(tmp_path / 'history.csv')
    assert list(csv.columns) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']
    assert csv.sparsity.tolist() == pytest.approx([0.45, 0.9], abs=0.02)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        learn.fit(1, 1e-2, cbs=SparsifyCallback(0.95))
    assert 'sparsity' in out.getvalue()
    assert learn.validate() and 'sparsity' not in [m.name for m in learn.metrics]
    learn.recorder.add_time = False
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(0.95))
        assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity']
        learn.fit(1, cbs=[SparsifyCallback(0.95), SaveModelCallback('sparsity', np.greater, at_end=True)])


def test_second_callback_goes_on(learner, fit):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.6))
    first, again = learn.masks, SparsifyCallback(0.6, interval=1)
    fit(learn, 1, cbs=again)
    assert learn.masks == first  # the same target: nothing to change
    more = SparsifyCallback(0.9, schedule=linear, interval=1)
    fit(learn, 1, cbs=more)
    assert more.reached[0] == pytest.approx(0.6 + 0.3 / 12, abs=2e-3) and more.reached == sorted(more.reached)
    less = SparsifyCallback(0.3, schedule=linear, interval=1)
    fit(learn, 1, cbs=less)
    assert less.reached == sorted(less.reached, reverse=True) and all(
        int((~m).sum()) == round(0.3 * m.numel()) for m in learn.masks.values()
    )


def test_zeros_of_a_loaded_model_count_and_are_kept(learner, fit, tmp_path):
    a = fit(learner(), 1, cbs=SparsifyCallback(0.6))
    b = learner()
    b.model.load_state_dict(a.model.state_dict())
    torch.nn.init.zeros_(b.model[-1].weight)  # a fresh head of zeros is not a pruned one
    cb = SparsifyCallback(0.8, schedule=linear, interval=1)

    class First(Callback):
        def before_batch(self):
            if self.training and self.iter == 0:
                self.present = self.learn.masks

    first = First()
    fit(b, 1, cbs=[cb, first])
    assert first.present['1.0.weight'].equal(a.masks['1.0.weight'])
    assert first.present['5.weight'].all() and (b.model[-1].weight != 0).sum() == 32


def test_initial(learner, fit):
    cb = SparsifyCallback(0.9, schedule=linear, initial=0.5, interval=1)
    fit(learner(), 1, cbs=cb)
    assert cb.reached[0] == pytest.approx(0.5 + 0.4 / 12, abs=2e-3)
    cb = SparsifyCallback({'*': 0.9, '5': 0.2}, schedule=linear, initial={'5': 0.1}, interval=1)
    learn = fit(learner(), 1, cbs=cb)
    assert int((~learn.masks['5.weight']).sum()) == 32


def test_two_parts_one_after_the_other(learner, fit):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.9, include='1'))
    one = learn.masks['1.0.weight']
    fit(learn, 1, cbs=SparsifyCallback(0.5, include='2'))
    assert (
        torch.equal(learn.masks['1.0.weight'], one)
        and set(learn.masks) == {'1.0.weight', '2.0.weight'}
        and zeros_and_masks_agree(learn)
    )
    with pytest.raises(ValueError, match='two SparsifyCallbacks in one fit'):
        fit(learn, 1, cbs=[SparsifyCallback(0.5, include='1'), SparsifyCallback(0.5, include='2')])


@pytest.mark.sample(2)
@pytest.mark.parametrize('criterion', CRITERIA.values())
def test_criteria(learner, fit, criterion):
    rng = []

    class Rng(Callback):
        def before_step(self):
            rng.append(torch.get_rng_state())  # before_batch is heard by the criteria's own passes, too

    fit(learner(), 1, cbs=Rng())
    plain = rng.copy()
    rng.clear()
    learn = fit(learner(), 1, cbs=[SparsifyCallback(0.8, criterion=criterion, interval=4), Rng()])
    assert zeros_and_masks_agree(learn) and all(int((~m).sum()) == round(0.8 * m.numel()) for m in learn.masks.values())
    assert all(torch.equal(a, b) for a, b in zip(plain, rng, strict=True))  # the same random numbers as plain training


def test_random_scores_give_nested_masks(learner, fit):
    seen = []

    class Watch(Callback):
        order = 80

        def after_step(self):
            seen.append(self.learn.masks)

    fit(learner(), 1, cbs=[SparsifyCallback(0.8, criterion=random_score, schedule=linear, interval=1), Watch()])
    assert all((b[n] <= a[n]).all() for a, b in pairwise(seen) for n in a)


def test_nan_weights_are_reported_and_agree(learner, fit):
    class Diverge(Callback):
        order = 0

        def after_step(self):
            if self.iter == 6:
                self.learn.model[1][0].weight.data[0, 0, 0, 0] = torch.nan

    learn = learner()
    with pytest.raises(ValueError, match=r"scores\['1.0.weight'\] has NaN"):
        fit(learn, 1, cbs=[SparsifyCallback(0.9, schedule=linear, interval=1), Diverge()])
    ps = dict(learn.model.named_parameters())
    assert all((ps[n][~m] == 0).all() for n, m in learn.masks.items())


def test_pickled_during_a_fit(learner, fit, tmp_path):
    class Export(Callback):
        def after_batch(self):
            if self.training and self.iter == 6:
                self.copy = copy.deepcopy(self.learn.model)
                torch.save(self.learn.model.state_dict(), tmp_path / 'mid.pth')
                self.learn.save('mid_learn')

    e = Export()
    learn = fit(learner(), 1, cbs=[SparsifyCallback(0.9, schedule=linear), e])
    assert list(torch.load(tmp_path / 'mid.pth')) == list(digits_convnet().state_dict()) == list(e.copy.state_dict())
    learn.load('mid_learn')
    with pytest.warns(UserWarning, match='were not zero'):
        fit(learn, 1)
    assert zeros_and_masks_agree(learn)


def test_a_callback_that_stays(learner, fit):
    "Added to the Learner it is exported with it, and prunes every fit to its target"
    learn = learner(cbs=SparsifyCallback(0.5, schedule=cyclical(window(ocp, 0, 0.8), 2)))
    fit(learn, 1)
    learn.export('all.pkl')
    with pytest.warns(UserWarning, match='insecure pickle'):
        again = load_learner(learn.path / 'all.pkl')
    assert again.masks == learn.masks
    again.dls = learn.dls
    again.sparsify.sparsity = 0.8
    fit(again, 1)
    assert again.masks.sparsity == pytest.approx(0.8, abs=1e-3) and zeros_and_masks_agree(again)


def test_setting_masks(learner, fit):
    learn = learner()
    masks = compute_masks(magnitude(prunable_weights(learn.model)), 0.7)
    learn.masks = masks
    assert zeros_and_masks_agree(learn)
    fit(fit(learn, 1), 1)
    assert learn.masks == masks and zeros_and_masks_agree(learn) and len(learn._grab_cbs(KeepMasks)) == 1
    learn.masks = None
    assert learn.masks is None and not learn._grab_cbs(KeepMasks)
    learn.remove_masks()  # nothing to remove is no error


class Nest(Callback):
    "Calls `f(learn)` from within a fit"

    order, run_valid = 80, False

    def __init__(self, event, f):
        self.event, self.f = event, f

    def __call__(self, name):
        if (
            name == self.event
            and not getattr(self, 'inside', False)
            and (name != 'after_batch' or self.training and self.iter == 11)
        ):
            self.inside = True
            try:
                self.f(self.learn)
            finally:
                self.inside = False


@pytest.mark.sample(2)
@pytest.mark.parametrize('f', [lambda l: l.validate(), lambda l: l.get_preds()], ids=['validate', 'get_preds'])
@pytest.mark.parametrize('event', ['after_train', 'after_epoch'])
def test_validating_from_within_a_fit(learner, fit, event, f):
    "Changes nothing: neither the plan, nor the masks, nor their being kept"
    plain, cb, check = SparsifyCallback(0.9, schedule=linear), SparsifyCallback(0.9, schedule=linear), Check()
    fit(learner(), 3, cbs=plain)
    learn = fit(learner(), 3, cbs=[cb, Nest(event, f), check])
    assert (
        cb.iters == plain.iters and cb.reached == plain.reached and check.steps == 36 and zeros_and_masks_agree(learn)
    )
    fit(learn, 2, cbs=[Nest(event, f), check])
    assert zeros_and_masks_agree(learn) and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_interval_is_kept(learner, fit):
    calls = []

    def counted(weights):
        calls.append(1)
        return {n: p.detach() ** 2 for n, p in weights.items()}

    cb = SparsifyCallback(0.9, schedule=linear, interval=5, criterion=counted)
    fit(learner(), 2, cbs=cb)
    assert [t for t in range(1, 24) if cb.reached[t] != cb.reached[t - 1]] == [5, 10, 15, 20, 23]
    assert len(calls) == 1 + 6  # one to try it, before training


@pytest.mark.parametrize('recover', [True, False])
def test_recover(learner, fit, recover):
    "Cycles bring weights back, unless masks are to be nested"
    nested = []

    class Watch(Callback):
        order, last = 80, None

        def after_step(self):
            if self.last:
                nested.append(all((m <= self.last[n]).all() for n, m in self.learn.masks.items()))
            self.last = self.learn.masks

    learn = fit(
        learner(), 2, cbs=[SparsifyCallback(0.9, schedule=cyclical(cubic, 2), recover=recover, interval=3), Watch()]
    )
    assert all(nested) != recover and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'criterion',
    [magnitude, lambda weights: {n: p.detach().abs() - 3 for n, p in weights.items()}],
    ids=['magnitude', 'negative'],
)
@pytest.mark.parametrize('scope', ['local', 'global', 'lamp'])
def test_dead_filters_come_back_last(learner, fit, criterion, scope):
    "Where sparsity falls, and steps are large"
    if scope == 'lamp' and criterion is not magnitude:
        criterion = lambda weights: {n: p.detach() ** 2 for n, p in weights.items()}
    came, groups = (
        {'alive': 0, 'dead': 0, 'dead before alive': 0},
        [['0.0.weight'], ['1.0.weight'], ['2.0.weight'], ['5.weight']],
    )

    class Watch(Callback):
        order, last = 80, None

        def after_step(self):
            now = self.learn.masks
            if self.last:
                alive = {
                    n: m.flatten(1).any(1).view(-1, *[1] * (m.ndim - 1)).expand_as(m) for n, m in self.last.items()
                }
                for names in groups if scope == 'local' else [sum(groups, [])]:
                    back = (
                        [int((now[n] & ~self.last[n] & alive[n]).sum()) for n in names],
                        [int((now[n] & ~alive[n]).sum()) for n in names],
                    )
                    came['alive'] += sum(back[0])
                    came['dead'] += sum(back[1])
                    came['dead before alive'] += sum(back[1]) > 0 and any((alive[n] & ~now[n]).any() for n in names)
            self.last = now

    learn = learner(data=dict(test_pct=0))
    cb = SparsifyCallback(
        0.97, criterion=criterion, schedule=cyclical(cubic, 3, 0.2), scope=scope, recover='alive', interval=2
    )
    fit(learn, 2, 1.0, cbs=[cb, Watch()])
    n = sum(m.numel() for m in learn.masks.values())
    assert came['alive'] and came['dead'] and not came['dead before alive']
    if scope == 'local':
        assert all(int((~m).sum()) == round(0.97 * m.numel()) for m in learn.masks.values())
    else:
        assert learn.masks.n_kept == n - round(0.97 * n)


@pytest.mark.parametrize(
    'shape, groups',
    [((6,), 0), ((6, 5), 0), ((6, 5, 3, 3), 0), ((6, 5, 3), 0), ((4, 6, 3, 3), 1), ((4, 6, 3, 3), 2), ((8, 3, 2), 4)],
)
@pytest.mark.parametrize('kind', ['magnitude', 'positive', 'negative', 'equal'])
def test_which_filters_are_dead(shape, groups, kind):
    "Of a transposed convolution [in,out/groups,...], too; they keep their order, behind all others"
    from fastprune.criteria.ranking import _dead_last

    out = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)  # the filter of each weight
    if groups:
        out = (
            ((torch.arange(shape[0]) // (shape[0] // groups))[:, None] * shape[1] + torch.arange(shape[1]))
            .view(*shape[:2], *[1] * (len(shape) - 2))
            .expand(shape)
        )
    torch.manual_seed(0)
    mask, scores = torch.rand(shape) < len(out.unique()) / out.numel() / 2, torch.randn(shape)
    if kind == 'positive':
        scores = scores.abs()
    if kind == 'equal':
        scores = -torch.ones(shape)
    dead = ~torch.isin(out, out[mask])
    assert dead.any() and not dead.all()
    ranked = _dead_last({'w': scores}, {'w': mask}, kind == 'magnitude', {'w': groups} if groups else {})['w']
    assert torch.equal(ranked[~dead], scores[~dead])
    if kind == 'magnitude':
        ranked, scores = ranked.abs(), scores.abs()
    assert ranked[dead].max() < ranked[~dead].min() and torch.equal(
        ranked[dead].argsort(stable=True), scores[dead].argsort(stable=True)
    )


def test_dead_filters_under_weight_norm(fit):
    "Each column keeps its largest, in a dead row, too"
    learn = Learner(
        digits_dls(),
        torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 10), dim=1)
        ),
        CrossEntropyLossFlat(),
    )
    fit(learn, 2, 0.5, cbs=SparsifyCallback(0.8, schedule=cyclical(cubic, 2, 0.2), recover='alive', interval=2))
    mask = next(iter(learn.masks.values()))
    assert (
        mask.any(0).all()
        and learn.masks.n_kept == 640 - 512
        and all(p.isfinite().all() for p in learn.model.parameters())
    )


@pytest.mark.parametrize('granularity', ['row', 'column', '2:4'])
def test_dead_rows_of_other_groups(fit, granularity):
    "Rows are dead where weights were pruned one by one before"
    learn = Learner(
        digits_dls(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), CrossEntropyLossFlat()
    )
    with torch.no_grad():
        learn.model[1].weight[3:6] = 0
    learn.prune(0.5)
    for criterion in (magnitude, lambda weights: {n: p.detach().abs() - 3 for n, p in weights.items()}):
        fit(
            learn,
            1,
            0.5,
            cbs=SparsifyCallback(0.5, criterion=criterion, granularity=granularity, recover='alive', interval=2),
        )
    ((name, mask),) = learn.masks.items()
    assert mask.sum() == 320 and (learn.model.get_parameter(name)[~mask] == 0).all()


@pytest.mark.parametrize('recover', ['dead', 2, None])
def test_wrong_recover(learner, recover):
    with pytest.raises(ValueError, match="recover=.*needs True, False or 'alive'"):
        SparsifyCallback(0.5, recover=recover)
    with pytest.raises(ValueError, match="recover='alive': needs True or False"):
        learner().prune(0.5, recover='alive')


class CutShort(Callback):
    "No steps in the last part of the last epoch"

    order, run_valid = 20, False

    def __init__(self, exc):
        self.exc = exc

    def before_batch(self):
        if self.epoch == 1 and self.iter > 7:
            raise self.exc


@pytest.mark.sample(2)
@pytest.mark.parametrize('exc', [CancelBatchException, CancelEpochException])
@pytest.mark.parametrize('start,end', [(0.0, 0.9), (0.9, 0.3)])
@pytest.mark.parametrize('criterion', [magnitude, taylor])
@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['fastai', 'torch'])
def test_the_end_is_exact_without_a_last_step(learner, fit, exc, start, end, criterion, opt):
    "Also where sparsity falls, and where gradients are gone by then"
    learn = learner(opt_func=opt)
    if exc is CancelEpochException:
        learn.remove_cb(Recorder)  # fastai's own fails where an epoch is cancelled
        learn.remove_cb(ProgressCallback)
    if start:
        learn.prune(start)
    cb = SparsifyCallback(end, schedule=linear, criterion=criterion)
    learn.fit(2, 1e-2, cbs=[cb, CutShort(exc)]) if exc is CancelEpochException else fit(
        learn, 2, cbs=[cb, CutShort(exc)]
    )
    assert all(int((~m).sum()) == round(end * m.numel()) for m in learn.masks.values()) and cb.reached[
        -1
    ] == pytest.approx(end, abs=1e-3)
    assert zeros_and_masks_agree(learn) or end < start
    positions = torch.cat([m.flatten().nonzero()[:, 0] / m.numel() for m in learn.masks.values()])
    assert 0.4 < positions.mean() < 0.6  # by score, not by position


def test_masks_of_another_kind_change_at_the_same_sparsity(learner, fit):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.5))
    fit(learn, 1, cbs=SparsifyCallback(0.5, granularity='filter', exclude='5'))
    assert [int(m.flatten(1).any(1).sum()) for n, m in learn.masks.items() if n != '5.weight'] == [4, 8, 8]
    kept = learn.masks
    fit(learn, 1, cbs=SparsifyCallback(0.5, granularity='filter', exclude='5', interval=1))
    assert learn.masks == kept  # but of the same kind do not
    fit(learn, 1, cbs=SparsifyCallback(0.5, scope='global'))
    n = sum(m.numel() for m in learn.masks.values())
    assert (
        learn.masks.n_kept == n - round(0.5 * n)
        and len({round(m.float().mean().item(), 3) for m in learn.masks.values()}) > 2
    )


def test_groups_inside_of_single_weights(learner, fit):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.5))
    before = learn.masks
    fit(learn, 1, cbs=SparsifyCallback(0.75, granularity='filter', exclude='5', recover=False))
    assert all((m <= before[n]).all() for n, m in learn.masks.items())


@pytest.mark.parametrize('scope', ['erk', 'balanced'])
def test_other_scopes(learner, fit, scope):
    cb = SparsifyCallback(0.8, scope=scope, schedule=linear, interval=2)
    learn = fit(learner(), 2, cbs=cb)
    sizes = {n: m.shape for n, m in learn.masks.items()}
    assert {n: int((~m).sum()) for n, m in learn.masks.items()} == layer_counts(sizes, 0.8, scope)
    assert all(abs(r - a) < 0.1 for r, a in zip(cb.reached, cb.asked, strict=True)) and zeros_and_masks_agree(learn)


def test_two_of_four(learner, fit):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.5, granularity='2:4', exclude='0'))
    for n, m in learn.masks.items():
        blocks = m.movedim(1, -1).reshape(-1, 4)
        assert (blocks.sum(1) == 2).all(), n
    with pytest.raises(
        ValueError, match="'2:4' does not fit '0.0.weight' of shape .* whose 1 inputs are no multiple of 4"
    ):
        fit(learner(), 1, cbs=SparsifyCallback(0.5, granularity='2:4', include='0'))
    with pytest.warns(UserWarning, match="'2:4' does not fit '0.0.weight': left whole"):
        other = fit(learner(), 1, cbs=SparsifyCallback(0.5, granularity='2:4'))
    assert other.masks.keys() == learn.masks.keys() and other.masks.sparsity == 0.5


@pytest.mark.parametrize('at_end', [False, True])
def test_save_model_callback_needs_no_warning(learner, fit, at_end):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = fit(learner(), 2, cbs=[SparsifyCallback(0.9), SaveModelCallback(at_end=at_end)])
    assert zeros_and_masks_agree(learn)


def test_dense_weights_loaded_before_a_second_callback(learner, fit):
    learn = learner()
    dense = copy.deepcopy(learn.model.state_dict())
    fit(learn, 1, cbs=SparsifyCallback(0.6))
    learn.model.load_state_dict(dense)
    with pytest.warns(UserWarning, match='were not zero, as after loading'):
        fit(learn, 1, cbs=SparsifyCallback(0.9))
    assert zeros_and_masks_agree(learn)


def test_a_model_with_attributes_of_these_names(learner, fit):
    class Odd(torch.nn.Sequential):
        lr_finder = gather_preds = keep_masks = masks = sparsify = None

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn = fit(learner(Odd(*digits_convnet(widths=(8, 16, 16)))), 1, cbs=SparsifyCallback(0.9))
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-3) and zeros_and_masks_agree(learn)


def test_masks_and_buffers_follow_a_model_to_another_device():
    "'meta' stands for a GPU here: it is the other device that every machine has"
    from fastprune.learner.batches import undisturbed

    learn = Learner(digits_dls(), digits_convnet(), loss_func=CrossEntropyLossFlat())
    learn.prune(0.5)
    with undisturbed(learn):
        learn.model.to('meta')
    assert {t.device.type for t in learn.model.state_dict().values()} == {'meta'}
    learn.keep_masks.before_fit()
    assert {m.device.type for m in learn.masks.values()} == {'meta'}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: pytest --device cuda')
def test_pruned_before_training_on_a_gpu():
    learn = Learner(digits_dls(device='cuda'), digits_convnet(), loss_func=CrossEntropyLossFlat())
    learn.prune(0.5)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(0.8))
    assert all(m.is_cuda for m in learn.masks.values()) and abs(learn.masks.sparsity - 0.8) < 1e-3
