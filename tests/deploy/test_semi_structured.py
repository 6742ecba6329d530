"2:4 tensors give what dense layers give, and stay where they are faster"

import sys
from copy import deepcopy

import pandas as pd
import pytest
import torch
from helpers import Encoder, Tagger
from torch import nn

from fastprune.all import compute_masks, prunable_weights, sparse_inference, to_semi_structured
from fastprune.core.json_files import error_line
from fastprune.deploy import forms, semi_structured, semi_structured_layer, semi_structured_trial, timing
from fastprune.deploy.semi_structured import fastest_form, semi_structured_layers
from fastprune.deploy.semi_structured_layer import gpu_missing, semi_structured_linear
from fastprune.deploy.semi_structured_trial import Outcome, Product, run_product, try_products


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def pruned(model, s=0.9, **kwargs):
    w = prunable_weights(model)
    masks = compute_masks(w, s, absolute=True, **kwargs)
    masks.apply_(w)
    return model, masks


def same(a, b):
    return list(a.state_dict()) == list(b.state_dict()) and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


class OnCPU(torch.sparse.SparseSemiStructuredTensorCUTLASS):
    "Torch's own packing and dispatch, with a product that runs anywhere"

    @classmethod
    def _validate_device_dim_dtype_shape(cls, t):
        pass

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **kwargs):
        res = self.to_dense() @ (B.t() if should_transpose_dense else B)
        if bias is not None:
            res = res + bias[:, None]
        return res.t().contiguous() if should_transpose_dense else res


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(semi_structured_layer, 'gpu_missing', lambda *args: '')
    monkeypatch.setattr(semi_structured_layer, 'tensor_class', lambda cusparselt: OnCPU)


class Channels(nn.Module):
    "Linear layers on transposed inputs, as MLP-Mixers have, one of them used twice, a convolution, a recurrent one"

    def __init__(self):
        super().__init__()
        self.mix, self.conv, self.rnn, self.head = (
            nn.Linear(64, 64, bias=False),
            nn.Conv1d(64, 64, 1),
            nn.GRU(64, 64, batch_first=True),
            nn.Linear(64, 33),
        )
        self.again = self.mix

    def forward(self, x):
        return self.head(self.rnn(self.again(self.mix(x.transpose(1, 2))) + self.conv(x).transpose(1, 2))[0])


@pytest.mark.parametrize('ctx', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    'make,xs',
    [
        (Channels, (torch.randn(2, 64, 5),)),
        (Encoder, (torch.randn(2, 4, 8),)),
        (Encoder, (torch.randn(2, 4, 8), torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]).bool())),
    ],
    ids=['channels', 'encoder', 'padding'],
)
@pytest.mark.filterwarnings(
    'ignore:The PyTorch API of nested tensors', 'ignore:The PyTorch API of SparseSemiStructured'
)
def test_semi_structured_gives_what_the_dense_model_gives(as_on_gpu, make, xs, ctx):
    torch.manual_seed(0)
    model, _ = pruned(make(), 0.5, granularity='2:4')
    before = deepcopy(model)
    with pytest.warns(UserWarning, match='example=None: no layer is timed'):
        fast = to_semi_structured(model, dtype=torch.bfloat16)
    became = fast.semi_structured_report
    names = set(became.index[became.became == '2:4'])
    assert names == (
        {'mix.weight'}
        if make is Channels
        else {'head.weight', *(f'layers.layers.{i}.linear{k}.weight' for i in (0, 1) for k in (1, 2))}
    )
    assert {n for n, p in fast.named_parameters() if isinstance(p, OnCPU)} == names and became.why[
        became.became == 'dense'
    ].ne('').all()
    assert (
        same(model, before)
        and model.training
        and not fast.training
        and not any(p.requires_grad for p in fast.parameters())
    )
    xs = tuple(x.bfloat16() if x.is_floating_point() else x for x in xs)
    model.eval().bfloat16()
    with ctx():
        a, b = fast(*xs), model(*xs)
    assert torch.allclose(a.float(), b.float(), atol=0.03 * float(b.abs().max()))
    for n in names:
        assert torch.equal(fast.get_parameter(n).to_dense(), model.get_parameter(n))


def test_which_layers_fit():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict(
        dict(
            fits=nn.Linear(64, 64),
            small=nn.Linear(64, 10),
            odd=nn.Linear(66, 64),
            dense=nn.Linear(64, 64),
            own=Odd(64, 64),
            conv=nn.Conv2d(64, 64, 3),
            attn=nn.MultiheadAttention(64, 4),
        )
    )
    w = prunable_weights(model, exclude=['dense', 'odd'])
    compute_masks(w, 0.5, absolute=True, granularity='2:4').apply_(w)
    table = semi_structured_layers(model, dtype=torch.bfloat16)
    assert (
        table.index[table.became == '2:4'].tolist() == ['fits.weight']
        and table.loc['fits.weight', 'why'] == ''
        and table.loc['conv.weight', 'shape'] == '64x64x3x3'
    )
    for n, why in dict(
        small='outputs in multiples of',
        odd='no multiple of 4',
        dense='not 2:4',
        own='Odd: torch has',
        conv='Conv2d: torch has',
    ).items():
        assert why in table.why[n + '.weight']
    assert (
        'MultiheadAttention' in table.why['attn.in_proj_weight']
        and 'attention reads it' in table.why['attn.out_proj.weight']
    )
    assert (
        'float32: needs float16' in semi_structured_layers(model).why['fits.weight']
        and 'float64' in semi_structured_layers(model.double()).why['fits.weight']
    )
    assert semi_structured_layers(model, include='fits', dtype=torch.float16).became.value_counts().to_dict() == {
        'dense': 7,
        '2:4': 1,
    }
    assert semi_structured_layers(nn.ReLU()).empty
    with pytest.raises(ValueError, match='exclude'):
        semi_structured_layers(model, exclude='nothing')
    tied = Tagger(64, 64)
    w = prunable_weights(tied, include='emb')
    compute_masks(w, 0.5, absolute=True, granularity='2:4').apply_(w)
    assert 'Embedding' in semi_structured_layers(tied, include='emb', dtype=torch.float16).why['emb.weight']


def test_what_is_missing_for_semi_structured(as_on_gpu, monkeypatch):
    gpu, cpu = torch.device('cuda', 0), torch.device('cpu')
    for args, msg in (
        ((cpu, False, None, True), 'no CUDA device: they need an NVIDIA GPU of compute capability 8.0'),
        ((cpu, True, None, True), 'on the cpu: move it to the GPU first'),
        ((gpu, True, (7, 5), True), 'cuda:0 has 7.5'),
        ((gpu, True, (9, 0), False), '9.0, which needs a torch with cuSPARSELt'),
    ):
        assert msg in gpu_missing(*args)
    for cap, lt in (((8, 0), False), ((8, 6), True), ((9, 0), True), ((12, 0), True)):
        assert gpu_missing(gpu, True, cap, lt) == ''
    for model, msg in (
        (mlp(), "'1.weight': not 2:4.*granularity='2:4'"),
        (nn.ReLU(), 'no layer can have a 2:4 tensor. Sparsify'),
        (pruned(nn.Linear(64, 64), 0.5, granularity='2:4')[0], 'float32: needs float16'),
    ):
        with pytest.raises(ValueError, match=msg):
            to_semi_structured(model)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='2:4 tensors: torch sees no CUDA device'):
            to_semi_structured(pruned(nn.Linear(64, 64), 0.5, granularity='2:4')[0], dtype=torch.float16)


def test_torch_loses_values_of_2_4_in_float32():
    "Why float32 is refused: should this fail, torch has come to take it"
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as pack
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as unpack

    w = pruned(nn.Linear(64, 64), 0.5, granularity='2:4')[0].weight.detach()
    assert torch.equal(unpack(*pack(w.half())), w.half()) and not torch.equal(unpack(*pack(w)), w)


class CuSparseLt(OnCPU):
    "As cuSPARSELt: each algorithm takes its time"

    BACKEND = 'cusparselt'
    ms = {}  # rows of the weight -> {algorithm: milliseconds}; 'dense' too
    now = 0.0

    @classmethod
    def take(cls, weight, algorithm):
        CuSparseLt.now += 1e-3 * CuSparseLt.ms[len(weight)][algorithm]

    def _mm(self, B, **kwargs):
        self.take(self, self.alg_id_cusparselt)
        return super()._mm(B, **kwargs)


def run_here(products, device, search):
    "The trial of products in this process"
    told = [{} for _ in products]
    for p, t in zip(products, told, strict=True):
        try:
            run_product(p, device, search, t.__setitem__)
            t['done'] = True
        except forms.FORM_ERRORS as e:
            t['why'] = error_line(e)
    return told, ''


class Clock:
    perf_counter = staticmethod(lambda: CuSparseLt.now)


@pytest.fixture
def timed(monkeypatch):
    "Machines on which products take the milliseconds that a test says, and nothing else takes time"

    def set_up(ms, found=None):
        def linear(self, x):
            if not isinstance(self.weight, CuSparseLt):
                CuSparseLt.take(self.weight, 'dense')
            return nn.functional.linear(x, self.weight, self.bias)

        def search(packed, columns, bias, transpose_result):
            assert columns.shape[1] % 8 == 0 and transpose_result
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(semi_structured_layer, 'gpu_missing', lambda *args: '')
        monkeypatch.setattr(semi_structured_layer, 'tensor_class', lambda cusparselt: CuSparseLt)
        if found is None:
            monkeypatch.delattr(torch, '_cslt_sparse_mm_search')
        else:
            monkeypatch.setattr(torch, '_cslt_sparse_mm_search', search)
        monkeypatch.setattr(nn.Linear, 'forward', linear)
        monkeypatch.setattr(semi_structured_trial, '_run', run_here)
        monkeypatch.setattr(timing, 'time', Clock)
        monkeypatch.setattr(CuSparseLt, 'ms', ms)

    return set_up


def two_layers():
    torch.manual_seed(0)
    return pruned(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), 0.5, granularity='2:4')[0]


def packed_names(model):
    return [n for n, p in model.named_parameters() if isinstance(p, OnCPU)]


half = dict(dtype=torch.bfloat16, seconds=0.05)
quiet = pytest.mark.filterwarnings('ignore:The PyTorch API of SparseSemiStructured')


@quiet
def test_slower_layers_stay_dense(timed):
    timed({128: {'dense': 1, 0: 10.1}, 64: {'dense': 2, 0: 8}})
    model, x = two_layers(), torch.randn(5, 64)
    fast = to_semi_structured(model, example=x, **half)
    report = fast.semi_structured_report
    assert not packed_names(fast) and (report.became == 'dense').all() and not fast.training
    assert report.why.tolist() == [
        '2:4 takes 10.10 of its time',
        '2:4 takes 4.00 of its time',
        'no layer is faster as 2:4',
    ]
    assert report.dense_ms.tolist() == pytest.approx([1, 2, 3]) and report.ms.equals(report.dense_ms)
    assert torch.equal(fast(x.bfloat16()), deepcopy(model).bfloat16()(x.bfloat16()))


@quiet
def test_each_layer_has_the_faster_form(timed):
    timed({128: {'dense': 1, 0: 3}, 64: {'dense': 2, 0: 1.6}})
    model, x = two_layers(), torch.randn(3, 7, 64)
    fast = to_semi_structured(model, example=x, **half)
    report = fast.semi_structured_report
    assert packed_names(fast) == ['2.weight'] and report.became.tolist() == ['dense', '2:4', '2:4']
    assert report.why.tolist()[1:] == ['1.25 times as fast as dense', '1.15 times as fast as dense']
    assert report.ms.tolist() == pytest.approx([1, 1.6, 2.6]) and report.dense_ms.tolist() == pytest.approx([1, 2, 3])
    assert list(report.index) == ['0.weight', '2.weight', 'total'] and model.training
    want = deepcopy(model).bfloat16()(x.bfloat16())
    assert torch.allclose(fast(x.bfloat16()).float(), want.float(), atol=0.03 * float(want.abs().max()))


@quiet
def test_the_whole_model_is_never_slower(timed, monkeypatch):
    timed({128: {'dense': 1, 0: 0.9}, 64: {'dense': 2, 0: 3}})
    monkeypatch.setattr(
        semi_structured, 'latency', lambda models, *_: pd.DataFrame({'ms': {n: 3.0 + (n == '2:4') for n in models}})
    )
    fast = to_semi_structured(two_layers(), example=torch.randn(5, 64), **half)
    report = fast.semi_structured_report
    assert not packed_names(fast) and (report.became == 'dense').all()
    assert report.why['0.weight'] == report.why['total'].join(['the whole model is not faster: ', ''])
    assert (
        report.why['total'] == '2:4 takes 1.33 of its time' and report.why['2.weight'] == '2:4 takes 1.50 of its time'
    )
    assert report.ms['0.weight'] == report.dense_ms['0.weight'] == pytest.approx(1)


@quiet
@pytest.mark.parametrize(
    'found,ms,algorithm,why',
    [
        (7, {'dense': 2, 0: 1.6, 7: 1}, 7, "2.00 times as fast as dense, by cuSPARSELt's algorithm 7"),
        (7, {'dense': 2, 0: 1.6, 7: 1.8}, 0, '1.25 times as fast as dense'),
        (0, {'dense': 2, 0: 1.6}, 0, '1.25 times as fast as dense'),
        (RuntimeError('not here'), {'dense': 2, 0: 1.6}, 0, '1.25 times as fast as dense'),
        (7, {'dense': 1, 0: 4, 7: 3}, None, '2:4 takes 4.00 of its time; 2:4 tuned takes 3.00 of its time'),
        (RuntimeError('not here'), {'dense': 1, 0: 4}, None, '2:4 takes 4.00 of its time; 2:4 tuned: not here'),
    ],
)
def test_search(timed, found, ms, algorithm, why):
    timed({128: ms, 64: {'dense': 1, 0: 2, 7: 2}}, found)
    fast = to_semi_structured(two_layers(), example=torch.randn(5, 64), **half)
    weight = fast[0].weight
    assert fast.semi_structured_report.why['0.weight'].replace("RuntimeError: ", "") == why
    assert (weight.alg_id_cusparselt if isinstance(weight, OnCPU) else None) == algorithm


@quiet
def test_examples(timed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = two_layers(), nn.Linear(64, 64)

        def forward(self, x, scale):
            return self.body(x) * scale

    timed({128: {'dense': 2, 0: 1}, 64: {'dense': 2, 0: 1}})
    model, x, scale = Net(), torch.randn(5, 64), torch.tensor([2])
    pruned(model.unused, 0.5, granularity='2:4')
    for example in ((x, scale), {'x': x, 'scale': scale}, [x, scale]):
        fast = to_semi_structured(model, example=example, **half)
        assert packed_names(fast) == ['body.0.weight', 'body.2.weight']
        assert fast.semi_structured_report.why['unused.weight'] == 'the example does not reach it'
    one = pruned(nn.Linear(64, 128), 0.5, granularity='2:4')[0]
    assert packed_names(to_semi_structured(one, example=x, **half)) == ['weight']
    assert to_semi_structured(one.bfloat16(), None, None, None, x.bfloat16(), 0.05).weight.dtype == torch.bfloat16
    for kwargs, says in (
        (dict(example='x'), "example=str: needs a tensor"),
        (dict(example=torch.randn(5, 3)), "example: the model can't take it"),
        (dict(example=x, seconds=0), 'seconds=0: needs a number above 0'),
        (dict(seconds='a'), "seconds='a': needs a number above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            to_semi_structured(one, **kwargs)


@quiet
def test_shared_weights_have_one_form(timed):
    "What is faster for one of the layers has to pay for the other, too"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    pruned(model, 0.5, granularity='2:4')
    timed({64: {'dense': 2, 0: 1.5}})
    fast = to_semi_structured(model, example=torch.randn(5, 64), **half)
    assert isinstance(fast[0].weight, OnCPU) and isinstance(fast[2].weight, OnCPU)
    assert fast.semi_structured_report.dense_ms['0.weight'] == pytest.approx(4)


@quiet
def test_hooks_and_classes_stay(timed):
    class Named(nn.Linear):
        pass

    calls, model = [], two_layers()
    model[0].__class__ = Named
    model[0].register_forward_pre_hook(lambda m, args: calls.append(1))
    timed({128: {'dense': 2, 0: 1}, 64: {'dense': 2, 0: 1}})
    fast = to_semi_structured(model, example=torch.randn(5, 64), **half)
    calls.clear()
    fast(torch.randn(5, 64).bfloat16())
    assert type(fast[0]) is Named and calls == [1] and len(model[0]._forward_pre_hooks) == 1


@quiet
def test_a_form_of_sparse_inference(timed, monkeypatch):
    monkeypatch.setattr(forms, 'FORM_DEVICES', {'sparse': 'cuda', 'skinny': 'cuda'})
    timed({128: {'dense': 2, 0: 1.5, 7: 1}, 64: {'dense': 2, 0: 3, 7: 4}}, found=7)
    monkeypatch.setattr(forms, 'FORMS', {'2:4': semi_structured_linear})
    model, x = two_layers().bfloat16(), torch.randn(5, 64).bfloat16()
    fast = sparse_inference(model, x, seconds=0.05, rtol=0.05)
    report = fast.inference_report
    assert report.form.tolist() == ['2:4 tuned', 'dense', 'sparse'] and fast[0].weight.alg_id_cusparselt == 7
    assert report.why['2'] == 'the fastest: 2:4 takes 1.50 of its time, 2:4 tuned takes 2.00 of its time'
    assert forms.layer_forms(nn.Linear(64, 64))[1]['2:4'].startswith('not 2:4')


def test_the_fastest_form():
    nan = float('nan')
    for ms, form, why in (
        ({'dense': 1, '2:4': 1}, 'dense', '2:4 takes 1.00 of its time'),
        ({'dense': 1, '2:4': 0.5}, '2:4', '2.00 times as fast as dense'),
        ({'dense': 1, '2:4': nan}, 'dense', '2:4: no memory'),
        ({'dense': nan, '2:4': 1}, 'dense', 'the example does not reach it'),
    ):
        assert fastest_form(ms, {'2:4': 'no memory'} if ms['2:4'] != ms['2:4'] else None) == (form, why)


# the trial in another process

PRODUCTS = [Product(64, 64, rows, True, 'bfloat16') for rows in (1, 2, 3)]
PROCESS = """
import json, os, sys
task = json.load(sys.stdin)
for i, (_, _, rows, _, _) in enumerate(task['products']):
    if rows == {dies_at} and {dies_in!r} == 'product':
        os.abort()
    print(json.dumps([i, 'works', True]), flush=True)
    if task['search']:
        if rows == {dies_at} and {dies_in!r} == 'search':
            os.abort()
        if rows == {dies_at} and {dies_in!r} == 'error':
            print(json.dumps([i, 'why', 'CUDA error: an illegal instruction was encountered']), flush=True)
            print(json.dumps([i, 'broken', True]), flush=True)
            break
        print(json.dumps([i, 'algorithm', 7]), flush=True)
    print(json.dumps([i, 'done', True]), flush=True)
"""


def tried(monkeypatch, script):
    monkeypatch.setattr(semi_structured_trial, 'COMMAND', [sys.executable, '-S', '-c', script])
    return list(try_products(PRODUCTS, torch.device('cpu')).values())


@pytest.mark.parametrize(
    'dies_in,dies_at,works,algorithms,why',
    [
        ('nothing', 0, [True, True, True], [7, 7, 7], ['', '', '']),
        ('search', 2, [True, True, True], [7, None, None], ['', 'ended with code', '']),
        ('error', 2, [True, True, True], [7, None, None], ['', 'illegal instruction', '']),
        ('product', 2, [True, False, False], [7, None, None], ['', 'ended with code', 'ended with code']),
        ('product', 3, [True, True, False], [7, 7, None], ['', '', 'ended with code']),
    ],
)
def test_a_trial_that_dies_takes_no_other_with_it(monkeypatch, dies_in, dies_at, works, algorithms, why):
    "What has not been seen to work is not used: after a search has died, no algorithm is; after a product, no product"
    outcomes = tried(monkeypatch, PROCESS.format(dies_in=dies_in, dies_at=dies_at))
    assert [o.works for o in outcomes] == works and [o.algorithm for o in outcomes] == algorithms
    assert all(w in o.why if w else not o.why for o, w in zip(outcomes, why, strict=True)), outcomes


def test_a_trial_without_an_end_or_a_process(monkeypatch):
    monkeypatch.setattr(semi_structured_trial, 'LIMIT', 0.5)
    for o in tried(monkeypatch, 'import time; time.sleep(30)'):
        assert o == Outcome(why='the trial took more than 0.5 s')
    monkeypatch.setattr(semi_structured_trial, 'COMMAND', ['/no/such/program'])
    for o in try_products(PRODUCTS, torch.device('cpu')).values():
        assert not o.works and o.why.startswith('no process could be started for the trial')
    empty = PRODUCTS[0]._replace(rows=0)
    assert try_products([empty], torch.device('cpu')) == {empty: Outcome(why='its input is empty')}


def test_the_process_of_a_trial():
    "It gives the reason where there is no GPU for 2:4, as this test's device"
    outcome = try_products(PRODUCTS[:1], torch.device('cpu'))[PRODUCTS[0]]
    assert not outcome.works and outcome.why.startswith('2:4 tensors: ')


@quiet
def test_a_product_that_dies_stays_dense(timed, monkeypatch):
    timed({128: {'dense': 2, 0: 1}, 64: {'dense': 2, 0: 1}}, found=7)
    died = 'the process of the trial ended with code -6: '
    monkeypatch.setattr(semi_structured_trial, '_run', lambda products, *_: ([{} for _ in products], died))
    report = to_semi_structured(two_layers(), example=torch.randn(5, 64), **half).semi_structured_report
    assert (report.became == 'dense').all() and report.why['0.weight'] == f'2:4: {died}'
    fast = sparse_inference(two_layers().bfloat16(), torch.randn(5, 64).bfloat16(), seconds=0.05, rtol=0.05)
    assert not packed_names(fast)


def test_wrong_outputs_are_an_error(timed):
    timed({64: {'dense': 1, 0: 1}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CuSparseLt, '_mm', lambda self, B, **kwargs: torch.zeros(64, B.shape[1], dtype=B.dtype))
        with pytest.raises(ValueError, match='its outputs are wrong'):
            run_product(PRODUCTS[0], torch.device('cpu'), False, lambda *step: None)


def test_what_has_no_2_4_tensor():
    linear = nn.Linear(64, 64)
    for layer, says in (
        (nn.Conv2d(3, 3, 1), 'for nn.Linear alone, got Conv2d'),
        (linear, 'not 2:4'),
        (nn.Linear(6, 4), 'no multiple of 4'),
    ):
        with pytest.raises(ValueError, match=says):
            semi_structured_linear(layer)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)),
    reason='needs a GPU of compute capability 8.0 or up',
)
@pytest.mark.parametrize('make,xs', [(Channels, torch.randn(2, 64, 5)), (Encoder, torch.randn(2, 4, 8))])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_semi_structured_on_a_gpu(make, xs, dtype):
    model, _ = pruned(make().cuda().eval(), 0.5, granularity='2:4')
    with pytest.warns(UserWarning, match='no layer is timed'):
        fast = to_semi_structured(model, dtype=dtype)
    assert (fast.semi_structured_report.became == '2:4').any()
    timed = to_semi_structured(model, dtype=dtype, example=xs, seconds=0.5)
    assert timed.semi_structured_report.ms['total'] <= timed.semi_structured_report.dense_ms['total']
    with torch.no_grad():
        for m in (fast, timed):
            assert torch.allclose(m(xs.cuda().to(dtype)).float(), model(xs.cuda()), atol=0.05)
