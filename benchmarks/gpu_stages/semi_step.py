"""One way to a 2:4 product, in a process that it may end: `python semi_step.py STEP DEVICE WIDTH ROWS...`. There is a
line for each that has ended, so that the line that is missing names the one that has not"""

import sys
import time

import torch
import torch.nn.functional as F

ALGORITHMS = 48  # more than there are: the first ones beyond are refused with an error


def operands(device, width, rows, dtype=torch.float16):
    w = torch.randn(4 * width, width, device=device, dtype=dtype) / width**0.5
    w.view(-1, 4)[:, 2:] = 0
    return w, torch.randn(rows, width, device=device, dtype=dtype), torch.randn(4 * width, device=device, dtype=dtype)


def packed(w, kind='CUSPARSELT'):
    return getattr(torch.sparse, f'SparseSemiStructuredTensor{kind}').from_dense(w)


def search(w, x, b, transposed):
    return int(torch._cslt_sparse_mm_search(packed(w).packed, x.t(), bias=b, transpose_result=transposed))


def by_algorithm(w, x, b, algorithm, transposed):
    p = packed(w)
    p.alg_id_cusparselt, p.fuse_transpose_cusparselt = algorithm, transposed
    return F.linear(x, p, b)


def algorithms(w, x, b):
    "Each algorithm by itself: the last line before the death is that of the one before"
    for a in range(ALGORITHMS):
        for transposed in (False, True):
            name = f'algorithm {a}{", transposed" * transposed}, {len(x)} rows'
            try:
                y = by_algorithm(w, x, b, a, transposed)
                torch.cuda.synchronize()
                print(f'{name}: {differ(y, F.linear(x, w, b))}', flush=True)
            except RuntimeError as e:
                if 'CUDA error: an illegal' in str(e):
                    raise
                print(f'{name}: refused: {str(e).splitlines()[0][:80]}', flush=True)
                return


def tuned(w, x, b):
    found = search(w, x, b, True)
    torch.cuda.synchronize()
    print(f'found {found}', flush=True)
    return by_algorithm(w, x, b, found, True)


def ours(w, x, b):
    "What `to_semi_structured` does before it uses a product"
    from fastprune.deploy.semi_structured_trial import Product, try_products

    return list(try_products([Product(*w.shape, len(x), True, 'float16')], x.device).values())[0]


STEPS = {
    'conversion': lambda w, x, b: packed(w).packed,
    'product': lambda w, x, b: F.linear(x, packed(w), b),
    'product, transposed': lambda w, x, b: by_algorithm(w, x, b, 0, True),
    'search': lambda w, x, b: search(w, x, b, False),
    'search, transposed': lambda w, x, b: search(w, x, b, True),
    'search and its product': tuned,
    'algorithms': algorithms,
    'CUTLASS': lambda w, x, b: F.linear(x, packed(w, 'CUTLASS'), b),
    'fastprune': ours,
}


def differ(y, want):
    return f'{float((y - want).abs().max() / want.abs().max()):.1e}'


def main(step, device, width, *rows):
    for n in map(int, rows):
        w, x, b = operands(device, int(width), n)
        start = time.monotonic()
        found = STEPS[step](w, x, b)
        if device != 'cpu':
            torch.cuda.synchronize()
        same = torch.is_tensor(found) and found.shape == (n, len(w))
        what = differ(found, F.linear(x, w, b)) if same else '' if torch.is_tensor(found) else found
        print(f'{n} rows: ended, {time.monotonic() - start:.1f} s {what}', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
