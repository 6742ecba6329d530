"`sparse_inference` beside other engines: milliseconds, ratios, and what was to be reached"

import pandas as pd

OURS, OURS_BF16 = 'sparse_inference', 'sparse_inference bf16'
SIDES = ('as it was', 'torch.compile', OURS, OURS_BF16, 'onnxruntime', 'OpenVINO float32', 'OpenVINO', 'DeepSparse')
RATIOS = {  # heading -> our sides, of which the fastest counts, and the other engine
    'ours / DeepSparse': ((OURS,), 'DeepSparse'),
    'ours / OpenVINO float32': ((OURS,), 'OpenVINO float32'),
    'ours / OpenVINO': ((OURS, OURS_BF16), 'OpenVINO'),
}
AHEAD = {'ours / DeepSparse': 14, 'ours / OpenVINO': 12}  # in how many of 20 cells
BEHIND = {'ours / DeepSparse': 1.5}  # the largest ratio


def times(rows):
    "A row for each network, sparsity and batch, with the milliseconds of each side, and our ratios to others"
    of = ['network', 'sparsity', 'batch']
    wide = rows.assign(ms=pd.to_numeric(rows.ms)).pivot_table(index=of, columns='side', values='ms', sort=False)
    wide = wide.reindex(columns=list(SIDES))
    for heading, (ours, other) in RATIOS.items():
        wide[heading] = wide[list(ours)].min(axis=1) / wide[other]
    return wide.reset_index()


def verdicts(wide):
    "(what, target, what was found, 'yes' or 'no') of each target"
    for heading, least in AHEAD.items():
        ratios = wide[heading].dropna()
        ahead = int((ratios < 1).sum())
        met = 'yes' if ahead >= least else 'no'
        yield f'cells in which {heading} is below 1', f'at least {least} of 20', f'{ahead} of {len(ratios)}', met
    for heading, most in BEHIND.items():
        ratios = wide[heading].dropna()
        late, top = int((ratios > most).sum()), ratios.max()
        met = 'yes' if top <= most else 'no'
        yield f'the largest {heading}', f'at most {most:g}', f'{top:.2f}, {late} of {len(ratios)} above', met


def missing(rows):
    "What sides without a time say: side -> its notes"
    rows = rows[pd.to_numeric(rows.ms).isna()]
    return {side: sorted(set(own.note)) for side, own in rows.groupby('side', sort=False)}


def differences(rows):
    "side -> the largest difference of its outputs, relative to the largest output"
    rows = rows.assign(off=pd.to_numeric(rows.relative_difference))
    top = rows[rows.off.notna()].groupby('side', sort=False).off.max()
    return {side: f'{off:.0e}' for side, off in top.items() if side != 'as it was'}


def versions(rows):
    "The engines besides torch, as their rows name them"
    return sorted({note.partition(',')[0] for note in rows[rows.side.isin(SIDES[4:])].note})
