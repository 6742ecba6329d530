"Masks are exact, for all shapes, dtypes and scores"

import contextlib
from itertools import pairwise

import pytest
import torch
from fastai.basics import Callback
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastprune.all import Masks, SparsifyCallback, compute_masks, linear, prunable_weights
from fastprune.core import selection
from fastprune.core.devices import pretend
from fastprune.core.granularity import GRANULARITIES, check_granularity
from fastprune.core.scopes import layer_counts

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
sparsities = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999999, 1 - 2**-53]), st.floats(0, 1, exclude_max=True))
kinds = st.sampled_from(['normal', 'equal', 'zeros', 'mostly zeros', 'few levels', 'negative', 'infinite'])


def make(kind, shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == 'equal':
        x = torch.full(shape, 0.25, dtype=torch.float64)
    if kind == 'zeros':
        x = torch.zeros(shape, dtype=torch.float64) * x.sign()  # both signs of zero
    if kind == 'mostly zeros':
        x = x.abs() * (torch.rand(shape, generator=g) > 0.9)
    if kind == 'few levels':
        x = (2 * x).round()
    if kind == 'infinite':
        x = torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x))
    return (x.abs() if kind == 'normal' else x).to(dtype)


def split(scores, masks):
    "The kept and the pruned scores, flat"
    flat = lambda keep: torch.cat([s[m == keep].double() for s, m in zip(scores.values(), masks.values(), strict=True)])
    return flat(True), flat(False)


def assert_ordered(scores, masks):
    kept, pruned = split(scores, masks)
    if len(kept) and len(pruned):
        assert kept.min() >= pruned.max()


tensors = st.lists(st.tuples(kinds, st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=4)


@pytest.fixture(params=['direct', 'bracket', 'bracket elsewhere', 'unlucky', 'pieces', 'accelerator'], autouse=True)
def path(request, monkeypatch):
    "Every test runs on every path of the selection"
    with pretend() if request.param == 'accelerator' else contextlib.nullcontext():
        set_path(request.param, monkeypatch)
        yield


def set_path(name, monkeypatch):
    if name in ('direct', 'accelerator'):
        return
    monkeypatch.setattr(selection, 'SMALL', 3)
    monkeypatch.setattr(selection, 'SPREAD', 0.2)
    if name == 'pieces':
        monkeypatch.setattr(selection, 'PIECE', 7)
    if name == 'bracket elsewhere':
        monkeypatch.setattr(selection, '_on_cpu', lambda x: False)  # as on an accelerator
    if name == 'unlucky':  # samples that tell nothing, twice out of three times
        sample, calls = selection.Pieces.sample, []

        def unlucky(self, m):
            calls.append(1)
            res = sample(self, m)
            return res if len(calls) % 3 == 0 or not len(res) else res[:1].repeat(len(res))

        monkeypatch.setattr(selection.Pieces, 'sample', unlucky)


exact = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.sample(2)
@exact
@given(tensors, dtypes, sparsities, st.integers(0, 99))
def test_local_is_exact(specs, dtype, s, seed):
    scores = {str(i): make(k, shape, dtype, seed + i) for i, (k, shape) in enumerate(specs)}
    masks = compute_masks(scores, s)
    for n, x in scores.items():
        assert masks[n].dtype == torch.bool and masks[n].shape == x.shape
        assert int((~masks[n]).sum()) == round(s * x.numel())
        assert_ordered({n: x}, {n: masks[n]})


@pytest.mark.sample(2)
@exact
@given(tensors, st.lists(dtypes, min_size=4, max_size=4), sparsities, st.integers(0, 99))
def test_global_is_exact(specs, dts, s, seed):
    scores = {str(i): make(k, shape, dt, seed + i) for i, ((k, shape), dt) in enumerate(zip(specs, dts, strict=False))}
    masks = compute_masks(scores, s, scope='global')
    assert sum(int((~m).sum()) for m in masks.values()) == round(s * sum(x.numel() for x in scores.values()))
    assert_ordered(scores, masks)


@pytest.mark.sample(2)
@exact
@given(kinds, st.integers(1, 60), sparsities, st.integers(0, 99))
def test_equal_scores_go_by_position(kind, n, s, seed):
    x = make(kind, (n,), torch.float32, seed)
    pruned = sorted(range(n), key=lambda i: (x[i].item(), i))[: round(s * n)]
    assert (~compute_masks({'x': x}, s)['x']).nonzero()[:, 0].tolist() == sorted(pruned)


@pytest.mark.sample(2)
@exact
@given(tensors, st.sampled_from(['local', 'global']), sparsities, sparsities, st.integers(0, 99))
def test_nested(specs, scope, s1, s2, seed):
    scores = {str(i): make(k, shape, torch.float32, seed + i) for i, (k, shape) in enumerate(specs)}
    others = {n: make('few levels', x.shape, torch.float32, seed + 50) for n, x in scores.items()}
    keep = compute_masks(scores, s1, scope=scope)
    masks = compute_masks(others, s2, scope=scope, keep=keep)
    assert all((m <= keep[n]).all() for n, m in masks.items())
    count = lambda ms: [int((~m).sum()) for m in ms.values()]
    if scope == 'local':
        assert count(masks) == [
            max(k, round(s2 * x.numel())) for k, x in zip(count(keep), scores.values(), strict=True)
        ]
    else:
        assert sum(count(masks)) == max(sum(count(keep)), round(s2 * sum(x.numel() for x in scores.values())))
    inside = {n: torch.where(keep[n], x, -torch.inf) for n, x in others.items()}
    assert_ordered(inside, masks) if scope == 'global' else [
        assert_ordered({n: inside[n]}, {n: masks[n]}) for n in masks
    ]


@pytest.mark.sample(2)
@exact
@given(
    kinds,
    st.tuples(*[st.integers(1, 6)] * 4),
    st.sampled_from(['row', 'column', 'kernel', 'filter']),
    dtypes,
    sparsities,
    st.sampled_from([2, 4]),
    st.booleans(),
    st.integers(0, 99),
)
def test_groups_are_whole_and_exact(kind, shape, granularity, dtype, s, ndim, nested, seed):
    if ndim == 2 and granularity in ('kernel', 'filter'):
        return
    x = make('normal' if kind == 'infinite' else kind, shape[:ndim], dtype, seed)
    keep = compute_masks({'x': x}, 0.3, granularity=granularity) if nested else None
    mask = compute_masks({'x': x}, s, granularity=granularity, keep=keep)['x']
    dims = check_granularity(granularity).view(tuple(x.shape))[1]
    assert torch.equal(mask.amax(dims), mask.amin(dims))
    groups = mask.amax(dims).numel()
    assert int((~mask.amax(dims)).sum()) == max(round(s * groups), round(0.3 * groups) if nested else 0)


def blocks_of(x, r, c):
    "A tensor as [blocks, r, blocks, c, ...]"
    return x.reshape(len(x) // r, r, x.shape[1] // c, c, *x.shape[2:])


@pytest.mark.sample(2)
@exact
@given(
    st.sampled_from(['normal', 'equal', 'zeros', 'mostly zeros', 'few levels', 'negative']),
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=3),
    dtypes,
    sparsities,
    st.sampled_from(['local', 'global']),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_blocks_are_whole_and_exact(kind, block, counts, dtype, s, scope, nested, absolute, seed):
    "In linear layers and convolutions: those whose mean score is lowest, as single weights of these scores would be"
    (r, c), g = block, f'{block[0]}x{block[1]}'
    shapes = [(r * a, c * b, *[3] * nd) for a, b, nd in counts]
    scores = {str(i): make(kind, shape, dtype, seed + i) for i, shape in enumerate(shapes)}
    other = {n: make('few levels', x.shape, torch.float32, seed + 50) for n, x in scores.items()}
    keep = compute_masks(other, 0.3, scope, g) if nested else None
    masks = compute_masks(scores, s, scope, g, keep, absolute)
    kept = {n: blocks_of(m, r, c).amax((1, 3)) for n, m in masks.items()}
    for n, m in masks.items():
        assert m.shape == scores[n].shape and m.is_contiguous()
        assert torch.equal(kept[n], blocks_of(m, r, c).amin((1, 3)))
        assert not nested or (m <= keep[n]).all()
        assert int(kept[n].numel()) == check_granularity(g).count(n, m.shape)
    pruned, sizes = [int((~k).sum()) for k in kept.values()], [k.numel() for k in kept.values()]
    if scope == 'global':
        pruned, sizes = [sum(pruned)], [sum(sizes)]
    before = [int((~blocks_of(m, r, c).amax((1, 3))).sum()) for m in keep.values()] if nested else [0] * len(pruned)
    before = [sum(before)] if scope == 'global' else before
    want = [round(s * k * r * c) / (r * c) if scope == 'global' else s * k * r * c / (r * c) for k in sizes]
    assert pruned == [max(round(k), b) for k, b in zip(want, before, strict=True)]
    wide = torch.promote_types(dtype, torch.float32)
    mean = lambda x: (
        torch.linalg.vector_norm(x, 1, (1, 3), dtype=wide) / (r * c) if absolute else x.mean((1, 3), dtype=wide)
    )
    for n, x in scores.items():
        means = mean(blocks_of(x, r, c))
        assert scope == 'global' or nested or torch.equal(compute_masks({n: means}, s)[n], kept[n])


@pytest.mark.sample(2)
@pytest.mark.parametrize('recover', [True, False, 'alive'])
@pytest.mark.parametrize('scope', ['local', 'global', 'erk'])
def test_blocks_while_training(learner, fit, recover, scope):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    cb, seen = SparsifyCallback(0.75, linear, scope=scope, granularity='2x4', recover=recover, interval=1), []
    learn = learner(model, bs=128)
    watch = type(
        'Watch', (Callback,), dict(order=99, after_step=lambda self: seen.append(Masks(self.learn.masks or {})))
    )
    fit(learn, 1, cbs=[cb, watch()])
    assert learn.masks.sparsity == pytest.approx(0.75, abs=0.01)
    for n, m in learn.masks.items():
        blocks = blocks_of(m, 2, 4)
        assert torch.equal(blocks.amax((1, 3)), blocks.amin((1, 3)))
        assert torch.equal(model.get_parameter(n) != 0, m)
    if scope == 'local':
        assert [int((~m).sum()) for m in learn.masks.values()] == [1536, 240]
    if not recover:
        assert all((b[n] <= a[n]).all() for a, b in pairwise(m for m in seen if m) for n in b)


def test_layers_that_blocks_do_not_fit(learner, fit):
    learn = learner(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 10)))
    with pytest.warns(UserWarning, match="'4x4' does not fit '0.weight', '3.weight': left whole"):
        learn.prune(0.5, granularity='4x4')
    assert list(learn.masks) == ['1.weight'] and learn.masks.sparsity == 0.5
    with pytest.raises(
        ValueError, match="'4x4' does not fit '3.weight' .* whose 10 outputs are no multiple of 4: use 'weight'"
    ):
        learn.prune(0.5, granularity='4x4', include=nn.Linear)
    w = prunable_weights(learn.model, include='1')
    with pytest.raises(ValueError, match="granularity='0x4' is unknown: .* or blocks as '4x4'"):
        compute_masks(w, 0.5, granularity='0x4', absolute=True)


@pytest.mark.sample(2)
@exact
@given(sparsities, st.integers(0, 99), st.booleans())
def test_groups_of_different_sizes_come_near(s, seed, nested):
    g = torch.Generator().manual_seed(seed)
    scores = {'a': torch.rand(6, 3, 3, 3, generator=g), 'b': torch.rand(9, 4, 1, 1, generator=g)}
    keep = (
        compute_masks({n: -x for n, x in scores.items()}, 0.2, scope='global', granularity='filter') if nested else None
    )
    masks = compute_masks(scores, s, scope='global', granularity='filter', keep=keep)
    pruned, n = sum(int((~m).sum()) for m in masks.values()), 198
    if nested:
        assert all((m <= keep[k]).all() for k, m in masks.items())
    assert abs(pruned - round(s * n)) <= 27 / 2 or (nested and pruned == sum(int((~m).sum()) for m in keep.values()))


def test_lower_sparsity_gives_the_largest_updates_back():
    torch.manual_seed(0)
    w = torch.randn(50, 40)
    masks = compute_masks({'w': w.abs()}, 0.9)
    update = 1e-3 * torch.randn(50, 40)
    dense = masks.apply_({'w': w})['w'] + update
    lower = compute_masks({'w': dense.abs()}, 0.45)
    assert int((~lower['w']).sum()) == 900
    back, still = lower['w'] & ~masks['w'], ~lower['w'] & ~masks['w']
    assert back.sum() == 900 and update[back].abs().min() >= update[still].abs().max()


def test_apply_writes_plain_zeros():
    w = {'w': torch.tensor([-1.0, torch.inf, torch.nan, -0.0, 5.0])}
    Masks(w=torch.tensor([False, False, False, False, True])).apply_(w)
    assert (
        w['w'].view(torch.int32).tolist() == torch.tensor([0.0, 0, 0, 0, 5]).view(torch.int32).tolist()
    )  # no -0.0, no nan


@pytest.mark.sample(2)
@exact
@given(st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=0, max_size=3), st.integers(0, 99))
def test_masks_survive_the_file(tmp_path_factory, shapes, seed):
    g = torch.Generator().manual_seed(seed)
    masks = Masks({f'layer {i}.weight': torch.rand(shape, generator=g) > 0.5 for i, shape in enumerate(shapes)})
    path = tmp_path_factory.mktemp('masks') / 'm.safetensors'
    masks.save(path)
    loaded = Masks.load(path)
    assert loaded == masks and not loaded != masks and loaded.sparsity == masks.sparsity


def test_files_that_are_no_masks(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / 'text').write_text('hello')
    save_file({'w': torch.ones(3)}, tmp_path / 'weights')
    Masks(w=torch.ones(20).bool()).save(tmp_path / 'good')
    data = (tmp_path / 'good').read_bytes()
    (tmp_path / 'other shape').write_bytes(data.replace(b'"shape w":"20"', b'"shape w":"90"'))
    (tmp_path / 'cut').write_bytes(data[:-1])
    for name in ('text', 'weights', 'other shape', 'cut'):
        with pytest.raises(ValueError, match=name):
            Masks.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / 'nothing')


@pytest.mark.parametrize('scope', ['erk', 'balanced'])
@pytest.mark.parametrize('granularity, s', [('2:4', 0.4), ('2:4', 0.5), ('1:4', 0.75)])
def test_patterns_reach_the_sparsity_of_shared_scopes(scope, granularity, s):
    "Also where a tensor's share is more than n:m lets it prune: others prune more then"
    torch.manual_seed(0)
    scores = {n: torch.rand(shape) for n, shape in dict(a=(16, 8, 3, 3), b=(10, 32), c=(64, 64), d=(4, 4)).items()}
    masks, n = compute_masks(scores, s, scope=scope, granularity=granularity), sum(x.numel() for x in scores.values())
    assert abs(n - masks.n_kept - round(s * n)) <= 3 * len(scores)  # whole groups of two or three weights
    if s in (0.5, 0.75):  # all that the pattern allows
        assert all(m.float().mean() == 1 - s for m in masks.values())


@pytest.mark.sample(2)
def test_masks_of_a_thousand_tensors_are_quick_to_ask_for():
    scores = {f'layers.{i}.weight': torch.rand(3, 3) for i in range(1000)}
    masks = compute_masks(scores, {'layers': 0.5, 'layers.7.weight': 0.0})
    assert masks['layers.7.weight'].all() and masks.n_kept == 999 * 5 + 9


@pytest.mark.sample(2)
@exact
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=5),
    sparsities,
    st.sampled_from(['erk', 'balanced']),
    st.integers(0, 99),
)
def test_shared_by_shape(shapes, s, scope, seed):
    scores = {str(i): make('few levels', shape, torch.float32, seed + i) for i, shape in enumerate(shapes)}
    masks = compute_masks(scores, s, scope=scope)
    n = sum(x.numel() for x in scores.values())
    pruned = {k: int((~m).sum()) for k, m in masks.items()}
    assert sum(pruned.values()) == round(s * n) and pruned == layer_counts(
        {k: x.shape for k, x in scores.items()}, s, scope
    )
    kept = {k: scores[k].numel() - p for k, p in pruned.items()}
    share = {k: 1 if scope == 'balanced' else sum(x.shape) for k, x in scores.items()}
    free = [k for k in kept if kept[k] < scores[k].numel() - 1]
    for a in free:  # what is not whole shares in proportion, to a weight
        for b in free:
            assert abs(kept[a] / share[a] - kept[b] / share[b]) <= 1 / share[a] + 1 / share[b]
    for k in scores:
        assert_ordered({k: scores[k]}, {k: masks[k]})


@pytest.mark.sample(2)
@exact
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 5)]),
    st.sampled_from([(), (3,), (2, 3)]),
    st.just(1.0) | st.floats(0, 1),
    st.sampled_from(['local', 'global']),
    kinds,
    st.integers(0, 99),
    st.booleans(),
)
def test_n_of_m(rows, blocks, nm, kernel, part, scope, kind, seed, absolute):
    (n, m), granularity = nm, f'{nm[0]}:{nm[1]}'
    x = make('normal' if kind == 'infinite' else kind, (rows, blocks * m, *kernel), torch.float32, seed)
    s = part * (1 - n / m)
    mask = compute_masks({'x': x}, s, scope, granularity, absolute=absolute)['x']
    inside = mask.movedim(1, -1).reshape(-1, m)
    assert set(inside.sum(1).tolist()) <= {n, m}
    assert int((inside.sum(1) == n).sum()) == round(s * x.numel() / (m - n)) or scope == 'global'
    if part == 1:
        assert (inside.sum(1) == n).all()
    scores = (x.abs() if absolute else x).movedim(1, -1).reshape(-1, m)
    for a, b in zip(scores, inside, strict=True):
        assert not (~b).any() or a[b].min() >= a[~b].max()


@pytest.mark.parametrize('granularity', ['row', 'column', 'kernel', 'filter', '2:4', '3x4'])
@pytest.mark.parametrize('groups', [1, 2])
def test_transposed_convolutions(granularity, groups):
    "The same as an ordinary convolution with its dimensions swapped, group by group"
    torch.manual_seed(0)
    w = torch.nn.ConvTranspose2d(8, 6, 3, groups=groups).weight.detach()
    conv = torch.cat([g.transpose(0, 1) for g in w.chunk(groups)])
    for s in (0.25, 0.5):
        mask = compute_masks({'w': w}, s, granularity=granularity, transposed={'w': groups}, absolute=True)['w']
        want = compute_masks({'w': conv}, s, granularity=granularity, absolute=True)['w']
        assert torch.equal(torch.cat([g.transpose(0, 1) for g in mask.chunk(groups)]), want)
        assert (
            mask
            <= compute_masks(
                {'w': w}, s, granularity=granularity, transposed={'w': groups}, absolute=True, keep={'w': mask}
            )['w']
        ).all()


NAMED = [g for g in GRANULARITIES[:-2] if not check_granularity(g).tied]  # units within one tensor


@pytest.mark.sample(10)
@pytest.mark.parametrize('scope', ['local', 'global', 'erk'])
@pytest.mark.parametrize('granularity', [*NAMED, '1:2', '2x2'])
def test_absolute_is_magnitude(scope, granularity):
    torch.manual_seed(0)
    w = {
        'a': torch.randn(6, 4, 3, 3),
        'b': torch.randn(4, 2, 5, 5).to(memory_format=torch.channels_last),
        'c': torch.randn(8, 6, 2, 2, dtype=torch.float64),
    }
    assert compute_masks(w, 0.4, scope, granularity, absolute=True) == compute_masks(
        {n: x.abs() for n, x in w.items()}, 0.4, scope, granularity
    )


@pytest.mark.parametrize('granularity', [*NAMED, '2:4', '2x4'])
def test_finer_masks_are_kept(granularity):
    torch.manual_seed(0)
    scores = {'w': torch.rand(4, 4, 3, 3)}
    keep = compute_masks({'w': torch.rand(4, 4, 3, 3)}, 0.4)
    assert (compute_masks(scores, 0.5, granularity=granularity, keep=keep)['w'] <= keep['w']).all()


def test_what_can_not_be_ranked():
    x = torch.zeros(6, 4)
    x[:, 0], x[:3, 1] = torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r'the mean score of a (row|unit of .w.) is not a number'):
        compute_masks({'w': x}, 0.34, granularity='row')
    for keep in ({'w': torch.ones(6, 4)}, [x], {'w': torch.ones(4, 6).bool()}):
        with pytest.raises(ValueError, match='keep'):
            compute_masks({'w': torch.rand(6, 4)}, 0.5, keep=keep)
    for bad in (torch.nan, -torch.nan):
        for scope in ('local', 'global', 'erk', 'balanced'):
            for s in (0.0, 0.5, 0.999):
                x = torch.rand(5, 4)
                x[2, 2] = bad
                with pytest.raises(ValueError, match=r"scores\['b'\] has NaN"):
                    compute_masks({'a': torch.rand(3, 3), 'b': x}, s, scope)


@pytest.mark.sample(2)
def test_large_tensors_of_every_kind(monkeypatch):
    "Above the size that is searched directly, in several pieces"
    if selection.PIECE == 7:
        monkeypatch.setattr(selection, 'PIECE', 70_000)
    for kind in ('normal', 'equal', 'zeros', 'mostly zeros', 'few levels', 'negative', 'infinite'):
        x = make(kind, (600_000,), torch.float32, 0)
        order = x.argsort(stable=True)
        for k in (1, 299_999, 540_000, 599_999):
            mask = selection.lowest([x[:200_000], x[200_000:]], k)
            want = torch.ones(600_000, dtype=torch.bool)
            want[order[:k]] = False
            assert torch.equal(torch.cat(mask), want), (kind, k)


def test_masks_print_as_a_summary():
    m = Masks(a=torch.arange(12).view(3, 4) < 3, b=torch.ones(0, dtype=torch.bool))
    lines = [
        'Masks: 3 of 12 weights kept, 75% pruned',
        '  a 3x4: 3 of 12 weights kept, 75% pruned',
        '  b 0: 0 of 0 weights kept, 0% pruned',
    ]
    assert repr(m).split('\n') == lines
