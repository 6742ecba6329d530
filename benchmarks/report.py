"Makes README.md in this folder from the CSV files: `python benchmarks/report.py`"

import pandas as pd
from common import here

# fasterai's milliseconds on the machine that the targets were set on -> the targets there
TARGETS = {
    ('resnet18', 'local'): 25 / 83,
    ('resnet18', 'global'): 30 / 158,
    ('resnet50', 'local'): 50 / 165,
    ('resnet50', 'global'): 65 / 432,
}
SPEEDUPS = {  # (network, batch) -> how many times as fast as dense at 95%
    ('Transformer encoder', 1): 5,
    ('Transformer encoder', 16): 4,
    ('MLP', 1): 3,
    ('MLP', 16): 3,
    **{(n, b): 1.2 for n in ('mobilenet_v2', 'resnet50') for b in (1, 16)},
}


def read(name, **kwargs):
    return pd.read_csv(here / f'{name}.csv', **kwargs)


def table(df):
    lines = ['| ' + ' | '.join(map(str, row)) + ' |' for row in (df.columns, *df.itertuples(index=False))]
    return '\n'.join([lines[0], '|' + '---|' * len(df.columns), *lines[1:]])


def spaced(df):
    return df.rename(columns=lambda c: c.replace('_', ' '))


def met(ratios, targets):
    "For each row: 'yes' or 'no', empty where there is no target"
    answers = {True: 'yes', False: 'no'}
    return ['' if t == '' or pd.isna(t) else answers[r <= t] for r, t in zip(ratios, targets, strict=True)]


def overhead():
    df, limits = read('overhead'), {'interval 10': 1.05, 'interval 1': 1.30}
    df['target'] = [next((v for k, v in limits.items() if s.endswith(f', {k}')), '') for s in df.side]
    df['met'] = met(df.ratio, df.target)
    return f'''## Training with One-Cycle Pruning to 90% over plain training

ResNet-18, 32x32 images, batches of {df.bs[0]}, {df.batches[0]} batches a run, {df.runs[0]} runs of each side. `ratio`
is the median of the ratios run by run. The default interval is max(1, T//1000) in a training of T iterations. Its rows
are of a run of their own, of {df.batches.iloc[-1]} batches, and of parts of such trainings.

{table(df[['side', 'ms_per_batch', 'min', 'max', 'ratio', 'target', 'met']])}
'''


def updates(df):
    wide = df.pivot_table(index=['network', 'scores', 'scope'], columns='side', values='ms', sort=False).reset_index()
    wide['fasterai / fastprune'] = (wide.fasterai / wide.fastprune).round(2)
    dense = {(r.network, r.scope): r.fasterai for r in wide[wide.scores == 'dense'].itertuples()}
    wide['target'] = [round(TARGETS[k] * dense[k], 1) for k in zip(wide.network, wide.scope, strict=True)]
    wide['met'] = ['yes' if a <= b else f'no, {a / b:.2f}x' for a, b in zip(wide.fastprune, wide.target, strict=True)]
    return f'''## One mask update, in milliseconds

To 90%: scores, masks and zeros together, {df.runs[0]} runs. The targets were set on another machine. They are scaled by
fasterai's time on dense weights in this run.

{table(wide)}
'''


def growth():
    df = read('mask_update_growth')
    return f'''## Growth, global scope

Time, and the peak of memory beyond the weights themselves (masks included), by the process's resident size. Below 100M
weights the peak can't be told from the memory that the process already has.

{table(df[['weights', 'scores', 'ms', 'ns_per_weight', 'bytes_per_weight']])}
'''


def connectivity():
    df = read('connectivity')
    df['met'] = met(df.ratio, df.target)
    columns = ['what', 'side', 'seconds', 'min', 'max', 'ratio', 'target', 'met']
    return f'''## Linear paths, rounds and tickets

ResNet-18, 32x32 images, batches of 64, medians of {int(df.runs[0])} runs; `ratio` is to the side below it. For bytes on
disk, `min` is the file and `max` what it is compared with: a dense `state_dict` by `torch.save`, and one bit a weight.
The file of masks has a header beside the bits.

{table(df[columns].astype(object).fillna(''))}
'''


def billion():
    df = read('billion')
    return f'''## One mask update of a billion float32 weights

A Transformer of 20 layers of width 2048 is pruned to 90%, in a process that may have 16 GiB, and in two processes with
a half of each weight each. Seconds are for the masks, and for the zeros that they set. Memory at the peak is all of a
process's, its weights included. Machine: {df.machine[0]}. `found`: weights as drawn, and as the first update has left
them. Processes exchange counts only.

{table(spaced(df.drop(columns='machine')))}
'''


def soak():
    df = read('soak', keep_default_na=False)
    whole, ends = df[df.what == 'all'].iloc[0], df[df.what == 'end']
    ended = ', '.join(f'{r.value} {r.cases}' for r in ends.itertuples())
    kinds = {
        what: ', '.join(f'{r.value} {r.cases}' for r in rows.itertuples())
        for what, rows in df[~df.what.isin(['all', 'end'])].groupby('what', sort=False)
    }
    return f'''## The soak

`python benchmarks/soak.py` draws configurations and trains each of them. It stops most of them somewhere and goes on.
After every step it checks that masks fit, pruned weights are zero, the optimizer is plain, and the sparsity is what was
asked for. Machine: {whole.machine}. {whole.value}: {whole.cases} cases, {int(whole.steps):,} steps watched,
{int(whole.failed)} failed. How they ended: {ended}. "gone on" was stopped and started again, and had the same bits as a
fit that was not; "refused" raised its error before any training; "diverged" has NaN in the weights, and the error names
them.

The failures of that hour: a fit that started from a layer without any weight stopped with an error in its middle, which
is mended. The others were fastai's Recorder after an epoch that was cancelled before it began, and two mistakes of the
script. Run again by `--seed` and `--case`, all pass.

Cases of each kind:

{table(pd.DataFrame({'what': kinds.keys(), 'cases': kinds.values()}))}
'''


def times(fast):
    "Milliseconds of each side, with targets"
    sides = ['dense', 'sparse_inference', 'shrunk', 'onnxruntime, dense', 'onnxruntime, pruned']
    wide = fast.pivot_table(index=['network', 'sparsity', 'batch'], columns='side', values='ms', sort=False)[sides]
    wide, sparse = wide.round(2).reset_index(), fast[fast.side == 'sparse_inference'].reset_index(drop=True)
    wide['sparse / dense'] = [f'{s:.2f}x' for s in sparse.speedup]
    goals = [SPEEDUPS.get(k) for k in zip(wide.network, wide.batch, strict=True)]
    wide['target'] = [
        f'{goal}x: {"met" if s >= goal else "missed"}' if p == 0.95 and goal else ''
        for goal, p, s in zip(goals, wide.sparsity, sparse.speedup, strict=True)
    ]
    wide['layers became'] = sparse.forms
    return wide


def parameters_left(fast):
    "The parameters that shrunk models have left, in percent"
    shrunk, dense = (fast[fast.side == side].drop_duplicates(['network', 'sparsity']) for side in ('shrunk', 'dense'))
    left = [f'{100 * w / d:.1f}%' for w, d in zip(shrunk.weights, dense.weights, strict=True)]
    wide = shrunk.assign(left=left).pivot(index='network', columns='sparsity', values='left')
    return wide.loc[list(dict.fromkeys(shrunk.network))].reset_index()


def inference():
    fast = read('inference', keep_default_na=False)
    return f'''## Pruned models at inference, on a CPU

Milliseconds a batch, medians. Convolutional networks take images of 224x224, the Transformer encoder 64 tokens of width
768 in 4 blocks; the MLP goes from 1024 to 4096 to 4096 to 1000. "dense" is the pruned model in PyTorch as it is,
"sparse_inference" what that function makes of it, and "sparse / dense" how many times as fast that is. "shrunk" is
another model: whole filters or neurons were pruned to the same sparsity and cut out. Only those can go that nothing
else is added to; in the Transformer, these are the inner neurons of its blocks. onnxruntime runs the model before and
after pruning: it gains nothing from zeros. Machine: {fast.machine[0]}.

{table(times(fast))}

Outputs of `sparse_inference`, of shrunk models and of ONNX files differ from their models' by
{max(float(d) for d in fast.relative_difference if d):.0e} of the largest at most, over all rows. Parameters that shrunk
models have left:

{table(parameters_left(fast))}
'''


def kernel():
    df = read('kernel_numba', dtype=object, keep_default_na=False)
    first, df = df[df.network == 'first use'].iloc[0], df[df.network != 'first use']
    ratios = df.ratio.astype(float)
    return f'''## The sparse kernel in Numba

The sparse kernel was written in LLVM's language at first, and is Python now that Numba compiles. Outputs are the same
to the bit in {(df.same_bits == 'True').sum()} of {len(df)} rows. All linear layers and convolutions of a network are
sparse layers here, in milliseconds of one thread. `ratio` is Numba's time over the older kernel's, from the shortest
times of each layer, and `worst layer` is its largest value for a single layer. Other work ran on the machine.
{(ratios <= 1.1).sum()} of {len(df)} rows are within 10%; the median ratio is {ratios.median():.3f}. The first sparse
layer of a process waits {float(first.numba_ms) / 1000:.1f} s for the compiler; it was
{float(first.llvm_ms) / 1000:.1f} s before. Machine: {first.machine}.

{table(spaced(df.drop(columns=['machine', 'same_bits'])))}
'''


def loading():
    df = read('loading', keep_default_na=False)
    return f'''## Images a second

An epoch of training batches of CIFAR-10's images from a folder, medians of {df.runs[0]} runs. `cifar10_dls` reads all
images once, in `seconds_to_read`, and keeps them as bytes on the device; fastai opens each image again in every epoch.
Machine: {df.machine[0]}.

{table(spaced(df.drop(columns=['machine', 'runs'])))}
'''


def main():
    df = read('mask_update')
    head = f'''# Benchmarks

Made by `python benchmarks/report.py` from the CSV files here, which the other scripts write: `mask_update.py`,
`overhead.py`, `connectivity.py`, `billion.py`, `soak.py`, `inference.py`, `kernel_numba.py` and `loading.py`. They need
`pip install '.[bench]'`. Both sides run in one process, in turn; figures are medians. Machine: {df.machine[0]}.
'''
    foot = '''## What counts as a weight

[prunable.csv](prunable.csv), made by `prunable.py`, has the parameters of timm's families and of models of
transformers: what is pruned unless a user says otherwise, along which layout, and what is left alone.

The papers' tables, on CIFAR-10's images, are in [paper/RESULTS.md](paper/RESULTS.md).
'''
    parts = (
        head,
        overhead(),
        updates(df),
        growth(),
        connectivity(),
        billion(),
        soak(),
        inference(),
        kernel(),
        loading(),
        foot,
    )
    (here / 'README.md').write_text('\n'.join(parts))


if __name__ == '__main__':
    main()
