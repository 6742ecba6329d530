"A weight is packed without loss, and the kernel gives what the dense product gives"

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from fastprune.deploy import forms
from fastprune.deploy.skinny import DTYPES, LANES, MOST_ROWS, STEPS, UNIT, SkinnyLinear, pack_skinny


def unpacked(packed, shape):
    "The dense weight, read as the kernel does, one place after another"
    res = torch.zeros(shape, dtype=packed['value'].dtype)
    for row in range(shape[0]):
        for place in range(int(packed['start'][row]) * UNIT, int(packed['start'][row + 1]) * UNIT):
            base = packed['base'][place // UNIT * STEPS + place % STEPS]
            res[row, int(base) + int(packed['offset'][place])] += packed['value'][place]
    return res


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 900),
    sparsity=st.sampled_from([0, 0.5, 0.9, 0.99, 1]),
    seed=st.integers(0, 9),
)
@example(rows=1, columns=40000, sparsity=0.999, seed=0)  # a base of 32 bits
@example(rows=2, columns=70000, sparsity=0.9999, seed=0)  # distances of more than 16 bits
def test_packing_loses_nothing(rows, columns, sparsity, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) >= sparsity)
    packed = pack_skinny(weight)
    assert torch.equal(unpacked(packed, weight.shape), weight)
    assert packed['base'].dtype == (torch.int16 if columns < 2**15 else torch.int32)
    assert len(packed['offset']) == len(packed['value']) == UNIT * int(packed['start'][-1])
    assert len(packed['base']) == STEPS * int(packed['start'][-1])


def test_size_of_what_is_packed():
    "Three bytes a weight in float16 at 50%, and some for bases and ends of rows; four where few are left"
    torch.manual_seed(0)
    size = lambda packed: sum(t.numel() * t.itemsize for t in packed.values())
    for sparsity, kind, most in ((0.5, torch.uint8, 3.3), (0.95, torch.uint16, 5.5)):
        weight = torch.randn(64, 4096) * (torch.rand(64, 4096) >= sparsity)
        packed = pack_skinny(weight.half())
        assert packed['offset'].dtype == kind and size(packed) <= most * int(weight.count_nonzero())


def test_neighbours_of_a_group_are_read_together():
    weight = torch.arange(1.0, 129)[None]
    packed = pack_skinny(weight)
    assert packed['value'].view(LANES, STEPS).t().flatten().tolist() == weight[0].tolist()


def test_not_on_a_cpu():
    "The forms of a CPU stay as they are"
    layer = nn.Linear(64, 64)
    assert list(forms.layer_forms(layer)[0]) == ['dense', 'csr', 'sparse'] and forms.layer_forms(layer, 1)[1] == {}


@pytest.mark.slow
def test_interpreted():
    "Triton has to be told before it is imported, so it is another process"
    env = os.environ | {'TRITON_INTERPRET': '1'}
    tests = Path(__file__).with_name('skinny_interpreted.py')
    command = [sys.executable, '-m', 'pytest', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider', str(tests)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(1000, 777), (64, 40000), (3, 5)])
def test_on_a_gpu(dtype, shape):
    torch.manual_seed(0)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for sparsity in (0, 0.5, 0.9, 0.99, 1):
        weight = torch.randn(shape, device='cuda') * (torch.rand(shape, device='cuda') >= sparsity)
        layer = nn.Linear(shape[1], shape[0], device='cuda')
        layer.weight.data = weight
        layer = layer.to(dtype).requires_grad_(False)
        skinny = SkinnyLinear(layer)
        for n in (1, 2, 5, 8, 16, 31, MOST_ROWS, MOST_ROWS + 1):
            x = torch.randn(n, shape[1], device='cuda').to(dtype)
            want = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
            assert skinny.takes(x) == (n <= MOST_ROWS)
            assert (skinny(x).double() - want).abs().max() <= tolerance * want.abs().max()
