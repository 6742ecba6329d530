"The command with images and networks as users have them: it trains, or ends with one line"

import os

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.augment import Brightness
from PIL import Image

from fastprune.all import CRITERIA, digits_dls, folder_dls
from fastprune.cli import main as command_line
from fastprune.zoo.make import make_model

main = command_line.__wrapped__


def images(folder, n=6, mode='RGB', classes='ab', parts=('',), ext='png', size=16):
    rng = np.random.default_rng(0)
    for part in parts:
        for k, c in enumerate(classes):
            (folder / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray((rng.random((size, size, 3)) * 100 + 100 * k).astype('uint8')).convert(mode).save(
                    folder / part / c / f'{i}.{ext}'
                )
    return folder


def ends(capsys, **kwargs):
    "Exit status and the one line that is said"
    with pytest.raises(SystemExit) as e:
        main(**kwargs)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith('fastprune: ')
    return e.value.code, said[0]


def test_fewer_images_than_a_batch_are_one_batch(tmp_path, capsys):
    main(data=str(images(tmp_path / 'd', 8)), epochs=1, bs=64, size=8, sparsity=0.5, out=str(tmp_path / 'out'))
    said = capsys.readouterr().out
    assert 'bs=64: there are 13 images to train on' in said and 'nan' not in said
    dls = folder_dls(tmp_path / 'd', bs=64, size=16, num_workers=0)
    assert [len(y) for _, y in dls.train] == [13] and [len(y) for _, y in dls.valid] == [3]
    assert [len(y) for _, y in folder_dls(tmp_path / 'd', bs=4, size=16, num_workers=0).train] == [4, 4, 4]


def test_images_are_augmented_if_asked(tmp_path):
    folder, kwargs = images(tmp_path / 'd', 8), dict(bs=13, size=16, num_workers=0)
    darker = folder_dls(folder, batch_tfms=Brightness(p=1.0, draw=0.1), **kwargs)
    (x, _), (dark, _) = folder_dls(folder, **kwargs).train.one_batch(), darker.train.one_batch()
    assert dark.mean() < 0.5 * x.mean()
    (x, _), (same, _) = folder_dls(folder, **kwargs).valid.one_batch(), darker.valid.one_batch()
    assert torch.equal(x, same)


@pytest.mark.sample(2)
@pytest.mark.parametrize('criterion', ['snip', 'grasp', 'synflow', 'wanda'])
def test_criteria_that_look_at_batches(tmp_path, criterion):
    main(criterion=criterion, epochs=1, valid_pct=0.7, sparsity=0.5, out=str(tmp_path))
    assert pd.read_csv(tmp_path / 'report.csv', index_col='name').sparsity['total'] == pytest.approx(0.5, abs=1e-3)
    assert criterion in CRITERIA


@pytest.mark.parametrize(
    'mode,ext', [('L', 'png'), ('P', 'png'), ('1', 'png'), ('RGBA', 'png'), ('CMYK', 'tif'), ('I;16', 'png')]
)
def test_modes_of_images(tmp_path, mode, ext):
    folder = images(tmp_path / 'd', 3, 'L' if mode == 'I;16' else mode, ext=ext)
    if mode == 'I;16':
        for f in folder.rglob('*.png'):
            Image.fromarray(np.array(Image.open(f)).astype('uint16') * 200).save(f)
    dls = folder_dls(folder, bs=2, size=8, num_workers=0, check=True)
    assert dls.one_batch()[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize('content', [b'no image', b'\x89PNG\r\n\x1a\n' + bytes(50), 'half', b''])
def test_an_image_that_cannot_be_read(tmp_path, capsys, content):
    bad = images(tmp_path / 'd') / 'a' / '3.png'
    bad.write_bytes(bad.read_bytes()[:60] if content == 'half' else content)
    code, said = ends(capsys, data=str(tmp_path / 'd'), out=str(tmp_path / 'out'))
    assert code == 2 and f"{str(bad)!r} can't be read as an image" in said and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'spoil,msg',
    [
        (
            lambda d: [f.unlink() for f in (d / 'train' / 'a').iterdir()],
            'a folder for each of at least two classes, with images',
        ),
        (lambda d: [f.unlink() for f in (d / 'valid').rglob('*.png')], "there are no images below"),
        (lambda d: (d / 'train' / 'a' / '0.png').rename(d / 'train' / '0.png'), 'is not in the folder of a class'),
        (lambda d: (d / 'valid' / 'a').rename((d / 'valid' / 'b' / 'old')), 'is not in the folder of a class'),
        (lambda d: (d / 'valid' / 'a').rename(d / 'valid' / 'z'), 'has images of a class that has none in'),
    ],
)
def test_folders_that_do_not_fit(tmp_path, capsys, spoil, msg):
    spoil(images(tmp_path / 'd', 2, parts=('train', 'valid')))
    code, said = ends(capsys, data=str(tmp_path / 'd'), out=str(tmp_path / 'out'))
    assert code == 2 and msg in said


def test_too_few_images(tmp_path, capsys):
    images(tmp_path / 'd', 1)
    assert (
        '--valid-pct=0.2: leaves none of 2 images to validate on'
        in ends(capsys, data=str(tmp_path / 'd'), out=str(tmp_path / 'out'))[1]
    )
    assert (
        'leaves 1 image to train on'
        in ends(capsys, data=str(tmp_path / 'd'), valid_pct=0.6, out=str(tmp_path / 'out'))[1]
    )
    images(tmp_path / 'e', 1, classes='abc')
    with pytest.raises(ValueError, match='to validate on: use another seed|was not included'):
        folder_dls(tmp_path / 'e', valid_pct=0.34, size=8, num_workers=0)


def test_no_network(tmp_path, capsys, monkeypatch):
    from urllib.error import URLError

    def fails(*args, **kwargs):
        raise URLError('Name or service not known')

    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fails)
    code, said = ends(capsys, arch='resnet18', pretrained=True, out=str(tmp_path / 'out'))
    assert code == 2 and "the weights of arch='resnet18' can't be downloaded" in said
    monkeypatch.setattr(
        'torchvision.models._api.load_state_dict_from_url',
        lambda *a, **k: make_model('mnasnet0_5', 1000, 32).state_dict(),
    )
    code, said = ends(capsys, arch='mnasnet0_5', pretrained=True, out=str(tmp_path / 'out'))
    assert code == 2 and "arch='mnasnet0_5'" in said


@pytest.mark.parametrize('out', ['/proc/nope', __file__ + '/x'])
def test_where_nothing_can_be_written(capsys, out):
    if not os.path.exists('/proc'):
        pytest.skip('needs /proc, in which there is no making folders')
    code, said = ends(capsys, out=out)
    assert code == 2 and out in said


def test_each_name_is_suggested_once():
    with pytest.raises(ValueError) as e:
        make_model('resnet181', 2, 32)
    names = str(e.value).partition('Did you mean ')[2].rstrip('?').split(', ')
    assert 'resnet18' in names and len(names) == len(set(names))


@pytest.mark.parametrize(
    'kwargs,msg',
    [
        (dict(bs=0), 'bs=0'),
        (dict(bs=2.5), 'bs=2.5'),
        (dict(size=0), 'size=0'),
        (dict(seed=-1), 'seed=-1'),
        (dict(seed='x'), "seed='x'"),
        (dict(valid_pct=1.0), 'valid_pct=1.0'),
        (dict(valid_pct=float('nan')), 'valid_pct=nan'),
        (dict(valid_pct=20), 'valid_pct=20'),
    ],
)
@pytest.mark.parametrize('make', [digits_dls, lambda **kw: folder_dls('.', **kw)], ids=['digits', 'folder'])
def test_arguments(make, kwargs, msg):
    with pytest.raises(ValueError, match=msg):
        make(**kwargs)


def test_arguments_of_one_alone():
    for kwargs, msg in (
        (dict(test_pct=-0.1), 'test_pct=-0.1'),
        (dict(valid_pct=0.5, test_pct=0.5), 'leave no image to train on'),
        (dict(test_pct=0.001), 'test_pct=0.001: leaves 2'),
        (dict(channels=0), 'channels=0'),
    ):
        with pytest.raises(ValueError, match=msg):
            digits_dls(**kwargs)
    with pytest.raises(ValueError, match='num_workers=-1'):
        folder_dls('.', num_workers=-1)
    assert sum(len(dl.dataset) for dl in digits_dls(valid_pct=0.3, test_pct=0.3).loaders) == 1797
