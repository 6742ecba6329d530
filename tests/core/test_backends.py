"All selections make the masks of the CPU, to the bit, and wait for nothing"

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modes import forbid_reads
from processes import python
from scores import kinds, laid_out, layouts, numbers, same_bits, weights_to_zero, zeroed
from torch.utils._pytree import tree_map

from fastprune.core import backends, selection_triton, triton_programs, triton_search
from fastprune.core.backends import Fallback, TorchSelection, select
from fastprune.core.compute import compute_masks
from fastprune.core.devices import pretend
from fastprune.core.granularity import GRANULARITIES, check_granularity
from fastprune.core.later import Checks, delayed_checks
from fastprune.core.mask_counts import kept_later, know, known
from fastprune.core.masks import Masks
from fastprune.core.scopes import SCOPES
from fastprune.core.selection_host import HostSelection
from fastprune.core.selection_triton import TritonSelection
from fastprune.core.triton_programs import interpreted
from fastprune.core.triton_search import Search

pytestmark = pytest.mark.cpu_only  # kernels run on the GPU, if there is one, and are compared with the CPU

HALVES = (torch.float16, torch.bfloat16)
GPU = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


needs_gpu = pytest.mark.skipif(GPU.type != 'cuda', reason='graphs, streams and large tensors need a GPU')


needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='triton is part of PyTorch on Linux only')


@pytest.fixture(scope='module')
def triton():
    "Kernels run on a GPU, or else on the CPU, where tensors of a hundred numbers are enough for several programs"
    pytest.importorskip('triton', reason='triton is part of PyTorch on Linux only')
    if GPU.type == 'cuda':
        yield
        return
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_programs, 'CHUNK', 64)
        patch.setattr(triton_programs, 'BLOCK', 32)
        yield


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def use_kernels(monkeypatch):
    "All devices have a selection by kernels, as a GPU has"
    selection = Fallback()
    monkeypatch.setattr(backends, 'selection_for', lambda device: selection)


def there(xs):
    "Copies where kernels run, laid out as they are"
    if xs is None:
        return None
    copies = [x.to(GPU, copy=True) for x in xs]
    return [laid_out(c, 'odd address') if x.storage_offset() else c for x, c in zip(xs, copies, strict=True)]


shapes = st.sampled_from([(), (0,), (3,), (0, 4), (64,), (7, 9), (3, 4, 2, 2), (150,)])
floats = [torch.float32, torch.float16, torch.bfloat16]
specs = st.lists(st.tuples(kinds, shapes, layouts, st.integers(0, 99)), min_size=1, max_size=3)
parts = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
keeps = st.sampled_from([None, 0.5, 0.0, 1.0])


def assert_same_as_cpu(selection, specs, dtypes, part, together, absolute, kept):
    xs = [laid_out(numbers(kind, s, seed).to(d), lay) for (kind, s, lay, seed), d in zip(specs, dtypes, strict=False)]
    keep = (
        None if kept is None else [torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) < kept for x in xs]
    )
    if kept is not None:
        xs = [
            laid_out(torch.where(m, x, torch.nan), 'odd address') for x, m in zip(xs, keep, strict=True)
        ]  # not ranked
    ks = [round(part * x.numel()) for x in xs]
    ks = sum(ks) if together else ks
    want, _ = HostSelection().lowest(xs, ks, absolute, keep)
    got, nan = selection.lowest(there(xs), ks, absolute, there(keep))
    assert same_bits(got, want) and all(m.is_contiguous() for m in got)
    assert nan.tolist() == [False] * len(xs)


@given(specs, st.lists(st.sampled_from([*floats, torch.float64]), min_size=3, max_size=3), parts, *[st.booleans()] * 2)
def test_sorting_selects_as_the_cpu_does(specs, dtypes, part, together, absolute):
    for kept in (None, 0.5, 0.0, 1.0):
        assert_same_as_cpu(TorchSelection(), specs, dtypes, part, together, absolute, kept)


@pytest.mark.parametrize('together', [True, False])
@pytest.mark.parametrize('kept', [None, 0.5])
def test_more_than_cuda_sorts_is_selected_in_pieces(monkeypatch, kept, together):
    monkeypatch.setattr(backends, '_most_sorted', 20)
    monkeypatch.setattr(backends, '_below', None)
    specs = [('normal', (7, 9), 'contiguous', 1), ('normal', (3,), 'contiguous', 2)]
    assert_same_as_cpu(TorchSelection(), specs, [torch.float64] * 2, 0.4, together, False, kept)


few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@few
@given(
    specs,
    st.one_of(st.sampled_from(floats).map(lambda d: [d] * 3), st.just(floats)),
    *(parts, st.booleans(), st.booleans(), keeps),
)
def test_kernels_select_as_the_cpu_does(triton, specs, dtypes, part, together, absolute, kept):
    assert_same_as_cpu(TritonSelection(), specs, dtypes, part, together, absolute, kept)


@pytest.mark.parametrize('selection', [TorchSelection, TritonSelection])
def test_nan_is_a_flag(triton, selection):
    xs = [torch.tensor([[1.0, 2.0]]), torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, -torch.nan])]
    keep = [torch.tensor([[True, True]]), torch.tensor([False, True]), torch.tensor([True, True])]
    for ks in (3, [1, 1, 1]):
        masks, nan = selection().lowest(there(xs), ks, keep=there(keep))
        assert nan.tolist() == [False, False, True]
    assert masks[0].tolist() == [[False, True]] and masks[1].tolist() == [False, True]


@pytest.mark.parametrize('selection', [TorchSelection, Fallback])
def test_float8_and_float64(triton, selection):
    x = torch.randn(40).to(torch.float8_e4m3fn)
    wide = torch.cat([torch.ones(3, dtype=torch.float64) + 1e-12 * k for k in (2, 1, 3)])
    with no_warnings():
        for scores in (x, wide):
            got, _ = selection().lowest(there([scores]), [5])
            assert same_bits(got, HostSelection().lowest([scores], [5])[0])


mixed = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
layouts_of_weights = ['plain', 'channels last', 'transposed', 'odd address']


@pytest.mark.sample(10)
@pytest.mark.parametrize('layout', layouts_of_weights)
@pytest.mark.parametrize('dtype', [*HALVES, torch.float32, torch.float64, 'mixed'], ids=str)
@pytest.mark.parametrize('selection', [HostSelection, TorchSelection, TritonSelection])
def test_pruned_weights_become_plain_zeros(triton, selection, dtype, layout):
    "+0.0 in place of inf, NaN and -0.0, by masks of one storage and of several"
    make = lambda: weights_to_zero(torch.float32 if dtype == 'mixed' else dtype, layout)
    weights = [w.to(d) for w, d in zip(make(), mixed, strict=True)] if dtype == 'mixed' else make()
    masks = [numbers('normal', w.shape, 50 + i) > 0 for i, w in enumerate(weights)]
    memory = torch.cat([m.flatten() for m in masks]).to(GPU)
    together = [m.view(w.shape) for m, w in zip(memory.split([w.numel() for w in weights]), weights, strict=True)]
    one = selection()
    for by in (together, there(masks), [laid_out(m, layout) for m in there(masks)]):
        ws = there(weights)
        versions = [w._version for w in ws]
        one.project(ws, by)
        assert same_bits(ws, zeroed(weights, masks))
        assert all(w._version > v for w, v in zip(ws, versions, strict=True) if w.numel())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'dtype, layout',
    [
        (torch.float32, 'channels last'),
        (torch.bfloat16, 'plain'),
        (torch.bfloat16, 'transposed'),
        (torch.float16, 'odd address'),
        ('mixed', 'channels last'),
    ],
    ids=str,
)
@pytest.mark.parametrize('selection', [HostSelection, TorchSelection, TritonSelection])
def test_zeros_come_with_the_masks(triton, selection, dtype, layout):
    "In one pass where weights are laid out as scores, and else in another one"
    weights = weights_to_zero(torch.float32 if dtype == 'mixed' else dtype, layout)
    weights = [w.to(d) for w, d in zip(weights, mixed, strict=True)] if dtype == 'mixed' else weights
    scores = [w.nan_to_num() for w in weights]
    ks = [round(0.6 * w.numel()) for w in weights]
    for xs in (scores, [x.contiguous().float() for x in scores]):
        want, _ = HostSelection().lowest(xs, ks, True)
        ws = there(weights)
        masks, _ = selection().lowest(there(xs), ks, True, None, ws)
        assert same_bits(masks, want) and same_bits(ws, zeroed(weights, want))


def test_only_some_are_aligned(triton):
    "Scores whose numbers are read 16 bytes at once, with masks or weights that can't be"
    scores = [numbers('normal', s, i) for i, s in enumerate(((64,), (16, 8), (2, 8, 2, 2)))]
    odd = lambda xs: [laid_out(x, 'odd address') for x in xs]
    keep, ks = [numbers('normal', x.shape, 9) > -1 for x in scores], [20, 40, 30]
    for k, has_odd_keep in product((None, keep), (True, False)):
        want, _ = HostSelection().lowest(scores, ks, True, k)
        ws = odd(there(scores))
        masks, _ = TritonSelection().lowest(
            there(scores), ks, True, k and (odd if has_odd_keep else list)(there(k)), ws
        )
        assert same_bits(masks, want) and same_bits(ws, zeroed(scores, want))
        ws = odd(there(scores))
        TritonSelection().project(ws, odd(masks) if has_odd_keep else masks)
        assert same_bits(ws, zeroed(scores, want))


def test_weights_that_are_their_own_scores(triton):
    for absolute in (True, False):
        w = numbers('normal', (150,), 0)
        (want,), _ = HostSelection().lowest([w], [70], absolute)
        x = w.clone().to(GPU).requires_grad_()
        (mask,), _ = TritonSelection().lowest([x], [70], absolute, None, [x.detach()])
        assert torch.equal(mask.cpu(), want) and torch.equal(x.detach().cpu(), w * want)
        assert x._version == 1  # as autograd counts changes


@pytest.mark.parametrize('selection', [HostSelection, TorchSelection, TritonSelection])
def test_weights_that_share_memory(triton, selection):
    "Each gets its zeros, whichever comes first"
    memory = torch.ones(150, device=GPU)
    weights = [memory[:100], memory[40:]]
    scores = [numbers('normal', w.shape, i) for i, w in enumerate(weights)]
    want, _ = HostSelection().lowest(scores, [60, 60])
    kept = torch.ones(150, dtype=torch.bool)
    kept[:100] &= want[0]
    kept[40:] &= want[1]
    masks, _ = selection().lowest(there(scores), [60, 60], zeros=weights)
    assert same_bits(masks, want) and torch.equal(memory.cpu(), kept.float())
    memory.fill_(1)
    selection().project(weights, masks)
    assert torch.equal(memory.cpu(), kept.float())


def test_a_search_is_used_again(triton):
    "With other numbers, at other addresses, for another k"
    selection = TritonSelection()
    for step, k in enumerate((3, 40, 40, 61)):
        xs = [numbers(kind, (7, 9), step + i) for i, kind in enumerate(('normal', 'few levels'))]
        keep = [numbers('normal', x.shape, step + 20) > -1 for x in xs]
        for ks in ([k, 2], k + 2):
            got, _ = selection.lowest(there(xs), ks, keep=there(keep))
            assert same_bits(got, HostSelection().lowest(xs, ks, keep=keep)[0])
    assert len(selection.searches) == 2


def test_only_the_last_ones_are_kept(triton, monkeypatch):
    monkeypatch.setattr(selection_triton, 'KEPT', 2)
    selection = TritonSelection()
    for n in (3, 4, 5, 3, 4):
        x, w = torch.arange(n).float(), torch.ones(n, device=GPU)
        (mask,), _ = selection.lowest(there([x]), [2])
        selection.project([w], [mask])
        assert w.tolist() == mask.tolist() == [False, False] + [True] * (n - 2)
        assert len(selection.searches) <= 2 and len(selection.projections) <= 2


def test_an_address_is_used_again_by_another_type(triton):
    "A weight is freed, and one with narrower elements takes its place"
    selection, memory = TritonSelection(), torch.ones(8, device=GPU)
    mask = torch.tensor([True, False, True, False]).to(GPU)
    selection.project([memory[:4]], [mask])
    assert memory.tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    narrow = memory.view(torch.float16)[:4].fill_(1)
    selection.project([narrow], [mask])
    assert narrow.tolist() == [1, 0, 1, 0] and memory[2:].tolist() == [1, 0, 1, 1, 1, 1]


def test_in_inference_mode_and_after_it(triton):
    selection, x = TritonSelection(), numbers('normal', (20,), 0).to(GPU)
    (want,), _ = HostSelection().lowest([x.cpu()], [9])
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            (mask,), _ = selection.lowest([x], [9])
            w = torch.ones(20, device=GPU)
            selection.project([w], [mask])
            assert torch.equal(mask.cpu(), want) and torch.equal(w.cpu().bool(), want)


def test_threads_take_turns(triton):
    selection, xs = TritonSelection(), [numbers('normal', (30,), i) for i in range(8)]
    one = lambda i: selection.lowest(there([xs[i]]), [3 * i])[0][0].cpu()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(one, range(8)))
    assert same_bits(got, [HostSelection().lowest([x], [3 * i])[0][0] for i, x in enumerate(xs)])


@needs_gpu
@pytest.mark.parametrize('dtype', floats)
def test_many_programs(dtype):
    "With ties all over them"
    kinds = {'few levels': (100_003,), 'normal': (64, 64, 3, 3), 'zeros': (300, 1000), 'equal': (128, 512)}
    xs = [numbers(kind, s, i).to(dtype) for i, (kind, s) in enumerate(kinds.items())]
    xs[1] = laid_out(xs[1], 'channels last')
    keep, selection = [numbers('normal', x.shape, 9) > -1 for x in xs], TritonSelection()
    for part, absolute, k in product((0.3, 0.9), (True, False), (None, keep)):
        ks = [round(part * x.numel()) for x in xs]
        for numbers_to_prune in (ks, sum(ks)):
            want, _ = HostSelection().lowest(xs, numbers_to_prune, absolute, k)
            got, nan = selection.lowest(there(xs), numbers_to_prune, absolute, there(k))
            assert same_bits(got, want) and not nan.any()


@needs_gpu
def test_graphs_replay_on_their_streams():
    selection, streams = TritonSelection(), [torch.cuda.current_stream(), torch.cuda.Stream()]
    for k, stream in product((1, 50, 100, 149), streams):
        x = numbers('normal', (150,), k)
        there = x.to(GPU)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda.set_sync_debug_mode('error')
            try:
                (mask,), _ = selection.lowest([there], [k])
            finally:
                torch.cuda.set_sync_debug_mode('default')
        stream.synchronize()
        assert torch.equal(mask.cpu(), HostSelection().lowest([x], [k])[0][0])
    assert len(selection.searches) == 2 and all(s.graph is not None for s in selection.searches.values())


@needs_triton
def test_kernels_that_fail_are_replaced_once(monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError('no C compiler')

    monkeypatch.setattr(triton_programs, 'launch', failing)
    selection, x, w = Fallback(), numbers('normal', (30,), 0), torch.ones(30)
    want, _ = HostSelection().lowest([x], [9])
    with pytest.warns(UserWarning, match="Triton's kernels can't run here, .*: no C compiler") as seen:
        for _ in range(2):
            got, nan = selection.lowest([x], [9])
            selection.project([w], got)
    assert len(seen) == 1 and same_bits(got, want) and nan.tolist() == [False] and torch.equal(w.bool(), want[0])


def test_float64_is_sorted(monkeypatch):
    "Kernels have 32-bit keys"
    monkeypatch.setattr(triton_programs, 'launch', None)
    x = torch.cat([torch.ones(3, dtype=torch.float64) + 1e-12 * k for k in (2, 1, 3)])
    with no_warnings():
        got, _ = Fallback().lowest([x], [4])
    assert same_bits(got, HostSelection().lowest([x], [4])[0])


class Wrapper(torch.Tensor):
    "A tensor without memory of its own, as a quantized weight may be"

    @staticmethod
    def __new__(cls, inner):
        res = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        res.inner = inner
        return res

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = lambda x: x.inner if isinstance(x, Wrapper) else x
        res = func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        return Wrapper(res) if func is torch.ops.aten.detach.default else res


def test_kernels_leave_tensors_without_memory_alone():
    x, selection = numbers('normal', (30,), 0).to(GPU), Fallback()
    want, _ = HostSelection().lowest([x.cpu()], [9])
    with no_warnings():
        got, _ = selection.lowest([Wrapper(x)], [9])
        selection.project([Wrapper(x)], got)
    assert same_bits(got, want) and torch.equal(x.cpu() != 0, want[0])


@needs_triton
@pytest.mark.parametrize('together', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_memory_of_a_billion_weights(monkeypatch, together, dtype):
    "Masks have a byte a weight, keys that are still in question up to a quarter, and all else has little"
    monkeypatch.setattr(triton_programs, 'CHUNK', 2**14)
    sizes = (2**28, *[2**20 + 8] * 700)
    search = Search(sizes, ((1, 1),) * 701, together, True, True, False, dtype, torch.device('meta'))
    tensors = [x for o in (search, search.programs) for x in vars(o).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 10
    assert sum(x.nbytes for x in tensors) + search.mask_bytes < 1.3 * sum(sizes)


# masks of weights

GRAIN = [*(g for g in GRANULARITIES[:-2] if not check_granularity(g).tied), '2:4', '2x4', '1x1']


def scores_and_keep(scope, kept, dtype=torch.float32):
    scores = {'a': numbers('normal', (4, 4, 3, 3), 0), 'b': numbers('few levels', (6, 8, 2, 2), 1)}
    scores['c'] = laid_out(numbers('infinite' if scope == 'local' else 'normal', (2, 4, 3, 3), 2), 'channels last')
    scores = {n: (x.abs() if scope == 'lamp' else x).to(dtype) for n, x in scores.items()}
    keep = {n: numbers('normal', x.shape, 3) > -1 for n, x in scores.items()}
    return scores, {None: None, 'masks': Masks(keep), 'known': None if kept is None else known_masks(scores)}[kept]


def known_masks(scores):
    return compute_masks({n: numbers('normal', x.shape, 4) for n, x in scores.items()}, 0.3)


def finite(scores):
    return {n: x.nan_to_num(posinf=9, neginf=-9) for n, x in scores.items()}


def assert_known(masks):
    "If the number of weights is known, it is right, and no longer known after a change"
    kept, each = known(masks)
    if kept is not None:
        assert kept == sum(int(m.sum()) for m in masks.values()) and type(kept) is int
    if each is not None:
        assert each == {n: int(m.sum()) for n, m in masks.items()}
    for m in masks.values():
        with torch.no_grad():
            m.logical_not_()
        assert known(masks) == (None, None)
        m.logical_not_()
    return kept is not None


@pytest.mark.sample(10)
@pytest.mark.parametrize('granularity', GRAIN)
@pytest.mark.parametrize('scope', SCOPES[:-1])
def test_an_accelerator_gets_the_masks_of_the_cpu(scope, granularity):
    for kept, absolute in product((None, 'masks', 'known'), (False, True)):
        scores, keep = scores_and_keep(scope, kept)
        scores = scores if granularity in ('weight', '1x1') else finite(scores)
        args = 0.45, scope, granularity, keep, absolute
        weights, others = ({n: x.clone() for n, x in scores.items()} for _ in range(2))
        want = compute_masks(scores, *args, zeros=weights)
        with pretend():
            got = compute_masks(scores, *args, zeros=others)
        assert got == want and same_bits(others.values(), weights.values())
        assert same_bits(weights.values(), want.apply_({n: x.clone() for n, x in scores.items()}).values())
        assert known(got) == known(want)
        several_sizes = scope in ('global', 'lamp') and granularity in ('row', 'column', 'kernel', 'filter')
        if kept is None:
            assert assert_known(got) is not several_sizes
        else:
            assert_known(got)


@pytest.mark.sample(2)
@pytest.mark.parametrize('scope', ['local', 'global', 'lamp'])
@pytest.mark.parametrize('granularity', ['weight', 'filter', '2:4'])
def test_kernels_make_the_masks_of_the_cpu(triton, monkeypatch, scope, granularity):
    scores, keep = scores_and_keep(scope, 'known', torch.bfloat16)
    scores = scores if granularity == 'weight' else finite(scores)
    args = 0.45, scope, granularity
    want = compute_masks(scores, *args, keep)
    use_kernels(monkeypatch)
    to_gpu = lambda xs: {n: x.to(GPU) for n, x in xs.items()}
    with pretend(), no_warnings():
        got = compute_masks(to_gpu(scores), *args, know(Masks(to_gpu(keep)), *known(keep)))
    assert same_bits(got.values(), want.values()) and known(got) == known(want)


# nothing is read back


@pytest.fixture(params=['sort', pytest.param('kernels', marks=needs_triton)])
def accelerator(request, monkeypatch):
    "A device of which nothing can be read. Kernels stand aside: they write nothing"
    launched = []
    if request.param == 'kernels':
        for module in (triton_programs, triton_search):
            monkeypatch.setattr(module, 'launch', lambda kernel, *args, **kwargs: launched.append(kernel))
        use_kernels(monkeypatch)
    with delayed_checks(Checks()), forbid_reads(), no_warnings():
        yield
    assert bool(launched) is (request.param == 'kernels')


@pytest.mark.sample(10)
@pytest.mark.parametrize('granularity', GRAIN)
@pytest.mark.parametrize('scope', SCOPES[:-1])
def test_nothing_is_read(accelerator, scope, granularity):
    for kept, absolute in ((None, False), ('masks', True), ('known', False)):
        scores, keep = scores_and_keep(scope, kept)
        weights = {n: x.clone() for n, x in scores.items()}
        masks = compute_masks(scores, 0.45, scope, granularity, keep, absolute)
        masks.apply_(weights)
        masks = compute_masks(finite(scores), 0.45, scope, granularity, masks, zeros=weights)
        kept_later(masks)
        assert masks.keys() == scores.keys()


def test_reading_is_found():
    with forbid_reads(), pytest.raises(AssertionError, match='numbers are read back'):
        assert Masks(a=torch.ones(3).bool()).n_kept


# NaN


@pytest.mark.parametrize('scope', SCOPES[:-1])
@pytest.mark.parametrize('granularity', ['weight', 'row', 'filter', '2:4', '2x4'])
def test_nan_names_its_tensor(scope, granularity):
    scores = {n: x.abs() for n, x in finite(scores_and_keep('local', None)[0]).items()}
    scores['b'][1, 2] = torch.nan
    checks = Checks()
    with pretend():
        with pytest.raises(ValueError, match="'b'"):
            compute_masks(scores, 0.5, scope, granularity)
        with delayed_checks(checks):
            compute_masks(scores, 0.5, scope, granularity)
            compute_masks(finite(scores), 0.5, scope, granularity)
    with pytest.raises(ValueError, match="'b'"):
        checks.look(wait=True)
    checks.look(wait=True)


def test_nan_that_kernels_find(triton, monkeypatch):
    use_kernels(monkeypatch)
    scores = {'a': torch.ones(70, device=GPU), 'b': torch.tensor([1.0, torch.nan], device=GPU)}
    for scope in ('local', 'global'):
        with pretend(), pytest.raises(ValueError, match=r"scores\['b'\] has NaN"):
            compute_masks(scores, 0.5, scope)


def test_another_default_device():
    "As `torch.set_default_device` chooses it: what is made for the host stays there"
    scores, keep = scores_and_keep('global', 'known')
    for granularity in ('weight', 'filter', '2:4'):
        want = compute_masks(finite(scores), 0.5, 'global', granularity, keep)
        for device in (nullcontext, pretend):
            with torch.device('meta'), device():
                assert compute_masks(finite(scores), 0.5, 'global', granularity, keep) == want


def test_nothing_to_select():
    with pretend():
        assert select([], 0) == ([], []) and select([], []) == ([], [])
        assert compute_masks({}, 0.5) == {} and compute_masks({}, 0.5, 'global', 'row') == {}


FAKE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprune.core.compute import compute_masks
from fastprune.core.later import Checks, delayed_checks
from fastprune.core.mask_counts import kept_later
from fastprune.core.scopes import SCOPES

with FakeTensorMode(), torch.no_grad(), delayed_checks(Checks()):
    for scope in SCOPES:
        for granularity in ('weight', 'row', '2:4'):
            weights = {'a': torch.empty(64, 32, device='cuda'), 'b': torch.empty(10, 64, device='cuda')}
            masks = compute_masks(weights, 0.4, scope, granularity, absolute=True)
            masks.apply_(weights)
            masks = compute_masks(weights, 0.5, scope, granularity, masks, absolute=True, zeros=weights)
            kept_later(masks)
            shapes = {n: (m.device.type, m.shape) for n, m in masks.items()}
            assert shapes == {n: ('cuda', w.shape) for n, w in weights.items()}, (scope, granularity)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason='fake tensors are on a GPU that does not exist')
def test_tensors_without_numbers():
    "Fake tensors on a GPU can't be read at all, nor copied to the CPU. Processes with fake GPUs can't be forked"
    assert python(FAKE).returncode == 0
