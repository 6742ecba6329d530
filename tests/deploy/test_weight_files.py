"Files of weights of all kinds, read without running them, and compared"

import json
import math
import os
import re
import struct

import cloudpickle
import numpy as np
import pytest
import torch
from fastai.basics import L
from safetensors.torch import save_file
from torch import nn

from fastprune.all import (
    Masks,
    SparsifyCallback,
    digits_dls,
    load_shrunk,
    load_state,
    save_shrunk,
    save_sparse,
    save_state,
)
from fastprune.cli_flags import stopping
from fastprune.core.files import load_tensors, state_crc
from fastprune.core.json_files import read_json
from fastprune.deploy.compare_files import compare_files
from fastprune.deploy.report_file import report_file
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
    with pytest.raises(ValueError, match=r'classes=7: .* has 3$'):
        file_learner(read_weight_file(files[0]), 'squeezenet1_1', classes=7, size=64)


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


@pytest.mark.parametrize('start', [0x80, 0x4B50])
def test_headers_of_any_size(tmp_path, start):
    "The size of a header comes first in a file of safetensors; a pickle and a zip file start with such bytes, too"
    state = {'fc.weight': torch.randn(3, 3)}
    head = json.dumps({'fc.weight': {'dtype': 'F32', 'shape': [3, 3], 'data_offsets': [0, 36]}}).encode().ljust(start)
    (tmp_path / 'a').write_bytes(struct.pack('<Q', start) + head + state['fc.weight'].numpy().tobytes())
    assert torch.equal(read_weight_file(tmp_path / 'a').state['fc.weight'], state['fc.weight'])


def test_extra_state_is_no_weight(tmp_path):
    pytest.importorskip('plotly')
    save_sparse({'fc.weight': torch.eye(30), 'fc._extra_state': {'scale': 1}}, tmp_path / 'a')
    assert compare_files(tmp_path / 'a', tmp_path / 'a').files.loc['numbers'].tolist() == [900, 900]
    page = report_file(tmp_path / 'a', out=tmp_path / 'page.html', seconds=0).read_text()
    assert '900 numbers in 1 tensors' in page


def test_masks_of_whole_numbers(tmp_path):
    "A file may have them; what is compared is weights"
    masks = {n: torch.ones(9, 9).bool() for n in ('codes', 'fc.weight')}
    codes = torch.ones(9, 9, dtype=torch.uint16)
    save_sparse({'codes': codes, 'fc.weight': torch.ones(9, 9)}, tmp_path / 'a', masks=masks)
    assert list(compare_files(tmp_path / 'a', tmp_path / 'a').layers.index) == ['fc.weight', 'total']


def test_masks_of_channels(tmp_path):
    "Norms and biases have masks, too, and are no weights"
    names, kept = ('0.weight', '0.bias', '1.weight', '1.bias'), torch.arange(30) > 3
    state = {n: torch.ones(30, 30) if n == '0.weight' else torch.ones(30) for n in names}
    masks = {n: kept[:, None].expand(30, 30).clone() if n == '0.weight' else kept for n in names}
    save_sparse({n: t * masks[n] for n, t in state.items()}, tmp_path / 'a', masks=masks)
    torch.save(state, tmp_path / 'b.pth')
    table = compare_files(tmp_path / 'a', tmp_path / 'b.pth').layers
    assert list(table.index) == ['0.weight', 'total']
    assert table.loc['total', ['weights a', 'weights b', 'nonzero a']].tolist() == [900, 900, 780]


def test_numbers_that_are_no_networks(tmp_path):
    pytest.importorskip('torchvision')
    state = make_model('squeezenet1_1', 3, 32).state_dict()
    torch.save({n: t.to(torch.uint64) for n, t in state.items()}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r"a\.pth is not of arch='squeezenet1_1': '.*' has numbers of torch.uint64"):
        file_learner(read_weight_file(tmp_path / 'a.pth'), 'squeezenet1_1', size=32)
    torch.save({n: t[:0] if n.startswith('classifier') else t for n, t in state.items()}, tmp_path / 'b.pth')
    with pytest.raises(ValueError, match=r"b\.pth is of a network without classes: 'classifier.1.bias'"):
        file_learner(read_weight_file(tmp_path / 'b.pth'), 'squeezenet1_1', size=32)


def test_errors_say_what_is_wrong(pruned, tmp_path):
    "Not only which class of errors zipfile, zlib or pickle have raised"
    path = tmp_path / 'a.pkl'
    torch.save({'a': torch.ones(3)}, path)
    good = path.read_bytes()
    for bad, why in (
        (good[:-30], 'not a zip file'),
        (good.replace(b'data/0', b'data/1'), "it has no 'data/0'"),
        (b'\x80\x02', 'it ends too early'),
        (b'\x80\x02.', 'its pickle is none that torch writes'),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"a\.pkl can't be read, or is damaged: .*({why})"):
            load_torch(path)


def test_another_kind_of_file_is_not_called_by_the_size_of_a_header(tmp_path):
    torch.save({'a.weight': torch.ones(3, 3)}, tmp_path / 'a.pth')
    (tmp_path / 'b.pth').write_text('some text')
    with pytest.raises(ValueError, match='as another kind of file, as torch.save writes it, and not as one of safet'):
        load_state(tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='it begins as another kind of file and not as one of safetensors'):
        read_weight_file(tmp_path / 'b.pth')
    with pytest.raises(ValueError, match='is a folder: needs a file of weights'):
        read_weight_file(tmp_path)


@pytest.mark.parametrize('out, message', [('', "out='': needs the name of a file"), ('.', 'out=.* is a folder')])
def test_where_a_report_can_not_be_written(pruned, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    torch.save(pruned.model.state_dict(), 'a.pth')
    with pytest.raises(ValueError, match=message):
        report_file('a.pth', out=out, seconds=0)


def test_a_report_does_not_overwrite_what_it_reads(pruned, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(pruned.model.state_dict(), path)
    whole = path.read_bytes()
    for out in (path, tmp_path / '..' / tmp_path.name / 'a.pth'):
        with pytest.raises(ValueError, match='is the file to read, and would be overwritten'):
            report_file(path, out=out, seconds=0)
    assert path.read_bytes() == whole


@pytest.mark.parametrize('load', [read_weight_file, read_json])
def test_files_of_a_disk_that_fails(load, monkeypatch, tmp_path):
    "Python's own error for it names no file"

    def fail(self, *args, **kwargs):
        raise OSError(5, 'Input/output error')

    (tmp_path / 'a').write_text('{}')
    monkeypatch.setattr('pathlib.Path.open', fail)
    monkeypatch.setattr('pathlib.Path.read_bytes', fail)
    with pytest.raises(ValueError, match=r"a can't be read: .*Input/output error"):
        load(tmp_path / 'a')


class Scaled(nn.Linear):
    "A layer with extra state"

    def get_extra_state(self):
        return self.scale

    def set_extra_state(self, state):
        self.scale = state if isinstance(state, torch.Tensor) else state['scale']


def scaled(state):
    model = nn.Sequential(Scaled(3, 3), nn.BatchNorm1d(3))
    model[0].scale = state
    return model


def test_extra_state_of_a_shrunk_model(tmp_path):
    "Extra state may be a tensor; what the module can't take is an error that names the file"
    save_shrunk(scaled(torch.tensor([2.0])), tmp_path / 'a')
    assert load_shrunk(tmp_path / 'a', lambda: scaled(None))[0].scale.tolist() == [2]
    save_shrunk(scaled({'size': 2}), tmp_path / 'a')
    with pytest.raises(ValueError, match="a is of another .*'0._extra_state' can't be taken over"):
        load_shrunk(tmp_path / 'a', lambda: scaled(None))


HOSTILE_PARTS = {
    '0.weight': (torch.ones(3, 3, dtype=torch.int64), 'has numbers of torch.int64'),
    'attribute:forward': (torch.ones(1), "'forward' is no tensor"),
    'attribute:0.training': (torch.ones(1), "'0.training' is no tensor"),
    'attribute:0.weight': (torch.ones(1), "'0.weight' is no tensor"),
    'attribute:_is_full_backward_hook': (torch.ones(1), "'_is_full_backward_hook' is no tensor"),
}


@pytest.mark.parametrize('name', HOSTILE_PARTS)
def test_parts_that_no_shrunk_model_has(tmp_path, name):
    t, why = HOSTILE_PARTS[name]
    save_shrunk(nn.Sequential(nn.Linear(3, 3)), tmp_path / 'a')
    tensors, meta = load_tensors(tmp_path / 'a')
    save_state({**tensors, name: t}, tmp_path / 'a', {'shrunk': meta['shrunk']})
    with pytest.raises(ValueError, match=f'a is of another architecture .*{why}'):
        load_shrunk(tmp_path / 'a', lambda: nn.Sequential(nn.Linear(3, 3)))


def test_json_in_place_of_a_tensor(tmp_path):
    "JSON is there for the extra state of modules alone"
    meta = {'others': json.dumps({'fc.weight': [1]})}
    save_file({}, tmp_path / 'a', {**meta, 'checksum': state_crc({}, meta)})
    with pytest.raises(ValueError, match='a can.t be read, or is damaged: it has more than tensors'):
        load_state(tmp_path / 'a')


def test_a_file_of_no_weights(tmp_path):
    torch.save({'bias': torch.ones(3)}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'a\.pth has no weights that can be pruned'):
        compare_files(tmp_path / 'a.pth', tmp_path / 'a.pth')


def test_what_strangers_write_is_not_obeyed_by_a_terminal(tmp_path, capsys):
    "Names, kinds of files and classes are shown with escapes, and never wider than a line or two"
    clear = '\x1b[2J\x07'
    save_file({clear: torch.ones(2, 2), 'w' * 10**6: torch.ones(2, 2)}, tmp_path / 'a')
    text = str(compare_files(tmp_path / 'a', tmp_path / 'a'))
    assert '\x1b' not in text and r'\x1b[2J\x07' in text and max(map(len, text.splitlines())) < 400
    save_file({'w': torch.ones(2, 2)}, tmp_path / 'b', {'format': f'fastprune {clear}'})
    with pytest.raises(ValueError, match=r'is a file of fastprune \\x1b\[2J\\x07: needs'):
        read_weight_file(tmp_path / 'b')
    meta = {'format': 1, 'model': clear, 'modules': {}}
    save_state({'w': torch.ones(2, 2)}, tmp_path / 'c', {'shrunk': json.dumps(meta)})
    with pytest.raises(ValueError, match=r'it is a \\x1b\[2J\\x07, and make_model\(\) a Linear'):
        load_shrunk(tmp_path / 'c', lambda: nn.Linear(2, 2))
    with pytest.raises(SystemExit), stopping():
        raise ValueError(f'{clear} is wrong')
    assert capsys.readouterr().err == 'fastprune: \\x1b[2J\\x07 is wrong\n'


@pytest.mark.parametrize('write', [torch.save, save_sparse])
def test_tied_weights_are_counted_once(tmp_path, write):
    "As in GPT-2, whose output layer is its embedding; a table has a row for each name"
    pytest.importorskip('plotly')
    w, other = torch.eye(40), torch.ones(10, 40)
    write({'wte.weight': w, 'fc.weight': other, 'head.weight': w}, tmp_path / 'a')
    write({'wte.weight': w, 'fc.weight': other, 'head.weight': w.clone()}, tmp_path / 'b')
    found = compare_files(tmp_path / 'a', tmp_path / 'b')
    assert found.files.loc['numbers'].tolist() == [2000, 3600]
    total = found.layers.loc['total']
    assert total[['weights a', 'nonzero a', 'weights b', 'nonzero b']].tolist() == [2000, 440, 3600, 480]
    assert total['sparsity a'] == pytest.approx(1 - 440 / 2000) and total['mask distance'] == 0
    assert found.layers['same as'].tolist() == ['', '', 'wte.weight in a', '']
    assert compare_files(tmp_path / 'a', tmp_path / 'a').layers['same as'].tolist() == ['', '', 'wte.weight', '']
    page = report_file(tmp_path / 'a', out=tmp_path / 'page.html', seconds=0).read_text()
    assert '2,000 numbers in 2 tensors' in page and '440 of 2,000 weights kept' in page and '>same as<' in page
    assert '<td>2,000</td><td>440</td>' in page


def test_comparison_of_float8(tmp_path):
    w = torch.eye(4).to(torch.float8_e4m3fn)
    torch.save({'a.weight': w, 'b.weight': torch.ones(4, 4)}, tmp_path / 'a.pth')
    torch.save({'a.weight': w, 'b.weight': torch.eye(4)}, tmp_path / 'b.pth')
    found = compare_files(tmp_path / 'a.pth', tmp_path / 'b.pth').layers
    assert found['nonzero a'].tolist() == [4, 16, 20] and found['mask distance'].tolist() == [0, 0.75, 0.6]


def test_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    torch.save({'w': torch.ones(3, 3)}, tmp_path / 'a.pth')

    def fails(f, n):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr('fastprune.deploy.torchfile._bytes', fails)
    with pytest.raises(ValueError, match='there is not enough memory for it'):
        load_torch(tmp_path / 'a.pth')
