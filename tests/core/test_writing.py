"Files are written as a whole or not at all, with the permissions of other files, and errors name the path"

import os
import stat

import pytest
import torch
from fastai.basics import SGD

from fastprune.all import Masks, Ticket, save_state, sweep
from fastprune.core.files import atomically
from fastprune.core.sparse_files import save_sparse


def ticket():
    return Ticket({'w': torch.ones(9, 9)}, {'w': torch.ones(9, 9) > 0})


WRITERS = dict(
    state=lambda p: save_state({'w': torch.ones(99, 99)}, p),
    sparse=lambda p: save_sparse({'w': torch.ones(99, 99)}, p),
    masks=lambda p: Masks({'w': torch.ones(99, 99) > 0}).save(p),
    ticket=lambda p: ticket().save(p),
    text=lambda p: atomically(lambda q: q.write_text('x' * 9999), p),
)


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_files_have_the_permissions_of_others(tmp_path, write):
    old = os.umask(0o022)
    try:
        write(tmp_path / 'a')
        os.umask(0o077)
        write(tmp_path / 'b')
        (tmp_path / 'c').write_text('')
        (tmp_path / 'c').chmod(0o640)
        write(tmp_path / 'c')
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in 'abc'] == [0o644, 0o600, 0o640]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b', 'c']


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_no_link_is_followed(tmp_path, write):
    (tmp_path / 'mine').write_text('precious')
    for name in ('a', 'a.part', 'rounds.json.part'):
        (tmp_path / name).symlink_to(tmp_path / 'mine')
    write(tmp_path / 'a')
    assert (tmp_path / 'mine').read_text() == 'precious' and not (tmp_path / 'a').is_symlink()


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_no_file_takes_the_place_of_a_device(tmp_path, write):
    "Moving a file to '/dev/null' would do that to root"
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'device').symlink_to('/dev/null')
    for path in (tmp_path / 'pipe', tmp_path / 'device'):
        with pytest.raises(ValueError, match=f'{path.name} is a device, a pipe or a socket'):
            write(path)
    assert (tmp_path / 'pipe').is_fifo() and (tmp_path / 'device').is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['device', 'pipe']


def test_rounds_and_sweeps_follow_no_link(learner, fit, tmp_path):
    (tmp_path / 'mine').write_text('precious')
    for name in ('rounds.json.part', 'a_0.5_0.json.part'):
        (tmp_path / name).symlink_to(tmp_path / 'mine')
    with learner().no_bar():
        learner(opt_func=SGD).find_tickets(
            1, lambda learn, cbs: fit(learn, 1, cbs=cbs), folder=tmp_path, measure='none'
        )
        sweep(
            lambda seed: learner(),
            {'a': lambda learn, sparsity, seed: learn.prune(sparsity)},
            [0.5],
            [0],
            folder=tmp_path,
            bar=False,
        )
    assert (tmp_path / 'mine').read_text() == 'precious'


def test_reports_follow_no_link(learner, tmp_path):
    pytest.importorskip('plotly', reason='reports need plotly')
    (tmp_path / 'mine').write_text('precious')
    (tmp_path / 'report.html.part').symlink_to(tmp_path / 'mine')
    learner().report(tmp_path / 'report.html', seconds=0)
    assert (tmp_path / 'mine').read_text() == 'precious'


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_an_error_with_the_path(tmp_path, write):
    "Simulated by a limit of the size of files"
    import resource
    import signal

    write(tmp_path / 'a')
    before, old = (tmp_path / 'a').read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, old[1]))
        with pytest.raises(OSError) as e:
            write(tmp_path / 'a')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert e.value.filename == str(tmp_path / 'a') and e.value.errno and str(tmp_path / 'a') in str(e.value)
    assert (tmp_path / 'a').read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['a']


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_a_missing_folder_is_an_error_with_the_path(tmp_path, write):
    with pytest.raises(FileNotFoundError) as e:
        write(tmp_path / 'none' / 'a')
    assert e.value.filename == str(tmp_path / 'none' / 'a')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(OSError) as e:
        write(tmp_path / 'folder')
    assert e.value.filename == str(tmp_path / 'folder') and [p.name for p in tmp_path.iterdir()] == ['folder']


def test_a_crash_while_writing_leaves_what_was_there(tmp_path):
    (tmp_path / 'a').write_text('old')

    def crash(p):
        p.write_text('half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomically(crash, tmp_path / 'a')
    assert (tmp_path / 'a').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a']


def test_the_command_writes_whole_files(tmp_path, monkeypatch):
    from fastprune import cli, cli_save

    written = []
    monkeypatch.setattr(
        cli_save, 'atomically', lambda write, path, **kw: (written.append(path.name), atomically(write, path, **kw))
    )
    cli.main(epochs=1, sparsity=0.5, out=str(tmp_path / 'out'))
    assert (
        sorted(written)
        == sorted(p.name for p in (tmp_path / 'out').iterdir())
        == ['layers.png', 'model.pth', 'report.csv', 'training.png']
    )


@pytest.mark.parametrize(
    't',
    [
        torch.zeros(4, 4, dtype=torch.complex128),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4, 4, device='meta'),
        torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    ],
    ids=['complex128', 'sparse', 'meta', 'quantized'],
)
def test_tensors_that_no_file_can_hold_are_named(t, tmp_path):
    for save in (save_state, save_sparse):
        with pytest.raises(ValueError, match="state 'w' is a tensor"):
            save({'w': t}, tmp_path / 'f')
    with pytest.raises(ValueError, match='__metadata__'):
        save_state({'__metadata__': torch.zeros(1)}, tmp_path / 'f')
    assert not list(tmp_path.iterdir())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'wrong',
    [
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, 3),
        torch.ones(3, dtype=torch.int64),
    ],
    ids=['float8', 'bfloat16', 'a matrix', 'whole numbers'],
)
def test_histograms_of_rounds_are_checked(learner, tmp_path, wrong):
    def rounds():
        learn = learner()
        with learn.no_bar(), learn.no_logging():
            return learn.iterative_prune(1, 1, histograms=True, folder=tmp_path / 'h')

    rounds()
    path = tmp_path / 'h' / 'histogram_01.safetensors'
    save_state({'gradients': wrong, 'hidden': torch.ones(3)}, path)
    with pytest.raises(ValueError, match='histogram_01.safetensors is damaged'):
        rounds()
