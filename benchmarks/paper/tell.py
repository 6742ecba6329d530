"What tables are told with: numbers out of the CSV, Markdown, and verdicts on claims"

import math
import statistics
from dataclasses import dataclass


def values(df, method, sparsity=None, what='accuracy', step='', epochs=None):
    "A number for each seed, by seed"
    at = (df.method == method) & (df.what == what) & (df.step == str(step))
    if sparsity is not None:
        at &= (df.sparsity - sparsity).abs() < 1e-9
    if epochs is not None:
        at &= df.epochs == epochs
    return df[at].sort_values('seed').value.tolist()


def rows_of(df, model, methods):
    return df[(df.model == model) & df.method.isin(methods)]


def steps(df, method, what):
    return sorted({int(s) for s in df[(df.method == method) & (df.what == what)].step})


def ours(vals, digits=2):
    "Mean and standard deviation, with the number of seeds where there are fewer than three"
    if not vals:
        return '–'
    return (
        f'{statistics.mean(vals):.{digits}f}'
        + (f' ± {statistics.stdev(vals):.{digits}f}' if len(vals) > 1 else '')
        + (f' ({len(vals)})' if len(vals) < 3 else '')
    )


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


RULE = """**The rule.** A claim is one or more comparisons of two means over seeds. Let d be their difference, \
in the direction that the paper claims, and s the spread of it, the root of the sum of
the two variances over seeds. *holds*: d > s in every comparison. *doesn't*: d < -s in some comparison. *can't \
tell at this scale*: anything else; also where nothing has two seeds, where neither accuracy is
above 20%, twice chance, and all of the scale *tiny*, with its 300 images to test on. Where some comparisons \
hold and others don't, it says how many do. In brackets: what was compared, where that is less than the claim; \
the verdict is on that. A claim that one is *no worse* than another holds if d > s, or d ≥ -s and s is below 2 \
points, and doesn't if d < -s. Claims of which nothing was compared are not listed."""

FLOOR = 20.0


@dataclass
class Claim:
    text: str
    pairs: list  # (where, values of what is claimed to be better, values of what it is better than)
    no_worse: bool = False
    # Neither mean is above it: they have learned next to nothing, and nothing can be told; twice chance for accuracy
    # on ten classes
    floor: float = FLOOR

    def each(self):
        "(where, difference, spread, verdict) of each comparison"
        for where, a, b in self.pairs:
            if min(len(a), len(b)) < 2:
                yield where, None, None, "can't tell"
            else:
                d, s = (
                    statistics.mean(a) - statistics.mean(b),
                    math.sqrt(statistics.variance(a) + statistics.variance(b)),
                )
                low = max(statistics.mean(a), statistics.mean(b)) <= self.floor
                yield (
                    where,
                    d,
                    s,
                    "can't tell"
                    if low
                    else "doesn't"
                    if d < -s
                    else 'holds'
                    if d > s or self.no_worse and s < 2
                    else "can't tell",
                )

    @property
    def verdict(self):
        "Of what was compared"
        each = [v for _, d, _, v in self.each() if d is not None]
        return (
            "doesn't"
            if "doesn't" in each
            else 'holds'
            if each and all(v == 'holds' for v in each)
            else "can't tell at this scale"
        )

    @property
    def evidence(self):
        return '; '.join(
            f'{w}: too few seeds' if d is None else f'{w}: {d:+.2f} (s {s:.2f})' for w, d, s, _ in self.each()
        )


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
            [statistics.mean(groups[i]) for i in at],
            [statistics.stdev(groups[i]) if len(groups[i]) > 1 else 0 for i in at],
            marker='o',
            ms=3,
            capsize=2,
            lw=1,
            label=label,
            **kwargs,
        )


def line_over(ax, df, sparsities, method, label, **kwargs):
    "A method's accuracies, at those of `sparsities` that anything was run at"
    at = [s for s in sparsities if ((df.sparsity - s).abs() < 1e-9).any()]
    line(ax, [f'{100 * s:g}' for s in at], [values(df, method, s) for s in at], label, **kwargs)
