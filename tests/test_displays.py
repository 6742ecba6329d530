"How objects look in a notebook and in a terminal"

import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Learner
from torch import nn

from fastprune.all import (
    DNW,
    GMP,
    LC,
    STR,
    Checkpoint,
    Distill,
    LinearPath,
    Masks,
    RigL,
    ShrinkCallback,
    SparseMethod,
    Sparsifier,
    SparsifyCallback,
    Ticket,
    Tickets,
    iterative,
    one_shot,
    random_score,
)
from fastprune.core.displays import changed_arguments, short_text, svg_lines
from fastprune.zoo.learners import digits_learner, quiet_fit


@pytest.mark.parametrize(
    'method, text',
    [
        (SparsifyCallback(0.9), 'SparsifyCallback(sparsity=0.9)'),
        (SparsifyCallback(0.9, one_shot, interval=3), 'SparsifyCallback(sparsity=0.9, schedule=one_shot, interval=3)'),
        (SparsifyCallback({nn.Linear: 0.5, '*': 0.25}), "SparsifyCallback(sparsity={Linear: 0.5, '*': 0.25})"),
        (
            SparsifyCallback(0.9, partial(iterative, n_steps=3)),
            'SparsifyCallback(sparsity=0.9, schedule=iterative(n_steps=3))',
        ),
        (GMP(0.9, scope='local'), "GMP(sparsity=0.9, scope='local')"),
        (DNW(0.9, track=True), 'DNW(sparsity=0.9, track=True)'),
        (STR(), 'STR()'),
        (LC(0.5, growth=1.1, criterion=random_score), 'LC(sparsity=0.5, growth=1.1, criterion=random_score)'),
        (RigL(0.9, interval=7), 'RigL(sparsity=0.9, interval=7)'),
        (Checkpoint('run', every=2), "Checkpoint(file='run', every=2)"),
        (ShrinkCallback(), 'ShrinkCallback()'),
        (Distill(nn.Linear(2, 2)), 'Distill(teacher=Linear, weight=0.5)'),
    ],
    ids=lambda o: o if isinstance(o, str) else '',
)
def test_a_callback_is_the_call_that_makes_it(method, text):
    assert repr(method) == text


def test_arguments_that_were_changed_later():
    cb = SparsifyCallback(0.9)
    cb.sparsity = 0.8
    assert repr(cb) == repr(pickle.loads(pickle.dumps(cb))) == 'SparsifyCallback(sparsity=0.8)'
    assert repr(SparsifyCallback.__new__(SparsifyCallback)) == 'SparsifyCallback()'  # as in an error of the constructor


def test_arguments_of_a_method_with_kwargs():
    class Mine(SparseMethod):
        def __init__(self, sparsity, strength=1, **kwargs):
            super().__init__(sparsity, **kwargs)
            self.strength = strength

    assert repr(Mine(0.9, strength=2, scope='global')) == "Mine(sparsity=0.9, strength=2, scope='global')"


def test_a_fit_shows_what_it_reached():
    learn, cb = digits_learner(), SparsifyCallback(0.5, scope='global')
    quiet_fit(learn, 1, cbs=cb)
    assert repr(cb) == "SparsifyCallback(sparsity=0.5, scope='global'), 50% reached"
    html = cb._repr_html_()
    assert (
        '<td style="text-align:left;padding:0 0.7em 0 0">&#x27;global&#x27;</td>' in html and 'sparsity reached' in html
    )
    pruner = Sparsifier(nn.Linear(2, 2), RigL(0.5), 10)
    assert repr(pruner) == 'Sparsifier(RigL(sparsity=0.5), 0 of 10 steps)'


def test_masks_of_many_layers_are_cut_in_the_middle():
    masks = Masks({f'l<{i}>': torch.arange(4).view(2, 2) < i % 5 for i in range(1000)})
    lines = repr(masks).splitlines()
    assert lines[0].startswith('Masks: 2,000 of 4,000 weights kept, 50% pruned') and len(lines) == 32
    assert lines[16] == '  ... 970 more ...' and lines[-1] == '  l<999> 2x2: 4 of 4 weights kept, 0% pruned'
    html = masks._repr_html_()
    assert 'l&lt;999&gt;' in html and '<9' not in html and '970 more' in html and len(html) < 20_000
    assert '0 of 0 weights kept' in Masks()._repr_html_()


def test_tickets_and_paths():
    ticket = Ticket({'w': torch.zeros(4)}, {'w': torch.arange(4) < 1}, {'accuracy': 1 / 3}, round=2, rewind='<lr>')
    assert repr(ticket) == "Ticket(sparsity=0.75, round=2, rewind='<lr>', accuracy=0.333333)"
    html = ticket._repr_html_()
    assert '1 of 4' in html and '&lt;lr&gt;' in html and '75%' in html
    assert '<table' in Tickets([ticket])._repr_html_()
    x = np.linspace(0, 1, 1001)
    path = LinearPath(x, 1 + x, {'accuracy': x}, train=LinearPath(x, x * np.nan, {'accuracy': x}))
    html = path._repr_html_()
    assert html.count('<svg') == 2 and 'training' in html and 'nan' not in html.split('<svg', 1)[1]
    assert len(html) < 8000 and LinearPath(x, x, {})._repr_html_().count('<svg') == 1


@pytest.mark.parametrize('y', [[], [math.nan], [1.0], [math.inf, -math.inf], [2.0, 2.0, 2.0]])
def test_curves_of_any_numbers(y):
    picture = svg_lines(np.arange(len(y)), {'a': np.array(y)}, '<title>')
    assert '&lt;title&gt;' in picture and not {'nan', 'inf'} & set(picture.replace('"', ' ').replace(',', ' ').split())


def test_texts_of_values():
    assert short_text(np.arange(1000)).count('\n') == 0 and len(short_text(list(range(1000)))) == 60
    learn = Learner.__new__(Learner)
    assert short_text(nn.Sequential(nn.ReLU())) == 'Sequential' and short_text(Learner) == 'Learner'
    assert changed_arguments(learn) == {}
