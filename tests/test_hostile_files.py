"Damaged and hostile files of all kinds: loading takes little time and memory, runs nothing, and errors name the file"

import fuzz
import pytest
import torch
from hostile import HOSTILE, SHOWN

FILES = ('masks', 'state', 'sparse', 'ticket', 'pth', 'legacy', 'foreign', 'learner')
FOLDERS = ('rounds', 'tickets', 'sweep')


@pytest.fixture(autouse=True)
def one_thread():
    "No other threads, which a forked process would not have"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def check(results, loads=()):
    assert not [f'{r.name}: {f}' for r in results for f in r.faults]
    return [r for r in results if not r.error and r.name not in loads]


@pytest.mark.parametrize('kind', FILES)
def test_damaged_files(tmp_path, kind):
    check(fuzz.run(40, tmp_path, 'files', [kind]))


@pytest.mark.parametrize('kind', FOLDERS)
def test_damaged_folders(tmp_path, kind):
    check(fuzz.run(10, tmp_path, 'folders', [kind]))


@pytest.mark.parametrize('kind', [*FILES, *FOLDERS])
def test_hostile_files(tmp_path, kind):
    loads = check(fuzz.run(0, tmp_path, 0, [kind], HOSTILE))
    assert len(loads) <= {'sparse': 3, 'ticket': 4, 'pth': 2, 'learner': 0, 'rounds': 1, 'tickets': 5, 'sweep': 3}.get(
        kind, 0
    )


def test_damaged_checkpoints(tmp_path):
    check(fuzz.run(12, tmp_path, 'checkpoints', ['checkpoint']))


def test_a_report_of_a_hostile_file(tmp_path):
    "The whole page, not only the file: nothing from the file is drawn, and no network is larger than it"
    from fastprune.deploy.report_file import report_file

    for name in ('600 views', '20,000 names', 'a number, 10^9 times', 'compressed zeros'):
        (tmp_path / 'it').write_bytes(HOSTILE['pth'][name]('pth', None, b''))
        with pytest.raises(ValueError, match='it'):
            report_file(tmp_path / 'it', out=tmp_path / 'page.html', seconds=0)
    torch.save({'fc.weight': torch.zeros(2), 'fc.bias': torch.zeros(10**6)}, tmp_path / 'it')
    with pytest.raises(ValueError, match='it is not of arch'):
        report_file(tmp_path / 'it', 'resnet18', out=tmp_path / 'page.html', size=32, seconds=0)
    assert not (tmp_path / 'page.html').exists()


def test_what_is_shown_of_hostile_files(tmp_path):
    "A page and a comparison take no more than the file, however many names its tensors have"
    pytest.importorskip('plotly')
    loads = check(fuzz.run(0, tmp_path, 0, ['shown'], HOSTILE))
    assert [r.name.removeprefix('shown ') for r in loads] == [f'{n} it' for n in SHOWN if '19,000' not in n]
