"Masks in pickles, and exports that need no fastprune"

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from fastai.basics import Learner, load_learner, nn

from fastprune.all import Masks, SparsifyCallback, cifar_resnet, digits_dls
from fastprune.core import masks as masks_module

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.cpu_only]  # the files are read there


def zeros(model):
    return sum(int((p == 0).sum()) for p in model.parameters())


def elsewhere(*paths):
    "What `load_learner` gives in a Python without fastprune: zeros of each model, and its output for an image of ones"
    code = """import sys; sys.modules['fastprune'] = None
from fastai.basics import *
for path in sys.argv[1:]:
    learn = load_learner(path)
    with learn.no_bar(): out = learn.model.eval()(torch.ones(1, 1 if path.endswith('digits.pkl') else 3, 8, 8))
    print(sum(int((p == 0).sum()) for p in learn.model.parameters()), float(out.sum()), len(learn.cbs), learn.dls.c)"""
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, paths)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [[float(o) for o in line.split()] for line in run.stdout.splitlines()]


def masks(shapes=((3, 7), (5,), (), (0, 4), (2, 3, 1, 9))):
    gen = torch.Generator().manual_seed(0)
    return Masks({str(i): torch.rand(s, generator=gen) > 0.5 for i, s in enumerate(shapes)})


def test_a_bit_a_weight(learner, tmp_path):
    learn, sizes = learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 10))), []
    for prune in (lambda: None, lambda: learn.prune(0.9)):
        prune()
        learn.export()
        sizes.append((tmp_path / 'export.pkl').stat().st_size)
    n = sum(m.numel() for m in learn.masks.values())
    assert n / 8 <= sizes[1] - sizes[0] < n / 8 + 4000
    loaded = load_learner(tmp_path / 'export.pkl')
    assert loaded.masks == learn.masks and type(loaded.masks) is Masks and loaded.masks.sparsity == pytest.approx(0.9)
    loaded.dls = digits_dls(bs=256)
    with loaded.no_bar(), loaded.no_logging():
        loaded.fit(1)
    assert loaded.masks == learn.masks and all(
        (p[~loaded.masks[n]] == 0).all() for n, p in loaded.model.named_parameters() if n in loaded.masks
    )


@pytest.mark.parametrize(
    'again',
    [
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: pickle.loads(pickle.dumps(m, 2)),
        copy.deepcopy,
        copy.copy,
        Masks.copy,
    ],
    ids=['pickle', 'protocol 2', 'deepcopy', 'copy', '.copy'],
)
def test_masks_are_equal_again(again):
    first = masks()
    other = again(first)
    assert (
        type(other) is Masks
        and other == first
        and all(m.dtype == torch.bool and m.shape == first[n].shape for n, m in other.items())
    )
    assert again(Masks()) == {}


def test_a_deepcopy_is_independent():
    first = masks()
    both = copy.deepcopy({'a': first, 'b': first})
    assert both['a'] is both['b']
    both['a']['0'].fill_(False)
    assert first == masks()


@pytest.mark.parametrize(
    'shape,bits',
    [
        ((3, 7), torch.zeros(2, dtype=torch.uint8)),
        ((3, -7), torch.zeros(3, dtype=torch.uint8)),
        ((24,), torch.zeros(3)),
        ((10**9,), torch.zeros(1, dtype=torch.uint8).expand(10**9 // 8)),
    ],
)
def test_damaged_masks_of_a_pickle(shape, bits):
    with pytest.raises(ValueError, match="the shape and size of 'a'"):
        masks_module._from_packed({'a': (shape, bits)})


def test_an_export_without_fastprune(learner, tmp_path, fit):
    learn = learner(cbs=SparsifyCallback(0.9))
    fit(learn, 1)
    with learn.no_bar():
        before = learn.validate()
    keys, opt, cbs, held, dls = list(learn.__dict__), learn.opt, list(learn.cbs), learn.masks, learn.dls
    assert learn.export_plain('digits.pkl') == tmp_path / 'digits.pkl'
    assert (
        list(learn.__dict__) == keys
        and learn.opt is opt
        and list(learn.cbs) == cbs
        and learn.masks == held
        and learn.dls is dls
    )  # as it was
    with learn.no_bar():
        assert learn.validate() == before
    other = Learner(
        digits_dls(channels=3), cifar_resnet(8), path=tmp_path, loss_func=learn.loss_func
    )  # a network of fastprune's
    other.prune(0.5)
    other.export_plain('resnet.pkl')
    loaded = elsewhere(tmp_path / 'digits.pkl', tmp_path / 'resnet.pkl')
    for (n, out, _, c), l in zip(loaded, (learn, other), strict=True):
        image = torch.ones(1, 1 if l is learn else 3, 8, 8)
        assert (
            n == zeros(l.model) >= (~l.masks['0.0.weight']).sum()
            and out == pytest.approx(float(l.model.eval()(image).sum()), abs=1e-4)
            and c == 10
        )
    assert load_learner(tmp_path / 'digits.pkl').masks is None and not list(tmp_path.glob('*.part'))


def test_what_needs_fastprune_is_told(learner, tmp_path):
    learn = learner(metrics=[])
    learn.mine = masks()
    with pytest.raises(ValueError, match='fastprune.core.masks._from_packed is needed to load this Learner'):
        learn.export_plain()
    assert not list(tmp_path.iterdir()) and learn.mine == masks()


def test_what_searches_leave_stays_here(learner, tmp_path, fit):
    learn = learner()
    learn.find_tickets(1, lambda learn, cbs: fit(learn, 1, cbs=cbs), measure='none')
    with learn.no_bar(), learn.no_logging():
        learn.iterative_prune(1, 1)
    assert learn.export_plain('plain.pkl').exists() and learn.tickets and len(learn.rounds) == 2
