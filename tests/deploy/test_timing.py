"Layers of a GPU are timed by its own events, and the host waits once a round"

import numpy as np
import pytest
import torch
from torch import nn

from fastprune.deploy import inference, timing
from fastprune.deploy.modules import replace_module


class Queue:
    "A GPU that works off its queue when somebody waits for it, and notes at what time each event was reached"

    def __init__(self):
        self.work, self.now, self.waits = [], 0.0, 0

    def synchronize(self, device):
        self.waits += 1
        for event, ms in self.work:
            self.now += ms
            if event is not None:
                event.at = self.now
        self.work.clear()


@pytest.fixture
def gpu(monkeypatch):
    queue = Queue()

    class Event:
        at = None

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == 'the current stream'
            queue.work.append((self, 0))

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: 'the current stream')
    monkeypatch.setattr(torch.cuda, 'synchronize', queue.synchronize)
    return queue


class Work(nn.Module):
    def __init__(self, queue, ms):
        super().__init__()
        self.queue, self.ms = queue, ms

    def forward(self, x):
        if self.ms is None:
            raise RuntimeError('too large\nmore')
        self.queue.work.append((None, self.ms))
        return x


def test_events(gpu):
    forms = {'dense': Work(gpu, 2.0), 'fast': Work(gpu, 0.5), 'slow': Work(gpu, 3.0), 'broken': Work(gpu, None)}
    model, trials = nn.Sequential(nn.ReLU(), nn.ReLU()), []
    for i in range(2):
        trials.append(timing.LayerTrial(forms, torch.device('cuda')))
        replace_module(model, str(i), trials[-1])
    timing.time_forms(model, (torch.ones(1),), trials, 1e-9, np.random.default_rng(0))
    for t in trials:
        assert [t.ms(f) for f in ('dense', 'fast', 'slow')] == pytest.approx([2, 0.5, 3])
        assert t.best() == 'fast' and t.errors == {'broken': 'too large'} and list(t.forms) == ['dense', 'fast', 'slow']
        assert len(t.times['dense']) >= 3 and not t.marks
    assert gpu.waits <= 2 * len(
        trials[0].times['dense']
    )  # one a round and a layer, whose queue is empty the second time


def test_whole_models_are_timed_until_their_results_are_there(gpu, monkeypatch):
    class Clock:
        perf_counter = staticmethod(lambda: 1e-3 * gpu.now)

    monkeypatch.setattr(timing, 'time', Clock)
    monkeypatch.setattr(timing, '_wait', gpu.synchronize)
    models = {'a': Work(gpu, 2.0).eval(), 'b': Work(gpu, 3.0).eval()}
    assert timing.latency(models, torch.ones(1), seconds=0.02).ms.tolist() == pytest.approx([2, 3])


@pytest.mark.parametrize('faster', [True, False])
def test_channels_last_where_a_gpu_is_faster_by_it(monkeypatch, faster):
    def latency(models, *_):
        order = ['channels_last', 'as it is', 'folded', 'as it was', 'sparse']
        place = order if faster else order[1:] + order[:1]
        return inference.pd.DataFrame({'ms': {n: float(place.index(n)) for n in models}})

    monkeypatch.setattr(inference, 'latency', latency)
    monkeypatch.setattr(inference, '_on_gpu', lambda model: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    fast = inference.sparse_inference(model, x, seconds=0.01)
    total = fast.inference_report.loc['total']
    assert total.form == ('channels_last' if faster else 'folded')
    assert total.why == '1 BatchNorm folded' + (', in channels_last' if faster else '')
    assert fast[3].weight.is_contiguous(memory_format=torch.channels_last) == faster
    assert model[3].weight.is_contiguous()
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    dense = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 1, 1)).eval()
    fast = inference.sparse_inference(dense, torch.randn(2, 1, 4), seconds=0.01)
    assert fast.inference_report.form['total'] == 'as it was'


def test_how_far_outputs_may_differ(monkeypatch):
    one, whole, linear, conv = torch.ones(1), torch.ones(1).long(), nn.Linear(1, 1), nn.Conv2d(1, 1, 1)
    assert {inference._tolerance(x, conv) for x in (one, one.half(), [whole])} == {1e-4}
    monkeypatch.setattr(inference, '_on_gpu', lambda model: True)
    for x, model, most in (
        ([one, whole], linear, 1e-4),
        ([one], conv, 2**-8),
        ([one, one.half()], linear, 2**-8),
        (one.bfloat16(), conv, 2**-5),
        (whole, linear, 1e-4),
    ):
        assert inference._tolerance(x, model) == most
