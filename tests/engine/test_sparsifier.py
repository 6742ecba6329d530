"The engine in plain PyTorch loops: what every method promises in a fit holds there, too"

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

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
    SparsifyCallback,
    cubic,
    cyclical,
    linear,
    movement,
    one_shot,
    snip,
)
from fastprune.engine.keep import MaskKeeper
from fastprune.engine.method import Method
from fastprune.engine.sparsifier import Sparsifier

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

METHODS = {
    'Method': Method,
    'global': partial(Method, scope='global', schedule=cyclical(cubic, 2), track=True),
    'nested': partial(Method, recover=False, criterion=movement, interval=3),
    'callback': SparsifyCallback,
    'GMP': GMP,
    'DPF': DPF,
    'DNW': DNW,
    'GSM': GSM,
    'LC': LC,
    'GradualL2': GradualL2,
    'STR': partial(STR, s_init=-4),
    'DST': partial(DST, alpha=1e-3),
    'RigL': RigL,
    'SET': SET,
    'SNFS': SNFS,
}
OPTIMIZERS = {
    'sgd': partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    'adamw': partial(torch.optim.AdamW, lr=1e-2),
    'adam': partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-3),
}
every = pytest.mark.parametrize('make', METHODS.values(), ids=METHODS)
T = 40
torch.manual_seed(0)
X, Y = torch.randn(64, 20), torch.randint(0, 3, (64,))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def start(method, optimizer='sgd', total_steps=T, **kwargs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, Sparsifier(model, method, total_steps=total_steps, optimizer=opt, **kwargs)


def loss_of(model):
    x, y = (t.to(model[0].weight.device) for t in (X, Y))
    return nn.functional.cross_entropy(model(x), y)


def step(model, opt, pruner):
    pruner.before_forward()
    loss_of(model).backward()
    pruner.step()
    opt.zero_grad()


def zeros_and_masks_agree(model, pruner):
    weights = dict(model.named_parameters())
    return all(not weights[n][~m].any() for n, m in pruner.masks.items())


def is_plain(model, opt):
    "Nothing but the model's parameters is in the optimizer"
    mine = {id(p) for p in model.parameters()}
    return sum(len(g['params']) for g in opt.param_groups) == len(mine) and {id(p) for p in opt.state} <= mine


@pytest.mark.sample(2)
@every
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_method(make, optimizer):
    model, opt, pruner = start(make(0.8), optimizer)
    names = list(model.state_dict())
    for _ in range(T):
        step(model, opt, pruner)
        assert pruner.masks is None or zeros_and_masks_agree(model, pruner)
        assert is_plain(model, opt)
        assert all(g.get('decoupled_weight_decay') in (None, optimizer == 'adamw') for g in opt.param_groups)
    pruner.finish()
    n = sum(m.numel() for m in pruner.masks.values())
    assert abs(pruner.masks.n_kept - 0.2 * n) <= 2 and zeros_and_masks_agree(model, pruner)
    assert list(model.state_dict()) == names and pruner.method.engine is None
    assert len(pruner.method.iters) == T and pruner.method.reached[-1] == pytest.approx(0.8, abs=2e-3)
    kept = pruner.masks
    step(model, opt, pruner)  # masks stay after the end
    assert pruner.masks == kept and zeros_and_masks_agree(model, pruner)


@pytest.mark.sample(2)
@every
def test_the_end_is_exact_without_the_last_steps(make):
    model, opt, pruner = start(make(0.8))
    for _ in range(T - 7):
        step(model, opt, pruner)
    pruner.finish()
    n = sum(m.numel() for m in pruner.masks.values())
    assert abs(pruner.masks.n_kept - 0.2 * n) <= 2 and zeros_and_masks_agree(model, pruner) and is_plain(model, opt)


@pytest.mark.sample(2)
@every
def test_a_state_goes_on(make):
    "To the bit, from a deep copy of what was there half way"
    whole, opt, pruner = start(make(0.8))
    for t in range(T):
        if t == 17:
            states = copy.deepcopy((whole.state_dict(), opt.state_dict(), pruner.state_dict()))
        step(whole, opt, pruner)
    pruner.finish()
    half, opt, other = start(make(0.8))
    half.load_state_dict(states[0])
    opt.load_state_dict(states[1])
    other.load_state_dict(states[2])
    for _ in range(17, T):
        step(half, opt, other)
    other.finish()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    assert other.masks == pruner.masks and other.method.reached == pruner.method.reached


@every
def test_stopped_in_a_step(make):
    model, opt, pruner = start(make(0.8))
    for _ in range(10):
        step(model, opt, pruner)
    pruner.before_forward()
    loss_of(model).backward()
    pruner.before_step()
    pruner.close()
    assert is_plain(model, opt) and (pruner.masks is None or zeros_and_masks_agree(model, pruner))
    assert not any(g.get('decoupled_weight_decay') for g in opt.param_groups)


def test_a_step_by_its_parts():
    "As in loops that call the optimizer themselves"
    a, opt, pruner = start(RigL(0.8))
    for _ in range(T):
        step(a, opt, pruner)
    b, opt, parts = start(RigL(0.8))
    replaced = 0
    for _ in range(T):
        loss_of(b).backward()
        if parts.before_step():
            opt.step()
        else:
            replaced += 1
        parts.after_step()
        opt.zero_grad()
    assert replaced == len(parts.method.changes) > 1 and parts.masks == pruner.masks
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_new_weights_start_without_momentum():
    model, opt, pruner = start(SET(0.8, interval=5))
    weight = model[0].weight
    for _ in range(5):
        step(model, opt, pruner)
    before = pruner.masks['0.weight']
    loss_of(model).backward()
    pruner.before_step()
    new = pruner.masks['0.weight'] & ~before
    assert new.any() and not opt.state[weight]['momentum_buffer'][new].any()


class Doubled(Method):
    def before_forward(self, weights):
        self.seen = getattr(self, 'seen', 0) + 1


def test_before_forward_is_asked_for():
    model, opt, pruner = start(Doubled(0.5))
    step(model, opt, pruner)
    assert pruner.method.seen == 1
    loss_of(model).backward()
    with pytest.raises(
        ValueError, match=r'Doubled changes weights before each forward pass: call `before_forward\(\)`'
    ):
        pruner.step()


class Half(Method):
    lasting = dict(start_sparsity=int)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: start(90), 'did you mean 0.9'),
        (lambda: start('x'), "sparsity='x'"),
        (lambda: start(0.5, total_steps=0), 'total_steps=0'),
        (lambda: start(Method(0.5, include='wrong')), 'wrong'),
        (lambda: start(Method(0.5, criterion=snip)), 'criterion snip asks for `batches`'),
        (lambda: start(STR(0.5, decay=0.1)), "torch's optimizers apply their own decay to thresholds"),
        (lambda: start(Half(0.5))[2].load_state_dict({}), "lasting: 'start_sparsity'"),
        (lambda: Sparsifier(nn.Linear(2, 2), 0.5, total_steps=1).step(), 'needs an optimizer'),
        (lambda: Sparsifier(nn.ReLU(), 0.5, total_steps=1), 'no weights that can be pruned'),
        (
            lambda: Sparsifier(nn.Sequential(nn.Embedding(5, 3)), 0.5, total_steps=1),
            r"named, as by include=\['0.weight'\]",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    'method, message',
    [
        (LC(0.9), 'LC needs weight decay'),
        (RigL(0.1), 'already sparser'),
        (SNFS(0.1), 'already sparser'),
        (STR(0.9, decay=0.1), 'apply their own decay'),
        (Method(0.9, initial={'wrong': 0.5}), 'wrong'),
    ],
)
def test_a_training_that_is_refused_holds_nothing(method, message):
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        model[0].weight[:20] = 0
    opt, keeper = torch.optim.SGD(model.parameters(), lr=0.1), MaskKeeper(model)
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, method, 4, opt, keeper=keeper)
    assert keeper.masks is None and method.engine is None


@pytest.mark.parametrize(
    'spoil',
    [
        lambda s: s.pop('counts'),
        lambda s: s.update(more=1),
        lambda s: s.update(last_step='x'),
        lambda s: s.update(masks={'0.weight': torch.ones(2)}),
        lambda s: s['dense'].update({'0.weight': torch.zeros(2)}),
    ],
    ids=['missing', 'more', 'type', 'masks', 'shape'],
)
def test_a_state_of_another_training(spoil):
    model, opt, pruner = start(DPF(0.8))
    for _ in range(3):
        step(model, opt, pruner)
    state = copy.deepcopy(pruner.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match='DPF'):
        start(DPF(0.8))[2].load_state_dict(state)


def test_zeros_of_a_model_are_its_masks():
    model = nn.Linear(10, 10)
    with torch.no_grad():
        model.weight[:6] = 0
    pruner = Sparsifier(model, Method(0.8, schedule=linear), total_steps=4)
    assert pruner.masks.sparsity == 0.6 and pruner.scheduled(0) == {'weight': pytest.approx(0.65)}


def test_embeddings_with_sparse_gradients():
    table = nn.Embedding(8, 4, sparse=True)
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    pruner = Sparsifier(table, Method(0.5, include='weight'), total_steps=2, optimizer=opt)
    for _ in range(2):
        table(torch.arange(4)).sum().backward()
        pruner.step()
        opt.zero_grad()
    assert pruner.masks.sparsity == 0.5 and zeros_and_masks_agree(table, pruner)
    with pytest.raises(ValueError, match='SparseAdam takes sparse gradients alone'):
        Sparsifier(table, Method(0.5, include='weight'), 2, torch.optim.SparseAdam(table.parameters()))


def test_a_layer_that_was_replaced():
    model, opt, pruner = start(DPF(0.8, schedule=one_shot))
    step(model, opt, pruner)
    model[2] = nn.Linear(32, 3)
    pruner.refresh(model)
    assert torch.equal(pruner.method.dense['2.weight'], model[2].weight.detach())
    model[2] = nn.Linear(32, 4)
    with pytest.raises(ValueError, match=r"'2.weight' had shape \(3, 32\) .* has \(4, 32\) now: DPF can't go on"):
        pruner.refresh(model)
