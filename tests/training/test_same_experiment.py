"Another experiment is refused, and the same one goes on"

import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from fastai.basics import (
    SGD,
    Adam,
    Callback,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    accuracy,
    params,
    set_seed,
)
from fastai.callback.all import (
    CSVLogger,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    MixUp,
    SaveModelCallback,
)
from processes import python
from torch import nn
from torch.nn import functional as F

from fastprune.all import LC, STR, Checkpoint, GradualL2, RigL, SparsifyCallback, cubic, ocp, random_score, sweep
from fastprune.core.describe import describe
from fastprune.core.differences import differences
from fastprune.training.identity import data_identity

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit


class Stop(Callback):
    def before_epoch(self):
        if self.epoch == 2:
            raise KeyboardInterrupt


def items(seed=0, n=48, labels=0):
    return [
        (torch.randn(16, generator=torch.Generator().manual_seed(seed + i)), torch.tensor((i + labels) % 4))
        for i in range(n)
    ]


def net(p=0.1):
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Dropout(p), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


momentum, one_cycle = partial(SGD, mom=0.9), partial(SparsifyCallback, 0.8)


@pytest.fixture
def make(tmp_path):
    def make(seed=0, data=None, bs=8, model=net, loss_func=None, opt_func=momentum, **kw):
        set_seed(seed)
        data = data or items()
        dls = DataLoaders(DataLoader(data, bs=bs, shuffle=True), DataLoader(data[:8], bs=8))
        return Learner(
            dls,
            model(),
            loss_func=loss_func or CrossEntropyLossFlat(),
            opt_func=opt_func,
            metrics=accuracy,
            path=tmp_path,
            **kw,
        )

    return make


def run(learn, how, *cbs):
    with learn.no_bar(), learn.no_logging():
        how(learn, [*cbs, Checkpoint('run')])
    return learn


def fit(n=4, lr=0.02, how='fit_one_cycle', cb=one_cycle, cbs=(), **kw):
    return lambda learn, more: getattr(learn, how)(n, lr, cbs=[*([cb()] if cb else []), *cbs, *more], **kw)


by_one, by_two = (lambda ws: {n: w.abs() for n, w in ws.items()}), (lambda ws: {n: w.abs() * 2 for n, w in ws.items()})


def by_closure(x):
    return lambda ws: {n: w.abs() ** x for n, w in ws.items()}


def sculpt(s=0.5, seed=0):
    return lambda learn, more: learn.fit_sculpt(
        0.8, s, 1, 2, lr=0.02, criterion=partial(random_score, seed=seed), cbs=more
    )


def halves(m):
    return [params(m[:3]), params(m[3:])]


others = {
    'exclude': (
        fit(cb=partial(SparsifyCallback, 0.8, scope='global')),
        fit(cb=partial(SparsifyCallback, 0.8, scope='global', exclude='3.weight')),
        {},
        r"pruning was names=\['3.weight'\] there, and is names=\[\] now",
    ),
    'include': (
        fit(cb=partial(SparsifyCallback, 0.8, include='0')),
        fit(cb=partial(SparsifyCallback, 0.8, include='3')),
        {},
        "pruning was names=",
    ),
    'growth of LC': (
        fit(cb=partial(LC, 0.8, growth=1.1), wd=0.01),
        fit(cb=partial(LC, 0.8, growth=1.5), wd=0.01),
        {},
        'pruning was growth=1.1 there, and is growth=1.5 now',
    ),
    'growth of GradualL2': (
        fit(cb=partial(GradualL2, 0.8)),
        fit(cb=partial(GradualL2, 0.8, growth=cubic)),
        {},
        "pruning was growth='linear' there, and is growth='cubic' now",
    ),
    'sparsity by name': (
        fit(cb=partial(SparsifyCallback, {'*': 0.8, '5': 0.5})),
        fit(cb=partial(SparsifyCallback, {'*': 0.8, '5': 0.6})),
        {},
        r'pruning was sparsity\.5=0.5 there, and is sparsity\.5=0.6 now',
    ),
    'track': (
        fit(),
        fit(cb=partial(SparsifyCallback, 0.8, track=True)),
        {},
        'pruning was track=False there, and is track=True now',
    ),
    'schedule': (
        fit(cb=partial(SparsifyCallback, 0.8, partial(ocp, β=5))),
        fit(cb=partial(SparsifyCallback, 0.8, partial(ocp, β=6))),
        {},
        'pruning was schedule=',
    ),
    'lambda': (
        fit(cb=partial(SparsifyCallback, 0.8, criterion=by_one)),
        fit(cb=partial(SparsifyCallback, 0.8, criterion=by_two)),
        {},
        "pruning was criterion='<lambda> ",
    ),
    'closure': (
        fit(cb=partial(SparsifyCallback, 0.8, criterion=by_closure(1))),
        fit(cb=partial(SparsifyCallback, 0.8, criterion=by_closure(2))),
        {},
        "pruning was criterion='<lambda> ",
    ),
    'lambda schedule': (
        fit(cb=partial(SparsifyCallback, 0.8, lambda pos: pos)),
        fit(cb=partial(SparsifyCallback, 0.8, lambda pos: pos**2)),
        {},
        "pruning was schedule='<lambda> ",
    ),
    'seed of RigL': (
        fit(cb=partial(RigL, 0.8)),
        fit(cb=partial(RigL, 0.8, seed=1)),
        {},
        'pruning was seed=0 there, and is seed=1 now',
    ),
    'target of STR': (
        fit(cb=partial(STR, s_init=-7)),
        fit(cb=partial(STR, 0.5, s_init=-7)),
        {},
        'pruning was sparsity=None there, and is sparsity=0.5 now',
    ),
    'rate': (
        fit(),
        fit(lr=0.05),
        {},
        r'run.safetensors is of another fit: lr was \[0.0008, .* there, and is \[0.002, ',
    ),
    'constant rate': (fit(how='fit'), fit(how='fit', lr=0.05), {}, 'fit: lr was 0.02 there, and is 0.05 now. Use'),
    'flat': (fit(), fit(how='fit_flat_cos'), {}, 'lr was '),
    'rate by group': (fit(lr=slice(0.01, 0.02)), fit(lr=slice(0.005, 0.02)), dict(splitter=halves), 'lr was '),
    'momentum': (
        fit(how='fit'),
        fit(how='fit'),
        (dict(opt_func=partial(SGD, mom=0.9)), dict(opt_func=partial(SGD, mom=0.8))),
        'fit: mom was 0.9 there, and is 0.8 now',
    ),
    'momentum schedule': (fit(), fit(moms=(0.9, 0.8, 0.9)), {}, 'fit: mom was '),
    'eps of Adam': (
        fit(),
        fit(),
        (dict(opt_func=Adam), dict(opt_func=partial(Adam, eps=1e-8))),
        'fit: eps was 1e-05 there, and is 1e-08 now',
    ),
    'decay': (
        fit(wd=0.01),
        fit(wd=0.1),
        {},
        'fit: wd was 0.01 there, and is 0.1 now. Use another file, or resume=False',
    ),
    'decay of the Learner': (fit(), fit(), (dict(wd=0.01), dict(wd=0.1)), 'wd was 0.01 there, and is 0.1 now'),
    'decay of biases': (
        fit(wd=0.1),
        fit(wd=0.1),
        (dict(), dict(wd_bn_bias=True)),
        'optimizer was wd_bn_bias=False there, and is wd_bn_bias=True now',
    ),
    'loss': (fit(), fit(), (dict(), dict(loss_func=LabelSmoothingCrossEntropyFlat())), 'loss was '),
    'smoothing': (
        fit(),
        fit(),
        (dict(), dict(loss_func=CrossEntropyLossFlat(label_smoothing=0.1))),
        'loss was func.label_smoothing=0 there, and is func.label_smoothing=0.1 now',
    ),
    'weights of the loss': (
        fit(),
        fit(),
        (
            dict(loss_func=nn.CrossEntropyLoss(torch.tensor([1.0, 1, 1, 2]))),
            dict(loss_func=nn.CrossEntropyLoss(torch.ones(4))),
        ),
        'loss was weight',
    ),
    'lambda loss': (
        fit(),
        fit(),
        (dict(loss_func=lambda p, y: F.cross_entropy(p, y)), dict(loss_func=lambda p, y: 2 * F.cross_entropy(p, y))),
        "loss was '<lambda> ",
    ),
    'data': (fit(), fit(), (dict(), dict(data=items(100))), 'data was content='),
    'labels': (fit(), fit(), (dict(), dict(data=items(labels=1))), 'data was content='),
    'first weights': (
        fit(),
        fit(),
        (dict(seed=0), dict(seed=1)),
        "fit: first_weights was '[0-9a-f]{8}' there, and is '[0-9a-f]{8}' now .a model made anew has",
    ),
    'dropout': (
        fit(),
        fit(),
        (dict(), dict(model=lambda: net(0.5))),
        r"layers was 2='Dropout\(p=0.1, inplace=False\)' there, and is 2='Dropout\(p=0.5, inplace=False\)' now",
    ),
    'BIMP': (
        lambda l, more: l.fit_bimp(4, 0.8, cycles=2, lr_max=0.02, cbs=more),
        lambda l, more: l.fit_bimp(4, 0.8, cycles=2, lr_max=0.05, cbs=more),
        {},
        'pruning was lr_max=0.02 there, and is lr_max=0.05 now',
    ),
    'cycles': (
        lambda l, more: l.fit_cycles(2, 2, lr=0.02, cbs=more),
        lambda l, more: l.fit_cycles(4, 1, lr=0.02, cbs=more),
        {},
        'lr was ',
    ),
    'start of SCULPT': (sculpt(), sculpt(0.6), {}, 'first_masks was '),
    'seed of SCULPT': (sculpt(), sculpt(seed=1), {}, 'first_masks was '),
    'clipping': (
        fit(cbs=[GradientClip(1.0)]),
        fit(cbs=[GradientClip(2.0)]),
        {},
        'callbacks was max_norm=1 there, and is max_norm=2 now',
    ),
    'no clipping': (fit(cbs=[GradientClip(1.0)]), fit(), {}, 'callbacks was '),
    'accumulation': (fit(cbs=[GradientAccumulation(16)]), fit(cbs=[GradientAccumulation(32)]), {}, 'n_acc=16 there'),
    'patience': (
        fit(cbs=[EarlyStoppingCallback(patience=8)]),
        fit(cbs=[EarlyStoppingCallback(patience=9)]),
        {},
        'patience=8 there',
    ),
    'frozen': (fit(), lambda l, more: (l.model[0].requires_grad_(False), fit()(l, more)), {}, 'frozen was '),
    'epochs': (fit(), fit(5), {}, 'fit: epochs was 4 there, and is 5 now'),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize('first, second, kw, says', others.values(), ids=others)
def test_another_fit(make, first, second, kw, says):
    one, two = kw if isinstance(kw, tuple) else (kw, kw)
    with pytest.raises(KeyboardInterrupt):
        run(make(**one), first, Stop())
    learn = make(**two)
    with pytest.raises(ValueError, match=says) as e:
        run(learn, second)
    assert 'epochs' not in str(e.value) or 'epochs' in says
    assert len(str(e.value)) < 900
    run(make(**one), first)  # the same one goes on


def test_mixup(make):
    first, second = fit(cb=None, cbs=[MixUp(0.4)]), fit(cb=None, cbs=[MixUp(0.1)])
    with pytest.raises(KeyboardInterrupt):
        run(make(), first, Stop())
    with pytest.raises(ValueError, match='callbacks was distrib'):
        run(make(), second)
    run(make(), first)


def test_what_may_change(make, tmp_path):
    "Callbacks that show or log, names of files, and the user's own callbacks, such as the one that stops"
    with pytest.raises(KeyboardInterrupt):
        run(make(), fit(), Stop(), CSVLogger(tmp_path / 'a.csv'))
    a, b = run(make(), fit(), CSVLogger(tmp_path / 'b.csv'), SaveModelCallback(every_epoch=True)), make()
    with b.no_bar(), b.no_logging():
        fit()(b, [])
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.masks == b.masks


def test_the_same_learner_goes_on(make):
    "A stopped cell of a notebook can be run again, but not after the weights have changed"
    learn = make()
    with pytest.raises(KeyboardInterrupt):
        run(learn, fit(), Stop())
    run(learn, fit())
    whole = make()
    with whole.no_bar(), whole.no_logging():
        fit()(whole, [])
    assert all(map(torch.equal, learn.model.state_dict().values(), whole.model.state_dict().values()))
    learn = make()
    (learn.path / 'models' / 'run.safetensors').unlink()
    with pytest.raises(KeyboardInterrupt):
        run(learn, fit(), Stop())
    with torch.no_grad():
        learn.model[0].weight.add_(1.0)
    with pytest.raises(ValueError, match='first_weights was'):
        run(learn, fit())


def test_phases_are_compared_each(make):
    def tune(lr=0.02, freeze_epochs=1):
        return lambda learn, more: learn.fine_tune(
            4, lr, freeze_epochs=freeze_epochs, cbs=[SparsifyCallback(0.8), *more]
        )

    class Late(Stop):
        def before_epoch(self):
            if self.learn.n_epoch == 4:
                super().before_epoch()

    new = lambda: make(splitter=halves)
    with pytest.raises(KeyboardInterrupt):
        run(new(), tune(), Late())
    with pytest.raises(ValueError, match='epochs was 1 there, and is 2 now'):
        run(new(), tune(freeze_epochs=2))
    with pytest.raises(ValueError, match='lr was'):
        run(new(), tune(0.03))
    a, b = run(new(), tune()), new()
    with b.no_bar(), b.no_logging():
        tune()(b, [])
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))


script = '''
import sys
from functools import partial
from fastai.basics import *
from fastprune.all import *
rate, p = float(sys.argv[2]), float(sys.argv[3])
def score(w): return w.abs()**p
class Loss(nn.Module):
    def __init__(self, names=frozenset({'a', 'b', 'c', 'd'})): super().__init__(); self.names = names
    def forward(self, pred, y): return F.cross_entropy(pred, y) + (0. if 'a' in {'a', 'x', 'y'} else 1.)
class Stop(Callback):
    def before_epoch(self):
        if self.epoch==1: sys.exit(3)
set_seed(1)
data = [(torch.randn(16), torch.tensor(i%4)) for i in range(32)]
dls = DataLoaders(DataLoader(data, bs=8, shuffle=True), DataLoader(data, bs=8))
learn = Learner(dls, nn.Sequential(nn.Linear(16,8), nn.ReLU(), nn.Linear(8,4)), loss_func=Loss(), path=sys.argv[1])
cb = SparsifyCallback(0.8, lambda pos: pos**2, criterion=lambda ws: {n:score(w) for n,w in ws.items()})
stop = [Stop()] if sys.argv[4]=='stop' else []
with learn.no_bar(), learn.no_logging(): learn.fit(2, rate, cbs=[cb, Checkpoint('run'), *stop])
'''


def test_functions_are_the_same_in_another_process(tmp_path):
    "The second one is not forked from the first: it has other hashes of strings"
    assert python(script, tmp_path, '0.02', '1', 'stop').returncode == 3
    again = [sys.executable, '-W', 'ignore', '-c', script, str(tmp_path), '0.02', '1', 'go on']
    r = subprocess.run(again, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


# folders


def fits(lr=0.1, n=2, wd=None, **kw):
    def fit(learn, cbs):
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(n, lr, wd=wd, cbs=cbs, **kw)

    return fit


def tickets(learn, folder, fit=None, **kw):
    return learn.find_tickets(2, fit or fits(), folder=folder, measure='none', **kw)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'kw, args, says',
    [
        (dict(seed=1), {}, r"first_weights was '\w{8}' there"),
        ({}, dict(fit=fits(0.2)), r'fit was lr=\[0.004, '),
        ({}, dict(fit=fits(wd=0.1)), 'fit was wd='),
        (dict(loss_func=CrossEntropyLossFlat(label_smoothing=0.1)), {}, 'fit was loss.func.label_smoothing=0 there'),
        ({}, dict(fit=lambda l, cbs: fits()(l, [*cbs, GradientClip(1.0)])), 'callbacks'),
        (dict(data=items(100)), {}, 'data was content='),
        (dict(wd=0.1), {}, 'fit was wd='),
        ({}, dict(criterion=by_one), "criterion was 'magnitude' there"),
        ({}, dict(exclude='3'), 'weights was '),
        (dict(opt_func=partial(SGD, mom=0.8)), dict(fit=fits(moms=(0.8, 0.8, 0.8))), 'fit was mom='),
    ],
)
def test_tickets_of_another_experiment(make, tmp_path, kw, args, says):
    tickets(make(), tmp_path / 'f')
    with pytest.raises(ValueError, match='belongs to another experiment: .*' + says):
        tickets(make(**kw), tmp_path / 'f', **args)


def test_two_seeds_in_one_folder(make, tmp_path):
    with pytest.raises(ValueError, match='first_weights was'):
        [make(s).find_tickets(1, fits(), folder=tmp_path / 'f')[-1] for s in range(2)]


def test_the_same_tickets_go_on(make, tmp_path):
    "For any way to write the same `fit`, in another Learner and in the same one"
    found = tickets(learn := make(), tmp_path / 'f')
    again = tickets(make(), tmp_path / 'f', lambda l, cbs: fits()(l, cbs))
    assert [t.masks for t in again] == [t.masks for t in found]
    assert len(learn.find_tickets(3, fits(), folder=tmp_path / 'f', measure='none')) == 4

    class Crash(Callback):
        def before_train(self):
            if len(getattr(self.learn, 'tickets', [])) == 2:
                raise RuntimeError('power is out')

    learn = make()
    learn.add_cb(Crash())
    with pytest.raises(RuntimeError):
        tickets(learn, tmp_path / 'g')
    learn.remove_cb(Crash)
    assert [t.masks for t in tickets(learn, tmp_path / 'g')] == [t.masks for t in found]
    learn.model[0].reset_parameters()
    with pytest.raises(ValueError, match='first_weights was'):
        tickets(learn, tmp_path / 'g')


def rounds(learn, folder, oracle=False, **kw):
    with learn.no_bar(), learn.no_logging():
        return (
            learn.s_cyc_oracle(1, 1, [0.1], folder=folder, **kw)
            if oracle
            else learn.iterative_prune(1, 1, lr=0.1, folder=folder, **kw)
        )


@pytest.mark.sample(2)
@pytest.mark.parametrize('oracle', [False, True])
@pytest.mark.parametrize(
    'kw, args, says',
    [
        (dict(seed=1), {}, 'first_weights was'),
        (dict(loss_func=CrossEntropyLossFlat(label_smoothing=0.1)), {}, 'loss was func.label_smoothing=0 there'),
        (dict(wd=0.1), {}, 'wd was None there, and is 0.1 now'),
        ({}, dict(wd=0.1), 'wd was None there, and is 0.1 now'),
        (dict(opt_func=partial(SGD, mom=0.8)), {}, r"opt was 'SGD\(mom=0.9\)' there, and is 'SGD\(mom=0.8\)' now"),
        (dict(data=items(100)), {}, 'data was content='),
        ({}, dict(criterion=by_two), "criterion was 'magnitude' there"),
        ({}, dict(cbs=GradientClip(1.0)), 'callbacks was '),
        ({}, dict(shape=lambda lr: lambda pos: lr), 'shape was '),
    ],
)
def test_rounds_of_another_experiment(make, tmp_path, oracle, kw, args, says):
    rounds(make(), tmp_path / 'f', oracle)
    with pytest.raises(ValueError, match='belongs to another experiment: .*' + says):
        rounds(make(**kw), tmp_path / 'f', oracle, **args)
    rounds(make(), tmp_path / 'f', oracle)


def test_folders_of_other_versions(make, tmp_path):
    import json

    rounds(make(), tmp_path / 'f')
    path = tmp_path / 'f' / 'rounds.json'
    good = json.loads(path.read_text())
    del good['config']['first_weights'], good['config']['loss']
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match='another version of fastprune wrote it: it does not record'):
        rounds(make(), tmp_path / 'f')
    for text in (
        '[]',
        '{}',
        '3',
        '{"config": [], "rows": [], "notes": {}}',
        '{"config": {}, "rows": {}, "notes": {}}',
        '{"config": {}}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match='rounds.json is damaged'):
            rounds(make(), tmp_path / 'f')
        with pytest.raises(ValueError, match='rounds.json is damaged'):
            tickets(make(), tmp_path / 'f')


def trains(lr):
    return lambda learn, sparsity, seed: (learn.fit(1, lr), learn.prune(sparsity))


batch = 8


def makes(seed):
    return Learner(
        DataLoaders(*[DataLoader(items(), bs=batch)] * 2), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy
    )


def test_sweeps_know_what_functions_close_over_and_read(tmp_path, monkeypatch):
    sweep(makes, {'m': trains(0.1)}, [0.5], [0], folder=tmp_path, bar=False)
    sweep(makes, {'m': trains(0.1)}, [0.5], [0], folder=tmp_path, bar=False)
    with pytest.raises(ValueError, match="method differs .method was '<lambda> "):
        sweep(makes, {'m': trains(0.2)}, [0.5], [0], folder=tmp_path, bar=False)
    monkeypatch.setitem(globals(), 'batch', 16)
    with pytest.raises(ValueError, match='make differs'):
        sweep(makes, {'m': trains(0.1)}, [0.5], [0], folder=tmp_path, bar=False)


# descriptions


def test_data_are_described_without_drawing(make):
    learn = make()
    rng, state = learn.dls.train.rng.getstate(), torch.get_rng_state()
    a = data_identity(learn)
    assert (
        a == data_identity(learn)
        and learn.dls.train.rng.getstate() == rng
        and torch.equal(torch.get_rng_state(), state)
    )

    class Noisy(torch.utils.data.Dataset):
        def __init__(self, x):
            self.x, self.gen = x, torch.Generator()

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            raise AssertionError('drawn')

    of = lambda ds, **kw: data_identity(
        Learner(DataLoaders(torch.utils.data.DataLoader(ds, **kw)), net(), loss_func=F.cross_entropy)
    )
    x = torch.randn(20, 16)
    assert of(Noisy(x), batch_size=2) == of(Noisy(x.clone()), batch_size=2) != of(Noisy(x + 1), batch_size=2)
    assert of(Noisy(x), batch_size=2) != of(Noisy(x), batch_size=4)
    assert of(Noisy(x), batch_size=2, num_workers=2) == of(Noisy(x), batch_size=2)
    pair = torch.utils.data.TensorDataset(x, torch.arange(20))
    half = torch.utils.data.Subset(pair, list(range(10)))
    assert of(half) != of(torch.utils.data.Subset(pair, list(range(1, 11))))


def test_messages_show_what_differs_alone():
    names = [f'{i}.weight' for i in range(40)]
    assert (
        differences(dict(names=names, a=1), dict(names=names[:-1], a=1))
        == "names was ['39.weight'] there, and is [] now"
    )
    a, b = 'x' * 200 + '1' + 'y' * 200, 'x' * 200 + '2' + 'y' * 200
    text = differences(dict(s=a), dict(s=b))
    assert '1yyy' in text and '2yyy' in text and len(text) < 220
    assert differences(dict(m={str(i): i for i in range(9)}), dict(m={str(i): i + 1 for i in range(9)})).endswith(
        'and 5 more now'
    )
    assert (
        differences(None, dict(a=1)) == 'a was missing there, and is 1 now'
        and differences(dict(a=[1, 2]), dict(a=[1, 2])) == ''
    )
    assert differences(dict(lr=0.1), dict(lr=0.1000000001)) == 'lr was 0.1 there, and is 0.1000000001 now'


def test_sparsities_by_class_are_known(learner, tmp_path, fit):
    for _ in range(2):
        learn = fit(learner(path=tmp_path), 1, cbs=[SparsifyCallback({nn.Conv2d: 0.5}), Checkpoint('by_class')])
    assert learn.masks and not any(n.startswith('5') for n in learn.masks)


class Weighted(nn.Module):
    factor = 2.0

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, pred, y):
        self.calls += 1
        return self.factor * F.cross_entropy(pred, y)


def test_constants_of_classes_count_and_counters_do_not():
    one, heavier = Weighted(), type('Weighted', (Weighted,), {'factor': 3.0, '__module__': __name__})()
    first = describe(one)
    one(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert one.calls == 1 and describe(one) == first != describe(heavier)


def test_lists_that_functions_read_count_and_those_they_fill_do_not():
    def scaled(factors):
        return lambda pred, y: factors[0] * F.cross_entropy(pred, y)

    def noted(seen):
        def loss(pred, y):
            seen.append(1)
            return F.cross_entropy(pred, y)

        return loss

    assert describe(scaled([2.0])) == describe(scaled([2.0])) != describe(scaled([3.0]))
    assert describe(noted([])) == describe(noted([1]))


def test_transforms_with_other_arguments():
    vision = pytest.importorskip('fastai.vision.augment', reason='needs torchvision')
    from fastprune.learner.describe import describe_transform

    made = [
        vision.Rotate(10),
        vision.Rotate(20),
        vision.Flip(0.5),
        vision.Flip(0.9),
        vision.Contrast(0.2),
        vision.Contrast(0.9),
        *vision.aug_transforms(max_rotate=20),
        *vision.aug_transforms(max_rotate=30, max_lighting=0.4),
    ]
    before = [describe(describe_transform(o)) for o in made]
    assert all(a != b for a, b in zip(before[:6:2], before[1:6:2], strict=True)) and before[6:8] != before[8:10]
    x = vision.TensorImage(torch.rand(2, 3, 8, 8))
    for o in made:
        o(x, split_idx=0)
    assert [describe(describe_transform(o)) for o in made] == before  # whatever they have drawn


def test_what_undoes_a_training_has_nothing_to_undo(learner, tmp_path, fit):
    for _ in range(2):
        learn = fit(learner(path=tmp_path), 1, cbs=[SparsifyCallback(0.5), MixUp(0.4), Checkpoint('mixed')])
    assert learn.masks.sparsity == pytest.approx(0.5, abs=1e-3) and MixUp not in map(type, learn.cbs)
    tickets = learner().find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=[*cbs, MixUp(0.4)]), measure='none')
    assert len(tickets) == 2


def test_a_checkpoint_is_no_reason_to_warn(learner, tmp_path, fit):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learner(path=tmp_path), 1, cbs=[SparsifyCallback(0.5), Checkpoint('quiet')])
