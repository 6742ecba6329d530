"The order of batches follows from the seed, and passes on the side leave it alone"

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastai.callback.rnn import ModelResetter
from fastai.text.data import LMDataLoader
from helpers import quietly
from torch import nn
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler

from fastprune.all import SparsifyCallback, prunable_weights, snip
from fastprune.learner.batches import undisturbed
from fastprune.learner.evaluate import check_targets
from fastprune.learner.states import StartAt, restoring, seed_round

pytestmark = pytest.mark.usefixtures('deterministic')

ITEMS = [(torch.full((4,), i / 20), torch.tensor(i % 3)) for i in range(20)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ITEMS)


class Words(nn.Module):
    "A language model that carries its state from batch to batch"

    def __init__(self):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(20, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 20)
        self.hidden = None
        self.register_buffer('seen', torch.zeros(()))

    def reset(self):
        self.hidden = None
        self.seen.zero_()

    def forward(self, x):
        self.seen += 1
        out, hidden = self.rnn(self.emb(x), self.hidden)
        self.hidden = tuple(t.detach() for t in hidden)
        return self.out(out)


def fastais():
    return DataLoader(ITEMS, bs=4, shuffle=True)


def torchs(**kwargs):
    return torch.utils.data.DataLoader(
        ITEMS, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7), **kwargs
    )


def sampled():
    sampler = RandomSampler(ITEMS, generator=torch.Generator().manual_seed(7))
    return torch.utils.data.DataLoader(ITEMS, batch_sampler=BatchSampler(sampler, 4, False))


def persistent():
    started.append(torchs(num_workers=1, persistent_workers=True))
    return started[-1]


started = []


@pytest.fixture(autouse=True)
def processes_end_with_the_test():
    "The garbage collector waits for each of them, five seconds"
    yield
    while started:
        if loaded := started.pop()._iterator:
            loaded._shutdown_workers()


def streamed():
    return DataLoader(Stream(), bs=4, n=20)


def texts():
    docs = [(torch.arange(i, i + 6),) for i in range(14)]
    return LMDataLoader(docs, bs=4, seq_len=5, shuffle=True, lens=[6] * 14)


SHUFFLED = [fastais, torchs, sampled, texts]


def make(loader):
    torch.manual_seed(0)
    train, text = loader(), loader is texts
    dls = DataLoaders(train, train.new(shuffle=False) if text else fastais())
    model = Words() if text else nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=ModelResetter() if text else None)


class Seen(Callback):
    "The inputs of training, and what the model has carried to them"

    order = 90

    def __init__(self):
        self.batches, self.carried = [], []

    def before_batch(self):
        if self.training:
            self.batches.append(self.xb[0].clone())
            hidden = getattr(self.model, 'hidden', None) or ()
            self.carried.append([*hidden, *(b.clone() for b in self.model.buffers())])


class Looks(Callback):
    "Asks for scores after each step"

    order = 95

    def after_step(self):
        snip(prunable_weights(self.model), self.learn)


def trained(learn, n_epoch, cbs=()):
    seen = Seen()
    quietly(learn, learn.fit, n_epoch, 0.1, cbs=[seen, *cbs])
    return seen


def same(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('loader', SHUFFLED)
def test_the_order_follows_from_the_seed(loader):
    learn = make(loader)
    seed_round(learn, 3)
    first = trained(learn, 2).batches
    assert not same(first[: len(first) // 2], first[len(first) // 2 :])
    seed_round(learn, 3)
    assert same(trained(learn, 2).batches, first)


@pytest.mark.parametrize('loader', SHUFFLED)
@pytest.mark.parametrize('context', [restoring, undisturbed])
def test_trainings_and_passes_on_the_side_leave_the_order_alone(loader, context):
    learn, seen = make(loader), []
    for aside in (False, True):
        seed_round(learn, 3)
        if aside:
            with context(learn):
                list(learn.dls.train)
        seen.append(trained(learn, 1).batches)
    assert same(*seen)


@pytest.mark.parametrize('loader', SHUFFLED)
def test_a_look_at_the_targets_leaves_the_order_alone(loader):
    learn, seen = make(loader), []
    for looks in (False, True):
        seed_round(learn, 3)
        if looks:
            check_targets(learn, dl=learn.dls.train)
        seen.append(trained(learn, 1).batches)
    assert same(*seen)


def test_a_pass_on_the_side_may_put_the_loaders_into_another_list():
    "fastai's DistributedTrainer does, in each validation"
    learn = make(fastais)
    train = learn.dls.train
    with undisturbed(learn):
        learn.dls.loaders = list(learn.dls.loaders)
    assert learn.dls.train is train


def test_targets_may_come_from_a_callback():
    class OwnInputs(Callback):
        def before_batch(self):
            self.learn.yb = self.xb

    inputs = [(x,) for x, _ in ITEMS]
    dls = DataLoaders(DataLoader(inputs, bs=4), DataLoader(inputs, bs=4))
    learn = Learner(dls, nn.Linear(4, 4), loss_func=nn.MSELoss(), cbs=OwnInputs())
    check_targets(learn, dl=dls.valid)
    assert np.isfinite(learn.linear_path(*[learn.model.state_dict()] * 2, n=3, dl=dls.valid).losses).all()
    with pytest.raises(ValueError, match='dl: it has no batches to evaluate on'):
        check_targets(learn, dl=[])
    check_targets(learn, dl=DataLoader(Stream(), bs=4))
    for other in (make(fastais), Learner(DataLoaders([], []), nn.Linear(4, 4), loss_func=nn.MSELoss())):
        with pytest.raises(ValueError, match='dl: its batches have no targets'):
            check_targets(other, dl=dls.valid)


@pytest.mark.sample(2)
@pytest.mark.parametrize('loader', [*SHUFFLED, persistent])
def test_skipped_epochs_draw_their_order(loader):
    learn = make(loader)
    n = len(learn.dls.train)
    seed_round(learn, 3)
    whole = trained(learn, 3).batches
    learn = make(loader)
    seed_round(learn, 3)
    assert same(trained(learn, 3, [StartAt(n + 1)]).batches, whole[n + 1 :])


@pytest.mark.sample(2)
@pytest.mark.parametrize('loader', [*SHUFFLED, persistent, streamed])
def test_a_criterion_leaves_the_running_epoch_alone(loader):
    seen = []
    for looks in ([], [Looks()]):
        learn = make(loader)
        seed_round(learn, 3)
        seen.append(trained(learn, 2, looks))
    a, b = seen
    assert len(a.batches) == 2 * len(learn.dls.train) and same(a.batches, b.batches)
    for x, y in zip(a.carried, b.carried, strict=True):
        assert same(x, y)


@pytest.mark.parametrize('loader', [persistent, streamed, texts])
def test_pruning_by_data_in_training(loader):
    learn = make(loader)
    seen = trained(learn, 1, [SparsifyCallback(0.5, criterion=snip, interval=1)])
    assert len(seen.batches) == len(learn.dls.train)
    assert learn.masks.sparsity == pytest.approx(0.5, abs=0.02)
