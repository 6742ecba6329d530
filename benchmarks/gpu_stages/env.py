"The machine: versions, clocks, and what a copy and a matrix product reach"

import importlib.metadata
import platform
import subprocess

import torch
from common import seconds, spread

PACKAGES = (
    *('torch', 'triton', 'fastai', 'fastcore', 'timm', 'torchvision', 'numba', 'numpy', 'pandas', 'scipy'),
    *('scikit-learn', 'matplotlib', 'safetensors', 'pytest', 'pytest-xdist', 'hypothesis', 'nbdev', 'fasterai'),
)
CLOCKS = 'name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,memory.total'


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return 'none'


def clocks():
    try:
        cmd = ['nvidia-smi', f'--query-gpu={CLOCKS}', '--format=csv']
        return subprocess.run(cmd, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        return str(e)


def env(run):
    check = run.checks('env')
    check('python', 'noted', platform.python_version())
    check('packages', 'noted', ', '.join(f'{n} {version(n)}' for n in PACKAGES))
    check('clocks before', 'noted', clocks())
    n = 256 if run.small else 8192
    dtype = torch.float32 if run.device == 'cpu' else torch.bfloat16
    a, b = torch.randn(2, n, n, device=run.device, dtype=dtype)
    times = [seconds(lambda: a @ b) for _ in range(10)]
    check('matrix product', 'noted', f'{2 * n**3 / spread(times)[0] / 1e12:.1f} TFLOP/s')
    x = torch.empty(2**20 if run.small else 2**30, device=run.device)
    y = torch.empty_like(x)
    times = [seconds(lambda: y.copy_(x)) for _ in range(10)]
    check('copy', 'noted', f'{2 * x.nbytes / spread(times)[0] / 1e12:.2f} TB/s')
    check('clocks after', 'noted', clocks())
    import fastprune

    check('fastprune', 'noted', f'{fastprune.__version__} in {fastprune.__path__[0]}')
