"Replayed passes give what whole passes give, also where modules do more than return an output"

import pytest
import torch
from torch import nn

from fastprune.core.replay import Replay


class Stop(Exception):
    pass


class InPlace(nn.Module):
    "The sum and the activation change tensors that others have, too"

    def __init__(self):
        super().__init__()
        self.relu, self.a, self.b, self.same = nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 6), nn.Identity()

    def forward(self, x):
        y = self.relu(x)
        out = self.b(self.a(y))
        out += self.same(x)
        kept = self.same(out)
        kept *= 2
        return out + x


class Remembers(nn.Module):
    "Sets an attribute that another module reads"

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        self.seen = self.lin(x)
        return self.seen.tanh()


class Reads(nn.Module):
    def __init__(self, source):
        super().__init__()
        self.source, self.lin = [source], nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x) + self.source[0].seen


class Nested(nn.Module):
    "Gets and gives nested tensors, calls a module twice, and hands an object on that modules change"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.LSTM(6, 6, batch_first=True), Notes()

    def forward(self, x):
        notes = Book()
        y, (h, c) = self.b(self.a(self.a(x))[:, None])
        z = self.c(y[:, 0], notes=notes)
        return z + h[0] + notes.pages[0]


class Book:
    def __init__(self):
        self.pages = []


class Notes(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x, notes):
        notes.pages.append(self.lin(x))
        return x


def hooked():
    "A hook on an inner module that a later one depends on, as in fastai's U-Net"
    first = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), nn.Tanh())
    last = Reads(first)
    first[1].register_forward_hook(lambda m, args, out: setattr(first, 'seen', out))
    return nn.Sequential(first, last, nn.Linear(6, 6))


def remembering():
    first = Remembers()
    return nn.Sequential(nn.Sequential(nn.Linear(6, 6), first), nn.ReLU(), Reads(first), nn.Linear(6, 6))


MODELS = {
    'in place': lambda: nn.Sequential(InPlace(), InPlace(), nn.Linear(6, 3)),
    'attributes': remembering,
    'hooks': hooked,
    'nested': lambda: nn.Sequential(Nested(), Nested()),
    'twice': lambda: nn.Sequential(*[nn.Linear(6, 6)] * 2, nn.ReLU(), nn.Linear(6, 6)),
}


@pytest.mark.parametrize('max_bytes', [2**31, 500, 0])
@pytest.mark.parametrize('kind', MODELS)
def test_inputs_of_each_layer(kind, max_bytes):
    "Two batches take turns; each pass ends at the first call of the next layer, whose weight then changes"
    torch.manual_seed(0)
    net = MODELS[kind]().eval()
    layers = list(dict.fromkeys(m for m in net.modules() if isinstance(m, nn.Linear)))
    batches, lead = [torch.randn(4, 6) for _ in range(2)], None
    found, ran = [], []

    def on_call(m, args, kwargs):
        ran.append(m)
        if m is lead:
            found.append(args[0].clone())
            raise Stop

    replay = Replay(net, on_call, max_bytes)

    def run(i):
        found.clear()
        with torch.no_grad(), pytest.raises(Stop):
            net(batches[i].clone())
        return found[0]

    for lead in layers:
        with replay.installed():
            got = []
            for i in range(2):
                with replay.pass_of(i):
                    got.append(run(i))
        hooks = [lead.register_forward_pre_hook(lambda m, args: on_call(m, args, {}))]
        want = [run(i) for i in range(2)]
        hooks[0].remove()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        lead.weight.data.mul_(-0.5)
    assert replay.used <= max_bytes and not any('forward' in vars(m) for m in net.modules())


def test_only_what_is_new_runs():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(5)]).eval()
    ran = []

    def on_call(m, args, kwargs):
        ran.append(m)
        if m is lead:
            raise Stop

    replay = Replay(net, on_call)
    for block in net:
        lead = block[0]
        ran.clear()
        with torch.no_grad(), replay.installed(), pytest.raises(Stop), replay.pass_of(0):
            net(torch.ones(2, 6))
        assert len([m for m in ran if isinstance(m, nn.Linear)]) <= 2
    assert replay.used == 2 * 6 * 4  # the latest block's output alone
