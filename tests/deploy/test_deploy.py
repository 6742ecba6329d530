"Small files that fastai alone loads and predicts with"

import copy
import io
import pickle
import pickletools
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, load_learner, nn
from fastai.callback.rnn import rnn_cbs
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.core import TfmdDL
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.models import AWD_LSTM, awd_lstm_clas_config, get_text_classifier

from fastprune.all import SparsifyCallback, TensorData, cifar_resnet, digits_dls
from fastprune.deploy.compact_file import CompactPickler, compact_pickle, shared_memory
from fastprune.deploy.plain_export import write_plain

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.cpu_only]  # the files are read there


def size(path):
    return path.stat().st_size


def tensors(learn):
    return {**dict(learn.model.named_parameters()), **dict(learn.model.named_buffers())}


def same_bits(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype and a[n].stride() == b[n].stride() for n in a
    )


def names_in(path):
    "All that a file of torch's imports when it is read"
    with zipfile.ZipFile(path) as z:
        data = z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))
    return {arg.replace(' ', '.') for op, arg, _ in pickletools.genops(data) if op.name == 'GLOBAL'}


def wide(learner, **kwargs):
    return learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 800), nn.ReLU(), nn.Linear(800, 10)), **kwargs)


@pytest.mark.parametrize('sparsity,most', [(0.9, 0.125), (0.95, 0.065), (0.0, 1.0)])
def test_zeros_take_almost_no_room(learner, tmp_path, sparsity, most):
    learn = wide(learner)
    learn.prune(sparsity)
    learn.export_plain('plain.pkl')
    assert learn.deploy(tmp_path / 'model.pkl') == tmp_path / 'model.pkl'
    dense = sum(p.nbytes for p in learn.model.parameters())
    rest = size(tmp_path / 'plain.pkl') - dense  # what does not depend on the weights
    assert size(tmp_path / 'model.pkl') < most * dense + rest + 8000
    assert same_bits(learn, load_learner(tmp_path / 'model.pkl'))


def test_only_torch_numpy_fastai_and_python_are_needed(learner, tmp_path):
    learn = wide(learner, cbs=SparsifyCallback(0.5))
    learn.prune(0.9)
    learn.deploy(tmp_path / 'model.pkl')
    roots = {n.split('.')[0] for n in names_in(tmp_path / 'model.pkl')}
    python = {n for n in roots if n in sys.stdlib_module_names or n in ('__builtin__', 'copy_reg')}
    assert roots - python <= {'torch', 'numpy', 'fastai', 'fastcore', 'fasttransform', 'cloudpickle', 'fastprogress'}


def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame({'a': rng.choice(list('xyz'), 96), 'b': rng.normal(size=96), 'y': rng.choice(['p', 'q'], 96)})


def tabular():
    procs = [Categorify, Normalize]
    dls = TabularDataLoaders.from_df(table(), procs=procs, cat_names=['a'], cont_names=['b'], y_names='y', bs=32)
    return tabular_learner(dls, layers=[64, 32])


def collab():
    rng = np.random.default_rng(0)
    ratings = dict(user=rng.choice(list('abcdefgh'), 96), item=rng.choice(list('rstuvwxyz'), 96), rating=rng.random(96))
    return collab_learner(CollabDataLoaders.from_df(pd.DataFrame(ratings), bs=16), use_nn=True, layers=[64, 32])


def text():
    ids = torch.randint(2, 40, (16, 11), generator=torch.Generator().manual_seed(1))
    data = TensorData(ids, torch.arange(16) % 3, list('abc'))
    dls = DataLoaders(*(TfmdDL(data, bs=4) for _ in range(2)))
    config = dict(awd_lstm_clas_config, emb_sz=24, n_hid=32, n_layers=2)
    model = get_text_classifier(AWD_LSTM, 40, 3, seq_len=6, config=config)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs())


def tied_net():
    layers = nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 10)
    layers[3].weight = layers[1].weight
    return nn.Sequential(*layers)


def digits(model=None, channels=1):
    model = tied_net() if model is None else model
    return Learner(digits_dls(channels=channels), model, loss_func=CrossEntropyLossFlat())


def cut():
    learn = digits(cifar_resnet(8), 3)
    learn.prune(0.5, granularity='channel')
    return learn


KINDS = dict(tabular=tabular, collab=collab, text=text, tied=digits, ours=lambda: digits(cifar_resnet(8), 3), cut=cut)


def test_predictions_elsewhere(tmp_path):
    "In a Python that can't import fastprune, `get_preds` gives the same bits, and `predict` the same class"
    code = """import sys; sys.modules['fastprune'] = None
from fastai.tabular.all import *
for folder in map(Path, sys.argv[1:]):
    learn, batches = load_learner(folder/'model.pkl'), torch.load(folder/'batches.pt')
    with learn.no_bar(): preds = learn.get_preds(dl=batches, with_decoded=True)
    torch.save([preds[0], preds[2]], folder/'preds.pt')
    if folder.name == 'tabular':
        row, i, p = learn.predict(pd.Series({'a': 'x', 'b': 0.3}))
        torch.save([row['y'].item(), i, p], folder/'one.pt')
"""
    wanted = {}
    for kind, make in KINDS.items():
        (folder := tmp_path / kind).mkdir()
        torch.manual_seed(0)
        learn = make()
        if learn.masks is None:
            learn.prune(0.8)
        batches = [tuple(t.as_subclass(torch.Tensor) for t in b) for b in [learn.dls.valid.one_batch()]]
        torch.save(batches, folder / 'batches.pt')
        learn.deploy(folder / 'model.pkl')
        with learn.no_bar():
            wanted[kind] = learn.get_preds(dl=batches, with_decoded=True)
            if kind == 'tabular':
                one = learn.predict(pd.Series({'a': 'x', 'b': 0.3}))
    folders = [str(tmp_path / k) for k in KINDS]
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for kind, (preds, _, decoded) in wanted.items():
        there = torch.load(tmp_path / kind / 'preds.pt')
        close = torch.allclose(there[0], preds, atol=1e-5) if kind == 'cut' else torch.equal(there[0], preds)
        assert close and torch.equal(there[1], decoded), kind
    label, i, p = torch.load(tmp_path / 'tabular' / 'one.pt')
    assert label == one[0]['y'].item() and i == one[1] and torch.equal(p, one[2])


def test_reading_in_this_process_changes_no_class(tmp_path):
    "The file has classes of fastprune's by value. cloudpickle would write what it reads over those here"
    learn = digits(cifar_resnet(8), 3)
    classes = {type(learn.dls.train_ds), *map(type, learn.model.modules())}
    methods = lambda: [{n: f for n, f in vars(c).items() if callable(f)} for c in classes]
    before = methods()
    write_plain(learn, tmp_path / 'plain.pkl')
    for path in (tmp_path / 'plain.pkl', learn.deploy(tmp_path / 'model.pkl')):
        assert same_bits(learn, load_learner(path))
        assert methods() == before


def test_a_tied_weight_stays_tied(tmp_path):
    learn = digits()
    learn.prune(0.8)
    learn.deploy(tmp_path / 'model.pkl')
    again = load_learner(tmp_path / 'model.pkl')
    assert again.model[1].weight is again.model[3].weight and isinstance(again.model[1].weight, nn.Parameter)
    again.dls = learn.dls
    with again.no_bar(), again.no_logging():
        again.fit(1)  # it can be trained on
    assert not torch.equal(again.model[1].weight, learn.model[1].weight)


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer, pickle_module=compact_pickle(model), pickle_protocol=3)
    n = buffer.tell()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False), n


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_types_and_layouts(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.Linear(64, 100)).to(dtype)
    model[0].to(memory_format=torch.channels_last)
    model[2].weight = nn.Parameter(model[2].weight.detach().T, requires_grad=False)
    for p in (model[0].weight, model[2].weight):
        p.data[torch.rand(p.shape) < 0.9] = 0
    model[0].weight.data[0, 0, 0, 0] = torch.finfo(dtype).tiny / 2  # subnormal
    model[0].weight.data[0, 0, 0, 1] = float('nan')
    again, n = through_a_file(model)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert n < 0.35 * sum(p.nbytes for p in model.parameters()) + 6000


def test_memory_that_is_shared_stays_shared():
    layer = nn.Linear(64, 64)
    layer.weight.data[:60] = 0
    layer.register_buffer('row', layer.weight.detach()[63])
    assert len(shared_memory(layer)) == 1
    again, _ = through_a_file(layer)
    again.row.fill_(7)
    assert (again.weight[63] == 7).all() and not again.weight[:60].any()


def test_recurrent_layers(tmp_path):
    torch.manual_seed(0)
    model = nn.LSTM(32, 32, 2)
    for n, p in model.named_parameters():
        if 'weight' in n:
            p.data[torch.rand(p.shape) < 0.9] = 0
    again, n = through_a_file(model)
    x = torch.randn(5, 2, 32)
    assert torch.equal(model(x)[0], again(x)[0]) and n < 0.5 * sum(p.nbytes for p in model.parameters())
    assert again._flat_weights[0] is again.weight_ih_l0
    assert pickle.loads(pickle.dumps(again)) is not None and copy.deepcopy(again)(x)[0].equal(again(x)[0])


def test_the_learner_stays_as_it_is(learner, fit, tmp_path):
    learn = learner(cbs=SparsifyCallback(0.5, granularity='channel'))
    fit(learn, 1)
    before, cbs, masks, opt = dict(learn.__dict__), list(learn.cbs), learn.masks, learn.opt
    state = copy.deepcopy(learn.model.state_dict())
    hooks = [len(m._forward_hooks) for m in learn.model.modules()]
    learn.deploy(tmp_path / 'model.pkl')
    assert before.keys() == learn.__dict__.keys() and all(learn.__dict__[k] is v for k, v in before.items())
    assert list(learn.cbs) == cbs and learn.masks == masks and learn.opt is opt
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in state.items())
    assert hooks == [len(m._forward_hooks) for m in learn.model.modules()]
    weights = [sum(p.numel() for p in l.model.parameters()) for l in (load_learner(tmp_path / 'model.pkl'), learn)]
    assert weights[0] < weights[1]
    learn.deploy(tmp_path / 'wide.pkl', shrink=False)
    assert same_bits(load_learner(tmp_path / 'wide.pkl'), learn)


@pytest.mark.parametrize(
    'kwargs,match',
    [
        (dict(path=3), "path=3: needs the name of a file"),
        (dict(path=''), "path='': needs the name"),
        (dict(path='.'), 'is a folder'),
        (dict(path='missing/model.pkl'), "there is no directory 'missing'"),
        (dict(path='model.pkl', shrink='yes'), "shrink='yes': needs True, False, or None"),
        (dict(path='model.pkl', shrink=True), "shrink=True: there are no masks that prune channels"),
    ],
)
def test_wrong_arguments(learner, tmp_path, monkeypatch, kwargs, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=match):
        learner().deploy(**kwargs)
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_is_named(learner, tmp_path):
    learn, path = learner(), tmp_path / 'model.pkl'
    path.write_text('the file before')
    learn.model.locks = {'log': threading.Lock()}
    with pytest.raises(ValueError, match=r"learn\.model\.locks\['log'\] can't be written to a file: .*lock"):
        learn.deploy(path)
    del learn.model.locks
    learn.prune(0.5)
    learn.mine = [learn.masks]
    with pytest.raises(ValueError, match=r'fastprune.*is needed to load this Learner, by learn\.mine\[0\]'):
        learn.deploy(path)
    del learn.mine
    learn.model.own = SparsifyCallback(0.5)
    with pytest.raises(ValueError, match='is needed to load this Learner, by learn.model.own'):
        learn.deploy(path)
    assert path.read_text() == 'the file before' and not list(tmp_path.glob('*.part'))


def test_data_that_can_not_be_left_out(learner, tmp_path):
    data = DataLoaders(TfmdDL([(torch.rand(1, 8, 8), 0)], bs=1))
    with pytest.raises(ValueError, match="learn.dls can't be written without its data.*DataBlock"):
        Learner(data, learner().model, loss_func=nn.CrossEntropyLoss()).deploy(tmp_path / 'model.pkl')


def test_not_within_a_fit(learner, tmp_path):
    class Now(Callback):
        def after_batch(self):
            with pytest.raises(ValueError, match='a fit is running'):
                self.learn.deploy(tmp_path / 'model.pkl')
            self.refused = True

    learn = learner(cbs=Now())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.now.refused and not (tmp_path / 'model.pkl').exists()


def test_the_fast_form_on_the_machine_that_serves(learner, tmp_path):
    learn = wide(learner)
    learn.prune(0.9)
    learn.deploy(tmp_path / 'model.pkl')
    served, x = load_learner(tmp_path / 'model.pkl'), torch.rand(1, 1, 8, 8)
    wanted = served.model.eval()(x)
    served.model = served.sparse_inference(example=x, seconds=0.3)
    assert torch.allclose(served.model(x), wanted, atol=1e-4)
    with served.no_bar():
        preds = served.get_preds(dl=[(x, torch.tensor([0]))])[0]
    assert torch.allclose(preds, wanted.softmax(1), atol=1e-4)
    served.path = tmp_path
    served.export('fast.pkl')
    assert torch.allclose(load_learner(tmp_path / 'fast.pkl').model.eval()(x), wanted, atol=1e-4)


def test_tensors_with_a_graph_are_written_as_usual():
    w = torch.zeros(64, 64, requires_grad=True)
    buffer = io.BytesIO()
    pickler = CompactPickler(buffer, protocol=3)
    pickler.dump([w, w.detach().to_sparse(), torch.zeros(64, 64, dtype=torch.int64)])
    a, b, c = pickle.loads(buffer.getvalue())
    assert a.requires_grad and b.is_sparse and c.dtype == torch.int64 and not c.any()


def test_an_export_that_fails_leaves_the_old_file(learner, tmp_path):
    learn = learner()
    learn.model.requires_grad_(False)
    learn.export()
    whole = (tmp_path / 'export.pkl').read_bytes()
    learn.model.odd = (o for o in ())
    with pytest.raises(TypeError, match='generator'):
        learn.export()
    assert (tmp_path / 'export.pkl').read_bytes() == whole and not list(tmp_path.glob('*.part'))
