"What has to be reached on a GPU, and whether it was"

from pathlib import Path
from typing import NamedTuple

from common import here, read_rows

NOT_MEASURED = 'not measured: no GPU was at hand'


class Target(NamedTuple):
    "The largest value of a column in the rows that have these values"

    what: str
    table: str
    rows: dict
    column: str
    limit: float
    unit: str

    def found(self, rows, device):
        "The largest value on `device`, or None"
        of = {'device': device, **self.rows}
        values = [r[self.column] for r in rows if all(str(r.get(k, '')) == str(v) for k, v in of.items())]
        return max((float(v) for v in values if v), default=None)

    def verdict(self, value):
        if value is None:
            return 'not measured'
        return f'{value:g}{self.unit}, {"met" if value <= self.limit else "missed"}'


def _update(network, name, side, scope, ms):
    rows = dict(network=network, scope=scope, side=side)
    return Target(f'one update of {name}, {scope}: {side}', 'mask_update', rows, 'ms', ms, ' ms')


def _overhead(network, scope, interval, ratio):
    rows = dict(network=network, side=f'fastprune, {scope}, interval {interval}')
    what = f'`fit_one_cycle` over plain, {network}: {scope}, interval {interval}'
    return Target(what, 'overhead', rows, 'ratio', ratio, 'x')


def _billion(scope, column, limit, unit):
    rows = dict(weights=1006632960, scope=scope)
    what = f'masks of a billion weights, {scope}' + (': memory beside the weights' if unit != ' ms' else '')
    return Target(what, 'mask_update_growth', rows, column, limit, unit)


SCOPES = ('local', 'global')
UPDATES = ('a step of the engine', 'compute_masks and apply_')
LIMITS = {  # network -> interval -> overhead
    'ResNet-18, 32 px, batch 64, float32': {10: 1.03, 1: 1.10},
    'ResNet-50, 224 px, batch 64, bfloat16': {10: 1.02, 1: 1.05},
    'ViT-S, 224 px, batch 128, bfloat16': {10: 1.02, 1: 1.05},
}
TARGETS = (
    *(_update('resnet50', 'ResNet-50', side, s, 1.0) for side in UPDATES for s in SCOPES),
    *(_update('vit_large_patch16_224', 'ViT-L', side, s, 6.0) for side in UPDATES for s in SCOPES),
    *(_overhead(n, s, i, x) for n, limits in LIMITS.items() for i, x in limits.items() for s in SCOPES),
    *(_billion(s, 'ms', 20.0, ' ms') for s in SCOPES),
    *(_billion(s, 'bytes_per_weight', 1.5, ' bytes a weight') for s in SCOPES),
)


def devices(folder=here):
    "GPUs that have rows"
    tables = dict.fromkeys(t.table for t in TARGETS)
    rows = [r for t in tables for r in read_rows(Path(folder) / f'{t}.csv')]
    return list(dict.fromkeys(r['device'] for r in rows if r['device'] != 'cpu'))


def verdicts(folder=here):
    "(what, limit, a verdict for each device) of each target"
    tables = {t.table: read_rows(Path(folder) / f'{t.table}.csv') for t in TARGETS}
    for t in TARGETS:
        found = [t.verdict(t.found(tables[t.table], d)) for d in devices(folder)]
        yield t.what, f'{t.limit:g}{t.unit}', *found
