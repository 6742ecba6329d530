"RESULTS.md and its figures, from the CSV alone: `python benchmarks/paper/report.py`"

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from harness import SCALES, about, here, read
from tables import TABLES
from tell import RULE, markdown


def sections(df):
    "(table's name, table, scale, its rows) for each table and scale; the tiny scale where there is no other"
    order = list(reversed(SCALES))
    for name, table in TABLES.items():
        mine = table.mine(df)
        scales = sorted(
            dict.fromkeys(mine[about].itertuples(index=False, name=None)),
            key=lambda s: order.index(s[0]) if s[0] in order else -1,
        )
        for s in [s for s in scales if s[0] != 'tiny'] or scales:
            yield name, table, s[0], mine[(mine[about] == list(s)).all(axis=1)]


def called(scale, rows):
    return f'{scale} ({rows.files.iloc[0]})'


def picture(short, scale, rows):
    return f'{short}_{scale}_{rows.files.iloc[0]}.png'


def told(df):
    "One line on how it was run"
    first = df[df.what == 'accuracy']
    hours = first.seconds.sum() / 3600
    count = lambda n, what: f"{n} {what}{'s' if n > 1 else ''}"
    pruned = first[~first.method.str.match('dense(,|$)')]
    epochs = ', '.join(map(str, sorted({int(e) for e in pruned.epochs})))
    seeds = (first if pruned.empty else pruned).groupby(['method', 'sparsity', 'epochs']).seed.nunique()
    each = f'epochs of one (or of a round): {epochs}; ' if epochs else ''
    least = f'{seeds.min()} to ' if seeds.min() < seeds.max() else ''
    return (
        f"{count(len(first), 'training')} (or chains of rounds); "
        f"{each}{least}{count(seeds.max(), 'seed')}; "
        f"{hours:.2g} hours in all. "
        f"Machine: {'. And: '.join(sorted(set(df.machine)))}. Commits (+: with changes): "
        f"{', '.join(dict.fromkeys(df.commit))}"
    )


def settings(df):
    "The scales that there are rows of, from the rows"
    return [
        [
            f'{v:,}' if k in ('images', 'test') else f'{v:g}' if k in ('batch', 'times') else v
            for k, v in zip(about, s, strict=True)
        ]
        for s in dict.fromkeys(df[about].itertuples(index=False, name=None))
    ]


def comparable(table, rows):
    "Claims that something was compared for"
    return [c for c in table.claims(rows) if any(d is not None for _, d, *_ in c.each())]


def verdict(claim, scale):
    """With what was compared, if that is less than all of the claim, and how many comparisons hold, if some do and
    others don't"""
    told = [(where, v) for where, d, _, v in claim.each() if d is not None]
    held = sum(v == 'holds' for _, v in told)
    some = f', {held} of {len(told)} hold{"s" * (held == 1)}' if 0 < held < len(told) else ''
    of = f' ({", ".join(where for where, _ in told)})' if len(told) < len(claim.pairs) else ''
    return ("can't tell at this scale" if scale == 'tiny' else claim.verdict + some) + of


def text_of(df, name, folder):
    "The page; `folder` is where its pictures are"
    parts, summary, before = [], [], None
    for short, table, scale, rows in sections(df):
        claims = [(c, verdict(c, scale)) for c in comparable(table, rows)]
        for c, v in claims:
            summary.append([table.title.split(':')[0], c.text, called(scale, rows), v])
        if table is not before:
            parts += [f'## {table.title}', f'{table.source}.', *getattr(table, 'notes', ())]
        parts += [f'### Scale {called(scale, rows)}', f'{told(rows)}.', *table.show(rows)]
        if claims:
            parts += [
                markdown(
                    ['claim', 'verdict', 'difference (spread s)'], [[c.text, f'**{v}**', c.evidence] for c, v in claims]
                ),
                f'![{table.title}, scale {called(scale, rows)}]({folder}/{picture(short, scale, rows)})',
            ]
        else:
            parts.append('Too little was run to compare.')
        before = table
    head = f"""# The papers' tables

Made by `python benchmarks/paper/report.py` from `{name}`, which `python benchmarks/paper/run.py --scale NAME` \
adds to. Values are test accuracies in percent, mean ± standard deviation over seeds (how many, if fewer than \
three). Layers are in bfloat16, with
weights, masks and losses in float32; all in float32 where the machine has no fast bfloat16, and a ResNet-18 on \
a CPU, which is faster so; the machine says it. Long trainings on a CPU are compiled, which the machine says \
too: the same network, rounded in other places. Where `files` are png, they are CIFAR-10 as it is; jpg, after \
JPEG at quality 75, which costs accuracy: compare methods with each other, not values with the papers'.

**Scales** shrink the papers' setting for every method alike. `images`, `test`: how many to train and to test \
on. `batch`: images in a batch, times the papers'. `times`: epochs, times the papers'. `dense`: epochs of the \
trained ResNet-20 that
methods start from. `pixels`: a side, where a paper scales images up to 224. `rounds` of pruning: at most so \
many. `files`: what images are kept as; in brackets behind a scale's name below. Learning rates of the pruned \
trainings are the papers' at every scale, where they give them (ours in BIMP, CST and for the trained network).

{markdown(about, settings(df))}

{RULE}

Shown are all scales that were run, the largest first; *tiny*, which is there to try that everything runs, only \
where there is no other: most of its networks have learned next to nothing.

## Claims

{markdown(['paper', 'claim', 'scale', 'verdict'], summary)}
"""
    return '\n\n'.join([head.strip(), *parts]) + '\n'


def draw(df, folder):
    folder.mkdir(exist_ok=True, parents=True)
    drawn = set()
    for short, table, scale, rows in sections(df):
        if not comparable(table, rows):
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
        if old.name not in drawn:
            old.unlink()


def report_on(path):
    "RESULTS.md beside results.csv; for another file, a page of its name. Returns its path"
    usual = path.name == 'results.csv'
    df, folder = read(path), path.parent / ('figures' if usual else f'{path.stem}_figures')
    draw(df, folder)
    page = path.parent / ('RESULTS.md' if usual else f'{path.stem}.md')
    page.write_text(text_of(df, path.name, folder.name))
    return page


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--csv', type=Path, default=here / 'results.csv', help='what run.py has written')
    o = parser.parse_args()
    if not o.csv.exists():
        parser.error(f'--csv {o.csv}: there is no such file; run.py writes it')
    report_on(o.csv)
