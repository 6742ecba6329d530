"Fixtures of the tests of graphs and of ONNX"

import functools

import pytest
import torch


@pytest.fixture(scope='session')
def one_registry():
    "torch makes its table of operators anew for each file of ONNX, which takes longer than most of these exports"
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # another version of torch
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, 'from_torchlib', staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def seeded_and_without_gradients():
    number = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(number)
