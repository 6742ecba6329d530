"Damaged and hostile files of all kinds: loading takes little time and memory, runs nothing, and errors name the file"

import json
from collections import Counter

import fuzz
import pytest
import torch
from hostile import HOSTILE, SHOWN
from processes import printed, python

FILES = ('masks', 'state', 'sparse', 'ticket', 'pth', 'legacy', 'foreign', 'learner')
FOLDERS = ('rounds', 'tickets', 'sweep')


def run(n, folder, seed, kinds, hand_made=False):
    """Results of `fuzz.run` in a process that no test has used before: how much memory a file takes depends on what is
    free already. It has no other threads, which a forked process would not have"""
    code = f"""
import json, fuzz, torch
{'from hostile import HOSTILE' if hand_made else 'HOSTILE = None'}
torch.set_num_threads(1)
results = fuzz.run({n}, {str(folder)!r}, {seed!r}, {kinds!r}, HOSTILE)
print(json.dumps([r.__dict__ for r in results]))"""
    return [fuzz.Result(**r) for r in json.loads(printed(python, code).splitlines()[-1])]


def check(results, loads=()):
    assert not [f'{r.name}: {f}' for r in results for f in r.faults]
    return [r for r in results if not r.error and r.name not in loads]


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', FILES)
def test_damaged_files(tmp_path, kind):
    check(run(40, tmp_path, 'files', [kind]))


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', FOLDERS)
def test_damaged_folders(tmp_path, kind):
    check(run(10, tmp_path, 'folders', [kind]))


@pytest.mark.parametrize('kinds', [FILES, FOLDERS], ids=['files', 'folders'])
def test_hostile_files(tmp_path, kinds):
    loads = Counter(r.name.split()[0] for r in check(run(0, tmp_path, 0, kinds, hand_made=True)))
    assert loads <= Counter(sparse=3, ticket=4, pth=2, rounds=1, tickets=5, sweep=3)


def test_damaged_checkpoints(tmp_path):
    check(run(12, tmp_path, 'checkpoints', ['checkpoint']))


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
    loads = check(run(0, tmp_path, 0, ['shown'], hand_made=True))
    assert [r.name.removeprefix('shown ') for r in loads] == [f'{n} it' for n in SHOWN if '19,000' not in n]
