"Kernels compile for a GPU, without one"

import re

import pytest

from fastprune.core.triton_programs import kernels
from fastprune.core.triton_search import DIGITS

triton = pytest.importorskip('triton', reason='triton is part of PyTorch on Linux only')

TYPES = dict(
    table='*i64',
    tensors='*i32',
    starts='*i64',
    extras='*i64',
    last_state='*i64',
    state='*i64',
    last_counts='*i64',
    counts='*i64',
    nan='*i32',
    own='*i32',
    before='*i64',
    firsts='*i64',
    masks='*i8',
    zeros='*i64',
)
SIZES = dict(CHUNK=2**14, BLOCK=2**11)
PLAIN = dict(KEEP=False, TURNED=False, ALIGNED=True, **SIZES)
ALL = dict(KEEP=True, TURNED=True, ALIGNED=False, **SIZES)


def digit(i, n):
    shift, width = DIGITS[i]
    return dict(PASS=i, SHIFT=shift, WIDTH=width, LAST_WIDTH=DIGITS[i - 1][1] if i else 0, IS_LAST=i == n - 1)


def compiled(name, like='fp32', words='i32', **constants):
    "The assembly of a kernel"
    from triton.backends.compiler import GPUTarget

    kernel = getattr(kernels(), name)
    types = TYPES | dict(like=f'*{like}', words=f'*{words}')
    signature = {a: 'constexpr' if a in constants else types[a] for a in kernel.arg_names}
    values = {(i,): constants[a] for i, a in enumerate(kernel.arg_names) if a in constants}
    source = triton.compiler.ASTSource(kernel, signature, values)
    return triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=8)).asm['ptx']


@pytest.mark.parametrize('like', ['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('i', [0, 1, 2])
def test_counting(like, i):
    assert 'v4.b32' in compiled('count_digits', like, **digit(i, 3), ABSOLUTE=True, **PLAIN)  # 16 bytes at once
    assert '.entry count_digits' in compiled('count_digits', like, **digit(i, 6), ABSOLUTE=False, **ALL)


@pytest.mark.parametrize('one_pass', [True, False])
def test_ties(one_pass):
    assert '.entry count_ties' in compiled('count_ties', LAST_WIDTH=5, ONE_PASS=one_pass, BLOCK=1024)


@pytest.mark.parametrize('zero', [True, False])
def test_masks(zero):
    masks = dict(MORE=15, LAST_WIDTH=5, ZERO=zero)
    plain = compiled('write_masks', 'bf16', 'i16', **masks, ABSOLUTE=True, **PLAIN)
    assert 'v4.b32' in plain and bool(re.search(r'st\.global\.b16', plain)) is zero
    assert '.entry write_masks' in compiled('write_masks', **masks, ABSOLUTE=False, **ALL)


@pytest.mark.parametrize('words', ['i8', 'i16', 'i32', 'i64'])
def test_zeros(words):
    for turned in (True, False):
        text = compiled('write_zeros', words=words, TURNED=turned, ALIGNED=not turned, **SIZES)
        assert f'st.global.b{words[1:]}' in text
