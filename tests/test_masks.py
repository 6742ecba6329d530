"Masks are exact, for all shapes, dtypes and scores"
import pytest, torch
from hypothesis import given, strategies as st
from fastprune.all import Masks, compute_masks, group_dims

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
sparsities = st.one_of(st.sampled_from([0., 0.5, 0.9, 0.99, 0.999999, 1-2**-53]), st.floats(0, 1, exclude_max=True))
kinds = st.sampled_from(['normal', 'equal', 'zeros', 'mostly zeros', 'few levels', 'negative', 'infinite'])


def make(kind, shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == 'equal': x = torch.full(shape, 0.25, dtype=torch.float64)
    if kind == 'zeros': x = torch.zeros(shape, dtype=torch.float64) * x.sign()     # both signs of zero
    if kind == 'mostly zeros': x = x.abs() * (torch.rand(shape, generator=g) > 0.9)
    if kind == 'few levels': x = (2*x).round()
    if kind == 'infinite': x = torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x))
    return (x.abs() if kind == 'normal' else x).to(dtype)


def split(scores, masks):
    "The kept and the pruned scores, flat"
    flat = lambda keep: torch.cat([s[m == keep].double() for s, m in zip(scores.values(), masks.values())])
    return flat(True), flat(False)


def assert_ordered(scores, masks):
    kept, pruned = split(scores, masks)
    if len(kept) and len(pruned): assert kept.min() >= pruned.max()


tensors = st.lists(st.tuples(kinds, st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=4)


@given(tensors, dtypes, sparsities, st.integers(0, 99))
def test_local_is_exact(specs, dtype, s, seed):
    scores = {str(i): make(k, shape, dtype, seed+i) for i, (k, shape) in enumerate(specs)}
    masks = compute_masks(scores, s)
    for n, x in scores.items():
        assert masks[n].dtype == torch.bool and masks[n].shape == x.shape
        assert int((~masks[n]).sum()) == round(s*x.numel())
        assert_ordered({n: x}, {n: masks[n]})


@given(tensors, st.lists(dtypes, min_size=4, max_size=4), sparsities, st.integers(0, 99))
def test_global_is_exact(specs, dts, s, seed):
    scores = {str(i): make(k, shape, dt, seed+i) for i, ((k, shape), dt) in enumerate(zip(specs, dts))}
    masks = compute_masks(scores, s, scope='global')
    assert sum(int((~m).sum()) for m in masks.values()) == round(s*sum(x.numel() for x in scores.values()))
    assert_ordered(scores, masks)


@given(kinds, st.integers(1, 60), sparsities, st.integers(0, 99))
def test_equal_scores_go_by_position(kind, n, s, seed):
    x = make(kind, (n,), torch.float32, seed)
    pruned = sorted(range(n), key=lambda i: (x[i].item(), i))[:round(s*n)]
    assert (~compute_masks({'x': x}, s)['x']).nonzero()[:, 0].tolist() == sorted(pruned)


@given(tensors, st.sampled_from(['local', 'global']), sparsities, sparsities, st.integers(0, 99))
def test_nested(specs, scope, s1, s2, seed):
    scores = {str(i): make(k, shape, torch.float32, seed+i) for i, (k, shape) in enumerate(specs)}
    others = {n: make('few levels', x.shape, torch.float32, seed+50) for n, x in scores.items()}
    keep = compute_masks(scores, s1, scope=scope)
    masks = compute_masks(others, s2, scope=scope, keep=keep)
    assert all((m <= keep[n]).all() for n, m in masks.items())
    count = lambda ms: [int((~m).sum()) for m in ms.values()]
    if scope == 'local': assert count(masks) == [max(k, round(s2*x.numel())) for k, x in zip(count(keep), scores.values())]
    else: assert sum(count(masks)) == max(sum(count(keep)), round(s2*sum(x.numel() for x in scores.values())))
    inside = {n: torch.where(keep[n], x, -torch.inf) for n, x in others.items()}
    assert_ordered(inside, masks) if scope == 'global' else [assert_ordered({n: inside[n]}, {n: masks[n]}) for n in masks]


@given(kinds, st.tuples(*[st.integers(1, 6)]*4), st.sampled_from(['row', 'column', 'kernel', 'filter']), dtypes, sparsities,
       st.sampled_from([2, 4]), st.booleans(), st.integers(0, 99))
def test_groups_are_whole_and_exact(kind, shape, granularity, dtype, s, ndim, nested, seed):
    if ndim == 2 and granularity in ('kernel', 'filter'): return
    x = make('normal' if kind == 'infinite' else kind, shape[:ndim], dtype, seed)
    keep = compute_masks({'x': x}, 0.3, granularity=granularity) if nested else None
    mask = compute_masks({'x': x}, s, granularity=granularity, keep=keep)['x']
    dims = group_dims('x', x.shape, granularity)
    assert torch.equal(mask.amax(dims), mask.amin(dims))
    groups = mask.amax(dims).numel()
    assert int((~mask.amax(dims)).sum()) == max(round(s*groups), round(0.3*groups) if nested else 0)


@given(sparsities, st.integers(0, 99), st.booleans())
def test_groups_of_different_sizes_come_near(s, seed, nested):
    g = torch.Generator().manual_seed(seed)
    scores = {'a': torch.rand(6, 3, 3, 3, generator=g), 'b': torch.rand(9, 4, 1, 1, generator=g)}
    keep = compute_masks({n: -x for n, x in scores.items()}, 0.2, scope='global', granularity='filter') if nested else None
    masks = compute_masks(scores, s, scope='global', granularity='filter', keep=keep)
    pruned, n = sum(int((~m).sum()) for m in masks.values()), 198
    if nested: assert all((m <= keep[k]).all() for k, m in masks.items())
    assert abs(pruned-round(s*n)) <= 27/2 or (nested and pruned == sum(int((~m).sum()) for m in keep.values()))


def test_lower_sparsity_gives_the_largest_updates_back():
    torch.manual_seed(0)
    w = torch.randn(50, 40)
    masks = compute_masks({'w': w.abs()}, 0.9)
    update = 1e-3*torch.randn(50, 40)
    dense = masks.apply_({'w': w})['w'] + update
    lower = compute_masks({'w': dense.abs()}, 0.45)
    assert int((~lower['w']).sum()) == 900
    back, still = lower['w'] & ~masks['w'], ~lower['w'] & ~masks['w']
    assert back.sum() == 900 and update[back].abs().min() >= update[still].abs().max()


def test_apply_writes_plain_zeros():
    w = {'w': torch.tensor([-1., torch.inf, torch.nan, -0., 5.])}
    Masks(w=torch.tensor([False, False, False, False, True])).apply_(w)
    assert w['w'].view(torch.int32).tolist() == torch.tensor([0., 0, 0, 0, 5]).view(torch.int32).tolist()     # no -0.0, no nan


@given(st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=0, max_size=3), st.integers(0, 99))
def test_masks_survive_the_file(tmp_path_factory, shapes, seed):
    g = torch.Generator().manual_seed(seed)
    masks = Masks({f'layer {i}.weight': torch.rand(shape, generator=g) > 0.5 for i, shape in enumerate(shapes)})
    path = tmp_path_factory.mktemp('masks')/'m.safetensors'
    masks.save(path)
    loaded = Masks.load(path)
    assert loaded == masks and not loaded != masks and loaded.sparsity == masks.sparsity


def test_files_that_are_no_masks(tmp_path):
    from safetensors.torch import save_file
    (tmp_path/'text').write_text('hello')
    save_file({'w': torch.ones(3)}, tmp_path/'weights')
    Masks(w=torch.ones(20).bool()).save(tmp_path/'good')
    data = (tmp_path/'good').read_bytes()
    (tmp_path/'other shape').write_bytes(data.replace(b'"shape w":"20"', b'"shape w":"90"'))
    (tmp_path/'cut').write_bytes(data[:-1])
    for name in ('text', 'weights', 'other shape', 'cut'):
        with pytest.raises(ValueError, match=name): Masks.load(tmp_path/name)
    with pytest.raises(FileNotFoundError): Masks.load(tmp_path/'nothing')


def test_masks_of_a_thousand_tensors_are_quick_to_ask_for():
    scores = {f'layers.{i}.weight': torch.rand(3, 3) for i in range(1000)}
    masks = compute_masks(scores, {'layers': 0.5, 'layers.7.weight': 0.})
    assert masks['layers.7.weight'].all() and masks.n_kept == 999*5 + 9
