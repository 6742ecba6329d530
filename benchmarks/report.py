"Write README.md in this folder from the CSV files: `python benchmarks/report.py`"

import io

import pandas as pd
import peer_targets
from common import here
from gpu_targets import NOT_MEASURED, devices, verdicts

TARGETS = {('resnet50', 'dense'): 25, ('resnet50', '90% zeros'): 15}  # network and scores -> ms of an update
TIMES_FASTERAI = 8  # so many times as fast as fasterai, where there is a target
OVERHEADS = {  # (batch, end of the side) -> target of the time over plain training
    (64, 'interval 1'): 1.10,
    (64, 'interval 10'): 1.035,
    (64, 'masks alone'): 1.03,
    (8, 'interval 10'): 1.15,
    (8, 'masks alone'): 1.08,
}
SPEEDUPS = {  # (network, batch) -> target speedup over dense at 95%
    ('Transformer encoder', 1): 5,
    ('Transformer encoder', 16): 4,
    ('MLP', 1): 3,
    ('MLP', 16): 3,
    **{(n, b): 1.2 for n in ('mobilenet_v2', 'resnet50') for b in (1, 16)},
}


def read(name, **kwargs):
    "The rows of a CPU, without the columns that only other devices have"
    text = pd.read_csv(here / f'{name}.csv', dtype=str, keep_default_na=False)
    if 'device' in text:
        text = text[text.device == 'cpu'].drop(columns='device')
        text = text.loc[:, (text != '').any()]
    return pd.read_csv(io.StringIO(text.to_csv(index=False)), **kwargs)


def on_gpus(name, columns):
    "The rows of GPUs, with the chosen columns and the device"
    df = pd.read_csv(here / f'{name}.csv', dtype=str, keep_default_na=False)
    return df[df.device != 'cpu'].reindex(columns=['device', *columns], fill_value='')


def table(df):
    lines = ['| ' + ' | '.join(map(str, row)) + ' |' for row in (df.columns, *df.itertuples(index=False))]
    return '\n'.join([lines[0], '|' + '---|' * len(df.columns), *lines[1:]])


def spaced(df):
    return df.rename(columns=lambda c: c.replace('_', ' '))


def met(ratios, targets):
    "'yes' or 'no' for each row; empty without a target"
    answers = {True: 'yes', False: 'no'}
    return ['' if t == '' or pd.isna(t) else answers[r <= t] for r, t in zip(ratios, targets, strict=True)]


def overhead():
    df = read('overhead')
    ends = df.side.str.split(', ').str[-1]  # 'interval 1', not 'default of 200 iterations: interval 1'
    df['target'] = [OVERHEADS.get(key, '') for key in zip(df.bs, ends, strict=True)]
    df['met'] = met(df.ratio, df.target)
    df = df.rename(columns={'bs': 'batch'}).sort_values('batch', ascending=False, kind='stable')
    return f'''## Overhead of One-Cycle Pruning to 90% over plain training, on a CPU

ResNet-18, 32x32 images. `ratio` is the median over runs of the time divided by that of plain training. The default
interval of a training of T iterations is max(1, T//1000). The rows of default intervals come from a separate
measurement, with parts of such trainings. With masks alone, an earlier training has pruned to 90%, and this one keeps
its masks.

{table(df[['batch', 'side', 'ms_per_batch', 'min', 'max', 'ratio', 'target', 'met', 'runs', 'batches']])}
'''


def updates(df):
    wide = df.pivot_table(index=['network', 'scores', 'scope'], columns='side', values='ms', sort=False).reset_index()
    wide['fasterai / fastprune'] = (wide.fasterai / wide.fastprune).round(2)
    wide['target'] = [TARGETS.get(key, '') for key in zip(wide.network, wide.scores, strict=True)]
    late = wide['fasterai / fastprune'] < TIMES_FASTERAI
    wide['met'] = [
        'no' if is_met == 'yes' and is_late else is_met
        for is_met, is_late in zip(met(wide.fastprune, wide.target), late, strict=True)
    ]
    return f'''## One mask update on a CPU, in milliseconds

One update to 90% computes scores and masks and sets weights to zero. {df.runs[0]} runs. A target is met if fasterai
takes at least {TIMES_FASTERAI} times as long, too.

{table(wide)}
'''


def growth():
    df = read('mask_update_growth')
    return f'''## Time and memory by number of weights, global scope

Bytes per weight are the peak of the process's resident memory beyond the weights (masks included). Below 100M weights
the peak is too close to the memory that the process already has, and can't be measured.

{table(df[['weights', 'scores', 'ms', 'ns_per_weight', 'bytes_per_weight']])}
'''


def connectivity():
    df = read('connectivity')
    df['met'] = met(df.ratio, df.target)
    columns = ['what', 'side', 'seconds', 'min', 'max', 'ratio', 'target', 'met']
    return f'''## Linear paths, rounds and tickets

ResNet-18, 32x32 images, batches of 64, medians of {int(df.runs[0])} runs. `ratio` divides by the side in
the next row. For bytes on disk, `min` is the size of the file and `max` the size of its reference: a dense `state_dict`
by `torch.save`, or one bit per weight. The file of masks also contains a header.

{table(df[columns].astype(object).fillna(''))}
'''


def billion():
    df = read('billion')
    return f'''## One mask update of a billion float32 weights

A Transformer with 20 layers of width 2048 is pruned to 90%, in one process with at most 16 GiB, and in two processes
that hold half of each weight. Seconds are for the masks, and for setting pruned weights to zero. Peak memory is that of
a whole process, with its weights. `found` says whether the weights before the update are dense or already pruned by
the first update. Processes exchange only counts. Machine: {df.machine[0]}.

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
    return f'''## The soak test

`python benchmarks/soak.py` draws random configurations and trains each of them. It stops most trainings at some
point, and continues from there. After every step it checks four promises: masks fit the model, pruned weights are
zero, the optimizer has only the model's parameters, and the sparsity equals the target.

Machine: {whole.machine}. {whole.value}: {whole.cases} cases, {int(whole.steps):,} checked steps,
{int(whole.failed)} failed. Cases by their end: {ended}. "gone on" was stopped and resumed, with the same bits as an
uninterrupted fit. "refused" raised its error before any training. "diverged" has NaN in the weights, and
the error names them.

Four cases failed in that hour. One fit stopped with an error because it started from a layer without weights; this is
fixed. The other failures came from fastai's Recorder, after an epoch that was cancelled before it began, and from two
mistakes in the script. All four pass when they run again with `--seed` and `--case`.

Cases of each kind:

{table(pd.DataFrame({'what': kinds.keys(), 'cases': kinds.values()}))}
'''


def times(fast):
    "Milliseconds of each side, with the targets"
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
    "The parameters left in shrunk models, in percent"
    shrunk, dense = (fast[fast.side == side].drop_duplicates(['network', 'sparsity']) for side in ('shrunk', 'dense'))
    left = [f'{100 * w / d:.1f}%' for w, d in zip(shrunk.weights, dense.weights, strict=True)]
    wide = shrunk.assign(left=left).pivot(index='network', columns='sparsity', values='left')
    return wide.loc[list(dict.fromkeys(shrunk.network))].reset_index()


def inference():
    fast = read('inference', keep_default_na=False)
    return f'''## Pruned models at inference, on a CPU

Median milliseconds per batch. Convolutional networks take images of 224x224. The Transformer encoder takes 64 tokens of
width 768, and has 4 blocks. The MLP has widths 1024, 4096, 4096 and 1000. "dense" is the pruned model in plain PyTorch,
"sparse_inference" is the model that this function returns, and "sparse / dense" is the speedup of the second over the
first. "shrunk" is another model: whole filters or neurons were pruned to the same sparsity and removed. A filter can be
removed only if no other output is added to it; in the Transformer, these are the inner neurons of its blocks.
onnxruntime runs the model before and after pruning, and gains nothing from zeros. Machine: {fast.machine[0]}.

{table(times(fast))}

Outputs of `sparse_inference`, of shrunk models and of ONNX files differ from the outputs of their models by at most
{max(float(d) for d in fast.relative_difference if d):.0e} of the largest output, over all rows. Parameters left in the
shrunk models:

{table(parameters_left(fast))}
'''


def digits(value):
    "Three significant digits, or nothing for NaN"
    return '' if pd.isna(value) else f'{value:.3g}' if value < 1000 else f'{value:.0f}'


def peers(rows):
    "`sparse_inference` beside the engines that users would choose instead"
    wide = peer_targets.times(rows)
    shown = wide.astype(object)
    ratios = list(peer_targets.RATIOS)
    for columns, form in ((list(peer_targets.SIDES), digits), (ratios, lambda r: '' if pd.isna(r) else f'{r:.2f}')):
        shown[columns] = wide[columns].map(form)
    targets = pd.DataFrame(peer_targets.verdicts(wide), columns=['what', 'target', 'found', 'met'])
    off = ', '.join(f'{side} {d}' for side, d in peer_targets.differences(rows).items())
    missing = [f'{side} has no times: {"; ".join(notes)}.' for side, notes in peer_targets.missing(rows).items()]
    return (
        '''## Other engines beside `sparse_inference`, on a CPU

`bash benchmarks/peers.sh` makes an environment for each engine, and `python benchmarks/inference_peers.py` measures.
All engines run the same pruned networks on all cores, in turns, and the others are stopped meanwhile. "as it was" is
plain PyTorch, and `torch.compile` uses inductor with frozen weights. Other engines read ONNX files of a fixed batch
size. "OpenVINO" is its default, which computes in bfloat16 where the processor can; DeepSparse computes in float32.
Times are median milliseconds per batch. The ratio to OpenVINO takes the faster one of our two precisions, the others
float32. Random networks of many layers amplify rounding, so bfloat16 may differ by 0.2 of the largest output here.
'''
        + f'''Engines: {', '.join(peer_targets.versions(rows))}. Machine: {rows.machine.iloc[0]}.

{table(shown)}

{table(targets)}

The largest difference from the outputs of the model as it was, relative to the largest output: {off}.
{chr(10).join(missing)}
'''
    )


def graph_parts():
    df = read('graph_parts')
    of = ['network', 'sparsity', 'batch']
    wholes = df.groupby(of, sort=False).ms.sum()
    rows = []
    for case, part in df.groupby(of, sort=False):
        parts = [f'{p} {ms:.2f}' for p, ms in zip(part.part, part.ms, strict=True) if ms >= 0.02 * wholes[case]]
        rows.append([*case, f'{wholes[case]:.2f}', ', '.join(parts)])
    return f'''### Where the time goes

`python benchmarks/graph_parts.py` times the steps of whole graphs in float32, with the caches as they are at that
place. Shortest milliseconds; parts below 2% are left out. A convolution's time includes its bias, the residual that is
added and its activation.

{table(pd.DataFrame(rows, columns=[*of, 'all', 'parts']))}

At batch 16, products of ResNet-50 run at some 100 GFLOP/s on two cores. They are bound by the second-level cache: a
vector that comes from there costs two cycles, its product one. Its pools take 3 ms, and the images 0.6 ms. MobileNetV2
is bound by the memory between layers, which the sixfold expansions at 112 pixels fill. These are the cells in which
DeepSparse is faster, with ResNets at 90% and batch 16.
'''


def kernel():
    df = read('kernel_numba', dtype=object, keep_default_na=False)
    first, df = df[df.network == 'first use'].iloc[0], df[df.network != 'first use']
    ratios = df.ratio.astype(float)
    return f'''## The sparse kernel in Numba

The sparse kernel used to be written in LLVM's language, and is now Python that Numba compiles. Outputs are equal
to the bit in {(df.same_bits == 'True').sum()} of {len(df)} rows. Here all linear layers and convolutions of a network
are sparse layers; times are milliseconds in one thread. `ratio` is Numba's time over the older kernel's, from the
shortest times of each layer, and `worst layer` is the largest ratio of a single layer. Other work ran on the machine.
{(ratios <= 1.1).sum()} of {len(df)} rows are at most 10% slower; the median ratio is {ratios.median():.3f}. The first
sparse layer of a process waits {float(first.numba_ms) / 1000:.1f} s for the compiler, and waited
{float(first.llvm_ms) / 1000:.1f} s with the older kernel. Machine: {first.machine}.

{table(spaced(df.drop(columns=['machine', 'same_bits'])))}
'''


def loading():
    df = read('loading', keep_default_na=False)
    return f'''## Images per second

One epoch of training batches of CIFAR-10's images from a folder, medians of {df.runs[0]} runs. `cifar10_dls` reads all
images once, which takes `seconds_to_read`, and stores them as bytes on the device. fastai opens each image again in
every epoch.
Machine: {df.machine[0]}.

{table(spaced(df.drop(columns=['machine', 'runs'])))}
'''


GPU_TABLES = {  # heading -> CSV file and columns
    '`fit_one_cycle` to 90%': ('overhead', ['network', 'side', 'ms_per_batch', 'min', 'max', 'ratio', 'runs']),
    'Mask updates and projections to 90%': (
        'mask_update',
        ['network', 'scores', 'scope', 'side', 'ms', 'min_ms', 'max_ms'],
    ),
    'A billion weights': (
        'mask_update_growth',
        ['weights', 'scores', 'scope', 'ms', 'ns_per_weight', 'bytes_per_weight'],
    ),
    'Inference in float16': (
        'inference',
        ['network', 'sparsity', 'batch', 'side', 'ms', 'speedup', 'relative_difference', 'forms'],
    ),
    'Linear paths, rounds, tickets and SynFlow': ('connectivity', ['what', 'side', 'seconds', 'min', 'max', 'ratio']),
}


def gpu():
    names = devices()
    columns = ['what', 'at most', *(names or ['GPU'])]
    rows = [[what, limit, *(found or [NOT_MEASURED])] for what, limit, *found in verdicts()]
    parts = [
        f'''## On a GPU

`bash benchmarks/wheels.sh wheels` collects the packages that a machine without a network lacks.
`bash benchmarks/gpu.sh wheels out` measures there, in one run of under 8 minutes, and
`python benchmarks/gpu.py collect --out out` adds its rows to the CSV files. Data and weights are on the GPU, and all
batches are the same. Ratios are medians of paired runs. "A step of the engine" computes scores and masks and sets
weights to zero. Times are measured until the GPU has finished, and with "host" until Python goes on. A figure is the
larger one of dense weights and of weights with 90% zeros.

{table(pd.DataFrame(rows, columns=columns))}

On the H100, fits were measured with kernels that read 2^11 numbers at once by 8 warps. Since then they read
2^10 by 4 warps: `tuning` measured 4.71 ms instead of 5.21 for masks and zeros of ViT-L (0.61 instead of 0.63 for
ResNet-50). A billion weights, linear layers, paths and rounds were measured before the candidates of the last digits
were stored apart. Fits vary by up to 50% from run to run, since Python's time on the host is a good part of them.
Updates were measured once more, with the present kernels, on a machine whose host takes 1.8 times as long for the same
projection (0.39 ms instead of 0.21 until Python goes on): ResNet-50's are all host. Fits on it had ratios of 1.00 to
1.37 in one to three runs, and are not in the table.
'''
    ]
    for heading, (name, columns) in GPU_TABLES.items():
        df = on_gpus(name, columns)
        for device in dict.fromkeys(df.device):
            own = df[df.device == device].drop(columns='device')
            parts.append(f'### {heading}: {device}\n\n{table(spaced(own))}\n')
    return '\n'.join(parts)


def channels():
    df = read('channels', dtype=str, keep_default_na=False)
    first = df.iloc[0]
    columns = ['network', 'side', 'accuracy', 'std', 'each', 'flops', 'rate', 'ms_1', 'ms_64']
    return f'''## Channels that go while a network trains, on a CPU

CIFAR-10, {first.images} training images and {first.test} test images at 32 pixels. Each side starts from the same
network, trained for {first.dense_epochs} epochs, and trains for {first.epochs} more. `accuracy` is the mean of
{first.seeds} seeds in percent, too few for a verdict, and `each` lists them. `flops` is the largest part of the dense
network's FLOPs that a seed has left, at a target of 0.5: fastprune gets the target, and the ratio of the others is
bisected. `rate` is the learning rate, searched on a fifth of the training images. `ms_1` and `ms_64` are milliseconds
for one image and for 64. ResNet-20 has convolutions as shortcuts here, which all sides can follow. Torch-Pruning prunes
before the training, and the other sides during it.

{table(df[columns])}
'''


def reconstruct():
    df = read('reconstruct')
    dense, df = df[df.side == 'dense'].iloc[0], df[df.side != 'dense']
    columns = [s for s in df.side.unique()]
    accuracy = df.pivot(index=['criterion', 'sparsity'], columns='side', values='accuracy')[columns].reset_index()
    times = df.groupby('side', sort=False).seconds.median().round(1)
    return f'''## Accuracy after pruning in one shot, without training

A ResNet-20 for CIFAR-10 with {dense.accuracy:.1f}% accuracy, pruned with scope {dense.scope!r}. `recalibrate` estimates
BatchNorm's statistics again on {dense.again} batches of {dense.bs} images, `reconstruct` fits the weights that are left
on {dense.batches} batches. Percent of the test images, one network:

{table(accuracy)}

Seconds on one core, medians over the rows, the criterion's included:
{', '.join(f'{side} {s:g}' for side, s in times.items())}.
Most of the reconstruction goes into the products of each layer's inputs.
'''


def main():
    df = read('mask_update')
    head = f'''# Benchmarks

The time, memory and disk space that fastprune needs, next to plain training and to other libraries. The scripts
`mask_update.py`, `overhead.py`, `connectivity.py`, `billion.py`, `soak.py`, `inference.py`, `inference_peers.py`,
`graph_parts.py`, `channels.py`, `reconstruct.py`, `kernel_numba.py` and `loading.py` write CSV files, and
`python benchmarks/report.py` makes this page from them. They need `pip install '.[bench]'`. All sides of a comparison
take turns in one process, and figures are medians.
`mask_update.py`, `overhead.py` and `inference.py` also run on a GPU, by `--device cuda`.
Machine: {df.machine[0]}.
'''
    foot = '''## What counts as a weight

[prunable.csv](prunable.csv), written by `prunable.py`, lists the parameters of timm's model families and of models of
transformers: which ones are pruned by default, with which layout, and which ones are not.

[paper/RESULTS.md](paper/RESULTS.md) has the papers' tables on CIFAR-10's images.
'''
    parts = (
        head,
        overhead(),
        updates(df),
        gpu(),
        growth(),
        connectivity(),
        billion(),
        soak(),
        inference(),
        peers(read('inference_peers', keep_default_na=False)),
        graph_parts(),
        channels(),
        reconstruct(),
        kernel(),
        loading(),
        foot,
    )
    (here / 'README.md').write_text('\n'.join(parts))


if __name__ == '__main__':
    main()
