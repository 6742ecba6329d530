"One experiment at a time in a folder"

import os
import signal
import subprocess
import sys
import threading

import pytest
from processes import Running

from fastprune.all import sweep

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

script = """
import sys
from pathlib import Path
import fuzz
from fastprune.all import *
from fastai.basics import Callback
folder, kind = Path(sys.argv[1]), sys.argv[2]
class Wait(Callback):
    def before_fit(self):
        print('training', flush=True)
        sys.stdin.readline()
def wait(learn, *args): learn.fit(1, cbs=Wait())
if kind == 'rounds': fuzz.learner(folder).iterative_prune(1, 1, folder=folder, cbs=Wait())
def search(learn, cbs): learn.fit(1, cbs=[*cbs, Wait()] if folder.exists() else cbs)
if kind == 'tickets': fuzz.learner(folder).find_tickets(1, search, folder=folder)
if kind == 'sweep': sweep(lambda seed: fuzz.learner(folder), {'a': wait}, [0.5], [0], folder=folder, bar=False)
"""


@pytest.fixture
def running(tmp_path):
    "Starts an experiment in another process, which waits in its first training; and a function that runs the same one"
    started = []

    def start(kind, **env):
        p = Running(script, tmp_path / 'f', kind, env=env)
        started.append(p)
        assert p.stdout.readline() == 'training\n'
        return p

    yield start
    for p in started:
        p.kill()


def experiment(kind, folder):
    import fuzz

    learn = fuzz.learner(folder)
    if kind == 'rounds':
        return learn.iterative_prune(1, 1, folder=folder)
    if kind == 'tickets':
        return learn.find_tickets(1, lambda learn, cbs: learn.fit(1, cbs=cbs), folder=folder)
    return sweep(
        lambda seed: fuzz.learner(folder),
        {'b': lambda learn, *args: learn.prune(0.5)},
        [0.5],
        [0],
        folder=folder,
        bar=False,
    )


@pytest.mark.parametrize('kind', ['rounds', 'sweep'])
def test_a_second_experiment_is_refused_by_name(running, tmp_path, kind):
    folder = tmp_path / 'f'
    first = running(kind)
    for other in ('rounds', 'tickets', 'sweep'):
        before = sorted(folder.iterdir())
        with pytest.raises(
            ValueError, match=f"folder='{folder}' is in use by process {first.pid} on .*, since .*: wait"
        ):
            experiment(other, folder)
        assert sorted(folder.iterdir()) == before
    assert len(experiment('rounds', tmp_path / 'g')) == 2
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(experiment('rounds', folder)) == 2  # what a killed process has left stops nobody
    assert not [p for p in folder.iterdir() if p.name.startswith('.owner')]


def test_an_owner_in_this_process(tmp_path):
    from fastprune.core.folders import sole_owner

    def enter(folder):
        with sole_owner(folder):
            return sorted(os.listdir(folder)) if folder else None

    with sole_owner(tmp_path / 'f'):
        for same in (tmp_path / 'f', str(tmp_path / 'f'), tmp_path / 'f' / '..' / 'f'):
            with pytest.raises(ValueError, match=f'process {os.getpid()} on .* has not returned yet'):
                enter(same)
        errors = []

        def other():
            try:
                enter(tmp_path / 'f')
            except ValueError as e:
                errors.append(e)

        t = threading.Thread(target=other)
        t.start()
        t.join()
        assert len(errors) == 1
        assert enter(tmp_path / 'g') == ['.owner'] and enter(None) is None and enter('') is None
    assert enter(tmp_path / 'f') == ['.owner'] and not list(
        tmp_path.iterdir()
    )  # an empty folder that it has made goes, too
    with pytest.raises(RuntimeError):
        with sole_owner(tmp_path):
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='is a file'):
        enter(tmp_path / 'file')


def test_processes_of_one_job_are_one_owner(tmp_path, monkeypatch):
    from fastprune.core.folders import sole_owner

    with sole_owner(tmp_path):
        monkeypatch.setenv('RANK', '1')
        with sole_owner(tmp_path):
            pass
        assert (tmp_path / '.owner').exists()


def test_a_forked_process_neither_owns_nor_keeps_the_lock(tmp_path):
    from fastprune.core.folders import sole_owner

    read, write = os.pipe()
    with sole_owner(tmp_path):
        pid = os.fork()
        if not pid:  # goes on for longer than its parent's experiment
            try:
                os.close(write)
                os.read(read, 1)
            finally:
                os._exit(0)
    with sole_owner(tmp_path):
        pass
    os.write(write, b'x')
    os.waitpid(pid, 0)
    for fd in (read, write):
        os.close(fd)


@pytest.mark.parametrize('why', ['no fcntl', 'no locks'])
def test_without_locks_the_file_counts_while_its_process_lives(tmp_path, monkeypatch, why):
    import errno
    import json
    import socket

    from fastprune.core import folders

    if why == 'no fcntl':
        monkeypatch.setattr(folders, 'fcntl', None)
    else:
        monkeypatch.setattr(
            folders.fcntl, 'flock', lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, 'no locks'))
        )

    def enter():
        with folders.sole_owner(tmp_path):
            return json.loads((tmp_path / '.owner').read_text())

    me = enter()
    assert me['pid'] == os.getpid() and not list(tmp_path.iterdir())
    gone = subprocess.run([sys.executable, '-c', 'import os; print(os.getpid())'], capture_output=True, text=True)
    for owner, alive in (
        ({**me, 'pid': int(gone.stdout)}, False),
        ({**me, 'started': 1}, False),
        (me, True),
        ({**me, 'host': 'elsewhere', 'pid': int(gone.stdout)}, True),
    ):
        (tmp_path / '.owner').write_text(json.dumps(owner))
        if alive:
            with pytest.raises(ValueError, match=f"is in use by process {owner['pid']} on {owner['host']}"):
                enter()
        else:
            assert enter()['pid'] == os.getpid()
    assert me['host'] == socket.gethostname()


def test_a_link_is_no_lock(tmp_path):
    from fastprune.core.folders import sole_owner

    (tmp_path / 'mine').write_text('precious')
    (tmp_path / 'f').mkdir()
    (tmp_path / 'f' / '.owner').symlink_to(tmp_path / 'mine')
    with pytest.raises(OSError):
        with sole_owner(tmp_path / 'f'):
            pass
    assert (tmp_path / 'mine').read_text() == 'precious'
