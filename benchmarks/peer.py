"""One engine: inference_peers.py starts this script in the engine's own environment, and asks it by lines of JSON.
Besides the engine it needs numpy alone. Each function returns what runs the network once, and a note about it."""

import gc
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np


def deepsparse(case, x, threads):
    from deepsparse import compile_model

    engine = compile_model(case['onnx'], batch_size=len(x), num_cores=threads)
    return lambda: engine.run([x])[0], 'deepsparse ' + version('deepsparse')


def openvino(case, x, threads, **options):
    import openvino as ov

    options |= {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads}
    compiled = ov.Core().compile_model(case['onnx'], 'CPU', options)
    request = compiled.create_infer_request()
    precision = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
    return lambda: request.infer([x])[0], f'openvino {version("openvino")}, {precision}'


def openvino_float32(case, x, threads):
    return openvino(case, x, threads, INFERENCE_PRECISION_HINT='f32')


def onnxruntime(case, x, threads):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(case['onnx'], options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0], 'onnxruntime ' + version('onnxruntime')


def in_torch(make):
    "An engine from a function of the pruned network, a batch and the case"

    def engine(case, x, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        model, batch = torch.load(case['model'], weights_only=False), torch.from_numpy(x)
        made, note = make(model, batch, case)
        return lambda: made(batch), ', '.join(p for p in ('torch ' + torch.__version__, note) if p)

    return engine


def as_it_was(model, x, case):
    return model, ''


def compiled(model, x, case):
    import torch

    torch._inductor.config.freezing = True
    return torch.compile(model), 'inductor, freezing'


def sparse(model, x, case, **options):
    "`sparse_inference`, with the number of layers that took each form"
    from inspect import signature

    from fastprune.deploy.inference import sparse_inference

    missing = options.keys() - signature(sparse_inference).parameters.keys()
    if missing:
        raise ValueError(f'sparse_inference takes no {", ".join(missing)}')
    res = sparse_inference(model, x, seconds=case['seconds'], **options)
    forms = res.inference_report.form.drop('total', errors='ignore').value_counts().to_dict()
    return res, ' '.join(f'{k}:{v}' for k, v in forms.items())


def sparse_bfloat16(model, x, case):
    # random networks of many layers amplify rounding: OpenVINO's and PyTorch's bfloat16 are as far from float32 as ours
    return sparse(model, x, case, dtype='bfloat16', rtol=0.2)


ENGINES = {
    'as it was': in_torch(as_it_was),
    'torch.compile': in_torch(compiled),
    'sparse_inference': in_torch(sparse),
    'sparse_inference bf16': in_torch(sparse_bfloat16),
    'onnxruntime': onnxruntime,
    'OpenVINO float32': openvino_float32,
    'OpenVINO': openvino,
    'DeepSparse': deepsparse,
}


def used():
    "Seconds of all cores that were not idle, and those of this process; steal counts, as time that others took"
    own = os.times()
    stat = Path('/proc/stat')
    if not stat.exists():
        return own.user + own.system, own.user + own.system
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf('SC_CLK_TCK'), own.user + own.system


def timed(run, seconds):
    "Milliseconds of each run, after a warm-up, and the part of a core that other processes used"
    start = time.perf_counter()
    while time.perf_counter() - start < seconds / 4:
        run()
    ms, start, (everyone, own) = [], time.perf_counter(), used()
    while time.perf_counter() - start < seconds or len(ms) < 2:
        before = time.perf_counter()
        run()
        ms.append(1e3 * (time.perf_counter() - before))
    taken, (everyone_after, own_after) = time.perf_counter() - start, used()
    others = (everyone_after - everyone) - (own_after - own)
    return dict(ms=ms, others=max(others, 0) / taken)


def main(side, threads):
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if 'case' in request:
                case, run = request['case'], None
                gc.collect()
                start = time.perf_counter()
                run, note = ENGINES[side](case, np.load(case['x']), threads)
                np.save(case['y'], np.asarray(run()))
                res = dict(note=note, load_s=time.perf_counter() - start)
            else:
                res = timed(run, request['seconds'])
        except Exception as e:
            res = dict(error=f'{type(e).__name__}: {e}')
        print(json.dumps(res), file=answers, flush=True)


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]))
