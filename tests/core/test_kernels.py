"Kernels compile for GPUs, without one, from the arguments that they get"

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from fastprune.core import triton_programs, triton_search
from fastprune.core.selection_triton import TritonSelection

pytest.importorskip('triton', reason='triton is part of PyTorch on Linux only')

pytestmark = pytest.mark.cpu_only  # nothing is launched

TARGETS = {'H100': ('cuda', 90, 32), 'MI300': ('hip', 'gfx942', 64)}


@pytest.fixture(params=TARGETS)
def launched(request, monkeypatch):
    "What is launched on a GPU that only compiles: (name of the kernel, its code)"
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = dict(get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_device_properties=lambda d: {})
    gpu['get_current_target'] = lambda: GPUTarget(*TARGETS[request.param])
    monkeypatch.setattr(driver, '_active', SimpleNamespace(**gpu))
    monkeypatch.delitem(sys.modules, 'fastprune.core.radix', raising=False)  # kernels keep what they have compiled
    res = []

    def compile_only(kernel, n, *args, **kwargs):
        if n:
            code = kernel.warmup(*args, grid=(n,), **kwargs).asm
            res.append((kernel.__name__, code.get('ptx') or code['amdgcn']))

    for module in (triton_programs, triton_search):
        monkeypatch.setattr(module, 'launch', compile_only)
    yield res
    sys.modules.pop('fastprune.core.radix')


def use(dtype, shapes, absolute, has_keep, **kwargs):
    "Select and project, twice"
    selection = TritonSelection()
    xs = [torch.ones(s, dtype=dtype).to(**kwargs) for s in shapes]
    keep = [x > 0 for x in xs] if has_keep else None
    for _ in range(2):
        masks, nan = selection.lowest(xs, [3] * len(xs), absolute, keep, None if has_keep else xs)
        selection.project(xs, masks)
    assert [m.shape for m in masks] == [x.shape for x in xs] and nan.shape == (len(xs),)


PASSES = {torch.bfloat16: 3, torch.float32: 6}


@pytest.mark.sample(2)
@pytest.mark.parametrize('dtype', PASSES)
def test_all_kernels_compile(launched, dtype):
    use(dtype, [(8, 16), (48,)], absolute=True, has_keep=False)
    names = ['count_digits'] * PASSES[dtype] + ['count_ties', 'write_masks', 'write_zeros']
    assert [name for name, _ in launched] == 2 * names
    if '.ptx' in launched[0][1] or '.target sm' in launched[0][1]:
        for name, code in launched:  # aligned numbers are read 16 bytes at once
            assert name in ('count_ties', 'write_zeros') or re.search(r'ld\.global\.v4\.b32', code), name


def test_all_kernels_compile_for_odd_tensors(launched):
    "Not aligned, in channels-last format, inside of earlier masks, by signed scores"
    use(torch.float16, [(2, 3, 5, 5), (1, 7, 3, 3)], False, True, memory_format=torch.channels_last)
    assert {name for name, _ in launched} == {'count_digits', 'count_ties', 'write_masks', 'write_zeros'}
