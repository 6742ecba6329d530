"Random numbers of accelerators go on as before, and with a checkpoint"

import contextlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import quietly
from torch import nn

from fastprune.all import digits_convnet, prunable_weights, sweep
from fastprune.core.generators import accelerator_states, forked_rng, has_accelerator, set_accelerator_states
from fastprune.criteria.ranking import try_criterion
from fastprune.deploy.constants import model_outputs
from fastprune.learner.batches import preserved_rng
from fastprune.testing import random_numbers_kept
from fastprune.training.state import check_rng_state, rng_state, set_rng_state
from fastprune.zoo.learners import digits_learner


class Accelerator:
    "Stands for torch's module of an accelerator: the random states of two devices"

    def __init__(self, used=True):
        self.used, self.states = used, [torch.full((16,), i, dtype=torch.uint8, device='cpu') for i in (3, 4)]

    def is_initialized(self):
        return self.used

    def device_count(self):
        return len(self.states)

    def get_rng_state(self, i):
        return self.states[i].clone()

    def set_rng_state(self, state, i):
        self.states[i] = state.clone()

    def manual_seed_all(self, seed):
        self.states = [torch.full((16,), seed % 256, dtype=torch.uint8, device='cpu') for _ in self.states]

    def draw(self, *args):
        self.used = True
        for s in self.states:
            s += 1

    def numbers(self):
        return [int(s[0]) for s in self.states]


@contextlib.contextmanager
def accelerated(kind='xpu', **kwargs):
    "torch is made for an accelerator"
    module, device = Accelerator(**kwargs), torch.device(kind)
    with (
        patch('torch.accelerator.current_accelerator', lambda: device),
        patch('torch.get_device_module', lambda device: module),
    ):
        yield module


@pytest.fixture
def xpu():
    with accelerated() as module:
        yield module


def a_criterion(f):
    def criterion(weights):
        f()
        return {n: p.abs() for n, p in weights.items()}

    return criterion


def drawing_network(f):
    class Draws(nn.Module):
        def forward(self, x):
            f()
            return x

    return nn.Sequential(Draws(), nn.Linear(4, 4))


def swept(f, folder):
    def method(learn, sparsity, seed):
        f()

    sweep(lambda seed: digits_learner(folder), {'m': method}, (0.5,), seeds=(0,), bar=False)


def contexts(context):
    def run(f, folder):
        with context():
            f()

    return run


USERS = {
    'forked_rng': contexts(forked_rng),
    'preserved_rng': contexts(preserved_rng),
    'random_numbers_kept': contexts(random_numbers_kept),
    'try_criterion': lambda f, _: try_criterion(a_criterion(f), prunable_weights(digits_convnet())),
    'model_outputs': lambda f, _: model_outputs(drawing_network(f), (torch.zeros(2, 4, device='cpu'),)),
    'sweep': swept,
}
MAKES_A_NETWORK = ('try_criterion', 'model_outputs')  # outside of the context


@pytest.mark.cpu_only  # where another device stands for the accelerator
@pytest.mark.parametrize('user', USERS)
def test_random_numbers_go_on(xpu, user, tmp_path):
    drawn = []
    state = torch.get_rng_state()
    USERS[user](lambda: drawn.append(xpu.draw()), tmp_path)
    assert drawn and xpu.numbers() == [3, 4]
    assert user in MAKES_A_NETWORK or torch.equal(torch.get_rng_state(), state)


@pytest.mark.cpu_only
def test_an_accelerator_that_was_not_used_is_left_alone():
    torch.manual_seed(7)
    with accelerated(used=False) as xpu:
        with patch.object(xpu, 'get_rng_state', side_effect=AssertionError), forked_rng():
            assert accelerator_states() == {}
        with forked_rng():  # it comes into use inside, with the seed that torch had
            torch.manual_seed(1)
            xpu.draw()
        assert xpu.numbers() == [7, 7]


@pytest.mark.cpu_only
def test_a_checkpoint_has_the_states_of_its_machine(tmp_path):
    learn = digits_learner(tmp_path)
    with accelerated(used=False):
        plain = rng_state(learn)
    assert set(plain) == {'python', 'numpy', 'torch', 'cuda', 'loader', 'generator'} and plain['cuda'] == []
    with accelerated('mps') as mps:
        state = rng_state(learn)
        assert set(state) == {*plain, 'mps'} and len(state['mps']) == 2 and state['cuda'] == []
        mps.draw()
        with patch('torch.Generator', lambda kind: mps), patch.object(mps, 'set_state', lambda s: None, create=True):
            set_rng_state(learn, state)
            assert mps.numbers() == [3, 4]
            set_rng_state(learn, plain)  # a file of a machine without one, or of an earlier version
        assert has_accelerator('mps') and not has_accelerator('cuda')
    set_rng_state(learn, state)  # and the other way round
    with accelerated('cuda') as cuda:
        assert [int(s[0]) for s in rng_state(learn)['cuda']] == [3, 4]
        cuda.states.pop()
        set_accelerator_states({'cuda': [torch.full((16,), 9, dtype=torch.uint8)] * 4})  # fewer devices than there were
        assert cuda.numbers() == [9]
    for wrong in (3, [3], [np.zeros(3)]):
        with pytest.raises(ValueError, match='mps is not a list of states'):
            check_rng_state({**state, 'mps': wrong})


def test_random_numbers_of_the_device(device, tmp_path):
    learn = digits_learner(tmp_path)
    want = torch.rand(3, device=device)
    state = torch.rand(3, device=device), accelerator_states()
    with forked_rng():
        first = torch.rand(3, device=device)
    assert torch.equal(first, torch.rand(3, device=device)) and not torch.equal(first, want)
    rng = rng_state(learn)
    first = torch.rand(3, device=device)
    quietly(learn, learn.validate)
    set_rng_state(learn, rng)
    assert torch.equal(first, torch.rand(3, device=device)) and len(state[1]) == (device.type != 'cpu')


def test_an_error_says_that_there_is_no_accelerator():
    "As in torch 2.6; later versions give None"
    with patch('torch.accelerator.current_accelerator', side_effect=RuntimeError('none is available')):
        assert accelerator_states() == {} and not has_accelerator('cuda')
        set_accelerator_states({'cuda': [torch.zeros(16, dtype=torch.uint8, device='cpu')]})
        before = torch.get_rng_state()
        with forked_rng():
            torch.rand(3)
        assert torch.equal(torch.get_rng_state(), before)
