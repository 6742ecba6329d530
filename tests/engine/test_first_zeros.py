"Zeros of an initialisation are not pruned weights"

import pytest
import torch
from torch import nn

from fastprune.all import GMP, LC, Sparsifier, one_shot, window
from fastprune.engine.keep import present_masks
from fastprune.engine.method import Method


def half_an_identity(n_in=6, n_out=9):
    torch.manual_seed(0)
    layer = nn.Conv2d(n_in, n_out, 3, padding=1)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:n_in])
    return layer


@pytest.mark.parametrize(
    'method', [Method(0.5, window(one_shot, 0.5)), GMP(0.5), LC(0.5)], ids=['one-shot from a half', 'GMP', 'LC']
)
def test_a_training_from_filters_that_pass_channels_on_begins_dense(method):
    layer = half_an_identity()
    zeros = int((layer.weight == 0).sum())
    opt = torch.optim.SGD(layer.parameters(), lr=0.01, weight_decay=1e-3)
    sparsifier, reached = Sparsifier(layer, method, 8, opt), []
    for _ in range(8):
        opt.zero_grad()
        (layer(torch.randn(2, 6, 8, 8)) - 1).square().sum().backward()
        sparsifier.step()
        reached.append(int((layer.weight == 0).sum()))
    sparsifier.finish()
    assert zeros > 0.5 * layer.weight.numel() and reached[0] < 0.2 * layer.weight.numel()
    assert int((layer.weight == 0).sum()) == round(0.5 * layer.weight.numel())


@pytest.mark.parametrize('make', [nn.init.eye_, nn.init.zeros_, nn.init.ones_])
def test_initialisations_are_dense(make):
    w = make(torch.empty(4, 6))
    assert present_masks(None, {'w': w})['w'].all()


def test_pruned_rows_with_one_weight_left_stay_pruned():
    torch.manual_seed(0)
    w = torch.randn(4, 6) * torch.eye(4, 6)
    assert torch.equal(present_masks(None, {'w': w})['w'], w != 0)
    one_row = torch.ones(1, 6) * torch.eye(1, 6)  # a single row says nothing
    assert torch.equal(present_masks(None, {'w': one_row})['w'], one_row != 0)
