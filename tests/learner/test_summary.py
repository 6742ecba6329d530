"`learn.summary()` is fastai's, and counts zeros"

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat
from fastai.tabular.model import TabularModel
from torch import nn

import fastprune.all  # noqa: F401
from fastprune.zoo.learners import digits_learner

fastais = Learner._orig_summary


class Recurrent(nn.Module):
    "A text classifier in the manner of fastai: a module with a list of states"

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(20, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


def learner_of(model, loss, *columns):
    data = list(zip(*columns, strict=True))
    dls = DataLoaders.from_dsets(data, data, bs=4, device='cpu')
    return Learner(dls, model, loss_func=loss)


def text():
    return learner_of(Recurrent(), CrossEntropyLossFlat(), torch.randint(20, (8, 7)), torch.randint(3, (8,)))


def tabular():
    model = TabularModel([(5, 3)], 2, 1, [10])
    return learner_of(model, MSELossFlat(), torch.randint(5, (8, 1)), torch.randn(8, 2), torch.randn(8, 1))


KINDS = [digits_learner, text, tabular]


def added(learn):
    "The lines that fastai's text has not; all others are the same, in the same order"
    theirs, ours = fastais(learn).splitlines(), learn.summary().splitlines()
    at = next(i for i, line in enumerate(theirs) if line.startswith('Total non-trainable params')) + 1
    more = ours[at : at + len(ours) - len(theirs)]
    assert ours[:at] + ours[at + len(more) :] == theirs
    return more


@pytest.mark.parametrize('make', KINDS)
def test_a_dense_model_has_fastais_text(make):
    learn = make()
    assert learn.summary() == fastais(learn) and type(learn.summary()) is type(fastais(learn))


@pytest.mark.parametrize('make', KINDS)
def test_zeros_are_counted(make):
    learn = make()
    learn.prune(0.75)
    masks = learn.masks
    nonzero = sum(int((p != 0).sum()) for p in learn.model.parameters())
    total = sum(m.numel() for m in masks.values())
    sparsity = f'Sparsity: {100 * masks.sparsity:.4g}%, {total - masks.n_kept:,} of {total:,} prunable weights'
    assert added(learn) == [f'Total nonzero params: {nonzero:,}', f'{sparsity} (by learn.masks)']
    learn.remove_masks()
    assert added(learn)[1] == f'{sparsity} (zeros without masks)'


def test_channels_and_a_shrunk_model():
    learn = digits_learner()
    learn.prune(0.5, granularity='channel')
    assert added(learn)[1].endswith(' channels left)')
    small = learn.shrink()
    learn = small if isinstance(small, Learner) else learn
    assert not added(learn)


def test_frozen_learners_and_partial_masks():
    learn = digits_learner()
    learn.prune({'0.0': 0.5}, include='0.0')
    assert learn.masks and len(added(learn)) == 2
    learn.create_opt()
    learn.freeze_to(0)
    assert 'Model unfrozen' in learn.summary() and len(added(learn)) == 2
