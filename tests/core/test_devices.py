"Devices without float64, and devices whose numbers take a while to read"

import contextlib
import copy
from functools import partial

import pytest
import torch
from fastai.basics import DataLoader
from helpers import quietly
from modes import forbid_float64, forbid_reads
from torch import nn

from fastprune.all import GSM, SignFlips, allr_discount, prunable_weights, synflow, taylor
from fastprune.analysis.states import point_setter
from fastprune.core.devices import pretend
from fastprune.core.later import Checks, delayed_checks
from fastprune.core.scopes import lamp
from fastprune.criteria.brain_surgeon import obs
from fastprune.criteria.flows import wanda
from fastprune.criteria.gradients import fisher, grasp, snip
from fastprune.criteria.ranking import ranked
from fastprune.criteria.weights import random_score
from fastprune.recipes.ticket import weight_distributions
from fastprune.testing import same
from fastprune.zoo.learners import digits_learner
from fastprune.zoo.models import digits_convnet


def moved(learn):
    "The state of a Learner's model, and the same with other weights"
    a = learn.model.state_dict()
    return copy.deepcopy(a), {n: t + 0.1 if t.is_floating_point() else t for n, t in a.items()}


def scores_of(criterion, **kwargs):
    return lambda learn: criterion(prunable_weights(learn.model), learn, **kwargs)


def pruned(*args, **kwargs):
    def f(learn):
        learn.prune(*args, **kwargs)
        return {**learn.masks, 'change': torch.tensor(learn.keep_masks.change)}

    return f


def reconstructed(learn):
    learn.prune(0.8, reconstruct=2)
    return {n: p.detach() for n, p in learn.model.named_parameters()}


def hard_end(learn):
    cb = GSM(0.8)
    quietly(learn, learn.fit, 1, 1e-3, cbs=cb)
    return torch.tensor(cb.hard.values.tolist())


def discount(learn):
    a, b = moved(learn)
    return torch.tensor(allr_discount(a, b, 0.5))


def shrunk(learn):
    pytest.importorskip('torch_pruning', reason='shrink needs torch-pruning')
    learn.prune(0.5, granularity='filter', exclude=nn.Linear)
    learn.shrink()
    return {n: t.detach().clone() for n, t in learn.model.state_dict().items()}


WIDE = {
    'wanda': scores_of(wanda, n_batches=3),
    'obs': scores_of(obs, n_batches=3),
    'reconstruct': reconstructed,
    'synflow': scores_of(synflow),
    'learn.prune by synflow': pruned(0.9, synflow, 'global', iterations=3),
    'lamp': lambda learn: lamp({n: p.abs() for n, p in prunable_weights(learn.model).items()}),
    'scope lamp': pruned(0.8, scope='lamp'),
    'scope lamp, min_density': pruned(0.8, scope='lamp', min_density=0.05),
    'allr_discount': discount,
    'linear_path': lambda learn: torch.tensor(learn.linear_path(*moved(learn), n=3).losses),
    'plane': lambda learn: torch.tensor(learn.plane(*moved(learn), digits_convnet(widths=(8, 16, 16)), n=2).losses),
    'sensitivity': lambda learn: torch.tensor(learn.sensitivity([0.5], metric='loss').values),
    'hessian_spectrum': lambda learn: torch.tensor(learn.hessian_spectrum(1).copy()),
    'hard end': hard_end,
    'shrink': shrunk,
    'weight_distributions': lambda learn: torch.tensor(
        [o[:2] for o in weight_distributions(dict(learn.model.named_parameters())).values()]
    ),
}


def same_numbers(a, b, name=None):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(same_numbers(a[n], b[n], name) for n in a)
    if a.dtype != b.dtype:
        return False
    atol = 1e-5 * float(a.abs().max()) if name == 'reconstruct' else 1e-8  # where there is float64, a CPU uses float32
    return torch.allclose(a, b.to(a.device), rtol=1e-5, atol=atol)


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', WIDE)
def test_no_float64_on_a_device_without_it(name, tmp_path):
    want = WIDE[name](digits_learner(tmp_path))
    learn = digits_learner(tmp_path)
    with forbid_float64():
        got = WIDE[name](learn)
    assert same_numbers(want, got, name)


# reading numbers


def reads_of(f, *args, **kwargs):
    "What `f` reads from the device"
    with forbid_reads(most=100, except_in=[DataLoader.__iter__]) as reads:
        f(*args, **kwargs)
    return reads.found


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'criterion', [synflow, snip, partial(grasp, n_batches=1), partial(fisher, group_size=16), random_score]
)
@pytest.mark.parametrize('kwargs', [{}, dict(min_density=0.01), dict(recover=False)], ids=str)
def test_prune_reads_only_at_the_end_of_all_steps(criterion, kwargs, tmp_path):
    def found(steps):
        learn = digits_learner(tmp_path)
        return reads_of(learn.prune, 0.9, criterion, 'global', iterations=steps, **kwargs)

    few, many = found(2), found(12 if criterion is synflow else 4)
    assert few == many and len(many) <= 5, many


def test_the_same_masks_as_with_reads(tmp_path):
    learn, other = digits_learner(tmp_path), digits_learner(tmp_path)
    learn.prune(0.95, synflow, 'global', iterations=5, min_density=0.01)
    with pretend():
        other.prune(0.95, synflow, 'global', iterations=5, min_density=0.01)
    assert learn.masks == other.masks and learn.keep_masks.change == other.keep_masks.change


class Negative(nn.Module):
    def forward(self, x):
        return -x


WRONG = {
    'not proportional': (nn.Softplus(), {}, 'criterion synflow: .*not in proportion to its input'),
    'negative': (Negative(), {}, "criterion synflow: synflow: the flow turns negative behind '0.0.weight'"),
    'infinite': (nn.Identity(), dict(scale=1e300), "criterion synflow: synflow: the score of '0.0.weight' is infinite"),
    'min_density': (nn.Identity(), dict(min_density=0.2), "min_density=0.2: '0.0.weight' would keep"),
}


@pytest.mark.parametrize('name', WRONG)
def test_the_right_error_before_any_mask_is_set(name, tmp_path):
    layer, kwargs, message = WRONG[name]
    model = nn.Sequential(*digits_convnet(widths=(8, 16, 16)), layer)
    learn = digits_learner(tmp_path, model=model.double() if 'scale' in kwargs else model)
    with torch.no_grad():
        for p in learn.model.parameters():
            p.mul_(kwargs.get('scale', 1))
    kwargs = {k: v for k, v in kwargs.items() if k != 'scale'}
    before, errors = {n: t.clone() for n, t in learn.model.state_dict().items()}, []
    for device in (contextlib.nullcontext, pretend):
        with device(), pytest.raises(ValueError, match=message) as e:
            learn.prune(0.95, synflow, 'local', iterations=3, **kwargs)
        errors.append(str(e.value))
        assert learn.masks is None and same(before, learn.model.state_dict())
    assert errors[0] == errors[1]


def zero_gradients():
    w = {'a': nn.Parameter(torch.ones(3)), 'b': nn.Parameter(torch.ones(2, 2))}
    for p in w.values():
        p.grad = torch.zeros_like(p)
    return w


def test_taylor_reads_nothing_in_training():
    weights, checks = zero_gradients(), Checks()
    with forbid_reads(), delayed_checks(checks):
        scores, _ = ranked(taylor, weights, nn.Identity())
    assert not scores['a'].any()
    with pytest.raises(ValueError, match='criterion taylor: taylor needs gradients, and all are 0'):
        checks.look(wait=True)
    weights['b'].grad[0, 1] = -3
    with forbid_reads(), delayed_checks(checks):
        scores, _ = ranked(taylor, weights, nn.Identity())
    checks.look(wait=True)
    assert scores['b'].tolist() == [[0, 3], [0, 0]]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('sign', [1, -1, 0])
def test_dead_filters_rank_last_without_reads(sign, dtype):
    torch.manual_seed(0)
    scores = {n: torch.randn(s).to(dtype) * 3 for n, s in dict(a=(6, 3, 2, 2), b=(5, 7)).items()}
    scores = {n: s.abs() * sign if sign else s for n, s in scores.items()}
    masks = {n: torch.rand(s.shape[0], *[1] * (s.ndim - 1)).expand(s.shape) > 0.5 for n, s in scores.items()}
    criterion = lambda weights: scores
    want, _ = ranked(criterion, scores, nn.Identity(), masks)
    with forbid_reads():
        got, _ = ranked(criterion, scores, nn.Identity(), masks)
    assert same(want, got) and not same(want, scores)


def test_lamp_reads_nothing_in_training():
    torch.manual_seed(0)
    scores = {'a': torch.rand(30, 4), 'b': torch.tensor([1.0, torch.inf, 0, 2])}
    want, checks = lamp(scores), Checks()
    with forbid_reads(), delayed_checks(checks):
        got = lamp(scores)
    checks.look(wait=True)
    assert same(want, got)
    with forbid_reads(), delayed_checks(checks):
        lamp({**scores, 'b': -scores['b']})
    with pytest.raises(ValueError, match=r"scores\['b'\] has negative scores"):
        checks.look(wait=True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_lamp_ranks_infinite_scores_by_their_number_alone(dtype):
    "Not by how a device rounds the sum of the others: so tensors share what is kept, and all devices agree"
    gen = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(size, generator=gen).to(dtype) for n, size in dict(a=700, b=3000, c=90000).items()}
    for s in scores.values():
        s[::10] = torch.inf
    want = lamp(scores)
    for n, s in want.items():
        assert torch.equal(s[::10].sort(descending=True).values, 1 / torch.arange(1, len(s[::10]) + 1).to(s)), n
    with pretend():
        assert all(torch.equal(s[::10], want[n][::10]) for n, s in lamp(scores).items())
    assert all(s[1] < m for s, m in ((s, s[::10].min()) for s in want.values()))


def test_evaluation_reads_once_a_point(tmp_path):
    "However many batches there are"
    learn, paths = digits_learner(tmp_path, metrics=[]), []
    a, b = moved(learn)
    found = [
        reads_of(lambda bs=bs: paths.append(learn.linear_path(a, b, n=3, dl=learn.dls.valid.new(bs=bs))))
        for bs in (64, 16)
    ]
    assert found[0] == found[1] and len(found[1]) <= 3, found[1]
    for path in paths:
        assert path.losses == pytest.approx(learn.linear_path(a, b, n=3).losses)


@pytest.mark.parametrize('weights', [2, 3])
def test_mixing_in_few_kernels_is_the_same(weights, tmp_path):
    learn = digits_learner(tmp_path)
    states = [*moved(learn), digits_convnet(widths=(8, 16, 16)).state_dict()][:weights]
    got = []
    for device in (contextlib.nullcontext, pretend):
        target = {n: torch.zeros_like(t) for n, t in states[0].items()}
        with device():
            point_setter(learn, target, states, [], 'interpolate')((0.25, 0.75) if weights == 2 else (0.5, 0.75, -0.25))
        got.append(target)
    assert same(*got) and not same(got[0], states[0])


TABLES = {
    'report': lambda learn: learn.sparsity_report(),
    'flops': lambda learn: learn.flops(),
    'sign_flips': lambda learn: learn.sign_flips(*moved(learn)),
    'allr_discount': discount,
    'weight_distributions': lambda learn: weight_distributions(dict(learn.model.named_parameters())),
}


@pytest.mark.parametrize('name', TABLES)
def test_tables_read_all_tensors_together(name, tmp_path):
    learn = digits_learner(tmp_path)
    learn.prune(0.5)
    want = TABLES[name](learn)
    tables = []
    found = reads_of(lambda: tables.append(TABLES[name](learn)))
    assert len(found) <= 2, found
    assert str(tables[0]) == str(want)


def test_sign_flips_of_a_fit_are_read_at_its_end(tmp_path):
    learn, other, cbs = digits_learner(tmp_path), digits_learner(tmp_path), [SignFlips(2), SignFlips(2)]
    quietly(learn, learn.fit, 1, 0.02, cbs=cbs[0])
    with pretend():
        quietly(other, other.fit, 1, 0.02, cbs=cbs[1])
    assert cbs[0].flips == cbs[1].flips and all(type(k) is int for k in cbs[1].flips)
