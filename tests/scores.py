"Scores and weights with all that is awkward, for tests of selections"

import torch
from hypothesis import strategies as st

from fastprune.core.triton_programs import WORDS

kinds = st.sampled_from(['normal', 'equal', 'zeros', 'few levels', 'infinite', 'tiny'])
layouts = st.sampled_from(['plain', 'channels last', 'transposed', 'odd address'])


def bits(x):
    return x.cpu().contiguous().view(WORDS[x.element_size()])


def same_bits(xs, ys):
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys, strict=True))


def numbers(kind, shape, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == 'equal':
        x = torch.full(shape, -0.25)
    if kind == 'zeros':
        x = torch.where(x > 0.5, x, torch.zeros(shape) * x.sign())  # both signs of zero, and a few others
    if kind == 'few levels':
        x = (2 * x).round()
    if kind == 'infinite':
        x = torch.where(x > 0.7, torch.inf, torch.where(x < -0.7, -torch.inf, x))
    return x * 1e-41 if kind == 'tiny' else x


def laid_out(x, layout):
    "A tensor in another place or order in memory"
    if layout == 'channels last' and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == 'transposed' and x.ndim == 2:
        return x.t().contiguous().t()
    if layout == 'odd address':
        return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)
    return x


def weights_to_zero(dtype, layout):
    "Weights with all that is awkward, in a layout"
    shapes = [(3, 4, 2, 2), (7, 9), (), (0, 5), (70,)]
    res = []
    for i, s in enumerate(shapes):
        x = numbers('normal', s, i)
        x = torch.where(x > 1, torch.inf, torch.where(x < -1, torch.nan, torch.where(x.abs() < 0.2, -0.0, x)))
        res.append(laid_out(x.to(dtype), layout))
    return res


def zeroed(weights, masks):
    "What weights have to be: +0.0 where they are pruned"
    return [torch.where(m.cpu(), w.cpu(), torch.zeros((), dtype=w.dtype)) for w, m in zip(weights, masks, strict=True)]
