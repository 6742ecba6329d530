"Functions that need a batch take `example=`, and batches may be tuples and dicts"

import copy

import pytest
import torch
from fastai.basics import DataLoader, DataLoaders, F, Learner, load_learner, nn, partial

from fastprune.all import latency, shrink, sparse_inference, to_onnx
from fastprune.core.channel_cost import flop_counts
from fastprune.core.channel_graph import call_model as find_channels_call

pytestmark = pytest.mark.filterwarnings('ignore')
x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(n):
    return torch.randn(n, 4), torch.randn(n, 5)


class Two(nn.Module):
    "Two inputs, by position or by name"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(5, 16), nn.Linear(16, 10)

    def forward(self, left, right=None, shift=None):
        y = self.a(left).relu()
        if right is not None:
            y = y + self.b(right).relu()
        return self.c(y if shift is None else y + shift)


class InTuple(Two):
    def forward(self, pair):
        return super().forward(*pair)


class InDict(Two):
    def forward(self, batch):
        return {'logits': super().forward(batch['left'], batch['right'])}


class Nested:
    "Items whose input is a tuple or a dict"

    def __init__(self, kind, n=32):
        self.kind, self.rows, self.y = kind, rows(n), torch.randint(10, (n,))

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        a, b = (o[i] for o in self.rows)
        return ((a, b) if self.kind is tuple else {'left': a, 'right': b}), self.y[i]


def nested(kind):
    "A Learner with such batches, whose first four filters in the first layer are pruned"
    dls = DataLoaders(*(DataLoader(Nested(kind), bs=8) for _ in range(2)))
    learn = Learner(
        dls,
        InTuple() if kind is tuple else InDict(),
        loss_func=lambda p, y: F.cross_entropy(p['logits'] if isinstance(p, dict) else p, y),
    )
    with torch.no_grad():
        for l in (learn.model.a, learn.model.b):
            l.weight[:4] = 0
            l.bias[:4] = 0
    learn.prune(0.5)
    return learn


def called(model, example):
    return model(**example) if isinstance(example, dict) else model(*example)


def same(a, b):
    assert torch.allclose(a, b, atol=1e-5)


@pytest.fixture
def loaded(learner, tmp_path):
    learn = learner()
    learn.prune(0.9)
    learn.export()
    return load_learner(tmp_path / 'export.pkl')


def test_after_load_learner(loaded, tmp_path):
    want = loaded.model.eval()(x)
    same(loaded.sparse_inference(example=x, seconds=0.01)(x), want)
    assert loaded.flops(example=x).loc['total', 'dense'] > loaded.flops(example=x).loc['total', 'nonzero'] > 0
    assert loaded.flops(example=x).equals(loaded.flops(example=x[:1]))  # of one item
    assert loaded.to_onnx(tmp_path / 'm.onnx', example=x).stat().st_size > 1000
    page = loaded.report(tmp_path / 'page.html', seconds=0.1, example=x).read_text()
    assert 'no batches' not in page and 'a batch of 4x1x8x8' in page
    report = loaded.shrink(example=x, repeats=0)
    assert 'total' in report.index
    same(loaded.model.eval()(x), want)


@pytest.mark.parametrize(
    'what',
    [
        lambda l, p: l.sparse_inference(),
        lambda l, p: l.to_onnx(p / 'm.onnx'),
        lambda l, p: l.shrink(),
        lambda l, p: l.flops(),
    ],
)
def test_without_batches_the_error_names_example(loaded, tmp_path, what):
    with pytest.raises(ValueError, match='no batches: give `example=`'):
        what(loaded, tmp_path)
    assert not list(tmp_path.glob('*.onnx'))


def test_a_wrong_example(loaded, tmp_path):
    for f in (loaded.sparse_inference, loaded.flops, loaded.shrink, partial(loaded.to_onnx, tmp_path / 'm.onnx')):
        with pytest.raises(ValueError, match='ndarray is not a tensor'):
            f(example=x.cpu().numpy())
        with pytest.raises(ValueError, match=r"(can't take|itself fails).*, 3, 8, 8\)|can't take the example"):
            f(example=torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match='needs a tensor'):
        loaded.flops(example='image')
    with pytest.raises(ValueError, match='models\\[.b.\\] can.t take it'):
        latency({'a': loaded.model.eval(), 'b': nn.Linear(3, 3).eval()}, x, seconds=0.1)


@pytest.mark.parametrize(
    'example',
    [
        rows(6),
        list(rows(6)),
        dict(zip(('right', 'left'), reversed(rows(6)), strict=True)),
        {'left': rows(6)[0]},
        {'left': rows(6)[0], 'shift': torch.ones(16)},
    ],
    ids=['tuple', 'list', 'dict', 'one', 'shift'],
)
@pytest.mark.cpu_only  # its kernel is
def test_inputs_by_position_and_by_name(example, tmp_path):
    model = Two().eval()
    with torch.no_grad():
        model.a.weight[torch.rand(16, 4) > 0.2] = 0
    want = called(model, example)
    same(called(sparse_inference(model, example, seconds=0.01), example), want)
    same(called(shrink(model, example, repeats=0)[0], example), want)
    assert latency({'it': model}, example, seconds=0.01).ms.item() > 0


@pytest.mark.parametrize('kind', [tuple, dict])
def test_nested_batches(kind, tmp_path):
    learn = nested(kind)
    batch = next(iter(learn.dls.valid))[0]
    out = lambda m: (lambda o: o['logits'] if isinstance(o, dict) else o)(m.eval()(batch))
    want = out(learn.model)
    same(out(learn.sparse_inference(seconds=0.01)), want)
    assert learn.flops().loc['total', 'dense'] == 2 * 16 * (4 + 5 + 10)
    assert 'no batches' not in learn.report(tmp_path / 'page.html', seconds=0.1).read_text()
    onnx = pytest.importorskip('onnx')
    graph = onnx.load(learn.to_onnx(tmp_path / 'm.onnx')).graph
    assert [i.name for i in graph.input] == (['pair_0', 'pair_1'] if kind is tuple else ['batch_left', 'batch_right'])
    pytest.importorskip('torch_pruning')
    report = learn.shrink(repeats=0)
    assert (report.loc['a', 'filters_after'], report.loc['b', 'filters_after']) == (12, 12)
    same(out(learn.model), want)


class InPlace(nn.Module):
    "Changes its input"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.b(self.a(x.sub_(0.5)).relu_())


def test_models_that_change_their_input(tmp_path):
    "Each pass gets the same numbers, and the user's tensors stay as they are"
    model, x = InPlace().eval(), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    given, want = x.clone(), model(x.clone()).detach()
    assert torch.allclose(sparse_inference(model, given, seconds=0.01)(x.clone()), want, atol=1e-4)
    latency({'a': model}, given, seconds=0.01)
    shrink(copy.deepcopy(model), given)
    dl = DataLoader([(o, 0) for o in x], bs=4)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=F.cross_entropy, path=tmp_path)
    assert learn.flops(example=given).dense['total'] == 2 * (4 * 16 + 16 * 10)
    assert flop_counts([], model, lambda m: find_channels_call(m, given))[0]
    learn.prune(0.5, granularity='channel')
    learn.shrink(example=given)
    assert torch.equal(given, x)


def test_an_onnx_file_of_a_model_that_changes_its_input(tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    to_onnx(InPlace(), given := x.clone(), tmp_path / 'a.onnx')
    assert torch.equal(given, x)
