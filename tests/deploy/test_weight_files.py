"Files of weights of all kinds, read without running them, and compared"

import math
import os
import re

import cloudpickle
import numpy as np
import pytest
import torch
from fastai.basics import L
from torch import nn

from fastprune.all import Masks, SparsifyCallback, digits_dls, save_shrunk, save_sparse
from fastprune.deploy.compare_files import compare_files
from fastprune.deploy.torchfile import load_torch
from fastprune.deploy.weight_file import file_learner, read_weight_file
from fastprune.zoo.learners import digits_learner, quiet_fit
from fastprune.zoo.make import make_model, make_vision_model


@pytest.fixture(scope='module')
def pruned(tmp_path_factory):
    learn = digits_learner(tmp_path_factory.mktemp('learner'))
    quiet_fit(learn, 1, cbs=SparsifyCallback(0.9))
    return learn


def same(state, learn):
    want = learn.model.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(t.cpu(), state[n]) for n, t in want.items())


class Odd(nn.Module):
    "A shared layer, an empty place, a buffer that is not saved, a tied weight, extra attributes"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64, bias=False)
        self.b = self.a
        self.none = None
        self.register_buffer('saved', torch.ones(2))
        self.register_buffer('unsaved', torch.ones(3), persistent=False)
        self.register_parameter('nothing', None)
        self.c = nn.Linear(64, 10)
        self.c.extra = {('a', 1): [lambda x: x], Odd: {1, 2}}
        self.small = nn.Parameter(torch.ones(3, dtype=torch.float16)[1:])

    def forward(self, x):
        return self.c(self.b(self.a(x.flatten(1))))


def test_exports(pruned, tmp_path):
    "By all ways to export, with models of all kinds; masks, callbacks and data are in the file, too"
    pruned.export(tmp_path / 'a.pkl')
    same(load_torch(tmp_path / 'a.pkl'), pruned)
    pruned.export(tmp_path / 'b.pkl', pickle_protocol=4)
    same(load_torch(tmp_path / 'b.pkl'), pruned)
    pruned.export_plain(tmp_path / 'c.pkl')
    same(load_torch(tmp_path / 'c.pkl'), pruned)
    pruned.deploy(tmp_path / 'd.pkl')
    same(load_torch(tmp_path / 'd.pkl'), pruned)
    odd = digits_learner(tmp_path, model=Odd())
    odd.add_cb(SparsifyCallback(0.5, schedule=lambda pos: pos))
    odd.export('odd.pkl')
    same(load_torch(tmp_path / 'odd.pkl'), odd)
    odd.deploy(tmp_path / 'e.pkl')
    same(load_torch(tmp_path / 'e.pkl'), odd)
    torch.save(odd, tmp_path / 'legacy.pkl', _use_new_zipfile_serialization=False, pickle_module=cloudpickle)
    same(load_torch(tmp_path / 'legacy.pkl'), odd)


class Bomb:
    def __reduce__(self):
        return os.system, ('touch bombed',)


def test_nothing_in_an_export_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = digits_learner(tmp_path)
    learn.bomb, learn.model.bomb = Bomb(), [Bomb()]
    torch.save(learn, 'a.pkl', pickle_module=cloudpickle, pickle_protocol=2)
    learn.model.bomb = None
    same(load_torch('a.pkl'), learn)
    assert not (tmp_path / 'bombed').exists()
    learn.model[0].weight = None
    learn.model[0]._parameters['weight'] = Bomb()
    torch.save(learn, 'b.pkl', pickle_module=cloudpickle)
    with pytest.raises(ValueError, match='is no dense tensor'):
        load_torch('b.pkl')
    assert not (tmp_path / 'bombed').exists()


def test_objects_that_are_no_learners(tmp_path):
    for what in (nn.Linear(2, 2), {'model': nn.Linear(2, 2)}, L(nn.Linear(2, 2)), Bomb()):
        torch.save(what, tmp_path / 'a.pkl')
        with pytest.raises(ValueError, match=r'a\.pkl'):
            load_torch(tmp_path / 'a.pkl')


def test_modules_without_end(tmp_path):
    "A module inside of itself, and one with 2**40 names"
    learn = digits_learner(tmp_path)
    loop = nn.Sequential(nn.Linear(2, 2))
    loop._modules['again'] = loop
    many = nn.Linear(2, 2)
    for _ in range(40):
        many = nn.Sequential(many, many)
    for model in (loop, many):
        learn.__dict__['model'] = model
        torch.save(learn, tmp_path / 'a.pkl', pickle_module=cloudpickle)
        with pytest.raises(ValueError, match='more modules in the model'):
            load_torch(tmp_path / 'a.pkl')


def test_damaged_exports_are_one_error(pruned, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / 'a.pkl'
    pruned.deploy(path)
    good = path.read_bytes()
    for _ in range(40):
        bad = bytearray(good[: rng.integers(len(good))] if rng.random() < 0.3 else good)
        for _ in range(3):
            bad[rng.integers(min(len(bad), 3000))] = rng.integers(256)
        path.write_bytes(bad)
        try:
            load_torch(path)
        except ValueError as e:
            assert 'a.pkl' in str(e)


def test_networks_of_vision_learner(tmp_path):
    "From learn.save, with an optimizer or without, and from an export; masks and classes are found"
    pytest.importorskip('torchvision')
    learn = digits_learner(tmp_path, model=make_vision_model('squeezenet1_1', 3, 32))
    learn.prune(0.5)
    learn.create_opt()
    files = [learn.save('with'), learn.save('without', with_opt=False)]
    learn.export()
    for path in [*files, tmp_path / 'export.pkl']:
        loaded = file_learner(read_weight_file(path), 'squeezenet1_1', size=64)
        same(loaded.model.state_dict(), learn)
        assert loaded.sparsity_report().loc['total'].sparsity == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(ValueError, match=r"is not of arch='resnet18': '0.0.weight' is missing in the file"):
        file_learner(read_weight_file(files[0]), 'resnet18')


def test_networks_of_vision_learner_with_timm(tmp_path):
    pytest.importorskip('timm', reason='the network is timm\'s')
    model = make_vision_model('resnet10t', 3, 32)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    loaded = file_learner(read_weight_file(tmp_path / 'a.pth'), 'resnet10t', size=32)
    assert list(loaded.model.state_dict()) == list(model.state_dict())


def test_shrunk_networks(tmp_path):
    pytest.importorskip('torchvision')
    learn = digits_learner(tmp_path, model=make_model('resnet18', 10, 32))
    learn.dls = digits_dls(bs=8, size=32, channels=3)
    learn.prune(0.5, granularity='channel')
    dense = learn.save('dense')
    learn.shrink(repeats=0)
    save_shrunk(learn, tmp_path / 'small.safetensors')
    file = read_weight_file(tmp_path / 'small.safetensors')
    same(file.state, learn)
    same(file_learner(file, 'resnet18', size=32).model.state_dict(), learn)
    found = compare_files(dense, tmp_path / 'small.safetensors', 'resnet18', size=32, seconds=0)
    total = found.layers.loc['total']
    assert total['weights b'] < total['weights a'] and math.isnan(found.layers.loc['conv1.weight', 'mask distance'])
    flops = found.files.loc['FLOPs'].tolist()
    assert flops[1] < flops[0] and ', ' in found.layers.loc['conv1.weight', 'shape']


def test_comparison(pruned, tmp_path):
    "All numbers against those of the Learner; masks that a file has count, and else zeros"
    pruned.save_sparse(tmp_path / 'a')
    other = {n: t.clone() for n, t in pruned.model.state_dict().items()}
    other['0.0.weight'][:] = 1
    gone = other.pop('3.weight', None)
    torch.save(other, tmp_path / 'b.pth')
    found = compare_files(tmp_path / 'a', tmp_path / 'b.pth')
    report, table = pruned.sparsity_report(), found.layers
    for n, row in report.drop('total').iterrows():
        assert table.loc[n, 'weights a'] == row.weights and table.loc[n, 'nonzero a'] == row.nonzero
        assert table.loc[n, 'sparsity a'] == pytest.approx(row.sparsity)
        distance = Masks({n: pruned.masks[n]}).jaccard({n: other[n] != 0}) if n in other else math.nan
        assert table.loc[n, 'mask distance'] == pytest.approx(distance, nan_ok=True)
    assert table.loc['0.0.weight', 'sparsity b'] == 0 and gone is None or '3.weight' in table.index
    assert found.files.loc['bytes'].tolist() == [(tmp_path / o).stat().st_size for o in ('a', 'b.pth')]
    assert found.files.loc['bytes without zeros'].iloc[0] == (tmp_path / 'a').stat().st_size
    text = str(found)
    assert 'mask distance' in text and '90.0' in text and 'kB' not in text and 'nan' not in text and 'bytes' in text


def test_comparison_with_a_network(tmp_path):
    pytest.importorskip('torchvision')
    model = make_model('squeezenet1_1', 3, 32)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    save_sparse(model.state_dict(), tmp_path / 'b')
    found = compare_files(tmp_path / 'a.pth', tmp_path / 'b', 'squeezenet1_1', size=32, seconds=0.2)
    assert {'FLOPs', 'FLOPs kept', 'ms'} <= set(found.files.index) and not found.layers['mask distance'].any()
    assert re.search(r'\nms +[\d.]+ ms +[\d.]+ ms', str(found))
    with pytest.raises(ValueError, match=r"is not of arch='resnet18'"):
        compare_files(tmp_path / 'a.pth', tmp_path / 'b', 'resnet18')


def test_a_file_of_no_weights(tmp_path):
    torch.save({'bias': torch.ones(3)}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'a\.pth has no weights that can be pruned'):
        compare_files(tmp_path / 'a.pth', tmp_path / 'a.pth')
