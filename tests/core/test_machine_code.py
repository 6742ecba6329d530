"The passes in machine code make the masks of NumPy's path, to the bit, and stand aside where they don't apply"

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scores import kinds, laid_out, layouts, numbers, same_bits, weights_to_zero, zeroed

from fastprune.core import machine_code, mask_passes, mask_rows, selection_compiled, selection_host
from fastprune.core.backends import select
from fastprune.core.compute import compute_masks
from fastprune.core.devices import pretend
from fastprune.core.machine_code import Compiled, Worth
from fastprune.core.masks import Masks
from fastprune.core.scopes import SCOPES
from fastprune.core.selection import NaNError
from fastprune.core.selection_compiled import find
from fastprune.core.selection_host import CompiledSelection, HostSelection
from fastprune.engine.method import Method
from fastprune.engine.sparsifier import Sparsifier

pytestmark = pytest.mark.cpu_only

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def small(monkeypatch):
    "A hundred numbers are enough for several rows, and for a sample"
    monkeypatch.setattr(mask_rows, 'CHUNK', 48)
    monkeypatch.setattr(selection_compiled, 'WHOLE', 30)
    monkeypatch.setattr(selection_compiled, 'LEAST', 24)
    monkeypatch.setattr(selection_host, 'FEW', 0)


@pytest.fixture(params=[1, 3], ids=['one thread', 'three threads'])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def always():
    "A selection for which compiling has paid"
    selection = CompiledSelection()
    selection.worth.seen = float('inf')
    return selection


shapes = st.sampled_from([(), (0,), (3,), (0, 4), (48,), (64,), (7, 9), (3, 4, 2, 2), (150,), (40, 30)])
specs = st.lists(st.tuples(kinds, shapes, layouts, st.integers(0, 99)), min_size=1, max_size=4)
parts = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.floats(0, 1))
some = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def inputs(specs, dtype, part, together, kept):
    "Scores, masks to stay inside of, and how many to prune"
    xs = [laid_out(numbers(kind, s, seed).to(dtype), lay) for kind, s, lay, seed in specs]
    keep = None
    if kept is not None:
        g = torch.Generator().manual_seed(7)
        keep = [torch.rand(x.shape, generator=g) < kept for x in xs]
        xs = [laid_out(torch.where(m, x, torch.nan), 'odd address') for x, m in zip(xs, keep, strict=True)]
    ks = [round(part * x.numel()) for x in xs]
    return xs, keep, sum(ks) if together else ks


@some
@given(specs, st.sampled_from(TYPES), parts, *[st.booleans()] * 3, st.sampled_from([None, 0.5, 0.0, 1.0]))
def test_machine_code_selects_as_numpy_does(small, threads, specs, dtype, part, together, absolute, own, kept):
    xs, keep, ks = inputs(specs, dtype, part, together, kept)
    want, _ = HostSelection().lowest(xs, ks, absolute, keep)
    same_type = torch.float32 if dtype == torch.float32 else torch.bfloat16
    others = [torch.randn(x.shape).to(same_type) for x in xs]
    zeros = [x.clone() for x in xs] if own else others
    before = [w.clone() for w in zeros]
    masks, none = always().lowest(zeros if own else xs, ks, absolute, keep, zeros)
    assert none is None and same_bits(masks, want) and all(m.is_contiguous() for m in masks)
    assert same_bits(zeros, zeroed(before, want))


@pytest.mark.sample(10)
@pytest.mark.parametrize('compresses', [True, False])
@pytest.mark.parametrize('dtype', TYPES, ids=str)
@pytest.mark.parametrize('kind', ['normal', 'zeros', 'few levels', 'infinite', 'sorted'])
def test_large_tensors(monkeypatch, threads, kind, dtype, compresses):
    "On processors with and without AVX-512"
    compiled = mask_passes.passes(8 * dtype.itemsize, compresses)
    monkeypatch.setattr(selection_compiled, 'passes', lambda bits: compiled)
    xs = [numbers(kind, (n,), n) for n in (300_001, 70_000, 20_000, 5)]
    xs = [(x.sort().values if kind == 'sorted' else x).to(dtype) for x in xs]
    for absolute, part in ((True, 0.9), (False, 0.3)):
        for ks in ([round(part * x.numel()) for x in xs], round(part * 390_006)):
            want, _ = HostSelection().lowest(xs, ks, absolute)
            masks = find(xs, ks, absolute)
            assert kind in ('few levels', 'sorted') or None not in masks
            assert same_bits(*zip(*[(m, w) for m, w in zip(masks, want, strict=True) if m is not None], strict=True))


def test_a_missed_bracket_is_left_to_numpy(small, monkeypatch):
    "Samples that say nothing about the scores"
    monkeypatch.setattr(selection_compiled, 'WIDTH', 0.0)
    x, few = numbers('normal', (4000,), 0), numbers('normal', (20,), 1)
    x[::2] += 100
    lost = 0
    for ks in ([2000, 9], [1990, 0], [3000, 20], [1000, 1]):
        zeros = [torch.ones(4000), torch.ones(20)]
        masks = find([x, few], ks)
        lost += masks[0] is None
        assert masks[1] is not None
        got, _ = always().lowest([x, few], ks, zeros=zeros)
        want, _ = HostSelection().lowest([x, few], ks)
        assert same_bits(got, want) and same_bits(zeros, [m.float() for m in want])
    assert lost


def test_nan_is_found_before_anything_is_written(small):
    for together in (True, False):
        xs = [numbers('normal', (150,), 0), numbers('normal', (150,), 1)]
        xs[1][149] = -torch.nan
        weights = [x.clone() for x in xs]
        with pytest.raises(NaNError):
            always().lowest(weights, 200 if together else [100, 100], True, None, weights)
        assert same_bits(weights, xs)
    keep = [torch.ones(150).bool(), torch.ones(150).bool()]
    keep[1][149] = False
    assert find(xs, [0, 3], True, keep)[1].sum() == 147


@pytest.mark.parametrize('layout', ['plain', 'channels last', 'transposed', 'odd address'])
@pytest.mark.parametrize('dtype', [*TYPES, torch.float64], ids=str)
def test_projection(small, threads, layout, dtype):
    weights = weights_to_zero(dtype, layout)
    masks = [numbers('normal', w.shape, 50 + i) > 0 for i, w in enumerate(weights)]
    for by in (masks, [laid_out(m, layout) for m in masks]):
        ws = [laid_out(w.clone(), layout) for w in weights]
        versions = [w._version for w in ws]
        always().project(ws, by)
        assert same_bits(ws, zeroed(weights, masks))
        assert all(w._version > v for w, v in zip(ws, versions, strict=True) if w.numel())


def test_a_projection_keeps_memory_around_weights(small):
    memory = torch.ones(500)
    weights = [memory[3:150], memory[151:152], memory[160:476]]
    always().project(weights, [torch.zeros(len(w)).bool() for w in weights])
    want = torch.ones(500)
    for a, b in ((3, 150), (151, 152), (160, 476)):
        want[a:b] = 0
    assert torch.equal(memory, want)


def test_masks_in_steps_of_the_same_memory(small):
    "Weights that share memory, and scores that are parts of other weights"
    memory = numbers('normal', (300,), 0)
    for first, second in ((memory[:200], memory[100:]), (memory[:100], memory[:100])):
        before = memory.clone()
        want, _ = HostSelection().lowest([first, second], [50, 50], True)
        weights = [second, first]
        masks, _ = always().lowest(
            [first, second], [50, 50], True, None, weights if len(first) == len(second) else None
        )
        assert same_bits(masks, want)
        memory.copy_(before)
        expected = before.clone()
        HostSelection().project([expected[: len(first)]], [want[0]])
        always().project([first], [want[0]])
        assert torch.equal(memory, expected)
        memory.copy_(before)


@pytest.mark.parametrize('scope', SCOPES[:-1])
@pytest.mark.parametrize('granularity', ['weight', '2x4', '2:4'])
def test_masks_of_weights(small, monkeypatch, scope, granularity):
    weights = {'a': numbers('normal', (16, 8, 3, 3), 0), 'b': numbers('zeros', (12, 40), 1)}
    weights['c'] = laid_out(numbers('normal', (4, 4, 3, 3), 2), 'channels last')
    keep = {n: numbers('normal', w.shape, 5) > -1 for n, w in weights.items()}
    for inside in (None, keep):
        results = []
        for selection in (HostSelection(), always()):
            monkeypatch.setattr('fastprune.core.backends._host', selection)
            ws = {n: w.clone() for n, w in weights.items()}
            masks = compute_masks(ws, 0.45, scope, granularity, inside, absolute=True, zeros=ws)
            results.append((masks, list(ws.values())))
        assert results[0][0] == results[1][0] and same_bits(results[0][1], results[1][1])


def test_nan_names_its_tensor(small, monkeypatch):
    monkeypatch.setattr('fastprune.core.backends._host', always())
    scores = {'a': torch.ones(100), 'b': torch.ones(100)}
    scores['b'][3] = torch.nan
    for scope in ('local', 'global'):
        with pytest.raises(ValueError, match=r"scores\['b'\] has NaN"):
            compute_masks(scores, 0.5, scope)


# where it stands aside


def test_other_types_and_places(small, monkeypatch):
    def fails(*args):
        raise AssertionError('compiled')

    monkeypatch.setattr(selection_host, 'find', fails)
    x = numbers('normal', (150,), 0)
    lists = [[x.double()], [x, x.half()], [x.to(torch.float8_e4m3fn)], [torch.nn.Buffer(x), x.double()], []]
    for xs in lists:
        ks = [9] * len(xs)
        assert same_bits(always().lowest(xs, ks)[0], HostSelection().lowest(xs, ks)[0])
    with pytest.raises(AssertionError, match='compiled'):
        always().lowest([x], [9])
    with pretend():
        select([x], [9])


def test_few_numbers_are_not_compiled(monkeypatch):
    monkeypatch.setattr(selection_host, 'passes', lambda bits: pytest.fail('compiled'))
    selection = always()
    x = torch.randn(selection_host.FEW - 1)
    selection.project([x], selection.lowest([x], [9])[0])
    assert (x == 0).sum() == 9


def test_compiling_has_to_pay(monkeypatch):
    asked = []
    monkeypatch.setattr(selection_host, 'passes', lambda bits: asked.append(bits) or mask_passes.passes(bits))
    monkeypatch.setattr(machine_code, 'PAYS', 3 * selection_host.FEW)
    selection, x = CompiledSelection(), torch.randn(selection_host.FEW)
    masks = [selection.lowest([x], [9], True)[0][0] for _ in range(4)]
    assert asked == [32, 32] and all(torch.equal(m, masks[0]) for m in masks)


@pytest.mark.parametrize('error', [ImportError, RuntimeError, OSError])
def test_numpy_where_nothing_can_be_compiled(small, monkeypatch, error):
    tried = []

    def fails(bits):
        tried.append(bits)
        raise error('no')

    monkeypatch.setattr(selection_host, 'passes', fails)
    selection, x = always(), numbers('normal', (150,), 0)
    want, _ = HostSelection().lowest([x], [70])
    for _ in range(2):
        assert same_bits(selection.lowest([x], [70])[0], want)
        selection.project([w := x.clone()], want)
        assert torch.equal(w != 0, want[0])
    assert tried == [32]


def trained(dtype, selection, monkeypatch):
    "Masks and weights of a training, with updates by a selection"
    monkeypatch.setattr('fastprune.core.backends._host', selection)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3)).to(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Sparsifier(model, Method(0.9, interval=1), total_steps=10, optimizer=opt)
    for _ in range(10):
        model(torch.randn(8, 20).to(dtype)).square().mean().backward()
        pruner.step()
        opt.zero_grad()
    assert pruner.masks.sparsity == pytest.approx(0.9, abs=0.01)
    return list(pruner.masks.values()), list(model.parameters())


@pytest.mark.sample(2)
@pytest.mark.parametrize('dtype', TYPES, ids=str)
@pytest.mark.parametrize('has_llvm', [True, False])
def test_trainings_are_those_by_numpy(small, monkeypatch, dtype, has_llvm):
    "In all types; and where llvmlite is not installed"
    monkeypatch.setattr(mask_passes, '_compiled', {})
    if not has_llvm:
        monkeypatch.setitem(sys.modules, 'llvmlite', None)
        monkeypatch.setitem(sys.modules, 'llvmlite.binding', None)
    selection = always()
    masks, weights = trained(dtype, selection, monkeypatch)
    assert selection.worth.works == has_llvm
    want_masks, want_weights = trained(dtype, HostSelection(), monkeypatch)
    assert same_bits(masks, want_masks) and same_bits(weights, want_weights)


def test_threads_without_openmp(small, monkeypatch, threads):
    monkeypatch.setattr(machine_code, '_openmp', lambda: None)
    x = numbers('normal', (1000,), 0)
    assert same_bits(always().lowest([x], [700])[0], HostSelection().lowest([x], [700])[0])


def test_all_rows_are_done_once(threads):
    def added(f):
        machine_code.set_column(f, 1, f.b.add(machine_code.column(f, 1), machine_code.column(f, 0)))

    table = machine_code.np.arange(2000).reshape(1000, 2)
    want = table[:, 1] + table[:, 0]
    Compiled({'add': added}).run('add', table)
    assert (table[:, 1] == want).all()


def test_several_threads_compile_once(monkeypatch):
    monkeypatch.setattr(mask_passes, '_compiled', {})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(mask_passes.passes, [32] * 4))
    assert all(f is found[0] for f in found)


def test_worth_counts_while_tracing_but_says_no(monkeypatch):
    worth = Worth()
    worth.seen = float('inf')
    assert worth(1)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert not worth(1)


def test_inference_mode(small):
    with torch.inference_mode():
        x = torch.randn(150)
        (mask,), _ = always().lowest([x], [70], True, None, [x])
        always().project([x], [mask])
    assert torch.equal(x != 0, mask)


def test_bits_of_zeros(small):
    "Pruned numbers become +0.0, and kept ones keep a sign"
    x = torch.tensor([-0.0, 0.0, -0.0, 1.0] * 30)
    (mask,), _ = always().lowest([x], [60], True, None, [x])
    assert not torch.signbit(x[:80]).any() and torch.signbit(x[80:]).sum() == 20
    assert (x == 1).sum() == 30 and mask.sum() == 60


IMPORTS = """
import sys
from fastprune.all import *
SparsifyCallback, ocp, digits_dls
assert not {'torchvision', 'timm', 'spacy'} & set(sys.modules)
import torch
from fastprune.core.compute import compute_masks
w = {'w': torch.randn(300, 300)}
compute_masks(w, 0.5).apply_(w)
assert not {'llvmlite', 'numba'} & set(sys.modules)
"""


def test_small_models_import_no_compiler():
    "Nor libraries that they have no use for"
    r = subprocess.run([sys.executable, '-c', IMPORTS], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_masks_apply_in_machine_code(small, monkeypatch):
    ran, run = [], Compiled.run
    monkeypatch.setattr(Compiled, 'run', lambda self, name, table: ran.append(name) or run(self, name, table))
    monkeypatch.setattr('fastprune.core.backends._host', always())
    weights = {'w': torch.randn(30, 30)}
    Masks(w=weights['w'] > 0).apply_(weights)
    assert ran == ['project'] and (weights['w'] >= 0).all()
