"What the library makes on the CPU is there, whatever torch's default device is; and tensors of two devices meet"

import copy

import pytest
import torch
from helpers import equal

from fastprune.all import Masks, Ticket, digits_dls, load_sparse, prunable_weights, random_score, save_sparse
from fastprune.analysis.states import point_setter
from fastprune.core.devices import upload
from fastprune.deploy.constants import similar_inputs
from fastprune.deploy.tiles import cover, row_blocks
from fastprune.learner.batches import undisturbed
from fastprune.testing import random_numbers_kept, same
from fastprune.training.state import pack
from fastprune.zoo.learners import digits_learner
from fastprune.zoo.models import digits_convnet


def a_ticket(model):
    masks = {n: p.detach() > 0 for n, p in prunable_weights(model).items()}
    initial = dict(zip(masks, ((0.0, 1.0, 'normal'), (0.0, 1.0, 'uniform')), strict=False))
    return Ticket(copy.deepcopy(model.state_dict()), masks, initial=initial)


def packed(ticket, folder):
    pack([1.5] * 20, tensors := {})
    return tensors


def travelled(ticket, folder):
    ticket.save(folder / 'ticket')
    return Ticket.load(folder / 'ticket').state


def sparse_file(ticket, folder):
    save_sparse(ticket.state, folder / 'weights')
    return load_sparse(folder / 'weights')


def zeroed(ticket, folder):
    weights = {n: ticket.state[n].clone() for n in ticket.masks}
    Masks(ticket.masks).apply_(weights)
    return weights


def tiles(ticket, folder):
    return dict(enumerate((*cover(40), row_blocks(next(iter(ticket.masks.values())).sum((1, 2, 3)).cumsum(0)))))


MADE = {
    'upload': lambda ticket, folder: {'a': upload([1, 2], torch.int64, torch.device('cpu'))},
    'random_score': lambda ticket, folder: random_score({n: ticket.state[n] for n in ticket.masks}),
    'reinit': lambda ticket, folder: ticket.reinit().state,
    'shuffle': lambda ticket, folder: ticket.shuffle().masks,
    'similar_inputs': lambda ticket, folder: dict(enumerate(similar_inputs(tuple(ticket.state.values())))),
    'tickets in files': travelled,
    'sparse files': sparse_file,
    'checkpoints': packed,
    'zeros': zeroed,
    'tiles': tiles,
}


@pytest.mark.cpu_only  # 'meta' stands for the default device
@pytest.mark.parametrize('what', MADE)
def test_made_on_the_cpu_under_another_default_device(what, tmp_path):
    ticket = a_ticket(digits_convnet(widths=(4, 8)))
    want = MADE[what](ticket, tmp_path)
    with torch.device('meta'):
        got = MADE[what](ticket, tmp_path)
    assert want and all(t.is_cpu for t in got.values()) and same(want, got)


@pytest.mark.cpu_only
def test_data_goes_to_fastais_default_device(monkeypatch):
    monkeypatch.setattr('fastprune.zoo.data.default_device', lambda: torch.device('meta'))
    dls = digits_dls(test_pct=0.1)
    assert {dls.device, *(dl.device for dl in dls.loaders)} == {torch.device('meta')}
    assert digits_dls(device='cpu').device == 'cpu'


def test_gradients_come_back_to_a_model_that_has_moved(device, tmp_path):
    learn = digits_learner(tmp_path)
    learn.model.cpu()
    first, *rest = learn.model.parameters()
    first.grad = before = torch.ones_like(first)
    with undisturbed(learn):
        first.grad = None
        learn.model.to(device)
    assert first.grad.device.type == device.type and equal(first.grad, before) and all(p.grad is None for p in rest)


def test_states_on_two_devices(device, tmp_path):
    learn = digits_learner(tmp_path)
    learn.model.to(device)
    state = copy.deepcopy(learn.model.state_dict())
    on_cpu = {n: t.cpu() for n, t in state.items()}
    assert same(state, on_cpu) and same(on_cpu, state)
    target = {n: torch.zeros_like(t) for n, t in state.items()}
    point_setter(learn, target, [state, on_cpu], [], 'interpolate')((0.25, 0.75))
    assert same(target, state) and all(t.device.type == device.type for t in target.values())
    point_setter(learn, target, [on_cpu] * 3, [], 'interpolate')((0.5, 0.25, 0.25))
    assert all(torch.allclose(t, state[n]) for n, t in target.items())


def test_controls_are_where_the_ticket_is(device):
    model = digits_convnet(widths=(4, 8))
    want, got = a_ticket(model).shuffle(), a_ticket(model.to(device)).shuffle()
    assert all(equal(m, want.masks[n]) for n, m in got.masks.items()) and same(want.state, got.state)
    assert {t.device.type for t in (*got.masks.values(), *got.state.values())} == {device.type}


def test_deterministic_algorithms_that_only_warn_still_do():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        with random_numbers_kept():
            torch.use_deterministic_algorithms(False)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
