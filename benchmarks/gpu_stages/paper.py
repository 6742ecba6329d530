"A paper's tables with its own epochs; see ../paper/gpu.sh"

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / 'paper'))


def _data(run, tmp):
    "The images, or small ones made here"
    if data := os.environ.get('CIFAR10'):
        return data
    if not run.small:
        raise ValueError('CIFAR10: needs a folder with train/class/image and test/class/image, or a tar file with it')
    from PIL import Image

    for part in ('train', 'test'):
        for label in range(10):
            folder = Path(tmp) / part / str(label)
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new('RGB', (32, 32), (25 * label, 30 * i, 99)).save(folder / f'{i}.png')
    return tmp


def rounds(run):
    "How long a step of some trainings takes, compiled and not"
    from tempfile import TemporaryDirectory

    from gpu_tables import SMALL, time_rounds

    check = run.checks('rounds')
    with TemporaryDirectory() as tmp:
        data = _data(run, tmp)
        for compile in (False, True):
            if compile and run.small:
                continue
            options = dict(trainings=(1, 2), rounds=3, sizes=SMALL) if run.small else dict(trainings=(1, 4, 9, 18))
            for what, value in time_rounds(run.device, data, compile, **options):
                check(f'{"compiled" if compile else "as it is"}: {what}', 'measured', f'{value:.3f}')


def paper(run):
    "The tables"
    from tempfile import TemporaryDirectory

    from gpu_tables import METHODS, SEEDS, SMALL, fill

    methods = os.environ.get('METHODS', ','.join([*METHODS][:3])).split(',')
    options = dict(seeds=int(os.environ.get('SEEDS', SEEDS)), sparsity=float(os.environ.get('SPARSITY', 0.99)))
    if run.small:
        options |= dict(seeds=1, sizes=SMALL)
    compile = os.environ.get('COMPILE') == '1'
    with TemporaryDirectory() as tmp:
        fill(run.device, _data(run, tmp), run.out, methods=methods, compile=compile, limit=run.deadline, **options)
