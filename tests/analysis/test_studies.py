"Studies that call a function for every combination and seed; the linear model; spectra of cycles"

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner, accuracy, error_rate
from helpers import equal, quietly
from torch import nn

from fastprune.all import (
    Envelope,
    Masks,
    SwapTable,
    Ticket,
    digits_dls,
    envelope,
    fit_sparse_regression,
    paired_verdict,
    search_start,
    sparse_regression,
    state_of,
    swap_table,
)
from fastprune.analysis.sparse_regression import draw_regressions, found_in, prune_regressions
from fastprune.analysis.trials import spread_text
from fastprune.learner.states import seed_round

pytestmark = pytest.mark.usefixtures('deterministic')


def make(seed=0, metrics=accuracy):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return Learner(
        digits_dls(bs=256), model, loss_func=CrossEntropyLossFlat(), metrics=metrics, opt_func=partial(SGD, mom=0.9)
    )


def never(*args):
    raise AssertionError('nothing is trained before arguments are checked')


# verdicts


@pytest.mark.parametrize(
    'a, b, bar, text',
    [
        ([0.91, 0.92, 0.93], [0.9, 0.91, 0.92], 0.0, '+0.01 ± 0.00 (0.01 to 0.01): holds'),
        ([0.91, 0.92, 0.93], [0.9, 0.91, 0.92], 0.01, "+0.01 ± 0.00 (0.01 to 0.01): can't tell"),
        ([80.1, 81.2, 82.3], [81.1, 82.2, 83.3], -1, "-1.0 ± 0.0 (-1.0 to -1.0): can't tell"),
        ([80.0, 81.0], [80.0, 81.0], 0.0, "+0.0 ± 0.0 (0.0 to 0.0): can't tell"),
        ([1.96, 2.96], [1, 2], 1, "+0.96 ± 0.00 (0.96 to 0.96): doesn't"),
    ],
)
def test_equal_differences_are_not_told_apart_by_rounding(a, b, bar, text):
    assert repr(paired_verdict(a, b, bar)) == text


def test_seeds_that_do_not_match_are_named():
    runs = pd.DataFrame(dict(method=['a'] * 3 + ['b'] * 3, value=[1, 2, 3.0, 0.5, 1, 2]))
    with pytest.raises(ValueError, match='seeds in common: 0, of 0, 1, 2 and 3, 4, 5: an interval needs at least 2'):
        paired_verdict(*(runs[runs.method == m].value for m in 'ab'))
    with pytest.raises(ValueError, match="seeds in common: 0, of '0', '1' and 0, 1, 2, 3, 4, ...: an interval"):
        paired_verdict({'0': 90, '1': 91}, dict.fromkeys(range(6), 80.0))
    with pytest.raises(ValueError, match='seeds in common: 0, of none and none: an interval'):
        paired_verdict([], [])
    with pytest.raises(ValueError, match='a={.*}: needs a number for each seed: a list, or a dict'):
        paired_verdict({90.0, 91.0}, {80.0, 81.5})


def test_a_spread_of_rounding_is_none():
    assert spread_text(0.1, 1.7e-17) == '0.100 ± 0.000' and spread_text(90.0, 0.0) == '90.000 ± 0.000'
    assert spread_text(0.1, 0.01) == '0.100 ± 0.010'


# starts


def test_search_start_trains_each_start_with_each_seed():
    calls = []

    def fit(method, start, seed):
        calls.append((method, start, seed))
        return torch.tensor(0.5 - (start - 0.2) ** 2 + seed / 100)

    search = search_start('AGP', [0.4, 0, 0.2, 0.4], fit, (1, 2), bar=False)
    assert calls == [('AGP', start, seed) for start in (0.4, 0, 0.2) for seed in (1, 2)]
    assert search.best == 0.2 and search.df.index.tolist() == [0, 0.2, 0.4]
    assert search.df.loc[0.2].tolist() == pytest.approx([0.515, 0.01 / 2**0.5, 2])
    assert repr(search).startswith('AGP: best start 0.2 (0.5150 ± 0.0071)\n') and '<table' in search._repr_html_()
    assert search.plot().get_xlabel().startswith('start of pruning')
    plt.close('all')


def test_starts_and_seeds_may_be_arrays():
    runs = search_start('AGP', np.linspace(0, 0.4, 3), lambda m, start, seed: start, np.arange(2), bar=False).runs
    assert runs.start.tolist() == [0, 0, 0.2, 0.2, 0.4, 0.4] and runs.seed.tolist() == [0, 1] * 3
    assert len(search_start('AGP', torch.tensor([0.5, 0.5]), lambda m, start, seed: start, 0, bar=False).runs) == 1


def test_of_equal_starts_the_earliest_is_best():
    value = {0.0: 1.0, 0.2: 2.0, 0.4: 2.0}
    assert search_start(None, (0.4, 0.2, 0.0), lambda m, start, seed: value[start], bar=False).best == 0.2


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_a_start_that_diverges_once_is_not_the_best(bad):
    search = search_start(
        'AGP', (0, 0.2), lambda m, start, seed: bad if (start, seed) == (0, 1) else 1 - start, bar=False
    )
    assert search.best == 0.2 and np.isnan(search.df['mean'][0]) and search.df['count'].tolist() == [2, 3]
    assert len(search.runs) == 6
    search.plot()
    plt.close('all')


@pytest.mark.parametrize(
    'starts, fit, seeds, message',
    [
        ((), never, 0, r'starts=\(\): needs a list of positions in training'),
        ('0.2', never, 0, "starts='0.2': needs a list"),
        ((0.2, 40), never, 0, 'starts=40: needs positions in training'),
        ((-0.1,), never, 0, 'starts=-0.1: needs positions'),
        ((float('nan'),), never, 0, 'starts=nan: needs positions'),
        ((0,), lambda start, seed: 1, 0, r'needs a function \(method, start, seed\)'),
        ((0,), 3, 0, 'fit=3: needs a function'),
        ((0,), never, (0.5,), r'seeds=\(0.5,\): needs a whole number, or a list'),
        ((0,), never, True, 'seeds=True: needs a whole number'),
        ((0,), lambda m, start, seed: None, 0, 'fit returned None at start=0, seed=0'),
        ((0,), lambda m, start, seed: torch.ones(2), 0, 'at start=0, seed=0: needs one number'),
        ((0,), lambda m, start, seed: True, 0, 'fit returned True'),
    ],
)
def test_search_start_refuses(starts, fit, seeds, message):
    with pytest.raises(ValueError, match=message):
        search_start('AGP', starts, fit, seeds, bar=False)


def test_the_error_of_a_training_says_where_and_a_stop_is_a_stop():
    def fit(method, start, seed):
        raise KeyboardInterrupt if start else OSError('disk')

    with pytest.raises(RuntimeError, match='fit failed at start=0, seed=2: OSError: disk'):
        search_start('AGP', (0,), fit, 2, bar=False)
    with pytest.raises(KeyboardInterrupt):
        search_start('AGP', (0.1,), fit, 2, bar=False)


# the linear model


def one_by_one(problems, n_steps, step):
    "The same by a loop over problems, as in the paper"
    k, found = int(problems.useless.sum()), []

    def prune(w):
        w = w.clone()
        w[w.abs().argsort()[:k]] = 0
        return w

    for H, b, w in zip(problems.H, problems.b, problems.w, strict=True):
        size = 1 / torch.linalg.eigvalsh(H)[-1] if step is None else step
        w = prune(w)
        for _ in range(n_steps):
            w = prune(w - size * (H @ w - b))
        found.append(w)
    return torch.stack(found)


@pytest.mark.parametrize('step', [None, 0.3])
@pytest.mark.parametrize('d, sparsity, n', [(5, 0.2, 4), (7, 0.4, 12)])
@pytest.mark.parametrize('adversarial', [False, True])
def test_pruned_regressions_are_those_of_a_loop(d, sparsity, n, adversarial, step):
    problems = draw_regressions(n, adversarial, 20, d, sparsity, 2.0, seed=3)
    assert int(problems.useless.sum()) == round(d * sparsity) and not problems.a[:, problems.useless].any()
    assert torch.allclose(problems.b, torch.einsum('ndk,nek,ne->nd', problems.X, problems.X, problems.a), atol=1e-4)
    for n_steps in (0, 40):
        got = prune_regressions(problems, n_steps, step)
        assert torch.allclose(got, one_by_one(problems, n_steps, step), atol=1e-4)
        assert ((got == 0).sum(1) == round(d * sparsity)).all()


def test_the_study_is_the_papers():
    study = sparse_regression()
    t = study.df.T.to_dict()
    assert study.chi_square == pytest.approx(64.04, abs=0.5)
    assert t[4, 'adversarial']['one-shot'] == pytest.approx(0.026, abs=0.002)
    assert t[10, 'adversarial']['PGD'] == pytest.approx(0.628, abs=0.003)
    assert t[10, 'adversarial']['PGD, paper'] == 0.44
    nearer = sparse_regression(lam=3, step=0.3)
    assert 20 < nearer.chi_square < 28 and repr(nearer).startswith('lam=3, step=0.3: chi-square ')
    assert nearer.plot().get_ylim() == (0, 1)
    plt.close('all')


def test_the_study_is_the_same_each_time_and_on_any_default_device():
    args = dict(sizes=(3, 4), repeats=50, n_steps=5)
    first = sparse_regression(**args)
    torch.rand(3)
    with torch.device('meta'):
        assert sparse_regression(**args).df.equals(first.df)
    assert not sparse_regression(**args, seed=1).df.equals(first.df)
    assert first.df['PGD, paper'].isna().tolist() == [True, True, False, False]
    assert np.isfinite(first.chi_square) and 'over 4 numbers' in repr(first)
    assert np.isnan(sparse_regression((3,), repeats=10, n_steps=1).chi_square)


def test_a_step_that_is_too_large_is_told():
    "Weights that are not finite are no finding of none, and such a step is not the nearest to the paper"
    problems = draw_regressions(10, repeats=20)
    w = prune_regressions(problems, 2000, step=1e3)
    assert np.isnan(found_in(problems, w))
    w[0] = (~problems.useless).to(w)
    assert found_in(problems, w) == pytest.approx(1 / 20)  # where steps diverge in some problems, those find nothing
    study = sparse_regression(step=1e3, repeats=20)
    assert study.df.PGD.isna().all() and study.df['one-shot'].notna().all() and np.isnan(study.chi_square)
    assert "PGD's steps are too large" in repr(study)
    fitted = fit_sparse_regression((3,), (1e3, 0.3), repeats=20)
    assert fitted.best.step == 0.3 and fitted.df.isna().sum().sum() == 1
    fitted.plot()
    plt.close('all')
    with pytest.raises(ValueError, match=r'steps=\[1000.0\]: all are too large'):
        fit_sparse_regression((3,), (1e3,), repeats=20)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(lams=(3, 0)), 'lams=0: needs numbers above 0'),
        (dict(steps=(None, -1)), 'steps=-1: needs sizes above 0, or None for 1/L'),
        (dict(d=6), "d=6: the fit is to the paper's table, so leave it out"),
    ],
)
def test_fit_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        fit_sparse_regression(**wrong)
    with pytest.raises(TypeError, match='foo'):
        fit_sparse_regression((3,), (None,), foo=6)


def test_fit_of_the_two_free_numbers():
    fitted = fit_sparse_regression((0.3, 3), (None, 0.3), repeats=400, n_steps=50)
    assert fitted.df.shape == (2, 2) and fitted.df.columns.tolist() == ['1/L', '0.3']
    best = sparse_regression(lam=fitted.best.lam, step=fitted.best.step, repeats=400, n_steps=50)
    assert best.df.equals(fitted.best.df) and best.chi_square == fitted.df.min().min()
    assert 'best lam=3' in repr(fitted) and fitted.plot().get_xlabel() == 'step'
    plt.close('all')


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(sizes=()), r'sizes=\(\): needs a list of numbers of samples'),
        (dict(sizes=(0,)), 'sizes=0: needs a whole number of samples'),
        (dict(d=1), 'd=1: needs a whole number of at least 2'),
        (dict(sparsity=20), 'sparsity=20'),
        (dict(sparsity=0.95), 'makes 5 of d=5 weights useless: use a fraction from 0.2 to 0.8'),
        (dict(lam=-1), 'lam=-1: needs a number above 0'),
        (dict(step=float('inf')), 'step=inf: needs a size above 0, or None'),
        (dict(repeats=0), 'repeats=0'),
        (dict(n_steps=1.5), 'n_steps=1.5'),
    ],
)
def test_sparse_regression_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        sparse_regression(**wrong)


# masks and states


def retrain(masks, state, seed):
    learn = make(seed)
    learn.load_ticket(Ticket(state, masks))
    seed_round(learn, seed)
    quietly(learn, learn.fit, 1, 0.1)
    return quietly(learn, learn.validate)[1]


def two_masks(learn):
    masks = {}
    for name, half in (('first', slice(0, 8)), ('second', slice(8, 16))):
        masks[name] = Masks({'1.weight': torch.zeros(16, 64, dtype=torch.bool)})
        masks[name]['1.weight'][half] = True
    return masks


def test_swap_table_trains_all_pairs_from_copies():
    learn = make()
    masks, own = two_masks(learn), state_of(learn)
    table = swap_table(masks, {'own': learn, 'other': make(1).model}, retrain, (0, 1), bar=False)
    rows = table.set_index(['mask', 'state', 'seed']).value
    for (mask, state, seed), value in rows.items():
        start = own if state == 'own' else state_of(make(1))
        assert value == retrain(masks[mask], start, seed)
    assert len(rows) == 8 and equal(learn.model.state_dict()['1.weight'], own['1.weight'])
    assert table.summary().shape == (2, 4) and table.summary().index.tolist() == ['first', 'second']
    assert {t.get_text() for t in table.plot().get_yticklabels()} == {'first', 'second'}
    plt.close('all')


def test_swap_table_of_the_learners_own_state_does_not_drift():
    learn = make()
    seen = []

    def fit(masks, state, seed):
        seen.append(state['1.weight'].clone())
        learn.masks = masks
        quietly(learn, learn.fit, 1, 0.1)
        return 0.0

    swap_table(two_masks(learn), {'own': learn.model.state_dict()}, fit, (0, 1), bar=False)
    assert len(seen) == 4 and all(equal(t, seen[0]) for t in seen)


def test_swap_table_takes_the_start_of_tickets():
    learn = make()
    ticket = Ticket(state_of(learn), two_masks(learn)['first'])
    ticket.end = {n: t + 1 for n, t in ticket.state.items()}
    seen = {}

    def fit(masks, state, seed):
        seen.update(masks=masks, state=state)
        return 1.0

    table = swap_table({'t': ticket}, {'t': ticket}, fit, 0, bar=False)
    assert type(table) is SwapTable and equal(seen['state']['1.weight'], ticket.state['1.weight'])
    assert seen['masks'].jaccard(ticket.masks) == 0
    joined = pd.concat([table, swap_table({'u': ticket}, {'v': ticket}, fit, 0, bar=False)])
    assert joined.summary().xs('mean', axis=1, level=1).isna().sum().sum() == 2
    joined.plot()
    plt.close('all')


def test_swap_table_of_tickets_with_names_of_their_own():
    "A model may rename its parameters in a state"
    masks = two_masks(None)['first']
    state = {'first.weight': torch.ones(16, 64)}
    ticket = Ticket(state, masks, names={'1.weight': 'first.weight'})
    table = swap_table({'t': ticket, None: masks}, {'t': ticket}, lambda masks, state, seed: 1.0, 0, bar=False)
    assert table.value.tolist() == [1.0, 1.0] and table.summary()['t', 'mean'].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"masks\['t'\] and states\['x'\] .*the state has no 'first.weight'"):
        swap_table({'t': ticket}, {'x': {'1.weight': torch.ones(16, 64)}}, never, 0, bar=False)


@pytest.mark.parametrize(
    'masks, states, message',
    [
        ({}, {'a': make()}, 'masks: there are none'),
        ({'m': 3}, {'a': make()}, r"masks\['m'\]=int: needs a dict from name to bool tensor"),
        ({'m': {'1.weight': torch.ones(16, 64)}}, {'a': make()}, 'needs to be a bool tensor'),
        (two_masks(None), [], 'states=list: needs states by name'),
        (two_masks(None), {'a': 3}, r"states\['a'\]=int: needs a model, a Learner, a state_dict"),
        (two_masks(None), {'a': {'0.weight': torch.ones(2)}}, r"the state has no '1.weight'"),
        (two_masks(None), {'a': {'1.weight': torch.ones(2)}}, r'shape \(2,\) in the state, and its mask \(16, 64\)'),
    ],
)
def test_swap_table_refuses(masks, states, message):
    with pytest.raises(ValueError, match=message):
        swap_table(masks, states, never, 0, bar=False)


# the envelope


def test_the_envelope_is_the_best_within_each_budget():
    random = np.random.default_rng(0).normal(size=(5, 9, 3))
    runs = envelope((1, 2, 4), (1, 2, 4, 8), lambda c, e, seed: random[c, e, seed], bar=False)
    mean = {(c, e): random[c, e].mean() for c in (1, 2, 4) for e in (1, 2, 4, 8)}
    for epochs, row in runs.best.iterrows():
        within = {k: v for k, v in mean.items() if k[0] * k[1] <= epochs}
        best = max(within, key=within.get)
        assert (row.cycles, row.length) == best and row['mean'] == pytest.approx(within[best])
        assert row['std'] == pytest.approx(random[best].std(ddof=1))
    assert runs.best.index.tolist() == [1, 2, 4, 8, 16, 32]
    ax = runs.plot()
    runs.plot(ax, label='again', runs=False)
    assert [t.get_text() for t in ax.get_legend().get_texts()].count('again') == 1
    plt.close('all')


def test_an_envelope_from_rows_of_a_table():
    rows = [dict(cycles=c, length=e, seed=0, value=c * e) for c in (1, 2) for e in (1, 3)]
    assert Envelope(rows).best['mean'].tolist() == [1, 2, 3, 6]


class Stop(Callback):
    def before_fit(self):
        raise KeyboardInterrupt


def test_learners_envelope_by_hand():
    learn = make()
    quietly(learn, learn.fit_one_cycle, 3, 0.1)
    dense, rates = state_of(learn), list(learn.recorder.lrs)
    runs = quietly(learn, learn.envelope, (1, 2), (1, 2), 0.9, (0, 1))
    assert equal(learn.model.state_dict()['1.weight'], dense['1.weight']) and learn.masks is None
    other = make()
    other.model.load_state_dict(dense)
    options = dict(history=rates, original_epochs=3)
    assert quietly(other, other.envelope, (1, 2), (1, 2), 0.9, (0, 1), **options).equals(runs)
    by_hand = make()
    by_hand.model.load_state_dict(dense)
    seed_round(by_hand, 1)
    for sparsity in (1 - 0.1**0.5, 0.9):
        by_hand.prune(sparsity, scope='global', recover=False)
        quietly(by_hand, by_hand.retrain, 2, **options)
    value = runs.query('cycles == 2 and length == 2 and seed == 1').value.item()
    assert value == pytest.approx(quietly(by_hand, by_hand.validate)[1])


def test_learners_envelope_restores_after_an_interruption():
    learn = make()
    quietly(learn, learn.fit, 1, 0.1)
    dense = state_of(learn)
    with pytest.raises(KeyboardInterrupt):
        quietly(learn, learn.envelope, (1,), (1,), 0.9, cbs=Stop())
    assert learn.masks is None and all(equal(t, dense[n]) for n, t in learn.model.state_dict().items())


def test_learners_envelope_refuses():
    learn = make(metrics=[error_rate])
    for args, kwargs, message in (
        (((1,), (1,), 1.0), {}, 'sparsity=1.0: needs a fraction of zeros'),
        (((1,), (0,), 0.9), {}, 'lengths=0: needs a whole number of epochs'),
        (((1,), (1,), 0.9), {}, "metric='error_rate': needs a metric of which larger is better"),
        (((1,), (1,), 0.9), dict(metric='f1'), "metric='f1' was not measured"),
    ):
        with pytest.raises(ValueError, match=message):
            learn.envelope(*args, **kwargs)
    with pytest.raises(ValueError, match='none on record: give them as `history`'):
        make().envelope((1,), (1,), 0.9)


# cycles


def test_spectra_of_cycles():
    learn = make()
    learn.prune(0.5)
    ends = quietly(learn, learn.fit_cycles, 2, 1, lr=0.1, ends=True)
    own, masks = state_of(learn), learn.masks
    first = make()
    first.model.load_state_dict(ends[0])
    first.masks = masks
    spectra = learn.cycle_spectra(ends, k=2, tol=1e-5)
    assert spectra.index.tolist() == [1, 2] and spectra.loc[1].tolist() == pytest.approx(
        first.hessian_spectrum(2, tol=1e-5).tolist(), rel=1e-3
    )
    assert all(equal(t, own[n]) for n, t in learn.model.state_dict().items()) and learn.masks.jaccard(masks) == 0
    with pytest.raises(ValueError, match='k=0'):
        learn.cycle_spectra(ends, k=0)
    assert equal(learn.model.state_dict()['1.weight'], own['1.weight'])
    with pytest.raises(ValueError, match=r'ends\[1\] is of another model'):
        learn.cycle_spectra([ends[0], {}])
    with pytest.raises(ValueError, match='ends=dict: needs a list of states'):
        learn.cycle_spectra(ends[0])


def test_picture_of_cycle_paths_with_training_losses():
    learn = make()
    ends = quietly(learn, learn.fit_cycles, 3, 1, lr=0.1, ends=True)
    both = learn.cycle_paths(ends, n=3, train=True)
    axs = both.plot()
    assert [ax.get_ylabel() for ax in axs] == ['validation loss', 'training loss']
    assert [len(ax.lines) for ax in axs] == [2, 2]
    assert axs[1].lines[1].get_ydata().tolist() == both[1].train.losses.tolist()
    assert [ax.get_ylabel() for ax in learn.cycle_paths(ends, n=3).plot()] == ['loss', 'error']
    assert repr(both) == repr(both.df) and both._repr_html_() == both.df._repr_html_()
    plt.close('all')
