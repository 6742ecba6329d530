"`pytest --device`: a test's tensors are on the device, the library's where it puts them; 'meta' stands for a GPU here"

import os

import devices
import pytest
import torch
from torch import nn

from fastprune.all import digits_convnet


def test_the_chosen_device(device, request):
    assert device == torch.device(request.config.getoption('device'))
    assert torch.zeros(2).device.type == nn.Linear(2, 3).weight.device.type == device.type
    assert device.type != 'cpu' or os.environ['CUDA_VISIBLE_DEVICES'] == '' and not torch.cuda.is_available()


@pytest.mark.cpu_only  # as the name says
def test_on_the_cpu_alone(device):
    assert device.type == torch.zeros(2).device.type == 'cpu'


def test_what_a_test_makes():
    with devices.on('meta'):
        layer, gen = nn.Linear(2, 3), torch.Generator().manual_seed(0)
        weight = torch.tensor([1.0], requires_grad=True)
        assert all(t.is_meta for t in (layer.weight, weight, torch.randn(3, generator=gen), torch.randperm(4)))
        assert isinstance(layer.weight, nn.Parameter) and weight.is_leaf and weight.requires_grad
        assert torch.zeros(2, device='cpu').is_cpu
        assert all(p.is_cpu for p in digits_convnet().parameters())
    assert devices.device.type == torch.zeros(2).device.type != 'meta'


def test_derivatives_of_functions():
    "torch.func makes tensors, too, which it may not ask for gradients"
    with devices.on('meta'):
        assert torch.func.hessian(lambda x: (x**3).sum())(torch.ones(2)).shape == (2, 2)


def test_the_same_numbers_on_every_device(device):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(5)
    torch.manual_seed(0)
    with devices.on('cpu'):
        assert torch.equal(nn.Linear(4, 4).weight, layer.weight.cpu()) and torch.equal(torch.randn(5), x.cpu())
