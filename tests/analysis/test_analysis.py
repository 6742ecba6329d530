import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, Learner, accuracy
from helpers import equal, quietly
from processes import python
from torch import nn

from fastprune.all import (
    SignFlips,
    compute_masks,
    digits_convnet,
    digits_dls,
    grasp,
    mask_overlap,
    paper_methods,
    prunable_weights,
    random_score,
    state_of,
    sweep,
)
from fastprune.analysis.plane import Plane
from fastprune.analysis.sweep import Sweep
from fastprune.analysis.weights import CyclePaths

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return Learner(
        digits_dls(bs=256), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=partial(SGD, mom=0.9)
    )


def test_sign_flips_by_hand():
    learn = make()
    a = state_of(learn)
    learn.model[1].weight.data[:2] *= -1
    learn.model[3].weight.data[0, 0] = 0
    df = learn.sign_flips(a)
    assert (
        df.loc['1.weight', 'flips'] == 128
        and df.loc['3.weight'].tolist() == [159, 0, 0]
        and df.loc['total', 'flips'] == 128
    )
    with pytest.raises(ValueError, match='another model'):
        learn.sign_flips({'x': torch.ones(2)})


def test_sign_flips_along_training(fit):
    learn, flips = make(), SignFlips(3)
    start = state_of(learn)
    fit(learn, 2, lr=0.1, cbs=flips)
    assert flips.iters == [3, 6, 9, 12] and sum(flips.flips) >= learn.sign_flips(start).loc['total', 'flips'] > 0
    with pytest.raises(ValueError, match='interval=0'):
        SignFlips(0)


def test_overlap_is_one_minus_the_jaccard_distance():
    w = prunable_weights(make().model)
    masks = {i: compute_masks(random_score(w, seed=i), 0.5) for i in range(3)}
    table = mask_overlap(masks)
    assert (
        all(table.loc[i, j] == pytest.approx(1 - masks[i].jaccard(masks[j])) for i in range(3) for j in range(3))
        and table.loc[1, 1] == 1
    )
    assert np.array_equal(mask_overlap(list(masks.values())).values, table.values)
    with pytest.raises(ValueError, match='none to compare'):
        mask_overlap([])
    learn = make()
    with pytest.raises(ValueError, match='nothing is pruned'):
        learn.mask_overlap(masks)
    learn.masks = next(iter(masks.values()))
    assert learn.mask_overlap(masks)['now'].tolist() == [*table.iloc[0], 1]


def test_hessian_leaves_the_learner_alone_and_pruned_weights_out():
    learn = make()
    learn.prune(0.9)
    state, rng = state_of(learn), torch.get_rng_state()
    sparse = learn.hessian_spectrum(2)
    assert all(equal(t, state[n]) for n, t in learn.model.state_dict().items()) and equal(rng, torch.get_rng_state())
    learn.remove_masks()
    assert (
        learn.hessian_spectrum(1)[0] >= sparse[0] - 1e-3 and sparse[0] >= sparse[1]
    )  # eigenvalues of a part lie between those of the whole
    for kw, msg in (
        (dict(k=0), 'k=0'),
        (dict(k=10**6), 'k=1000000'),
        (dict(n_batches=0), 'n_batches=0'),
        (dict(include='x'), 'include'),
    ):
        with pytest.raises(ValueError, match=msg):
            learn.hessian_spectrum(**kw)


def test_sensitivity_is_that_of_validate():
    learn = make()
    quietly(learn, learn.fit, 3, 0.1)
    before = state_of(learn)
    table = learn.sensitivity((0.5, 0.9))
    assert all(equal(t, before[n]) for n, t in learn.model.state_dict().items()) and learn.masks is None
    for n in ('1.weight', '3.weight'):
        other = make()
        other.model.load_state_dict(before)
        other.prune(0.9, include=n)
        with other.no_bar(), other.no_logging():
            assert other.validate()[1] == pytest.approx(table.loc[n, 0.9])
    with learn.no_bar(), learn.no_logging():
        assert (table[0.0] == learn.validate()[1]).all()
    for args, kw, msg in (
        (((90,)), {}, 'did you mean 0.9'),
        (((),), {}, 'list of sparsities'),
        (((0.5,),), dict(metric='acc'), "metric='acc'"),
    ):
        with pytest.raises(ValueError, match=msg):
            learn.sensitivity(*(args if isinstance(args[0] if args else 0, tuple) else (args,)), **kw)


def test_histogram_and_cycle_paths():
    learn = make()
    learn.prune(0.75)
    hist = learn.weight_histogram()
    assert hist.df.kept.tolist() == [256, 40] and all((v != 0).all() for v in hist.values.values())
    ends = quietly(learn, learn.fit_cycles, 3, 1, lr=0.1, ends=True)
    paths = learn.cycle_paths(ends, n=3)
    assert isinstance(paths, CyclePaths) and len(paths) == 2 and list(paths.df.index) == ['1 to 2', '2 to 3']
    with learn.no_bar(), learn.no_logging():
        assert paths[-1].losses[-1] == pytest.approx(learn.validate()[0], rel=1e-5)
    with pytest.raises(ValueError, match='at least 2 cycles'):
        learn.cycle_paths(ends[:1])
    with pytest.raises(ValueError, match=r'ends\[2\]=int: needs a model'):
        learn.cycle_paths([*ends[:2], 3], n=3, metrics=lambda *_: 1 / 0)  # before anything is evaluated
    with pytest.raises(ValueError, match=r"ends\[1\] is of another model: it has no '1.weight'"):
        learn.cycle_paths([ends[0], {}], n=3)


# sweep


def good(learn, sparsity, seed):
    quietly(learn, learn.fit, 1, 0.1), learn.prune(sparsity, scope='global')


def same(a, b):
    return a.drop(columns='seconds').equals(b.drop(columns='seconds'))


def of_a_notebook():
    "Functions that go to other processes by value, and know nothing of this module there"

    def make_one(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        return Learner(digits_dls(bs=256), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

    def global_one_shot(learn, sparsity, seed):
        learn.fit(1, 0.1), learn.prune(sparsity, scope='global')

    def one_cycle(learn, sparsity, seed):
        paper_methods(4, 0.1, ['ocp'])['ocp'](learn, sparsity, seed)

    def counted(learn):
        return dict(speedup=float(learn.flops().speedup['total']))  # that method is of a module of its own

    return make_one, {'good': global_one_shot, 'ocp': one_cycle}, counted


def test_workers_give_the_same_table(tmp_path):
    made, methods, counted = of_a_notebook()
    all_of = partial(sweep, made, methods, (0.9,), seeds=(0, 1), measure=counted)
    want = all_of(bar=False)
    assert len(want) == 4 and np.allclose(want.reached, want.sparsity, atol=1e-3) and want.accuracy.between(0, 1).all()
    assert same(all_of(folder=tmp_path, n_workers=2), want) and want.speedup.min() > 1.5
    files = sorted(tmp_path.glob('*.json'))
    assert len(files) == 4
    files[0].unlink()
    times = {f: f.stat().st_mtime_ns for f in files[1:]}
    assert same(all_of(folder=tmp_path, bar=False), want)
    assert times == {f: f.stat().st_mtime_ns for f in files[1:]} and files[0].exists()
    files[0].write_text('{')
    with pytest.raises(ValueError, match='is damaged'):
        all_of(folder=tmp_path)
    assert list(want.summary('accuracy').columns.get_level_values(0).unique()) == ['good', 'ocp']


@pytest.mark.slow  # Ray starts for as long as fifty other tests take
@pytest.mark.cpu_only  # Ray's processes are there
def test_ray_gives_the_same_table(monkeypatch):
    ray = pytest.importorskip('ray', reason="Ray is an extra: pip install 'fastprune[ray]'")
    from ray import cloudpickle

    monkeypatch.setattr(ray, 'init', partial(ray.init, num_cpus=1))  # one worker, since each has to import torch

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cloudpickle.register_pickle_by_value(sys.modules['helpers'])
    want = sweep(make, {'good': good}, (0.5, 0.9), seeds=(0,), bar=False)
    assert same(sweep(make, {'good': good}, (0.5, 0.9), seeds=(0,), ray='local'), want)


@pytest.mark.cpu_only  # the killed process was there
def test_a_killed_sweep_goes_on(tmp_path):
    code = '''
import os, sys
from test_analysis import good, make, sweep
def killing(learn, sparsity, seed):
    if seed == 2 and sys.argv[2] == 'kill': os._exit(9)
    good(learn, sparsity, seed)
sweep(make, {'good': killing}, (0.5,), seeds=(0, 1, 2), folder=sys.argv[1], bar=False).to_csv(sys.argv[1]+'/table.csv')
'''
    run = lambda how: python(code, tmp_path, how, paths=[Path(__file__).parent])
    assert run('kill').returncode == 9 and len(list(tmp_path.glob('good*.json'))) == 2
    again = run('go on')
    assert again.returncode == 0, again.stderr
    import pandas as pd

    want = sweep(make, {'good': good}, (0.5,), seeds=(0, 1, 2), bar=False)
    assert np.allclose(pd.read_csv(tmp_path / 'table.csv', index_col=0).accuracy, want.accuracy)


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', list(paper_methods(4, 0.1)))
def test_methods_of_the_papers_reach_their_sparsity(name):
    learn = make()
    with learn.no_bar(), learn.no_logging():
        paper_methods(4, 0.1)[name](learn, 0.8, 0)
    total = sum(m.numel() for m in learn.masks.values())
    assert abs(learn.masks.n_kept - 0.2 * total) <= 1


def test_bad_arguments_of_a_sweep():
    for args, kw, msg in (
        ((None, {'a': good}, [0.5]), {}, 'make=None'),
        ((make, {}, [0.5]), {}, 'methods'),
        ((make, {'a': good}, [50]), {}, 'did you mean 0.5'),
        ((make, {'a': good}, []), {}, r'sparsities=\[\]: needs a list with at least one value'),
        ((make, {'a': good}, [0.5]), dict(n_workers=-1), 'n_workers=-1'),
        ((make, {'a': good}, [0.5]), dict(n_workers=1, ray='local'), 'choose one'),
    ):
        with pytest.raises(ValueError, match=msg):
            sweep(*args, **kw)
    with pytest.raises(RuntimeError, match="method 'a' at sparsity 0.5 with seed 0 failed: ValueError: make"):
        sweep(lambda seed: 3, {'a': good}, [0.5], bar=False)
    with pytest.raises(ValueError, match='epochs=2'):
        paper_methods(2, 0.1)


def other(learn, sparsity, seed):
    learn.fit(2, 0.1)


def test_a_sweep_keeps_experiments_apart(tmp_path):
    table = sweep(make, {'m': good}, [0.5], [0], folder=tmp_path, bar=False)
    assert sweep(make, {'m': good}, [0.5], [0], folder=tmp_path, bar=False).equals(table)
    with pytest.raises(ValueError, match='method differs'):
        sweep(make, {'m': other}, [0.5], [0], folder=tmp_path)
    with pytest.raises(ValueError, match='make differs'):
        sweep(partial(make), {'m': good}, [0.5], [0], folder=tmp_path)
    assert (
        len(sweep(make, {'m': good}, [0.999, 0.9990001, np.float32(0.5)], np.arange(1), folder=tmp_path, bar=False))
        == 3
    )
    for p in tmp_path.iterdir():
        p.write_text('{}')
    with pytest.raises(ValueError, match='damaged'):
        sweep(make, {'m': good}, [0.5], [0], folder=tmp_path)
    (tmp_path / 'file').write_text('')
    for kw, msg in (
        (dict(methods={'a/b': good}), "'a/b'"),
        (dict(seeds=3), 'seeds=3'),
        (dict(seeds=['x']), "seeds="),
        (dict(sparsities=0.5), 'sparsities=0.5'),
        (dict(n_workers=None), 'n_workers=None'),
        (dict(n_threads=0), 'n_threads=0'),
        (dict(folder=tmp_path / 'file'), 'is a file'),
    ):
        with pytest.raises(ValueError, match=msg):
            sweep(**{**dict(make=make, methods={'m': good}, sparsities=[0.5]), **kw})
    for args, msg in (((None, 0.1), 'epochs=None'), ((4, 'x'), "lr='x'"), ((4, 0.1, ['best']), "'best'")):
        with pytest.raises(ValueError, match=msg):
            paper_methods(*args)
    assert list(paper_methods(4, 0.1, 'imp')) == ['imp']


def test_random_masks_differ_from_seed_to_seed():
    masks = []
    for seed in range(2):
        learn = make()
        quietly(learn, paper_methods(4, 0.1)['random_erk'], learn, 0.5, seed)
        masks.append(learn.masks)
    assert masks[0].jaccard(masks[1]) > 0.5


def test_sign_flips_of_tiny_weights_and_in_other_fits(fit):
    learn = make()
    learn.model.half()
    a = state_of(learn)
    for p in learn.model.parameters():
        p.data.fill_(1e-4)
    a = {n: torch.full_like(t, -1e-4) for n, t in a.items()}
    assert learn.sign_flips(a).loc['total', 'flips'] == 64 * 16 + 160
    learn, flips = make(), SignFlips(3)
    fit(learn, 3, lr=0.1, cbs=flips, start_epoch=1)
    assert flips.iters == [3, 6, 9, 12]


def test_sensitivity_of_channels_is_that_of_validate():
    "Norms average over the channels that are left, also over those that the Learner's own masks leave"

    def net():
        learn = make()
        norm = nn.GroupNorm(2, 16)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 10)
        learn.model = nn.Sequential(nn.Conv2d(1, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), *head)
        nn.init.uniform_(norm.bias)
        return learn

    learn = net()
    learn.prune(0.25, granularity='channel', include='3')
    table, name = learn.sensitivity((0.5,), granularity='channel', metric='loss'), '0.weight'
    with learn.no_bar(), learn.no_logging():
        assert table.loc[name, 0.0] == pytest.approx(learn.validate()[0], rel=1e-5)
        learn.prune(0.5, granularity='channel', include='0')
        assert table.loc[name, 0.5] == pytest.approx(learn.validate()[0], rel=1e-5)


def test_a_seed_without_a_number_is_not_left_out():
    values = dict(a=(1.0, 3.0), b=(1.0, math.nan))
    rows = [
        dict(method=m, sparsity=0.5, seed=s, reached=0.5, mse=v, seconds=1.0)
        for m, vs in values.items()
        for s, v in enumerate(vs)
    ]
    table = Sweep(rows)
    found = table.summary('mse')
    assert found['a', 'mean'].tolist() == [2.0] and found['b', 'mean'].isna().all() and found['b', 'std'].isna().all()
    assert len(table.plot('mse').containers) == 2


def test_a_plane_with_a_loss_that_is_not_a_number_is_drawn():
    losses = np.array([[1.0, 2.0], [np.nan, np.inf]])
    drawn = Plane(np.arange(2.0), np.arange(2.0), losses, np.zeros((3, 2)))
    assert 'losses 1 to 2' in repr(drawn) and drawn.plot().collections
    assert Plane(np.arange(2.0), np.arange(2.0), np.full((2, 2), np.nan), np.zeros((3, 2))).plot()


def test_sensitivity_stays_inside_of_masks():
    learn = make()
    learn.prune(0.8)
    table = learn.sensitivity((0.8,), criterion=random_score)
    assert (table[0.8] == table[0.0]).all() and learn.masks.sparsity == pytest.approx(0.8, abs=1e-3)


def test_hessian_of_attention_and_of_a_linear_loss():
    torch.manual_seed(0)
    learn = make()
    learn.model = nn.Sequential(
        nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(64, 10)
    )
    assert learn.hessian_spectrum(1)[0] > 0
    learn.prune(0.5, criterion=grasp)
    assert learn.masks.sparsity == pytest.approx(0.5, abs=1e-2)
    linear = make()
    linear.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    linear.loss_func = lambda out, y: out.mean()
    assert linear.hessian_spectrum(2).tolist() == [0, 0]
    for p in linear.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match='no trainable parameter'):
        linear.hessian_spectrum(1)


def test_flops_by_hand(learner):
    learn = learner(digits_convnet(widths=(4, 8)))
    learn.prune(0.5, exclude='0.*')
    df = learn.flops()
    assert df.dense.to_dict() == {
        '0.0.weight': 2 * 64 * 9 * 4,
        '1.0.weight': 2 * 16 * 9 * 4 * 8,
        '4.weight': 2 * 80,
        'other': 0,
        'total': 4608 + 9216 + 160,
    }
    assert df.nonzero.to_dict() == {'0.0.weight': 4608, '1.0.weight': 4608, '4.weight': 80, 'other': 0, 'total': 9296}
    assert df.speedup['total'] == pytest.approx(13984 / 9296) and learn.masks.sparsity == 0.5
    assert learn.flops(include='4*').nonzero['total'] == 13984 - 80


@pytest.mark.parametrize(
    'model,weights',
    [
        (nn.LSTM(8, 4, batch_first=True), 2 * 8 * 16 * (8 + 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2 * 8 * (24 * 8 + 64 + 128 + 128)),
    ],
    ids=['LSTM', 'attention'],
)
def test_flops_of_recurrent_and_attention_weights(learner, model, weights, device):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model, nn.LazyLinear(10)

        def forward(self, x):
            out = self.body(x.flatten(1, 2))
            return self.head((out[0] if isinstance(out, tuple) else out).flatten(1))

    learn = learner(Net().to(device))
    with torch.no_grad():
        learn.model(torch.ones(1, 1, 8, 8))
    df = learn.flops()
    assert df.dense[[n for n in df.index if n.startswith('body')]].sum() == weights
    learn.prune(0.5)
    assert learn.flops().nonzero[[n for n in df.index if n.startswith('body')]].sum() == weights / 2


def test_a_sweep_measures_what_is_asked(tmp_path):
    table = sweep(
        make,
        {'m': good},
        [0.5],
        [0],
        folder=tmp_path,
        bar=False,
        measure=lambda learn: dict(speedup=float(learn.flops().speedup['total'])),
    )
    assert table.speedup[0] == pytest.approx(2, rel=1e-2)
