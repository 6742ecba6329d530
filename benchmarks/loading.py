"""Images per second of `cifar10_dls` and of fastai's `ImageDataLoaders`, on the same folder of CIFAR-10's images. Each
loads one epoch of training batches, in turn. fastai has its default worker processes. `python
benchmarks/loading.py [--data ~/cifar10] [--rounds 3] [--bs 256]`"""

import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import torch
from common import interleaved, spread, write
from fastai.vision.all import CropPad, Flip, ImageDataLoaders, Normalize, PadMode, RandomCrop, cifar_stats
from fastcore.script import call_parse

from fastprune.all import cifar10_dls


def epoch(dl):
    n = sum(len(y) for _, y in dl)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return n


@call_parse
def main(
    data: str = '~/cifar10',  # Folder with train/class/image and test/class/image
    rounds: int = 3,  # Timed runs of each side
    bs: int = 256,  # Batch size
):
    "Write loading.csv"
    path = Path(data).expanduser()
    start = time.perf_counter()
    ours = cifar10_dls(path, bs=bs)
    reading, plain = time.perf_counter() - start, cifar10_dls(path, bs=bs, augment=False)
    theirs = ImageDataLoaders.from_folder(
        path,
        train='train',
        valid='test',
        bs=bs,
        item_tfms=[CropPad(40, pad_mode=PadMode.Zeros), RandomCrop(32)],
        batch_tfms=[Flip(), Normalize.from_stats(*cifar_stats)],
    )
    sides = {
        'cifar10_dls: flip, shift, normalise': ours.train,
        'cifar10_dls: normalise': plain.train,
        "fastai's ImageDataLoaders: flip, shift, normalise": theirs.train,
    }
    times, rows = interleaved({n: lambda dl=dl: epoch(dl) for n, dl in sides.items()}, rounds), []
    for n, ts in times.items():
        med, lo, hi = spread([len(sides[n]) * bs / t for t in ts])
        rows.append(
            dict(
                side=n,
                images_per_second=round(med),
                min=round(lo),
                max=round(hi),
                bs=bs,
                workers=sides[n].fake_l.num_workers,
                seconds_to_read=round(reading, 1) if n.startswith('cifar') else '',
                runs=rounds,
            )
        )
    write('loading', rows)
