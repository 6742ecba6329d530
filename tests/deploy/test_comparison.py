"One table of what pruning has done"

import math
import threading

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.basics import DataLoaders, Learner, nn

from fastprune.all import SparsifyCallback, digits_convnet, digits_dls, save_sparse, state_of
from fastprune.deploy.before_after import BeforeAfter

pytestmark = pytest.mark.filterwarnings('ignore')


def quick(learn, *args, **kwargs):
    return learn.compare(*args, **dict(seconds=0, onnx=False) | kwargs)


@pytest.fixture
def pruned(learner, fit):
    learn = fit(learner(digits_convnet()), 1)
    dense = state_of(learn)
    with learn.no_bar(), learn.no_logging():
        scores = learn.validate()
    learn.prune(0.9)
    return learn, dense, scores


def test_all_rows(pruned):
    learn, dense, scores = pruned
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    keys, cbs = set(learn.__dict__), list(learn.cbs)
    table = learn.compare(dense, seconds=0.2, onnx=False)
    assert set(learn.__dict__) == keys and list(learn.cbs) == cbs and learn.masks
    assert type(table) is BeforeAfter and table.index.name == 'name'
    assert list(table.index) == [
        *('valid_loss', 'accuracy', 'weights', 'nonzero weights', 'FLOPs'),
        *('file: state_dict', 'file: save_sparse', 'file: export', 'file: deploy'),
        *('latency: plain', 'latency: sparse_inference'),
    ]
    assert [table.before['valid_loss'], table.before['accuracy']] == pytest.approx(scores)
    with learn.no_bar():
        assert [table.after['valid_loss'], table.after['accuracy']] == pytest.approx(learn.validate())
    report, flops = learn.sparsity_report().loc['total'], learn.flops().loc['total']
    assert table.before['weights'] == table.after['weights'] == report.weights
    assert table.after['nonzero weights'] == report.nonzero and table.before['nonzero weights'] > report.nonzero
    assert (table.before['FLOPs'], table.after['FLOPs']) == (flops.dense, flops.nonzero)
    assert table.after['file: deploy'] < 0.3 * table.before['file: deploy']
    assert table.after['file: save_sparse'] < 0.2 * table.before['file: save_sparse']
    assert (table.after.loc['latency: plain':] > 0).all() and table.before['latency: plain'] > 0
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_the_dense_network_in_all_its_forms(pruned, tmp_path):
    learn, dense, scores = pruned
    torch.save(dense, tmp_path / 'dense.pth')
    save_sparse(dense, tmp_path / 'dense.safetensors')
    model = digits_convnet()
    model.load_state_dict(dense)
    for form in (
        tmp_path / 'dense.pth',
        str(tmp_path / 'dense.safetensors'),
        model,
        Learner(learn.dls, model, loss_func=learn.loss_func),
    ):
        table = quick(learn, form)
        assert table.before['accuracy'] == pytest.approx(scores[1])
    table = quick(learn)
    assert math.isnan(table.before['accuracy']) and 'give the `dense` network' in table.note['accuracy']
    assert table.before['file: export'] > 0 and table.before['FLOPs'] > table.after['FLOPs']


def test_channels(learner, fit):
    learn = fit(learner(digits_convnet()), 1)
    wide = Learner(learn.dls, digits_convnet(), loss_func=learn.loss_func)
    wide.model.load_state_dict(state_of(learn))
    fit(learn, 1, cbs=SparsifyCallback(0.5, granularity='channel'))
    tables = [quick(learn, wide)]
    latencies = learn.compare(seconds=0.2, onnx=False).filter(like='latency', axis=0)
    assert [o.split(': ')[1] for o in latencies.index] == ['plain', 'shrunk', 'sparse_inference']
    learn.shrink()
    tables.append(quick(learn, wide))
    for t in tables:
        assert t.after['weights'] < t.before['weights'] and t.after['file: export'] < t.before['file: export']
    assert tables[0].after['weights'] == tables[1].after['weights']
    alone = quick(learn)  # of the dense network nothing is left
    assert alone.before.isna().all() and alone.after['weights'] == tables[0].after['weights']
    with pytest.raises(ValueError, match=r"dense: '0.0.weight' is \(\d+, 1, 3, 3\) there"):
        quick(learn, state_of(wide))


def test_the_picture(pruned):
    table = quick(pruned[0], pruned[1])
    ax = table.plot()
    assert len(ax.patches) == 7 and 'accuracy' in ax.get_title() and '→' in ax.texts[0].get_text()
    _, own = plt.subplots()
    assert quick(pruned[0]).plot(own) is own
    plt.close('all')


def test_how_it_is_shown(pruned):
    table = quick(pruned[0], pruned[1])
    text = repr(table)
    assert 'MB' in text and 'FLOPs' in text and '%' in text and '<table' in table._repr_html_()
    assert 'MB' not in repr(table[['before', 'after']])  # a part of it is a DataFrame as others
    assert table.texts().loc['weights', 'change'] == '100%'


def test_what_can_not_be_measured_has_a_note(pruned):
    learn, dense, _ = pruned
    learn.model.log = threading.Lock()
    table = quick(learn)
    del learn.model.log
    assert math.isnan(table.after['file: deploy']) and "learn.model.log can't be written" in table.note['file: deploy']
    assert table.after['accuracy'] >= 0


def test_without_a_validation_set():
    dl = digits_dls(bs=64).train
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    learn = Learner(DataLoaders(dl), model, loss_func=nn.CrossEntropyLoss())
    learn.prune(0.5)
    assert list(quick(learn).index[:1]) == ['weights']


@pytest.mark.parametrize(
    'kwargs,match',
    [
        (dict(dense=3), 'dense=int: needs a state_dict'),
        (dict(dense='missing.pth'), "there is no file 'missing.pth'"),
        (dict(dense={'a': torch.ones(1)}), r"dense: '0.0.weight' is missing there"),
        (dict(bs=0), 'bs=0'),
        (dict(seconds=-1), 'seconds=-1: needs a number of seconds'),
        (dict(onnx='yes'), "onnx='yes': needs True, False"),
    ],
)
def test_wrong_arguments(learner, kwargs, match):
    with pytest.raises(ValueError, match=match):
        quick(learner(), **kwargs)
