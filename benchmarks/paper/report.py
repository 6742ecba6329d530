"RESULTS.md and its figures, from the CSV alone: `python benchmarks/paper/report.py`"

import argparse
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import airbench
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import not_run
import numpy as np
import pandas as pd
from harness import SCALES, SEARCHES, about, columns, here, read
from tables import TABLES
from tell import KINDS, RULE, Claim, markdown, ours, sampling_error, values

QUICK, ENOUGH = 300, 5  # Trainings of fewer seconds need as many seeds
OURS = 'our own claims'
COLOURS = {'holds': 'tab:green', "doesn't": 'tab:red', "can't tell": 'grey', 'no verdict': 'grey'}


def at_scales(df, table):
    "(scale, its rows of a table), the largest first; the tiny scale where there is no other"
    order, mine = list(reversed(SCALES)), table.mine(df)
    scales = sorted(
        dict.fromkeys(mine[about].itertuples(index=False, name=None)),
        key=lambda s: order.index(s[0]) if s[0] in order else len(order),
    )
    for s in [s for s in scales if s[0] != 'tiny'] or scales:
        yield s[0], mine[(mine[about] == list(s)).all(axis=1)]


@dataclass
class Judged:
    "A claim, and where its verdict comes from"

    table: object
    claim: Claim
    scale: str = ''
    section: str = ''  # The scale and the files, as `called`; '' where nothing was run
    others: list = field(default_factory=list)  # (section, verdict) at other scales

    @property
    def paper(self):
        return self.table.title.split(':')[0].split(',')[0]

    @property
    def kind(self):
        return self.claim.kind(self.scale)

    def kind_of(self, comparison):
        "What a comparison is drawn as: its own verdict, where its claim has one"
        return self.kind if self.kind == 'no verdict' or self.scale == 'tiny' else comparison.verdict

    @property
    def verdict(self):
        return self.claim.verdict(self.scale)


def judged(df):
    """Each claim of each table, at the largest scale where it was compared and nothing keeps it from a verdict; where
    there is none, at the largest where it was compared"""
    for table in TABLES.values():
        found = {c.text: Judged(table, c) for c in table.claims(pd.DataFrame(columns=columns))}
        for scale, rows in at_scales(df, table):
            enough = ENOUGH if quickest(trainings_of(rows)) < QUICK else 2
            for c in table.claims(rows):
                for claim in (c, c.control.claim) if c.control else (c,):
                    claim.enough = enough
                larger, section = found.get(c.text), called(scale, rows)
                if not c.compared:
                    continue
                if larger and larger.section and (c.problem or not larger.claim.problem):
                    larger.others.append((section, c.verdict(scale)))
                    continue
                others = [(larger.section, larger.verdict), *larger.others] if larger and larger.section else []
                found[c.text] = Judged(table, c, scale, section, others)
        yield from found.values()


def sections(df, claims):
    """(table's name, table, scale, its rows, its claims): the scales that verdicts come from, the largest first; where
    there are none, the largest that was run. Only the first has a picture"""
    for name, table in TABLES.items():
        at = [(s, rows) for s, rows in at_scales(df, table) if has_more_than_searches(rows)]
        mine = [j for j in claims if j.table is table]
        useful = [(s, rows) for s, rows in at if any(j.section == called(s, rows) for j in mine)]
        for s, rows in useful or at[:1]:
            yield name, table, s, rows, [j for j in mine if j.section == called(s, rows)]


def called(scale, rows):
    "The scale, the files, and what is another than the scale has now"
    first, now = rows.iloc[0], SCALES.get(scale)
    others = [f'{f} {first[f]:g}' for f in about[1:-1] if now and first[f] != getattr(now, f)]
    return f'{scale} ({", ".join([first.files, *others])})'


def network_of(rows):
    "What is trained, as one writes it: ResNet-18"
    name = rows.model.iloc[0]
    return "airbench's network" if name == airbench.NAME else name.replace('resnet', 'ResNet-')


def picture(short, scale, rows):
    return f'{short}_{re.sub("[^-A-Za-z0-9.]+", "_", called(scale, rows)).strip("_")}.png'


def count(n, what):
    return f"{n} {what}{'s' if n > 1 else ''}"


def seeds_of(counts):
    "How many seeds there are: 5 seeds, 3 to 5 seeds"
    return f'{counts.min()} to ' * bool(counts.min() < counts.max()) + count(counts.max(), 'seed')


def trainings_of(df):
    "The final accuracies of a table, without those of searches and, if there are others, of dense networks"
    shown = df[(df.what == 'accuracy') & (df.step == '') & ~df.method.str.startswith(SEARCHES)]
    pruned = shown[~shown.method.str.match('dense(,|$)')]
    return shown if pruned.empty else pruned


def quickest(df):
    "Seconds of a training of the quickest method: the median of its seeds"
    return df.groupby(['method', 'sparsity', 'epochs']).seconds.median().min()


def told(df):
    "How it was run"
    first, pruned = df[(df.what == 'accuracy') & (df.step == '')], trainings_of(df)
    seeds = pruned.groupby(['method', 'sparsity', 'epochs']).seed.nunique()
    epochs = ', '.join(map(str, sorted({int(e) for e in pruned.epochs})))
    seconds, middle, images = quickest(pruned), pruned.value.median(), int(df.test.iloc[0])
    parts = [
        f'{count(len(first), "training")} (or chains of rounds), {first.seconds.sum() / 3600:.2g} hours in all; '
        f'epochs of one (or of a round): {epochs}; {seeds_of(seeds)}',
        f'The test set, {images:,} images, alone leaves a standard error of '
        f'{sampling_error(middle, images):.1f} points at {middle:.0f}%',
        f'Machine: {". And: ".join(sorted(set(df.machine)))}',
    ]
    if seconds < QUICK and seeds.min() < ENOUGH:
        parts.insert(
            1,
            f'The quickest method takes {seconds:.0f} seconds for a training: fewer than {ENOUGH} seeds decide nothing',
        )
    return '. '.join(parts) + '.'


def has_more_than_searches(df):
    return not df.method.str.startswith(SEARCHES).all()


def has_pruned(df):
    return bool((df.sparsity > 0).any())


def ran(scale, df):
    "A scale and its seeds, and the method if there is but one"
    seeds = df[(df.sparsity > 0) & ~df.method.str.startswith(SEARCHES)].groupby(['method', 'sparsity']).seed.nunique()
    methods = {m for m, _ in seeds.index}
    alone = f'{methods.pop()} alone, ' if len(methods) == 1 else ''
    return f'{scale} ({alone}{seeds_of(seeds)})' if len(seeds) else f'{scale} (searches)'


def settings(df):
    "The scales that rows are of, from the rows"
    return [
        [
            f'{v:,}' if k in ('images', 'test') else f'{v:g}' if k in ('batch', 'times') else v
            for k, v in zip(about, s, strict=True)
        ]
        for s in dict.fromkeys(df[about].itertuples(index=False, name=None))
    ]


def counts(claims):
    "Markdown: verdicts by paper"
    groups = {j.paper: [] for j in claims} | {OURS: []}
    for j in claims:
        if j.claim.of_paper or j.claim.compared:
            groups[j.paper if j.claim.of_paper else OURS].append(j.claim.counted(j.scale))
    ours = groups.pop(OURS)
    groups |= {'**all**': [k for kinds in groups.values() for k in kinds], OURS: ours}
    return markdown(
        ['paper', 'claims', *KINDS], [[p, len(kinds), *map(kinds.count, KINDS)] for p, kinds in groups.items()]
    )


def alone(table, df, shown):
    "A line on scales that are not shown, since a single method was pruned there"
    parts = []
    for scale, rows in at_scales(df, table):
        found = rows[(rows.sparsity > 0) & (rows.what == 'accuracy') & (rows.step == '')]
        if called(scale, rows) in shown or found.method.nunique() != 1 or not has_more_than_searches(found):
            continue
        dense = values(rows, 'dense', 0.0)
        parts += [
            f'{called(scale, rows)}: {m} at {100 * s:g}%, {count(e, "epoch")}: {ours(values(rows, m, s, epochs=e))}'
            + f' (dense {ours(dense)})' * bool(dense)
            for m, s, e in dict.fromkeys(found[['method', 'sparsity', 'epochs']].itertuples(index=False, name=None))
        ]
    return f'Run alone, so that there is nothing to compare: {"; ".join(parts)}.' if parts else ''


def claims_table(claims):
    return markdown(
        ['claim', 'verdict', 'difference ± standard error (90% interval)', 'at other scales'],
        [
            [
                "Not the paper's: " * (not j.claim.of_paper) + j.claim.text,
                f'**{j.verdict}**',
                j.claim.evidence,
                '; '.join(f'{where}: {kind}' for where, kind in j.others),
            ]
            for j in claims
        ],
    )


def text_of(df, name, folder, every):
    "The page; `folder` is where its pictures are, `every` has each claim as it is judged"
    parts, before = [], None
    shown_at = list(sections(df, every))
    for short, table, scale, rows, claims in shown_at:
        first = table is not before
        if first:
            notes = getattr(table, 'notes', ())
            parts += [f'## {table.title}', f'{table.source}.']
            parts += ['\n'.join(f'- {n}' for n in notes)] if len(notes) > 1 else notes
            if missing := [j.claim.text for j in every if j.table is table and not j.section and j.claim.of_paper]:
                parts.append(f'Claims that were not run: {"; ".join(missing)}.')
            of_table = {called(s, r) for _, t, s, r, _ in shown_at if t is table}
            parts += [line] if (line := alone(table, df, of_table)) else []
        first_line, *shown = table.show(rows)
        heading = f'**Scale {called(scale, rows)}, {network_of(rows)}.** {told(rows)}'
        parts += [heading, first_line] if first_line.startswith('|') else [f'{heading} {first_line}']
        parts += shown
        parts.append(claims_table(claims) if claims else 'Too little was run to compare.')
        if first and claims:
            words = table.title.split(':')[0]
            parts.append(f'![{words}, scale {called(scale, rows)}]({folder}/{picture(short, scale, rows)})')
        before = table
    scales = {n: [ran(s, rows) for s, rows in at_scales(df, t) if has_pruned(rows)] for n, t in TABLES.items()}
    head = f"""# The papers' tables

![The claims' differences with their 90% intervals]({folder}/claims.png)

{counts(every)}

One verdict a claim, from the largest scale where it was compared and nothing keeps it from one. Each point of the \
picture is one comparison; green: it holds; red: it doesn't; grey: can't tell; hollow: no verdict, \
since a control failed or a method was not given its chance. Our own claims, and those in other units than \
points of accuracy, are not drawn. *Not run* counts claims of the tables that are run here; tables that are not are \
listed below.

## What was not run

{not_run.table(scales)}

{not_run.rest(df, TABLES)}## How to read this page

`python benchmarks/paper/report.py` makes it from `{name}`, which `python benchmarks/paper/run.py --scale NAME` adds \
to. Values are test accuracies in percent, mean ± standard deviation over seeds (how many, if fewer than three). \
Layers are in bfloat16, with weights, masks and losses in float32; where a machine is listed with "layers in float32", \
all is. Some tables have cells of several machines, which only the claims keep apart: they pair no two machines. \
Where `files` are png, they are \
CIFAR-10 as it is; jpg, after JPEG at quality 75, which costs accuracy: compare methods with each other, not values \
with the papers'.

{RULE}

**Scales** shrink the papers' setting for every method alike. `images`, `test`: how many to train and to test on. \
`batch`: images in a batch, times the papers'. `times`: epochs, times the papers'. `dense`: epochs of the trained \
network that methods start from. `pixels`: a side, where a paper scales images up to 224. `rounds` of tickets: at \
most so many. `files`: what images are kept as. Learning rates of the pruned trainings are the papers' at every scale, \
where they give them (ours in BIMP, CST and for the trained network). Shown are the scales that verdicts come from; \
the CSV has all.

{markdown(about, settings(pd.concat([rows for _, _, _, rows, _ in shown_at] or [df])))}
"""
    return '\n\n'.join([head.strip(), *parts]) + '\n'


def draw_claims(claims, path):
    "Each comparison of the papers' claims, with its interval; a line of its own for each paper's name"
    shown = [j for j in claims if j.claim.of_paper and j.claim.floor >= 0 and j.claim.compared]
    lines = [
        o for paper in dict.fromkeys(j.paper for j in shown) for o in (paper, *(j for j in shown if j.paper == paper))
    ]
    fig, ax = plt.subplots(figsize=(8.5, 1.2 + 0.21 * max(1, len(lines))), layout='constrained')
    for y, j in enumerate(lines):
        if isinstance(j, Judged):
            draw_comparisons(ax, y, j)
    ax.set_xscale('function', functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
    ax.axvline(0, color='k', lw=0.8)
    ax.axvline(-1, color='k', lw=0.5, ls=':')
    ends = [x for j in shown for c in j.claim.compared for x in (c.low, c.high)]
    low, high = min(-30, *ends, 0), max(30, *ends, 0)
    ticks = [x for x in (-80, -40, -20, -10, -5, -1, 0, 1, 5, 10, 20, 40, 80) if low <= x <= high]
    ax.set_xticks(ticks, map(str, ticks), fontsize=7)
    ax.set_xlim(1.02 * low, 1.02 * high)
    labels = [o if isinstance(o, str) else textwrap.shorten(o.claim.text, 72, placeholder=' …') for o in lines]
    for label, o in zip(ax.set_yticks(range(len(lines)), labels, fontsize=7), lines, strict=True):
        label.label1.set_fontweight('bold' if isinstance(o, str) else 'normal')
    ax.tick_params(axis='y', length=0)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.set_xlabel(
        'points, in the direction that the paper claims; 90% intervals; dotted: -1 point, the bar for no worse',
        fontsize=7,
    )
    marks = [
        ax.plot([], [], 'o', ms=4, color=colour, mfc='white' if kind == 'no verdict' else colour, label=kind)[0]
        for kind, colour in COLOURS.items()
    ]
    fig.legend(handles=marks, loc='outside upper right', ncols=len(marks), fontsize=7, frameon=False)
    ax.grid(axis='x', alpha=0.3)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_comparisons(ax, y, judged):
    "All of a claim, around the same height"
    cs = judged.claim.compared
    size = 3.5 if len(cs) < 7 else 2
    for i, c in enumerate(cs):
        at, colour = y + 0.7 * ((i + 0.5) / len(cs) - 0.5), COLOURS[judged.kind_of(c)]
        ax.plot([c.low, c.high], [at, at], color=colour, lw=size / 4)
        ax.plot(c.difference, at, 'o', ms=size, color=colour, mfc='white' if judged.kind == 'no verdict' else colour)


def draw(df, folder, every):
    folder.mkdir(exist_ok=True, parents=True)
    drawn = {'claims.png'}
    before = None
    draw_claims(every, folder / 'claims.png')
    for short, table, scale, rows, claims in sections(df, every):
        is_first, before = table is not before, table
        if not claims or not is_first:
            continue
        fig, ax = plt.subplots(figsize=(5.2, 3), layout='constrained')
        table.figure(rows, ax)
        ax.set_title(f'{table.title.split(":")[0]}: scale {called(scale, rows)}', fontsize=9)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize='x-small', loc='center left', bbox_to_anchor=(1, 0.5))
        ax.grid(alpha=0.3)
        fig.savefig(folder / picture(short, scale, rows), dpi=90)
        plt.close(fig)
        drawn.add(picture(short, scale, rows))
    for old in folder.glob('*.png'):
        if old.name not in drawn and old.name.startswith(tuple(f'{name}_' for name in TABLES)):
            old.unlink()


def report_on(path):
    "RESULTS.md beside results.csv; for another CSV, a page of its name. Returns its path"
    usual = path.name == 'results.csv'
    df, folder = read(path), path.parent / ('figures' if usual else f'{path.stem}_figures')
    every = list(judged(df))
    draw(df, folder, every)
    page = path.parent / ('RESULTS.md' if usual else f'{path.stem}.md')
    page.write_text(text_of(df, path.name, folder.name, every))
    return page


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--csv', type=Path, default=here / 'results.csv', help='what run.py has written')
    o = parser.parse_args()
    if not o.csv.is_file() or o.csv.suffix != '.csv':
        parser.error(f'--csv {o.csv}: there is no such CSV; run.py writes it')
    try:
        report_on(o.csv)
    except ValueError as e:
        parser.error(f'--csv {e}')
