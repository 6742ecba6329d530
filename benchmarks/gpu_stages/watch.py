"What reads values of a device back to the host, and in which line"

import contextlib
import traceback
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READ_BACKS = ('_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal', 'masked_select', '_unique2', 'bincount')

_excepted = []  # a number for each context of `excepted` that is open


def line_of():
    "The innermost line of fastprune that is being run"
    frames = [f for f in traceback.extract_stack() if '/fastprune/' in f.filename]
    if not frames:
        return 'outside of fastprune'
    name = frames[-1].filename.rsplit('/fastprune/', 1)[1]
    return f'{name}:{frames[-1].lineno} {frames[-1].line}'


class ReadBacks(TorchDispatchMode):
    "Without a GPU: calls `note` for each operation that would wait for one, were its tensors there"

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READ_BACKS and not _excepted:
            self.note()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def debug_mode(mode):
    "What torch does at a synchronisation"
    old = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(old)


@contextlib.contextmanager
def excepted(device):
    "Synchronisations are neither noted nor errors"
    _excepted.append(1)
    try:
        with contextlib.nullcontext() if device == 'cpu' else debug_mode('default'):
            yield
    finally:
        _excepted.pop()


@contextlib.contextmanager
def watched(device, found):
    "Append to `found` the line of each synchronisation"
    if device == 'cpu':
        with ReadBacks(lambda: found.append(line_of())):
            yield
        return

    def note(message, *args, **kwargs):
        if 'called a synchronizing' in str(message):
            found.append(line_of())

    with warnings.catch_warnings(), debug_mode('warn'):
        warnings.simplefilter('always')
        warnings.showwarning = note
        yield


def _refuse():
    raise RuntimeError(f'reads back in {line_of()}')


@contextlib.contextmanager
def forbidden(device):
    "Each synchronisation is an error"
    with ReadBacks(_refuse) if device == 'cpu' else debug_mode('error'):
        yield
