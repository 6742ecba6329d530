"Distillation: gradients as by hand, with other callbacks, resumed to the bit, and errors before training"

import pickle
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import (
    SGD,
    BCEWithLogitsLossFlat,
    Callback,
    CancelFitException,
    LabelSmoothingCrossEntropy,
    OptimWrapper,
    load_learner,
    ranger,
)
from fastai.callback.all import CutMix, GradientAccumulation, GradientClip, MixedPrecision, MixUp
from helpers import SGDM, quietly, same, stopped
from torch import nn

from fastprune.all import (
    Checkpoint,
    Distill,
    ShrinkCallback,
    SparsifyCallback,
    digits_convnet,
    linear,
    save_sparse,
    save_state,
    taylor,
)
from fastprune.core.files import load_tensors
from fastprune.learner.gradients import summed_gradients
from fastprune.training.distill_layers import new_adapter
from fastprune.training.distill_losses import DISTILL_LOSSES
from fastprune.training.distill_teacher import class_axis, is_multi_label
from fastprune.training.watch import Watch

pytestmark = pytest.mark.usefixtures('deterministic')
WIDTHS = (8, 12, 16)  # of the teacher; the student has 8, 16, 16


def teacher(n_out=10, widths=WIDTHS, device='cpu'):
    torch.manual_seed(5)
    model = digits_convnet(widths=widths, n_out=n_out)
    for m in model.modules():  # other statistics than the student's
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
    return model.to(device)


def kl(s, t, T):
    return T**2 * F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction='batchmean')


def decoupled(s, t, y, alpha=1.0, beta=8.0, T=4.0):
    "By the definition, item by item"
    total = 0
    for si, ti, c in zip(s, t, y.tolist(), strict=True):
        ps, pt = (F.softmax(z / T, 0) for z in (si, ti))
        others = [k for k in range(len(si)) if k != c]
        bs, bt = (torch.stack([p[c], p[others].sum()]) for p in (ps, pt))
        qs, qt = (F.softmax(z[others] / T, 0) for z in (si, ti))
        total += alpha * (bt * (bt / bs).log()).sum() + beta * (qt * (qt / qs).log()).sum()
    return T**2 * total / len(y)


def adapted(s, t):
    "By a 1x1 convolution"
    parameters = new_adapter(0, s.detach(), t)
    return F.conv2d(s, parameters['0.weight'][:, :, None, None], parameters['0.bias']) if parameters else s


def boundary(s, t):
    s = adapted(s, t)
    return (((s + 1) ** 2) * ((s > -1) & (t <= 0)) + ((s - 1) ** 2) * ((s <= 1) & (t > 0))).mean()


def attention(s, t):
    q = [x.square().mean(1).flatten(1) for x in (s, t)]
    return sum(((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(*q, strict=True)) / q[0].numel()


def similarity(s, t):
    g = [x.flatten(1) @ x.flatten(1).T for x in (s, t)]
    return ((g[0] / g[0].norm(dim=1, keepdim=True) - g[1] / g[1].norm(dim=1, keepdim=True)) ** 2).mean()


LAYER = '1'
HINT = dict(loss='hint', layers={'1': '1', '2': '2'})  # the second pair has the same width
# arguments, and (own, student's output, teacher's, features of both, targets) -> total, by hand
CASES = dict(
    soft_target=({}, lambda o, s, t, fs, ft, y: 0.5 * o + 0.5 * kl(s, t, 4)),
    weighted=(dict(weight=0.9, temperature=2.0), lambda o, s, t, fs, ft, y: 0.1 * o + 0.9 * kl(s, t, 2)),
    added=(dict(weight=3.0, blend=False), lambda o, s, t, fs, ft, y: o + 3 * kl(s, t, 4)),
    logits=(dict(loss='logits'), lambda o, s, t, fs, ft, y: 0.5 * o + 0.5 * F.mse_loss(s, t)),
    decoupled=(dict(loss='decoupled', alpha=0.5), lambda o, s, t, fs, ft, y: o + decoupled(s, t, y, 0.5)),
    mutual=(dict(loss='mutual'), lambda o, s, t, fs, ft, y: o + kl(s, t, 1)),
    hint=(dict(loss='hint', layers=LAYER), lambda o, s, t, fs, ft, y: o + F.mse_loss(adapted(fs, ft), ft)),
    boundary=(dict(loss='boundary', layers=LAYER), lambda o, s, t, fs, ft, y: o + boundary(fs, ft)),
    attention=(dict(loss='attention', layers=LAYER), lambda o, s, t, fs, ft, y: o + 1000 * attention(fs, ft)),
    similarity=(dict(loss='similarity', layers=LAYER), lambda o, s, t, fs, ft, y: o + 3000 * similarity(fs, ft)),
    own_function=(dict(loss=F.l1_loss, weight=0.2), lambda o, s, t, fs, ft, y: 0.8 * o + 0.2 * (s - t).abs().mean()),
)


class Grads(Callback):
    "Keeps the batches, and the gradients of the first step, and stops"

    order, run_valid = 20, False

    def __init__(self, steps=1):
        self.steps, self.batches = steps, []

    def before_fit(self):
        self.start = deepcopy(self.model)

    def after_pred(self):
        mix = next((cb for cb in self.learn.cbs if isinstance(cb, (MixUp, CutMix))), None)
        self.batches.append((self.x.detach().clone(), self.y.clone(), mix and (mix.yb1[0], mix.lam)))

    def after_backward(self):
        if len(self.batches) == self.steps:
            scaler = self.learn.__dict__.get('scaler')
            scale = scaler.get_scale() if scaler else 1.0
            self.found = {n: p.grad / scale for n, p in self.model.named_parameters()}
            self.total = self.learn.loss.detach().clone()
            raise CancelFitException


def by_hand(cb, t, total, own=None, autocast=None, scale=1.0):
    "Gradients of a hand-written loop over the batches"
    model = cb.start.train()
    t.eval()
    for x, y, mix in cb.batches:
        found = {}
        hooks = [
            dict(m.named_modules())[LAYER].register_forward_hook(partial(keep, found, n))
            for n, m in (('s', model), ('t', t))
        ]
        with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
            s = model(x)
            with torch.no_grad():
                teachers = t(x)
        s, teachers, fs, ft = (o.float() for o in (s, teachers, found['s'], found['t']))
        loss = own or (lambda s, y: F.cross_entropy(s, y))
        o = (
            loss(s, y)
            if mix is None
            else (mix[1] * F.cross_entropy(s, y, reduction='none')).mean()
            + ((1 - mix[1]) * F.cross_entropy(s, mix[0], reduction='none')).mean()
        )
        res = total(o, s, teachers, fs, ft, y)
        (scale * res * len(x) / sum(len(b[0]) for b in cb.batches)).backward()
        for hook in hooks:
            hook.remove()
    return {n: p.grad / scale for n, p in model.named_parameters()}


def keep(found, name, module, args, out):
    found[name] = out


def check(learner, total, kwargs, *cbs, steps=1, loss=None, own=None, autocast=None, eps=1e-6):
    learn = learner(**({'loss_func': loss} if loss else {}))
    t = teacher(device=learn.dls.device)
    cb = Grads(steps)
    before = deepcopy(t.state_dict())
    quietly(learn, learn.fit, 1, 0.01, cbs=[Distill(t, **kwargs), cb, *cbs])
    grads = by_hand(cb, t, total, own, autocast, 256.0 if autocast == torch.float16 else 1.0)
    for n, g in cb.found.items():
        largest = max(1.0, float(grads[n].abs().max()))
        assert torch.allclose(g, grads[n], rtol=0, atol=eps * largest), (n, float((g - grads[n]).abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), t.state_dict().values(), strict=True))
    return learn


@pytest.mark.parametrize('name', CASES)
def test_gradients_equal_a_loop_by_hand(learner, name):
    kwargs, total = CASES[name]
    check(learner, total, kwargs)


def test_every_loss_has_a_case():
    assert set(DISTILL_LOSSES) <= set(CASES)


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_the_teacher_sees_mixed_batches(learner, mix):
    check(learner, CASES['soft_target'][1], {}, mix())


def test_decoupled_under_mixup_counts_both_targets(learner):
    learn, cb, t = learner(), Grads(), teacher()
    quietly(learn, learn.fit, 1, 0.01, cbs=[Distill(t, 'decoupled'), MixUp(), cb])
    (x, y, (y1, lam)), t = cb.batches[0], t.eval()
    s, target = cb.start.train()(x), t(x).detach()
    items = lambda f, y: torch.stack([f(s[i : i + 1], target[i : i + 1], y[i : i + 1]) for i in range(len(y))])
    own = lambda s, t, y: F.cross_entropy(s, y)
    both = [items(own, y) + items(decoupled, y), items(own, y1) + items(decoupled, y1)]
    assert torch.allclose(cb.total, (lam * both[0] + (1 - lam) * both[1]).mean(), rtol=1e-5)


@pytest.mark.parametrize('name', ['soft_target', 'hint'])
def test_accumulation(learner, name):
    kwargs, total = CASES[name]
    check(learner, total, kwargs, GradientAccumulation(64), steps=2)


class OnCPU(MixedPrecision):
    "Mixed precision on a CPU"

    def before_fit(self):
        self.autocast = torch.autocast('cpu', self.dtype)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=256.0, enabled=self.dtype == torch.float16)
        self.scales = []

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype


@pytest.mark.cpu_only
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', ['soft_target', 'hint', 'similarity'])
def test_mixed_precision_on_a_cpu(learner, name, dtype):
    kwargs, total = CASES[name]
    check(learner, total, kwargs, OnCPU(dtype), autocast=dtype, eps=torch.finfo(dtype).eps)


@pytest.mark.cpu_only
def test_adapters_are_unscaled(learner):
    ends = []
    for cbs in ([], [OnCPU(torch.float16)]):
        learn, end = learner(opt_func=SGD, bs=128), Adapted()
        quietly(learn, learn.fit, 1, 0.01, cbs=[Distill(teacher(), **HINT), Watch(), end, *cbs])
        ends.append(end.last)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*(e.values() for e in ends), strict=True))
    assert not torch.allclose(ends[0]['0.bias'], torch.zeros(12), atol=1e-2)


def test_label_smoothing(learner):
    own = partial(F.cross_entropy, label_smoothing=0.1)
    check(learner, CASES['soft_target'][1], {}, loss=LabelSmoothingCrossEntropy(), own=own)


def test_several_labels(learner):
    targets = lambda y: F.one_hot(y, 10).float()

    def own(s, y):
        return F.binary_cross_entropy_with_logits(s, targets(y))

    def total(o, s, t, fs, ft, y):
        entropy = F.binary_cross_entropy_with_logits(t, t.sigmoid())
        return 0.5 * o + 0.5 * (F.binary_cross_entropy_with_logits(s, t.sigmoid()) - entropy)

    class Hot(BCEWithLogitsLossFlat):
        def __call__(self, s, y):
            return super().__call__(s, targets(y))

    check(learner, total, dict(temperature=1.0), loss=Hot(), own=own)


class Pixels(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize('loss', ['soft_target', 'decoupled'])
def test_segmentation(learner, loss):
    class ToPixels(Callback):
        def before_batch(self):
            y = (self.x[:, 0] > 0).long()
            self.learn.yb = (torch.where(self.x[:, 0] > 0.9, 255, y),)

    learn, totals = learner(Pixels(0), loss_func=nn.CrossEntropyLoss(ignore_index=255), metrics=None), []

    class Total(Callback):
        order, run_valid = 20, False

        def after_loss(self):
            totals.append((self.x.clone(), self.y.clone(), self.pred.detach().clone(), self.learn.loss.detach()))
            raise CancelFitException

    t = Pixels(1)
    quietly(learn, learn.fit, 1, 0.01, cbs=[Distill(t, loss, weight=0.5, blend=True), ToPixels(), Total()])
    x, y, s, total = totals[0]
    flat = lambda z: z.movedim(1, -1).reshape(-1, 3)
    valid = y.flatten() != 255
    s, z, own = flat(s), flat(t(x).detach()), F.cross_entropy(s, y, ignore_index=255)
    by_hand = (
        kl(s, z, 4)
        if loss == 'soft_target'
        else decoupled(s[valid], z[valid], y.flatten()[valid]) * valid.float().mean()
    )
    assert torch.allclose(total, 0.5 * own + 0.5 * by_hand, rtol=1e-4)


class Named(nn.Module):
    "As models of HuggingFace: logits by name"

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return SimpleNamespace(logits=self.inner(x), hidden=None)


def test_outputs_with_named_logits(learner):
    "The student's prediction is changed by a callback, which the teacher's output passes through, too"

    class Logits(Callback):
        n = 0

        def after_pred(self):
            self.n += 1
            self.learn.pred = self.pred.logits

    logits, losses = Logits(), []
    plain = learner()
    named = learner(Named(deepcopy(plain.model)))
    for learn, t, cbs in ((plain, teacher(), []), (named, Named(teacher()), [logits])):
        cb = Grads()
        quietly(learn, learn.fit, 1, 0.01, cbs=[Distill(t), *cbs, cb])
        losses.append(cb.total)
    assert torch.equal(*losses) and logits.n == 1


def test_the_weight_follows_a_schedule(learner):
    seen = []

    class Weights(Callback):
        order, run_valid = 20, False

        def after_loss(self):
            seen.append(self.learn.distill._run.weight)

    learn, calls = learner(bs=128), []
    t = teacher()
    t.register_forward_hook(lambda *args: calls.append(1))
    late = lambda pos: 0.0 if pos < 0.5 else 1.0
    quietly(learn, learn.fit, 2, 0.01, cbs=[Distill(t, weight=linear), Weights()])
    assert seen == pytest.approx([i / len(seen) for i in range(len(seen))])
    calls.clear()
    quietly(learn, learn.fit, 2, 0.01, cbs=[Distill(t, weight=late)])
    assert len(calls) == 1 + len(seen) // 2  # the trial; the teacher rests while the weight is 0


class Adapted(Callback):
    "The adapters after the first and the last batch"

    order, run_valid, first = 90, False, None

    def after_batch(self):
        parameters = self.learn.distill._run.adapters.parameters
        self.last = {n: p.detach().clone() for n, p in parameters.items()}
        self.first = self.first or self.last


@pytest.mark.parametrize(
    'opt', [SGDM, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['SGD', 'ranger', 'AdamW']
)
def test_adapters_are_trained_and_dropped(learner, opt):
    learn, look, cb = learner(opt_func=opt, bs=128), Adapted(), Distill(teacher(), **HINT)
    keys = list(learn.model.state_dict())
    quietly(learn, learn.fit, 1, 0.01, cbs=[SparsifyCallback(0.8), cb, GradientClip(1.0), Watch(), look])
    assert look.first.keys() == {'0.weight', '0.bias'}  # the widths of the second pair are the same
    assert not any(torch.equal(look.first[n], look.last[n]) for n in look.first)
    assert cb._run is None and list(learn.model.state_dict()) == keys
    assert len(list(learn.opt.all_params())) == len(list(learn.model.parameters()))
    assert not any(m._forward_hooks for m in [*learn.model.modules(), *cb.teacher.modules()])
    assert learn.recorder.metric_names[-3:-1] == ['own_loss', 'sparsity'] and cb.teacher.training
    assert 0 < learn.recorder.values[-1][-2] < learn.recorder.values[-1][0]


class Crash(Callback):
    order = 99

    def __init__(self, epoch, i):
        self.at = (epoch, i)

    def after_step(self):
        if (self.epoch, self.iter) == self.at:
            raise RuntimeError('power is out')


@pytest.mark.parametrize('kwargs', [dict(weight=linear), HINT], ids=['outputs', 'layers'])
def test_resumed_to_the_bit(learner, kwargs):
    def make():
        torch.manual_seed(0)
        net = digits_convnet(widths=(8, 16, 16))
        return learner(nn.Sequential(*net[:-1], nn.Dropout(0.2), nn.Linear(16, 10)), bs=128, opt_func=SGDM)

    def fit(learn, *cbs):
        method = SparsifyCallback(0.8, criterion=taylor, interval=3)
        acc = [GradientAccumulation(350)] if kwargs is HINT else []  # with gradients that wait for the next epoch
        quietly(learn, learn.fit_one_cycle, 2, 0.02, cbs=[method, Distill(teacher(), **kwargs), *acc, *cbs])

    whole, again = stopped(make, fit, 1, 3)
    assert same(whole, again)
    assert [list(v) for v in whole.recorder.values] == [list(v) for v in again.recorder.values]


def test_a_file_of_another_fit_or_with_other_contents_is_refused(learner):
    def fit(kwargs, *cbs, t=None):
        learn = learner(bs=128)
        cb = Distill(t or teacher(), **kwargs)
        quietly(learn, learn.fit, 2, 0.01, cbs=[cb, Checkpoint('run'), *cbs])
        return cb

    with pytest.raises(RuntimeError, match='power'):
        fit(HINT, Crash(1, 1))
    for kwargs, t in ((dict(HINT, weight=2.0), None), (HINT, teacher(widths=(8, 13, 16)))):
        with pytest.raises(ValueError, match='is of another fit'):
            fit(kwargs, t=t)
    path = learner().path / 'models' / 'run.safetensors'
    tensors, meta = load_tensors(path)
    save_state(tensors, path, {**meta, 'fit': meta['fit'].replace('"0.bias"', '"0.bios"')})
    with pytest.raises(ValueError, match='Distill has the adapters'):
        fit(HINT)


def test_criteria_see_the_total_loss(learner):
    "And leave the adapters alone"
    learn, t = learner(bs=128), teacher()

    class Compare(Callback):
        order, run_valid, done = 60, False, False

        def after_step(self):
            if self.done:
                return
            self.done, run = True, self.learn.distill._run
            with summed_gradients(self.learn, 1):
                self.total = self.model[0][0].weight.grad.clone()
            self.clean = all(p.grad is None for p in run.adapters.parameters.values())
            run.weight = 0.0
            with summed_gradients(self.learn, 1):
                self.own = self.model[0][0].weight.grad.clone()

    cb = Compare()
    quietly(learn, learn.fit, 1, 0.01, cbs=[Distill(t, **HINT), cb])
    assert cb.clean and not torch.allclose(cb.total, cb.own)


def test_a_callback_of_the_learner_stands_in_every_pass(learner, tmp_path):
    learn = learner(bs=128)
    learn.add_cb(Distill(teacher(), **HINT))
    n = len(learn.cbs) + 1  # and KeepMasks
    learn.prune(0.5, criterion=taylor, n_batches=1)
    quietly(learn, learn.validate)
    learn.get_preds()
    assert (
        len(learn.cbs) == n and learn.distill._run is None and not any(m._forward_hooks for m in learn.model.modules())
    )
    quietly(learn, learn.lr_find, num_it=4, show_plot=False)
    assert OWN not in learn.recorder.metric_names
    quietly(learn, learn.fine_tune, 1, freeze_epochs=1)
    assert learn.masks.sparsity == pytest.approx(0.5, abs=0.01) and len(learn.cbs) == n
    learn.export(tmp_path / 'x.pkl')
    again = load_learner(tmp_path / 'x.pkl')
    assert again.distill.teacher is None and pickle.loads(pickle.dumps(learn.distill)).teacher is None
    again.dls = learn.dls
    with pytest.raises(ValueError, match='has no teacher'):
        quietly(again, again.fit, 1)


OWN = 'own_loss'


def test_teachers(learner, tmp_path):
    learn = learner(bs=128)
    dense = Distill.from_dense(learn)
    expected = deepcopy(learn.model.state_dict())
    save_state(expected, tmp_path / 'state.safetensors')
    save_sparse(expected, tmp_path / 'sparse.safetensors')
    cbs = [dense, *(Distill(tmp_path / f'{n}.safetensors') for n in ('state', 'sparse')), Distill(learner())]
    learn.prune(0.5)

    @contextmanager
    def looking(cb):
        found = []

        class Look(Callback):
            order, run_valid = 20, False

            def after_loss(self):
                found.append({n: t.clone() for n, t in cb._run.teacher.state_dict().items()})
                raise CancelFitException

        yield Look(), found

    for cb in cbs:
        with looking(cb) as (look, found):
            quietly(learn, learn.fit, 1, 0.01, cbs=[cb, look])
        assert all(torch.equal(found[0][n].cpu(), t.cpu()) for n, t in expected.items())


def test_errors_before_training(learner, tmp_path):
    learn = learner()
    start = deepcopy(learn.model.state_dict())
    wrong = dict(
        unknown=(dict(loss='kd'), "loss='kd' is unknown: use one of soft_target"),
        temperature=(dict(temperature=0), 'temperature=0: needs a number in'),
        weight=(dict(weight=1.2), r'weight=1.2: needs a number in \[0,1\]'),
        schedule=(dict(weight=lambda pos: -pos), 'at position 0.01'),
        option=(dict(loss='decoupled', gamma=1), "gamma=1: loss='decoupled' has alpha and beta and temperature"),
        layers=(dict(loss='hint'), 'compares layers'),
        no_layers=(dict(layers='1'), 'compares outputs'),
        no_names=(dict(loss='hint', layers=3), 'layers=3: needs names of layers in both networks'),
    )
    for kwargs, message in wrong.values():
        with pytest.raises(ValueError, match=message):
            Distill(teacher(), **kwargs)
    torch.save(learn.model, tmp_path / 'model.pth')
    for t, message in (
        (tmp_path / 'model.pth', 'load other files yourself'),
        (3, 'teacher=int'),
        (tmp_path / 'no', 'no'),
    ):
        with pytest.raises(ValueError, match=message):
            Distill(t)
    save_state(teacher(7).state_dict(), tmp_path / 'other.safetensors')
    unknown = teacher()
    unknown[0][0].weight.data.fill_(torch.nan)
    in_fit = dict(
        itself=(Distill(learn), 'Distill.from_dense'),
        classes=(Distill(teacher(7)), r"its output has shape \[32, 7\], and the student's \[32, 10\]"),
        inputs=(Distill(nn.Linear(3, 10)), "can't take the student's inputs, of shape"),
        near=(Distill(teacher(), 'hint', layers='1.O'), "no layer '1.O'. It has '1.2', '1.1', '1.0'"),
        of_teacher=(Distill(teacher(), 'hint', layers={'1': '9'}), "the teacher has no layer '9'"),
        flat=(Distill(teacher(), 'attention', layers='5'), 'attention needs several positions'),
        kinds=(Distill(teacher(), 'hint', layers={'1': '5'}), 'same number of dimensions'),
        file=(Distill(tmp_path / 'other.safetensors'), 'the file is of another network'),
        function=(Distill(teacher(), lambda s, t: s - t), 'has to give a tensor with one number'),
        raises=(Distill(teacher(), lambda s: s), "can't compare student and teacher"),
        no_number=(Distill(unknown), "loss='soft_target': it is nan on the first batch"),
        no_numbers=(Distill(unknown, 'decoupled'), "loss='decoupled': it is nan on the first batch"),
        axis=(Distill(teacher(), 'decoupled', axis=3), 'has no classes in dimension 3'),
        widths=([Distill(teacher(), **HINT), ShrinkCallback()], 'needs layers that keep their widths'),
    )
    for cb, message in in_fit.values():
        with pytest.raises(ValueError, match=message):
            quietly(learn, learn.fit, 1, 0.01, cbs=cb)
        cb = cb[0] if isinstance(cb, list) else cb
        assert cb._run is None and not any(m._forward_hooks for m in learn.model.modules())
    learn.loss_func = nn.MSELoss()
    with pytest.raises(ValueError, match="that of a regression: use loss='logits'"):
        quietly(learn, learn.fit, 1, 0.01, cbs=Distill(teacher()))
    end = learn.model.state_dict()
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(start.values(), end.values(), strict=True))


def test_the_trial_changes_nothing(learner):
    "Weights after a fit with weight 0 are those without a teacher, to the bit"

    def fit(*cbs):
        learn = learner(bs=128, opt_func=SGD)
        quietly(learn, learn.fit, 1, 0.01, cbs=[*cbs])
        return learn.model.state_dict()

    for kwargs in ({}, HINT):
        a, b = fit(), fit(Distill(teacher(), **kwargs, weight=0.0))
        assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize('what', ['validate', 'get_preds'])
def test_a_validation_within_a_fit_keeps_the_adapters(learner, what):
    class Nested(Callback):
        "After the first of two epochs, whose adapters go on"

        order, run_valid, done = 99, True, False

        def after_epoch(self):
            if not self.done:
                self.done, of_fit = True, self.learn.distill._run
                quietly(self.learn, getattr(self.learn, what))
                assert self.learn.distill._run is of_fit and len(of_fit.adapters.parameters) == 2

    learn, nested = learner(bs=1024), Nested()
    quietly(learn, learn.fit, 2, 0.01, cbs=[Distill(teacher(), **HINT), nested])
    assert nested.done and learn.epoch == 1


def test_what_a_loss_function_says():
    class Labels(nn.BCEWithLogitsLoss):
        pass

    class Probabilities(nn.BCELoss):
        pass

    assert is_multi_label(Labels()) and is_multi_label(partial(F.binary_cross_entropy_with_logits, weight=None))
    with pytest.raises(ValueError, match='loss_func=Probabilities: it takes probabilities'):
        is_multi_label(Probabilities())
    along_1 = (nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=0.1), LabelSmoothingCrossEntropy())
    assert [class_axis(loss, 3) for loss in along_1] == [1, 1, 1]  # [N, classes, positions]


class Small(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))


def test_compiled_networks(learner):
    ends = []
    for compiled in (lambda m: m, lambda m: torch.compile(m, backend='eager')):
        torch.manual_seed(0)
        networks = Small(4), Small(6)
        learn = learner(networks[0], bs=360, opt_func=SGD)  # batches of one size
        learn.model = compiled(learn.model)
        for kwargs in ({}, dict(loss='hint', layers='1')):
            quietly(learn, learn.fit, 1, 0.01, cbs=Distill(compiled(networks[1]), **kwargs))
        ends.append(list(learn.model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends, strict=True))
