"What several test files use"

import json
import random
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy
from torch import nn

from fastprune.all import (
    DNW,
    DPF,
    DST,
    GMP,
    GSM,
    LC,
    SET,
    SNFS,
    STR,
    Checkpoint,
    GradualL2,
    Masks,
    RigL,
    SparseMethod,
    SparsifyCallback,
    cubic,
    cyclical,
    digits_dls,
    one_shot,
    prunable_weights,
    taylor,
)
from fastprune.training.optimizer_state import opt_state
from fastprune.training.state import pack

SGDM = partial(SGD, mom=0.9)


class OwnStep(SparseMethod):
    "A method that replaces the optimizer's step, by the same step"

    def before_step(self, weights):
        self.engine.optimizer.inner.step()
        return False


METHODS = {
    'OCP': SparsifyCallback,
    'PGD': partial(SparsifyCallback, schedule=one_shot, interval=1, refresh=True, scope='global'),
    'cyclical': partial(SparsifyCallback, schedule=cyclical(cubic, 2), track=True),
    'taylor': partial(SparsifyCallback, criterion=taylor, scope='global', recover=False),
    'alive': partial(SparsifyCallback, schedule=cyclical(cubic, 2), criterion=taylor, scope='global', recover='alive'),
    'GMP': partial(GMP, interval=5),
    'DPF': DPF,
    'DPF local': partial(DPF, scope='local', criterion=taylor),
    'DNW': DNW,
    'GSM': GSM,
    'LC': LC,
    'LC local': partial(LC, scope='local', growth=1.1),
    'GradualL2': GradualL2,
    'STR': partial(STR, s_init=-7),
    'DST': partial(DST, alpha=1e-3),
    'RigL': partial(RigL, interval=5),
    'SNFS': SNFS,
    'SET': SET,
    'SET global': partial(SET, interval=5, scope='global'),
    'own step': OwnStep,
}
OPTIONS = {
    'PGD',
    'cyclical',
    'taylor',
    'alive',
    'DPF local',
    'LC local',
    'SET global',
}  # of a method that is there, too
each_class = pytest.mark.parametrize(
    'method', [pytest.param(m, marks=[pytest.mark.slow] * (n in OPTIONS), id=n) for n, m in METHODS.items()]
)


def randomise(model, seed=0):
    "Random biases, norms, running statistics, tokens, scales and heads, in evaluation mode"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, t in [*model.named_parameters(), *model.named_buffers()]:
            tables = ('token', 'pos_emb', 'scale', 'gamma')
            if not t.is_floating_point() or not (t.ndim <= 1 or not t.any() or any(o in n for o in tables)):
                continue
            r = torch.randn(t.shape, generator=gen)
            t.copy_(0.5 + r**2 if n.endswith('running_var') else 0.3 * r + n.endswith('weight'))
    return model.eval()


def equal(a, b):
    "Do two tensors have the same values, wherever they are?"
    return torch.equal(a.cpu(), b.cpu())


def quietly(learn, f, *args, **kwargs):
    "`f(*args, **kwargs)` without table or bar"
    with learn.no_bar(), learn.no_logging():
        return f(*args, **kwargs)


def mlp_learner(**kwargs):
    "A small network on digits, with training, validation and test data"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return Learner(
        digits_dls(bs=256, valid_pct=0.4, test_pct=0.2),
        model,
        loss_func=CrossEntropyLossFlat(),
        metrics=accuracy,
        **kwargs,
    )


def zeros_and_masks_agree(learn):
    return Masks.from_zeros({n: p for n, p in prunable_weights(learn.model).items() if n in learn.masks}) == learn.masks


class Check(Callback):
    "After each step pruned weights are exactly 0.0, and the state_dict has the keys it had"

    order, steps = 90, 0

    def before_fit(self):
        self.keys = list(self.learn.model.state_dict())

    def after_step(self):
        self.steps += 1
        ps = dict(self.learn.model.named_parameters())
        for n, m in (self.learn.masks or {}).items():
            assert (ps[n][~m] == 0).all(), n
        assert list(self.learn.model.state_dict()) == self.keys


def text_learner(tmp_path):
    "A text classifier on 60 sentences of made-up reviews"
    from fastai.text.all import AWD_LSTM, TextDataLoaders, text_classifier_learner

    rng = np.random.default_rng(0)
    words = {'good': 'fine great lovely sweet'.split(), 'bad': 'poor dull awful bitter'.split()}
    rows = [(' '.join(rng.choice(words[k] + ['film', 'the', 'was'], 12)), k) for k in rng.choice(list(words), 60)]
    dls = TextDataLoaders.from_df(
        pd.DataFrame(rows, columns=['text', 'label']),
        path=tmp_path,
        text_col='text',
        label_col='label',
        bs=16,
        valid_pct=0.2,
        seq_len=12,
        num_workers=0,
    )
    config = dict(
        emb_sz=16,
        n_hid=24,
        n_layers=2,
        pad_token=1,
        bidir=False,
        output_p=0.1,
        hidden_p=0.1,
        input_p=0.1,
        embed_p=0.02,
        weight_p=0.1,
    )
    assert len(dls.vocab[0]) > 10
    return text_classifier_learner(
        dls, AWD_LSTM, pretrained=False, config=config, lin_ftrs=[10], metrics=accuracy, path=tmp_path, drop_mult=0.5
    )


class Tagger(nn.Module):
    "An LSTM with its decoder tied to the embedding"

    def __init__(self, n=24, d=16):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(n, d), nn.LSTM(d, d, batch_first=True), nn.Linear(d, n)
        self.out.weight = self.emb.weight

    def forward(self, tokens):
        return self.out(self.rnn(self.emb(tokens))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, d=64, hidden=128):
        super().__init__()
        self.stem, self.layers, self.head = (
            nn.Linear(8, d),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, hidden, batch_first=True), 2),
            nn.Linear(d, 32),
        )
        for p in self.layers.parameters():
            nn.init.normal_(p, std=0.1)  # layers start as copies, which the exporter writes once

    def forward(self, x, hide=None):
        return self.head(self.layers(self.stem(x), src_key_padding_mask=hide).mean(1))


class Crash(Callback):
    def __init__(self, epoch, i, order=0):
        self.at, self.order = (epoch, i), order

    def after_step(self):
        if (self.epoch, self.iter) == self.at:
            raise RuntimeError('power is out')


def same(a, b):
    "Two Learners are equal to the bit: weights, buffers, masks, optimizer"
    for (n, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), n
    assert a.masks == b.masks
    x, y = ({}, {})
    assert json.dumps(pack(opt_state(a), x)) == json.dumps(pack(opt_state(b), y))
    assert all(torch.equal(x[k], y[k]) for k in x)
    return True


FEW = dict(bs=32, data=dict(valid_pct=0.05, test_pct=0.81))  # for `learner`: 8 steps an epoch, of 32 images


def stopped(make, fit, epoch=2, i=7, every=1):
    "Fits that are not stopped, and stopped and started again in a new Learner"
    whole = make()
    fit(whole)
    with pytest.raises(RuntimeError, match='power'):
        fit(make(), Checkpoint('run', every=every), Crash(epoch, i))
    again = make()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)  # another process has others
    fit(again, Checkpoint('run', every=every))
    return whole, again


class Conv1D(nn.Module):
    "As in GPT-2"

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)
