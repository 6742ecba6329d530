"Weights that are frozen, always or in turns: a warning names what is left out"

import warnings

import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, params
from fastai.callback.all import ProgressCallback
from torch import nn

from fastprune.all import DNW, DPF, DST, GMP, GSM, SET, SNFS, STR, GradualL2, RigL, SparsifyCallback, linear, taylor


def net():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def toy(model=None, frozen=('0',), **kwargs):
    torch.manual_seed(0)
    items = [(torch.randn(64), torch.tensor(i % 4)) for i in range(64)]
    model = model or net()
    for n in frozen:
        model.get_submodule(n).requires_grad_(False)
    learn = Learner(
        DataLoaders(DataLoader(items, bs=8), DataLoader(items[:16], bs=8)),
        model,
        loss_func=CrossEntropyLossFlat(),
        **kwargs,
    )
    learn.remove_cb(ProgressCallback)
    return learn


def warnings_of(f):
    "Warnings of weights that are left out"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in caught if 'frozen' in str(o.message)]


def fit(learn, n, *cbs):
    with learn.no_logging():
        learn.fit(n, 1e-2, cbs=list(cbs))
    return learn


methods = [SparsifyCallback, GMP, DPF, DNW, GSM, GradualL2, RigL, SET, SNFS, DST, STR]


@pytest.mark.parametrize(
    'kwargs, what',
    [
        (dict(include=['0', '2']), "include: '0.weight'"),
        (dict(include='0'), "include: '0.weight'"),
        (dict(include='*.weight'), "include: '0.weight'"),
        (dict(include='0.weight', exclude='2'), "include: '0.weight'"),
    ],
)
@pytest.mark.parametrize('method', methods, ids=lambda m: m.__name__)
def test_an_include_of_frozen_weights_is_an_error(method, kwargs, what):
    "The error comes before training, and names them"
    learn = toy()
    before = learn.model[2].weight.detach().clone()
    with pytest.raises(ValueError) as e:
        fit(learn, 1, method(0.9, **kwargs))
    assert (
        what in str(e.value)
        and 'requires_grad_()' in str(e.value)
        and torch.equal(learn.model[2].weight, before)
        and learn.masks is None
    )


@pytest.mark.parametrize('sparsity', [{'0': 0.9, '2': 0.5}, {'0': 0.9}, {'*': 0.9, '0.weight': 0.5}, {'*.weight': 0.5}])
def test_a_sparsity_of_frozen_weights_is_an_error(sparsity):
    with pytest.raises(ValueError, match=r"sparsity\['.*'\]: '0.weight' can't be pruned in training"):
        fit(toy(), 1, SparsifyCallback(sparsity))


def test_a_sparsity_of_a_class_of_frozen_weights_is_an_error():
    with pytest.raises(ValueError, match=r"sparsity\[Linear\]: '0.weight' can't be pruned in training"):
        fit(toy(), 1, SparsifyCallback({nn.Linear: 0.9}))


@pytest.mark.parametrize(
    'make',
    [
        lambda l: l.fit_cyclical(1, 1, 0.9, include='0'),
        lambda l: l.fit_bimp(2, 0.9, include='0'),
        lambda l: l.fit_sculpt(0.9, 0.5, 1, 1, include='0'),
        lambda l: l.iterative_prune(1, 1, include='0'),
        lambda l: l.find_tickets(1, lambda learn, cbs: learn.fit(1, cbs=cbs), include='0'),
    ],
)
def test_recipes_say_so(make):
    with pytest.raises(ValueError, match="include: '0.weight' can't be pruned in training"):
        make(toy())


@pytest.mark.parametrize('sparsity', [0.9, {'*': 0.9}, {'*': 0.9, '2': 0.5}, {'2': 0.5, '4': 0.5}])
def test_what_is_left_out_is_told_once(sparsity):
    learn = toy(frozen=('0', '2') if sparsity == 0.9 else ('0',))
    (note,) = warnings_of(lambda: fit(learn, 2, SparsifyCallback(sparsity)))
    assert "'0.weight'" in note and ("'2.weight'" in note) == (sparsity == 0.9)
    assert '0.weight' not in learn.masks and learn.model[0].weight.detach().all()


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'run',
    [
        lambda l: l.fit_cyclical(2, 1, 0.9),
        lambda l: l.fit_bimp(2, 0.9, cycles=1),
        lambda l: l.fit_sculpt(0.9, 0.5, 1, 1),
        lambda l: l.iterative_prune(2, 1),
        lambda l: l.find_tickets(2, lambda learn, cbs: learn.fit(1, cbs=cbs)),
        lambda l: l.find_tickets(2, lambda learn, cbs: learn.fit(1, cbs=cbs), schedule=linear),
    ],
)
def test_recipes_tell_once(run):
    learn = toy()

    def quietly():
        with learn.no_logging(), learn.no_bar():
            run(learn)

    assert len(warnings_of(quietly)) == 1 and '0.weight' not in learn.masks and learn.model[0].weight.detach().all()


def test_many_are_counted():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(9)], nn.Linear(64, 4))
    (note,) = warnings_of(lambda: fit(toy(model, [str(i) for i in range(9)]), 1, SparsifyCallback(0.9)))
    assert "'0.weight', '1.weight', '2.weight' and 6 more" in note


def test_no_warning_where_nothing_is_left_out():
    assert not warnings_of(lambda: fit(toy(), 1, SparsifyCallback(0.9, exclude='0')))
    assert not warnings_of(lambda: fit(toy(frozen=()), 1, SparsifyCallback(0.9)))
    assert not warnings_of(lambda: fit(toy(), 1))
    learn = toy(frozen=(), splitter=lambda m: [params(m[:2]), params(m[2:])])

    def tune():
        with learn.no_logging():
            learn.fine_tune(1, cbs=SparsifyCallback(0.9))

    assert not warnings_of(tune) and learn.masks.sparsity == pytest.approx(0.9, abs=1e-2)


class Adapter(nn.Module):
    "A low-rank adapter of a frozen layer"

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.a, self.b = (
            base.requires_grad_(False),
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize('kwargs', [{}, dict(exclude='*.base'), dict(include='*.a')])
def test_the_column_counts_what_the_report_counts(kwargs):
    learn = toy(nn.Sequential(Adapter(nn.Linear(64, 64)), nn.ReLU(), Adapter(nn.Linear(64, 4))), ())
    assert len(warnings_of(lambda: fit(learn, 2, SparsifyCallback(0.9, **kwargs)))) == (not kwargs)
    total = learn.sparsity_report().loc['total', 'sparsity']
    assert (
        learn.recorder.values[-1][-1] == pytest.approx(total)
        and total < 0.15
        and learn.masks.sparsity == pytest.approx(0.9, abs=0.02)
    )


@pytest.mark.parametrize(
    'cb',
    [
        SparsifyCallback(0.9, exclude='2'),
        SparsifyCallback(0.9),
        SparsifyCallback(0.5, include=['0.bias', '4']),
        SparsifyCallback({'0': 0.9}),
        RigL(0.9, exclude='4'),
        DST(include='0'),
    ],
)
def test_the_column_of_a_part(cb):
    learn = toy(frozen=())
    learn.prune(0.5, include='2')
    fit(learn, 2, cb)
    assert learn.recorder.values[-1][-1] == pytest.approx(learn.sparsity_report().loc['total', 'sparsity'])


# in turns


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.critic(self.generator(x))


class Turns(Callback):
    "One of two parts is always frozen, as by fastai's GANTrainer, also at the start and the end of a fit"

    order = -2

    def turn(self, generator):
        self.model.generator.requires_grad_(generator)
        self.model.critic.requires_grad_(not generator)

    def before_fit(self):
        self.turn(False)

    def before_epoch(self):
        self.turn(False)

    def before_batch(self):
        self.turn(self.iter % 3 == 2)


@pytest.mark.sample(2)
@pytest.mark.parametrize('method', [SparsifyCallback, GMP, DPF, RigL], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    'include, names',
    [
        (None, ['generator.weight', 'critic.weight']),
        ('generator', ['generator.weight']),
        ('critic', ['critic.weight']),
        (['generator', 'critic'], ['generator.weight', 'critic.weight']),
    ],
)
def test_frozen_in_turns(method, include, names):
    for before in (0, 1):  # fits before, which leave one of them frozen
        learn = toy(GAN(), ())
        for _ in range(before):
            fit(learn, 1, Turns())
        assert not warnings_of(lambda learn=learn: fit(learn, 2, method(0.8, include=include), Turns()))
        assert list(learn.masks) == names and learn.masks.sparsity == pytest.approx(0.8, abs=0.01)
        for n, m in learn.masks.items():
            assert not learn.model.get_parameter(n).detach()[~m].any()
        assert learn.recorder.values[-1][-1] == pytest.approx(learn.sparsity_report().loc['total', 'sparsity'])


@pytest.mark.parametrize('how', ['prune', 'fit_cyclical'])
def test_in_turns_by_other_calls(how):
    learn = toy(GAN(), (), cbs=Turns())
    fit(learn, 1)
    with learn.no_logging():
        learn.prune(0.8) if how == 'prune' else learn.fit_cyclical(1, 1, 0.8)
    assert list(learn.masks) == ['generator.weight', 'critic.weight']


def test_criteria_that_need_gradients_of_both_are_refused_before_training():
    learn = toy(GAN(), ())
    with pytest.raises(ValueError, match="taylor needs gradients, and 'generator.weight' is frozen"):
        fit(learn, 1, SparsifyCallback(0.8, criterion=taylor), Turns())
    assert learn.masks is None and not learn.opt.state_dict()['state'][0].get('step')


def test_frozen_by_hand_after_a_fit_is_frozen():
    learn = fit(toy(frozen=()), 1)
    learn.model[0].requires_grad_(False)
    (note,) = warnings_of(lambda: fit(learn, 1, SparsifyCallback(0.9)))
    assert "'0.weight'" in note and list(learn.masks) == ['2.weight', '4.weight']


def test_fastais_gan():
    from fastai.vision.gan import GANLearner, basic_critic, basic_generator

    torch.manual_seed(0)
    items = [(torch.randn(8), torch.randn(3, 32, 32)) for _ in range(12)]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items[:4], bs=4))
    for include, part in (None, ('generator', 'critic')), ('generator', ('generator',)), ('critic', ('critic',)):
        learn = GANLearner.wgan(dls, basic_generator(32, 3, in_sz=8, n_features=4), basic_critic(32, 3, n_features=4))
        learn.remove_cb(ProgressCallback)
        for _ in range(2):
            cb = SparsifyCallback(0.8, include=include)
            assert not warnings_of(lambda learn=learn, cb=cb: fit(learn, 2, cb))
            assert {n.split('.')[0] for n in learn.masks} == set(part) and learn.masks.sparsity == pytest.approx(
                0.8, abs=0.01
            )
            assert all(not learn.model.get_parameter(n).detach()[~m].any() for n, m in learn.masks.items())
