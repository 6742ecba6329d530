"A checkpoint's file decides nothing but what a fit needs to go on, and a wrong one changes nothing"

import copy
import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import (
    SGD,
    Adam,
    Callback,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Learner,
    OptimWrapper,
    accuracy,
    ranger,
    set_seed,
)
from fastai.callback.all import (
    CSVLogger,
    EarlyStoppingCallback,
    GradientAccumulation,
    ReduceLROnPlateau,
    SaveModelCallback,
)
from torch import nn

from fastprune.all import DPF, GMP, STR, Checkpoint, RigL, SparseMethod, SparsifyCallback, movement
from fastprune.core.files import load_tensors, save_state
from fastprune.training.fit_state import fit_state, restore_fit
from fastprune.training.optimizer_state import load_opt_state, opt_state
from fastprune.training.state import pack, rng_state, set_rng_state, unpack

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

SGDM = partial(SGD, mom=0.9)
TorchAdam = partial(OptimWrapper, opt=torch.optim.Adam)


class Stop(Callback):
    def before_epoch(self):
        if self.epoch == 2:
            raise KeyboardInterrupt


class Count(Callback):
    "A user's own, with numbers that training changes"

    def __init__(self, every=3):
        self.every, self.seen, self.best, self.on = every, 0, float('inf'), False

    def after_batch(self):
        self.seen += 1


@pytest.fixture
def tiny(tmp_path):
    "Makes Learners with 4 batches"

    def make(model=None, opt_func=SGDM, **kw):
        set_seed(0)
        items = [(torch.randn(16), torch.tensor(i % 4)) for i in range(32)]
        model = model or nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items[:8], bs=8))
        return Learner(
            dls, model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, path=tmp_path, **kw
        )

    return make


def train(learn, *cbs, n=4):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(n, 0.02, wd=0.01, cbs=[*cbs, Checkpoint('run')])


def begun(make, *cbs, **kw):
    "The path of a checkpoint of two epochs of four, and what is in it"
    with pytest.raises(KeyboardInterrupt):
        train(make(**kw), *cbs, Stop())
    path = make().path / 'models' / 'run.safetensors'
    tensors, meta = load_tensors(path)
    return path, unpack(json.loads(meta['fit']), tensors)


def write(path, state):
    tensors = {}
    meta = json.dumps(pack(state, tensors))
    save_state(tensors, path, {'fit': meta})


def whole(learn):
    return {n: t.clone() for n, t in learn.model.state_dict().items()}


def refused(make, path, cbs, says='', **kw):
    "The file is refused before any training, by its name, and nothing of the Learner has changed"
    learn = make(**kw)
    before, rng = whole(learn), torch.get_rng_state()

    class Trains(Callback):
        def before_batch(self):
            raise AssertionError('it trains')

    with pytest.raises(ValueError, match=says) as e:
        train(learn, *cbs, Trains())
    assert str(path) in str(e.value)
    assert learn.masks is None and all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    return str(e.value)


def state_of_callback(state, name):
    return next(s for n, s in state['callbacks'] if n == name)


# what a file may set


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'name, cb, attrs',
    [
        ('SaveModelCallback', partial(SaveModelCallback, fname='mine'), dict(fname='/tmp/other')),
        ('SaveModelCallback', SaveModelCallback, dict(at_end=True)),
        ('SaveModelCallback', SaveModelCallback, dict(best='x')),
        ('SaveModelCallback', SaveModelCallback, dict(best=True)),
        ('SaveModelCallback', SaveModelCallback, dict(idx=99)),
        ('SaveModelCallback', SaveModelCallback, dict(with_opt=True)),
        ('SaveModelCallback', SaveModelCallback, dict(run=False)),
        ('SaveModelCallback', SaveModelCallback, dict(monitor='accuracy')),
        ('SaveModelCallback', SaveModelCallback, dict(last_saved_path='/x')),
        ('CSVLogger', CSVLogger, dict(fname='/etc/passwd')),
        ('CSVLogger', CSVLogger, dict(append=True)),
        ('EarlyStoppingCallback', partial(EarlyStoppingCallback, patience=9), dict(patience=0)),
        ('EarlyStoppingCallback', partial(EarlyStoppingCallback, patience=9), dict(wait=1.5)),
        ('EarlyStoppingCallback', partial(EarlyStoppingCallback, patience=9), dict(wait=2**70)),
        ('GradientAccumulation', partial(GradientAccumulation, 8), dict(n_acc=1)),
        ('GradientAccumulation', partial(GradientAccumulation, 8), dict(count='8')),
        ('ReduceLROnPlateau', partial(ReduceLROnPlateau, patience=9), dict(factor=0.0)),
        ('Count', Count, dict(every=1)),
        ('Count', Count, dict(seen=True)),
        ('Count', Count, dict(on=1)),
        ('Count', Count, dict(_x=1)),
        ('Count', Count, dict(order=-1000)),
        ('Count', Count, dict(learn=3)),
        ('Count', Count, {'__class__': 3}),
        ('SparsifyCallback', None, dict(_active=False)),
        ('SparsifyCallback', None, dict(sparsity=0.1)),
        ('SparsifyCallback', None, dict(criterion=1)),
        ('SparsifyCallback', None, dict(_how=None)),
        ('SparsifyCallback', None, dict(last_step='x')),
        ('SparsifyCallback', None, dict(counts={'0.weight': 1})),
        ('SparsifyCallback', None, dict(iters=[1, 'x'])),
        ('SparsifyCallback', None, dict(start_sparsity={})),
    ],
)
def test_attributes_that_are_not_a_files_to_set(tiny, name, cb, attrs):
    cbs = lambda: [SparsifyCallback(0.8)] + ([cb()] if cb else [])
    path, state = begun(tiny, *cbs())
    state_of_callback(state, name).update(attrs)
    write(path, state)
    assert f'{name}' in refused(tiny, path, cbs())


def test_numbers_of_callbacks_come_back(tiny):
    cbs = lambda: [
        SparsifyCallback(0.8),
        Count(),
        EarlyStoppingCallback(patience=9),
        SaveModelCallback(every_epoch=True),
    ]
    path, state = begun(tiny, *cbs())
    assert state_of_callback(state, 'Count') == dict(
        seen=10, best=float('inf'), on=False
    )  # 2 epochs of 4 batches, and validation
    assert set(state_of_callback(state, 'EarlyStoppingCallback')) == {'best', 'new_best', 'wait'}
    count = Count()
    train(tiny(), SparsifyCallback(0.8), count, EarlyStoppingCallback(patience=9), SaveModelCallback(every_epoch=True))
    assert count.seen == 20 and count.every == 3


def test_what_a_file_adds_is_not_set(tiny):
    "Attributes that a callback does not have would hide the Learner's"
    path, state = begun(tiny, Count())
    state_of_callback(state, 'Count').update(n_epoch=0, lr_finder=1, training=False)
    write(path, state)
    count = Count()
    train(tiny(), count)
    assert not {'n_epoch', 'lr_finder', 'training'} & set(vars(count))


class Mine(SparseMethod):
    "A method with a state of its own"

    lasting = {'seen': int, 'mean': dict[str, torch.Tensor], 'notes': list[dict]}

    def initial_masks(self, weights):
        self.seen, self.mean, self.notes = 0, {n: torch.zeros_like(p) for n, p in weights.items()}, []

    def before_step(self, weights):
        self.seen += 1
        for n, p in weights.items():
            self.mean[n].lerp_(p.grad, 0.1)
        self.notes.append({'step': self.seen, 'sizes': {n: 1 for n in weights}})


def test_a_method_declares_what_lasts(tiny):
    path, state = begun(tiny, Mine(0.8))
    good = copy.deepcopy(state)
    for attrs in (
        dict(seen=1.5),
        dict(mean={}),
        dict(mean=None),
        dict(mean={'0.weight': torch.zeros(2), '3.weight': torch.zeros(4, 8)}),
        dict(notes=['x']),
        dict(notes=[{'step': 'x'}]),
        dict(more=1),
    ):
        state = copy.deepcopy(good)
        state_of_callback(state, 'Mine').update(attrs)
        write(path, state)
        refused(tiny, path, [Mine(0.8)], 'Mine')
    write(path, good)
    cb, other = Mine(0.8), Mine(0.8)
    train(tiny(), cb)
    path.unlink()
    train(tiny(), other)
    assert cb.seen == other.seen == 16 and all(torch.equal(cb.mean[n], t) for n, t in other.mean.items())


# the rest of the file


def change(**kw):
    return lambda s: s.update(kw)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'kind, wrong',
    {
        'numpy position': lambda s: s['rng'][0]['numpy'].__setitem__(2, 10**6),
        'numpy negative': lambda s: s['rng'][0]['numpy'].__setitem__(2, -1),
        'numpy key': lambda s: s['rng'][0]['numpy'].__setitem__(1, torch.zeros(5, dtype=torch.int64)),
        'numpy name': lambda s: s['rng'][0]['numpy'].__setitem__(0, 'PCG64'),
        'numpy cached': lambda s: s['rng'][0]['numpy'].__setitem__(4, float('nan')),
        'python position': lambda s: s['rng'][0]['python'][1].__setitem__(-1, 10**6),
        'python length': lambda s: s['rng'][0]['python'][1].pop(),
        'python values': lambda s: s['rng'][0]['python'][1].__setitem__(0, -1),
        'loader': lambda s: s['rng'][0]['loader'].__setitem__(0, 2),
        'torch size': lambda s: s['rng'][0].update(torch=torch.zeros(9, dtype=torch.uint8)),
        'torch zeros': lambda s: s['rng'][0].update(torch=torch.zeros_like(s['rng'][0]['torch'])),
        'cuda': lambda s: s['rng'][0].update(cuda=[3]),
        'no rng': change(rng=[]),
        'half rng': lambda s: s['rng'][0].pop('torch'),
        'epoch': change(epoch=-1),
        'far epoch': change(epoch=4),
        'phase': change(phase=True),
        'weight': lambda s: s['model'].update({'0.weight': torch.zeros(2, 2)}),
        'dtype': lambda s: s['model'].update({'0.weight': s['model']['0.weight'].double()}),
        'no weight': lambda s: s['model'].pop('0.weight'),
        'masks': lambda s: s['masks'].update({'0.weight': torch.ones(8, 16)}),
        'mask of nothing': lambda s: s['masks'].update({'x': torch.ones(1, dtype=torch.bool)}),
        'grads': change(grads={'0.weight': torch.ones(3)}),
        'zero gradients': change(zero_grads=[['0.weight']]),
        'hypers': lambda s: s['opt']['hypers'][0].update(lr='x'),
        'rate': lambda s: s['opt']['hypers'][0].update(lr=float('nan')),
        'more hypers': lambda s: s['opt']['hypers'][0].update(x=1.0),
        'no hypers': lambda s: s['opt'].update(hypers=[]),
        'opt names': lambda s: s['opt']['params']['0.weight'].update(p=1.0),
        'opt shapes': lambda s: s['opt']['params']['0.weight'].update(grad_avg=torch.zeros(3)),
        'opt of nothing': lambda s: s['opt']['params'].update(x={}),
        'opt flags': lambda s: s['opt']['params']['1.weight'].update(do_wd=3),
        'losses': lambda s: s['recorder'].update(losses=['x']),
        'smooth': lambda s: s['recorder'].update(smooth=[1]),
        'recorder': change(recorder={'_x': 1}),
        'callbacks': change(callbacks=3),
        'no pruning': lambda s: s.update(callbacks=[]),
        'name': lambda s: s['callbacks'].append([3, {}]),
        'opt': change(opt=None),
        'model': change(model=None),
    }.items(),
)
def test_wrong_values_with_a_right_checksum(tiny, kind, wrong):
    path, state = begun(tiny, SparsifyCallback(0.8))
    wrong(state)
    write(path, state)
    refused(tiny, path, [SparsifyCallback(0.8)], 'not a checkpoint of a fit, or is damaged')


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'part', ['fit', 'phase', 'epoch', 'opt', 'masks', 'rng', 'callbacks', 'recorder', 'scaler', 'grads', 'n_epoch']
)
def test_parts_of_other_versions(tiny, part):
    path, state = begun(tiny, SparsifyCallback(0.8))
    del state[part]
    write(path, state)
    refused(tiny, path, [SparsifyCallback(0.8)], f"it has no '{part}', perhaps from another version")


@pytest.mark.parametrize('part', ['optimizer', 'pruning', 'epochs', 'model'])
def test_what_an_older_file_does_not_say_of_its_fit(tiny, part):
    path, state = begun(tiny, SparsifyCallback(0.8))
    del state['fit'][part]
    write(path, state)
    refused(tiny, path, [SparsifyCallback(0.8)], f'of another fit: {part} was missing there')


def test_a_tensor_has_one_place(tiny):
    "Listed 600 times, it would take 600 times its memory"
    path, _ = begun(tiny, SparsifyCallback(0.8))
    tensors, meta = load_tensors(path)
    obj = json.loads(meta['fit'])
    next(v for k, v in obj['d'] if k == 'grads')['d'] = [[str(i), {'t': '0'}] for i in range(600)]
    save_state(tensors, path, {'fit': json.dumps(obj)})
    refused(tiny, path, [SparsifyCallback(0.8)], "no tensor '0', or it is in two places")
    with pytest.raises(ValueError, match='two places'):
        unpack({'l': [{'t': '0'}, {'t': '0'}]}, {'0': torch.ones(3)})
    with pytest.raises(ValueError, match='in no place of the packed object'):
        unpack({'l': []}, {'0': torch.ones(3)})
    with pytest.raises(ValueError, match='100000 scalars in a list, and there are 50 steps'):
        unpack({'s': '0'}, {'0': torch.zeros(100_000, dtype=torch.bool)}, 50)


def test_public_functions_check_first(tiny):
    learn = tiny()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    state, opt, rng = fit_state(learn), opt_state(learn), rng_state(learn)
    before, drawn = whole(learn), np.random.get_state()[1].copy()
    for bad, put in (
        ({**state, 'opt': None}, restore_fit),
        ({**opt, 'hypers': []}, load_opt_state),
        ({**rng, 'numpy': [*rng['numpy'][:2], 10**6, 0, 0.0]}, set_rng_state),
        ({}, set_rng_state),
        ([], restore_fit),
    ):
        with pytest.raises(ValueError):
            put(learn, bad)
    assert (
        all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
        and (np.random.get_state()[1] == drawn).all()
    )


# any wrong value


def places(obj, at=()):
    "Paths to all nodes of nested dicts and lists"
    yield at
    if isinstance(obj, dict):
        yield from (p for k in obj for p in places(obj[k], (*at, k)))
    if isinstance(obj, list):
        yield from (p for i in range(min(len(obj), 4)) for p in places(obj[i], (*at, i)))


others = [
    None,
    True,
    -1,
    10**30,
    1.5,
    float('nan'),
    float('-inf'),
    'x',
    '',
    [],
    {},
    [1],
    ['0.weight'],
    {'x': 1},
    lambda: torch.ones(3),
    lambda: torch.zeros(2, 0, dtype=torch.bool),
]


def spoiled(state, rng):
    "One node deleted, replaced, or doubled"
    state = copy.deepcopy(state)
    *to, last = rng.choice([p for p in places(state) if p])
    node = state
    for k in to:
        node = node[k]
    how = rng.randrange(3)
    if how == 0:
        del node[last]
    elif how == 1:
        node[last] = other() if callable(other := rng.choice(others)) else other
    elif isinstance(node, list):
        node.append(node[last])
    else:
        node[f'{last}x'] = copy.deepcopy(node[last])
    return state


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'method, opt_func',
    [
        (SparsifyCallback, SGDM),
        (partial(RigL, interval=2), partial(Adam, decouple_wd=False)),
        (partial(STR, s_init=-7), TorchAdam),
        (DPF, ranger),
        (partial(GMP, interval=1, criterion=movement), partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)),
    ],
)
def test_any_node_may_be_wrong(tiny, method, opt_func):
    "ValueError with the file's name and no change, or a value that is as good as another"
    rng = random.Random(3)
    make, cbs = partial(tiny, opt_func=opt_func), lambda: [method(0.8), Count(), EarlyStoppingCallback(patience=9)]
    path, state = begun(make, *cbs())
    n = 0
    for _ in range(30):
        write_ok = True
        try:
            write(path, spoiled(state, rng))
        except (ValueError, TypeError, OverflowError):
            write_ok = False  # no file can have that
        if not write_ok:
            continue
        learn, at = make(), []
        before = whole(learn)

        class Trains(Callback):
            order = 300

            def __init__(self, at):
                self.at = at

            def before_train(self):
                self.at.append(1)

        try:
            train(learn, *cbs(), Trains(at))
        except ValueError as e:
            assert (
                str(path) in str(e)
                and not at
                and learn.masks is None
                and all(torch.equal(t, before[k]) for k, t in learn.model.state_dict().items())
            )
            n += 1
    assert n > 12


def test_a_resumed_fit_shows_its_bar(tiny, capsys):
    begun(tiny, SparsifyCallback(0.5))
    learn = tiny()
    learn.fit_one_cycle(4, 0.02, wd=0.01, cbs=[SparsifyCallback(0.5), Checkpoint('run')])
    assert 'Epoch 3/4' in capsys.readouterr().out and len(learn.recorder.values) == 4


@pytest.mark.parametrize('file', [None, '', 3])
def test_a_file_has_a_name(file):
    with pytest.raises(ValueError, match=f"file={file!r}: needs the name of a file"):
        Checkpoint(file)
