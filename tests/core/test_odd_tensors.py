"Tensors without elements, models without weights, float8, and sparse gradients"

from functools import partial

import pytest
import torch
from fastai.basics import (
    SGD,
    Adam,
    Callback,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Learner,
    OptimWrapper,
    set_seed,
)
from torch import nn

from fastprune.all import CRITERIA, Checkpoint, SparsifyCallback, Ticket, load_sparse, prunable_weights, taylor
from fastprune.deploy.report_file import report_file
from fastprune.methods.registry import BASELINES


def net():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def make(model, **kwargs):
    dl = DataLoader([(torch.randn(64), torch.tensor(i % 4)) for i in range(64)], bs=16, drop_last=True)
    return Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(), **kwargs)


def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args, **kwargs)
    return learn


def with_empty():
    m = net()
    m[1].e = nn.Linear(0, 4)
    return m


@pytest.mark.parametrize('method', [SparsifyCallback, *BASELINES.values()], ids=lambda m: m.__name__)
def test_a_tensor_without_elements(method):
    learn = fit(make(with_empty()), 2, 1e-2, wd=1e-3, cbs=method(0.5))
    assert set(learn.masks) == {'0.weight', '2.weight'} and learn.masks.sparsity >= 0.5 - 1e-3
    with pytest.raises(ValueError, match='nothing to prune'):
        fit(learn, 1, cbs=SparsifyCallback(0.5, include='1.e'))


def test_a_tensor_without_elements_in_rounds_and_reports():
    learn = make(with_empty())
    learn.prune(0.5, scope='erk')
    assert learn.sparsity_report().loc['total', 'sparsity'] == pytest.approx(0.5, abs=1e-3)
    assert len(learn.find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=cbs))) == 2


@pytest.mark.parametrize(
    'model',
    [nn.LayerNorm(64), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), nn.ReLU()],
    ids=lambda m: type(m).__name__,
)
def test_a_model_without_weights_has_no_sparsity(model):
    learn = make(nn.Sequential(model))
    total = learn.sparsity_report().loc['total']
    assert total.sparsity == 0 and total.weights == total.nonzero == 0
    with pytest.raises(ValueError, match='no weights that can be pruned'):
        learn.prune(0.5)


def with_float8(dtype=torch.float8_e4m3fn):
    m = net()
    m.q = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    m.frozen = nn.Linear(4, 4).requires_grad_(False)
    m.frozen.weight.data = m.frozen.weight.data.to(dtype)
    m.forward = lambda x: m[2](m[1](m[0](x)))
    return m


@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_left_alone(dtype, tmp_path):
    learn = make(with_float8(dtype), path=tmp_path)
    learn.prune(0.5)
    fit(learn, 1, cbs=[SparsifyCallback(0.8), Checkpoint('c')])
    assert set(learn.masks) == {'0.weight', '2.weight'} == set(learn.sparsity_report().index) - {'total'}
    with pytest.raises(
        ValueError,
        match="include: 'frozen.weight' can't be pruned, since float8.* prune the model before it is converted",
    ):
        learn.prune(0.5, include='frozen')
    learn.save_sparse(tmp_path / 's')
    assert load_sparse(tmp_path / 's')['frozen.weight'].dtype == dtype
    tickets = learn.find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=cbs), folder=tmp_path / 'f')
    tickets[1].save(tmp_path / 't')
    assert Ticket.load(tmp_path / 't').state['q'].dtype == dtype and learn.masks.sparsity == pytest.approx(
        0.2, abs=1e-3
    )
    learn.load_ticket(tickets[1].reinit())
    assert learn.linear_path(tickets[0], tickets[1], n=2).losses.shape == (2,)


def test_a_report_of_float8(tmp_path):
    from safetensors.torch import save_file

    pytest.importorskip('plotly')
    w = torch.arange(16.0).view(4, 4) * (torch.arange(4) > 1)
    save_file({'w.weight': w.to(torch.float8_e4m3fn)}, tmp_path / 'w.safetensors')
    page = report_file(tmp_path / 'w.safetensors', seconds=0, out=tmp_path / 'r.html').read_text()
    assert 'w.weight' in page and '50' in page
    learn = make(with_float8())
    learn.prune(0.5)
    assert learn.report(tmp_path / 'l.html', seconds=0).exists()


class Bags(nn.Module):
    "An embedding with sparse gradients"

    def __init__(self, bag):
        super().__init__()
        self.bag, self.emb = (
            bag,
            (nn.EmbeddingBag(9, 64, sparse=True, mode='mean') if bag else nn.Embedding(9, 64, sparse=True)),
        )
        self.out = nn.Linear(64, 4)

    def forward(self, x):
        return self.out(self.emb(x) if self.bag else self.emb(x).mean(1))


torch_sgd = partial(OptimWrapper, opt=torch.optim.SGD)


def bags(bag=True, opt=torch_sgd, **kwargs):
    set_seed(0)
    dl = DataLoader([(torch.randint(9, (5,)), torch.tensor(i % 4)) for i in range(32)], bs=8)
    return Learner(DataLoaders(dl, dl), Bags(bag), loss_func=CrossEntropyLossFlat(), opt_func=opt, **kwargs)


both = ['emb', 'out']
refused = {'synflow', 'wanda', 'obs'}  # before training, since inputs are words, and embeddings are no linear layers


@pytest.mark.sample(10)
@pytest.mark.parametrize('bag', [True, False], ids=['EmbeddingBag', 'Embedding'])
@pytest.mark.parametrize('name', CRITERIA)
def test_criteria_with_sparse_gradients(name, bag):
    learn = bags(bag)
    seen = []
    learn.add_cb(type('Seen', (Callback,), {'before_step': lambda self: seen.append(1)})())
    run = lambda: fit(learn, 1, 1e-2, cbs=SparsifyCallback(0.5, criterion=CRITERIA[name], include=both))
    if name in refused or name == 'grasp' and bag:
        with pytest.raises(ValueError, match=name):
            run()
        assert not seen
        return
    run()
    assert set(learn.masks) == {'emb.weight', 'out.weight'} and learn.masks.sparsity == 0.5 and learn.model.emb.sparse
    assert not any(p[~learn.masks[n]].any() for n, p in prunable_weights(learn.model, both).items())


@pytest.mark.sample(2)
@pytest.mark.parametrize('opt', [SGD, Adam, partial(OptimWrapper, opt=torch.optim.SGD)], ids=['SGD', 'Adam', 'torch'])
@pytest.mark.parametrize('method', BASELINES.values(), ids=lambda m: m.__name__)
def test_baselines_with_sparse_gradients(method, opt):
    learn = fit(bags(opt=opt), 2, 1e-2, wd=1e-3, cbs=method(0.5, include=both))
    assert learn.masks.sparsity >= 0.5 - 1e-3 and set(learn.masks) == {'emb.weight', 'out.weight'}


def test_a_dense_embedding_is_trained_to_the_same_masks():
    masks = []
    for sparse in (True, False):
        learn = bags()
        learn.model.emb.sparse = sparse
        masks.append(fit(learn, 2, 1e-1, cbs=SparsifyCallback(0.7, criterion=taylor, include=both)).masks)
    assert masks[0] == masks[1]


def test_one_shot_and_analyses_with_sparse_gradients(tmp_path):
    learn = bags(False, path=tmp_path)
    for name in ('taylor', 'snip', 'grasp'):
        learn.prune(0.5, criterion=CRITERIA[name], include=both, n_batches=2)
    assert (
        len(learn.gradient_histogram().gradients)
        and learn.hessian_spectrum(include=both).shape == (1,)
        and learn.model.emb.sparse
    )
    fit(learn, 2, cbs=[SparsifyCallback(0.8, include=both), Checkpoint('c')])
    assert learn.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(ValueError, match='second derivatives'):
        bags().hessian_spectrum()


def test_an_optimizer_for_sparse_gradients_alone_is_refused():
    learn = bags(opt=partial(OptimWrapper, opt=torch.optim.SparseAdam))
    with pytest.raises(ValueError, match="SparseAdam takes sparse gradients alone, and those of 'emb.weight'"):
        fit(learn, 1, cbs=SparsifyCallback(0.5, include=both))
