"Scripts in several processes of a group, on a CPU"

import os
import subprocess
import sys


def started(n, *args, use_cpu=True):
    "`n` processes of a script, as `torchrun` starts them, that have ended; with `ACCELERATE_USE_CPU` in their environment, or without it"
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHONWARNINGS': 'ignore',
        'CUDA_VISIBLE_DEVICES': '',
        'ACCELERATE_USE_CPU': 'true',
    }
    if not use_cpu:
        del env['ACCELERATE_USE_CPU']
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )


def torchrun(n, *args, **kwargs):
    "What `n` processes print. They start again where one died at its very end: now and then, on a busy machine, a thread of torch's gloo is not joined then"
    for _ in range(3):
        r = started(n, *args, **kwargs)
        if 'terminate called without an active exception' not in r.stderr:
            break
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout
