"Averages of weights have the zeros of the present masks, whenever they are used"

import contextlib
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.basics import SGD, Callback, CancelTrainException, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.all import SaveModelCallback
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastprune.all import Masks, SparsifyCallback, digits_convnet, digits_dls, linear, state_of
from fastprune.core.names import is_average, unwrap
from fastprune.learner.averages import averages_of

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


def make(model=None, bs=256, **kwargs):
    set_seed(3, reproducible=True)
    kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=partial(SGD, mom=0.9)) | kwargs
    return Learner(digits_dls(bs=bs), net() if model is None else model, **kwargs)


def fit(learn, n=3, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, 0.05, **kwargs)
    return learn


class Copy:
    "A moving average as other libraries write it"

    def __init__(self, model):
        self.module, self.training = deepcopy(model), False

    @torch.no_grad()
    def update(self, model):
        for a, p in zip(self.module.parameters(), model.parameters(), strict=True):
            a.data.mul_(0.9).add_(p.data, alpha=0.1)


def timms(name, **kwargs):
    return lambda model: getattr(pytest.importorskip('timm.utils'), name)(model, decay=0.9, **kwargs)


KINDS = {
    'EMA': lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    'SWA': AveragedModel,
    'ModelEma': timms('ModelEma'),
    'ModelEmaV2': timms('ModelEmaV2'),
    'ModelEmaV3': timms('ModelEmaV3'),
    'copy': Copy,
}


def zeros(model, masks):
    "Are the zeros of a model exactly those of the masks?"
    weights = dict(unwrap(model).named_parameters())
    return Masks.from_zeros({n: weights[n] for n in masks}) == masks


def plain_model(average):
    return getattr(average, 'module', None) or average.ema


class Average(Callback):
    "Keeps an average, validates it in place of the model, and loads it at the end"

    run_valid = True

    def __init__(self, kind, event='after_batch', order=0, load=True, swap=True):
        self.kind, self.event, self.order, self.load, self.swap = kind, event, order, load, swap
        self.seen = []

    def before_fit(self):
        kept = KINDS[self.kind](self.model)
        self.kept = kept
        self.ema_model = plain_model(kept)  # a plain copy is found by its name

    def update(self, event):
        if event == self.event and self.training:
            getattr(self.kept, 'update_parameters', getattr(self.kept, 'update', None))(self.model)

    def after_step(self):
        self.update('after_step')

    def after_batch(self):
        self.update('after_batch')

    def before_validate(self):
        if self.event == 'epoch':
            self.kept.update_parameters(self.model)
        if self.swap:
            self.trained, self.learn.model = self.model, self.kept if is_average(self.kept) else self.ema_model

    def before_batch(self):
        if not self.training and self.learn.masks:
            self.seen.append(zeros(self.ema_model, self.learn.masks) and zeros(self.model, self.learn.masks))

    def after_validate(self):
        if self.swap:
            self.learn.model = self.trained

    def after_fit(self):
        if self.load:
            self.model.load_state_dict(self.ema_model.state_dict())


class AfterSteps(Callback):
    "Looks at the average after each step"

    order, run_valid = 90, False

    def __init__(self, average):
        self.average, self.exact = average, []

    def after_step(self):
        if masks := self.learn.masks:
            weights = dict(self.average.ema_model.named_parameters())
            self.exact.append(not any(weights[n][~m].any() for n, m in masks.items()))


moving = partial(SparsifyCallback, 0.8, schedule=linear, interval=2)
CASES = [(kind, 'after_batch', 0) for kind in KINDS]
CASES += [('EMA', 'after_step', order) for order in (-100, 0, 65, 75)]
CASES += [('ModelEmaV3', 'after_step', -100), ('SWA', 'epoch', 0)]


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind,event,order', CASES)
def test_used_and_loaded(kind, event, order, recwarn):
    average = Average(kind, event, order)
    steps = AfterSteps(average)
    learn = fit(make(), cbs=[moving(), average, steps])
    assert len(average.seen) == 3 and all(average.seen) and learn.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert zeros(average.ema_model, learn.masks) and zeros(learn.model, learn.masks)
    assert len(steps.exact) > 10 and all(steps.exact)
    weights, loaded = dict(average.ema_model.named_parameters()), dict(learn.model.named_parameters())
    assert all(torch.equal(weights[n], p) for n, p in loaded.items())
    assert not [w for w in recwarn if 'were not zero' in str(w.message)]


@pytest.mark.parametrize('masked', [True, False])
def test_the_training_is_the_same(masked):
    "An average does not change it; and without masks, nothing changes the average"
    cbs = [moving()] if masked else []
    alone, average = fit(make(), cbs=cbs), Average('EMA', load=False, swap=False)

    class ByHand(Callback):
        order, run_valid = 99, False

        def before_fit(self):
            self.copy = None

        def after_batch(self):
            now = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            self.copy = now if self.copy is None else {n: torch.lerp(t, now[n], 1 - 0.9) for n, t in self.copy.items()}

    learn = fit(make(), cbs=[*cbs, average, ByHand()] if masked else [average, hand := ByHand()])
    a, b = state_of(alone), state_of(learn)
    assert all(torch.equal(a[n], b[n]) for n in a)
    if not masked:
        assert all(torch.equal(p, hand.copy[n]) for n, p in average.ema_model.named_parameters())


class Keeps(Callback):
    "Copies of the model under names"

    def __init__(self, **copies):
        self.__dict__.update(copies)


def test_masks_that_are_set_outside_of_a_fit():
    learn, timm = make(), pytest.importorskip('timm.utils')
    model = learn.model
    found = dict(
        ema_model=deepcopy(model),
        both=[AveragedModel(model), AveragedModel(model)],
        swa={n: p.detach().clone() for n, p in model.named_parameters()},
        anything=timm.ModelEmaV3(model),
    )
    other = dict(teacher=deepcopy(model), dense={n: p.detach().clone() for n, p in model.named_parameters()})
    other.update(average_of_others=nn.Linear(3, 3), avg=1.0, ema=None)
    learn.add_cb(Keeps(**found, **other))
    learn.ema, learn.model_ema, learn.copy = AveragedModel(model), timm.ModelEma(model), deepcopy(model)
    before = deepcopy([learn.copy.state_dict(), other['teacher'].state_dict(), other['dense']])

    def models():
        return [found['ema_model'], *found['both'], found['anything'], learn.ema, learn.model_ema.ema]

    assert len(averages_of(learn)) == 8  # these, weights by name, and one of another model
    for prune in (partial(learn.prune, 0.5), partial(setattr, learn, 'masks', None), partial(learn.prune, 0.7)):
        prune()
        if learn.masks:
            assert all(zeros(m, learn.masks) for m in models())
            assert Masks.from_zeros({n: found['swa'][n] for n in learn.masks}) == learn.masks
    learn.masks = masks = {
        n: m.logical_not() & (torch.rand(m.shape) < 0.9).to(m.device) for n, m in learn.masks.items()
    }
    for m in models():
        weights = dict(unwrap(m).named_parameters())
        assert not any(weights[n][~m].any() for n, m in masks.items())
    for a, b in zip(before, [learn.copy.state_dict(), other['teacher'].state_dict(), other['dense']], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_is_no_average_of_these_weights_stays():
    class Critic(nn.Sequential):
        "Begins with a layer of the names and shapes of the model's"

        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 1))

    learn = make()
    ones = {n: torch.ones_like(p) for n, p in learn.model.named_parameters()}
    names = ('avg_grads', 'exp_avg', 'ema_scores', 'losses_avg')
    others = {name: {n: t.clone() for n, t in ones.items()} for name in names}
    kept = Keeps(ema_critic=Critic(), swa_critic=AveragedModel(Critic()), **others)
    learn.add_cb(kept)
    learn.prune(0.9)
    assert all((t == 1).all() for n in names for t in getattr(kept, n).values())
    assert kept.ema_critic[1].weight.all() and kept.swa_critic.module[1].weight.all()


def test_an_interrupted_fit():
    average = Average('EMA', 'after_step', -100, load=False)

    class Stop(Callback):
        order = -50

        def __init__(self, error):
            self.error = error

        def after_step(self):
            if self.epoch == 1 and self.iter == 4:
                raise self.error

    for error in (KeyboardInterrupt(), CancelTrainException()):
        learn = make()
        with contextlib.suppress(KeyboardInterrupt):
            fit(learn, cbs=[moving(), average, Stop(error)])
        weights = dict(average.ema_model.named_parameters())
        assert not any(weights[n][~m].any() for n, m in learn.masks.items())


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 10))


def test_norms_of_averages_leave_out_cut_channels():
    average = Average('EMA', load=False, swap=False)
    learn = make(Normed(), bs=128)  # with fewer steps, a bias is still 0
    learn.add_cb(average)
    fit(learn, 1)
    learn.prune(0.5, granularity='channel')
    x = learn.dls.one_batch()[0]
    model = average.ema_model.eval()
    assert zeros(model, learn.masks)
    with torch.no_grad():
        model.load_state_dict(learn.model.state_dict())
        assert torch.equal(model(x), learn.model.eval()(x))
        learn.remove_masks()
        assert torch.equal(model(x), learn.model(x))


def test_beside_a_tracker(tmp_path):
    "SaveModelCallback's file of the model, and an export, are as without an average"
    average = Average('EMA', swap=False, load=False)
    learn = fit(make(path=tmp_path), cbs=[moving(), average, SaveModelCallback(at_end=True)])
    assert learn.keep_masks._averages is None and zeros(learn.model, learn.masks)


def test_apply_to_a_model():
    model = digits_convnet(widths=(4, 8))
    masks = Masks({'0.0.weight': torch.zeros(4, 1, 3, 3, dtype=torch.bool)})
    average = AveragedModel(model)
    assert masks.apply_(average) is average and not average.module[0][0].weight.any() and model[0][0].weight.any()
    with pytest.raises(ValueError, match="the masks are for another model: it has no weight '0.0.weight'"):
        masks.apply_(nn.Linear(2, 2))
