"Makes README.md in this folder from the CSV files: `python benchmarks/report.py`"

import pandas as pd
from common import here


def table(df):
    return '\n'.join(
        [
            '| ' + ' | '.join(map(str, df.columns)) + ' |',
            '|' + '---|' * len(df.columns),
            *('| ' + ' | '.join(map(str, r)) + ' |' for r in df.itertuples(index=False)),
        ]
    )


def updates():
    df = pd.read_csv(here / 'mask_update.csv')
    wide = df.pivot_table(index=['network', 'scores', 'scope'], columns='side', values='ms', sort=False).reset_index()
    wide['fasterai / fastprune'] = (wide.fasterai / wide.fastprune).round(2)
    wide['target'] = [
        round(
            {
                ('resnet18', 'local'): 25 / 83,
                ('resnet18', 'global'): 30 / 158,
                ('resnet50', 'local'): 50 / 165,
                ('resnet50', 'global'): 65 / 432,
            }[n, s]
            * f,
            1,
        )
        for n, s, f in zip(wide.network, wide.scope, dense(wide), strict=True)
    ]
    wide['met'] = ['yes' if a <= b else f'no, {a / b:.2f}x' for a, b in zip(wide.fastprune, wide.target, strict=True)]
    return df, wide


def dense(wide):
    "fasterai's time on dense weights, which the targets are scaled by"
    by = {(r.network, r.scope): r.fasterai for r in wide[wide.scores == 'dense'].itertuples()}
    return [by[n, s] for n, s in zip(wide.network, wide.scope, strict=True)]


df, wide = updates()
over, growth = pd.read_csv(here / 'overhead.csv'), pd.read_csv(here / 'mask_update_growth.csv')
limit = {'interval 10': 1.05, 'interval 1': 1.30}
over['target'] = [next((v for k, v in limit.items() if s.endswith(f', {k}')), '') for s in over.side]
over['met'] = ['' if t == '' else 'yes' if r <= t else 'no' for r, t in zip(over.ratio, over.target, strict=True)]
text = f'''# Benchmarks

Made by `python benchmarks/report.py` from the CSV files here, which `mask_update.py`, `overhead.py`, \
`connectivity.py`, `billion.py`, `soak.py`, `inference.py`, `kernel_numba.py` and `loading.py` write. They need \
`pip install '.[bench]'`.
Both sides run in one process, in turn; figures are medians. Machine: {df.machine[0]}.

## Training with One-Cycle Pruning to 90% over plain training

ResNet-18, 32x32 images, batches of {over.bs[0]}, {over.batches[0]} batches a run, {over.runs[0]} runs of each \
side. `ratio` is the median of the ratios run by run. The default interval is max(1, T//1000) in a training of \
T iterations; its rows are of a run of their own, of
{over.batches.iloc[-1]} batches, and of parts of such trainings.

{table(over[['side', 'ms_per_batch', 'min', 'max', 'ratio', 'target', 'met']])}

## One mask update, in milliseconds

To 90%: scores, masks and zeros together, {df.runs[0]} runs. The targets are what was set on another machine, \
scaled by fasterai's time on dense weights in this run.

{table(wide)}

## Growth, global scope

Time, and memory at the peak beyond the weights themselves (masks included), by the process's resident size. \
For less than 100M weights the peak drowns in memory that
the process already has.

{table(growth[['weights', 'scores', 'ms', 'ns_per_weight', 'bytes_per_weight']])}
'''
paths = pd.read_csv(here / 'connectivity.csv')
paths['met'] = ['' if pd.isna(t) else 'yes' if r <= t else 'no' for r, t in zip(paths.ratio, paths.target, strict=True)]
text += f'''
## Linear paths, rounds and tickets

ResNet-18, 32x32 images, batches of 64, medians of {int(paths.runs[0])} runs; `ratio` is to the side below it. \
Bytes on disk: `min` is the file, `max` what it is compared with, a dense `state_dict` by `torch.save` and
one bit a weight; the file of masks has a header beside the bits.

{table(paths[['what', 'side', 'seconds', 'min', 'max', 'ratio', 'target', 'met']].astype(object).fillna(''))}
'''
big = pd.read_csv(here / 'billion.csv')
text += f'''
## One mask update of a billion float32 weights

A Transformer's, 20 layers of width 2048, to 90%, in a process that may have 16 GiB, and in two processes with \
a half of each weight each. In seconds: masks, and zeros by them. Memory at the peak is all of a process's,
its weights included. Machine: {big.machine[0]}. `found`: weights as drawn, and as the first update has left \
them. What is summed up over processes is counts.

{table(big.drop(columns='machine').rename(columns=lambda c: c.replace('_', ' ')))}
'''
soak = pd.read_csv(here / 'soak.csv', keep_default_na=False)
whole, ends = soak[soak.what == 'all'].iloc[0], soak[soak.what == 'end']
what = (
    soak[~soak.what.isin(['all', 'end'])]
    .groupby('what', sort=False)
    .apply(lambda d: ', '.join(f'{v} {n}' for v, n in zip(d['value'], d.cases, strict=True)), include_groups=False)
)
text += f'''
## The soak

`python benchmarks/soak.py` draws configurations, trains each, mostly stops it somewhere, goes on, and looks \
after every step whether masks fit, pruned weights are zero, the optimizer is plain and the sparsity is what \
was asked for.
Machine: {whole.machine}. {whole.value}: {whole.cases} cases, {int(whole.steps):,} steps watched, \
{int(whole.failed)} failed. How they ended: {', '.join(f'{r.value} {r.cases}' for r in ends.itertuples())}. \
"gone on" was stopped and started again, and had the same bits as a fit that was not; "refused" raised its
error before any training; "diverged" is NaN in the weights, which is said by name.

What failed in that hour has been looked into: a fit that starts from a layer without any weight stopped with \
an error in its middle, and is mended; the others were fastai's Recorder after an epoch that was cancelled
before it began, and two mistakes of the script. Run again by `--seed` and `--case`, all pass.

Cases of each kind:

{table(pd.DataFrame({'what': what.index, 'cases': what.values}))}
'''
fast = pd.read_csv(here / 'inference.csv', keep_default_na=False)
goal = {
    ('Transformer encoder', 1): 5,
    ('Transformer encoder', 16): 4,
    ('MLP', 1): 3,
    ('MLP', 16): 3,
    **{(n, b): 1.2 for n in ('mobilenet_v2', 'resnet50') for b in (1, 16)},
}
sides = ['dense', 'sparse_inference', 'shrunk', 'onnxruntime, dense', 'onnxruntime, pruned']
wide = (
    fast.pivot_table(index=['network', 'sparsity', 'batch'], columns='side', values='ms', sort=False)[sides]
    .round(2)
    .reset_index()
)
sparse = fast[fast.side == 'sparse_inference'].reset_index(drop=True)
wide['sparse / dense'] = [f'{s:.2f}x' for s in sparse.speedup]
wide['target'] = [
    f'{goal[n, b]}x: {"met" if s >= goal[n, b] else "missed"}' if p == 0.95 and (n, b) in goal else ''
    for n, b, p, s in zip(wide.network, wide.batch, wide.sparsity, sparse.speedup, strict=True)
]
wide['layers became'] = sparse.forms
shrunk = fast[fast.side == 'shrunk'].drop_duplicates(['network', 'sparsity'])
left = (
    shrunk.assign(
        left=[
            f'{100 * w / d:.1f}%'
            for w, d in zip(
                shrunk.weights, fast[fast.side == 'dense'].drop_duplicates(['network', 'sparsity']).weights, strict=True
            )
        ]
    )
    .pivot(index='network', columns='sparsity', values='left')
    .loc[list(dict.fromkeys(shrunk.network))]
    .reset_index()
)
text += f'''
## Pruned models at inference, on a CPU

Milliseconds a batch, medians; images of 224x224 for the convolutional networks, 64 tokens of width 768 in 4 \
blocks for the Transformer encoder, 1024 to 4096 to 4096 to 1000 for the MLP. "dense" is the pruned model in \
PyTorch as it is;
"sparse_inference" is what that function makes of it, and "sparse / dense" how many times as fast that is. \
"shrunk" is another model, of whole filters or neurons pruned to the same sparsity and cut out: only those that \
nothing else is added to can go,
and of the Transformer only the inner neurons of its blocks. onnxruntime runs the model before and after \
pruning: it gains nothing from zeros. Machine: {fast.machine[0]}.

{table(wide)}

Outputs of `sparse_inference`, of shrunk models and of ONNX files differ from their models' by \
{max(float(d) for d in fast.relative_difference if d):.0e} of the largest at most, over all rows. Parameters \
that shrunk models have left:

{table(left)}
'''
both = pd.read_csv(here / 'kernel_numba.csv', dtype=object, keep_default_na=False)
first, both = both[both.network == 'first use'].iloc[0], both[both.network != 'first use']
ratios = both.ratio.astype(float)
text += f'''
## The sparse kernel in Numba

The sparse kernel was written in LLVM's language at first, and is Python now that Numba compiles. Outputs are the same \
to the bit in {(both.same_bits == 'True').sum()} of {len(both)} rows. All linear layers and convolutions of a \
network as sparse layers, in milliseconds of one thread. `ratio` is Numba's time over the older kernel's, from the \
shortest times of each layer, and `worst layer` is its largest value for a single layer. Other work ran on the \
machine. {(ratios <= 1.1).sum()} of {len(both)} rows are within 10%; the median ratio is {ratios.median():.3f}. The \
first sparse layer of a process waits {float(first.numba_ms) / 1000:.1f} s for the compiler; it was \
{float(first.llvm_ms) / 1000:.1f} s before. Machine: {first.machine}.

{table(both.drop(columns=['machine', 'same_bits']).rename(columns=lambda c: c.replace('_', ' ')))}
'''
loads = pd.read_csv(here / 'loading.csv', keep_default_na=False)
text += f'''
## Images a second

An epoch of training batches of CIFAR-10's images from a folder, medians of {loads.runs[0]} runs. `cifar10_dls` \
reads all images once, in `seconds_to_read`, and keeps them as bytes on the device; fastai opens each again in \
every epoch. Machine: {loads.machine[0]}.

{table(loads.drop(columns=['machine', 'runs']).rename(columns=lambda c: c.replace('_', ' ')))}

## What counts as a weight

[prunable.csv](prunable.csv), made by `prunable.py`, has the parameters of timm's families and of models of \
transformers: what is pruned unless a user says otherwise, along which layout, and what is left alone.

The papers' tables, on CIFAR-10's images, are in [paper/RESULTS.md](paper/RESULTS.md).
'''
(here / 'README.md').write_text(text)
