"The fastprune command, as a process"

import inspect
import subprocess
import sys
from pathlib import Path
from sysconfig import get_path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from processes import python

from fastprune.all import digits_convnet
from fastprune.cli import main as command_line
from fastprune.cli_train import make_callback, make_learner, train
from fastprune.deploy.shrunk_file import load_shrunk
from fastprune.zoo.make import make_model

script = Path(get_path('scripts')) / 'fastprune'
main = command_line.__wrapped__  # called with arguments, not with the flags of the process

blocked = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torchvision', 'timm', 'spacy'): raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Block())
sys.argv[0] = 'fastprune'
from fastprune.cli import main
main()
'''


def process(*cmd, cwd):
    return subprocess.run([*map(str, cmd)], capture_output=True, text=True, cwd=cwd)


def command(*args):
    return python(script, *args)


@pytest.mark.parametrize('epochs', [pytest.param(12, marks=pytest.mark.slow), 3])
def test_default_job_without_torchvision(tmp_path, epochs):
    flags = [] if epochs == 12 else ['--epochs', epochs]
    (tmp_path / 'without.py').write_text(blocked)  # flags are read in a file that is run, not in code after -c
    r = process(sys.executable, 'without.py', *flags, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert f'dense: {epochs} epochs' in r.stdout
    out = tmp_path / 'fastprune_out'
    assert sorted(p.name for p in out.iterdir()) == ['layers.png', 'model.pth', 'report.csv', 'training.png']
    lines = r.stdout.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.split()[:1] == ['run']) :]
    assert table[0].split() == ['run', 'sparsity', 'accuracy', 'weights', 'left', 'seconds']
    dense, pruned = table[1].split(), table[2].split()
    least = 0.93 if epochs == 12 else 0.6
    assert float(dense[2]) > least + 0.02 and float(pruned[3]) > least and pruned[2] == '0.9000'
    state = torch.load(out / 'model.pth', weights_only=True)
    digits_convnet().load_state_dict(state)
    report = pd.read_csv(out / 'report.csv', index_col='name')
    assert list(report.columns) == ['shape', 'weights', 'nonzero', 'sparsity'] and report.index[-1] == 'total'
    for n, row in report.iloc[:-1].iterrows():
        assert int(state[n].count_nonzero()) == row.nonzero == row.weights - round(0.9 * row.weights)
    for name in ('layers.png', 'training.png'):
        assert (out / name).read_bytes()[:4] == b'\x89PNG'


@pytest.fixture
def images(tmp_path):
    "A folder with 16 images to train on and 16 to validate on, of two classes"
    import numpy as np
    from PIL import Image

    folder = tmp_path / 'data'
    for split in ('train', 'valid'):
        for k, c in enumerate('ab'):
            (folder / split / c).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(np.full((20, 20, 3), 100 * k + i, 'uint8')).save(folder / split / c / f'{i}.png')
    return folder


def test_folder_and_architecture(tmp_path, images):
    r = command(
        '--data',
        images,
        '--arch',
        'squeezenet1_1',
        '--size',
        32,
        '--bs',
        8,
        '--epochs',
        1,
        '--sparsity',
        0.5,
        '--scope',
        'global',
        '--schedule',
        'agp',
        '--criterion',
        'taylor',
        '--out',
        tmp_path / 'out',
    )
    assert r.returncode == 0, r.stderr
    make_model('squeezenet1_1', 2, 32).load_state_dict(torch.load(tmp_path / 'out' / 'model.pth'))
    total = pd.read_csv(tmp_path / 'out' / 'report.csv', index_col='name').loc['total']
    assert total.nonzero == total.weights - round(0.5 * total.weights)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'flags',
    [
        ['--granularity', 'filter', '--sparsity', '0.5'],
        ['--schedule', 'one_shot', '--start', '0.5', '--exclude', '5, 0.0.weight'],
        ['--schedule', 'iterative', '--granularity', 'row'],
        ['--granularity', 'channel', '--sparsity', '0.5'],
    ],
    ids=' '.join,
)
def test_flags(tmp_path, flags):
    r = command('--epochs', 1, '--valid-pct', 0.7, '--out', tmp_path, *flags)
    assert r.returncode == 0, r.stderr
    report = pd.read_csv(tmp_path / 'report.csv', index_col='name')
    if 'filter' in flags:
        assert "granularity 'filter' does not fit: 5.weight" in r.stdout
        w = torch.load(tmp_path / 'model.pth')['2.0.weight']
        assert int(w.flatten(1).any(1).sum()) == 64 and report.sparsity['5.weight'] == 0
    if 'channel' in flags:
        assert report.channels['total'] == '112/224' and '112/224' in r.stdout
        assert '93,728 of 93,728' in r.stdout and ' of 93,728' in r.stdout.split('93,728 of 93,728')[1]
        smaller = load_shrunk(tmp_path / 'shrunk.safetensors', digits_convnet)
        assert sum(p.numel() for p in smaller.parameters()) == 24058
        wide = digits_convnet()
        wide.load_state_dict(torch.load(tmp_path / 'model.pth'))
        x = torch.rand(4, 1, 8, 8)
        assert torch.allclose(wide.eval()(x), smaller.eval()(x), atol=1e-4)
    if '--exclude' in flags:
        assert report.sparsity[['0.0.weight', '5.weight']].tolist() == [0, 0] and report.nonzero['1.0.weight'] == 1843


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'args,message',
    [
        (dict(sparsity=90.0), 'sparsity=90.0 is not in [0,1), the fraction of zeros: did you mean 0.9?'),
        (dict(schedule='foo'), "schedule='foo' is unknown: use one of one_shot, iterative"),
        (dict(scope='foo'), "scope='foo' is unknown: use one of local, global"),
        (dict(granularity='foo'), "granularity='foo' is unknown: use one of weight, row"),
        (dict(granularity='head'), "granularity='head': the model has no attention heads"),
        (dict(granularity='channel', scope='erk'), "granularity='channel' cuts whole channels"),
        (dict(criterion='foo'), "criterion='foo' is unknown: use one of magnitude"),
        (dict(arch='resnet19'), "arch='resnet19' is unknown to torchvision"),
        (dict(data='nowhere'), "data: there is no folder 'nowhere'"),
        (dict(exclude='head'), "exclude: 'head' matches no weight"),
        (dict(epochs=0), 'epochs=0: needs a number above 0'),
        (dict(start=1.0), '--start=1.0: needs a position in training, in [0,1)'),
        (dict(pretrained=True), 'pretrained needs a network'),
        (dict(seed=-1), 'seed=-1: needs a whole number of at least 0'),
        (dict(valid_pct=0.0), '--valid-pct=0.0: needs a fraction in (0,1)'),
        (dict(out=__file__), 'is a file: needs a folder'),
        (dict(arch='inception_v3', size=32), "arch='inception_v3' can't take images of size=32"),
        (dict(arch='vit_b_16', size=33), "arch='vit_b_16' can't be made for images of size=33"),
        (dict(lr=float('inf')), 'lr=inf: needs a number above 0'),
        (dict(seed=2**40), 'seed=1099511627776: needs a whole number below 2**32'),
        (dict(seed=2**64), 'seed=18446744073709551616: needs a whole number below 2**32'),
        (dict(bs=4, arch='resnet18'), '--bs=4: leaves a batch of one of 1437 images'),
        (dict(valid_pct=0.001), '--valid-pct=0.001: leaves 2 of 1797 images'),
        (dict(valid_pct=0.999), '--valid-pct=0.999: leaves 1 of 1797 images to train on'),
        (dict(data=''), "data='': needs a name"),
        (dict(arch=''), "arch='': needs a name"),
        (dict(out=''), "out='': needs a name"),
        (dict(criterion='synflow', arch='convnext_tiny', size=32), 'criterion synflow'),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, capsys, args, message):
    "End at once, with one line and nothing written"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(**args)
    assert str(e.value).startswith('fastprune: ') and message in str(e.value)
    assert not list(tmp_path.iterdir()) and 'epoch' not in capsys.readouterr().out


def test_module_as_a_script(tmp_path):
    code = "import runpy; runpy.run_module('fastprune.cli', run_name='__main__', alter_sys=True)"
    r = python(code, '--sparsity', 90, folder=tmp_path)
    assert r.returncode == 2 and 'fastprune: --sparsity=90.0' in r.stderr and not list(tmp_path.iterdir())


def test_wrong_flags_of_the_process(tmp_path):
    r = python(script, '--sparsity', 90, folder=tmp_path)
    assert r.returncode == 2 and 'fastprune: --sparsity=90.0' in r.stderr and 'Traceback' not in r.stderr


@pytest.fixture
def downloads(monkeypatch):
    "The addresses of weights that were asked for; they are made here"
    asked = []

    def fake(url, *args, **kwargs):
        asked.append(url)
        return make_model(url.rpartition('/')[2].partition('-')[0], 1000, 224).state_dict()

    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fake)
    return asked


def test_pretrained_weights_are_loaded(tmp_path, images, downloads):
    "The head is new, the body starts from them"
    out = tmp_path / 'out'
    main(data=str(images), arch='resnet18', pretrained=True, epochs=1, size=32, bs=8, sparsity=0.6, out=str(out))
    assert downloads and 'resnet18' in downloads[0]
    report = pd.read_csv(out / 'report.csv', index_col='name')
    assert report.sparsity['total'] == pytest.approx(0.6, abs=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize('how', [dict(granularity='filter'), dict(exclude='1.*'), dict(granularity='channel')])
def test_a_pretrained_body_is_pruned_also_before_it_is_unfrozen(downloads, recwarn, how):
    "It is frozen in the first epoch alone"
    flags = SimpleNamespace(**{k: p.default for k, p in inspect.signature(main).parameters.items()})
    flags.__dict__.update(arch='resnet18', pretrained=True, sparsity=0.5, **how)
    cb, _ = make_callback(learn := make_learner(flags), flags)
    assert 'frozen' not in ' '.join(str(w.message) for w in recwarn)
    assert any(n.startswith('0.7.1.conv2') for n in cb.targets(learn.model, learn)[0])


@pytest.mark.parametrize(
    'how, lr', [({}, 1e-2), (dict(pretrained=True), 2e-3), (dict(lr=0.1), 0.1), (dict(lr=0.1, pretrained=True), 0.1)]
)
def test_pretrained_weights_have_a_smaller_rate(how, lr):
    flags = SimpleNamespace(**{k: p.default for k, p in inspect.signature(main).parameters.items()} | how)
    rates, recorder = [], SimpleNamespace(metric_names=['epoch', 'accuracy'], values=[[0.5]])
    fit = lambda epochs, lr, cbs: rates.append(lr)
    train(SimpleNamespace(fine_tune=fit, fit_one_cycle=fit, recorder=recorder), flags)
    assert rates == [lr]


def test_a_size_that_a_pretrained_network_cannot_take(tmp_path, downloads, capsys):
    with pytest.raises(SystemExit, match="arch='squeezenet1_1' can't take images of size=4"):
        main(arch='squeezenet1_1', pretrained=True, size=4, out=str(tmp_path / 'out'))
    assert 'epoch' not in capsys.readouterr().out and not (tmp_path / 'out').exists()


@pytest.mark.sample(2)
@pytest.mark.parametrize('arch', ['vit_b_32', 'googlenet', 'mobilenet_v3_small', 'vit_tiny_patch16_224', 'resnet10t'])
def test_any_name_makes_a_network(arch):
    if arch in ('vit_tiny_patch16_224', 'resnet10t'):
        pytest.importorskip('timm', reason='these networks are timm\'s')
    model = make_model(arch, 5, 64).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)
