"Other kernels for projection, of contiguous tensors whose addresses and sizes are multiples of 16"

import triton
import triton.language as tl


@triton.jit
def _part(table, masks, tensors, starts, CHUNK: tl.constexpr):
    "Address and mask of a program's first weight, and how many weights it has"
    b = tl.program_id(0)
    row, start = table + tl.load(tensors + b).to(tl.int64) * 7, tl.load(starts + b)
    left = tl.multiple_of(tl.minimum(tl.load(row + 1) - start, CHUNK).to(tl.int32), 16)
    return tl.load(row), tl.multiple_of(masks + tl.load(row + 4) + start, 16), start, left


@triton.jit
def words_in_rows(
    words,
    masks,
    table,
    tensors,
    starts,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    "Zeros alone are written, four neighbours by one thread"
    w, mask, start, left = _part(table, masks, tensors, starts, CHUNK)
    w = tl.multiple_of(w.to(words.dtype) + start, 16)
    for a in range(0, CHUNK, BLOCK):
        j = a + tl.arange(0, BLOCK)
        inside = j < left
        tl.store(w + j, 0, mask=inside & (tl.load(mask + j, mask=inside, other=1) == 0))


@triton.jit
def words_in_columns(
    words,
    masks,
    table,
    tensors,
    starts,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    "Zeros alone are written, neighbours by neighbouring threads, since nothing is said about addresses"
    w, mask, start, left = _part(table, masks, tensors, starts, CHUNK)
    w = w.to(words.dtype) + start
    for a in range(0, CHUNK, BLOCK):
        j = a + tl.arange(0, BLOCK)
        inside = j < left
        tl.store(w + j, 0, mask=inside & (tl.load(mask + j, mask=inside, other=1) == 0))


@triton.jit
def vectors(
    words,
    masks,
    table,
    tensors,
    starts,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    "Whole vectors are read and written"
    w, mask, start, left = _part(table, masks, tensors, starts, CHUNK)
    w = tl.multiple_of(w.to(words.dtype) + start, 16)
    for a in range(0, CHUNK, BLOCK):
        j = a + tl.arange(0, BLOCK)
        inside = j < left
        v, kept = tl.load(w + j, mask=inside, other=0), tl.load(mask + j, mask=inside, other=0)
        tl.store(w + j, tl.where(kept != 0, v, 0), mask=inside)
