"What papers say of S-Cyc's rate, GSM's decay, DNW's first step and SNFS's dense tensors"

from functools import partial

import pytest
import torch
from fastai.basics import (
    SGD,
    Adam,
    Callback,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Learner,
    MSELossFlat,
    OptimWrapper,
    accuracy,
)
from fastai.optimizer import l2_reg, weight_decay
from helpers import quietly
from torch import nn

from fastprune.all import DNW, DPF, GSM, SNFS, digits_dls, prunable_weights, s_cyc_max_lr, state_of, taylor
from fastprune.schedules.rates import at_prune_rate

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

SC = partial(s_cyc_max_lr, eps=0.1, delta=0.2)


def formula(m, p, q=1, beta=5, eps=0.1, delta=0.2):
    "METHODS' S, by hand"
    if m <= q:
        return eps
    g = 1 - (1 - p) ** (m - q)
    return delta / (1 + (g / (1 - g)) ** -beta) + eps


momentum = partial(SGD, mom=0.9)


def make(opt=momentum, wd=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    return Learner(digits_dls(bs=256), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt, wd=wd)


# S-Cyc


@pytest.mark.parametrize('rate', [0.2, 0.3, 0.5])
def test_s_cyc_follows_the_rate_of_tickets(rate):
    learn, used = make(), []

    def fit(learn, cbs, lr):
        used.append(lr)
        quietly(learn, learn.fit, 1, lr, cbs=cbs)

    learn.find_tickets(5, fit, prune_rate=rate, max_lr=SC, measure='all')
    assert used[1:] == pytest.approx([formula(m, rate) for m in range(6)])  # after a dry run


def test_s_cyc_follows_the_rate_of_rounds():
    table = quietly(make(), make().iterative_prune, 4, 1, prune_rate=0.3, max_lr=SC)
    assert list(table.max_lr) == pytest.approx([formula(m, 0.3) for m in range(5)])
    bound = quietly(make(), make().iterative_prune, 4, 1, prune_rate=0.3, max_lr=partial(SC, p=0.1))
    assert list(bound.max_lr) == pytest.approx([formula(m, 0.1) for m in range(5)])


def test_a_bound_p_and_other_functions_stay():
    assert at_prune_rate(SC, 0.4)(4) == pytest.approx(formula(4, 0.4)) and SC(4) == pytest.approx(formula(4, 0.2))
    bound, own = partial(SC, p=0.1), lambda m: 0.1 * (m + 1)
    assert at_prune_rate(bound, 0.4) is bound and at_prune_rate(own, 0.4) is own and at_prune_rate(0.3, 0.4) == 0.3
    assert at_prune_rate(partial(SC, q=2), 0.4)(4) == pytest.approx(formula(4, 0.4, q=2))
    learn, used = make(), []

    def fit(learn, cbs, lr):
        used.append(lr)
        quietly(learn, learn.fit, 1, lr, cbs=cbs)

    learn.find_tickets(3, fit, prune_rate=0.4, max_lr=bound)
    assert used[1:] == pytest.approx([formula(m, 0.1) for m in range(4)])


# GSM


class Silent:
    "Items whose last input is always zero: its weights are passive all along"

    def __init__(self, n):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
        self.x[:, 3] = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.x[i, :2]


def passive(opt, cb, n, wd=5e-4, lr=0.01):
    "What is left of a passive weight after `n` steps, right before the hard one"
    torch.manual_seed(0)
    dls = DataLoaders(*[DataLoader(Silent(k), bs=1) for k in (n, 1)])
    learn = Learner(dls, nn.Linear(4, 2), loss_func=MSELossFlat(), opt_func=opt)
    first, seen = learn.model.weight[0, 3].item(), []

    class Look(Callback):
        order, run_valid = -100, False  # before the hard step

        def after_step(self):
            seen.append(learn.model.weight[0, 3].item())

    quietly(learn, learn.fit, 1, lr, wd=wd, cbs=[cb, Look()])
    return seen[-1] / first, learn.opt


def by_hand(n, lr=0.01, wd=5e-4, mom=0.98):
    w, v = 1.0, 0.0
    for _ in range(n):
        v = mom * v + wd * w
        w -= lr * v
    return w


def test_gsm_decays_through_the_momentum():
    assert by_hand(2000) == pytest.approx(0.610, abs=5e-4)
    left, opt = passive(partial(SGD, mom=0.98), GSM(0.5), 300, lr=0.05)
    assert left == pytest.approx(by_hand(300, 0.05), rel=1e-4) and left < 0.8  # 0.993 without momentum
    assert list(opt.cbs)[0] is weight_decay  # only within its steps


@pytest.mark.parametrize(
    'opt',
    [partial(SGD, mom=0.98, decouple_wd=False), partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.98)],
    ids=['fastai', 'torch'],
)
def test_gsm_does_not_decay_twice(opt):
    assert passive(opt, GSM(0.5), 100)[0] == pytest.approx(by_hand(100), rel=1e-5)


def test_gsm_couples_adam_and_leaves_it_as_it_was():
    w = lambda o, cb: passive(o, cb, 50, wd=0.1, lr=1e-3)
    want, _ = w(partial(Adam, decouple_wd=False), GSM(0.5))
    got, opt = w(Adam, GSM(0.5))
    assert got == pytest.approx(want, rel=1e-6) and weight_decay in opt.cbs and l2_reg not in opt.cbs
    got, opt = w(partial(OptimWrapper, opt=torch.optim.AdamW), GSM(0.5))
    want, _ = w(partial(OptimWrapper, opt=torch.optim.Adam), GSM(0.5))
    assert got == pytest.approx(want, rel=1e-6) and all(g['decoupled_weight_decay'] for g in opt.opt.param_groups)


def test_gsm_stopped_in_a_step_leaves_the_optimizer_alone():
    learn = make(wd=0.1)

    class Stop(Callback):
        order = 90

        def before_step(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quietly(learn, learn.fit, 1, 0.1, cbs=[GSM(0.5), Stop()])
    quietly(learn, learn.fit, 1, 0.1, cbs=GSM(0.5))
    assert list(learn.opt.cbs)[0] is weight_decay


def test_other_methods_decay_as_the_optimizer_does():
    assert passive(partial(SGD, mom=0.98), DPF(0.0), 50)[0] == pytest.approx((1 - 5e-6) ** 50, rel=1e-5)


# DNW


@pytest.mark.parametrize(
    'kw', [dict(), dict(scope='local'), dict(criterion=taylor), dict(sparsity={'1.weight': 0.9}, scope='local')]
)
def test_dnw_is_sparse_from_the_first_forward_pass(kw):
    learn, seen = make(), []
    first = state_of(learn)

    class Look(Callback):
        order, run_valid = 90, False

        def before_batch(self):
            seen.append({n: p.detach().clone() for n, p in prunable_weights(self.model).items()})

    quietly(learn, learn.fit, 1, 0.1, cbs=[DNW(**{'sparsity': 0.8, **kw}), Look()])
    zeros = lambda ws: {n: int((w == 0).sum()) for n, w in ws.items()}
    pruned = ['1.weight'] if 'sparsity' in kw else list(seen[0])
    total = sum(seen[0][n].numel() for n in pruned)
    for ws in seen:
        assert sum(zeros(ws)[n] for n in pruned) == round((0.9 if 'sparsity' in kw else 0.8) * total)
    for n, w in seen[0].items():
        assert torch.equal(w, first[n] * (w != 0))  # the rest is as it was
    left, gone = ([(first[n][(w == 0) == o]).abs() for n, w in seen[0].items()] for o in (False, True))
    if not kw:
        assert min(w.min() for w in left) >= max(w.max() for w in gone)


# SNFS


def slow_drops(masks, mean, part):
    "As the authors' `adjust_prune_rate` has it"
    share = {n: float(mean[n][m].abs().mean()) for n, m in masks.items()}
    drops = {}
    for n, m in masks.items():
        rate, kept = part, int(m.sum())
        sparsity = 1 - kept / m.numel()
        if sparsity < 0.2 and 1 / len(masks) / (share[n] / sum(share.values())) < 1:
            rate = min(sparsity, rate)
        drops[n] = min(round(rate * kept), kept - 1)
    return drops


def test_snfs_takes_less_from_what_is_nearly_dense():
    learn, guarded = make(), 0
    learn.prune({'1.weight': 0.7, '3.weight': 0.05})

    class Check(SNFS):
        def move(self, weights):
            nonlocal guarded
            masks, part = self.engine.masks, self.fraction_at(self.engine.t)
            want = slow_drops(masks, self.mean, part)
            super().move(weights)
            got = self.changes[-1]
            assert got['dropped'] == want and sum(got['grown'].values()) == sum(want.values())
            for n in self.learn.masks:
                assert got['grown'][n] <= 0.99 * (int((~masks[n]).sum()) + want[n])
            guarded += want['3.weight'] < round(part * int(masks['3.weight'].sum()))

    n = learn.masks.n_kept
    quietly(learn, learn.fit, 4, 0.1, cbs=Check({'1.weight': 0.7, '3.weight': 0.05}, interval=3))
    assert guarded and learn.masks.n_kept == n


def test_snfs_keeps_its_size_where_everything_is_full():
    learn = make()
    quietly(learn, learn.fit, 2, 0.1, cbs=SNFS(0.003, interval=2))
    assert learn.masks.n_kept == 64 * 30 + 300 - round(0.003 * 64 * 30) - round(0.003 * 300)
