"Each baseline is its paper's update rule, against slow loops that are obvious, on a two-layer network"

import math
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, DataLoaders, Learner, MSELossFlat
from fastai.optimizer import OptimWrapper
from helpers import quietly
from torch import nn
from torch.nn import functional as F

import fastprune.methods.always_sparse as baselines
from fastprune.all import (
    DNW,
    DPF,
    DST,
    GMP,
    GSM,
    LC,
    SET,
    SNFS,
    STR,
    GradualL2,
    RigL,
    cubic,
    one_shot,
    prunable_weights,
    random_score,
    search_strength,
)
from fastprune.engine import optimizers
from fastprune.engine.optimizers import TorchOptimizer
from fastprune.methods.moves import shared_out
from fastprune.zoo.data import TensorData

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

LR, MOM, EPOCHS, STEPS = 0.05, 0.9, 4, 12
g = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 6, generator=g), torch.randn(12, 3, generator=g)
batches = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)] * EPOCHS


def make(wd=0.0, opt=partial(SGD, mom=MOM)):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    dls = DataLoaders(
        *[torch.utils.data.DataLoader(TensorData(X.double(), Y.double(), ['y']), batch_size=4) for _ in range(2)]
    )
    return Learner(dls, model, loss_func=MSELossFlat(), opt_func=opt, wd=wd)


def loss_of(ws, x, y):
    w0, b0, w1, b1 = ws
    return F.mse_loss(F.linear(F.linear(x.to(w0), w0, b0).relu(), w1, b1), y.to(w0))


class Slow:
    "SGD with momentum on lists of tensors; `0` and `2` are the prunable weights"

    def __init__(self, learn, sparsity):
        self.ws, self.v, self.s = [p.detach().clone() for p in learn.model.parameters()], {}, sparsity

    def grads(self, ws, x, y):
        ws = [w.detach().requires_grad_() for w in ws]
        return list(torch.autograd.grad(loss_of(ws, x, y), ws))

    def step(self, i, w, grad):
        self.v[i] = MOM * self.v.get(i, 0) + grad
        return w - LR * self.v[i]

    def top(self, scores, s=None):
        "Global masks, of the (1-s)n largest"
        flat = torch.cat([o.flatten() for o in scores])
        k = len(flat) - round((self.s if s is None else s) * len(flat))
        keep = torch.zeros_like(flat, dtype=torch.bool)
        keep[flat.argsort(descending=True)[:k]] = True
        return [m.view_as(o) for m, o in zip(keep.split([o.numel() for o in scores]), scores, strict=True)]

    def hard(self):
        for i, m in zip((0, 2), self.top([self.ws[0].abs(), self.ws[2].abs()]), strict=True):
            self.ws[i] = self.ws[i] * m
        return self.ws


def slow_dpf(learn, s, interval, masked_first=False):
    r = Slow(learn, s)
    masks = {0: torch.ones(5, 6), 2: torch.ones(3, 5)}
    if masked_first:
        masks = dict(zip((0, 2), r.top([r.ws[0].abs(), r.ws[2].abs()]), strict=True))
    for t, (x, y) in enumerate(batches):
        gs = r.grads([w * masks[i] if i in masks else w for i, w in enumerate(r.ws)], x, y)
        r.ws = [r.step(i, w, gr) for i, (w, gr) in enumerate(zip(r.ws, gs, strict=False))]
        if t % interval == 0:
            masks = dict(zip((0, 2), r.top([r.ws[0].abs(), r.ws[2].abs()]), strict=True))
    return [w * masks[i] if i in masks else w for i, w in enumerate(r.ws)]


def slow_gmp(learn, s):
    r = Slow(learn, s)
    masks = {0: torch.ones(5, 6), 2: torch.ones(3, 5)}
    for t, (x, y) in enumerate(batches):
        gs = r.grads(r.ws, x, y)
        r.ws = [r.step(i, w, gr) for i, (w, gr) in enumerate(zip(r.ws, gs, strict=False))]
        now = r.top([torch.where(masks[i].bool(), r.ws[i].abs(), -1.0) for i in (0, 2)], s * cubic((t + 1) / STEPS))
        masks = dict(zip((0, 2), now, strict=True))
        for i in (0, 2):
            r.ws[i] = r.ws[i] * masks[i]
    return r.ws


def slow_gsm(learn, s, wd, biases=()):  # fastai decays none
    r = Slow(learn, s)
    for x, y in batches:
        gs = r.grads(r.ws, x, y)
        for i, m in zip((0, 2), r.top([(r.ws[i] * gs[i]).abs() for i in (0, 2)]), strict=True):
            gs[i] = gs[i] * m + wd * r.ws[i]
        for i in biases:
            gs[i] = gs[i] + wd * r.ws[i]
        r.ws = [r.step(i, w, gr) for i, (w, gr) in enumerate(zip(r.ws, gs, strict=False))]
    return r.hard()


def slow_lc(learn, s, wd, growth, coupled, biases=()):  # fastai decays none
    r = Slow(learn, s)
    for t, (x, y) in enumerate(batches):
        gs = r.grads(r.ws, x, y)
        keep = dict(zip((0, 2), r.top([r.ws[0].abs(), r.ws[2].abs()]), strict=True))
        for i in biases:
            r.ws[i] = r.ws[i] - LR * wd * r.ws[i]
        for i in keep:
            d = wd * growth ** (t // 3) * ~keep[i]
            if coupled:
                gs[i] = gs[i] + d * r.ws[i]
            else:
                r.ws[i] = r.ws[i] - LR * d * r.ws[i]
        r.ws = [r.step(i, w, gr) for i, (w, gr) in enumerate(zip(r.ws, gs, strict=False))]
    return r.hard()


def slow_l2(learn, s, penalty):
    r = Slow(learn, s)
    for t, (x, y) in enumerate(batches):
        ws = [w.detach().requires_grad_() for w in r.ws]
        loss = loss_of(ws, x, y) + penalty * (t + 1) / STEPS * (ws[0].square().sum() + ws[2].square().sum())
        gs = torch.autograd.grad(loss, ws)
        r.ws = [r.step(i, w, gr) for i, (w, gr) in enumerate(zip(r.ws, gs, strict=False))]
    return r.hard()


def slow_str(learn, s_init, decay):
    r = Slow(learn, None)
    s = [torch.tensor(float(s_init), dtype=torch.float64)] * 2
    soft = lambda w, s: w.sign() * (w.abs() - torch.sigmoid(s)).relu()
    for x, y in batches:
        ws, ss = [w.detach().requires_grad_() for w in r.ws], [o.detach().requires_grad_() for o in s]
        gs = torch.autograd.grad(loss_of([soft(ws[0], ss[0]), ws[1], soft(ws[2], ss[1]), ws[3]], x, y), ws + ss)
        r.ws = [r.step(i, w, gr) for i, (w, gr) in enumerate(zip(r.ws, gs, strict=False))]
        s = [r.step(4 + i, o, gr + decay * o) for i, (o, gr) in enumerate(zip(s, gs[4:], strict=False))]
    return [soft(r.ws[0], s[0]), r.ws[1], soft(r.ws[2], s[1]), r.ws[3]]


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).double()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        slope = torch.zeros_like(x)
        for i in np.ndindex(*x.shape):
            a = abs(float(x[i]))
            slope[i] = 2 - 4 * a if a <= 0.4 else 0.4 if a <= 1 else 0.0
        return grad * slope


def slow_dst(learn, alpha, decay):
    r = Slow(learn, None)
    ts = [torch.zeros(5, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)]
    for x, y in batches:
        ws, tt = [w.detach().requires_grad_() for w in r.ws], [o.detach().requires_grad_() for o in ts]
        masked = [w * Step.apply(w.abs() - t) for w, t in zip((ws[0], ws[2]), tt, strict=True)]
        loss = loss_of([masked[0], ws[1], masked[1], ws[3]], x, y) + alpha * sum((-t).exp().sum() for t in tt)
        gs = torch.autograd.grad(loss, ws + tt)
        r.ws = [r.step(i, w, gr) for i, (w, gr) in enumerate(zip(r.ws, gs, strict=False))]
        ts = [r.step(4 + i, o, gr + decay * o) for i, (o, gr) in enumerate(zip(ts, gs[4:], strict=False))]
    return [r.ws[0] * (r.ws[0].abs() > ts[0]), r.ws[1], r.ws[2] * (r.ws[2].abs() > ts[1]), r.ws[3]]


def swap(mask, w, drop, score, grow):
    "Drop the smallest, grow the largest scores of what is then free, one by one"
    old, mask = mask, mask.clone()
    for _ in range(drop):
        mask.view(-1)[
            min((i for i in range(mask.numel()) if mask.view(-1)[i]), key=lambda i: abs(float(w.view(-1)[i])))
        ] = False
    free, new = [i for i in range(mask.numel()) if not mask.view(-1)[i]], torch.zeros_like(mask)
    for i in sorted(free, key=lambda i: -float(score.view(-1)[i]))[:grow]:
        new.view(-1)[i] = True
    return mask | new, new & ~old


def slow_sparse(learn, kind, interval, fraction, end):
    r, masks = Slow(learn, None), {i: learn.masks[n].clone() for i, n in ((0, '0.weight'), (2, '2.weight'))}
    mean, counts = {i: torch.zeros_like(r.ws[i]) for i in masks}, []
    for t, (x, y) in enumerate(batches):
        gs = r.grads(r.ws, x, y)
        for i in masks:
            mean[i] = 0.9 * mean[i] + 0.1 * gs[i]
        moves = t > 0 and t % interval == 0 and t < end * STEPS
        if moves:
            part = fraction if kind == 'set' else fraction / 2 * (1 + math.cos(math.pi * t / (end * STEPS)))
            drop = {i: min(round(part * int(m.sum())), int(m.sum()) - 1) for i, m in masks.items()}
            grow = dict(drop)
            if kind == 'snfs':
                share = {i: float(mean[i][m].abs().mean()) for i, m in masks.items()}
                grow = shared_out(
                    sum(drop.values()), share, {i: m.numel() - int(m.sum()) + drop[i] for i, m in masks.items()}
                )
            score = {
                'rigl': {i: gs[i].abs() for i in masks},
                'snfs': {i: m.abs() for i, m in mean.items()},
                'set': {i: fixed_score(r.ws[i]) for i in masks},
            }[kind]
            for i in masks:
                masks[i], new = swap(masks[i], r.ws[i], drop[i], score[i], grow[i])
                if i in r.v:
                    r.v[i] = torch.where(new, 0.0, r.v[i])
                r.ws[i] = r.ws[i] * masks[i]
            counts.append((t, drop, grow))
        if not (moves and kind == 'rigl'):
            r.ws = [r.step(i, w, gs[i] * masks[i] if i in masks else gs[i]) for i, w in enumerate(r.ws)]
            for i in masks:
                r.ws[i] = r.ws[i] * masks[i]
    return r.ws, masks, counts


def fixed_score(w):
    return torch.sin(1e3 * torch.arange(w.numel(), dtype=torch.float64)).view_as(w)


def check(learn, cb, expected, wd=None):
    quietly(learn, lambda: learn.fit(EPOCHS, LR, cbs=cb, wd=wd))
    for p, w in zip(learn.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-9)


def test_gmp():
    check(make(), GMP(0.7, interval=1), slow_gmp(make(), 0.7))


def test_dpf():
    check(make(), DPF(0.7, schedule=one_shot, interval=3), slow_dpf(make(), 0.7, 3))


def test_dnw():
    check(make(), DNW(0.7), slow_dpf(make(), 0.7, 1, masked_first=True))


def test_gsm():
    check(make(), GSM(0.7), slow_gsm(make(), 0.7, 0.5), wd=0.5)


def test_gsm_coupled():
    check(make(opt=partial(SGD, mom=MOM, decouple_wd=False)), GSM(0.7), slow_gsm(make(), 0.7, 0.5), wd=0.5)


def test_lc_decoupled():
    check(make(), LC(0.7, growth=1.5), slow_lc(make(), 0.7, 0.5, 1.5, False), wd=0.5)


class DirectSGD(torch.optim.SGD):
    "Shrinks weights directly, and has no flag that says so"

    def step(self):
        decays = [g['weight_decay'] for g in self.param_groups]
        with torch.no_grad():
            for g in self.param_groups:
                for p in g['params']:
                    p.mul_(1 - g['lr'] * g['weight_decay'])
                g['weight_decay'] = 0.0
        super().step()
        for g, wd in zip(self.param_groups, decays, strict=True):
            g['weight_decay'] = wd


direct = partial(OptimWrapper, opt=DirectSGD, momentum=MOM)


def test_gsm_and_lc_with_an_optimizer_that_shrinks_weights():
    check(make(opt=direct), GSM(0.7), slow_gsm(make(), 0.7, 0.5, (1, 3)), wd=0.5)
    check(make(opt=direct), LC(0.7, growth=1.5), slow_lc(make(), 0.7, 0.5, 1.5, False, (1, 3)), wd=0.5)


def test_gsm_without_weight_decay():
    "An optimizer that has none"
    learn = make(opt=partial(OptimWrapper, opt=torch.optim.Rprop))
    learn.wd = None
    with pytest.warns(UserWarning, match='decay'):
        quietly(learn, lambda: learn.fit(EPOCHS, LR, cbs=GSM(0.7)))
    assert learn.masks.sparsity == pytest.approx(0.7, abs=0.02)


def test_an_optimizer_is_tried_once(monkeypatch):
    tried, really = [], optimizers._shrinks_weights
    monkeypatch.setattr(optimizers, '_shrinks_weights', lambda inner: tried.append(inner) or really(inner))
    for cb in (LC(0.7), GSM(0.7)):
        learn = make(opt=direct)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0.1, wd=0.5, cbs=cb)
        assert len(tried) == 1
        tried.clear()


@pytest.mark.parametrize('options, place', [({}, 'the CPU'), ({'fused': True}, 'here'), ({'capturable': True}, 'here')])
def test_steps_of_torch_are_counted_where_torch_counts_them(monkeypatch, options, place):
    "On the CPU, where a step does not wait for them; on the device if the optimizer is fused, or part of a graph"

    class Step(torch.Tensor):
        def cpu(self):
            return 'the CPU'

    p = nn.Parameter(torch.zeros(2))
    opt = torch.optim.Adam([p])
    opt.param_groups[0].update(options)
    wrapped = optimizers.TorchOptimizer(opt)
    monkeypatch.setattr(optimizers, 'is_host', lambda t: not isinstance(t, Step))
    state = {'step': torch.tensor(3.0).as_subclass(Step)}
    wrapped.place_step(state, wrapped.groups[0])
    assert (state['step'] == 'the CPU') == (place == 'the CPU')
    on_cpu = {'step': torch.tensor(3.0)}
    wrapped.place_step(on_cpu, wrapped.groups[0])
    assert on_cpu['step'].item() == 3


@pytest.mark.parametrize(
    'kind,coupled',
    [('Adafactor', False), ('AdamW', False), ('Muon', False), ('Adam', True), ('RMSprop', True), ('SGD', True)],
)
def test_how_optimizers_decay(kind, coupled):
    if not hasattr(torch.optim, kind):
        pytest.skip(f'this version of torch has no {kind}')
    more = dict(momentum=0.9) if kind == 'SGD' else {}
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(3, 3))], lr=0.1, weight_decay=0.1, **more)
    assert TorchOptimizer(optimizer).couples_decay(0) is coupled


def test_lc_coupled():
    check(
        make(opt=partial(SGD, mom=MOM, decouple_wd=False)),
        LC(0.7, growth=1.5),
        slow_lc(make(), 0.7, 0.5, 1.5, True),
        wd=0.5,
    )


def test_gradual_l2():
    check(make(), GradualL2(0.7, penalty=0.3), slow_l2(make(), 0.7, 0.3))


def test_str():
    check(make(), STR(s_init=-2, decay=0.3), slow_str(make(), -2, 0.3))


def test_dst():
    check(make(), DST(alpha=0.05, decay=0.1), slow_dst(make(), 0.05, 0.1))


@pytest.mark.parametrize('kind,cls,kw', [('rigl', RigL, {}), ('set', SET, {}), ('snfs', SNFS, {})])
def test_moving_masks(kind, cls, kw, monkeypatch):
    monkeypatch.setattr(
        baselines, 'random_score', lambda weights, seed=0: {n: fixed_score(w) for n, w in weights.items()}
    )
    learns = [make(), make()]
    for l in learns:
        l.prune(0.6, criterion=partial(random_score, seed=3), scope='local')
    n = {m: int(v.sum()) for m, v in learns[0].masks.items()}
    cb = cls(0.6, fraction=0.5, interval=2, end=0.9, scope='local', **kw)
    ws, masks, counts = slow_sparse(learns[1], kind, 2, 0.5, 0.9)
    check(learns[0], cb, ws)
    for i, name in ((0, '0.weight'), (2, '2.weight')):
        assert torch.equal(learns[0].masks[name], masks[i])
        assert [(c['iteration'], c['dropped'][name], c['grown'][name]) for c in cb.changes] == [
            (t, d[i], gr[i]) for t, d, gr in counts
        ]
        if kind != 'snfs':
            assert int(learns[0].masks[name].sum()) == n[name]
    assert len(counts) == 5 and any(sum(d.values()) for _, d, _ in counts)
    assert sum(int(m.sum()) for m in learns[0].masks.values()) == sum(n.values())
    if kind == 'snfs':
        assert any(d != gr for _, d, gr in counts)  # density moves between layers


def test_gsm_passes_exactly_k_gradients():
    learn, seen = make(), []

    class Count(Callback):
        order = 90

        def before_step(self):
            seen.append(sum(int(p.grad.count_nonzero()) for p in prunable_weights(self.model).values()))

    quietly(learn, lambda: learn.fit(2, LR, wd=0.1, cbs=[GSM(0.6), Count()]))
    assert seen == [45 - round(0.6 * 45)] * 6


@pytest.mark.parametrize(
    'total,shares,room,expected',
    [
        (10, dict(a=1, b=1), dict(a=20, b=20), dict(a=5, b=5)),
        (10, dict(a=3, b=1), dict(a=4, b=20), dict(a=4, b=6)),
        (3, dict(a=1, b=1), dict(a=9, b=9), dict(a=2, b=1)),
        (5, dict(a=0, b=0), dict(a=9, b=2), dict(a=3, b=2)),
        (0, dict(a=1), dict(a=3), dict(a=0)),
        (7, dict(a=0, b=1), dict(a=9, b=3), dict(a=4, b=3)),
        (9, dict(a=1, b=1), dict(a=2, b=2), dict(a=2, b=2)),
    ],
)
def test_shared_out(total, shares, room, expected):
    assert shared_out(total, shares, room) == expected


def test_search_strength():
    calls = []

    def train(x):
        calls.append(x)
        return 1 - 1 / (1 + x)

    df = search_strength(train, 0.9, 0.1, 1000.0, tol=0.01)
    assert abs(df.sparsity[0] - 0.9) <= 0.01 and len(df) == len(calls) and df.strength[0] in calls
    for kw, msg in (
        (dict(sparsity=90, low=1, high=2), 'sparsity=90'),
        (dict(sparsity=0.9, low=2, high=1), 'low=2'),
        (dict(sparsity=0.9, low=1, high=2), 'is not between'),
    ):
        with pytest.raises(ValueError, match=msg):
            search_strength(train, **kw)


def test_what_grows_at_random_differs_from_move_to_move():
    seen = []

    class Spy(SET):
        def growth_scores(self, weights):
            seen.append(super().growth_scores(weights)['0.weight'])
            return super().growth_scores(weights)

    learn = make()
    quietly(learn, lambda: learn.fit(EPOCHS, LR, cbs=Spy(0.6, interval=3)))
    other = make()
    quietly(other, lambda: other.fit(1, LR, cbs=RigL(0.6, seed=1)))
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and other.masks != learn.masks
