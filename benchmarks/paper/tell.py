"What tables are told with: numbers out of the CSV, Markdown, and verdicts on claims"

import math
import statistics
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from fastprune.analysis.verdict import paired_verdict

FLOOR = 20.0  # Percent: twice chance on ten classes
MARGIN = 1.0  # Points that something may lose and be no worse
LEVEL = 0.9  # Of the intervals
KINDS = ('holds', 'holds in part', "doesn't", "can't tell", 'no verdict', 'not run')

RULE = f"""**The rule.** A claim is one or more comparisons of two methods, over the seeds that both have at one \
scale, each pair of one machine and in one precision (a compiled network counts as the same). Of each comparison we \
take the differences by seed, in the direction that is claimed: their mean, the standard error of the mean, and the \
{100 * LEVEL:.0f}% interval of Student's t.

- *holds*: the interval is above 0 in every comparison. *doesn't*: it is below 0 in some comparison. *can't tell*: \
anything else; also where neither mean is above {FLOOR:.0f}% (twice chance), and at the scale *tiny*, which is there \
to try that everything runs.
- *No worse* claims are that a method loses less than {MARGIN:.0f} point: the same rule, with -{MARGIN:.0f} in place \
of 0. One holds where the whole interval is above -{MARGIN:.0f}, and doesn't where it is below.
- *no verdict*: a control failed or was not run, or a method was not given its chance, which could change the verdict; \
the reason stands beside it, and the differences too.
- *not run*: no two methods of the claim have two seeds in common, on one machine. Where part of a claim was not run, \
what was compared stands in brackets; where all of that holds, the claim counts as one that *holds in part*.

With three seeds the interval is 2.9 standard errors to each side, with five 2.1. So where some method of a table \
trains in less than five minutes, fewer than five seeds decide nothing: *can't tell*. An interval is over seeds \
alone: the test images are the same for all of them, and so is the network that they start from, where that is one of \
seed 0."""


class BySeed(dict):
    "Seed -> number, with the machine that it is of"

    def __init__(self, numbers, machines=()):
        super().__init__(numbers)
        self.machines = dict(machines)

    @classmethod
    def of(cls, df, at):
        "Of the rows of the CSV that are marked, by seed; a compiled network counts as the same"
        at = np.flatnonzero(at)  # arrays: a page asks for some hundred, and pandas copies whole rows
        at = at[np.argsort(df.seed.to_numpy()[at], kind='stable')]
        seeds, numbers = (df[k].to_numpy()[at].tolist() for k in ('seed', 'value'))
        machines = [str(m).replace(', compiled', '') for m in df.machine.to_numpy()[at]] if 'machine' in df else ()
        return cls(zip(seeds, numbers, strict=True), zip(seeds, machines, strict=False))


def machine_of(values, seed):
    "The machine of a number; '' if that is not known"
    return getattr(values, 'machines', {}).get(seed, '')


def values(df, method, sparsity=None, what='accuracy', step='', epochs=None):
    "`BySeed`; `df` has the rows of one scale"
    of = lambda name: df[name].to_numpy()
    at = (of('method') == method) & (of('what') == what) & (of('step') == str(step))
    if sparsity is not None:
        at &= abs(of('sparsity').astype(float) - sparsity) < 1e-9
    if epochs is not None:
        at &= of('epochs') == epochs
    found = BySeed.of(df, at)
    if len(found) < at.sum():
        seeds = of('seed')[at].tolist()
        twice = next(s for s in seeds if seeds.count(s) > 1)
        raise ValueError(f'{method!r}: seed {twice} occurs at two scales or epochs')
    return found


def rows_of(df, model, methods, also=()):
    "Rows of these methods, and of those with a number: 'NAME at NUMBER'; `also`: other networks"
    return df[df.model.isin((model, *also)) & df.method.map(lambda m: m.partition(' at ')[0]).isin(methods)]


def by_step(df, method, sparsity, what):
    "For each step, such as a round, its `BySeed`"
    df = df[(df.method == method) & (df.what == what) & ((df.sparsity - sparsity).abs() < 1e-9)]
    return [BySeed.of(df, df.step == step) for step in sorted(set(df.step), key=int)]


def mean(vals):
    return statistics.mean(vals.values())


def each(f, *vals):
    "A function of numbers, seed by seed"
    seeds = sorted(set.intersection(*map(set, vals)))
    machines = {s: ' and '.join(dict.fromkeys(machine_of(v, s) for v in vals)) for s in seeds}
    return BySeed({s: f(*(v[s] for v in vals)) for s in seeds}, machines)


def ours(vals, digits=2):
    "Mean and standard deviation, with the number of seeds where there are fewer than three"
    if not vals:
        return '–'
    spread = f' ± {statistics.stdev(vals.values()):.{digits}f}' if len(vals) > 1 else ''
    return f'{mean(vals):.{digits}f}{spread}' + (f' ({len(vals)})' if len(vals) < 3 else '')


def sampling_error(percent, images):
    "Standard error of an accuracy from the choice of test images alone (binomial), in points"
    return math.sqrt(percent * (100 - percent) / images)


def markdown(header, rows):
    return '\n'.join(
        [
            '| ' + ' | '.join(header) + ' |',
            '|' + '---|' * len(header),
            *('| ' + ' | '.join(map(str, r)) + ' |' for r in rows),
        ]
    )


def side_by_side(first, names, rows):
    "Two columns for each name, the paper's and ours; `rows`: label and (paper, ours) for each name"
    header = [first, *(c for n in names for c in (f'{n}: paper', 'ours'))]
    return markdown(header, [[label, *(o for pair in pairs for o in pair)] for label, pairs in rows])


def end(x, bar=0.0):
    "An end of an interval, with the digits that tell on which side of the bar it is"
    side = lambda v: (v > bar) - (v < bar)
    digits = next((d for d in range(1, 9) if side(round(x, d)) == side(x)), 9)
    return f'{x:.{digits}f}'


@dataclass
class Comparison:
    "Two methods, seed by seed"

    where: str
    seeds: int  # That both have; what follows is None for fewer than two
    difference: float | None = None  # Mean over seeds
    error: float | None = None  # Standard error of the mean
    low: float | None = None  # Ends of the interval
    high: float | None = None
    verdict: str = "can't tell"
    elsewhere: int = 0  # Seeds that both have, on different machines: left out
    bar: float = 0.0  # What the difference has to exceed

    def __str__(self):
        if self.difference is None:
            why = 'on different machines' if self.elsewhere else 'one seed' if self.seeds else 'not run'
            return f'{self.where}: {why}'
        left_out = f', without {self.elsewhere} of different machines' if self.elsewhere else ''
        ends = f'{end(self.low, self.bar)} to {end(self.high, self.bar)}'
        return f'{self.where}: {self.difference:+.2f} ± {self.error:.2f} ({ends}){left_out}'


def compare(where, a, b, bar=0.0, floor=FLOOR, enough=2):
    """Is `a` above `b` by more than `bar`? Both are seed -> number; trainings on different machines are no pair. Fewer
    seeds than are enough decide nothing"""
    both = set(a) & set(b)
    pairs = sorted(s for s in both if machine_of(a, s) == machine_of(b, s))
    elsewhere = len(both) - len(pairs)
    if len(pairs) < 2:
        return Comparison(where, len(pairs), elsewhere=elsewhere)
    found = paired_verdict({s: a[s] for s in pairs}, {s: b[s] for s in pairs}, bar, floor, LEVEL)
    found = found if found.seeds >= enough else replace(found, verdict="can't tell")
    return Comparison(where, **asdict(found), elsewhere=elsewhere, bar=bar)


@dataclass
class Claim:
    text: str
    pairs: list  # (where, seed -> value of what is claimed to be better, seed -> value of what it is better than)
    no_worse: bool = False
    floor: float = FLOOR  # Where neither mean is above it, both have learned next to nothing
    control: 'Control | None' = None  # What must hold before there is a verdict
    lacks: str = ''  # What the trainings lack for a verdict, such as 'starts not searched'
    stands: str = ''  # The verdict that what they lack could not change, such as 'holds'
    of_paper: bool = True  # Or a claim of ours
    enough: int = 2  # Seeds that decide a comparison

    @cached_property
    def comparisons(self):
        bar = -MARGIN if self.no_worse else 0.0
        return [compare(w, a, b, bar, self.floor, self.enough) for w, a, b in self.pairs]

    @property
    def compared(self):
        "Those that have enough seeds"
        return [c for c in self.comparisons if c.difference is not None]

    @property
    def found(self):
        "What the comparisons say, whatever the control says"
        verdicts = [c.verdict for c in self.compared]
        if not verdicts:
            return 'not run'
        if "doesn't" in verdicts:
            return "doesn't"
        return 'holds' if all(v == 'holds' for v in verdicts) else "can't tell"

    @property
    def problem(self):
        "Why there is no verdict, or ''"
        lacks = '' if self.found == self.stands else self.lacks
        return lacks or (self.control.problem if self.control else '')

    def kind(self, scale=''):
        "One of `KINDS`, but for 'holds in part': see `counted`"
        if self.found == 'not run':
            return 'not run'
        if self.problem:
            return 'no verdict'
        return "can't tell" if scale == 'tiny' else self.found

    def counted(self, scale=''):
        "One of `KINDS`: a claim that holds, but of which not all was compared, holds in part"
        kind = self.kind(scale)
        return 'holds in part' if kind == 'holds' and len(self.compared) < len(self.pairs) else kind

    def verdict(self, scale=''):
        """With the reason where there is none, how many comparisons hold if some do and others don't, and what was
        compared if that is less than all of the claim"""
        kind, compared = self.kind(scale), self.compared
        holds = sum(c.verdict == 'holds' for c in compared)
        text = kind
        if kind == 'no verdict':
            text = f'no verdict: {self.problem}'
        elif scale != 'tiny' and 0 < holds < len(compared):
            text = f'{kind}, {holds} of {len(compared)} hold{"s" * (holds == 1)}'
        return text + (f' ({", ".join(c.where for c in compared)})' if 0 < len(compared) < len(self.pairs) else '')

    @property
    def evidence(self):
        return '; '.join(map(str, self.comparisons))


@dataclass
class Control:
    "A claim, usually that something is no worse, without which another claim gets no verdict"

    claim: Claim
    fails: str  # What is so where it doesn't hold

    @property
    def problem(self):
        found = self.claim.found
        if found == 'holds':
            return ''
        reasons = {'not run': 'control not run', "doesn't": self.fails}
        return reasons.get(found, f"can't tell whether {self.fails}")


def line(ax, xs, groups, label, **kwargs):
    """Means with their standard deviations, where there are any. Where `xs` are names, what is added later stands
    further right at each, to be seen"""
    places, at = xs, [i for i, g in enumerate(groups) if g]
    if xs and isinstance(xs[0], str):
        places = [i + 0.05 * (len(ax.containers) - 3) for i in range(len(xs))]
        ax.set_xticks(range(len(xs)), xs)
        ax.set_xlim(-0.5, len(xs) - 0.5)
    if at:
        ax.errorbar(
            [places[i] for i in at],
            [mean(groups[i]) for i in at],
            [statistics.stdev(groups[i].values()) if len(groups[i]) > 1 else 0 for i in at],
            marker='o',
            ms=3,
            capsize=2,
            lw=1,
            label=label,
            **kwargs,
        )


def run_at(df, sparsities):
    "Those of `sparsities` that anything was run at"
    return [s for s in sparsities if ((df.sparsity - s).abs() < 1e-9).any()]


def line_over(ax, df, sparsities, method, label, **kwargs):
    "A method's accuracies, at those of `sparsities` that anything was run at"
    at = run_at(df, sparsities)
    line(ax, [f'{100 * s:g}' for s in at], [values(df, method, s) for s in at], label, **kwargs)
