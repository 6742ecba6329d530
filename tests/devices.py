"""The device of the tests: the CPU, or with `pytest --device cuda` a GPU.

Data and models go there as a user's do: fastai's default device is theirs, and `DataLoaders` that are made without a
device get it. Tensors and modules that a test makes itself are on it, too. What the library makes without a device
stays on the CPU, as at a user's: a global default device (`torch.set_default_device`) would hide such mistakes.
Numbers are drawn on the CPU, so that a seed gives the same ones on every device."""

import contextlib
import functools
import os
import sys
import warnings
from pathlib import Path

import torch
from fastai.basics import DataLoaders, default_device, defaults
from torch.overrides import TorchFunctionMode

TESTS, TORCH = str(Path(__file__).resolve().parent), f'{Path(torch.__file__).parent}{os.sep}'
FACTORIES = {
    *(torch.arange, torch.as_tensor, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace),
    *(torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros),
}
DRAWS = {getattr(torch.Tensor, f'{name}_') for name in ('bernoulli', 'exponential', 'normal', 'random', 'uniform')}
of_dataloaders = DataLoaders.__init__
device = torch.device('cpu')


def _by_a_test():
    "Does a file of the tests, maybe through a module of torch, make the tensor? Not the library, nor a loader's worker"
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    return frame and frame.f_code.co_filename.startswith(TESTS) and torch.utils.data.get_worker_info() is None


class _OwnTensors(TorchFunctionMode):
    "Tensors and modules that a test makes are on the device of the tests"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copied = any(isinstance(a, torch.Tensor) for a in args) or kwargs.get('out') is not None
        if func in FACTORIES and kwargs.get('device') is None and not copied and _by_a_test():
            grad = kwargs.pop('requires_grad', False)
            made = func(*args, **kwargs).to(device)
            return made.requires_grad_() if grad else made  # a call of it is an error inside of `torch.func`
        if func in DRAWS and args[0].device.type == device.type and _by_a_test():
            return args[0].copy_(func(torch.empty_like(args[0], device='cpu'), *args[1:], **kwargs))
        return func(*args, **kwargs)


@functools.wraps(of_dataloaders)
def _dataloaders(self, *loaders, path='.', device=None):
    of_dataloaders(self, *loaders, path=path, device=globals()['device'] if device is None else device)


@contextlib.contextmanager
def on(name):
    "Data and models are on this device"
    global device
    before, use_cuda = device, defaults.use_cuda
    device = torch.device(name)
    if device.type == 'cpu' and default_device().type != 'cpu':
        default_device(False)
    try:
        with _OwnTensors() if device.type != 'cpu' else contextlib.nullcontext():
            yield
    finally:
        device = before
        default_device(use_cuda)


def start(name):
    "Sets up this process for tests on a device"
    chosen = torch.device(name)
    if chosen.type == 'cpu':
        return
    DataLoaders.__init__ = _dataloaders
    torch.backends.cudnn.allow_tf32 = False  # convolutions are compared with float32
    torch.backends.cudnn.benchmark = False  # the fastest kernel is another one each time
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen.index or 0)  # fastai's default


@contextlib.contextmanager
def deterministic():
    "Operations have the same result each time, where there is a way; those without one warn, which is not looked at"
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*does not have a deterministic implementation')
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.deterministic = cudnn
