"""Time and outputs of pruned networks on a CPU, beside other engines: `bash benchmarks/peers.sh`, and then
`python benchmarks/inference_peers.py [NETWORK ...] [--sides SIDE ...] [--envs FOLDER]`

Each side is a process in its engine's environment. The sides take turns, with all cores, and the others are stopped
meanwhile: idle threads of some engines use the CPU while they wait. Rows replace those of the same network, sparsity,
batch and side in inference_peers.csv."""

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from common import Rows, here
from inference import differ, networks, on_cpu, pruned
from peer import ENGINES

ENVIRONMENTS = {  # side -> the folder of its environment; the others run in this one
    'onnxruntime': 'onnxruntime',
    'OpenVINO float32': 'openvino',
    'OpenVINO': 'openvino',
    'DeepSparse': 'deepsparse',
}
QUIET = 0.1  # a turn in which other processes use more of a core than this is repeated


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def interpreter(side, envs):
    name = ENVIRONMENTS.get(side)
    return Path(envs) / name / 'bin' / 'python' if name else Path(sys.executable)


class Side:
    "The process of one engine, which runs while it is asked"

    def __init__(self, name, envs, log):
        self.name, self.python, self.log, self.process = name, interpreter(name, envs), log, None

    def start(self):
        if not self.python.exists():
            raise FileNotFoundError(f'no environment at {self.python}: bash benchmarks/peers.sh')
        threads = str(cores())
        paths = [str(here.parent), os.environ.get('PYTHONPATH', '')] if self.name not in ENVIRONMENTS else ['']
        env = os.environ | {'OMP_NUM_THREADS': threads, 'PYTHONPATH': os.pathsep.join(p for p in paths if p)}
        command = [self.python, here / 'peer.py', self.name, threads]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=self.log)

    def ask(self, limit, **request):
        "The answer of the engine, which has `limit` seconds; an engine that ends, or takes longer, is an error"
        if self.process is None:
            self.start()
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request).encode() + b'\n')
        self.process.stdin.flush()
        ready = select.select([self.process.stdout], [], [], limit)[0]
        line = self.process.stdout.readline() if ready else b''
        if not line:
            self.stop()
            raise RuntimeError('the engine ended' if ready else f'no answer within {limit} s')
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if 'error' in answer:
            raise RuntimeError(answer['error'])
        return answer

    def turn(self, seconds, tries):
        "Milliseconds of each run in the turn in which other processes did least"
        best = None
        for _ in range(tries):
            answer = self.ask(300, seconds=seconds)
            best = min(best or answer, answer, key=lambda a: a['others'])
            if best['others'] <= QUIET:
                break
        return best

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def export(model, x, path):
    "ONNX as the oldest engine reads it: of a fixed batch size, with opset 14"
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator has no form in ONNX
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            names = dict(input_names=['x'], output_names=['y'])
            torch.onnx.export(model, (x,), path, dynamo=False, opset_version=14, **names)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def cell(sides, model, x, folder, a):
    "side -> columns of its row"
    case = {name: str(folder / file) for name, file in (('onnx', 'm.onnx'), ('model', 'm.pt'), ('x', 'x.npy'))}
    torch.save(model, case['model'])
    np.save(case['x'], x.numpy())
    export(model, x, case['onnx'])
    with torch.no_grad():
        want = model(x)
    rows, answers = {}, {}
    for side in sides:
        case |= {'y': str(folder / 'y.npy'), 'seconds': a.trial}
        try:
            answer = side.ask(a.limit, case=case)
        except Exception as e:
            rows[side.name] = dict(note=str(e).partition('\n')[0][:200])
            continue
        off = differ(torch.from_numpy(np.load(case['y'])), want)
        rows[side.name] = dict(relative_difference=f'{off:.1e}', load_s=round(answer['load_s'], 1), note=answer['note'])
        answers[side] = []
    for _ in range(a.rounds):
        for side in answers:
            with contextlib.suppress(RuntimeError):  # the side has a row with fewer turns, or without times
                answers[side].append(side.turn(a.seconds, a.tries))
    for side, turns in answers.items():
        ms = [t for turn in turns for t in turn['ms']]
        if ms:
            times = dict(ms=round(statistics.median(ms), 3), min=round(min(ms), 3), max=round(max(ms), 3))
            rows[side.name] = (
                times | dict(runs=len(ms), others=round(max(t['others'] for t in turns), 2)) | rows[side.name]
            )
    return rows


def main(a):
    a.out.mkdir(parents=True, exist_ok=True)
    rows = Rows('inference_peers', folder=a.out)
    with tempfile.TemporaryDirectory() as d, open(a.log or os.devnull, 'w') as log:
        sides = [Side(name, a.envs, log) for name in a.sides]
        try:
            for name in a.networks:
                for sparsity in a.sparsities:
                    model = pruned(name, sparsity)
                    for bs in a.batches:
                        torch.manual_seed(1)
                        x = torch.randn(bs, *networks[name][1])
                        for side, columns in cell(sides, model, x, Path(d), a).items():
                            rows.add(network=name, sparsity=sparsity, batch=bs, side=side, **columns)
        finally:
            for side in sides:
                side.stop()


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('networks', nargs='*', default=[], help=', '.join(on_cpu))
    p.add_argument(
        '--sides', nargs='*', default=list(ENGINES), choices=list(ENGINES), metavar='SIDE', help=', '.join(ENGINES)
    )
    p.add_argument('--sparsities', type=float, nargs='*', default=[0.9, 0.95])
    p.add_argument('--batches', type=int, nargs='*', default=[1, 16])
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    p.add_argument('--envs', type=Path, default=cache / 'fastprune' / 'peers', help='the folder that peers.sh filled')
    p.add_argument('--out', type=Path, default=here, help='the folder of inference_peers.csv')
    p.add_argument('--seconds', type=float, default=0.5, help='of a turn')
    p.add_argument('--rounds', type=int, default=3, help='turns of each side')
    p.add_argument('--tries', type=int, default=3, help='of a turn, if other processes use the CPU')
    p.add_argument('--trial', type=float, default=4.0, help='seconds in which `sparse_inference` times layers')
    p.add_argument('--limit', type=float, default=180.0, help='seconds in which an engine must be ready')
    p.add_argument('--log', type=Path, help='a file for what engines print')
    a = p.parse_args()
    a.networks = a.networks or on_cpu
    main(a)
