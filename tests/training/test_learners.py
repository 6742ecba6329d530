"Trained, pruned, trained on, exported: the Learners that fastai users have"

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import accuracy, load_learner, set_seed
from torch import nn

from fastprune.all import SparsifyCallback, prunable_weights


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def tabular(path):
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner

    rng = np.random.default_rng(0)
    df = pd.DataFrame({'kind': rng.choice(list('abcd'), 400), 'x': rng.normal(size=400), 'z': rng.normal(size=400)})
    df['y'] = np.where(df.x + (df.kind == 'a') > 0.3, 'yes', 'no')
    dls = TabularDataLoaders.from_df(
        df,
        path,
        procs=[Categorify, FillMissing, Normalize],
        cat_names=['kind'],
        cont_names=['x', 'z'],
        y_names='y',
        bs=32,
    )
    return tabular_learner(dls, layers=[40, 20], metrics=accuracy)


def vision(path):
    from fastai.vision.all import ImageDataLoaders, resnet18, vision_learner
    from PIL import Image

    for k, c in enumerate(('dark', 'light')):
        (path / 'img' / c).mkdir(parents=True)
        for i in range(12):
            Image.fromarray((np.random.rand(32, 32, 3) * 120 + 120 * k).astype('uint8')).save(
                path / 'img' / c / f'{i}.png'
            )
    dls = ImageDataLoaders.from_folder(path / 'img', valid_pct=0.25, seed=0, bs=6, num_workers=0)
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=path)


kinds = dict(convnet=lambda path: None, mlp=lambda path: None, tabular=tabular, vision=vision)


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', kinds)
def test_whole_life(learner, fit, kind, tmp_path):
    set_seed(0, reproducible=True)
    learn = kinds[kind](tmp_path) or learner(mlp() if kind == 'mlp' else None)
    learn.path = tmp_path
    keys, cls = list(learn.model.state_dict()), type(learn.model)
    fit(learn, 1)
    fit(learn, 2, how='fit_one_cycle', cbs=SparsifyCallback(0.9, interval=2))
    assert set(learn.masks) == set(prunable_weights(learn.model))

    def exact(l):
        return all(
            int((p == 0).sum()) == int((~l.masks[n]).sum()) == round(0.9 * p.numel())
            for n, p in prunable_weights(l.model).items()
        )

    assert exact(learn)
    fit(learn, 1)
    assert exact(learn) and list(learn.model.state_dict()) == keys and type(learn.model) is cls
    preds = learn.get_preds()[0]
    learn.export('export.pkl')
    with pytest.warns(UserWarning, match='insecure pickle'):
        loaded = load_learner(tmp_path / 'export.pkl')
    loaded.dls = learn.dls
    assert exact(loaded) and torch.allclose(loaded.get_preds()[0], preds, atol=1e-5)
    fit(loaded, 1)
    assert exact(loaded)


def test_fine_tune_of_a_frozen_vision_learner(fit, tmp_path):
    learn = vision(tmp_path)
    learn.freeze()
    fit(learn, 2, 1e-3, how='fine_tune', cbs=SparsifyCallback(0.8, scope='global'))
    n = sum(m.numel() for m in learn.masks.values())
    assert learn.masks.n_kept == n - round(0.8 * n)
    assert learn.sparsity_report().loc['total', 'nonzero'] == learn.masks.n_kept
