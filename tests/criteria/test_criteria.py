import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoaders, Learner, TensorCategory, TensorImage, TfmdDL, accuracy
from helpers import quietly
from torch import nn
from torch.nn import functional as F

from fastprune.all import (
    CRITERIA,
    Masks,
    SparsifyCallback,
    compute_masks,
    digits_convnet,
    digits_dls,
    fisher,
    grasp,
    lamp,
    magnitude,
    movement,
    prunable_weights,
    random_score,
    snip,
    state_of,
    synflow,
    taylor,
    updating_movement,
    wanda,
)
from fastprune.core.protocol import Batches, asks_for, needs, ranks_magnitude, usual_iterations
from fastprune.core.scopes import layer_counts
from fastprune.criteria.ranking import _dead_last, ranked
from fastprune.criteria.weights import large_init, small_magnitude
from fastprune.learner.batches import undisturbed
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def make(model=None, bs=64):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    return Learner(
        digits_dls(bs=bs), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=partial(SGD, mom=0.9)
    )


def batches(learn, n):
    "Those that a criterion sees"
    with undisturbed(learn):
        seed_round(learn, 0)
        res = [b for _, b in zip(range(n), learn.dls.train, strict=False)]
    seed_round(learn, 0)
    return res


@pytest.mark.parametrize('n', [1, 3])
def test_snip_is_the_gradient_by_hand(n):
    learn = make()
    bs = batches(learn, n)
    scores = snip(prunable_weights(learn.model), learn, n)
    ws = list(prunable_weights(learn.model).values())
    grads = [
        sum(g) for g in zip(*[torch.autograd.grad(F.cross_entropy(learn.model(x), y), ws) for x, y in bs], strict=True)
    ]
    for w, g, s in zip(ws, grads, scores.values(), strict=True):
        assert torch.allclose(s, (w * g).abs(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('n', [1, 2])
def test_grasp_is_the_hessian_by_hand(n):
    learn = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10)))
    learn.model.double()
    learn.dls.train.dataset.x = learn.dls.train.dataset.x.double()
    bs = batches(learn, n)
    scores = grasp(prunable_weights(learn.model), learn, n)
    names, ws = list(prunable_weights(learn.model)), list(prunable_weights(learn.model).values())

    def loss(flat):
        parts = dict(
            zip(
                names, [p.view_as(w) for p, w in zip(flat.split([w.numel() for w in ws]), ws, strict=True)], strict=True
            )
        )
        return sum(F.cross_entropy(torch.func.functional_call(learn.model, parts, (x,)), y) for x, y in bs)

    flat = torch.cat([w.detach().flatten() for w in ws])
    want = flat * (torch.func.hessian(loss)(flat) @ torch.func.grad(loss)(flat))
    assert torch.allclose(torch.cat([s.flatten() for s in scores.values()]), want, rtol=1e-5, atol=1e-10)


def test_synflow_is_the_product_of_absolute_weights():
    learn = make(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 12),
            nn.ReLU(),
            nn.BatchNorm1d(12),
            nn.Dropout(0.5),
            nn.Linear(12, 7),
            nn.ReLU(),
            nn.Linear(7, 10),
        )
    )
    quietly(learn, learn.fit, 1, 1e-2)
    scores = synflow(prunable_weights(learn.model), learn)
    w1, w2, w3 = (learn.model[i].weight.detach().double().abs().requires_grad_() for i in (1, 5, 7))
    bn = learn.model[3].weight.detach().double().abs() / (1 + learn.model[3].eps) ** 0.5
    (torch.ones(1, 64, dtype=torch.float64) @ w1.T * bn @ w2.T @ w3.T).sum().backward()
    for w, s in zip((w1, w2, w3), scores.values(), strict=True):
        assert torch.allclose(s, w.detach() * w.grad, rtol=1e-5)
    sums = [float(s.sum()) for s in scores.values()]
    assert np.allclose(sums, sums[0], rtol=1e-9)


def test_wanda_by_hand():
    learn = make(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 10))
    )
    ((x, _),) = batches(learn, 1)
    scores, h = wanda(prunable_weights(learn.model), learn, 1), x
    for i, m in enumerate(learn.model):
        if i in (0, 2, 4):
            s = scores[f'{i}.weight']
            for o in (0, m.weight.shape[0] - 1):
                ins = range(m.weight.shape[1]) if i != 2 else range(2 * (o // 3), 2 * (o // 3) + 2)
                for k, c in enumerate(ins):
                    assert torch.allclose(
                        s[o, k], m.weight[o, k].abs() * (h[:, c] if i == 4 else h[:, c].flatten()).norm(), rtol=1e-4
                    )
        h = m(h)


@pytest.mark.parametrize(
    'name', sorted(n for n, f in CRITERIA.items() if n != 'taylor' and 'previous' not in asks_for(f))
)
def test_pruning_leaves_everything_else_as_it_was(name, device):
    criterion = CRITERIA[name]
    learn = make(digits_convnet(widths=(4, 8)).to(device))
    learn.create_opt()
    learn.model.eval()
    state = {n: t.clone() for n, t in learn.model.state_dict().items()}
    for p in learn.model.parameters():
        p.grad = torch.ones_like(p)
    rng, order = torch.get_rng_state(), learn.dls.train.rng.getstate()
    learn.prune(
        0.5,
        criterion=criterion,
        iterations=3,
        scope='local' if name in ('wanda', 'obs') else 'global',
        **({'initial': state} if 'initial' in asks_for(criterion) else {}),
    )
    for n, t in learn.model.state_dict().items():
        assert torch.equal(t, state[n] * learn.masks[n] if n in learn.masks else state[n]), n
    assert (
        torch.equal(rng, torch.get_rng_state()) and order == learn.dls.train.rng.getstate() and not learn.model.training
    )
    assert all((p.grad == 1).all() for p in learn.model.parameters())
    total = sum(m.numel() for m in learn.masks.values())
    assert abs(learn.masks.n_kept - total / 2) <= 2


def test_in_training_with_what_they_ask_for(fit):
    for criterion in (movement, large_init, updating_movement, snip, partial(snip, n_batches=2)):
        learn = make(bs=256)
        fit(learn, 1, cbs=SparsifyCallback(0.8, criterion=criterion, interval=3))
        assert all(int((~m).sum()) == round(0.8 * m.numel()) for m in learn.masks.values())


def deep():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Linear(100, 3),
        nn.ReLU(),
        nn.Linear(3, 10),
    )


def test_synflow_leaves_every_layer_alive_where_others_empty_one():
    learn = make(deep())
    learn.prune(0.999, criterion=synflow, scope='global')
    assert all(m.any() for m in learn.masks.values())
    for criterion in (snip, None):
        learn = make(deep())
        learn.model[5].weight.data.mul_(0.01)
        with pytest.warns(UserWarning, match='layer collapse: no weight is left in'):
            learn.prune(0.999, scope='global', **({'criterion': criterion} if criterion else {}))
        report = learn.sparsity_report()
        assert report['empty'].any() and not all(m.any() for m in learn.masks.values())


def test_a_least_density_prevents_collapse():
    learn = make(deep())
    learn.model[5].weight.data.mul_(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.prune(0.99, scope='global', min_density=0.005)
    total = sum(m.numel() for m in learn.masks.values())
    assert all(
        m.sum() >= max(1, int(0.005 * m.numel())) for m in learn.masks.values()
    ) and learn.masks.n_kept == total - round(0.99 * total)
    assert 'empty' not in learn.sparsity_report()
    with pytest.raises(ValueError, match='min_density=0.1: .* would keep'):
        learn.prune(0.99, scope='global', min_density=0.1)


def test_lamp_by_hand():
    s = {'a': torch.tensor([3.0, 1, 2]), 'b': torch.tensor([[1.0, 1], [0, 0]])}
    got = lamp(s)
    assert (
        torch.allclose(got['a'], torch.tensor([1.0, 1 / 14, 4 / 13], dtype=torch.float64))
        and got['b'].max() == 1
        and (got['b'][1] == 0).all()
    )
    masks = compute_masks({n: torch.randn(50, k) for n, k in (('x', 3), ('y', 30))}, 0.9, 'lamp', absolute=True)
    assert masks.n_kept == 1650 - round(0.9 * 1650) and all(m.any() for m in masks.values())
    with pytest.raises(ValueError, match='negative'):
        compute_masks({'a': torch.tensor([-1.0, 2])}, 0.5, 'lamp')
    assert compute_masks(s, 0.5, 'uniform') == compute_masks(s, 0.5, 'local')


def test_erk_by_hand():
    "Three layers: the first is capped, the others share the rest in proportion to the sum of their sides"
    shapes = {'a': (2, 3), 'b': (50, 40), 'c': (30, 50)}
    pruned = layer_counts(shapes, 0.9, 'erk')
    total, kept = 6 + 2000 + 1500, {n: int(np.prod(s)) - pruned[n] for n, s in shapes.items()}
    assert sum(kept.values()) == total - round(0.9 * total)
    unit = sum(kept.values()) / (5 + 90 + 80)
    assert kept['a'] == 6 and 5 * unit > 6
    rest = sum(kept.values()) - 6
    assert abs(kept['b'] - rest * 90 / 170) < 1 and abs(kept['c'] - rest * 80 / 170) < 1
    even = layer_counts(shapes, 0.9, 'balanced')
    assert 6 - even['a'] == 6 and abs((2000 - even['b']) - (1500 - even['c'])) <= 1


def test_bad_input_leaves_the_model_alone():
    learn = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 10)))
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    frozen = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 10)))
    frozen.model[1].weight.requires_grad_(False)
    unused = make()
    unused.model.extra = nn.Linear(3, 3)
    unused.model.forward = lambda x: unused.model[3](unused.model[2](unused.model[1](unused.model[0](x))))
    soft = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(-1)))
    huge = make(nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(3)], nn.Linear(64, 10)))
    for p in huge.model.parameters():
        p.data.fill_(1e38)
    for m in list(huge.model)[1:]:
        m.double()
        m.weight.data.fill_(1e200)
    for l, kw, msg in (
        (frozen, dict(criterion=snip), "'1.weight' is frozen"),
        (frozen, dict(criterion=grasp), "'1.weight' is frozen"),
        (frozen, dict(criterion=taylor, n_batches=1), "'1.weight' is frozen"),
        (unused, dict(criterion=snip), "does not depend on 'extra.weight'"),
        (soft, dict(criterion=synflow), r"can't take '2' \(Softmax\)"),
        (huge, dict(criterion=synflow), 'infinite'),
        (learn, dict(criterion=movement), 'initial=...'),
        (learn, dict(criterion=updating_movement), 'last update'),
        (learn, dict(iterations=0), 'iterations=0'),
        (learn, dict(min_density=2), 'min_density=2'),
    ):
        with pytest.raises(ValueError, match=msg):
            l.prune(0.5, **kw)
        assert l.masks is None
    empty = make()
    empty.dls.train.dataset.x, empty.dls.train.dataset.y = empty.dls.train.dataset.x[:0], empty.dls.train.dataset.y[:0]
    empty.dls.train.n = 0
    for criterion in (snip, grasp, synflow):
        if criterion is synflow:
            empty.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with pytest.raises(ValueError, match='has no batches'):
            empty.prune(0.5, criterion=criterion)
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())


def test_cyclic_and_sculpt(learner):
    learn = learner(opt_func=partial(SGD, mom=0.9))
    learn.prune(0.8, criterion=random_score, scope='erk')
    masks = learn.masks
    ends = quietly(learn, learn.fit_cycles, 3, 1, lr=0.1, ends=True)
    n, lrs = len(learn.dls.train), learn.recorder.lrs
    assert (
        len(ends) == 3
        and np.allclose(lrs[:n], lrs[n : 2 * n])
        and np.allclose(lrs[:n], lrs[2 * n :])
        and learn.masks == masks
    )
    assert all(torch.equal(t, learn.model.state_dict()[k]) for k, t in ends[-1].items())
    learn = learner(opt_func=partial(SGD, mom=0.9))
    cb = quietly(learn, learn.fit_sculpt, 0.9, 0.5, 2, 1, lr=0.1)
    total = sum(m.numel() for m in learn.masks.values())
    assert learn.masks.n_kept == total - round(0.9 * total) and len(learn.recorder.values) == 3
    assert cb.reached[2 * n - 2] == pytest.approx(0.5, abs=1e-3) and cb.reached[2 * n - 1] == learn.masks.sparsity
    for kw, msg in (
        (dict(start_sparsity=0.95), 'start_sparsity=0.95 is above'),
        (dict(n_cycles=0), 'n_cycles=0'),
        (dict(epochs_per_cycle=0), 'epochs_per_cycle=0'),
    ):
        fresh = learner()
        with pytest.raises(ValueError, match=msg):
            fresh.fit_sculpt(**{**dict(sparsity=0.9, start_sparsity=0.5, n_cycles=2, epochs_per_cycle=1), **kw})
        assert fresh.masks is None


class Odd(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(64, 20), nn.Linear(20, 10), f

    def forward(self, x):
        return self.f(self, x.flatten(1))


@pytest.mark.parametrize(
    'f,msg',
    [
        (lambda m, x: torch.log_softmax(m.b(m.a(x)), 1), 'in proportion'),
        (lambda m, x: m.b(nn.functional.layer_norm(m.a(x), (20,))), 'in proportion|negative'),
        (lambda m, x: {'out': m.b(m.a(x))}, 'got dict'),
        (lambda m, x: m.b(torch.ones_like(m.a(x))), 'in proportion'),
    ],
)
def test_synflow_says_what_it_can_not_take(f, msg):
    learn = make(Odd(f))
    before = state_of(learn)
    with pytest.raises(ValueError, match=msg):
        learn.prune(0.9, criterion=synflow, scope='global')
    assert learn.masks is None and all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())


def test_synflow_says_that_a_weight_is_computed():
    with pytest.raises(ValueError, match='weight_norm'):
        make(nn.Sequential(nn.Flatten(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))).prune(
            0.5, criterion=synflow
        )


@pytest.mark.parametrize('act', [nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU])
def test_synflow_through_bounded_activations_is_that_of_a_linear_one(act):
    torch.manual_seed(0)
    a, b = nn.Linear(64, 20), nn.Linear(20, 10)
    scores = [
        synflow(prunable_weights(m), make(m))
        for m in (nn.Sequential(nn.Flatten(), a, f, b) for f in (nn.Identity(), act()))
    ]
    for n, s in scores[0].items():
        t = scores[1][n]
        assert torch.allclose(t / t.sum(), s / s.sum(), rtol=1e-6)


def test_synflow_with_batchnorm_that_starts_at_zero_and_a_scale():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.bn, self.b = (
                nn.Linear(64, 20),
                nn.Parameter(torch.full((20,), 0.1)),
                nn.BatchNorm1d(20),
                nn.Linear(20, 10),
            )
            nn.init.zeros_(self.bn.weight)

        def forward(self, x):
            return self.b(self.bn(self.a(x.flatten(1)) * self.g))

    learn = make(Scaled())
    scores = synflow(prunable_weights(learn.model), learn)
    assert all(s.all() for s in scores.values()) and float(scores['a.weight'].sum()) == pytest.approx(
        float(scores['b.weight'].sum()), rel=1e-5
    )


@pytest.mark.parametrize('criterion', [grasp, small_magnitude, snip])
def test_blocks_in_steps_are_exact(criterion):
    learn = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 12)))
    learn.prune(0.5, criterion=criterion, granularity='2:4', iterations=5)
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in learn.masks.values())
    learn.prune(0.5, criterion=small_magnitude, granularity='2:4', recover=False)
    assert learn.masks.sparsity == 0.5
    learn.prune(0.4, granularity='2:4', min_density=0.1)


def test_taylor_in_steps_asks_anew():
    masks = []
    for i in (1, 5):
        learn = make(deep())
        learn.prune(0.9, criterion=taylor, scope='global', n_batches=2, iterations=i)
        masks.append(learn.masks)
    assert masks[0] != masks[1] and masks[0].n_kept == masks[1].n_kept


def test_what_initial_may_be():
    learn = make(deep())
    learn.prune(0.5, criterion=movement, initial=deepcopy(learn.model))
    for initial, msg in (
        ({}, 'got none'),
        (3, 'initial=int'),
        ({'1.weight': torch.ones(1)}, r'got \(1,\)'),
        ({'1.weight': None}, 'NoneType'),
    ):
        with pytest.raises(ValueError, match=msg):
            learn.prune(0.5, criterion=movement, initial=initial)


def test_lamp_under_weight_norm():
    learn = make(
        nn.Sequential(
            nn.Flatten(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 20)), nn.ReLU(), nn.Linear(20, 10)
        )
    )
    learn.prune(0.9, scope='lamp')
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_least_density_in_units():
    learn = make(
        nn.Sequential(
            nn.Conv2d(1, 10, 3),
            nn.ReLU(),
            nn.Conv2d(10, 10, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(10, 10),
        )
    )
    learn.prune(0.6, scope='global', granularity='filter', exclude='5*', min_density=0.34)
    assert all(m.flatten(1).any(1).sum() >= 4 for m in learn.masks.values())
    with pytest.raises(ValueError, match='sets the sparsity of each tensor'):
        make(nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(), nn.Linear(1, 4))).prune(0.9, min_density=0.1)


@pytest.mark.filterwarnings('ignore')
def test_a_compiled_model_gets_the_plain_tensors_of_a_fit():
    learn = make()
    ds = learn.dls.train.dataset
    dl = TfmdDL([(TensorImage(x), TensorCategory(y)) for x, y in zip(ds.x[:64], ds.y[:64], strict=True)], bs=32)
    learn.dls = DataLoaders(dl, dl)
    assert isinstance(learn.dls.one_batch()[0], TensorImage)
    learn.model.compile(backend='eager', dynamic=False)
    quietly(learn, learn.fit, 1, 1e-2)
    learn.prune(0.5, criterion=taylor, n_batches=2)
    assert learn.masks.sparsity == pytest.approx(0.5, abs=1e-3)


class Plain:
    "Batches of a training without fastai: two of them, a model and a loss"

    def __init__(self, model, loss_func, data):
        self.model, self.loss_func, self.data = model, loss_func, data

    def undisturbed(self):
        return nullcontext()

    training = evaluating = undisturbed

    def inputs(self):
        return (self.data[0][0],)

    def take(self, n):
        return self.data[:n]

    def balanced(self, per_class):
        return None

    def losses(self, batches, temperature=None):
        return nullcontext(self.loss_func(self.model(x) / (temperature or 1), y) for x, y in batches)

    def predictions(self, n):
        return (self.model(x) for x, _ in self.data[:n])

    def prediction_of(self, output):
        return output

    @contextmanager
    def summed_gradients(self, n):
        self.model.zero_grad()
        for x, y in self.data[:n]:
            self.loss_func(self.model(x), y).backward()
        yield

    def mean(self, t):
        return t


@pytest.mark.parametrize('criterion', [snip, grasp, fisher, synflow, wanda])
def test_criteria_with_batches_of_a_plain_loop(criterion):
    "The same scores as with a Learner that has the same batches, and an error that says what is missing without any"
    learn = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)))
    plain = Plain(learn.model, F.cross_entropy, batches(learn, 2))
    weights, n = prunable_weights(learn.model), {} if criterion is synflow else dict(n_batches=2)
    assert isinstance(plain, Batches) and not isinstance(learn, Batches)
    want = criterion(weights, learn, **n)
    scores, absolute = ranked(criterion, weights, learn.model, batches=plain, **n)
    for name, s in scores.items():
        assert not absolute and torch.allclose(s, want[name], rtol=1e-4, atol=1e-8)
    with pytest.raises(
        ValueError, match=f'criterion {criterion.__name__} asks for `batches`, and there are none: give'
    ):
        ranked(criterion, weights, learn.model)
    with pytest.raises(
        ValueError, match='batches=list: needs a `fastprune.core.protocol.Batches`, or a fastai Learner'
    ):
        criterion(weights, plain.data)


def test_what_criteria_say_that_they_need():
    assert {n: asks_for(f) for n, f in CRITERIA.items() if asks_for(f)} == {
        **dict.fromkeys(['snip', 'grasp', 'fisher', 'wanda', 'obs'], {'batches', 'n_batches'}),
        'synflow': {'batches'},
        **dict.fromkeys(
            [
                *('movement', 'magnitude_increase', 'large_init', 'small_init'),
                *('large_init_large_final', 'small_init_small_final'),
            ],
            {'initial'},
        ),
        **dict.fromkeys(['updating_movement', 'updating_magnitude_increase', 'updating_movmag'], {'previous'}),
    }
    assert [n for n, f in CRITERIA.items() if ranks_magnitude(f)] == ['magnitude']
    assert asks_for(partial(snip, n_batches=2)) == {'batches'} and ranks_magnitude(partial(magnitude))
    assert usual_iterations(partial(synflow)) == 100 and usual_iterations(snip) == usual_iterations(len) == 1


@pytest.mark.parametrize('how', ['prune', 'fit'])
def test_needs_by_the_names_of_parameters_for_one_release(how):
    "With a warning that shows the decorator, which takes its place"

    def by_name(weights, learn, initial):
        return {n: (p.detach() - initial[n]).abs() + len(learn.dls.train) for n, p in weights.items()}

    masks = []
    for criterion in (by_name, partial(by_name), needs('learn', 'initial')(lambda *args, **kw: by_name(*args, **kw))):
        learn = make()
        first = deepcopy(learn.model.state_dict()) if how == 'prune' else None
        seed_round(learn, 0)
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            if how == 'prune':
                learn.prune(0.5, criterion, initial=first)
            else:
                quietly(learn, learn.fit, 1, 1e-2, cbs=SparsifyCallback(0.5, criterion=criterion))
        said = [str(o.message) for o in w if o.category is FutureWarning and 'criterion' in str(o.message)]
        assert all("Write `@needs('initial', 'learn')` above `def by_name`" in o for o in said)
        assert bool(said) == (len(masks) < 2)
        masks.append(learn.masks)
    assert masks[0] == masks[1] == masks[2]


def test_scores_of_float16_do_not_underflow():
    "Products of weights and gradients that float16 has no numbers for"
    weight = nn.Parameter((1e-3 * (1 + torch.rand(10, 64))).half())
    weight.grad = 1e-6 * (1 + torch.rand(10, 64)).half()
    scores = taylor({'w': weight})['w']
    assert torch.equal(scores, (weight.detach().float() * weight.grad.float()).abs()) and scores.all()


def test_dead_filters_keep_their_order_in_float16():
    scores = torch.tensor([[1e-3, 2e-3, 3e-3], [1.0, 2.0, 3.0]], dtype=torch.float16)
    masks = Masks({'w': torch.tensor([[False] * 3, [True] * 3])})
    last = _dead_last({'w': scores}, masks, True, {})['w']
    assert (last[0].diff() > 0).all() and last[0].max() < last[1].min()
