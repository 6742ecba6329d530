"Cases of analyses, files, deployment, data and the command line"

from importlib import import_module

import torch
from fastai.basics import load_learner, set_seed
from torch import nn

from .common import OddNet, case, copies, each, fp, learner, or_error, short, sparsify, trained, weights_and_masks


def line(path):
    barriers = [[b.loss, b.error] for b in (path.barrier, path.line_barrier)]
    return [path.df, path.errors, barriers, path.instability]


@each({'odd': dict(n=5), 'even': dict(n=4, train=True), 'recalibrated': dict(n=3, bn='recalibrate', n_batches=4)})
def paths(kwargs, folder):
    learn = trained(folder)
    a = copies(learn)
    learn.fit(1, 0.05)
    learn.prune(0.5)
    res = dict(
        path=line(learn.linear_path(a, learn, **kwargs)), instability=line(learn.instability(None, short, **kwargs))
    )
    return res | weights_and_masks(learn)


@case
def stability_by_rewind(folder):
    def pruned(learn, cbs):
        learn.fit_one_cycle(2, 0.02, cbs=[sparsify(0.8), *cbs])

    learn = learner(folder)
    return dict(table=learn.instability_by_rewind([0, 5, 25, 40], pruned, n=3), **weights_and_masks(learn))


@case
def plane(folder):
    learn = trained(folder)
    states = [copies(learn)]
    for _ in range(2):
        learn.fit(1, 0.05)
        states.append(copies(learn))
    plane = learn.plane(*states, n=4)
    return dict(plane=[plane.xs, plane.ys, plane.losses, plane.points])


@each({'convnet': lambda: None, 'odd': OddNet})
def analyses(make, folder):
    learn = trained(folder, model=make())
    res = dict(dense=learn.flops())
    learn.prune(0.6, scope='global')
    histogram = learn.gradient_histogram(n_batches=3, n_values=500)
    res |= dict(sparsity=learn.sparsity_report(), flops=learn.flops(), weights=learn.weight_histogram().df)
    res['sensitivity'] = learn.sensitivity((0.5, 0.9))
    res['filters'] = or_error(learn.sensitivity, (0.5,), fp.taylor, granularity='filter', metric='loss')
    res['histogram'] = [histogram.gradients, histogram.hidden]
    res['hessian'] = or_error(learn.hessian_spectrum, 2, n_batches=2)
    return res


# Files and deployment


@case
def files(folder):
    "Contents and sizes of files. The order of a safetensors header differs between processes"
    learn = trained(folder)
    learn.prune(0.9, scope='global')
    res = {}
    for name, half in (('whole', False), ('half', True)):
        learn.save_sparse(folder / name, half=half)
        res[f'{name} bytes'] = (folder / name).stat().st_size
        res[f'{name} loaded'] = fp.load_sparse(folder / name)
    fp.save_sparse(learn.model.state_dict(), folder / 'state')
    other = learner(folder)
    other.load_sparse(folder / 'half')
    res |= dict(state=fp.load_sparse(folder / 'state'), other=weights_and_masks(other))
    pruned = fp.to_torch_prune(learn.model, learn.masks)
    res['torch'] = [pruned.state_dict(), fp.from_torch_prune(pruned, permanent=True), pruned.state_dict()]
    learn.export('learner.pkl')
    back = load_learner(folder / 'learner.pkl')
    learn.export_plain('plain.pkl')
    plain = load_learner(folder / 'plain.pkl')
    return res | dict(exported=weights_and_masks(back), plain=plain.model.state_dict())


@case
def onnx(folder):
    import onnx

    learn = trained(folder)
    learn.prune(0.9)
    res = {}
    for sparse in (False, True):
        graph = onnx.load(learn.to_onnx(folder / 'model.onnx', sparse=sparse)).graph
        dense = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        res[f'sparse {sparse}'] = [dense, [(t.values.name, t.values.raw_data) for t in graph.sparse_initializer]]
    return res


@case
def kernels(folder):
    "Sparse layers for inference, and the classes that a whole model predicts"
    learn = trained(folder)
    learn.prune(0.9)
    x = learn.dls.valid.one_batch()[0]
    res = {}
    for i, stride, groups in ((1, 1, 1), (2, 2, 1), (3, 1, 2)):
        conv = nn.Conv2d(8, 12, 3, stride, 1, groups=groups)
        conv.weight.data.mul_(torch.rand_like(conv.weight) < 0.2)
        res[f'conv {i}'] = [fp.SparseConv(conv)(torch.randn(b, 8, 9, 11)) for b in (1, 8, 33)]
    linear = nn.Linear(70, 50)
    linear.weight.data.mul_(torch.rand_like(linear.weight) < 0.1)
    res['linear'] = [fp.SparseLinear(linear)(torch.randn(b, 70)) for b in (1, 8, 33)]
    model = learn.sparse_inference(bs=4, seconds=0.1)
    report = model.inference_report[['kind', 'shape', 'sparsity']]
    return res | dict(classes=model(x).argmax(1), report=report, layers=fp.semi_structured_layers(learn.model))


@case
def shrink(folder):
    learn = learner(folder)
    learn.fit(2, 0.02, cbs=sparsify(0.5, granularity='filter', scope='global'))
    x = learn.dls.valid.one_batch()[0]
    report = learn.shrink(repeats=1)
    report = report[[c for c in report.columns if 'ms' not in c and c not in ('latency', 'speedup', 'why')]]
    return dict(report=report, output=learn.model.eval()(x), **weights_and_masks(learn))


# Data, networks and the command


@case
def data_and_networks(folder):
    dls = fp.digits_dls(bs=72, size=12, channels=3, test_pct=0.1)
    res = dict(batches=[[list(b) for b in dl] for dl in dls])
    for name in ('digits_convnet', 'cifar_resnet', 'cifar_mobilenet'):
        set_seed(0)
        model = getattr(fp, name)()
        res[name] = [model.state_dict(), list(fp.prunable_weights(model))]
    odd = OddNet()
    return res | dict(odd=fp.prunable_weights(odd))


@case
def command(folder):
    import_module('fastprune.cli').main(epochs=1, sparsity=0.8, schedule='cubic', scope='global', out=folder / 'out')
    return dict(weights=torch.load(folder / 'out' / 'model.pth'), report=(folder / 'out' / 'report.csv').read_bytes())
