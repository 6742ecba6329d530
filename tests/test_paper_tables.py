"The harness of benchmarks/paper: verdicts, a CSV that only grows, and pages made from it alone"

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fastprune.all import SparsifyCallback

save = Figure.savefig
LONG = 400.0  # Seconds of trainings of which two or three seeds may decide
paper = Path(__file__).resolve().parents[1] / 'benchmarks' / 'paper'


@pytest.fixture(scope='module', autouse=True)
def importable():
    sys.path.insert(0, str(paper))
    yield
    sys.path.remove(str(paper))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    "Pages have empty files for pictures; one test draws them"
    monkeypatch.setattr(Figure, 'savefig', lambda fig, path, **kwargs: Path(path).touch())


def by_seed(*values, first=0):
    return dict(enumerate(values, first))


@pytest.mark.parametrize(
    'a, b, no_worse, verdict',
    [
        ([90, 91, 92], [80, 81, 82.5], False, 'holds'),
        ([80, 81, 82], [90, 91, 92.5], False, "doesn't"),
        ([80, 81, 82], [80, 81, 83], False, "can't tell"),
        ([80, 81, 82], [80, 81, 82], False, "can't tell"),  # no difference at all
        ([80, 90], [79, 90.5], False, "can't tell"),
        ([80], [90], False, 'not run'),
        ([], [], False, 'not run'),
        ([80.5, 81, 82], [80.9, 81.1, 82.2], True, 'holds'),  # behind, by less than a point
        ([80, 81, 82], [81.5, 81.9, 83.1], True, "can't tell"),
        ([80, 81, 82], [82, 83.1, 84.1], True, "doesn't"),
        ([12, 12.1, 12.2], [10, 10, 10], False, "can't tell"),  # near chance
    ],
)
def test_the_rule(a, b, no_worse, verdict):
    from tell import Claim

    assert Claim('a is better', [('here', by_seed(*a), by_seed(*b))], no_worse).verdict() == verdict


def test_an_interval_is_that_of_a_paired_t_test():
    from scipy import stats
    from tell import compare

    a, b = by_seed(71.2, 73.5, 70.1, 72.2, 74.0), by_seed(70.3, 73.1, 70.4, 70.2, 72.1)
    c, theirs = compare('here', a, b), stats.ttest_rel(list(a.values()), list(b.values()))
    interval = theirs.confidence_interval(0.9)
    assert c.seeds == 5 and np.allclose([c.low, c.high], [interval.low, interval.high])
    assert np.isclose(c.difference, 0.98) and np.isclose(c.difference / c.error, theirs.statistic)
    assert str(c) == f'here: +0.98 ± {c.error:.2f} (0.04 to {c.high:.1f})'


def test_seeds_are_compared_with_themselves():
    "The spread over seeds is larger than the difference at each; what one side alone has is left out"
    from tell import compare

    a, b = {0: 60.0, 1: 70.1, 2: 80.0, 7: 10.0}, {2: 79.0, 1: 69.0, 0: 59.1, 9: 99.0}
    c = compare('here', a, b)
    assert c.seeds == 3 and np.isclose(c.difference, 1.0) and c.verdict == 'holds'
    assert compare('here', a, {7: 9.0, 9: 1.0}).difference is None
    assert compare('here', a, by_seed(1, 2, first=3)).seeds == 0


def test_a_claim_holds_where_all_of_it_does():
    from tell import Claim

    high, low = by_seed(90, 91), by_seed(80, 81.1)
    good, bad, open_ = ('x', high, low), ('y', low, high), ('z', by_seed(80, 90), by_seed(82, 87))
    assert [Claim('', p).verdict() for p in ([good, good], [good, open_], [good, bad], [open_, bad])] == [
        'holds',
        "can't tell, 1 of 2 holds",
        "doesn't, 1 of 2 holds",
        "doesn't",
    ]
    assert Claim('', [good]).evidence == 'x: +9.95 ± 0.05 (9.6 to 10.3)'


def test_a_verdict_says_what_it_is_of():
    from tell import Claim

    high, low = by_seed(90, 91), by_seed(80, 81.1)
    claim = Claim('', [('98%', high, {}), ('99%', high, low)])
    assert claim.verdict('small') == 'holds (99%)' and claim.counted('small') == 'holds in part'
    claim = replace(claim, pairs=[('98%', high, low), ('99%', high, low)])
    assert claim.verdict('small') == 'holds' == claim.counted('small') and claim.verdict('tiny') == "can't tell"
    claim = replace(claim, pairs=[*claim.pairs, ('80%', low, high), ('70%', {0: 90}, {0: 80})])
    assert claim.verdict('small') == "doesn't, 2 of 3 hold (98%, 99%, 80%)" and claim.counted('small') == "doesn't"
    claim.lacks = 'starts not searched'
    assert claim.verdict('small') == 'no verdict: starts not searched (98%, 99%, 80%)'
    claim = replace(claim, pairs=claim.pairs[-1:])
    assert claim.verdict('small') == 'not run'


@pytest.mark.parametrize(
    'cyclic, verdict',
    [
        ((60.1, 61.2, 62.0), 'holds'),
        ((56.0, 57.0, 58.1), 'no verdict: cycling hurts the dense network'),
        ((57.0, 61.0, 66.0), "no verdict: can't tell whether cycling hurts the dense network"),
        ((), 'no verdict: control not run'),
    ],
)
def test_no_verdict_without_its_control(cyclic, verdict):
    import cst_cycles
    import harness

    values = {
        'nothing pruned, one cycle': (60.0, 61.0, 62.0),
        'nothing pruned, cyclic': cyclic,
        'random, cyclic': (50.0, 51.0, 52.0),
        'random, one cycle': (40.0, 41.0, 42.1),
    }
    rows = [
        {'model': 'resnet20', 'method': m, 'sparsity': 0.9 * ('nothing' not in m), 'epochs': 10, 'seed': seed}
        | {'step': '', 'what': 'accuracy', 'value': v}
        for m, vs in values.items()
        for seed, v in enumerate(vs)
    ]
    claims = cst_cycles.claims(pd.DataFrame(rows, columns=harness.columns))
    assert claims[0].verdict() == f'{verdict} (90%)' and claims[0].evidence.startswith('67%: not run; 90%: +9.97')
    assert all(c.control for c in claims)


def test_few_seeds_are_said():
    from tell import ours

    assert [ours(by_seed(*v)) for v in ([], [1], [1, 3], [1, 2, 3])] == [
        '–',
        '1.00 (1)',
        '2.00 ± 1.41 (2)',
        '2.00 ± 1.00',
    ]


def test_sampling_error_of_a_test_set():
    from tell import sampling_error

    assert np.isclose(sampling_error(50.0, 2_500), 1.0) and np.isclose(sampling_error(90.0, 10_000), 0.3)


def test_a_seed_counts_once():
    from tell import values

    df = pd.DataFrame(dict(method='a', what='accuracy', step='', sparsity=0.9, epochs=[1, 2], seed=0, value=[3.0, 4.0]))
    assert values(df, 'a', epochs=2) == {0: 4.0}
    with pytest.raises(ValueError, match="'a': seed 0 occurs"):
        values(df, 'a')


def test_trainings_on_different_machines_are_no_pair():
    from tell import compare, each, values

    df = pd.DataFrame(
        [
            dict(method=m, what='accuracy', step='', sparsity=0.9, epochs=1, seed=seed, value=v + seed, machine=where)
            for m, v, at in (('a', 80.0, 'xxxx'), ('b', 70.5, 'xxyx'), ('c', 70.0, 'yyxy'))
            for seed, where in enumerate(at)
        ]
    )
    df.loc[0, 'machine'] = 'x, compiled'  # another rounding alone
    a, b, c = (values(df, m) for m in 'abc')
    found = compare('here', a, b)
    assert found.seeds == 3 and found.elsewhere == 1 and found.verdict == 'holds'
    assert str(found).endswith('(9.5 to 9.5), without 1 of different machines')
    assert str(compare('here', a, c)) == 'here: on different machines' and compare('here', a, c).difference is None
    assert compare('here', each(lambda x: x - 1, a), b).seeds == 3  # what is made of numbers has their machine
    assert compare('here', each(lambda x, y: x + y, a, c), b).difference is None


def search_rows(name, found):
    "Rows of a search: number -> (accuracy, sparsity)"
    import harness

    return pd.DataFrame(
        [
            {'method': harness.at_number(harness.SEARCHES + name, x), 'sparsity': 0.9, 'epochs': 2, 'seed': seed}
            | {'what': what, 'value': v, 'step': '', 'images': 5_000}
            for x, both in found.items()
            for seed in harness.SEARCH_SEEDS
            for what, v in zip(('accuracy', 'sparsity'), both, strict=True)
        ]
    )


def test_a_number_is_chosen_when_all_are_tried():
    from harness import searched

    df = search_rows('a', {0.0: (50, 0.9), 0.1: (70, 0.9), 0.2: (90, 0.95), 0.4: (30, 0.9)})
    assert searched(df, 'a', 0.9, 2, (0.0, 0.1, 0.2, 0.4)) == 0.2
    assert searched(df, 'a', 0.9, 2, (0.0, 0.1, 0.2, 0.4), within=0.02) == 0.1
    assert searched(df, 'a', 0.9, 2, (0.2,), within=0.02) == 0.2  # none fits
    assert searched(df, 'a', 0.9, 2, (0.0, 0.1, 0.3)) is None and searched(df, 'a', 0.9, 4, (0.0,)) is None
    one = df[df.seed == 10]
    assert searched(one, 'a', 0.9, 2, (0.0,)) is None
    assert searched(one.assign(images=50_000), 'a', 0.9, 2, (0.0, 0.1)) == 0.1  # validated on 10,000 images


def test_trainings_wait_for_their_search(tmp_path):
    "And start where it says"
    import harness
    import ocp_table2

    scale, results = harness.SCALES['tiny'], harness.Results(tmp_path / 'x.csv', 'jpg')
    first = ocp_table2.cells(scale, results.df)
    searches = [c for c in first if c.method.startswith(harness.SEARCHES)]
    assert len(searches) == 3 * 3 * 4 * 2 and {c.seed for c in searches} == set(harness.SEARCH_SEEDS)
    assert not any(' at ' in c.method for c in first if c not in searches)
    for c in searches:
        accuracy = 60 if harness.number_of(c.method) == (0.4 if 'one-shot' in c.method else 0.1) else 40
        results.add(c, scale, [('', 'sparsity', c.sparsity), ('', 'accuracy', accuracy)], 1.0)
    more = {c.method for c in ocp_table2.cells(scale, results.df)} - {c.method for c in first}
    assert more == {'train iterative, start at 0.1', 'train AGP, start at 0.1'}  # one-shot has the paper's start
    cell = harness.Cell('resnet18', 'train AGP, start at 0.1')
    assert harness.method_of(cell).keywords == {'number': 0.1}


def test_bimp_has_the_best_start_for_its_best_strength(tmp_path):
    import bimp_table2
    import harness

    scale, results = harness.SCALES['trained'], harness.Results(tmp_path / 'x.csv', 'jpg')

    def try_all(best):
        cells = [c for c in bimp_table2.cells(scale, results.df) if c.method.startswith('search BIMP')]
        for c in cells:
            if (c.method,) not in set(results.df[['method']].itertuples(index=False, name=None)):
                rows = [('', 'sparsity', 0.9), ('', 'accuracy', 70.0 + 9 * (c.method == best))]
                results.add(c, scale, rows, 1.0)
        return {c.method for c in cells}

    first = try_all('search BIMP, strength at 0.003')
    assert len(first) == 5 and bimp_table2.chosen(results.df, 'BIMP', 0.9, scale) is None
    more = {f'search BIMP from {s}, strength at 0.003' for s in (0.5, 0.9)}
    assert try_all('search BIMP from 0.5, strength at 0.003') == first | more
    assert bimp_table2.chosen(results.df, 'BIMP', 0.9, scale) == 'BIMP, strength at 0.003'  # 79 each: the first
    df = results.df
    df.loc[(df.method == 'search BIMP from 0.5, strength at 0.003') & (df.what == 'accuracy'), 'value'] += 1
    name = bimp_table2.chosen(df, 'BIMP', 0.9, scale)
    assert name == 'BIMP from 0.5, strength at 0.003'
    assert [c.seed for c in bimp_table2.cells(scale, df) if c.method == name] == list(range(scale.seeds))
    assert harness.method_of(harness.Cell('resnet56', name)).args == ('BIMP from 0.5',)


def test_starts_that_were_not_searched_are_said(tmp_path):
    import harness
    import ocp_table2

    scale, results = harness.SCALES['small'], harness.Results(tmp_path / 'x.csv', 'jpg')
    for m, v in (('OCP', 60.0), ('one-shot', 50.0)):
        for seed in range(3):
            cell = harness.Cell('resnet18', ocp_table2.methods[m], 0.95, 2, seed)
            results.add(cell, scale, [('', 'accuracy', v + seed**2)], 1.0)
    claim = ocp_table2.claims(ocp_table2.mine(results.df))[0]
    assert claim.verdict('small') == 'no verdict: starts not searched (95%)'
    for c in ocp_table2.search_of('one-shot', 0.95, 2):
        accuracy = 60 if harness.number_of(c.method) == 0.4 else 40
        results.add(c, scale, [('', 'sparsity', 0.95), ('', 'accuracy', accuracy)], 1.0)
    df = ocp_table2.mine(results.df)
    assert harness.Scale.of(df).seeds == 3 and ocp_table2.best(df, 'one-shot', 0.95)[0] == 0.4
    assert ocp_table2.claims(df)[0].verdict('small') == 'holds (95%)'


def test_iterative_pruning_needs_an_epoch_for_a_step(tmp_path):
    "Where its steps are shorter there is no verdict on it, however well its start was searched"
    import harness
    import ocp_table2

    def claims(epochs, times):
        scale = replace(harness.SCALES['small'], times=times)
        results = harness.Results(tmp_path / f'{epochs}.csv', 'jpg')
        for n in ('OCP', 'iterative'):
            for seed in range(3):
                cell = harness.Cell('resnet18', ocp_table2.methods[n], 0.95, epochs, seed)
                results.add(cell, scale, [('', 'accuracy', 50.0 + 10 * (n == 'OCP') + seed)], 1.0)
        for c in ocp_table2.search_of('iterative', 0.95, epochs):
            accuracy = 60 if harness.number_of(c.method) == 0.2 else 40
            results.add(c, scale, [('', 'sparsity', 0.95), ('', 'accuracy', accuracy)], 1.0)
        found = ocp_table2.claims(ocp_table2.mine(results.df))
        return [c.verdict('small').partition(' (')[0] for c in found if 'terative' in c.text]

    short = 'no verdict: a step of iterative pruning has 0.48 epochs, and 8 in 50 epochs'
    assert claims(3, 0.06) == [short, short] and claims(10, 0.2) == ['holds', 'holds']


def test_searches_are_shown_with_all_their_starts(tmp_path):
    import harness
    import ocp_table2

    results = harness.Results(tmp_path / 'x.csv', 'jpg')
    for n in ocp_table2.others:
        for i, c in enumerate(ocp_table2.search_of(n, 0.95, 2)):
            results.add(c, harness.SCALES['small'], [('', 'sparsity', 0.95), ('', 'accuracy', 60.0 - i)], 1.0)
    assert ocp_table2.told_searches(results.df, (0.9, 0.95), 2) == (
        ' Validation accuracies of the search, from 0 / 10 / 20 / 40%, at 95% (2 epochs, seeds 10 and 11): '
        'one-shot 59.5 / 57.5 / 55.5 / 53.5, iterative 59.5 / 57.5 / 55.5 / 53.5, AGP 59.5 / 57.5 / 55.5 / 53.5.'
    )
    assert ocp_table2.told_searches(results.df, (0.95,), 3) == ''
    df = results.df
    one_seed = df[(df.seed == 10) | (df.method != 'search train AGP, start at 0.4')]
    assert ocp_table2.told_searches(one_seed, (0.95,), 2) == ''


def test_a_budget_that_some_seeds_lack_was_not_tried(tmp_path):
    import harness
    import ocp_table3

    scale, results = replace(harness.SCALES['small'], seeds=3), harness.Results(tmp_path / 'x.csv', 'jpg')
    for m, epochs, seeds in (('OCP', 1, 3), ('OCP', 2, 3), ('one-shot', 1, 3), ('one-shot', 2, 3), ('one-shot', 3, 2)):
        for seed in range(seeds):
            value = 60.0 if m == 'OCP' and epochs == 2 else 40.0
            cell = harness.Cell('resnet18', f'budget {m}', 0.95, epochs, seed)
            results.add(cell, scale, [('', 'accuracy', value)], 1.0)
    assert ocp_table3.outcome(results.df, scale, 'OCP') == (2, '1×')
    assert ocp_table3.outcome(results.df, scale, 'one-shot') == (None, 'more than 1×')


def test_seeds_are_asked_for_by_the_quickest_method():
    import report

    rows = [('slow', 400.0), ('slow', 420.0), ('slow', 440.0), ('quick', 90.0), ('quick', 500.0), ('quick', 100.0)]
    df = pd.DataFrame(rows, columns=['method', 'seconds']).assign(sparsity=0.9, epochs=5)
    assert report.quickest(df) == 100.0


def test_a_verdict_that_a_search_could_not_change_stands():
    "Where those that win could only do better, and not where they lose"
    from tell import Claim, Control

    high, low = by_seed(80.5, 81, 82), by_seed(60.5, 61, 62.1)
    claims = [Claim('', [('x', *pair)], lacks='not searched', stands='holds') for pair in ((high, low), (low, high))]
    assert [c.verdict() for c in claims] == ['holds', 'no verdict: not searched']
    failed = Control(claims[1], 'it fails')
    assert Claim('', [('x', high, low)], control=failed, stands='holds').verdict() == 'no verdict: it fails'


def test_the_worst_tickets_are_the_worst_without_a_search(tmp_path):
    import harness
    import ocp_table4

    results = harness.Results(tmp_path / 'x.csv', 'jpg')
    for i, n in enumerate(ocp_table4.SCHEDULES):
        for seed in range(3):
            cell = harness.Cell('resnet18', f'tickets {n}', 0.95, 2, seed)
            last = 40.0 + 10 * (i > 0) + seed + i / 10
            rows = [(m, what, v) for what in ('ticket accuracy', 'instability') for m, v in (('0', 60.0), ('1', last))]
            results.add(cell, harness.SCALES['small'], [*rows, ('', 'accuracy', 60.0)], 1.0)
    verdicts = {c.text: c.verdict('small') for c in ocp_table4.claims(ocp_table4.mine(results.df))}
    assert verdicts["One-shot's last ticket is the worst"] == 'holds'
    assert verdicts["OCP's last ticket is better than the others'"].startswith('no verdict')


def test_what_ocp_loses_with_its_number_not_searched_is_no_verdict(tmp_path):
    "Also where the starts of the others are searched"
    import harness
    import ocp_table4

    scale, results = harness.SCALES['small'], harness.Results(tmp_path / 'x.csv', 'jpg')
    made_up({'ocp_table4': ocp_table4}, scale, tmp_path / 'x.csv')
    df = results.df
    assert ocp_table4.found(ocp_table4.mine(df))[1]
    for better, said in ((90.0, 'holds'), (10.0, "no verdict: OCP's β not searched")):
        is_ocp = (df.method == 'tickets OCP') & (df.what == 'ticket accuracy')
        df.loc[is_ocp, 'value'] = better + df.seed[is_ocp]
        others = (df.what == 'ticket accuracy') & ~is_ocp
        df.loc[others, 'value'] = 50.0 + df.seed[others] / 2
        claim = ocp_table4.claims(ocp_table4.mine(df))[0]
        assert claim.verdict('small') == said


def test_an_end_of_an_interval_tells_its_side_of_0():
    from tell import end

    assert [end(x) for x in (0.007, -0.012, 0.05, -0.3, 12.34)] == ['0.01', '-0.01', '0.1', '-0.3', '12.3']
    assert [end(x) for x in (0.0, 0.0004, -0.0004)] == ['0.0', '0.0004', '-0.0004']
    assert [end(x, -1) for x in (-1.04, -0.96, -1, 0.04)] == ['-1.04', '-0.96', '-1.0', '0.0']


@pytest.mark.parametrize(
    'ocp, agp',
    [((60.0, 61.0, 62.0), (59.0, 62.0, 61.0)), ((94.0, 94.5, 94.2), (89.7, 90.3, 89.9))],
    ids=["OCP's mean", "the paper's 90%"],
)
def test_a_budget_is_too_small_where_the_target_is_clearly_ahead(tmp_path, ocp, agp):
    "A mean below it is not enough: that of a schedule as good as OCP would be so half of the time"
    import harness
    import ocp_table3

    scale, results = replace(harness.SCALES['small'], seeds=3), harness.Results(tmp_path / 'x.csv', 'jpg')
    accuracies = {'OCP': ocp, 'AGP': agp, 'one-shot': (50.0, 51.0, 52.5)}
    assert ocp_table3.base(scale) == 2
    for n, epochs, values in (('OCP', 1, (30.0, 30.0, 30.0)), *((n, 2, values) for n, values in accuracies.items())):
        for seed, v in enumerate(values):
            cell = harness.Cell('resnet18', f'budget {n}', 0.95, epochs, seed)
            results.add(cell, scale, [('', 'accuracy', v)], 1.0)
    assert [ocp_table3.outcome(results.df, scale, n)[1] for n in accuracies] == ['1×', "can't tell", 'more than 1×']


def test_early_stability_is_that_of_the_first_round(tmp_path):
    import harness
    import ocp_table4

    results = harness.Results(tmp_path / 'x.csv', 'jpg')
    halfway = {'OCP': (60.0, 42.0, 45.0), 'one-shot': (60.0, 50.0, 41.0)}  # the ends' error is 40
    for n, errors in halfway.items():
        for seed in range(3):
            rows = [(str(m), 'instability', e + seed / 2) for m, e in enumerate(errors)]
            rows += [(str(m), 'ticket accuracy', 60.0) for m in range(3)]
            cell = harness.Cell('resnet18', f'tickets {n}', 0.95, 2, seed)
            results.add(cell, harness.SCALES['small'], [*rows, ('', 'accuracy', 60.0)], 1.0)
    claim = next(c for c in ocp_table4.claims(ocp_table4.mine(results.df)) if 'stable' in c.text)
    where, ours, theirs = claim.pairs[0]
    assert (
        where == 'one-shot, round 1' and ours == {0: 98.0, 1: 97.5, 2: 97.0} and theirs == {0: 90.0, 1: 89.5, 2: 89.0}
    )
    assert claim.verdict('small').startswith("no verdict: starts and OCP's β not searched")


def made_up(tables, scale, path, seed=0):
    "A CSV with a number for whatever any table asks for"
    import harness

    rng, rows, results = np.random.default_rng(seed), [], harness.Results(path, 'jpg')
    per_cell = {
        'cyclical': [(str(c), w) for c in range(1, 6) for w in ('cycle accuracy', 'mask distance')],
        'tickets': [(str(m), w) for m in range(3) for w in ('ticket accuracy', 'instability', 'left')],
        '18': [(str(m), w) for m in range(19) for w in ('round accuracy', 'left', 'max_lr')],
    }
    for table in tables.values():
        asked = None
        while asked != (asked := len(rows)):
            df = pd.DataFrame(rows, columns=harness.columns)
            done = set(df[harness.key].itertuples(index=False, name=None))
            for cell in dict.fromkeys([*table.needs(scale), *table.cells(scale, df)]):
                if results.has(cell, scale, done):
                    continue
                per_table = {'cyc_table2': ['classes'], 'bimp_table2': ['speedup', 'images a second']}
                for step, what in [
                    *(('', w) for w in per_table.get(table.__name__, [])),
                    *per_cell.get(cell.method.split()[0], []),
                    ('', 'accuracy'),
                    ('', 'sparsity'),
                ]:
                    rows.append(
                        {
                            **results.name(cell, scale),
                            'step': step,
                            'what': what,
                            'value': rng.uniform(40, 90),
                            'seconds': 1.0,
                            'commit': 'abc',
                            'machine': 'this',
                        }
                    )
    pd.DataFrame(rows, columns=harness.columns).to_csv(path, index=False)


@pytest.mark.parametrize('scale', ['tiny', pytest.param('full', marks=pytest.mark.slow)])
def test_every_table_is_filled_and_told(tmp_path, scale, monkeypatch):
    import harness
    import report
    from tables import TABLES

    if scale == 'tiny':  # others have pictures of the same figures
        monkeypatch.setattr(Figure, 'savefig', lambda fig, path, dpi: save(fig, path, dpi=20))
    made_up(TABLES, harness.SCALES[scale], tmp_path / 'results.csv')
    (tmp_path / 'figures').mkdir()
    for name in ('cyc_table2_old.png', 'mine.png'):  # one of an earlier page, and somebody's own
        (tmp_path / 'figures' / name).touch()
    assert report.report_on(tmp_path / 'results.csv') == tmp_path / 'RESULTS.md'
    page = (tmp_path / 'RESULTS.md').read_text()
    assert 'makes it from `results.csv`' in page
    df = harness.read(tmp_path / 'results.csv')
    assert (
        harness.Scale.of(TABLES['ocp_table3'].mine(df)) == harness.SCALES[scale]
    )  # known from the rows alone; other tables may have more seeds
    for t in TABLES.values():
        assert f'## {t.title}' in page
        part = page.split(f'## {t.title}')[1].split('\n## ')[0]
        assert '–' not in part.split('Machine')[1].split('| claim')[0], t.title  # no cell is empty
        assert all(c.text in part for c in t.claims(t.mine(df))) and 'not run' not in part
    assert f'; {harness.SCALES[scale].seeds} seeds. ' in page and 'not run yet' not in page
    assert {p.name for p in (tmp_path / 'figures').glob('*.png')} == {
        'claims.png',
        'mine.png',
        *(f'{n}_{scale}_jpg.png' for n in TABLES),
    }
    assert ': one seed' not in page and ': not run' not in page
    assert f'| {scale} |' in page and len(page.splitlines()) < 400


def test_verdicts_are_counted_by_paper(tmp_path):
    import harness
    import report
    from tables import TABLES

    made_up(TABLES, harness.SCALES['small'], tmp_path / 'results.csv')
    df = harness.read(tmp_path / 'results.csv')
    lines = report.counts(list(report.judged(df))).splitlines()[2:]
    rows = {cells[1]: list(map(int, cells[2:-1])) for line in lines for cells in [[o.strip() for o in line.split('|')]]}
    papers = [v for k, v in rows.items() if k not in ('**all**', report.OURS)]
    assert len(papers) == 5 and all(v[0] == sum(v[1:]) for v in rows.values())
    assert rows['**all**'] == [sum(o) for o in zip(*papers, strict=True)] and not any(v[-1] for v in rows.values())


def test_a_verdict_is_of_the_largest_scale_that_compares(tmp_path):
    import harness
    import report

    results = harness.Results(tmp_path / 'results.csv', 'jpg')
    for scale, sparsities, better in (('small', (0.9, 0.95, 0.98), 60.0), ('gpu', (0.98,), 40.0)):
        for m, v in (('gradual', better), ('one-shot', 50.0)):
            for s in sparsities:
                for seed in range(3):
                    cell = harness.Cell('resnet20', m, s, 100, seed)
                    results.add(cell, harness.SCALES[scale], [('', 'accuracy', v + seed)], LONG)
    found = {j.claim.text: (j.scale, j.verdict) for j in report.judged(results.df) if j.section}
    assert found == {
        'Gradual is better than one-shot at 98%': ('gpu', "doesn't"),
        'Gradual is better than one-shot at 90 and 95%': ('small', 'holds'),
    }
    page = report.report_on(results.path).read_text()
    assert (
        page.index('**Scale gpu (jpg), ResNet-20.**') < page.index('**Scale small (jpg), ResNet-20.**')
        and 'Run alone' not in page
    )
    assert {p.name for p in (tmp_path / 'figures').iterdir()} == {'claims.png', 'cyc_table2_gpu_jpg.png'}


def test_a_method_that_was_run_alone_is_shown(tmp_path):
    import harness
    import report

    results = harness.Results(tmp_path / 'results.csv', 'jpg')
    for scale, methods in (('small', ('gradual', 'one-shot')), ('gpu', ('one-shot',))):
        for m in (*methods, 'dense'):
            for seed in range(3):
                cell = harness.Cell('resnet20', m, 0.99 * (m != 'dense'), 100, seed)
                results.add(cell, harness.SCALES[scale], [('', 'accuracy', 40.0 + seed)], 1.0)
    page = report.report_on(results.path).read_text()
    line = 'nothing to compare: gpu (jpg): one-shot at 99%, 100 epochs: 41.00 ± 1.00 (dense 41.00 ± 1.00).'
    assert line in page and '**Scale small (jpg), ResNet-20.**' in page and '**Scale gpu' not in page


@pytest.mark.parametrize('seeds, seconds, kind', [(4, 299.0, "can't tell"), (5, 299.0, 'holds'), (3, LONG, 'holds')])
def test_of_quick_trainings_five_seeds_decide(tmp_path, seeds, seconds, kind):
    "Of the quickest method; a control is no exception"
    import harness
    import report

    results = harness.Results(tmp_path / 'results.csv', 'jpg')
    methods = {'nothing pruned, one cycle': 80.0, 'nothing pruned, cyclic': 80.5, 'random, one cycle': 60.0}
    for m, v in {**methods, 'random, cyclic': 70.0}.items():
        for seed in range(seeds):
            cell = harness.Cell('resnet20', m, 0.0 if 'nothing' in m else 0.98, 10, seed)
            took = seconds if m == 'random, cyclic' else 3 * LONG
            results.add(cell, harness.SCALES['small'], [('', 'accuracy', v + seed / 10)], took)
    (found,) = [j for j in report.judged(results.df) if j.section]
    assert found.verdict.partition(' (')[0] in (kind, f'no verdict: {kind} whether cycling hurts the dense network')
    assert (found.claim.control.claim.found, found.claim.found) == (kind, kind)
    page = report.text_of(results.df, 'results.csv', 'figures', [found])
    assert ('fewer than 5 seeds decide nothing' in page) == (kind == "can't tell")


def test_a_scale_without_a_verdict_leaves_it_to_a_smaller_one(tmp_path):
    "Where a cycle is one epoch nothing is told of cycles"
    import harness
    import report

    results = harness.Results(tmp_path / 'results.csv', 'jpg')
    for scale, better in (('small', 40.0), ('eighth', 60.0), ('trained', 40.0)):
        model = harness.SCALES[scale].model('resnet20')
        for m, v in (('cyclical', better), ('one-shot', 50.0)):
            for seed in range(3):
                cell = harness.Cell(model, m, 0.99, 100, seed)
                results.add(cell, harness.SCALES[scale], [('', 'accuracy', v + seed)], LONG)
    (found,) = [j for j in report.judged(results.df) if j.section]
    none = 'no verdict: a cycle is one epoch, of 20 in the paper'
    assert (found.scale, found.verdict) == ('eighth', 'holds')
    assert found.others == [('trained (jpg)', none), ('small (jpg)', none)]


def test_searches_alone_are_no_table(tmp_path):
    import bimp_table2
    import harness
    import report

    results, scale = harness.Results(tmp_path / 'results.csv', 'jpg'), harness.SCALES['trained']
    for cell in bimp_table2.cells(scale, results.df)[:3]:
        assert cell.method.startswith(harness.SEARCHES)
        results.add(cell, scale, [('', 'accuracy', 60.0)], 1.0)
    page = report.report_on(results.path).read_text()
    assert 'bimp_table2: trained (searches)' in page and bimp_table2.title not in page and 'nan' not in page


def test_a_page_of_dense_networks_alone(tmp_path):
    import harness
    import report

    results = harness.Results(tmp_path / 'results.csv', 'jpg')
    for cell in harness.dense_cells('resnet20', harness.SCALES['small'], range(2)):
        results.add(cell, harness.SCALES['small'], [('', 'accuracy', 80.0 + cell.seed)], 1.0)
    page = report.report_on(results.path).read_text()
    assert (
        'ours 80.50 ± 0.71 (2)' in page
        and 'Too little was run to compare' in page
        and [p.name for p in (tmp_path / 'figures').iterdir()] == ['claims.png']
    )


def test_tiny_is_told_only_where_there_is_nothing_else(tmp_path):
    import harness
    import report
    from tables import TABLES

    made_up(TABLES, harness.SCALES['tiny'], tmp_path / 'tiny.csv')
    made_up({'cyc_table2': TABLES['cyc_table2']}, harness.SCALES['small'], tmp_path / 'small.csv')
    both = pd.concat([harness.read(tmp_path / 'tiny.csv'), harness.read(tmp_path / 'small.csv')])
    told = [(name, scale) for name, _, scale, *_ in report.sections(both, list(report.judged(both)))]
    assert ('cyc_table2', 'small') in told and ('cyc_table2', 'tiny') not in told and ('ocp_table2', 'tiny') in told


class Now:
    "A pool that runs at once, here"

    def __init__(self, *args, **kwargs):
        pass

    def shutdown(self, **kwargs):
        pass

    def submit(self, f, cell, *args):
        from concurrent.futures import Future

        done = Future()
        try:
            done.set_result(Now.run(cell))
        except ZeroDivisionError as e:
            done.set_exception(e)
        return done


@pytest.fixture
def runner(tmp_path, monkeypatch):
    "How a Runner is made, with a pool that runs here"
    import harness

    monkeypatch.setattr(harness, 'ProcessPoolExecutor', Now)

    def make(run):
        Now.run = staticmethod(run)
        return harness.Runner(
            harness.SCALES['tiny'], None, harness.Results(tmp_path / 'results.csv', 'jpg'), 2, tmp_path / 'cache'
        )

    return make


def test_nothing_is_lost_and_nothing_is_run_twice(runner):
    import harness

    cell, other, ran = (
        harness.Cell('resnet20', 'gradual', 0.9, 5, 0),
        harness.Cell('resnet20', 'gradual', 0.9, 5, 1),
        [],
    )
    with runner(lambda c: ran.append(c) or ([('', 'accuracy', 50.0)], 1.0)) as r:
        r.results.add(cell, r.scale, [('', 'accuracy', 81.25), ('1', 'cycle accuracy', 3.0)], 2.0)
        before = r.results.path.read_text()
        r.fill([], [cell, other, other])
        assert ran == [other] and r.results.path.read_text().startswith(before)
        r.fill([], [cell, other])
    df = r.results.df
    assert (
        ran == [other]
        and df[df.what == 'accuracy'].value.tolist() == [81.25, 50.0]
        and list(df.columns) == harness.columns
    )


def test_a_cell_of_another_setting_is_another_cell(runner):
    import harness

    cell, tiny = harness.Cell('resnet20', 'gradual', 0.9, 5, 0), harness.SCALES['tiny']
    with runner(None) as r:
        r.results.add(cell, tiny, [('', 'accuracy', 50.0)], 1.0)
        done = r.results.finished()
    assert r.results.has(cell, tiny, done)
    for change in (dict(images=600), dict(batch=1.0), dict(pixels=64), dict(rounds=5), dict(dense=3)):
        assert not r.results.has(cell, replace(tiny, **change), done)
    assert not r.results.has(replace(cell, seed=1), tiny, done) and not harness.Results(r.results.path, 'png').has(
        cell, tiny, done
    )
    assert r.results.has(cell, replace(tiny, seeds=9), done)  # more seeds are more cells


def test_a_cell_that_fails_leaves_the_others_alone(runner, capsys):
    import harness

    cells = [harness.Cell('resnet20', 'gradual', 0.9, 5, s) for s in range(3)]
    with runner(lambda c: ([('', 'accuracy', 100 / (c.seed - 1))], 1.0)) as r:
        r.fill([], cells)
        r.fill([], cells)  # and is not tried again in this run
    assert r.failed == [cells[1]] and len(r.results.finished()) == 2
    assert 'seed 1: failed, ZeroDivisionError' in capsys.readouterr().out


def small_learner(cbs, loss=None, **kwargs):
    "One convolution, eight images"
    import harness
    import torch
    from fastai.basics import DataLoader, DataLoaders, Learner

    data = [(torch.randn(3, 8, 8), torch.tensor(i % 2)) for i in range(8)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8), torch.nn.Flatten())
    return Learner(
        DataLoaders(DataLoader(data, bs=4), DataLoader(data, bs=4), device='cpu'),
        model,
        loss or torch.nn.functional.cross_entropy,
        harness.sgd,
        cbs=cbs,
        **kwargs,
    )


@pytest.mark.parametrize('fast', [True, False])
def test_layers_are_in_bfloat16_where_that_is_fast(runner, monkeypatch, fast):
    "Without AVX-512 it takes 15 times as long as float32"
    import harness
    import torch

    monkeypatch.setattr(harness, 'bfloat16_is_fast', lambda: fast)
    seen, lost = set(), set()

    def loss(pred, y):
        lost.add(pred.dtype)
        return torch.nn.functional.cross_entropy(pred, y)

    learn = small_learner(harness.Precision(), loss)
    model = learn.model
    model[0].register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    assert seen == {torch.bfloat16 if fast else torch.float32} and lost == {model[0].weight.dtype} == {torch.float32}
    cell = harness.Cell('resnet20', 'gradual', 0.9, 5)
    with runner(lambda c: ([('', 'accuracy', 50.0)], 1.0)) as r:
        r.fill([], [cell])
    assert r.results.df.machine[0].endswith('float32') != fast


@pytest.mark.parametrize(
    'model, gpu, as_it_is', [('resnet18', False, True), ('resnet18', True, False), ('resnet20', False, False)]
)
def test_a_resnet18_on_a_cpu_is_trained_as_it_is(runner, monkeypatch, model, gpu, as_it_is):
    import harness
    import torch

    monkeypatch.setattr(harness, 'bfloat16_is_fast', lambda: True)
    monkeypatch.setattr(harness, 'default_device', lambda: torch.device('cuda' if gpu else 'cpu'))
    monkeypatch.setattr(harness.Run, 'dls', lambda self, bs, valid_pct=0.0: small_learner([]).dls)
    run = harness.Run(harness.Cell(model, 'gradual', 0.9), harness.SCALES['tiny'], None, None)
    assert bool(run.learner().cbs.filter(lambda cb: isinstance(cb, harness.Precision))) != as_it_is
    with runner(lambda c: ([('', 'accuracy', 50.0)], 1.0)) as r:
        r.fill([], [run.cell])
    assert r.results.df.machine[0].endswith('float32') == as_it_is


def test_the_same_scale_with_other_files_is_another(tmp_path):
    "It is not mixed with the first, which the verdicts are of"
    import harness
    import report

    scale = harness.SCALES['small']
    for files, v in (('jpg', 60.0), ('png', 40.0)):
        results = harness.Results(tmp_path / 'results.csv', files)
        for m in ('gradual', 'one-shot'):
            for seed in range(2):
                accuracy = (v if m == 'gradual' else 50.0) + seed
                results.add(harness.Cell('resnet20', m, 0.98, 5, seed), scale, [('', 'accuracy', accuracy)], LONG)
    page = report.report_on(results.path).read_text()
    assert '**Scale small (jpg), ResNet-20.**' in page and 'Scale small (png)' not in page
    assert '| **holds** | 98%: +10.00 ± 0.00 (10.0 to 10.0) | small (png): doesn\'t |' in page


@pytest.mark.parametrize(
    'images, epochs, gpu, compiler, compiled',
    [
        (50_000, 1, False, 'g++', True),
        (5_000, 10, False, 'g++', True),
        (5_000, 9, False, 'g++', False),
        (50_000, 20, True, 'g++', False),
        (50_000, 20, False, None, False),
    ],
)
def test_long_trainings_are_compiled_on_a_cpu(runner, monkeypatch, images, epochs, gpu, compiler, compiled):
    import harness
    import torch

    monkeypatch.setattr(harness.shutil, 'which', lambda name: compiler)
    monkeypatch.setattr(harness, 'default_device', lambda: torch.device('cuda' if gpu else 'cpu'))
    cell, scale = harness.Cell('resnet20', 'gradual', 0.9, epochs), replace(harness.SCALES['tiny'], images=images)
    assert harness.compiles(cell, scale) == compiled and not harness.compiles(replace(cell, model='resnet18'), scale)
    with runner(lambda c: ([('', 'accuracy', 50.0)], 1.0)) as r:
        r.scale = scale
        r.fill([], [cell])
    assert r.results.df.machine[0].endswith('compiled') == compiled


def test_a_network_is_compiled_once(monkeypatch):
    import harness
    import torch

    asked = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **kwargs: asked.append((self, kwargs)))
    learn = small_learner(harness.Precision(compiled=True))
    with learn.no_bar(), learn.no_logging():
        for _ in range(2):
            learn.fit(1, 0.1)
    assert asked == [(learn.model, dict(dynamic=False))]


@pytest.mark.slow
def test_a_compiled_network_learns_the_same():
    import harness
    import torch
    from fastai.basics import set_seed

    if not harness.can_compile():
        pytest.skip('needs a C++ compiler and the headers of Python')

    def trained(compiled):
        set_seed(0)
        learn = small_learner(harness.Precision(compiled))
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 0.1, cbs=SparsifyCallback(0.5))
        return list(learn.model.state_dict()), learn.model[0].weight.detach(), learn.masks.sparsity

    (names, w, s), (names_compiled, compiled, s_compiled) = trained(False), trained(True)
    assert names == names_compiled and s == s_compiled == 0.5 and torch.allclose(w, compiled, atol=0.02)


def test_validation_is_where_it_is_asked_for():
    "And wherever someone calls `learn.validate()`"
    import harness
    from fastai.basics import Callback, accuracy

    class Seen(Callback):
        order = 99

        def before_validate(self):
            epochs.append(self.epoch)

    epochs, learn = [], small_learner([harness.SeldomValidate(2), Seen()], metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(5, 0.1)
    assert epochs == [1, 3] and [len(v) for v in learn.recorder.values] == [1, 3, 1, 3, 1]
    assert len(learn.validate()) == 2 and epochs == [1, 3, 0]


@pytest.fixture
def trained(runner):
    "A Runner's maker whose dense networks have this weight and accuracy; `ran` is what it ran"
    from types import SimpleNamespace

    import harness
    import torch

    it = SimpleNamespace(
        weight=3.0,
        accuracy=50.0,
        ran=[],
        needs=harness.dense_cells('resnet20', harness.SCALES['tiny']),
        cells=[harness.Cell('resnet20', 'gradual', 0.9, 5, s) for s in range(2)],
    )

    def run(c):
        it.ran.append(c.method)
        if c.method != 'dense':
            return [('', 'accuracy', 40.0)], 1.0
        rows = harness.keep_baseline(
            harness.Run(c, it.runner.scale, None, it.runner.cache),
            SimpleNamespace(model=SimpleNamespace(state_dict=lambda: {'w': torch.tensor([it.weight])})),
        )
        return [*rows, ('', 'accuracy', it.accuracy)], 1.0

    def make():
        it.runner = runner(run)
        return it.runner

    it.make = make
    return it


def kept(runner):
    return [p.name for p in runner.cache.iterdir()]


def test_a_lost_network_is_trained_again_only_if_it_is_needed(trained):
    with trained.make() as r:
        r.fill(trained.needs, trained.cells[:1])
        r.fill(trained.needs, trained.cells[:1])
        assert trained.ran == ['dense', 'gradual'] and kept(r) == ['300_0.25_resnet20_10.safetensors']
        next(r.cache.iterdir()).unlink()
        r.fill(trained.needs, trained.cells[:1])
        assert trained.ran == ['dense', 'gradual']  # all is there
        r.fill(trained.needs, trained.cells)
        assert trained.ran == ['dense', 'gradual', 'dense', 'gradual'] and len(kept(r)) == 1
    df = r.results.df
    assert df[df.what == 'norm'].value.tolist() == [3.0] and (df.what == 'accuracy').sum() == 3


@pytest.mark.parametrize(
    'weight, accuracy, says',
    [
        (3.0, 51.0, 'accuracy 51, not 50 as in'),
        (4.0, 50.0, 'norm 4, not 3 as in'),
        (4.0, 51.0, 'accuracy 51, not 50 and norm 4, not 3'),
    ],
)
def test_a_network_that_comes_out_otherwise_is_not_started_from(trained, capsys, weight, accuracy, says):
    "All that starts from a trained network starts from the same one, in later runs too"
    with trained.make() as r:
        r.fill(trained.needs, trained.cells[:1])
    next(r.cache.iterdir()).unlink()
    trained.weight, trained.accuracy, before = weight, accuracy, r.results.path.read_text()
    with trained.make() as r:
        r.fill(trained.needs, trained.cells)
        r.fill(trained.needs, trained.cells)  # as by another table: it isn't tried twice
    assert trained.ran == ['dense', 'gradual', 'dense'] and r.failed == trained.needs and not kept(r)
    assert says in (said := capsys.readouterr().out) and '--out' in said
    assert r.results.path.read_text() == before


def test_a_kept_network_is_never_replaced_by_another(trained, capsys):
    "Two CSVs with one folder of networks"
    with trained.make() as r:
        r.fill(trained.needs, trained.cells[:1])
    r.results.path.unlink()
    with trained.make() as r:
        r.fill(trained.needs, trained.cells[:1])  # the same network: both may start from it
    assert not r.failed and len(r.results.finished()) == 2
    r.results.path.unlink()
    trained.weight = 4.0
    with trained.make() as r:
        r.fill(trained.needs, trained.cells[:1])
    from fastprune.all import load_state

    assert r.failed == trained.needs and float(load_state(next(r.cache.iterdir()))['w']) == 3.0 and len(kept(r)) == 1
    assert 'norm 4, not 3' in capsys.readouterr().out


def test_a_cell_that_was_cut_off_is_not_finished(runner):
    import harness

    cell = harness.Cell('resnet20', 'gradual', 0.9, 5, 0)
    with runner(lambda c: ([('', 'classes', 6.0), ('', 'accuracy', 50.0)], 1.0)) as r:
        r.results.add(cell, r.scale, [('', 'classes', 6.0)], 1.0)
        assert not r.results.finished()
        r.fill([], [cell])
    assert len(r.results.finished()) == 1 and r.results.of(cell, r.scale) == {'classes': 6.0, 'accuracy': 50.0}


def test_rows_that_say_nothing_are_left_out(tmp_path):
    "NaN, and the same cell from two machines"
    import harness

    a = dict(
        zip(
            harness.columns,
            [
                'tiny',
                1,
                1,
                1.0,
                1.0,
                1,
                1,
                1,
                'jpg',
                'resnet20',
                'gradual',
                0.9,
                5,
                0,
                '',
                'accuracy',
                50.0,
                1.0,
                'abc',
                'this',
            ],
            strict=True,
        )
    )
    pd.DataFrame([a, {**a, 'value': 60.0, 'machine': 'that'}, {**a, 'seed': 1, 'value': 'nan'}]).to_csv(
        tmp_path / 'x.csv', index=False
    )
    assert harness.read(tmp_path / 'x.csv').value.tolist() == [50.0]


@pytest.mark.parametrize('cut', [3, 60, 250])
def test_a_line_that_was_cut_off(tmp_path, cut):
    "As by a full disk: neither a number nor a reason to start with an empty file"
    import harness

    scale, results = harness.SCALES['tiny'], harness.Results(tmp_path / 'x.csv', 'jpg')
    first, second = (harness.Cell('resnet20', 'gradual', 0.9, 5, s) for s in range(2))
    rows = [('', 'accuracy', 87.654), ('', 'sparsity', 0.9)]
    results.add(first, scale, rows, 1.0)
    results.add(second, scale, rows, 1.0)
    whole = results.df
    results.path.write_bytes(results.path.read_bytes()[:-cut])
    assert results.df.equals(whole[whole.seed == 0]) and len(results.finished()) == 1
    results.add(second, scale, rows, 1.0)
    assert results.df.value.tolist() == [0.9, 87.654] * 2 and len(results.finished()) == 2
    results.path.write_bytes(b'')
    results.add(first, scale, rows, 1.0)
    assert results.df.equals(whole[whole.seed == 0])


def test_a_last_line_without_an_end_is_whole(tmp_path):
    "As an editor leaves it"
    import harness

    scale, results = harness.SCALES['tiny'], harness.Results(tmp_path / 'x.csv', 'jpg')
    for seed in range(2):
        if seed:
            results.path.write_bytes(results.path.read_bytes().rstrip())
        results.add(harness.Cell('resnet20', 'gradual', 0.9, 5, seed), scale, [('', 'accuracy', 50.0)], 1.0)
    assert results.df.seed.tolist() == [0, 1]
    results.path.write_bytes(results.path.read_bytes().rstrip())
    assert results.df.seed.tolist() == [0, 1]


def test_what_is_no_such_csv_is_not_written_over(tmp_path):
    import harness

    for text in ('a,b', 'a,b\n1,2\n', '\n', 'scale\n1\n2,3,4\n', b'\xff\xfe\n'):
        path = tmp_path / 'x.csv'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match='x.csv: '):
            harness.read(path)


def test_a_cell_that_was_cut_off_is_not_mixed_with_the_next(tmp_path):
    import harness

    scale, results = harness.SCALES['tiny'], harness.Results(tmp_path / 'x.csv', 'jpg')
    cell = harness.Cell('resnet20', 'gradual', 0.9, 5, 0)
    for v in (1.0, 2.0, 3.0):  # the first is cut off, the third comes from another machine
        results.add(cell, scale, [('1', 'cycle accuracy', v), ('', 'accuracy', 80 + v), ('', 'sparsity', v)], 1.0)
        if v == 1:
            results.path.write_text(''.join(results.path.read_text().splitlines(True)[:-1]))
    assert results.df.value.tolist() == [2.0, 2.0, 82.0]


def test_a_number_that_is_none_hides_no_other(tmp_path):
    import harness

    results, scale = harness.Results(tmp_path / 'x.csv', 'jpg'), harness.SCALES['tiny']
    for v in (float('nan'), 50.0):
        results.add(harness.Cell('resnet20', 'gradual', 0.9, 5, 0), scale, [('', 'accuracy', v)], 1.0)
    assert results.df.value.tolist() == [50.0]


def test_a_csv_of_something_else(tmp_path, monkeypatch, capsys):
    import run

    (tmp_path / 'x.csv').write_text('a,b\n1,2\n')
    monkeypatch.setattr(sys, 'argv', ['run.py', '--out', str(tmp_path / 'x.csv')])
    with pytest.raises(SystemExit):
        run.arguments()
    assert 'x.csv: its columns are a, b; needs those of run.py: scale, ' in capsys.readouterr().err


def test_images_of_another_kind_are_another_scale(tmp_path):
    "Their searches are not those of the first"
    import harness
    import ocp_table3
    from tables import TABLES

    scale, table = harness.SCALES['small'], {'ocp_table3': TABLES['ocp_table3']}
    made_up(table, scale, tmp_path / 'x.csv')
    results = harness.Results(tmp_path / 'x.csv', 'png')
    assert results.rows(scale).empty and len(harness.Results(tmp_path / 'x.csv', 'jpg').rows(scale))
    assert all(c.method.startswith('search ') for c in ocp_table3.cells(scale, results.rows(scale)))


@pytest.mark.parametrize(
    'args',
    [
        ['cyc_table5', '--sparsity', '0.9'],
        ['cyc_table5', '--methods', 'gradual'],
        ['scyc_table2', '--sparsity', '0.98'],
    ],
)
def test_options_that_leave_nothing(tmp_path, monkeypatch, args):
    "Nothing is trained for them, not even the dense network"
    import run

    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'train' / 'cat' / '0.jpg').touch()
    monkeypatch.setattr(sys, 'argv', ['run.py', *args, '--data', str(tmp_path), '--out', str(tmp_path / 'mine.csv')])
    with pytest.raises(SystemExit, match=rf'leave no cell of {args[0]}, which have, .*the sparsities 0\.9[89]'):
        run.main()
    assert not (tmp_path / 'mine.md').exists()


def test_a_setting_that_was_changed_has_a_name_of_its_own(tmp_path):
    import harness
    import report

    results, small = harness.Results(tmp_path / 'results.csv', 'jpg'), harness.SCALES['small']
    for scale, v in ((small, 60.0), (replace(small, dense=25), 40.0), (replace(small, scale='mini'), 30.0)):
        for m, accuracy in (('gradual', v), ('one-shot', 50.0)):
            for seed in range(2):
                cell = harness.Cell('resnet20', m, 0.98, 5, seed)
                results.add(cell, scale, [('', 'accuracy', accuracy + seed)], LONG)
    (found,) = [j for j in report.judged(results.df) if j.section]
    assert (found.section, found.verdict) == ('small (jpg)', 'holds')
    assert found.others == [('small (jpg, dense 25)', "doesn't"), ('mini (jpg)', "doesn't")]


def test_a_method_that_was_run_alone_for_several_budgets(tmp_path):
    import harness
    import report

    results = harness.Results(tmp_path / 'results.csv', 'jpg')
    for scale, methods in (('small', ('retrain ALLR', 'retrain FT')), ('eighth', ('retrain ALLR',))):
        for m in methods:
            for epochs in (1, 2):
                for seed in range(3):
                    cell = harness.Cell('resnet56', m, 0.9, epochs, seed)
                    results.add(cell, harness.SCALES[scale], [('', 'accuracy', 40.0 + seed + epochs)], 1.0)
    page = report.report_on(results.path).read_text()
    assert (
        'eighth (jpg): retrain ALLR at 90%, 1 epoch: 42.00 ± 1.00; eighth (jpg): retrain ALLR at 90%, 2 epochs: 43.00'
        in page
    )


def test_the_page_is_what_the_csv_says():
    "RESULTS.md and the figures' names, made anew from results.csv"
    import report

    if not (paper / 'results.csv').exists():
        pytest.fail('results.csv is missing')
    page, shown = (paper / 'RESULTS.md').read_text(), (paper / 'figures').glob('*.png')
    start = page.split('## ')[0]
    assert len(page.splitlines()) < 400 and start.index('figures/claims.png') < start.index('| holds |')
    assert page.split('## ')[1].startswith('What was not run')
    df = report.read(paper / 'results.csv')
    assert page == report.text_of(df, 'results.csv', 'figures', list(report.judged(df)))
    assert {f'figures/{p.name}' for p in shown} == set(re.findall(r'\((figures/[^)]+)\)', page))


def test_the_network_of_the_scale_trained_is_small():
    "Some 30 million multiply-adds an image; its first layer is fixed and never pruned"
    import airbench
    import torch

    from fastprune.all import prunable_weights
    from fastprune.core.channel_cost import FlopCount

    model = airbench.build()
    with FlopCount({}) as counted:
        model(torch.zeros(1, 3, 32, 32))
    adds = sum(counted.flops.values()) / 2
    weights = prunable_weights(model)
    assert 30e6 < adds < 35e6 and sum(w.numel() for w in model.parameters()) == 497_792
    assert len(weights) == 7 and sum(w.numel() for w in weights.values()) == 496_640
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_first_layer_whitens():
    "Correlated pixels come out uncorrelated, with a standard deviation of 1, once with each sign"
    import airbench
    import torch

    torch.manual_seed(0)
    x = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 34, 34), 3, 1) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    first = airbench.Whiten()
    first.fit(x)
    y = first(x)
    out = y.transpose(0, 1).flatten(1)
    assert torch.allclose(out[:12], -out[12:])
    assert torch.allclose(out[:12] @ out[:12].T / out.shape[1], torch.eye(12), atol=0.1)


def test_what_the_scale_trained_has():
    import harness
    from tables import TABLES, tables_at

    scale = harness.SCALES['trained']
    empty = pd.DataFrame(columns=harness.columns)
    assert tables_at(scale) == ['cyc_table2', 'cyc_table5', 'ocp_table2', 'bimp_table1', 'bimp_table2', 'ocp_table3']
    assert tables_at(harness.SCALES['small']) == list(TABLES)
    found = {t: [*TABLES[t].needs(scale), *TABLES[t].cells(scale, empty)] for t in tables_at(scale)}
    assert {c.model for cells in found.values() for c in cells} == {scale.network}
    sparsities = {t: {c.sparsity for c in cells} - {0.0} for t, cells in found.items()}
    assert sparsities == {t: set(TABLES[t].at_trained) for t in found}
    assert {c.method for c in found['cyc_table2']} == {'dense', 'one-shot', 'gradual', 'cyclical'}
    assert not any('nested' in c.method or 'fasterai' in c.method for c in found['ocp_table2'])
    compiled = [harness.compiles(c, scale) for cells in found.values() for c in cells]
    assert not any(compiled)


def test_a_search_counts_in_the_table_of_its_epochs_alone(tmp_path):
    import harness
    from tables import TABLES

    scale, some = harness.SCALES['trained'], {t: TABLES[t] for t in ('ocp_table2', 'ocp_table3')}
    made_up(some, scale, tmp_path / 'results.csv')
    df = harness.read(tmp_path / 'results.csv')
    searched = df[df.method.str.startswith(harness.SEARCHES)]
    assert set(searched.epochs) == {2, 3}
    for name, epochs in (('ocp_table2', 3), ('ocp_table3', 2)):
        mine = some[name].mine(df)
        searches = mine[mine.method.str.startswith(harness.SEARCHES)]
        assert searches.index.tolist() == searched.index[searched.epochs == epochs].tolist()


def test_the_scale_trained_is_told(tmp_path):
    "With its network, and what it lacks"
    import harness
    import not_run
    import report
    from tables import TABLES

    scale, some = harness.SCALES['trained'], {t: TABLES[t] for t in ('cyc_table2', 'cyc_table5', 'bimp_table1')}
    made_up(some, scale, tmp_path / 'results.csv')
    df = harness.read(tmp_path / 'results.csv')
    assert harness.Scale.of(TABLES['bimp_table1'].mine(df)) == scale and set(df.model) == {scale.network}
    page = report.text_of(df, 'results.csv', 'figures', list(report.judged(df)))
    assert 'Not run there: ocp_table4, scyc_table2, cst_cycles.' in page
    assert 'cyc_table2 at 99%; cyc_table5 at 99%; ocp_table2 at 95%; bimp_table1 at 90%; bimp_table2 at 90%; ' in page
    assert 'ocp_table3 at 95%' in page
    for name, table in some.items():
        assert f'## {table.title}' in page and f'{name}: trained (5 seeds)' in page
        assert any(c.compared for c in table.claims(table.mine(df)))
    assert not_run.rest(df[:0], TABLES) == ''


@pytest.fixture(scope='module')
def few_images(tmp_path_factory):
    "A folder like CIFAR-10's, with 20 images to train and to test on"
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(40):
        path = folder / ('train', 'test')[i // 20] / str(i % 10) / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


def test_a_cell_of_each_table_at_the_scale_trained(few_images, tmp_path):
    import harness
    import tables

    scale = harness.SCALES['trained']

    def run(method, sparsity, epochs):
        cell = harness.Cell(scale.network, method, sparsity, epochs)
        rows = harness.method_of(cell)(harness.Run(cell, scale, few_images, tmp_path))
        return {what: value for step, what, value in rows if step == ''}

    kept = lambda epochs: harness.baseline(tmp_path, scale, scale.network, epochs)
    assert run('dense', 0.0, scale.dense)['norm'] > 0
    harness.just_trained(kept(scale.dense)).replace(kept(scale.dense))
    kept(tables.TABLES['bimp_table1'].dense_epochs(scale)).hardlink_to(kept(scale.dense))
    for method, sparsity, epochs in (
        ('cyclical', 0.99, 5),
        ('train OCP, every batch', 0.95, 3),
        ('retrain ALLR', 0.9, 1),
        ('BIMP, strength at 0.001', 0.9, 5),
    ):
        assert abs(run(method, sparsity, epochs)['sparsity'] - sparsity) < 0.01, method


def test_a_run_that_ends_early_is_told(tmp_path, monkeypatch, capsys):
    "As where a worker was killed for memory"
    import harness
    import run

    data = tmp_path / 'train' / 'cat'
    data.mkdir(parents=True)
    (data / '0.jpg').touch()

    def fails_later(r, needs, cells):
        if r.results.finished():
            raise BrokenPipeError
        r.results.add(cells[0], r.scale, [('', 'accuracy', 50.0)], 1.0)

    monkeypatch.setattr(harness.Runner, 'fill', fails_later)
    monkeypatch.setattr(harness, 'ProcessPoolExecutor', Now)
    monkeypatch.setattr(sys, 'argv', ['run.py', '--data', str(tmp_path), '--out', str(tmp_path / 'mine.csv')])
    with pytest.raises(BrokenPipeError):
        run.main()
    assert '50.00 (1)' in (tmp_path / 'mine.md').read_text() and '1 cells in' in capsys.readouterr().out


@pytest.mark.parametrize(
    'options, left',
    [
        ({}, 16),
        (dict(sparsity=[0.99]), 6),
        (dict(seeds=[1]), 8),
        (dict(methods=['gradual']), 8),
        (dict(sparsity=[0.99], seeds=[0], methods=['gradual', 'dense']), 2),
    ],
)
def test_some_cells_alone(options, left):
    from types import SimpleNamespace

    import harness
    import run

    cells = [
        harness.Cell('resnet20', m, s, 5, seed)
        for seed in range(2)
        for m, at in (('dense', [0.0]), ('gradual', [0.9, 0.95, 0.98, 0.99]), ('one-shot', [0.98, 0.97, 0.99]))
        for s in at
    ]
    assert (
        sum(
            run.asked(c, SimpleNamespace(**{'sparsity': None, 'seeds': None, 'methods': None, **options}))
            for c in cells
        )
        == left
    )


def test_seeds_of_a_table_of_which_nothing_is_left(tmp_path, monkeypatch):
    import harness
    import run
    from tables import TABLES

    made_up(TABLES, harness.SCALES['tiny'], tmp_path / 'mine.csv')
    assert TABLES['ocp_table3'].cells(harness.SCALES['tiny'], harness.read(tmp_path / 'mine.csv')) == []
    monkeypatch.setattr(
        sys,
        'argv',
        ['run.py', 'ocp_table3', '--seeds', '1', '--data', str(tmp_path), '--out', str(tmp_path / 'mine.csv')],
    )
    assert run.arguments().seeds == [1]


@pytest.mark.parametrize(
    'args, says',
    [
        (['nothing'], "there is no table 'nothing'"),
        (['--data', '/nowhere'], 'there is no such folder'),
        (['--scale', 'huge'], 'invalid choice'),
        (['--scale', 'gpu'], 'invalid choice'),
        (['--out', 'results'], '--out results: needs a name that ends in .csv'),
        (['--workers', '0'], '--workers 0'),
        (['--sparsity', '98'], '--sparsity 98'),
        (['--seeds', '2'], '--seeds 2: tiny has 0 to 1'),
        (['cst_cycles', '--seeds', '2'], '--seeds 2: tiny has 0 to 1'),
        (['--methods', 'gradul'], "'gradul': there is no such method"),
        (['cst_cycles', '--scale', 'trained'], 'cst_cycles is not run at --scale trained: use any of cyc_table2'),
    ],
)
def test_wrong_flags(args, says, monkeypatch, capsys):
    import run

    monkeypatch.setattr(sys, 'argv', ['run.py', *args])
    with pytest.raises(SystemExit) as e:
        run.main()
    assert e.value.code == 2 and says in capsys.readouterr().err
