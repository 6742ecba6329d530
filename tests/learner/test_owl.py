"OWL's layer-wise sparsities: exact in all, by outliers of Wanda's scores"

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner
from helpers import Encoder
from torch import nn

from fastprune.all import SparsifyCallback, cifar_resnet, digits_convnet, digits_dls, prunable_weights, wanda
from fastprune.criteria.outliers import outlier_shares, outlier_sparsities
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def make(model=None):
    torch.manual_seed(0)
    learn = Learner(digits_dls(bs=32), model or digits_convnet(widths=(4, 8)), loss_func=CrossEntropyLossFlat())
    seed_round(learn, 0)
    return learn


def zeros(sparsities, sizes):
    return sum(round(s * sizes[n]) for n, s in sparsities.items())


def test_by_hand():
    learn = make()
    weights = prunable_weights(learn.model)
    sizes = {n: p.numel() for n, p in weights.items()}
    scores = wanda(weights, learn)
    seed_round(learn, 0)
    got = learn.owl_sparsities(0.7, outlier=2)
    shares = {n: float((s > 2 * s.mean()).float().mean()) for n, s in scores.items()}
    mean = sum(shares[n] * sizes[n] for n in sizes) / sum(sizes.values())
    furthest = max(abs(d - mean) for d in shares.values())
    assert furthest > 0
    for n, s in got.items():
        assert s == pytest.approx(0.7 - 0.08 * (shares[n] - mean) / furthest, abs=1 / sizes[n])
    assert zeros(got, sizes) == round(0.7 * sum(sizes.values()))


@pytest.mark.parametrize('sparsity', [0, 0.05, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize('spread', [0, 0.08, 0.5])
def test_exact_in_all_and_inside_of_the_spread(sparsity, spread):
    generator = torch.Generator().manual_seed(0)
    sizes = {str(i): int(torch.randint(1, 4000, (), generator=generator)) for i in range(30)} | {'one': 1, 'three': 3}
    shares = {n: float(torch.rand((), generator=generator)) for n in sizes}
    got = outlier_sparsities(shares, sizes, sparsity, spread)
    assert zeros(got, sizes) == round(sparsity * sum(sizes.values()))
    for n, s in got.items():
        assert 0 <= s < 1 and abs(s - sparsity) <= min(spread, sparsity, (1 - sparsity) / 2) + 1 / sizes[n]
    if spread and sparsity:
        large = [n for n in sizes if sizes[n] > 1000]
        order = sorted(large, key=shares.get)
        assert got[order[0]] > got[order[-1]]


def test_in_prune_and_in_training(fit):
    learn = make()
    target = learn.owl_sparsities(0.7)
    n = sum(p.numel() for p in prunable_weights(learn.model).values())
    learn.prune(target, criterion=wanda)
    assert n - learn.masks.n_kept == round(0.7 * n)
    assert {k: int((~m).sum()) / m.numel() for k, m in learn.masks.items()} == target
    learn.remove_masks()
    fit(learn, 1, cbs=SparsifyCallback(target, interval=5))
    assert n - learn.masks.n_kept == round(0.7 * n)


def test_the_model_and_random_numbers_stay_as_they_are():
    learn = make()
    state, rng = {n: t.clone() for n, t in learn.model.state_dict().items()}, torch.get_rng_state()
    first, second = learn.owl_sparsities(0.8), learn.owl_sparsities(0.8)
    assert first == second and torch.equal(rng, torch.get_rng_state()) and learn.model.training
    assert all(torch.equal(t, state[n]) for n, t in learn.model.state_dict().items())


def test_the_layers_of_a_block_share_one_sparsity():
    learn = make(nn.Sequential(nn.Flatten(1, 2), Encoder(d=16, hidden=32)))
    names = [n for n in prunable_weights(learn.model) if 'linear' in n]
    got = learn.owl_sparsities(0.7, outlier=2, include=names, depth=4)
    assert len(got) == 4
    for i in (0, 1):
        of_block = [s for n, s in got.items() if f'layers.layers.{i}.' in n]
        assert max(of_block) - min(of_block) < 2 / (16 * 32)
    scores = {'a.x': torch.tensor([1.0, 1, 10]), 'a.y': torch.tensor([1.0]), 'b.x': torch.tensor([2.0, 2])}
    assert outlier_shares(scores, 3, {'a.x': 'a', 'a.y': 'a', 'b.x': 'b'}) == {'a.x': 0.25, 'a.y': 0.25, 'b.x': 0}


def test_a_residual_network():
    learn = make(nn.Sequential(nn.Conv2d(1, 3, 1), cifar_resnet(8)))
    sizes = {n: p.numel() for n, p in prunable_weights(learn.model).items()}
    assert zeros(learn.owl_sparsities(0.9, outlier=3), sizes) == round(0.9 * sum(sizes.values()))


def test_bad_input():
    learn = make()
    for args, kwargs, message in [
        ((70,), {}, 'sparsity=70 .* did you mean 0.7'),
        (({'0*': 0.5},), {}, 'sparsity=.*: needs a number in'),
        ((0.7,), dict(n_batches=0), 'n_batches=0: needs'),
        ((0.7,), dict(outlier=0), 'outlier=0: needs a number above 0'),
        ((0.7,), dict(spread=1), 'spread=1: needs the largest difference from `sparsity`'),
        ((0.7,), dict(spread=-0.1), 'spread=-0.1: needs'),
        ((0.7,), dict(depth=0), 'depth=0: needs a whole number of parts of a name'),
        ((0.7,), dict(exclude='*'), 'nothing to prune: include and exclude leave no weight'),
        ((0.7,), dict(include='nothing'), "'nothing' matches no weight"),
        ((0.9999,), {}, 'leaves 0 of .* weights, fewer than there are layers'),
    ]:
        with pytest.raises(ValueError, match=message):
            learn.owl_sparsities(*args, **kwargs)
    recurrent = make(nn.Sequential(nn.Flatten(1, 2), nn.GRU(8, 4, batch_first=True)))
    with pytest.raises(ValueError, match="owl_sparsities: wanda scores linear .* is of GRU: leave it out by `exclude`"):
        recurrent.owl_sparsities(0.7)
    learn.model[0][0].weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"scores\['0.0.weight'\] has numbers that are not finite"):
        learn.owl_sparsities(0.7)
