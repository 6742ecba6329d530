"Weights that are computed from parameters: spectral_norm and other parametrizations"

import warnings

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastai.layers import SelfAttention
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from fastprune.all import DPF, LC, STR, Masks, RigL, SparsifyCallback, taylor
from fastprune.criteria.weights import squared_magnitude

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def old_spectral_norm(m):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.nn.utils.spectral_norm(m)


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()


class Plus(nn.Module):
    "A sum like LoRA's, zero at first"

    def __init__(self, *shape):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(*shape))

    def forward(self, x):
        return x + self.delta


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).t()


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Product(nn.Module):
    "A product of two tensors, each of which can be pruned"

    def forward(self, a, b):
        return a * b

    def right_inverse(self, x):
        return x, torch.ones_like(x)


def parametrize(m, p):
    register_parametrization(m, 'weight', p)
    return m


norms = {'new': parametrizations.spectral_norm, 'old': old_spectral_norm}
lost = {
    'orthogonal': parametrizations.orthogonal,
    'exp': lambda m: parametrize(m, Exp()),
    'additive': lambda m: parametrize(m, Plus(*m.weight.shape)),
    'symmetric': lambda m: parametrize(m, Symmetric()),
    'cayley': lambda m: parametrizations.orthogonal(m, orthogonal_map='cayley'),
    'exp of a scale': lambda m: parametrize(parametrize(m, Twice()), Exp()),
}


def net(wrap, scale=1.0):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 256), nn.Linear(256, 4))
    nn.init.normal_(m[1].weight, std=0.3 * scale)
    wrap(m[1])
    return m


def make(model, n=64, **kwargs):
    dl = DataLoader([(torch.randn(64), torch.tensor(i % 4)) for i in range(n)], bs=16, drop_last=True)
    return Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(), **kwargs)


def name_of(learn):
    return next(n for n in learn.sparsity_report().index if n.startswith('1.'))


def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args, **kwargs)


@pytest.mark.parametrize('kind', norms)
def test_global_pruning_ranks_what_is_in_use_and_empties_nothing(kind):
    "Parameters a thousand times smaller with the same weights have the same masks"
    masks = []
    for scale in (1.0, 1e-3):
        learn = make(net(norms[kind], scale))
        learn.prune(0.95, scope='global')
        n = name_of(learn)
        assert learn.masks.sparsity == pytest.approx(0.95, abs=1e-3) and learn.masks[n].any()
        assert learn.model.eval()(torch.randn(2, 64)).isfinite().all()
        used = learn.model[1].weight
        report = learn.sparsity_report()
        assert report.loc[n, 'nonzero'] == int((used != 0).sum()) == int(learn.masks[n].sum()) and report.loc[
            'total', 'sparsity'
        ] == pytest.approx(learn.masks.sparsity)
        masks.append(learn.masks)
    assert masks[0] == masks[1]


@pytest.mark.parametrize('criterion', [squared_magnitude, taylor])
def test_criteria_see_what_is_in_use(criterion):
    masks = []
    for scale in (1.0, 1e-3):
        learn = make(net(parametrizations.spectral_norm, scale))
        learn.model.eval()
        learn.prune(0.9, scope='global', criterion=criterion, **({'n_batches': 1} if criterion is taylor else {}))
        masks.append(learn.masks)
    assert masks[0].jaccard(masks[1]) < 0.01


@pytest.mark.parametrize('kind', norms)
@pytest.mark.parametrize('method', [SparsifyCallback, DPF, LC, RigL])
def test_training_under_spectral_norm(kind, method):
    learn = make(net(norms[kind], 1e-3))
    fit(learn, 3, 1e-2, wd=1e-3, cbs=method(0.9, scope='global'))
    n = name_of(learn)
    used = learn.model[1].weight
    assert (
        used.isfinite().all()
        and torch.equal(used != 0, learn.masks[n])
        and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    )


def test_thresholds_are_refused():
    with pytest.raises(ValueError, match='spectral_norm'):
        fit(make(net(parametrizations.spectral_norm)), 1, cbs=STR(0.5))


@pytest.mark.parametrize('kind', norms)
def test_what_would_empty_a_normed_weight_is_refused(kind):
    learn = make(net(norms[kind]))
    for run in (
        lambda: learn.prune(0.995),
        lambda: fit(learn, 1, cbs=SparsifyCallback(0.995)),
        lambda: learn.prune({'*': 0.1, '1*': 0.999}),
    ):
        with pytest.raises(ValueError, match=r"leaves 0 of the 64 weights of '1\..*divided by its norm"):
            run()
    learn.prune({'*': 0.995, '1.*': 0.9})
    assert learn.model.eval()(torch.randn(2, 64)).isfinite().all()


def test_rows_of_a_weight_norm_are_not_emptied_either():
    learn = make(net(parametrizations.weight_norm))
    with pytest.raises(ValueError, match=r"leaves 3 of the 64 weights of '1\..*norms of its 8 rows"):
        learn.prune(0.95)
    with pytest.raises(ValueError, match="leaves 4 of the 8 rows"):
        learn.prune(0.5, granularity='row')
    learn.prune(0.95, scope='global')
    assert learn.masks[name_of(learn)].any(1).all() and learn.model(torch.randn(2, 64)).isfinite().all()


@pytest.mark.parametrize('kind', lost)
def test_where_zeros_are_lost_it_is_refused_by_name(kind):
    learn = make(net(lost[kind]))
    before = {k: t.clone() for k, t in learn.model.state_dict().items()}
    runs = [
        lambda: learn.prune(0.5),
        lambda: fit(learn, 1, cbs=SparsifyCallback(0.5)),
        lambda: fit(learn, 1, cbs=RigL(0.5)),
        lambda: learn.find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=cbs)),
        lambda: setattr(
            learn,
            'masks',
            Masks(
                {
                    n: torch.ones_like(p, dtype=torch.bool)
                    for n, p in learn.model.named_parameters()
                    if n.startswith('1.') and n.endswith('original')
                }
            ),
        ),
    ]
    for run in runs:
        with pytest.raises(ValueError, match=r"'1\.parametrizations\.weight\.original' can't be pruned.*exclude='1'"):
            run()
    assert learn.masks is None and all(torch.equal(t, before[k]) for k, t in learn.model.state_dict().items())
    learn.prune(0.5, exclude='1')
    report = learn.sparsity_report()
    assert (
        report.loc['total', 'nonzero'] == sum(int((m.weight != 0).sum()) for m in learn.model)
        and report.loc['1.parametrizations.weight.original', 'sparsity'] == 0
    )


@pytest.mark.parametrize('p', [Twice(), Product()])
def test_whatever_keeps_zeros_can_be_pruned(p):
    learn = make(net(lambda m: parametrize(m, p)))
    fit(learn, 1, cbs=SparsifyCallback(0.9))
    used, masks = learn.model[1].weight, [m for n, m in learn.masks.items() if n.startswith('1.')]
    assert torch.equal(used != 0, masks[0] if len(masks) == 1 else masks[0] & masks[1])


def test_fastais_self_attention():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 16, 1), SelfAttention(16), nn.Flatten(), nn.Linear(256, 4)
    )
    for n, p in model.named_parameters():
        if n.startswith('2.') and p.ndim > 1:
            p.data.mul_(1e-4)
    learn = make(model)
    learn.prune(0.95, scope='global')
    assert all(m.any() for n, m in learn.masks.items() if n.startswith('2.'))
    fit(learn, 1, 1e-3)
    assert learn.model.eval()(torch.randn(2, 64)).isfinite().all() and learn.sparsity_report().loc[
        'total', 'sparsity'
    ] == pytest.approx(0.95, abs=1e-3)
