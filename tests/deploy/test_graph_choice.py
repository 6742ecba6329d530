"Models as graphs in machine code: chosen, reported, copied, and called in every way"

import copy
import io
import pickle
import threading

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from graph_models import chosen
from torch import nn

from fastprune.all import compute_masks, prunable_weights
from fastprune.deploy import graph_choice
from fastprune.deploy.graph_run import Segment

pytestmark = pytest.mark.cpu_only  # the kernel is for the CPU


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.bn(self.a(x)).relu()
        x = (self.b(x) + x).relu()
        return self.fc(x.mean((2, 3)))


def pruned(model, sparsity=0.9):
    weights = prunable_weights(model)
    compute_masks(weights, sparsity, absolute=True).apply_({n: p.data for n, p in weights.items()})
    return model.eval()


def close(a, b):
    return a.shape == b.shape and (not len(b) or (a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return pruned(Net())


@pytest.fixture
def fast(model, monkeypatch):
    return chosen(monkeypatch, model, torch.randn(2, 3, 16, 16))


def test_report(fast):
    report = fast.inference_report
    assert report.form.tolist() == ['graph'] * 4 and report.ms[:-1].isna().all() and report.dense_ms['b'] > 0
    assert report.why['a'] == 'one of 3 layers of graphs in machine code; the whole model is 2.0 times as fast'
    assert report.why['total'] == '1 BatchNorm folded'


@torch.no_grad()
def test_other_sizes_and_layouts(model, fast):
    for shape in ((0, 3, 16, 16), (1, 3, 16, 16), (3, 3, 33, 21), (17, 3, 8, 8), (1, 3, 1, 1), (9, 3, 1, 1)):
        x = torch.randn(shape)
        assert close(fast(x), model(x))
    x = torch.randn(9, 3, 12, 16)
    last = x.to(memory_format=torch.channels_last)
    for y in (last, torch._neg_view(-x), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert close(fast(y), model(x))
    with torch.inference_mode():
        assert close(fast(torch.zeros(2, 3, 20, 20)), model(torch.zeros(2, 3, 20, 20)))
    assert close(fast(torch.ones(2, 3, 20, 20)), model(torch.ones(2, 3, 20, 20)))
    with pytest.raises(RuntimeError, match='to have 3 channels'):
        fast(x[:, :2])


@torch.no_grad()
def test_copies(model, fast):
    x, file = torch.randn(17, 3, 16, 16), io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for again in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert close(again(x), model(x)) and again.inference_report.equals(fast.inference_report)
    state = copy.deepcopy(fast.state_dict())
    doubled = {n: 2 * t if t.is_floating_point() else t for n, t in state.items()}
    other = copy.deepcopy(fast)
    other(x)
    other.load_state_dict(doubled)
    assert not close(other(x), model(x))
    other.load_state_dict(state)
    assert close(other(x), model(x)) and close(other.double().float()(x), model(x))


def test_threads(model, fast):
    x, got = torch.randn(20, 3, 16, 16), []
    with torch.no_grad():
        want = model(x)

    def work():
        with torch.no_grad():
            got.extend(close(fast(x[:n]), want[:n]) for n in (1, 9, 20, 3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 16 and all(got)


def test_refuses(fast):
    x = torch.randn(2, 3, 16, 16)
    for call, says in (
        (lambda: fast(x.double()), 'takes float32 on a CPU, got float64'),
        (lambda: fast(x.clone().requires_grad_()), 'has no gradients'),
        (lambda: copy.deepcopy(fast).half()(x), 'works in float32 on a CPU, got float16'),
        (lambda: copy.deepcopy(fast).to('meta')(x), 'works in float32 on a CPU, got float32 on meta'),
        (lambda: fast(x[0]), r'got shape \(3, 16, 16\)'),
        (lambda: torch.jit.trace(fast, x), "can't be traced"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_layers_outside_take_their_forms(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(14, 64), nn.Linear(64, 8))
    pruned(model, 0.97)
    x = torch.randn(4, 3, 16, 16)
    with monkeypatch.context() as m:
        m.setattr('fastprune.deploy.timing.LayerTrial.best', lambda t: 'sparse' if 'sparse' in t.forms else 'dense')
        fast = chosen(monkeypatch, model, x)
    assert fast.inference_report.form.tolist() == ['graph', 'sparse', 'sparse', 'graph']
    kinds = [type(m).__name__ for m in fast.modules()]
    assert kinds.count('SparseLinear') == 2 and kinds.count('Segment') == 1
    with torch.no_grad():
        assert close(fast(x), model(x))


def test_what_goes_wrong_is_in_the_report(model, monkeypatch):
    x = torch.randn(2, 3, 16, 16)
    slower = chosen(monkeypatch, model, x, 'as it was').inference_report
    assert slower.form['total'] == 'as it was' and slower.why['total'] == 'a graph takes 2.00 of its time'

    def failing(*_):
        raise ValueError('no such thing')

    for name, stand_in, says in (
        ('trace_graph', failing, 'no graph: no such thing'),
        ('trace_graph', lambda *_: (None, 'it has none'), 'no graph: it has none'),
        ('trace_graph', lambda *_: (pruned(Net()), None), 'no graph: it would change the outputs'),
        ('kernel_missing', lambda: 'no numba', 'no graph: no numba'),
    ):
        with monkeypatch.context() as m:
            m.setattr(graph_choice, name, stand_in)
            fast = chosen(monkeypatch, model, x)
        assert says in fast.inference_report.why['total'] and 'graph' not in fast.inference_report.form.tolist()
    dense = chosen(monkeypatch, Net().eval(), x)
    assert 'graph' not in dense.inference_report.why['total'] and not any(
        isinstance(m, Segment) for m in dense.modules()
    )


def test_fastai_predicts_with_a_whole_graph(model, fast):
    "fastai reads the device off a parameter, and a graph has buffers alone"
    items = [(torch.randn(3, 16, 16), torch.tensor(0)) for _ in range(4)]
    dl = DataLoader(items, bs=2)
    want = model(torch.stack([x for x, _ in items])).softmax(1)
    for m in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        learn = Learner(DataLoaders(dl, dl), m, loss_func=CrossEntropyLossFlat())
        with learn.no_bar():
            assert close(learn.get_preds()[0], want)
        assert [p.numel() for p in m.parameters()] == [0]
