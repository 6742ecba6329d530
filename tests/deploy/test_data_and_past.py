"What deploying does with a Learner's past and data, and what it refuses at once"

import numpy as np
import pytest
import torch
from fastai.basics import DataLoaders, Learner, accuracy, load_learner, set_seed
from fastai.callback.all import ShortEpochCallback
from PIL import Image
from torch import nn

from fastprune.all import digits_dls, folder_dls, to_onnx
from fastprune.deploy.shrunk_file import is_shrunk
from fastprune.deploy.weight_file import check_network

pytestmark = pytest.mark.cpu_only


def quick(dls=None, **kwargs):
    set_seed(0)
    dls = dls or digits_dls(bs=32, valid_pct=0.05, test_pct=0.9)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy, **kwargs)


def test_a_learner_without_a_validation_set_is_timed_on_its_training_set():
    learn = quick(DataLoaders(digits_dls(bs=32, test_pct=0.7).train))
    learn.prune(0.5)
    assert learn.sparse_inference(seconds=0.01).inference_report is not None
    assert 'accuracy' not in learn.compare(seconds=0.01, onnx=False).index


def test_the_page_of_a_fit_that_began_at_a_later_epoch(tmp_path):
    learn = quick()
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, 1e-2, start_epoch=2)
    assert learn.report(tmp_path / 'r.html', seconds=0).exists()


def test_the_split_of_a_folder_leaves_random_numbers_alone(tmp_path):
    for c in 'ab':
        (tmp_path / c).mkdir()
        for i in range(6):
            Image.fromarray(np.full((8, 8, 3), 20 * i, 'uint8')).save(tmp_path / c / f'{i}.png')
    numbers = []
    for make in (lambda: None, lambda: folder_dls(tmp_path, bs=2, size=8)):
        torch.manual_seed(3)
        make()
        numbers.append(torch.rand(2))
    assert torch.equal(*numbers)


def test_other_processes_have_a_table_without_files(monkeypatch):
    learn = quick()
    learn.prune(0.5)
    monkeypatch.setenv('RANK', '1')
    table = learn.compare(seconds=0, onnx=False)
    assert 'only the first process writes files' in ' '.join(map(str, table.note))


@pytest.mark.parametrize('shrink', [False, 0, np.bool_(False)])
def test_channels_stay_where_shrink_is_false_in_any_way(tmp_path, shrink):
    learn = quick(path=tmp_path)
    learn.prune(0.5, granularity='channel')
    with pytest.warns(UserWarning, match='insecure pickle'):
        loaded = load_learner(learn.deploy(tmp_path / 'm.pkl', shrink=shrink))
    assert loaded.model[1].out_features == 16


def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch):
    learn = quick()
    monkeypatch.setattr('fastprune.deploy.export._check_size', lambda *args: pytest.fail('it has begun'))
    with pytest.raises(ValueError, match='is a folder: needs a file to write'):
        to_onnx(learn.model, torch.randn(1, 1, 8, 8), tmp_path)
    (tmp_path / 'notes.txt').touch()
    with pytest.raises(ValueError, match=r"notes.txt' is a file, and no folder to write to"):
        learn.report(tmp_path / 'notes.txt' / 'r.html')


def test_shrinking_that_cuts_nothing_changes_nothing():
    learn = quick()
    learn.prune(0.25, granularity='channel')
    learn.shrink(round_to=16)
    assert learn.model[1].out_features == 16 and not is_shrunk(learn.model)


@pytest.mark.parametrize('wrong', [dict(classes=10.0, size=None), dict(classes=None, size=224.5)])
def test_classes_and_pixels_are_whole(wrong):
    with pytest.raises(ValueError, match='needs a whole number above 0'):
        check_network('resnet18', **wrong)


def test_a_validation_that_is_cut_short_is_a_note():
    learn = quick()
    learn.prune(0.5)
    learn.add_cb(ShortEpochCallback(0.1))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert 'ShortEpochCallback' in ' '.join(map(str, learn.compare(seconds=0, onnx=False).note))
