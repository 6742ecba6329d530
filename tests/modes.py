"Modes that stand for another device: one whose numbers are not there at once, one without float64"

import contextlib
import sys

import devices as of_tests
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprune.core import devices
from fastprune.core.devices import pretend

_aten = torch.ops.aten
_waiting = (
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.nonzero_numpy,
    _aten.argwhere,
    _aten.is_nonzero,
    _aten.equal,
    _aten._unique,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.bincount,
    _aten.masked_select,
)
_reading = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__)


def _inside(functions):
    "Is one of the functions running?"
    codes, frame = {f.__code__ for f in functions}, sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _place():
    "The innermost line of fastprune that is running"
    frame = sys._getframe(1)
    while frame is not None and '/fastprune/' not in frame.f_code.co_filename:
        frame = frame.f_back
    code = frame and frame.f_code
    return f'{code.co_filename.rpartition("/fastprune/")[2]}:{frame.f_lineno}, {code.co_name}' if code else 'a test'


def _tensors(*trees):
    return [t for t in tree_leaves(trees) if isinstance(t, torch.Tensor)]


def _is_there(*trees):
    "Is a tensor on the device of the tests?"
    return any(t.device.type == of_tests.device.type for t in _tensors(*trees))


def _copies_back(func, args, kwargs, res):
    "Does an operation wait for a copy from the device of the tests to the CPU?"
    packet = func._overloadpacket
    if of_tests.device.type == 'cpu' or packet not in (_aten._to_copy, _aten.copy_):
        return False
    waits = not (kwargs.get('non_blocking', False) or packet is _aten.copy_ and len(args) > 2 and args[2])
    return waits and res.device.type == 'cpu' and _is_there(args)


def _selects_by_mask(func, args):
    "Does an operation index by a mask? torch fills a single number in without reading the mask"
    packet = func._overloadpacket
    if packet is _aten.index:
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
    if packet in (_aten.index_put, _aten.index_put_, _aten._index_put_impl_):
        return args[2].numel() != 1 and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
    return False


class Reads:
    "Counts what a GPU would have to wait for, and fails beyond the number that is allowed"

    def __init__(self, most, except_in):
        self.most, self.except_in, self.found = most, except_in, []
        self.in_method = False  # whose operations are the same read

    def __len__(self):
        return len(self.found)

    def add(self, name):
        if _inside(self.except_in):
            return
        self.found.append(f'{name} in {_place()}')
        assert len(self.found) <= self.most, f'numbers are read back from the device: {self.found}'


class _Operations(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (func._overloadpacket in _waiting or _selects_by_mask(func, args)) and _is_there(args, kwargs):
            self.reads.add(str(func))
        res = func(*args, **kwargs)
        if not self.reads.in_method and _copies_back(func, args, kwargs, res):
            self.reads.add(str(func))
        return res


class _Methods(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _reading or not _is_there(args[0]):
            return func(*args, **(kwargs or {}))
        self.reads.add(func.__name__)
        self.reads.in_method = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.reads.in_method = False


@contextlib.contextmanager
def forbid_reads(
    most=0,  # How many are allowed
    except_in=(),  # Functions in which all are allowed
):
    """It is an error to read numbers of a tensor on the device of the tests: by `item`, `tolist`, `cpu`, `nonzero`, a
    mask as an index, and all else that a GPU has to be waited for. If it is the CPU, it passes for an accelerator.
    Gives what has been read"""
    reads = Reads(most, except_in)
    with pretend(of_tests.device.type == 'cpu'), _Methods(reads), _Operations(reads):
        yield reads


# what may turn float64 into other numbers and back: on a device without it, these go over the CPU
_crossings = (devices.wide, devices.wide_empty, devices.narrow)
_copies = (_aten.copy_, _aten._foreach_copy_, _aten._foreach_copy)


class _NoFloat64(TorchDispatchMode):
    """Float64 tensors are on the CPU, and all others on a device that has no float64. So operations make float64 only
    from float64, don't mix it with other floats, and leave it by `narrow` or a copy into another tensor alone"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if func._overloadpacket in _copies or _inside(_crossings):
            return res
        floats = [t for t in _tensors(args, kwargs or {}) if t.is_floating_point()]
        outer = [t for t in floats if t.dtype != torch.float64 and t.ndim]
        wide = [t for t in floats if t.dtype == torch.float64]
        made = [t.dtype for t in _tensors(res) if t.is_floating_point() and (t.ndim or floats)]
        assert not (wide and outer), f'{func} mixes float64 with other floats'
        if wide:
            assert all(d == torch.float64 for d in made), f'{func} makes {made} from float64'
        else:
            assert torch.float64 not in made, f'{func} makes float64 on a device that has none'
        return res


@contextlib.contextmanager
def forbid_float64():
    "The CPU passes for an accelerator without float64, and it is an error to make float64 but by `wide`"
    with pretend(float64=False), _NoFloat64():
        yield
