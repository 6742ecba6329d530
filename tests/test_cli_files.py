"What the command writes, the ways to call it, and all that can be wrong with a call"

import re
import sys

import pytest
import torch
from fastai.basics import load_learner

from fastprune import cli_flags, cli_save
from fastprune.all import Distill, digits_convnet, load_sparse
from fastprune.cli import main as command_line
from fastprune.cli_train import check_device

train = command_line.__wrapped__


def test_all_files(tmp_path, monkeypatch, capsys):
    "Each is written, named with its size, and is of the network that was trained"
    pytest.importorskip('onnxscript', reason='it writes ONNX')
    pytest.importorskip('plotly', reason='reports need plotly')
    monkeypatch.setattr(cli_save, '_seconds', 0.0)
    train(epochs=1, sparsity=0.8, out=str(tmp_path), save='deploy,report, onnx,sparse,dense', device='cpu')
    said = capsys.readouterr().out
    state = torch.load(tmp_path / 'model.pth', weights_only=True)
    for p in tmp_path.iterdir():
        n = p.stat().st_size
        size = f'{n / 1e6:,.1f} MB' if n >= 1e6 else f'{n / 1e3:,.1f} kB'
        assert re.search(rf'  {re.escape(p.name)} +{re.escape(size)}  \w', said), p.name
    names = (
        'dense.pth deploy.pkl layers.png model.onnx model.pth report.csv report.html sparse.safetensors training.png'
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == names.split()
    dense = torch.load(tmp_path / 'dense.pth', weights_only=True)
    assert dense['5.weight'].all() and not state['5.weight'].all()
    sparse = load_sparse(tmp_path / 'sparse.safetensors')
    assert all(torch.equal(t, sparse[n]) for n, t in state.items())
    assert '80%' in (tmp_path / 'report.html').read_text() and (tmp_path / 'model.onnx').stat().st_size > 1000
    deployed, model, x = load_learner(tmp_path / 'deploy.pkl').model, digits_convnet(), torch.rand(3, 1, 8, 8)
    model.load_state_dict(state)
    assert torch.allclose(deployed.eval()(x), model.eval()(x), atol=1e-5)


def test_channels_give_an_ordinary_smaller_network(tmp_path, capsys):
    train(epochs=1, sparsity=0.5, granularity='channel', out=str(tmp_path), save='deploy', device='cpu')
    model, wide = load_learner(tmp_path / 'deploy.pkl').model.eval(), digits_convnet()
    wide.load_state_dict(torch.load(tmp_path / 'model.pth'))
    x = torch.rand(3, 1, 8, 8)
    assert sum(p.numel() for p in model.parameters()) == 24058
    assert model[0][0].out_channels == 16 and type(model[0][0]) is torch.nn.Conv2d
    assert torch.allclose(model(x), wide.eval()(x), atol=1e-4)
    assert 'the smaller network, 24,058 of' in capsys.readouterr().out


def test_what_cuts_no_channel_ends_well(tmp_path, capsys):
    "And files of an earlier run are named"
    (tmp_path / 'shrunk.safetensors').write_bytes(b'older')
    train(epochs=1, sparsity=0.0, granularity='channel', out=str(tmp_path), save='deploy', device='cpu')
    said = capsys.readouterr().out
    assert 'nothing to cut' in said and 'of an earlier run: shrunk.safetensors' in said
    assert load_learner(tmp_path / 'deploy.pkl').model[0][0].out_channels == 32


def test_channels_that_cannot_be_cut_leave_table_and_files(tmp_path, capsys, monkeypatch):
    def fails(self, **kwargs):
        raise ValueError('gives other outputs without these channels')

    monkeypatch.setattr('fastai.basics.Learner.shrink', fails)
    with pytest.raises(SystemExit):
        train(epochs=1, sparsity=0.5, granularity='channel', out=str(tmp_path), save='deploy', device='cpu')
    said = capsys.readouterr()
    assert 'shrunk.safetensors: gives other outputs' in said.err and 'weights left' in said.out
    assert (tmp_path / 'deploy.pkl').exists() and 'deploy.pkl' in said.out


def test_the_dense_network_teaches(tmp_path, monkeypatch):
    teachers = []
    made = Distill.from_dense.__func__

    def from_dense(cls, learn, **kwargs):
        teachers.append(learn)
        return made(cls, learn, **kwargs)

    monkeypatch.setattr(Distill, 'from_dense', classmethod(from_dense))
    train(epochs=1, sparsity=0.5, distill=True, out=str(tmp_path / 'a'), device='cpu')
    assert len(teachers) == 1 and not teachers[0].masks and len(teachers[0].recorder.values) == 1
    train(epochs=1, sparsity=0.5, out=str(tmp_path / 'b'), device='cpu')
    a, b = (torch.load(tmp_path / o / 'model.pth') for o in 'ab')
    assert len(teachers) == 1 and not torch.equal(a['5.weight'], b['5.weight'])


@pytest.mark.parametrize('error', [ValueError, RuntimeError])
def test_one_file_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys, error):
    def fails(learn, path, cb):
        raise error('there is a loop in it')

    monkeypatch.setitem(cli_save.SAVED, 'onnx', cli_save.SAVED['onnx']._replace(write=fails, packages=()))
    with pytest.raises(SystemExit) as e:
        train(epochs=1, out=str(tmp_path), save='onnx,sparse')
    said = capsys.readouterr()
    assert e.value.code == 2 and 'model.onnx: there is a loop in it. All other files are in' in said.err
    assert (tmp_path / 'sparse.safetensors').exists() and 'weights left' in said.out


@pytest.mark.parametrize('there', [None, ('cuda', 2), ('mps', 1)])
def test_devices(monkeypatch, there):
    kind, n = there or (None, 0)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: there is not None)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *a, **k: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: n)
    names = ['cpu', *([kind, *(f'{kind}:{i}' for i in range(n))] if there else [])]
    assert [str(check_device(o)) for o in names] == names and check_device(None) is None
    for wrong in ('gpu', f'cuda:{n}', 'xpu', ''):
        message = f"device={wrong!r}: needs one of the devices here: {', '.join(names)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_device(wrong)


@pytest.mark.parametrize(
    'args,message',
    [
        (dict(save='spars'), "--save='spars': 'spars' is unknown: use some of sparse, dense, report, onnx, deploy"),
        (dict(save=''), "--save='': '' is unknown"),
        (dict(save='sparse,,onnx'), "'' is unknown"),
        (dict(device='gpu'), "--device='gpu': needs one of the devices here: cpu"),
        (dict(valid_pct=0.0), '--valid-pct=0.0: needs'),
        (dict(granularity='channel', scope='erk'), "--scope='erk' distributes weights over tensors, and"),
        (dict(pretrained=True, arch='resnet19'), "--arch='resnet19' is unknown"),
        (dict(data='nowhere'), "--data: there is no folder 'nowhere'"),
        (dict(granularity='100x100'), "--granularity='100x100': fits none of the layers"),
        (dict(exclude='*'), "--exclude='*': leaves no weight to prune"),
        (dict(out=f'{__file__}/x'), f"--out='{__file__}/x': this folder can't be made: Not a directory"),
    ],
)
def test_wrong_values(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train(**args)
    said = capsys.readouterr()
    assert e.value.code == 2 and message in said.err and len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir()) and 'epoch' not in said.out


@pytest.mark.parametrize('name,package', [('onnx', 'onnx'), ('onnx', 'onnxscript'), ('report', 'plotly')])
def test_missing_packages_are_an_error_before_training(tmp_path, monkeypatch, capsys, name, package):
    monkeypatch.setattr(cli_save, 'find_spec', lambda p: None if p == package else True)
    with pytest.raises(SystemExit) as e:
        train(save=f'sparse,{name}', out=str(tmp_path / 'out'))
    said = capsys.readouterr()
    assert e.value.code == 2 and not (tmp_path / 'out').exists() and 'epoch' not in said.out
    assert f"--save='sparse,{name}': {name} needs {package}: pip install 'fastprune[{name}]'" in said.err


def test_all_missing_packages_are_named_at_once(monkeypatch):
    monkeypatch.setattr(cli_save, 'find_spec', lambda p: None)
    with pytest.raises(
        ImportError, match=r"onnx needs onnx, report needs plotly: pip install 'fastprune\[onnx,report\]'"
    ):
        cli_save.check_saves('sparse,onnx,report')


@pytest.fixture
def ends(monkeypatch, capsys):
    "Status, output and errors of the command with these words"
    monkeypatch.setattr(sys.modules['__main__'], '__file__', 'fastprune', raising=False)

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['fastprune', *map(str, words)])
        try:
            command_line()
            code = 0
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize(
    'words,message',
    [
        (['--sparsty', '0.9'], 'unrecognized arguments: --sparsty 0.9: did you mean --sparsity?'),
        (['--quantize', '8'], 'unrecognized arguments: --quantize 8: fastprune --help lists what there is'),
        (['comparre', 'a', 'b'], 'did you mean compare?'),
        (['--epochs', 'many'], "--epochs: 'many' is not a whole number"),
        (['--epochs', '2.5'], "--epochs: '2.5' is not a whole number"),
        (['--lr', 'x'], "--lr: 'x' is not a number"),
        (['--lr', 'nan'], '--lr=nan: needs a number above 0'),
        (['--sparsity'], '--sparsity: expected one argument'),
        (['--s', '1'], 'ambiguous option: --s could match'),
        (['--pretrained', '--arch', 'resnet18', '--distill=yes'], "--distill: ignored explicit argument 'yes'"),
        (['report'], 'the following arguments are required: FILE: fastprune report --help'),
        (['report', 'a', '--sparsity', '1'], 'unrecognized arguments: --sparsity 1'),
        (['report', 'a', '--classes', '3'], '--classes=3: is of a network: give its name with arch'),
        (['report', 'a', '--seconds', '-1'], '--seconds=-1.0: needs a number of seconds'),
        (['compare', 'a'], 'the following arguments are required: B'),
        (['compare', 'a', 'b'], "there is no file 'a'"),
        (['compare', 'a', 'b', '--size', '0'], '--size=0: needs a whole number above 0'),
        (['compare', 'a', 'b', '--arch', ''], "--arch='': needs the name of a network"),
        (['compare', 'a', 'b', 'c'], 'unrecognized arguments: c'),
    ],
    ids=str,
)
def test_wrong_words(ends, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = ends(*words)
    assert code == 2 and not out and err.startswith('fastprune: ') and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_and_version(ends):
    for words, lines in (
        ((), ('usage: fastprune [flags]', 'fastprune compare A B', 'data:', 'pruning:', 'examples:', '--device')),
        (('report',), ('usage: fastprune report', 'FILE', 'network:', 'examples:', 'export.pkl')),
        (('compare',), ('usage: fastprune compare', '  A ', '  B ', 'examples:', '--seconds')),
    ):
        code, out, err = ends(*words, '--help')
        assert code == 0 and not err and all(line in out for line in lines)
        assert max(map(len, out.splitlines())) <= 110 and 'None' not in out
    code, out, _ = ends('--version')
    assert code == 0 and re.match(r'fastprune [\d.]+, torch ', out)


def test_each_argument_is_in_the_help(ends):
    from inspect import signature

    out = ends('--help')[1]
    for n in signature(train).parameters:
        assert f"--{n.replace('_', '-')}" in out


def test_compare_command(ends, tmp_path):
    torch.manual_seed(0)
    state = digits_convnet().state_dict()
    torch.save(state, tmp_path / 'a.pth')
    state['1.0.weight'][:32] = 0
    torch.save({'model': state, 'opt': {}}, tmp_path / 'b.pth')
    code, out, _ = ends('compare', tmp_path / 'a.pth', tmp_path / 'b.pth')
    row = next(line.split() for line in out.splitlines() if line.startswith('1.0.weight'))
    assert not code and row[1:] == ['64x32x3x3', '18,432', '18,432', '18,432', '9,216', '0.00%', '50.00%', '0.500']
    assert re.search(r'bytes without zeros +[\d.]+ MB', out) and 'b.pth' in out


def test_stop_and_lack_of_memory(capsys):
    for error, code, message in (
        (KeyboardInterrupt(), 130, 'fastprune: stopped\n'),
        (torch.OutOfMemoryError('of 24 GB'), 2, 'out of memory: use a smaller --bs or --size: of 24 GB'),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB\n1"),
            2,
            "--size: DefaultCPUAllocator: can't al",
        ),
        (MemoryError(), 2, 'out of memory: use a smaller --bs or --size: MemoryError\n'),
    ):
        with pytest.raises(SystemExit) as e, cli_flags.stopping('bs', 'size'):
            raise error
        assert e.value.code == code and message in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='shapes'), cli_flags.stopping('bs', 'size'):
        raise RuntimeError('shapes differ')
