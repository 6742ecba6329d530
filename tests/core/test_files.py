"Files of other programs: loading gives what was saved, or the documented error"

import random
import subprocess
import sys

import pytest
import torch
from fastai.basics import SGD
from helpers import equal
from safetensors.torch import save_file

from fastprune.all import Checkpoint, Masks, SparsifyCallback, Ticket, compute_masks, load_state, save_state, state_of
from fastprune.core.files import load_tensors
from fastprune.core.sparse_files import load_sparse, save_sparse


@pytest.fixture
def files(learner, fit, tmp_path):
    "One file of each kind, with a function that loads it for a comparison"
    learn = learner(opt_func=SGD)
    fit(learn, 1, 0.02, cbs=[SparsifyCallback(0.8), Checkpoint('run')])
    learn.masks.save(tmp_path / 'masks.safetensors')
    Ticket(state_of(learn), learn.masks, {'accuracy': 0.5}).save(tmp_path / 'ticket.safetensors')
    save_state(learn.model.state_dict(), tmp_path / 'state.safetensors')
    save_sparse(learn.model.state_dict(), tmp_path / 'sparse.safetensors', masks=learn.masks)

    def resumed(path):
        other = learner(opt_func=SGD)
        fit(other, 1, 0.02, cbs=[SparsifyCallback(0.8), Checkpoint(path.stem)])
        return state_of(other)

    return {
        'masks': (tmp_path / 'masks.safetensors', Masks.load),
        'ticket': (tmp_path / 'ticket.safetensors', lambda p: Ticket.load(p).state),
        'state': (tmp_path / 'state.safetensors', load_state),
        'sparse': (tmp_path / 'sparse.safetensors', load_sparse),
        'checkpoint': (tmp_path / 'models' / 'run.safetensors', resumed),
    }


def damaged(data, rng):
    "Damage a file in one of several ways"
    data, n = bytearray(data), len(data)
    head = 8 + int.from_bytes(data[:8], 'little')
    where = lambda: rng.randrange(head) if rng.random() < 0.7 else rng.randrange(n)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[: rng.randrange(n)])
    if kind == 1:
        for _ in range(rng.randrange(1, 4)):
            data[where()] ^= 1 << rng.randrange(8)
    if kind == 2:
        data[where()] = rng.randrange(256)
    if kind == 3:
        data[i:i] = rng.randbytes(rng.randrange(1, 9)) if (i := where()) else b'x'
    if kind == 4:
        data[:8] = rng.choice([0, 1, n, 2**31, 2**63]).to_bytes(8, 'little')
    if kind == 5:
        i = data.find(rng.choice([b'0', b'1', b'9', b',', b'"', b'F32', b'U8']), 8, head)
        if i > 0:
            data[i : i + 1] = rng.choice([b'9', b'-', b'99999999999', b'0', b'x'])
    return bytes(data)


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind,times', [('masks', 1500), ('ticket', 1000), ('state', 1000), ('checkpoint', 60)])
def test_damaged_files(files, kind, times):
    path, load = files[kind]
    good, rng, refused = path.read_bytes(), random.Random(kind), 0
    whole = load(path)
    for _ in range(times):
        path.write_bytes(damaged(good, rng))
        try:
            back = load(path)
        except ValueError:
            refused += 1
        else:
            assert back.keys() == whole.keys() and all(torch.equal(back[n], whole[n]) for n in whole)
            assert all(isinstance(t, torch.Tensor) for t in back.values())
    assert refused > times / 2


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'text',
    ['[]', '{}', '3', '{"d":[["phase",0]]}', '{"t":"99"}', '{"d":3}', '{"x":1,"y":2}', '[' * 10000 + ']' * 10000],
)
def test_hostile_checkpoints(files, text):
    "With the right checksum, as an attacker would write it"
    path, load = files['checkpoint']
    save_state({'0': torch.ones(1)}, path, {'fit': text})
    with pytest.raises(ValueError):
        load(path)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'story,metrics,initial',
    [
        ('[]', '{}', '{}'),
        ('{}', '{}', '[]'),
        ('{}', '3', '{}'),
        ('{}', '{}', '{"a":3}'),
        ('[' * 10000 + ']' * 10000, '{}', '{}'),
    ],
)
def test_hostile_tickets(files, story, metrics, initial):
    path, load = files['ticket']
    tensors, meta = load_tensors(path)
    save_state(tensors, path, {**meta, 'story': story, 'metrics': metrics, 'initial': initial})
    with pytest.raises(ValueError):
        load(path)


@pytest.mark.parametrize(
    'shape,bits',
    [('100000000000000', 8), ('-8', 1), ('4,x', 1), ('', 2), ('3,3', 1), ('99999999999,99999999999,99999999999', 8)],
)
def test_shapes_are_checked_before_memory_is_taken(tmp_path, shape, bits):
    save_file(
        {'w': torch.ones(bits, dtype=torch.uint8)},
        tmp_path / 'm',
        metadata={'format': 'fastprune masks', 'shape w': shape},
    )
    with pytest.raises(ValueError, match="'w' don't agree"):
        Masks.load(tmp_path / 'm')


def test_files_that_are_not_there(tmp_path):
    for load in (Masks.load, Ticket.load, load_state):
        for name in ('nothing', 'nothing\0'):
            with pytest.raises((FileNotFoundError, ValueError), match='nothing'):
                load(tmp_path / name)


def pruned(sparsity):
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 1024), torch.nn.BatchNorm1d(1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)
    )
    weights = {n: p.data for n, p in model.named_parameters() if p.ndim > 1}
    compute_masks(weights, sparsity, 'global', absolute=True).apply_(weights)
    return model


@pytest.mark.parametrize('sparsity,limit', [(0.9, 0.14), (0.95, 0.09)])
def test_small_files(tmp_path, sparsity, limit):
    "Smaller than dense files by the size of the zeros, and equal to the bit"
    model = pruned(sparsity)
    save_sparse(model.state_dict(), tmp_path / 'small.safetensors')
    save_file(model.state_dict(), tmp_path / 'dense.safetensors')
    assert (tmp_path / 'small.safetensors').stat().st_size <= limit * (tmp_path / 'dense.safetensors').stat().st_size
    back = load_sparse(tmp_path / 'small.safetensors')
    state = model.state_dict()
    assert list(back) == list(state) and all(equal(back[n], t) and back[n].dtype == t.dtype for n, t in state.items())


def test_small_files_in_a_process_without_fastai(tmp_path):
    model = pruned(0.9)
    save_sparse(model.state_dict(), tmp_path / 'small.safetensors')
    code = f"""
import sys, torch
from fastprune.files import load_sparse
state = load_sparse({str(tmp_path / 'small.safetensors')!r})
assert 'fastai' not in sys.modules and 'fastprune.training.callback' not in sys.modules
print(sum(int(t.count_nonzero()) for t in state.values()))
"""
    out = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) == sum(int(t.count_nonzero()) for t in model.state_dict().values())


def test_small_files_of_every_kind_of_tensor(tmp_path):
    nan = torch.zeros(8, 9)
    nan[0, :4] = torch.tensor([float('nan'), float('inf'), -0.0, -1e-45])
    state = {
        'nan': nan,
        'empty': torch.zeros(0, 3),
        'one': torch.zeros(()),
        'int': torch.zeros(4, 4, dtype=torch.int64),
        'bool': torch.zeros(4, 4, dtype=torch.bool),
        'half': nan.half(),
        'bf': nan.bfloat16(),
        'double': nan.double(),
        'turned': nan.T,
        'all': torch.zeros(5, 5),
        'dense': torch.ones(5, 5),
    }
    save_sparse(state, tmp_path / 'a')
    back = load_sparse(tmp_path / 'a')
    assert list(back) == list(state)
    for n in ('nan', 'half', 'bf', 'double', 'turned'):
        state[n] = torch.where(state[n] == 0, 0, state[n])  # -0 comes back as +0
    for n, t in state.items():
        assert (
            back[n].dtype == t.dtype
            and back[n].shape == t.shape
            and equal(back[n].contiguous().reshape(-1).view(torch.uint8), t.contiguous().reshape(-1).view(torch.uint8))
        ), n
    with pytest.raises(ValueError, match="'x' is a int"):
        save_sparse({'x': 3}, tmp_path / 'b')
    with pytest.raises(ValueError, match=r"masks\['all'\]: needs a bool tensor of shape \(5, 5\)"):
        save_sparse(state, tmp_path / 'b', masks={'all': torch.ones(5, 4).bool()})
    assert not (tmp_path / 'b').exists()


def test_masks_are_kept_in_small_files(learner, fit, tmp_path):
    "A kept weight may be 0; a file of another model changes nothing"
    learn = fit(learner(opt_func=SGD), 1, cbs=SparsifyCallback(0.9))
    n, m = next(iter(learn.masks.items()))
    dict(learn.model.named_parameters())[n].data[m] = 0.0
    learn.save_sparse(tmp_path / 'a')
    other = learner(opt_func=SGD)
    other.load_sparse(tmp_path / 'a')
    assert other.masks == learn.masks
    assert all(map(equal, learn.model.state_dict().values(), other.model.state_dict().values()))
    fit(other, 1)
    assert other.masks == learn.masks
    tall = learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    before = tall.model[1].weight.detach().clone()
    with pytest.raises(ValueError, match='is of another model'):
        tall.load_sparse(tmp_path / 'a')
    assert torch.equal(before, tall.model[1].weight) and tall.masks is None
