"Every kind of Learner that fastai users have: exact, kept by a later fit, `state_dict` untouched, exported and loaded"

from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Adam, Callback, OptimWrapper, load_learner, params, set_seed
from fastai.callback.all import (
    ChannelsLast,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    MixUp,
    SaveModelCallback,
)
from helpers import text_learner
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from fastprune.all import Masks, SparsifyCallback, linear, prunable_weights, window


class Net(nn.Module):
    "Images of digits as 8 rows of 8 pixels, through `body` to `width` numbers, to 10 classes"

    def __init__(self, body, width, out=None):
        super().__init__()
        self.body, self.head = body, out or nn.Linear(width, 10)

    def forward(self, x):
        y = self.body(x.squeeze(1).to(next(self.parameters()).dtype))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1)).float()


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.att = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, x):
        return self.att(x, x[:, :4], x[:, :4])


class Tied(nn.Module):
    "Two layers that share their weight, one after the other"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


class Deep(nn.Module):
    "As many layers as are asked for"

    def __init__(self, n):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(n)])

    def forward(self, x):
        for l in self.layers:
            x = x + 0.03 * l(x).tanh()
        return x


class Convs1and3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.three, self.up = (
            nn.Conv1d(8, 8, 3, padding=1, groups=2),
            nn.Conv3d(1, 4, 3, padding=1),
            nn.ConvTranspose2d(4, 6, 2, groups=2),
        )

    def forward(self, x):
        y = self.three(self.one(x)[:, None, None]).relu().squeeze(2)  # [bs,4,8,8]
        return self.up(y).flatten(2).transpose(1, 2)  # [bs,81,6]


def encoder():
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )


def vit():
    timm = pytest.importorskip('timm', reason='the ViT is timm\'s')
    return timm.create_model(
        'vit_tiny_patch16_224', img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=10
    )


digits = {
    'TransformerEncoder': lambda: Net(encoder(), 8),
    'MultiheadAttention': lambda: Net(Attention(), 8),
    'MultiheadAttention, separate projections': lambda: Net(Attention(kdim=8, vdim=8), 8),
    'LSTM, two layers, both directions': lambda: Net(
        nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), 12
    ),
    'GRU with projections': lambda: Net(nn.LSTM(8, 6, proj_size=4, batch_first=True), 4),
    'tied weights': lambda: Net(Tied(), 8),
    'weight_norm': lambda: Net(parametrizations.weight_norm(nn.Linear(8, 16)), 16),
    'weight_norm, old': lambda: Net(weight_norm(nn.Linear(8, 16)), 16),
    'spectral_norm': lambda: Net(parametrizations.spectral_norm(nn.Linear(8, 16)), 16),
    'convolutions 1d, 3d, grouped, transposed': lambda: Net(Convs1and3d(), 6),
    '200 layers': lambda: Net(Deep(200), 8),
    '1000 layers': lambda: Net(Deep(1000), 8),
    'float64': lambda: Net(encoder(), 8).double(),
    'bfloat16': lambda: Net(nn.Linear(8, 32), 32).bfloat16(),
    'torch.compile': lambda: torch.compile(Net(nn.Linear(8, 32), 32), backend='eager'),
    'timm ViT': vit,
}


def is_exact(learn, s):
    return all(
        int((p == 0).sum()) == int((~learn.masks[n]).sum()) == round(s * p.numel())
        for n, p in prunable_weights(learn.model).items()
    )


def whole_life(learn, fit, s=0.8, how='fit', cbs=(), export=True):
    keys, names = list(learn.model.state_dict()), set(prunable_weights(learn.model))
    fit(learn, 2, how=how, cbs=[SparsifyCallback(s, interval=2), *cbs])
    assert names and set(learn.masks) == names == set(prunable_weights(learn.model)) and is_exact(learn, s)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    fit(learn, 1, 1e-3, cbs=cbs)
    assert is_exact(learn, s) and list(learn.model.state_dict()) == keys
    if not export:
        return
    learn.export('export.pkl')
    with pytest.warns(UserWarning, match='insecure pickle'):
        loaded = load_learner(learn.path / 'export.pkl')
    loaded.dls = learn.dls
    fit(loaded, 1, 1e-3)
    assert is_exact(loaded, s) and loaded.masks == learn.masks


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', [pytest.param(k, marks=[pytest.mark.slow] * (k == '1000 layers')) for k in digits])
def test_digits(learner, fit, kind):
    set_seed(0)
    if 'weight_norm, old' == kind:
        with pytest.warns(FutureWarning):
            model = digits[kind]()
    else:
        model = digits[kind]()
    data = dict(valid_pct=0.1, test_pct=0.8 if 'layers' in kind else 0.5)
    # fastai can't export these: parametrised modules and compiled ones don't pickle
    whole_life(
        learner(model, bs=128, data=data), fit, export=kind not in ('weight_norm', 'spectral_norm', 'torch.compile')
    )


def test_all_weights_of_a_transformer_and_a_vit_are_found():
    assert len(prunable_weights(encoder())) == 2 * 4
    vit_names = set(prunable_weights(vit()))
    assert (
        'pos_embed' not in vit_names
        and 'cls_token' not in vit_names
        and 'patch_embed.proj.weight' in vit_names
        and len(vit_names) == 2 + 2 * 4
    )


@pytest.mark.parametrize('kind', ['weight_norm', 'weight_norm, old'])
def test_no_row_of_a_weight_norm_is_emptied(learner, fit, kind):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        learn = learner(digits[kind]())
    fit(learn, 2, cbs=SparsifyCallback(0.87, interval=1))
    rows = [m for n, m in learn.masks.items() if n.startswith('body')]
    assert len(rows) == 1 and rows[0].any(1).all() and int((~rows[0]).sum()) == round(0.87 * 128)
    assert np.isfinite(learn.recorder.values[-1][0])


class Average(Callback):
    "An exponential moving average of the weights, as torch's own"

    order, run_valid = 75, False

    def before_fit(self):
        self.avg = torch.optim.swa_utils.AveragedModel(
            self.learn.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

    def after_step(self):
        self.avg.update_parameters(self.learn.model)


callbacks = {
    'gradient accumulation': lambda: [GradientAccumulation(150)],
    'gradient clipping': lambda: [GradientClip(0.1)],
    'MixUp': lambda: [MixUp(0.4)],
    'channels_last': lambda: [ChannelsLast()],
    'early stopping': lambda: [EarlyStoppingCallback(patience=5)],
    'SaveModelCallback, at_end': lambda: [SaveModelCallback(at_end=True)],
    'average of weights': lambda: [Average()],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', callbacks)
def test_beside_other_callbacks(learner, fit, kind):
    learn, cbs = learner(), callbacks[kind]()
    whole_life(learn, fit, cbs=cbs)
    if kind == 'average of weights':
        avg = dict(cbs[0].avg.module.named_parameters())
        assert Masks.from_zeros({n: avg[n] for n in learn.masks}) == learn.masks
    if kind == 'SaveModelCallback, at_end':
        assert torch.load(learn.path / 'models' / 'model.pth').keys() == learn.model.state_dict().keys()


@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.SGD)], ids=['fastai', 'torch'])
def test_discriminative_rates(learner, fit, opt):
    learn = learner(splitter=lambda m: [params(m[0]), params(m[1:3]), params(m[3:])], opt_func=opt)
    whole_life(learn, lambda l, n, lr=None, **kw: fit(l, n, slice(1e-3, 1e-2), **kw), how='fit_one_cycle')


def test_early_stopping_leaves_zeros_and_masks_in_agreement(learner, fit):
    cbs = [SparsifyCallback(0.9, schedule=window(linear, 0, 0.5)), EarlyStoppingCallback(patience=1, min_delta=10.0)]
    learn = fit(learner(), 6, 1e-9, cbs=cbs)
    assert len(learn.recorder.values) == 4 and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert Masks.from_zeros(prunable_weights(learn.model)) == learn.masks


@pytest.mark.slow
def test_unet(fit, tmp_path):
    "A smaller one is in the cookbook's page about segmentation"
    from fastai.vision.all import SegmentationDataLoaders, resnet18, unet_learner
    from PIL import Image

    for d in ('img', 'seg'):
        (tmp_path / d).mkdir()
    for i in range(6):
        x = np.zeros((32, 32, 3), 'uint8')
        x[:, 4 * i :] = 200
        Image.fromarray(x).save(tmp_path / 'img' / f'{i}.png')
        Image.fromarray((x[..., 0] > 0).astype('uint8')).save(tmp_path / 'seg' / f'{i}.png')
    files = sorted((tmp_path / 'img').iterdir())
    dls = SegmentationDataLoaders.from_label_func(
        tmp_path,
        files,
        lambda f: tmp_path / 'seg' / f.name,
        codes=['dark', 'light'],
        bs=2,
        valid_pct=0.34,
        num_workers=0,
    )
    whole_life(unet_learner(dls, resnet18, pretrained=False, path=tmp_path, self_attention=False), fit)


def test_text_classifier(fit, tmp_path):
    learn = text_learner(tmp_path)
    names = set(prunable_weights(learn.model))
    assert any('weight_hh_l0_raw' in n for n in names) and not any('encoder.weight' in n for n in names)
    whole_life(learn, fit)
