"Layers that a granularity does not fit stay whole; classes of modules are taken where names are"

import warnings
from functools import partial

import pytest
from fastai.basics import nn
from fastai.vision.learner import create_head
from helpers import equal

from fastprune.all import SparsifyCallback, prunable_weights


@pytest.fixture
def vision(learner):
    "A Learner like `vision_learner`'s: a body of convolutions, a head of linear layers"
    return lambda: learner(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
            create_head(16, 10, lin_ftrs=[32]),
        )
    )


def recorded(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in seen if 'left whole' in str(w.message)]


linears, convs = ['1.4.weight', '1.8.weight'], ['0.0.weight', '0.2.weight']


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'granularity,left', [('filter', linears), ('kernel', linears), ('2:4', ['0.0.weight']), ('row', []), ('column', [])]
)
def test_one_warning_names_them(vision, fit, granularity, left):
    for prune in (
        lambda l: l.prune(0.5, granularity=granularity),
        lambda l: fit(l, 2, cbs=SparsifyCallback(0.5, granularity=granularity)),
    ):
        learn = vision()
        told = recorded(partial(prune, learn))
        assert len(told) == bool(left) and all(repr(n) in t for n in left for t in told)
        assert set(learn.masks) == set(convs + linears) - set(left) and learn.masks.sparsity == 0.5
        assert all((learn.model.get_parameter(n) != 0).all() for n in left)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(include='1'),
        dict(include=['0', '1.4.weight']),
        dict(include=nn.Linear),
        dict(include=['0', nn.Linear]),
        dict(exclude='0'),
        dict(sparsity={'0': 0.5, '1': 0.5}),
        dict(sparsity={nn.Linear: 0.5}),
    ],
)
def test_asked_for_is_an_error(vision, fit, kwargs):
    learn, kwargs = vision(), dict(sparsity=0.5, granularity='filter') | kwargs
    before = {n: p.clone() for n, p in learn.model.named_parameters()}
    with pytest.raises(ValueError, match="'filter' does not fit '1.[48].weight'"):
        learn.prune(**kwargs)
    with pytest.raises(ValueError, match="'filter' does not fit '1.[48].weight'"):
        fit(learn, 1, cbs=SparsifyCallback(**kwargs))
    assert learn.masks is None and all(equal(p, before[n]) for n, p in learn.model.named_parameters())


def test_a_pattern_for_all_is_no_wish_for_each(vision):
    learn = vision()
    assert len(recorded(lambda: learn.prune(0.5, granularity='filter', include=['*.weight']))) == 1 and set(
        learn.masks
    ) == set(convs)
    assert not recorded(lambda: learn.prune(0.5, granularity='filter', exclude=nn.Linear))


def test_classes(vision):
    model = vision().model
    names = lambda **kw: list(prunable_weights(model, **kw))
    assert names(exclude=nn.Linear) == convs and names(include=nn.Conv2d) == convs
    assert names(exclude=[nn.Linear, '0.0']) == ['0.2.weight'] and names(exclude=(nn.Conv2d, '1.4')) == ['1.8.weight']
    assert names(include=[nn.Conv2d, '1.8'], exclude={'0.0'}) == ['0.2.weight', '1.8.weight']
    assert names(include=nn.BatchNorm1d) == [
        n for n, _ in model.named_parameters() if n.startswith(('1.2.', '1.6.'))
    ]  # as a name would
    assert names(include=nn.Module) == convs + linears
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert list(prunable_weights(tied, include=nn.Linear)) == ['0.weight']
    assert list(
        prunable_weights(
            nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2)), exclude=nn.TransformerEncoderLayer
        )
    ) == ['1.weight']


@pytest.mark.parametrize('what', ['include', 'exclude'])
def test_wrong_classes(vision, what):
    for kind in (nn.ReLU, nn.LSTM, int):
        with pytest.raises(ValueError, match=f'{what}: {kind.__name__} matches no weight.*Conv2d.*Linear'):
            vision().prune(0.5, **{what: kind})
    with pytest.raises(ValueError, match=f'{what}=3: needs a name'):
        vision().prune(0.5, **{what: 3})


def test_sparsity_by_class(vision, fit):
    want = {'0.0.weight': 0.5, '0.2.weight': 0.25, '1.4.weight': 0.75, '1.8.weight': 0.75}
    by_class = {'0.2.weight': 0.1, nn.Conv2d: 0.5, nn.Linear: 0.75, '0.2': 0.25}  # the last match counts
    for prune in (
        lambda l: l.prune(by_class),
        lambda l: l.prune(by_class, iterations=2),
        lambda l: fit(l, 1, cbs=SparsifyCallback(by_class, initial={nn.Linear: 0.1})),
    ):
        learn = vision()
        prune(learn)
        assert {n: round(s, 2) for n, s in learn.sparsity_report().sparsity[:-1].items()} == want
    with pytest.raises(ValueError, match='sparsity: ReLU matches no weight'):
        vision().prune({nn.ReLU: 0.5})
    with pytest.raises(ValueError, match='3 is not a name or pattern'):
        vision().prune({3: 0.5})
