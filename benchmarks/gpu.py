"""One stage of `benchmarks/gpu.sh`: `python benchmarks/gpu.py STAGE --device cuda --out FOLDER --limit SECONDS`.
`--small` tries it with small sizes, also on a CPU. `python benchmarks/gpu.py collect --out FOLDER` moves the rows of a
finished run to the CSV files beside this script, and `python benchmarks/gpu.py summary --out FOLDER` prints what failed
and the targets"""

import argparse
import os
import time
import traceback
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
SHOWN = 30  # failures in the summary


def stage(name, device, small, out, limit):
    "Run a stage; its own row of checks.csv says how it ended"
    from gpu_stages import STAGES
    from gpu_stages.run import Run

    start = time.monotonic()
    run = Run(device, small, out, start + limit)
    check, ended = run.checks('stages'), 'ended'
    check(name, 'begun')
    try:
        STAGES[name](run)
    except Exception as e:
        traceback.print_exc()
        ended = f'FAILED: {type(e).__name__}: {e}'[:300]
    check(name, ended, f'{time.monotonic() - start:.0f} s')
    return ended != 'ended'


def collect(out):
    "Rows of GPUs in a folder, in place of the rows beside this script with the same device and key"
    from common import KEYS, here, read_rows, write_rows

    for name, keys in KEYS.items():
        new = [r for r in read_rows(Path(out) / f'{name}.csv') if r['device'] != 'cpu']
        if new and name not in ('checks', 'tuning'):
            key = lambda r, keys=keys: [r.get(k, '') for k in ('device', *keys)]
            replaced = [key(r) for r in new]
            path = here / f'{name}.csv'
            write_rows(path, [*(r for r in read_rows(path) if key(r) not in replaced), *new])
            print(f'{name}.csv: {len(new)} rows')


def summary(out):
    "Failures, and targets"
    from common import read_rows
    from gpu_targets import verdicts

    rows = read_rows(Path(out) / 'checks.csv')
    results = {}
    for r in rows:
        results.setdefault(r['stage'], []).append(r['result'].split(':')[0])
    for name, found in results.items():
        print(f'{name}:', ', '.join(f'{found.count(r)} {r}' for r in dict.fromkeys(found)))
    failed = [r for r in rows if r['result'].startswith('FAILED')]
    for r in failed[:SHOWN]:
        print(f'FAILED {r["stage"]}: {r["case"]}: {r["detail"][:160]}')
    if len(failed) > SHOWN:
        print(f'... and {len(failed) - SHOWN} more in checks.csv')
    for what, limit, *found in verdicts(out):
        print(f'{what}: at most {limit}:', '; '.join(found) or 'not measured')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('stage')
    p.add_argument('--device', default='cuda')
    p.add_argument('--small', action='store_true')
    p.add_argument('--out', default='.')
    p.add_argument('--limit', type=float, default=460)
    a = p.parse_args()
    if a.stage in ('collect', 'summary'):
        {'collect': collect, 'summary': summary}[a.stage](a.out)
    else:
        if a.device == 'cpu' and a.stage in ('tuning', 'skinny'):
            os.environ['TRITON_INTERPRET'] = '1'  # before anything imports triton
        raise SystemExit(stage(a.stage, a.device, a.small, a.out, a.limit))
