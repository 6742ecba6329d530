"Fits beside other callbacks, frozen layers and files of earlier ones"

import pytest
import torch
from fastai.basics import SGD, Callback
from fastai.callback.all import GradientAccumulation, ShortEpochCallback
from helpers import FEW
from torch import nn

from fastprune.all import (
    GSM,
    SET,
    SNFS,
    STR,
    Checkpoint,
    RigL,
    Sparsifier,
    SparsifyCallback,
    digits_convnet,
    ocp,
    s_cyc_max_lr,
)

pytestmark = pytest.mark.usefixtures('deterministic')


class Stop(Callback):
    "Interrupts a fit before a batch"

    order = 300

    def __init__(self, epoch, i=0):
        self.at = epoch, i

    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at:
            raise KeyboardInterrupt


class Count(Callback):
    "Counts batches"

    n = 0

    def before_batch(self):
        self.n += 1


class Refuse(Callback):
    "Refuses to train"

    def before_train(self):
        raise ValueError('refused')


def quiet(learn, how, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, how)(*args, **kwargs)


def weights(learn):
    return {n: t.clone() for n, t in learn.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def two_groups(learner):
    torch.manual_seed(0)
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), **FEW)
    learn.splitter = lambda m: [list(m[:2].parameters()), list(m[2:].parameters())]
    return learn


@pytest.mark.sample(2)
@pytest.mark.parametrize('method', [RigL, SET, SNFS])
@pytest.mark.parametrize('other', [GradientAccumulation(96), ShortEpochCallback(pct=0.7)], ids=['accumulated', 'short'])
def test_moves_resume_after_an_epoch_that_ends_without_a_step(learner, tmp_path, method, other):
    def fit(name, *cbs):
        learn, cb = learner(**FEW), method(0.9, interval=7)
        try:
            quiet(learn, 'fit', 3, 0.05, cbs=[cb, other, Checkpoint(tmp_path / name), *cbs])
        except KeyboardInterrupt:
            return
        return [c['iteration'] for c in cb.changes], learn.masks, weights(learn)

    moves, masks, state = fit('whole')
    fit('parts', Stop(1))
    again, masks_again, state_again = fit('parts')
    assert moves and again == moves and masks == masks_again and same(state, state_again)


def test_a_sparsity_by_name_of_frozen_layers_has_an_identity(learner, tmp_path):
    for _ in range(2):
        learn = two_groups(learner)
        quiet(learn, 'fine_tune', 1, cbs=[SparsifyCallback({'1.*': 0.9}), Checkpoint(tmp_path / 'fit')])
        assert learn.masks.sparsity == pytest.approx(0.9, abs=2e-3) and list(learn.masks) == ['1.weight']


def test_retraining_that_was_finished_is_not_run_again(learner, tmp_path):
    def retrained():
        learn = learner(**FEW)
        learn.add_cb(count := Count())
        learn.prune(0.5)
        quiet(learn, 'retrain', 1, 'llr', history=[0.1, 0.01], cbs=Checkpoint(tmp_path / 'fit'))
        return count.n, weights(learn)

    (n, first), (again, second) = retrained(), retrained()
    assert n and not again and same(first, second)


@pytest.mark.parametrize('how', ['file', 'callback'])
def test_sculpt_that_is_refused_prunes_nothing(learner, tmp_path, how):
    if how == 'file':
        quiet(learner(**FEW), 'fit', 1, cbs=Checkpoint(tmp_path / 'fit'))
    learn = learner(**FEW)
    before, cbs = weights(learn), Refuse() if how == 'callback' else Checkpoint(tmp_path / 'fit')
    with pytest.raises(ValueError, match='refused' if how == 'callback' else 'of another fit'):
        quiet(learn, 'fit_sculpt', 0.9, 0.5, 1, 1, cbs=cbs)
    assert learn.masks is None and same(before, weights(learn))


def test_rounds_prune_alone(learner):
    learn, own = learner(**FEW), SparsifyCallback(0.9, schedule=ocp)
    learn.add_cb(count := Count())
    with pytest.raises(ValueError, match='a round adds its own SparsifyCallback: remove'):
        learn.iterative_prune(2, 1, 0.2, cbs=own)
    with pytest.raises(ValueError, match='remove the one in `fit`'):
        quiet(learn, 'find_tickets', 2, lambda learn, cbs: learn.fit(1, cbs=[own, *cbs]))
    learn.add_cb(SparsifyCallback(0.9))
    with pytest.raises(ValueError, match='a round adds its own SparsifyCallback: remove'):
        learn.find_tickets(2, lambda learn, cbs: learn.fit(1, cbs=cbs))
    assert count.n == 0 and learn.masks is None


def test_gsm_beside_a_sparse_embedding(learner):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.words((x.flatten(1) > 0.5).long()).mean(1))

    learn = learner(Words(), opt_func=SGD, wd=0.01, **FEW)
    quiet(learn, 'fit', 1, 0.1, cbs=GSM(0.5))
    assert learn.masks.sparsity == pytest.approx(0.5, abs=0.01) and list(learn.masks) == ['head.weight']


def test_a_file_has_the_weights_that_its_fit_started_from(learner, tmp_path):
    "A fit that is stopped before its first file leaves nothing: the next one starts from the present weights"
    learn = learner(**FEW)
    with pytest.raises(KeyboardInterrupt):
        quiet(learn, 'fit', 1, cbs=[Checkpoint(tmp_path / 'fit'), Stop(0, 4)])
    quiet(learn, 'fit', 1, cbs=Checkpoint(tmp_path / 'fit'))
    with pytest.raises(ValueError, match='of another fit'):
        quiet(learner(**FEW), 'fit', 1, cbs=Checkpoint(tmp_path / 'fit'))


def test_interrupted_rounds_leave_nothing_frozen(learner, tmp_path):
    learn = two_groups(learner)
    fit = lambda learn, cbs: learn.fine_tune(1, cbs=cbs)
    learn.add_cb(stop := Stop(0, 2))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quiet(learn, 'find_tickets', 1, fit, 0.5, folder=tmp_path)
        assert all(p.requires_grad for p in learn.model.parameters())
    learn.remove_cb(stop)
    assert len(quiet(learn, 'find_tickets', 1, fit, 0.5, folder=tmp_path)) == 2


@pytest.mark.parametrize('name, value', [('scope', 'foo'), ('interval', 0), ('interval', 2.5), ('recover', 'x')])
def test_attributes_are_checked_before_each_fit(learner, name, value):
    learn, cb = learner(**FEW), SparsifyCallback(0.5)
    learn.add_cb(count := Count())
    setattr(cb, name, value)
    with pytest.raises(ValueError, match=f'{name}={value!r}'):
        quiet(learn, 'fit', 1, cbs=cb)
    assert count.n == 0 and learn.masks is None


def test_an_interval_may_change_between_fits(learner):
    cb = RigL(0.5)
    cb.interval = 6
    quiet(learner(digits_convnet(widths=(4, 8)), **FEW), 'fit', 3, 0.05, cbs=cb)
    assert [c['iteration'] for c in cb.changes] == [6, 12]


def test_complex_weights_are_not_to_be_named(learner):
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match='the model has no weights that can be pruned'):
        SparsifyCallback(0.5).targets(model)


def test_thresholds_above_all_weights():
    with pytest.raises(ValueError, match='s_init=5: needs a number below 0, such as -3200'):
        STR(0.9, s_init=5)


def test_a_rate_of_rounds_that_lacks_arguments(learner):
    with pytest.raises(
        ValueError, match="max_lr=s_cyc_max_lr.* can't be called with the number of completed rounds alone"
    ):
        learner(**FEW).iterative_prune(1, 1, prune_rate=0.3, max_lr=s_cyc_max_lr)


def test_a_loop_that_makes_too_few_steps_is_told():
    model = nn.Linear(4, 5)
    sparsifier = Sparsifier(model, SparsifyCallback(0.5), 20, torch.optim.SGD(model.parameters(), 0.1))
    sparsifier.begin()
    model(torch.ones(1, 4)).sum().backward()
    sparsifier.step()
    with pytest.warns(UserWarning, match='`finish` after 1 of 20 steps prunes the rest at once') as told:
        sparsifier.finish()
    assert told[0].filename == __file__ and (model.weight == 0).sum() == 10
