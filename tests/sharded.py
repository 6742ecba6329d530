"Checks for test_sharded: all processes compare with the whole tensor in one process"

import logging
import math
import sys
from functools import partial

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastprune.all import Masks, compute_masks, cubic, digits_dls, lamp, prunable_weights, random_score, taylor
from fastprune.core import shards

torch.set_num_threads(1)
logging.getLogger('torch.distributed.tensor').setLevel(logging.ERROR)
dist.init_process_group('gloo')
rank, size = dist.get_rank(), dist.get_world_size()
line = init_device_mesh('cpu', (size,))
thorough = size > 2  # the slow run has more sparsities


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 36, 33), nn.ReLU(), nn.Linear(33, 3)
    )


def full(d):
    return {n: t.full_tensor() if shards.is_dtensor(t) else t for n, t in d.items()}


def same(parts, *args, keep=None, whole=None, **kw):
    "The masks of the shards are those of the whole tensor, `whole` if that was put together before"
    a = compute_masks(parts, *args, keep=keep, **kw)
    b = compute_masks(whole or full(parts), *args, keep=keep and full(keep), **kw)
    for n in b:
        assert shards.is_dtensor(a[n]) == shards.is_dtensor(parts[n]) and torch.equal(full(a)[n], b[n]), (n, args, kw)
        if shards.is_dtensor(a[n]):
            assert a[n].placements == parts[n].placements and a[n].device_mesh == parts[n].device_mesh
    assert a.n_kept == b.n_kept and a.sparsity == b.sparsity
    return a


kinds = {
    'normal': lambda x: x,
    'levels': lambda x: (x * 30).round(),
    'equal': torch.ones_like,
    'zeros': lambda x: torch.where(x.abs() < 0.05, -0.0 * x, x),
    'infinite': lambda x: torch.where(x > 0.1, math.inf, x),
    'double': lambda x: x.double() / 3,
    'half': lambda x: x.half(),
    'bfloat16': lambda x: x.bfloat16(),
    'tiny': lambda x: x * 1e-41,
}
if not thorough:
    kinds = {n: kinds[n] for n in ('normal', 'levels', 'zeros', 'infinite', 'bfloat16')}


def fsdp_of_every_kind():
    model = fully_shard(net(), mesh=line)
    for name, f in kinds.items():
        parts = {n: f(p.detach()) for n, p in prunable_weights(model).items()}
        same_masks = partial(same, parts, whole=full(parts))
        scopes = ('local', 'global', 'erk', 'balanced')  # the last two only share sparsity out
        for scope in scopes if thorough or name == 'normal' else scopes[:2]:
            ends = (0.0, 0.011, 0.5, 0.9, 0.999) if thorough or name == 'normal' else (0.011, 0.999)
            for s in ends if scope in ('local', 'global') else (0.5, 0.9)[not thorough :]:
                same_masks(s, scope, absolute=name != 'levels')
        half = same_masks(0.5, 'global')
        same_masks(0.8, 'global', keep=half)
        if not thorough and name not in ('normal', 'levels'):
            continue
        same_masks({'0*': 0.2, '5*': 0.7})
        same_masks(0.8, 'local', keep=half, absolute=True)
        same_masks(0.1, 'local', keep=half)
        same({'0.weight': parts['0.weight']}, 0.5)


def other_layouts():
    x = torch.randn(12, 10, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    grid = init_device_mesh('cpu', (2, size // 2), mesh_dim_names=('a', 'b'))
    for mesh, placements in (
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(1), Shard(1)]),
        (grid, [Shard(1), Shard(0)]),
    ):
        parts = {
            'a': distribute_tensor(x, mesh, placements),
            'b': distribute_tensor(x.T.contiguous()[:3].clone(), mesh, placements[::-1]),
            'whole': x[:2] * 0.5,
        }
        for scope in ('local', 'global'):
            for s in (0.1, 0.5, 0.93) if thorough else (0.93,):
                same(parts, s, scope)
            same(parts, 0.8, scope, keep=same(parts, 0.4, scope, absolute=True))
    many = {f'{i}': distribute_tensor(x + i, line, [Shard(0)]) for i in range(20)}  # smaller digits
    same(many, 0.35), same(many, 0.35, absolute=True)


def large():
    "Large enough for a sample; also with few weights in `keep`, and with values that mislead the sample"
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(300, 300, generator=rng)
    misleading = (lambda x: (x * 9).round(), lambda x: x.sort(0).values, lambda x: torch.where(x > 1, math.inf, 0 * x))
    usual = (lambda x: x, torch.ones_like, torch.Tensor.double, torch.Tensor.bfloat16)
    for f in (*misleading, *(usual if thorough else ())):
        parts = {'a': distribute_tensor(f(x), line, [Shard(0)]), 'b': distribute_tensor(f(x[:7]), line, [Shard(1)])}
        for scope in ('local', 'global'):
            for s in (0.001, 0.5, 0.9, 0.9999) if thorough else (0.001, 0.9999):
                same(parts, s, scope, absolute=True)
            few = same(parts, {'a': 0.5, 'b': 0.9}) if scope == 'local' else same(parts, 0.9995, 'global')
            same(parts, 0.95, scope, keep=few), same(parts, 0.9999, scope, keep=few)


def tensor_parallel():
    grid = init_device_mesh('cpu', (2, size // 2), mesh_dim_names=('dp', 'tp'))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 6))
    parallelize_module(model, grid['tp'], {'0': ColwiseParallel(), '2': RowwiseParallel()})
    fully_shard(model, mesh=grid['dp'])
    for f in kinds.values():
        parts = {n: f(p.detach()) for n, p in prunable_weights(model).items()}
        for scope in ('local', 'global'):
            same(parts, 0.55, scope, absolute=True)


def pieces():
    whole = {
        'flat': torch.randn(1001, generator=torch.Generator().manual_seed(2)).round(decimals=1),
        'rows': torch.randn(9, 4, 2, generator=torch.Generator().manual_seed(3)).round(decimals=1),
    }

    def mine(d):
        return {
            n: t.tensor_split(size)[rank]
            if n == 'flat'
            else t.chunk(size)[rank]
            if rank < len(t.chunk(size))
            else t[:0]
            for n, t in d.items()
        }

    for scope in ('local', 'global', 'erk'):
        for s in (0.0, 0.3, 0.77):
            a, b = compute_masks(mine(whole), s, scope, group=dist.group.WORLD), compute_masks(whole, s, scope)
            assert all(torch.equal(a[n], mine(b)[n]) for n in b)
    if size == 4:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        x = torch.arange(10.0) if rank < 2 else torch.arange(10.0).flip(0)
        m = compute_masks({'x': x.chunk(2)[rank % 2]}, 0.5, group=pairs[rank // 2])['x']
        assert torch.equal(m, (x >= 5).chunk(2)[rank % 2])


def whole(*shape, seed):
    "The same scores with ties in all processes"
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).round()


def units():
    model = fully_shard(net(), mesh=line)
    w = {n: p.detach() for n, p in prunable_weights(model).items()}
    for g in ('row', 'kernel', 'filter'):
        for scope in ('local', 'global'):
            same({'0.weight': w['0.weight']}, 0.5, scope, g, absolute=True)
    lin = {n: (w[n] * 30).round() for n in ('3.weight',)}
    lin['square'] = distribute_tensor(
        (torch.randn(12, 8, generator=torch.Generator().manual_seed(6)) * 9).round(), line, [Shard(0)]
    )
    lin['3.weight'] = distribute_tensor(
        (torch.randn(33, 252, generator=torch.Generator().manual_seed(6)) * 9).round(), line, [Shard(0)]
    )
    for g in ('1:2', '3:4'):
        for f in (lambda x: x, torch.ones_like):
            for scope in ('local', 'global'):
                same({n: f(t) for n, t in lin.items()}, 0.2, scope, g, absolute=True)
    up = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(7))
    for g in ('filter', 'row', 'kernel', 'column', '1:3'):
        for groups in (1, 2):
            same(
                {'a': distribute_tensor(up, line, [Replicate()])},
                0.5,
                'local',
                g,
                absolute=True,
                transposed={'a': groups},
            )
            fails(
                lambda g=g, groups=groups: compute_masks(
                    {'a': distribute_tensor(up, line, [Shard(0)])},
                    0.5,
                    'local',
                    g,
                    absolute=True,
                    transposed={'a': groups},
                ),
                f'granularity={g!r}: units of',
            )
    for g in ('row', '2:4', '1:4'):
        for f in (lambda x: x, torch.ones_like):
            for s in (0.3, 0.5):
                same({n: f(t) for n, t in lin.items()}, s, 'local', g, absolute=True)
    even = {'fc': whole(8 * size, 12, seed=8), 'conv': whole(4 * size, 6, 3, 3, seed=9)}
    spread = {n: distribute_tensor(t, line, [Shard(0)]) for n, t in even.items()}
    for g in ('2x3', '4x1', '1x6'):
        for scope in ('local', 'global'):
            for s in (0.3, 0.77):
                same(spread, s, scope, g, absolute=True)
                mine = {n: t.chunk(size)[rank] for n, t in even.items()}
                masks = compute_masks(even, s, scope, g)
                pieces = compute_masks(mine, s, scope, g, group=dist.group.WORLD)
                assert all(torch.equal(m, masks[n].chunk(size)[rank]) for n, m in pieces.items())
    fails(lambda: compute_masks({'fc': spread['fc']}, 0.5, granularity='16x1'), "granularity='16x1': units of 'fc'")
    uneven = {'x': torch.rand((3, 4) if rank == 0 else (5, 4) if rank == 1 else (4, 4))}
    fails(lambda: compute_masks(uneven, 0.5, granularity='2x2', group=dist.group.WORLD), "units of 'x' extend over")
    fails(lambda: compute_masks(lin, 0.5, granularity='column'), "granularity='column'")
    fails(
        lambda: compute_masks(
            {'0.weight': w['0.weight'], '3.weight': distribute_tensor(torch.randn(4, 8, 3, 3), line, [Shard(0)])},
            0.5,
            'global',
            'filter',
        ),
        'units of different sizes',
    )


def fails(f, msg):
    try:
        f()
    except ValueError as e:
        assert msg in str(e), e
    else:
        raise AssertionError(f'no error: {msg}')


def bad_input():
    w = {n: p.detach() for n, p in prunable_weights(fully_shard(net(), mesh=line)).items()}
    if rank == size - 1:
        w['3.weight'].to_local()[0, 0] = math.nan
    for scope in ('local', 'global'):
        fails(
            lambda scope=scope: compute_masks(w, 0.5, scope),
            "scores['3.weight'] has NaN" if rank == size - 1 else 'another process have NaN',
        )
    fails(lambda: compute_masks(w, 0.5, 'lamp'), "scope='lamp'")
    fails(lambda: compute_masks(w, 0.5, group=dist.group.WORLD), 'leave `group` out')
    fails(
        lambda: compute_masks(
            {**w, 'x': distribute_tensor(torch.ones(4, 4), init_device_mesh('cpu', (size, 1)), [Shard(0), Shard(0)])},
            0.5,
        ),
        "'x' is on the mesh",
    )
    one = rank == size - 1
    x = {'x': torch.arange(6.0)}

    def pieces(x, s=0.5, **kw):
        return lambda: compute_masks(x, s, group=dist.group.WORLD, **kw)

    fails(pieces({'x': torch.arange(6)} if one else x), 'torch.int64')
    fails(pieces({'x': torch.arange(6.0).double()} if one else x), 'scores: the processes of the group differ')
    fails(pieces({'x': torch.tensor(1.0)} if one else x), "the pieces of 'x' have shapes")
    fails(pieces(x, keep={'x': torch.ones(5 if one else 6).bool()}), "keep['x']")
    fails(pieces(x, keep={'x': torch.ones(6).bool()} if one else None), 'keep: the processes of the group differ')
    fails(pieces(x, 1.5 if one else 0.5), 'sparsity=1.5')
    fails(pieces(x, 0.6 if one else 0.5), 'sparsity: the processes of the group differ')
    fails(pieces([1] if one else x), 'of type list')
    assert compute_masks({}, 0.5, group=dist.group.WORLD) == {}
    inner = dist.new_group([0])
    if rank:
        fails(lambda: compute_masks(x, 0.5, group=inner), 'is not in it')
    else:
        assert compute_masks(x, 0.5, group=inner).n_kept == 3
    y = distribute_tensor(torch.arange(24.0).view(4, 6), line, [Shard(1)])
    if size == 2:
        fails(lambda: compute_masks({'y': y.flatten()}, 0.5), "'y' is laid out as")
    whole = torch.arange(24.0).view(4, 6)
    gone = torch.where(whole > 11, whole, math.nan)  # NaN where nothing may stay any more
    same(
        {'y': distribute_tensor(gone, line, [Shard(0)])},
        0.75,
        keep={'y': distribute_tensor(whole > 11, line, [Shard(0)])},
    )
    inf = distribute_tensor(torch.tensor([[math.inf, -math.inf]] * 4), line, [Shard(0)])
    fails(lambda: compute_masks({'x': inf}, 0.5, granularity='row'), 'the mean score of a row is not a number')
    masks = compute_masks({'y': y}, 0.5)
    fails(lambda: masks.apply_({'y': whole}), 'its weight a plain tensor')
    fails(lambda: compute_masks({'y': whole}, 0.5, keep=masks), "keep['y'] is a DTensor")
    fails(lambda: lamp({'y': y}), 'LAMP')
    assert masks == Masks(full(masks)) and Masks(full(masks)) == masks and masks.jaccard(full(masks)) == 0
    fails(
        lambda: compute_masks({'x': torch.ones(3, 2 + rank)}, 0.5, group=dist.group.WORLD),
        "the pieces of 'x' have shapes",
    )
    fails(
        lambda: compute_masks({f'x{rank}': torch.ones(3)}, 0.5, group=dist.group.WORLD),
        'scores: the processes of the group differ',
    )
    fails(
        lambda: compute_masks(
            {'x': distribute_tensor(torch.ones(4, 4), line, [Shard(0)])},
            0.5,
            keep={'x': distribute_tensor(torch.ones(4, 4).bool(), line, [Shard(1)])},
        ),
        'its mask is laid out',
    )


def what_is_sent():
    "The size of messages does not grow with the number of weights"
    real, sent = dist.all_reduce, []

    def count(t, *args, **kw):
        sent.append(t.numel() * t.element_size())
        return real(t, *args, **kw)

    dist.all_reduce, res = count, {}
    for n in (100, 10_000, 100_000, 1_000_000):
        for name, f in {'normal': lambda x: x, 'equal': torch.ones_like}.items():
            sent.clear()
            x = distribute_tensor(f(torch.randn(n, 4, generator=torch.Generator().manual_seed(4))), line, [Shard(0)])
            compute_masks({'x': x, 'y': x}, 0.5, 'global', absolute=True)
            res[n, name] = sum(sent)
    dist.all_reduce = real
    assert res[10_000, 'normal'] == res[1_000_000, 'normal'] and max(res.values()) < 200_000, res


def in_a_loop(out):
    "Masks in a training, also from local and random scores; and a file of them"
    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=line)
    fully_shard(model, mesh=line)
    dls, opt = digits_dls(bs=64), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    weights = prunable_weights(model)
    for t, (x, y) in zip(range(20), dls.train, strict=False):
        nn.functional.cross_entropy(
            model(x[rank::size].as_subclass(torch.Tensor))[:, :3], y[rank::size].as_subclass(torch.Tensor) % 3
        ).backward()
        opt.step()
        scores = [{n: p.detach() for n, p in weights.items()}, taylor(weights), random_score(weights)][t % 3]
        masks = same(scores, 0.9 * cubic(t / 19), ['global', 'local'][t % 2], absolute=t % 3 == 0)
        opt.zero_grad()
        masks.apply_(weights)
        assert all(not p.full_tensor()[~full(masks)[n]].any() for n, p in weights.items())
    masks.save(out)
    dist.barrier()
    back = Masks.load(out)
    assert all(torch.equal(back[n], full(masks)[n]) for n in back) and 'spread over processes' in repr(masks)
    with torch.no_grad():
        for p in weights.values():
            p.fill_(1.0)
    back.apply_(weights)  # whole masks, on parts
    assert all(torch.equal(p.full_tensor() != 0, back[n]) for n, p in weights.items()) and masks.jaccard(masks) == 0.0


for check in (fsdp_of_every_kind, other_layouts, large, tensor_parallel, pieces, units, bad_input, what_is_sent):
    check()
in_a_loop(sys.argv[1])
if rank == 0:
    print('all checks passed')
dist.barrier()
dist.destroy_process_group()
