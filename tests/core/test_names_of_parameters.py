"A parameter has up to three names: in named_modules(), named_parameters() and state_dict(); and extra state"

import copy

import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from helpers import equal
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastprune.all import Checkpoint, SparsifyCallback, Ticket, load_sparse, movement, prunable_weights, state_of
from fastprune.core import names
from fastprune.core.files import load_state, save_state
from fastprune.core.layouts import transposed_groups

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def net():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def wrapped_layer():
    m = net()
    m[0] = checkpoint_wrapper(m[0])
    return m


def renamed():
    "A state_dict with old names, as models have it whose layers were renamed"
    m = net()

    def save(module, state, prefix, meta):
        for k in list(state):
            state[k.replace('0.', 'encoder.', 1) if k.startswith('0.') else k] = state.pop(k)

    def load(module, state, prefix, *args):
        for k in list(state):
            state[k.replace('encoder.', '0.', 1)] = state.pop(k)

    m._register_state_dict_hook(save)
    m.register_load_state_dict_pre_hook(load)
    return m


def turned():
    m = nn.Sequential(
        nn.Unflatten(1, (4, 4, 4)),
        checkpoint_wrapper(nn.ConvTranspose2d(4, 8, 1)),
        nn.Flatten(),
        checkpoint_wrapper(nn.utils.parametrizations.weight_norm(nn.Linear(128, 4))),
    )
    return m


def in_a_list():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.ParameterList([torch.randn(64, 16), torch.randn(16, 4)])

        def forward(self, x):
            return x @ self.w[0] @ self.w[1]

    return checkpoint_wrapper(Lists())


kinds = {
    'plain': net,
    'a wrapped layer': wrapped_layer,
    'a wrapped model': lambda: checkpoint_wrapper(net()),
    'renaming hooks': renamed,
    'wrapped twice': lambda: checkpoint_wrapper(wrapped_layer()),
    'others wrapped': turned,
    'a list': in_a_list,
}


def make(model, path='.', **kwargs):
    xs = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))  # the same data in each Learner
    dl = DataLoader([(x, torch.tensor(i % 4)) for i, x in enumerate(xs)], bs=16, drop_last=True)
    return Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(), path=path, **kwargs)


def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args, **kwargs)
    return learn


def exact(learn, s=0.9):
    weights = dict(learn.model.named_parameters())
    return (
        set(learn.masks) <= set(weights)
        and all(torch.equal(weights[n] != 0, m) for n, m in learn.masks.items())
        and learn.masks.sparsity == pytest.approx(s, abs=0.01)
    )


@pytest.mark.parametrize('kind', kinds)
def test_a_sparse_file_keeps_all_masks(kind, tmp_path):
    learn = make(kinds[kind]())
    learn.prune(0.9, scope='global')
    assert exact(learn)
    learn.save_sparse(tmp_path / 's')
    other = make(kinds[kind]())
    other.load_sparse(tmp_path / 's')
    assert other.masks == learn.masks and len(other.masks) == len(prunable_weights(learn.model)) and exact(other)
    assert list(load_sparse(tmp_path / 's')) == list(learn.model.state_dict())
    assert exact(fit(other, 1, 1e-3))


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', kinds)
def test_tickets(kind, tmp_path):
    learn = make(kinds[kind]())
    tickets = learn.find_tickets(
        1, lambda learn, cbs: fit(learn, 1, 1e-3, cbs=cbs), prune_rate=0.9, folder=tmp_path / 'f'
    )
    tickets[1].save(tmp_path / 't')
    back = Ticket.load(tmp_path / 't')
    assert (
        back.masks == tickets[1].masks
        and all(equal(t, back.state[n]) for n, t in tickets[1].state.items())
        and back.names == tickets[1].names
    )
    other = make(kinds[kind]())
    for t in (back, back.reinit(1), back.shuffle(1), back.dense()):
        other.load_ticket(t)
        assert all(
            equal(p, t.state[t.names.get(n, n)] * (t.masks[n] if n in t.masks else 1))
            for n, p in other.model.named_parameters()
        )
    assert len(Ticket.load(tmp_path / 'f' / 'ticket_01.safetensors').masks) == len(prunable_weights(learn.model))
    assert (
        learn.linear_path(tickets[0], back, n=2).losses.shape == (2,)
        and learn.sign_flips(tickets[0]).loc['total', 'weights'] > 0
    )


@pytest.mark.parametrize('kind', kinds)
def test_training_checkpoints_and_reports(kind, tmp_path):
    learn = make(kinds[kind](), tmp_path)
    first, start = copy.deepcopy(learn.model.state_dict()), kinds[kind]()
    start.load_state_dict(first)
    fit(learn, 2, 1e-3, cbs=[SparsifyCallback(0.9, scope='global'), Checkpoint('c')])
    assert exact(learn) and learn.sparsity_report().loc['total', 'sparsity'] == pytest.approx(learn.masks.sparsity)
    other = fit(make(start, tmp_path), 2, 1e-3, cbs=[SparsifyCallback(0.9, scope='global'), Checkpoint('c')])
    assert other.masks == learn.masks and exact(other)
    if kind != 'others wrapped':
        learn.remove_masks()
        for init in (first, {n: first[names.state_names(learn.model)[n]] for n in prunable_weights(learn.model)}):
            learn.prune(0.5, criterion=movement, initial=init)
    assert set(names.state_names(learn.model).values()) == {k for k in learn.model.state_dict()}


def test_layouts_are_found_in_wrapped_layers():
    assert transposed_groups(turned()) == {'1._checkpoint_wrapped_module.weight': 1}
    assert transposed_groups(checkpoint_wrapper(nn.Sequential(nn.ConvTranspose2d(4, 8, 1)))) == {'0.weight': 1}
    learn = make(turned())
    learn.prune(0.97, scope='global')
    assert next(m for n, m in learn.masks.items() if 'original1' in n).any(1).all()


def test_a_state_dict_without_a_weight():
    m = net()

    def drop(module, state, prefix, meta):
        state.pop('0.weight')

    m._register_state_dict_hook(drop)
    learn = make(m)
    with pytest.raises(ValueError, match="state_dict has no '0.weight'"):
        learn.find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=cbs))
    learn.prune(0.5)
    with pytest.raises(ValueError, match="state_dict has no '0.weight'"):
        learn.save_sparse('nowhere')


class Counter(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        if self.training and type(self.value) is dict and 'n' in self.value:
            self.value['n'] += 1
        return x

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, v):
        self.value = v


def counting(value):
    return nn.Sequential(*net(), Counter(value))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'value', [{'n': 3, 'rate': 0.5, 'names': ['a', None]}, 7, None, 'text', torch.arange(3.0), [1.5, True]], ids=str
)
def test_extra_state_goes_everywhere(value, tmp_path):
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b and type(a) is type(b)
    learn = make(counting(copy.deepcopy(value)), tmp_path)
    learn.prune(0.5)
    learn.save_sparse(tmp_path / 's')
    other = make(counting(0), tmp_path)
    other.load_sparse(tmp_path / 's')
    assert same(other.model[3].value, value) and other.masks == learn.masks
    save_state(learn.model.state_dict(), tmp_path / 'd')
    assert same(load_state(tmp_path / 'd')['3._extra_state'], value)
    tickets = learn.find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=cbs), folder=tmp_path / 'f')
    tickets[0].save(tmp_path / 't')
    assert same(Ticket.load(tmp_path / 't').state['3._extra_state'], value)
    other.load_ticket(Ticket.load(tmp_path / 't'))
    assert same(other.model[3].value, value)
    learn.remove_masks()
    start = copy.deepcopy(learn.model)
    if not torch.is_tensor(value):
        start[3].value = 0
    fit(learn, 2, cbs=[SparsifyCallback(0.9), Checkpoint('c')])
    other = fit(make(start, tmp_path), 2, cbs=[SparsifyCallback(0.9), Checkpoint('c')])
    assert same(other.model[3].value, learn.model[3].value) and other.masks == learn.masks
    assert learn.linear_path(learn, state_of(other), n=2).losses.shape == (2,)


def test_extra_state_in_memory_is_a_copy():
    learn = make(counting({'n': 0, 'what': {1, 2}}))
    tickets = learn.find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=cbs))
    assert tickets[0].state['3._extra_state'] == {'n': 0, 'what': {1, 2}} and learn.model[3].value['n'] == 0


class Trained(Callback):
    def before_batch(self):
        raise AssertionError('training has begun')


@pytest.mark.parametrize('value', [{1, 2}, (1, 2), {'a': (1,)}, object(), b'bytes'], ids=lambda v: type(v).__name__)
def test_extra_state_that_no_file_can_keep_is_refused_before_training(value, tmp_path):
    learn = make(counting(value), tmp_path, cbs=Trained())
    run = lambda learn, cbs: fit(learn, 1, cbs=cbs)
    for what in (
        lambda: learn.find_tickets(1, run, folder=tmp_path / 'f'),
        lambda: fit(learn, 1, cbs=Checkpoint('c')),
        lambda: learn.save_sparse(tmp_path / 's'),
        lambda: learn.iterative_prune(1, 1, folder=tmp_path / 'g'),
    ):
        with pytest.raises(ValueError, match=f"state '3._extra_state' is a {type(value).__name__}"):
            what()
    assert not list(tmp_path.glob('**/*.safetensors'))
