"Retraining of norms and biases, and of low-rank terms under the masks"

from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper, params, ranger
from fastai.callback.all import GradientAccumulation, GradientClip, MixedPrecision, SaveModelCallback
from helpers import SGDM, Tagger, quietly, same, stopped
from torch import nn
from torch.func import functional_call

from fastprune.all import Checkpoint, ShrinkCallback, SparsifyCallback, digits_convnet
from fastprune.core.weights import is_norm
from fastprune.recipes.trained import chosen_parameters

TORCH = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)


def retrain(learn, n=1, params='lora', lr=0.05, cbs=None, **kwargs):
    quietly(learn, learn.retrain, n, history=[lr], params=params, cbs=cbs, **kwargs)
    return learn


def values(learn):
    return {n: p.detach().clone() for n, p in learn.model.named_parameters()}


def plain(learn, before):
    "Nothing of the fit is left, and pruned weights are zero"
    groups = [p for ps in learn.opt.param_lists for p in ps]
    assert {id(p) for p in groups} == {id(p) for p in learn.model.parameters()} and len(groups) == len(before)
    assert all(p.requires_grad for p in learn.model.parameters()) and 'parameters' not in vars(learn)
    assert {n: p.shape for n, p in learn.model.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert not any(getattr(p, '_post_accumulate_grad_hooks', None) for p in learn.model.parameters())
    state = (learn.opt.opt if isinstance(learn.opt, OptimWrapper) else learn.opt).state
    assert {id(p) for p in state if isinstance(p, torch.Tensor)} <= set(map(id, groups))
    now = dict(learn.model.named_parameters())
    assert all((now[n][~m] == 0).all() and not now[n][~m].signbit().any() for n, m in (learn.masks or {}).items())
    return True


class Tape(Callback):
    "Records the batches, rates, and first values of the low-rank terms"

    order, run_valid = 65, False

    def before_fit(self):
        self.batches, self.lrs, self.terms = [], [], None

    def before_batch(self):
        if self.terms is None:
            self.terms = {n: (t.a.detach().clone(), t.b.detach().clone()) for n, t in self.low_rank.terms.items()}
        self.batches.append((self.x, self.y))

    def before_step(self):
        self.lrs.append(self.opt.hypers[-1]['lr'])


def single(pred, y):
    "The loss as fastai records it; its gradient is of double precision"
    return nn.functional.cross_entropy(pred, y).float()


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def explicit(model, masks, tape, scale, clip=None, every=1):
    "A hand-written loop over a network whose weights are mask * (first + scale * b @ a)"
    terms = {n: [p.clone().requires_grad_() for p in ab] for n, ab in tape.terms.items()}
    own = {n: p.detach().clone().requires_grad_(n not in terms) for n, p in model.named_parameters()}
    chosen = [own[n] for n in chosen_parameters(model, {'norm', 'bias'})]
    trained = [*chosen, *(p for ab in terms.values() for p in ab)]
    opt, lrs, seen = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=0.01), iter(tape.lrs), 0

    def weights():
        return {n: masks[n] * (own[n] + scale * (b @ a).view_as(own[n])) for n, (a, b) in terms.items()}

    for x, y in tape.batches:
        loss = single(functional_call(model, {**own, **weights()}, x), y)
        (loss * len(y) / every if every > 1 else loss).backward()
        seen += len(y)
        if every > 1 and seen < every:
            continue
        seen, opt.param_groups[0]['lr'] = 0, next(lrs)
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        opt.step()
        opt.zero_grad()
    return {**own, **weights()}


@pytest.mark.sample(2)
@pytest.mark.parametrize('how', ['plain', 'clip', 'accumulate'])
def test_equals_a_hand_written_loop(learner, how):
    def make():
        torch.manual_seed(3)
        model = nn.Sequential(Double(), digits_convnet(widths=(8, 16, 16)).double())
        return learner(model, opt_func=TORCH, wd=0.01, loss_func=single, bs=128)

    learn, tape = make(), Tape()
    learn.create_opt()
    learn.prune(0.8)
    model = make().model
    model.load_state_dict(learn.model.state_dict())
    model.train()
    more = dict(plain=[], clip=[GradientClip(0.05)], accumulate=[GradientAccumulation(300)])[how]
    retrain(learn, 2, rank=3, alpha=1.5, cbs=[tape, *more])
    kwargs = dict(clip=0.05) if how == 'clip' else dict(every=300) if how == 'accumulate' else {}
    want = explicit(model, learn.masks, tape, 0.5, **kwargs)
    assert len(tape.lrs) >= 4 and plain(learn, want)
    for n, p in learn.model.named_parameters():
        torch.testing.assert_close(p, want[n], rtol=1e-6, atol=1e-9)
    moved = values(make())
    assert all(not torch.equal(p, moved[n]) for n, p in learn.model.named_parameters())


@pytest.mark.sample(2)
@pytest.mark.parametrize('opt', [SGDM, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_other_parameters_keep_their_bits(learner, fit, opt):
    learn = fit(learner(opt_func=opt, wd=0.1, bs=128))
    learn.prune(0.9)
    before, state = values(learn), {}

    class Look(Callback):
        order = 90

        def after_step(self):
            of = (self.opt.opt if isinstance(self.opt, OptimWrapper) else self.opt).state
            state.update({n: [v for v in of.get(p, {}).values() if torch.is_tensor(v)] for n, p in named})
            assert all(p.grad is None for n, p in named if n not in chosen)

    named, chosen = list(learn.model.named_parameters()), chosen_parameters(learn.model, {'norm', 'bias'})
    retrain(learn, params='norm+bias', cbs=Look())
    now = values(learn)
    assert plain(learn, before) and {n for n in now if not torch.equal(now[n], before[n])} == set(chosen)
    assert {n for n, vs in state.items() if vs} == set(chosen)
    fit(learn)  # as usual
    now, later = now, values(learn)
    assert all(not torch.equal(now[n], later[n]) for n in now)


def test_flags_and_optimizer_come_back(learner):
    class Stop(Callback):
        def __init__(self, error, event):
            setattr(self, event, self.stop)
            self.error = error

        def stop(self):
            raise self.error

    learn = learner(opt_func=SGDM, bs=128)
    learn.create_opt()
    learn.prune(0.9)
    learn.model[0][0].weight.requires_grad_(False)
    errors = dict(before_fit=ValueError('stop'), after_backward=KeyboardInterrupt(), after_step=OSError('stop'))
    for event, error in errors.items():
        for kind in ('norm', 'lora'):
            with pytest.raises(type(error)):
                retrain(learn, params=kind, discount=1, cbs=Stop(error, event))
            assert not learn.model[0][0].weight.requires_grad
            learn.model[0][0].weight.requires_grad_()
            assert plain(learn, values(learn)), (event, kind)
            learn.model[0][0].weight.requires_grad_(False)
    first = learn.model[0][0].weight.clone()
    retrain(learn, params='lora', discount=1)
    assert torch.equal(first, learn.model[0][0].weight)


@pytest.mark.parametrize('opt', [ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.usefixtures('deterministic')
def test_resumes_to_the_bit(learner, opt):
    def make():
        learn = learner(opt_func=opt, wd=0.01, bs=128)
        learn.create_opt()
        learn.prune(0.8)
        return learn

    def fit(learn, *cbs):
        retrain(learn, 2, discount=1.0, rank=2, lr=0.02, cbs=[GradientAccumulation(400), *cbs])

    whole, again = stopped(make, fit, 1, 1)  # with gradients that wait for the next epoch
    assert same(whole, again)
    with pytest.raises(ValueError, match='another fit'):
        retrain(make(), 2, discount=1.0, rank=3, lr=0.02, cbs=[GradientAccumulation(400), Checkpoint('run')])


def test_a_state_that_does_not_fit(learner):
    class Load(Callback):
        order, run_valid = 80, False

        def before_step(self):
            cb = self.low_rank
            good, n = cb.state_dict(), next(iter(cb.terms))
            cb.load_state_dict(good)
            other = dict(a=good[n]['b'], first=good[n]['first'][:1], grads=[None], states=[{}, {'x': 1}])
            wrong = [{}, None, *({**good, n: {**good[n], k: v}} for k, v in other.items())]
            for state in wrong:
                with pytest.raises(ValueError, match='low-rank|has'):
                    cb.load_state_dict(state)

    learn = learner(opt_func=SGDM, bs=256)
    learn.prune(0.8)
    retrain(learn, cbs=Load())
    assert plain(learn, values(learn))


class Scaled(MixedPrecision):
    "fastai's mixed precision on any device, from a scale at which the first steps overflow"

    def before_fit(self):
        super().before_fit()
        kind = next(self.model.parameters()).device.type
        self.autocast = torch.autocast(kind, torch.float16)
        self.learn.scaler, self.skipped_steps = torch.amp.GradScaler(kind, init_scale=2.0**26), 0

    def after_cancel_step(self):
        self.skipped_steps += 1


def test_mixed_precision(learner):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    learn, mixed = learner(net, opt_func=SGDM, bs=64), Scaled()
    learn.prune(0.7)
    before = values(learn)
    retrain(learn, 2, lr=0.2, cbs=[mixed, GradientClip(1.0)])
    now = values(learn)
    assert mixed.skipped_steps and all(
        torch.isfinite(p).all() and not torch.equal(p, before[n]) for n, p in now.items()
    )
    assert mixed.skipped_steps and learn.recorder.losses[-1] < learn.recorder.losses[0] and plain(learn, before)


class LayerScale(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))


class OddRMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))


def test_kinds_of_parameters():
    net = nn.ModuleDict(
        dict(
            conv=nn.Conv2d(3, 4, 1),
            bn=nn.BatchNorm2d(4),
            group=nn.GroupNorm(2, 4),
            instance=nn.InstanceNorm2d(4, affine=True),
            rms=nn.RMSNorm(4),
            odd=OddRMSNorm(4),
            scale=LayerScale(4),
            attention=nn.MultiheadAttention(4, 2, add_bias_kv=True),
            rnn=nn.LSTM(4, 4),
            normed=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            emb=nn.Embedding(5, 4),
            head=nn.Linear(4, 2),
        )
    )
    norm, bias, head = (chosen_parameters(net, {k}) for k in ('norm', 'bias', 'head'))
    assert {n.split('.')[0] for n in norm} == {'bn', 'group', 'instance', 'rms', 'odd', 'scale'}
    assert set(head) == {'head.weight', 'head.bias'}
    assert {n for n in dict(net.named_parameters()) if 'bias' in n} == set(bias)
    assert not is_norm(net['normed']) and not is_norm(net['emb'])


def test_kinds_of_models():
    timm = pytest.importorskip('timm')
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=24, num_classes=3, init_values=1e-5)
    names = set(chosen_parameters(vit, {'norm', 'bias'}))
    rest = {n for n in dict(vit.named_parameters()) if n not in names}
    assert all(n.endswith('.weight') or n in ('cls_token', 'pos_embed') for n in rest)
    assert not any('norm' in n or 'gamma' in n for n in rest) and list(chosen_parameters(vit, {'head'})) == [
        'head.weight',
        'head.bias',
    ]
    swin = timm.create_model('swin_tiny_patch4_window7_224', depths=(1, 1), embed_dim=12, num_heads=(1, 2))
    names = chosen_parameters(swin, {'norm', 'bias'})
    assert not any('table' in n for n in names) and max(p.ndim for p in names.values()) == 1


class Stack(nn.Module):
    "Grouped and transposed convolutions, a linear layer that is stored as [in, out], experts"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.groups = nn.Conv2d(8, 8, 3, padding=1, groups=4).to(memory_format=torch.channels_last)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.turned = Conv1D(6, 5)
        self.experts = Experts(3, 5, 10)

    def forward(self, x):
        x = self.up(self.groups(self.conv(x.view(-1, 1, 8, 8)).relu()).relu()).mean((2, 3))
        return self.experts(self.turned(x))


class Conv1D(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Experts(nn.Module):
    def __init__(self, n, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n_out, n_in))

    def forward(self, x):
        return torch.einsum('bi,eoi->bo', x, self.weight)


def test_layouts(learner):
    class Shapes(Callback):
        def before_batch(self):
            self.found = {n: (t.a.shape, t.b.shape) for n, t in self.low_rank.terms.items()}

    learn, shapes = learner(Stack(), opt_func=SGDM, bs=256), Shapes()
    learn.prune(0.5)
    before = values(learn)
    retrain(learn, rank=4, lr=0.01, cbs=shapes)
    assert plain(learn, before) and all(not torch.equal(p, before[n]) for n, p in values(learn).items())
    assert shapes.found['experts.weight'] == ((3, 4, 5), (3, 10, 4))
    assert shapes.found['groups.weight'] == ((4, 18), (8, 4)) and shapes.found['conv.weight'] == ((4, 9), (8, 4))
    assert shapes.found['turned.weight'] == ((4, 5), (6, 4))


def test_masks_of_some_layers_and_channels(learner):
    learn = learner(opt_func=SGDM, bs=128)
    learn.prune({'0.0.weight': 0.5})
    before = values(learn)
    retrain(learn)
    now = values(learn)
    chosen = chosen_parameters(learn.model, {'norm', 'bias'})
    assert plain(learn, before) and {n for n in now if not torch.equal(now[n], before[n])} == {'0.0.weight', *chosen}
    learn = learner(opt_func=SGDM, bs=128)
    learn.prune(0.5, granularity='channel')
    before, masks = values(learn), learn.masks
    retrain(learn, params='lora+head')
    assert plain(learn, before) and learn.masks == masks
    cut = quietly(learn, learn.validate)
    learn.model(learn.dls.one_batch()[0])
    assert np.isfinite(cut[0])


def test_tied_and_parametrized_weights():
    x, y = torch.randint(0, 24, (64, 6)), torch.randint(0, 24, (64,))
    data = [(x, y)] * 3
    model = Tagger()
    nn.utils.parametrizations.weight_norm(model.rnn, 'weight_ih_l0')
    learn = Learner(DataLoaders(data, data), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGDM)
    learn.prune(0.5, include='*emb.weight')
    learn.prune(0.5)
    before = values(learn)
    retrain(learn)
    assert plain(learn, before) and model.out.weight is model.emb.weight
    assert not torch.equal(model.emb.weight, before['emb.weight'])


def test_groups_of_rates(learner):
    learn = learner(opt_func=SGDM, splitter=lambda m: [params(m[:1]), params(m[1:])])
    learn.create_opt()
    learn.prune(0.5)

    class Groups(Callback):
        def before_batch(self):
            self.found = [len(ps) for ps in self.opt.param_lists]

    groups = Groups()
    retrain(learn, lr=0.02, lr_scale=3.0, schedule='ft', cbs=groups)
    assert len(groups.found) == 2 and groups.found[0] > 1
    assert learn.recorder.lrs[0] == pytest.approx(0.06) and plain(learn, values(learn))


def test_the_usual_retraining_has_the_same_bits(learner):
    states = []
    for kwargs in ({}, {'params': 'all', 'rank': 4}):
        learn = learner(opt_func=SGDM, bs=128)
        learn.prune(0.8)
        quietly(learn, learn.retrain, 1, history=[0.1], **kwargs)
        states.append(learn.model.state_dict())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_saved_best_epoch(learner):
    learn = learner(opt_func=SGDM, bs=128)
    learn.prune(0.8)
    retrain(learn, 2, cbs=SaveModelCallback(monitor='accuracy', with_opt=False))
    now = values(learn)
    learn.load('model')
    assert all(torch.equal(p, now[n]) for n, p in values(learn).items()) and plain(learn, now)


def test_errors(learner):
    learn = learner(opt_func=SGDM, bs=128)
    with pytest.raises(ValueError, match='nothing is pruned'):
        retrain(learn)
    learn.create_opt()
    learn.prune(0.5)
    weights = values(learn)
    for kwargs, message in (
        (dict(params='x'), "params='x': needs 'all', or some of norm, bias, head, lora joined by +"),
        (dict(params='all+norm'), 'needs'),
        (dict(params=None), 'needs'),
        (dict(rank=0), 'rank=0: needs a whole number'),
        (dict(alpha=0), 'alpha=0: needs'),
        (dict(lr_scale=-1), 'lr_scale=-1: needs'),
        (dict(cbs=SparsifyCallback(0.9)), 'SparsifyCallback can.t change them'),
        (dict(cbs=[ShrinkCallback()]), 'ShrinkCallback can.t'),
    ):
        with pytest.raises(ValueError, match=message.replace('+', r'\+')):
            retrain(learn, **kwargs)
    assert plain(learn, weights) and all(torch.equal(p, weights[n]) for n, p in values(learn).items())
    bare = learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), opt_func=SGDM)
    bare.prune(0.5)
    with pytest.raises(ValueError, match="no such parameters to train: use 'lora' or 'all'"):
        retrain(bare, params='norm+bias')
    retrain(bare, params='lora')
    assert plain(bare, values(bare))
