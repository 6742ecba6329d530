"""Fill the tables of the papers: `python benchmarks/paper/run.py --scale tiny`. What is finished in the CSV is not run
again; RESULTS.md is made from it at the end. A table alone: `python benchmarks/paper/run.py ocp_table2 --scale
small`"""

import argparse
from pathlib import Path

import torch
from fastai.basics import URLs, untar_data
from harness import METHODS, SCALES, SEARCHES, Results, Runner, here, of_scale, read
from joblib import cpu_count
from report import report_on
from tables import TABLES, tables_at


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('tables', nargs='*', metavar='TABLE', help=f"tables to fill, all if none is given: {', '.join(TABLES)}")
    scales = [s for s in SCALES if s != 'gpu']  # gpu_tables.py fills that
    add('--scale', choices=scales, default='tiny', help='how much smaller than in the papers (default: tiny)')
    add('--full', action='store_const', dest='scale', const='full', help="the papers' own setting")
    add(
        '--data',
        default='~/cifar10',
        help="folder with train/class/image and test/class/image, or 'download' (default: ~/cifar10)",
    )
    add(
        '--out',
        default=here / 'results.csv',
        type=Path,
        help='CSV to add to; RESULTS.md and the figures come beside it',
    )
    add(
        '--workers', type=int, help='trainings at a time (default: one a core; with a GPU one for two cores, at most 8)'
    )
    add('--sparsity', type=float, nargs='+', help='cells of these sparsities alone, such as 0.98 0.99, and dense ones')
    add('--seeds', type=int, nargs='+', help='cells of these seeds alone, such as 0 1')
    add('--methods', nargs='+', help="cells of these methods alone, as the CSV names them, such as gradual cyclical")
    add(
        '--cache',
        type=Path,
        help='folder of the trained networks that methods start from (default: cache, beside the CSV)',
    )
    o = parser.parse_args()
    for t in o.tables:
        if t not in TABLES:
            parser.error(f"there is no table {t!r}: use any of {', '.join(TABLES)}")
    fit = tables_at(SCALES[o.scale])
    for t in o.tables:
        if t not in fit:
            parser.error(f"{t} is not run at --scale {o.scale}: use any of {', '.join(fit)}, or another scale")
    o.tables = o.tables or fit
    if o.workers is None:
        o.workers = max(1, min(8, cpu_count() // 2)) if torch.cuda.is_available() else cpu_count()
    if o.workers < 1:
        parser.error(f'--workers {o.workers}: needs at least 1')
    for s in o.sparsity or ():
        if not 0 < s < 1:
            parser.error(f'--sparsity {s:g}: needs a fraction of zeros in (0,1)')
    if o.out.suffix != '.csv' or o.out.is_dir():
        parser.error(f'--out {o.out}: needs a name that ends in .csv')
    if any(p.exists() and not p.is_dir() for p in o.out.parents):
        parser.error(f'--out {o.out}: is below a file')
    try:
        df = read(o.out)
    except ValueError as e:
        parser.error(f'--out {e}')
    if o.seeds:
        scale = SCALES[o.scale]
        df = of_scale(df, scale)
        most = max(
            [
                scale.seeds - 1,
                *(c.seed for t in o.tables for c in TABLES[t].cells(scale, df) if not c.method.startswith(SEARCHES)),
            ]
        )
        for s in o.seeds:
            if not 0 <= s <= most:
                parser.error(f'--seeds {s}: {o.scale} has 0 to {most}')
    for m in o.methods or ():
        if m.partition(' at ')[0] not in METHODS:
            parser.error(f"--methods {m!r}: there is no such method; use any of {', '.join(METHODS)}")
    o.data = untar_data(URLs.CIFAR) if o.data == 'download' else Path(o.data).expanduser()
    if not o.data.is_dir():
        parser.error(
            (
                f"--data {o.data}: there is no such folder; it needs train/class/image and test/class/image. "
                "'--data download' fetches CIFAR-10"
            )
        )
    return o


def asked(cell, o):
    "Is it one of the cells that the options leave? Searches have seeds of their own"
    return not (
        o.sparsity
        and cell.sparsity not in (0.0, *o.sparsity)
        or o.seeds
        and cell.seed not in o.seeds
        and not cell.method.startswith(SEARCHES)
        or o.methods
        and not {cell.method, cell.method.partition(' at ')[0]} & set(o.methods)
    )


def chosen(table, scale, results, o):
    "The cells of a table that the options leave, and those that these need: all of them, if something is to be trained"
    cells = [c for c in table.cells(scale, results.rows(scale)) if asked(c, o)]
    needs = [c for c in table.needs(scale) if cells or o.methods and asked(c, o)]
    return cells, needs


def main():
    o = arguments()
    first = next((p for p in o.data.glob('*/*/*.*')), None)
    if first is None:
        raise SystemExit(f'--data {o.data}: there are no images in it')
    o.out.parent.mkdir(parents=True, exist_ok=True)
    scale, results = SCALES[o.scale], Results(o.out, first.suffix[1:])
    if not any(cells or needs for t in o.tables for cells, needs in [chosen(TABLES[t], scale, results, o)]):
        there = {c for t in o.tables for c in TABLES[t].cells(scale, results.rows(scale))}
        methods, sparsities = sorted({c.method for c in there}), sorted({c.sparsity for c in there})
        raise SystemExit(
            f'--sparsity, --seeds and --methods leave no cell of {", ".join(o.tables)}, which have, as far as searches '
            f'are done, the methods {", ".join(methods)} and the sparsities {", ".join(f"{s:g}" for s in sparsities)}'
        )
    try:
        with Runner(
            scale, o.data, results, o.workers, (o.cache or o.out.parent / 'cache' / o.out.stem) / results.files
        ) as runner:
            for table in [TABLES[t] for t in o.tables]:
                finished = None
                while finished != (finished := len(results.finished())):  # what came out may ask for more cells
                    cells, needs = chosen(table, scale, results, o)
                    runner.fill(needs if runner.todo(cells) else [c for c in needs if asked(c, o)], cells)
    finally:  # also of what was stopped, or lost a process
        print(f'{len(results.finished())} cells in {o.out}, shown in {report_on(o.out)}')
    if runner.failed:
        raise SystemExit(f'{len(runner.failed)} cells failed')


if __name__ == '__main__':
    main()
