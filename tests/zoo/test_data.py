"Small images as one tensor: on disk, in a batch, and in a Learner"

import pickle

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, TensorImage, load_learner, set_seed
from PIL import Image

from fastprune.all import FlipAndShift, SparsifyCallback, cifar10_dls, digits_convnet


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes that differ in brightness, as PNG, which keeps pixels as they are"
    path, noise = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for part, n in (('train', 60), ('test', 20)):
        for c, base in (('dark', 0), ('light', 128)):
            (path / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray((base + noise.integers(1, 120, (32, 32, 3))).astype(np.uint8)).save(
                    path / part / c / f'{i:03}.png'
                )
    return path


def bytes_of(folder, part):
    return np.stack([np.array(Image.open(p)).transpose(2, 0, 1) for p in sorted(folder.glob(f'{part}/*/*.png'))])


def test_validation_images_are_those_on_disk(folder):
    dls = cifar10_dls(folder, bs=16, device='cpu')
    xs = torch.cat([x for x, _ in dls.valid])
    mean, std = (getattr(dls.valid.after_batch.fs[-1], k) for k in ('mean', 'std'))
    back = torch.as_tensor(xs) * std + mean
    assert torch.allclose(back * 255, torch.from_numpy(bytes_of(folder, 'test')).float(), atol=1e-3)
    assert torch.cat([y for _, y in dls.valid]).tolist() == [0] * 20 + [1] * 20 and list(dls.vocab) == ['dark', 'light']


def test_an_epoch_has_each_image_once_and_another_order_the_next_time(folder):
    dls = cifar10_dls(folder, bs=20, augment=False, device='cpu')
    a, b = (torch.cat([torch.as_tensor(x) for x, _ in dls.train]) for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(a.flatten(1).sum(1).sort()[0], b.flatten(1).sum(1).sort()[0]) and len(a) == 120


def test_each_image_is_a_window_of_its_padded_self_flipped_or_not(folder):
    x = torch.from_numpy(bytes_of(folder, 'train'))[:12]
    set_seed(0)
    out, padded = torch.as_tensor(FlipAndShift()(TensorImage(x), split_idx=0)), torch.nn.functional.pad(x, (4,) * 4)
    windows = [[padded[i, :, r : r + 32, c : c + 32] for r in range(9) for c in range(9)] for i in range(12)]
    where = [
        next(
            ((j, f) for j, w in enumerate(windows[i]) for f in (0, 1) if torch.equal(out[i], w.flip(2) if f else w)),
            None,
        )
        for i in range(12)
    ]
    assert None not in where and len(set(where)) > 6 and {f for _, f in where} == {0, 1}


@pytest.mark.parametrize(
    'kw, sizes',
    [
        ({}, [120, 40]),
        (dict(n_train=50, n_test=10), [50, 10]),
        (dict(valid_pct=0.25), [90, 30, 40]),
        (dict(n_train=40, valid_pct=0.5, n_test=4), [20, 20, 4]),
    ],
)
def test_parts_have_each_class_alike_and_nothing_in_common(folder, kw, sizes):
    dls = cifar10_dls(folder, bs=8, **kw)
    assert [len(dl.dataset) for dl in dls.loaders] == sizes
    for dl in dls.loaders:
        assert dl.dataset.y.bincount().tolist() == [len(dl.dataset) // 2] * 2
    seen = [{bytes(x.cpu().numpy().tobytes()) for x in dl.dataset.x} for dl in dls.loaders]
    assert len(set.union(*seen)) == sum(sizes)


def test_a_batch_larger_than_the_set_still_trains(folder):
    assert [len(x) for x, _ in cifar10_dls(folder, bs=500).train] == [120]


def test_a_learner_trains_prunes_predicts_and_travels(folder, tmp_path):
    dls = cifar10_dls(folder, bs=16, size=16)
    assert dls.one_batch()[0].shape == (16, 3, 16, 16)
    learn = Learner(dls, digits_convnet(3, 2), loss_func=CrossEntropyLossFlat())
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 1e-2, cbs=SparsifyCallback(0.5))
    with learn.no_bar():
        preds, ys = learn.get_preds()
    assert (preds.argmax(1) == ys).float().mean() > 0.9 and learn.masks.sparsity == pytest.approx(0.5, abs=1e-4)
    learn.export('net.pkl')
    sizes = [len(pickle.dumps(learn.dls.new_empty())), len(pickle.dumps(learn.dls))]
    assert sizes[0] < 40_000 < 300_000 < sizes[1]  # what is exported has no images
    again = load_learner(tmp_path / 'net.pkl')
    assert torch.equal(
        again.model(torch.as_tensor(next(iter(dls.valid))[0]).cpu()),
        learn.model.cpu()(torch.as_tensor(next(iter(dls.valid))[0]).cpu()),
    )
    assert len(pickle.loads(pickle.dumps(dls)).train_ds) == 120


def test_same_seeds_same_batches(folder):
    def batches():
        set_seed(3)
        return torch.stack([torch.as_tensor(x).sum() for x, _ in cifar10_dls(folder, bs=8).train])

    assert torch.equal(batches(), batches())


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(path='/nowhere'), 'there is no folder'),
        (dict(n_train=119), 'n_train=119: needs a number of images from 2 to 118, or all 120'),
        (dict(n_test=True), 'n_test=True'),
        (dict(valid_pct=1.0), 'valid_pct=1.0'),
        (dict(bs=2.5), 'bs=2.5'),
        (dict(size=0), 'size=0'),
        (dict(valid_pct=0.001), 'valid_pct=0.001'),
    ],
)
def test_wrong_arguments(folder, kw, says):
    with pytest.raises(ValueError, match=says.replace('[', r'\[')):
        cifar10_dls(**{'path': folder, **kw})


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(ValueError, match='needs the folders train and test'):
        cifar10_dls(folder / 'train')
    for part, classes in (('train', 'ab'), ('test', 'ac')):
        for c in classes:
            (tmp_path / part / c).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / part / c / '0.png')
    with pytest.raises(ValueError, match='differ in classes'):
        cifar10_dls(tmp_path)
    (tmp_path / 'test' / 'c').rename(tmp_path / 'test' / 'b')
    (tmp_path / 'test' / 'b' / '0.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match="0.png' can't be read as an image"):
        cifar10_dls(tmp_path)


def test_no_path_and_no_network_says_what_to_do(monkeypatch):
    from urllib.error import URLError

    import fastprune.zoo.images

    def gone(*args):
        raise URLError('no route')

    monkeypatch.setattr(fastprune.zoo.images, 'untar_data', gone)
    with pytest.raises(OSError, match='give its folder as `path`'):
        cifar10_dls()
