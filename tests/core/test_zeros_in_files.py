"Masks and zeros in files: each mask comes back, -0 is a zero, and a flipped bit never gives other masks"

import random

import pytest
import torch
from helpers import equal
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from fastprune.all import Masks, Ticket, prunable_weights
from fastprune.core.files import load_tensors
from fastprune.core.sparse_files import load_sparse, load_sparse_masks, save_sparse


def same(a, b):
    return a.keys() == b.keys() and all(equal(a[n], b[n]) for n in a)


def test_masks_that_save_no_bytes_come_back(learner, tmp_path):
    learn = learner()
    learn.prune(0.03)
    learn.save_sparse(tmp_path / 's')
    other = learner()
    other.load_sparse(tmp_path / 's')
    assert other.masks == learn.masks and 0.029 < other.masks.sparsity < 0.031


def test_masks_of_every_kind_of_tensor_come_back(tmp_path):
    w = torch.randn(40, 30)
    state = {
        'w': w,
        'tied': w,
        'bias': torch.randn(9),
        'one': torch.tensor(3.0),
        'none': torch.zeros(0, 3),
        'int': torch.arange(8).view(2, 4),
        'sparse': w * (w > 1),
        'kept': w * (w > 1),
    }
    masks = {n: torch.rand(t.shape) > 0.5 for n, t in state.items()} | {'sparse': w > 1, 'kept': w > 2}
    save_sparse(state, tmp_path / 's', masks=masks)
    back, again = load_sparse_masks(tmp_path / 's')
    assert same(again, masks) and same(back, state)
    with pytest.raises(ValueError, match=r"masks\['other'\]: there is no such tensor"):
        save_sparse(state, tmp_path / 's', masks={'other': w > 0})


def test_masks_of_biases_come_back(tmp_path, learner):
    learn = learner()
    name = next(n for n, p in learn.model.named_parameters() if p.ndim == 1)
    learn.prune(0.5, include=name)
    learn.save_sparse(tmp_path / 's')
    other = learner()
    other.load_sparse(tmp_path / 's')
    assert list(other.masks) == [name] and other.masks == learn.masks


def multiplied():
    "Weights that were multiplied by a mask: half of the zeros are -0"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(torch.rand_like(p) > 0.9)
    return model


def removed():
    model = multiplied()
    for m in (model[0], model[2]):
        m.weight.data.normal_()
        prune.l1_unstructured(m, 'weight', amount=0.9)
        prune.remove(m, 'weight')
    return model


@pytest.mark.parametrize('make', [multiplied, removed])
@pytest.mark.parametrize('masked', [False, True])
def test_minus_zero_is_a_zero(tmp_path, make, masked):
    model = make()
    state, weights = model.state_dict(), prunable_weights(model)
    assert any((t.view(torch.int32) == -(2**31)).any() for t in state.values())
    masks = Masks.from_zeros(weights) if masked else None
    save_sparse(state, tmp_path / 's', masks=masks)
    save_file(state, tmp_path / 'd')
    assert 0.12 < (tmp_path / 's').stat().st_size / (tmp_path / 'd').stat().st_size < 0.14
    back, again = load_sparse_masks(tmp_path / 's')
    assert all(equal(back[n], t) for n, t in state.items())
    assert not any((back[n].view(torch.int32) == -(2**31)).any() for n in weights)
    assert same(again, masks or {})


def test_minus_zero_under_a_mask_that_saves_nothing(tmp_path):
    mask = torch.rand(40, 30) > 0.03
    w = -torch.rand(40, 30) - 1
    save_sparse({'w': w * mask}, tmp_path / 's', masks={'w': mask})
    back, again = load_sparse_masks(tmp_path / 's')
    assert (
        equal(again['w'], mask) and equal(back['w'], w * mask) and not (back['w'].view(torch.int32) == -(2**31)).any()
    )


def test_tiny_numbers_are_no_zeros(tmp_path):
    w = torch.zeros(8, 9)
    w[0, 0] = 1e-45
    save_sparse({'w': w}, tmp_path / 's')
    assert load_sparse(tmp_path / 's')['w'].view(torch.int32).count_nonzero() == 1


def test_the_report_counts_minus_zeros(tmp_path):
    from fastprune.deploy.headline import file_sizes

    state = multiplied().state_dict()
    dense, sparse = file_sizes(state, {})
    assert sparse < 0.14 * dense


def test_no_flipped_bit_makes_other_masks(tmp_path):
    masks = Masks({'w': torch.rand(12, 8) > 0.5, 'b': torch.rand(13) > 0.5})
    masks.save(tmp_path / 'm')
    good, refused = (tmp_path / 'm').read_bytes(), 0
    for i in range(8 * len(good)):
        bad = bytearray(good)
        bad[i // 8] ^= 1 << i % 8
        (tmp_path / 'm').write_bytes(bad)
        try:
            assert Masks.load(tmp_path / 'm') == masks
        except ValueError as e:
            refused += str(tmp_path / 'm') in str(e)
    assert refused > 0.95 * 8 * len(good)


def test_masks_of_earlier_versions_load(tmp_path):
    mask = torch.rand(12, 8) > 0.5
    masks = Masks({'w': mask})
    masks.save(tmp_path / 'new')
    packed, meta = load_tensors(tmp_path / 'new')
    old = {k: v for k, v in meta.items() if k != 'checksum'}
    save_file(packed, tmp_path / 'old', old)
    assert Masks.load(tmp_path / 'old') == masks
    save_file(packed, tmp_path / 'old', {**old, 'cheksum': '1'})
    with pytest.raises(ValueError, match="its entry 'cheksum'"):
        Masks.load(tmp_path / 'old')


def test_rounds_have_masks_with_a_checksum(learner, fit, tmp_path):
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.iterative_prune(1, 1, folder=tmp_path)
    path = tmp_path / 'masks_01.safetensors'
    good = path.read_bytes()
    for i in random.Random(0).sample(range(8 * len(good)), 200):
        bad = bytearray(good)
        bad[i // 8] ^= 1 << i % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError):
            Masks.load(path)


def test_a_ticket_with_wrong_distributions_is_refused_by_name():
    state, mask = {'w': torch.randn(9, 9)}, {'w': torch.ones(9, 9) > 0}
    for initial in (
        {'v': (0.0, 1.0, 'normal')},
        {'w': (0.0, -1.0, 'normal')},
        {'w': (0.0, 1.0)},
        {'w': ('0', 1.0, 'normal')},
        {'w': 3},
        {'w': (1e300, 0.0, 'constant')},
    ):
        with pytest.raises(ValueError, match='initial'):
            Ticket(state, mask, initial=initial).reinit()
