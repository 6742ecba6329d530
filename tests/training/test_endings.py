"However weights are replaced, loaded or swapped in a fit, and however it ends: masks, weights and report agree"

import copy
import warnings

import pytest
import torch
from fastai.basics import (
    Callback,
    CancelFitException,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Learner,
    OptimWrapper,
)
from fastai.callback.all import EarlyStoppingCallback, ProgressCallback
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastprune.all import (
    DNW,
    DPF,
    DST,
    GMP,
    GSM,
    SET,
    SNFS,
    STR,
    GradualL2,
    Masks,
    RigL,
    SparsifyCallback,
    cubic,
    cyclical,
    linear,
    magnitude,
    magnitude_increase,
    one_shot,
    prunable_weights,
    taylor,
    window,
)
from fastprune.learner.states import load_into, state_of
from fastprune.recipes.planning import plan_of

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def net(n=4):
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, n))


def toy(model=None, tmp=None, **kwargs):
    torch.manual_seed(0)
    items = [(torch.randn(64), torch.tensor(i % 4)) for i in range(64)]
    learn = Learner(
        DataLoaders(DataLoader(items, bs=8), DataLoader(items[:16], bs=8)),
        model or net(),
        loss_func=CrossEntropyLossFlat(),
        path=tmp,
        **kwargs,
    )
    learn.remove_cb(ProgressCallback)
    return learn


def fit(learn, n=2, *cbs, lr=1e-2, **kwargs):
    "All warnings that come, as text"
    with learn.no_logging(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.fit(n, lr, cbs=list(cbs), **kwargs)
    return [str(o.message) for o in caught if o.category is UserWarning]


def agree(learn, sparsity=0.9):
    report, now = learn.sparsity_report(), dict(learn.model.named_parameters())
    for n, m in learn.masks.items():
        assert int(m.count_nonzero()) == m.numel() - round(sparsity * m.numel()) and not now[n].detach()[~m].any(), n
    assert report.loc['total', 'nonzero'] == learn.masks.n_kept and report.loc['total', 'sparsity'] == pytest.approx(
        learn.masks.sparsity
    )
    return True


class At(Callback):
    "Calls a function at an event, of one epoch or of all"

    run_valid = False

    def __init__(self, event, f, order=0, epoch=None):
        self.event, self.f, self.order, self.only = event, f, order, epoch

    def __call__(self, name):
        if name == self.event and (self.only is None or getattr(self.learn, 'epoch', None) == self.only):
            self.f(self.learn)


def new_head(learn, n=4, in_optimizer=True):
    learn.model[2] = nn.Linear(32, n)
    if in_optimizer:
        learn.create_opt()


@pytest.mark.sample(2)
@pytest.mark.parametrize('event', ['before_batch', 'after_batch', 'after_train', 'after_epoch'])
def test_a_validation_inside_of_a_fit_leaves_it_as_it_is(event):
    "In the middle of an epoch, too"
    ends = []
    for validates in (False, True):
        learn, busy = toy(), []

        def look(learn, busy=busy):
            if not busy and learn.training:
                busy.append(1)
                learn.validate()
                busy.clear()

        fit(learn, 2, SparsifyCallback(0.9), *[At(event, look, 70)] * validates)
        ends.append([*learn.model.state_dict().values(), torch.tensor(learn.recorder.losses)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.sample(2)
@pytest.mark.parametrize('order', [0, 60, 100])
@pytest.mark.parametrize('event', ['before_epoch', 'before_train', 'after_train', 'before_validate', 'after_epoch'])
def test_a_new_head_is_masked(event, order):
    "By a model's masks, and in the validation, too"
    learn, seen = toy(), []
    learn.prune(0.9)

    class Seen(Callback):
        order = 99

        def before_batch(self):
            seen.append((self.training, float((self.model[2].weight == 0).float().mean())))

    fit(learn, 3, At(event, new_head, order, epoch=1), Seen())
    assert all(z > 0.89 for training, z in seen if not training or event != 'after_train') and agree(learn)


@pytest.mark.sample(2)
@pytest.mark.parametrize('order', [0, 60, 100])
@pytest.mark.parametrize(
    'event', ['before_epoch', 'before_train', 'after_train', 'before_validate', 'after_epoch', 'after_batch']
)
def test_a_new_head_is_pruned_on(event, order):
    learn = toy()
    fit(learn, 3, SparsifyCallback(0.9), At(event, new_head, order, epoch=1))
    assert agree(learn)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'method',
    [SparsifyCallback, GMP, DPF, DNW, GSM, GradualL2, RigL, SET, SNFS, lambda s: STR(s, s_init=-7), DST],
    ids=['OCP', 'GMP', 'DPF', 'DNW', 'GSM', 'GradualL2', 'RigL', 'SET', 'SNFS', 'STR', 'DST'],
)
def test_a_new_head_in_every_method(method):
    learn = toy()
    fit(learn, 3, method(0.5), At('after_epoch', new_head, epoch=0))
    assert (
        agree(learn, 0.5)
        if method is SparsifyCallback
        else not any(p.detach()[~learn.masks[n]].any() for n, p in learn.model.named_parameters() if n in learn.masks)
    )
    assert learn.masks.sparsity >= 0.49 and learn.sparsity_report().loc['total', 'nonzero'] <= learn.masks.n_kept


@pytest.mark.parametrize('method', [SparsifyCallback, GMP, DPF, DNW], ids=lambda m: m.__name__)
def test_masks_are_of_the_new_heads_weights(method):
    learn, seen = toy(), []

    def criterion(weights):
        seen.append(weights['2.weight'] is learn.model[2].weight)
        return magnitude(weights)

    fit(learn, 3, method(0.9, criterion=criterion), At('after_epoch', new_head, epoch=0))
    assert all(seen) and len(seen) > 16


def test_a_new_head_in_the_last_epoch_and_after_the_fit():
    for event in ('after_epoch', 'after_fit'):
        learn = toy()
        notes = fit(learn, 2, SparsifyCallback(0.9), At(event, new_head, 100, epoch=1))
        assert agree(learn) and any('were not zero' in o for o in notes)


def test_a_new_head_of_another_shape_is_named():
    for cbs in ([], [SparsifyCallback(0.9)]):
        learn = toy()
        if not cbs:
            learn.prune(0.9)
        with pytest.raises(
            ValueError, match=r"'2.weight' has shape \(7, 32\)|'2.weight' had shape \(4, 32\) .* has \(7, 32\) now"
        ):
            fit(learn, 3, *cbs, At('after_epoch', lambda l: new_head(l, 7), epoch=0))
    learn = toy()

    def gone(learn):
        learn.model[2] = nn.Identity()

    with pytest.raises(ValueError, match="'2.weight' is not in the model any more"):
        fit(learn, 3, SparsifyCallback(0.9), At('after_epoch', gone, epoch=0))


def test_a_head_taken_off_at_the_end():
    "Its mask goes with it, and that is told"
    learn = toy()

    def strip(learn):
        learn.model = learn.model[:2]

    notes = fit(learn, 2, SparsifyCallback(0.9), At('after_fit', strip))
    assert (
        list(learn.masks) == ['0.weight']
        and agree(learn)
        and any("'2.weight'" in o and 'its mask is removed' in o for o in notes)
    )


class Average(Callback):
    "An average of weights, loaded at the end"

    def __init__(self, order):
        self.order = order

    def before_fit(self):
        self.average = AveragedModel(self.model)

    def after_batch(self):
        if self.training:
            self.average.update_parameters(self.model)

    def after_fit(self):
        self.model.load_state_dict(self.average.module.state_dict())


@pytest.mark.sample(2)
@pytest.mark.parametrize('order', [-100, 0, 60, 69, 70, 71, 90, 500])
def test_averages_loaded_at_the_end(order):
    learn = toy()
    notes = fit(learn, 2, SparsifyCallback(0.9), Average(order))
    assert agree(learn) and not [o for o in notes if 'were not zero' in o]  # the average has the zeros already
    learn = toy()
    learn.prune(0.9)
    fit(learn, 1, At('after_fit', lambda l: l.model.load_state_dict(net().state_dict()), order))
    assert agree(learn)


def test_an_error_after_the_fit():
    "Masks hold even then"
    learn = toy()

    def fail(learn):
        learn.model.load_state_dict(net().state_dict())
        raise RuntimeError('disk full')

    with pytest.raises(RuntimeError):
        fit(learn, 1, SparsifyCallback(0.9), At('after_fit', fail, 100))
    assert agree(learn)


class ScheduleFree(torch.optim.SGD):
    "As in Defazio et al. 2024: trains at y = beta*x + (1-beta)*z, with `z` dense behind, and shows x in `eval`"

    def __init__(self, params, lr=0.1, **kwargs):
        super().__init__(params, lr=lr)
        self.k, self.mode, self.z = 0, 'train', {}

    @torch.no_grad()
    def step(self, closure=None):
        assert self.mode == 'train'
        self.k += 1
        for p in self.param_groups[0]['params']:
            if p.grad is None:
                continue
            z = self.z.setdefault(p, p.detach().clone())
            p.lerp_(z, 1 / self.k).add_(p.grad, alpha=-0.1 * self.param_groups[0]['lr'])
            z.sub_(p.grad, alpha=self.param_groups[0]['lr'])

    @torch.no_grad()
    def switch(self, mode):
        if mode == self.mode:
            return
        for p, z in self.z.items():
            p.lerp_(z, 1 - 1 / 0.9 if mode == 'eval' else 1 - 0.9)
        self.mode = mode


class Switch(Callback):
    "Averages are validated, and trained weights come back for the next epoch"

    def __init__(self, order):
        self.order, self.zeros, self.trained = order, [], []

    def before_train(self):
        self.opt.opt.switch('train')

    def before_validate(self):
        self.before = [p.detach().clone() for p in self.model.parameters()]
        self.opt.opt.switch('eval')

    def before_batch(self):
        w = self.model[0].weight
        (self.trained if self.training else self.zeros).append(float((w == 0).float().mean()))

    def after_validate(self):
        self.opt.opt.switch('train')
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(self.before, self.model.parameters(), strict=True))

    def after_fit(self):
        self.opt.opt.switch('eval')


@pytest.mark.sample(2)
@pytest.mark.parametrize('order', [-50, 0, 65, 75, 300])
@pytest.mark.parametrize('held', [True, False])
def test_schedule_free_optimizers_are_validated_with_masks(order, held):
    learn = toy(opt_func=lambda ps, **kw: OptimWrapper(ps, ScheduleFree, **kw))
    switch = Switch(order)
    if held:
        learn.prune(0.9)
    notes = fit(learn, 3, *([] if held else [SparsifyCallback(0.9, schedule=one_shot)]), switch, lr=0.1)
    assert min(switch.zeros) > 0.89 and min(switch.trained[1:]) > 0.89 and agree(learn)
    assert not [o for o in notes if 'were not zero' in o]  # what was validated is what is left


def test_a_model_swapped_in_for_validation():
    "Averages in a model of their own, with the loss of masked ones; it is as it was afterwards"
    losses = []

    class Swap(Callback):
        order = 80

        def before_fit(self):
            self.average = AveragedModel(self.model)

        def after_step(self):
            self.average.update_parameters(self.model)

        def before_validate(self):
            self.own, self.learn.model, self.state = self.model, self.average, copy.deepcopy(self.average.state_dict())

        def after_validate(self):
            assert all(
                torch.equal(a, b) for a, b in zip(self.state.values(), self.average.state_dict().values(), strict=True)
            )
            masked = copy.deepcopy(self.average.module)
            self.learn.masks.apply_(dict(masked.named_parameters()))
            losses.append(
                (
                    self.recorder.log[-2],
                    float(sum(self.learn.loss_func(masked(x), y) * len(x) for x, y in self.dls.valid) / 16),
                )
            )
            self.learn.model = self.own

    learn = toy()
    fit(learn, 2, SparsifyCallback(0.9), Swap())
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in losses) and len(losses) == 2 and agree(learn)


# what is told at the end, and at the start


def stopping(epoch):
    return At('after_epoch', lambda l: (_ for _ in ()).throw(CancelFitException()), epoch=epoch)


def short(notes):
    return [o for o in notes if 'iterations, so the sparsity is' in o]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'method, told',
    [
        (SparsifyCallback(0.9), 1),
        (SparsifyCallback({'*': 0.9, '2': 0.5}), 1),
        (SparsifyCallback(0.9, schedule=window(linear, 0.6)), 1),
        (SparsifyCallback(0.9, scope='global', schedule=cyclical(cubic, 2)), 0),
        (SparsifyCallback(0.9, schedule=cyclical(cubic, 3)), 1),
        (SparsifyCallback(0.9, schedule=window(cubic, 0, 0.5)), 0),
        (SparsifyCallback(0.9, schedule=one_shot), 0),
        (SparsifyCallback(0.0), 0),
        (GMP(0.9), 1),
        (DPF(0.9), 1),
        (DNW(0.9), 0),
        (GSM(0.9), 1),
        (STR(0.9), 1),
        (DST(), 0),
        (RigL(0.9), 0),
    ],
    ids=str,
)
def test_a_fit_that_is_stopped(method, told):
    learn = toy(wd=1e-3)
    notes = short(fit(learn, 4, method, stopping(1)))
    assert len(notes) == told
    if told:
        assert 'after 16 of 32 iterations' in notes[0] and 'instead of 0.' in notes[0] and '`learn.prune(' in notes[0]


@pytest.mark.parametrize(
    'cb,call',
    [
        (SparsifyCallback(0.5, granularity='row', exclude='2'), "0.5, granularity='row', exclude='2'"),
        (SparsifyCallback(0.9, criterion=taylor, scope='global'), "0.9, criterion=taylor, scope='global', n_batches=1"),
        # which asks for the weights as they were at first: `learn.prune` has them no more
        (SparsifyCallback(0.9, criterion=magnitude_increase, scope='global'), "0.9, scope='global'"),
        (GMP(0.9), "0.9, scope='global'"),
        (SparsifyCallback({'0': 0.9}, include='0'), "{'0': 0.9}, include='0'"),
    ],
    ids=str,
)
def test_a_stopped_fit_names_the_call_that_ends_it(cb, call):
    (note,) = short(fit(toy(), 4, cb, stopping(1)))
    assert note.endswith(f'call `learn.prune({call})` now')


def test_a_stop_before_the_end_is_told():
    learn = toy()
    (note,) = short(fit(learn, 4, SparsifyCallback(0.9), stopping(1)))
    assert f'the sparsity is {learn.masks.sparsity:.4g} instead of 0.9' in note and learn.masks.sparsity < 0.8
    learn.prune(0.9)
    assert not short(
        fit(learn, 20, EarlyStoppingCallback(patience=1), lr=0.1)
    ) and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_early_stopping_waits_for_the_end_of_the_ramp():
    learn = toy()
    learn.recorder.train_metrics = False
    assert not short(fit(learn, 20, SparsifyCallback(0.9), EarlyStoppingCallback(patience=1), lr=0.1))
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-3) and 17 < len(learn.recorder.values) <= 20


def test_nothing_is_told_of_fits_that_end_or_fail():
    assert not short(fit(toy(), 2, SparsifyCallback(0.9)))
    assert not short(fit(toy(), 2, At('before_fit', lambda l: None)))
    learn = toy()
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        warnings.simplefilter('error')
        with learn.no_logging():
            learn.fit(
                4,
                cbs=[
                    SparsifyCallback(0.9),
                    At('after_epoch', lambda l: (_ for _ in ()).throw(KeyboardInterrupt()), epoch=1),
                ],
            )


@pytest.mark.parametrize('scope', ['local', 'global'])
def test_layers_without_weights_are_told_once(scope):
    notes = fit(toy(), 2, SparsifyCallback(0.9999, scope=scope))
    (note,) = [o for o in notes if 'layer collapse' in o]
    assert "no weight is left in '0.weight', '2.weight'" in note if scope == 'local' else 'no weight is left in' in note
    assert not [o for o in fit(toy(), 2, SparsifyCallback(0.9)) if 'layer collapse' in o]


def revived(notes):
    return [o for o in notes if 'this fit brings them back' in o]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'prune',
    [
        lambda l: l.prune(0.9),
        lambda l: l.prune(0.5, granularity='row'),
        lambda l: l.prune(0.5, granularity='2:4'),
        lambda l: l.prune(0.3, scope='global'),
        lambda l: l.prune(0.9, include='2'),
        lambda l: l.prune(0.99),
        lambda l: fit(l, 1, SparsifyCallback(0.8)),
    ],
    ids=['90', 'row', '2:4', 'global', 'head', '99', 'trained'],
)
def test_pruned_weights_loaded_without_masks_are_told_once(prune, tmp_path):
    learn = toy(tmp=tmp_path)
    prune(learn)
    learn.save('pruned')
    again = toy(tmp=tmp_path)
    again.load('pruned')
    (note,) = revived(fit(again, 1))
    assert '`learn.masks = Masks.from_zeros(prunable_weights(learn.model))`' in note
    again.load('pruned')
    assert not revived(fit(again, 1))  # once a Learner
    third = toy(tmp=tmp_path)
    third.load('pruned')
    third.masks = Masks.from_zeros(prunable_weights(third.model))  # what it says
    assert not revived(fit(third, 1)) and third.sparsity_report().loc['total', 'nonzero'] == third.masks.n_kept < 2176


def test_not_where_a_callback_goes_on_from_there(tmp_path):
    learn = toy(tmp=tmp_path)
    learn.prune(0.8)
    learn.save('pruned')
    for cbs in ([SparsifyCallback(0.9)], [SparsifyCallback(0.9, include=['0', '2'])]):
        again = toy(tmp=tmp_path)
        again.load('pruned')
        assert not revived(fit(again, 1, *cbs)) and again.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    again = toy(tmp=tmp_path)
    again.load('pruned')
    assert revived(fit(again, 1, SparsifyCallback(0.9, include='2')))  # but of others it is


def test_not_where_masks_were_removed():
    learn = toy()
    learn.prune(0.9)
    learn.remove_masks()
    assert not revived(fit(learn, 1))


def once_more(learn, cbs):
    learn.fit(1, 0.01, cbs=cbs)


def stability(learn):
    learn.instability(None, once_more, n=2)


@pytest.mark.parametrize(
    'aside',
    [lambda l: l.remove_masks(), lambda l: plan_of(l, once_more), stability, lambda l: load_into(l, state_of(l))],
    ids=['no masks', 'plan', 'instability', 'state'],
)
def test_told_also_after_other_trainings(aside, tmp_path):
    learn = toy(tmp=tmp_path)
    learn.prune(0.9)
    learn.save('pruned')
    again = toy(tmp=tmp_path)
    again.load('pruned')
    with again.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        aside(again)
    assert len(revived(fit(again, 1))) == 1


def eye(m):
    nn.init.eye_(m[0].weight)


def dirac(m):
    (
        m.insert(
            0,
            nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1), nn.Flatten()
            ),
        ),
        nn.init.dirac_(m[0][2].weight),
    )


def zero_first(m):
    nn.init.zeros_(m[0].weight)


def zero_last(m):
    nn.init.zeros_(m[2].weight)


def padded(m):
    m[0].weight.data[:, :14] = 0


def frozen(m):
    m[0].weight.data[::2, ::3] = 0
    m[0].requires_grad_(False)


def embedding(m):
    m.insert(0, nn.Identity()), setattr(m[0], 'e', nn.Embedding(100, 64, padding_idx=0))


def lazy(m):
    m[0] = nn.LazyLinear(32)


@pytest.mark.parametrize('change', [lambda m: None, eye, dirac, zero_first, zero_last, padded, frozen, embedding, lazy])
def test_zeros_of_initialisations_are_not_taken_for_pruned_ones(change):
    model = net()
    change(model)
    learn = toy(model)
    for _ in range(2):
        assert not revived(fit(learn, 1))


def test_lr_find_tells_nothing(tmp_path):
    learn = toy(tmp=tmp_path)
    learn.prune(0.9)
    learn.save('pruned')
    again = toy(tmp=tmp_path)
    again.load('pruned')
    with warnings.catch_warnings(record=True) as caught, again.no_bar():
        warnings.simplefilter('always')
        again.lr_find(show_plot=False, num_it=5)
    assert not revived([str(o.message) for o in caught]) and revived(fit(again, 1))
