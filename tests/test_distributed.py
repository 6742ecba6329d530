"Several processes have the same masks, to the bit, and the files are those of the first"

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import losses_alone
from processes import printed, ranks, torchrun

from fastprune.all import Masks, Ticket
from fastprune.core.files import load_tensors
from fastprune.learner import batches as passes
from fastprune.learner import distributed

pytest.importorskip('accelerate')
here = Path(__file__).parent


@pytest.mark.parametrize(
    'n,use_cpu',
    [
        (2, False),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(4, False, marks=pytest.mark.slow),
    ],
)
def test_example(tmp_path, n, use_cpu):
    tmp_path /= 'a new folder'
    out = printed(torchrun, n, here.parent / 'examples' / 'distributed.py', tmp_path, use_cpu=use_cpu)
    assert out.count('epoch     train_loss') == 0 or out.count('sparsity') == 5  # each table once
    for name, s in dict(
        OCP=0.9,
        taylor=0.9,
        DPF=0.8,
        RigL=0.8,
        STR=0.8,
        **dict.fromkeys(['snip', 'grasp', 'fisher', 'wanda', 'synflow', 'random_score'], 0.9),
    ).items():
        masks = [Masks.load(tmp_path / f'{name}_{i}.safetensors') for i in range(n)]
        assert (
            all(m == masks[0] for m in masks)
            and (masks[0].sparsity == pytest.approx(s, abs=2e-3) or name == 'STR' and masks[0].sparsity > s)
            and not any('module.' in k for k in masks[0])
        ), name
    paths = [json.loads((tmp_path / f'path_{i}.json').read_text()) for i in range(n)]
    assert all(p == paths[0] for p in paths)
    assert Ticket.load(tmp_path / 'ticket.safetensors').sparsity == pytest.approx(0.5, abs=1e-2)
    assert len(json.loads((tmp_path / 'tickets' / 'rounds.json').read_text())['rows']) == 2
    for name in ('OCP', 'DPF', 'STR'):
        load_tensors(tmp_path / 'models' / f'{name}.safetensors')


@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_going_on_and_what_each_evaluates(tmp_path, n):
    for part in ('first', 'again'):
        printed(ranks, n, here / 'distributed.py', tmp_path, part)
    for name in ('OCP', 'RigL'):
        states = [torch.load(tmp_path / f'{name} {part} {i}.pth') for part in ('whole', 'again') for i in range(n)]
        assert all(s.keys() == states[0].keys() for s in states)
        for k in states[0]:
            same = [torch.equal(s[k], states[0][k]) for s in states]
            assert (
                all(same)
                or 'running' in k
                and all(torch.equal(a[k], b[k]) for a, b in zip(states, states[n:], strict=False))
            ), (name, k)  # BatchNorm's statistics are each process's own
    numbers = [json.loads((tmp_path / f'numbers {i}.json').read_text()) for i in range(n)]
    alone = losses_alone(tmp_path)
    items = 360
    for o in numbers:
        assert o['seen'] <= 3 * (items / n + 64) and all(
            o[k] == numbers[0][k] for k in ('losses', 'instability', 'sparsity', 'accuracy')
        )
        assert o['losses'] == pytest.approx(alone, rel=1e-4)
    assert sum(o['seen'] for o in numbers) >= 3 * items and numbers[0]['sparsity'] == pytest.approx(
        [0, 0.5, 0.75], abs=0.01
    )
    tickets = [torch.load(tmp_path / f'tickets {i}.pth') for i in range(n)]
    assert tickets[0] and all(torch.equal(t[k], m) for t in tickets for k, m in tickets[0].items())


def test_channels(tmp_path):
    printed(ranks, 2, here / 'distributed_channels.py', tmp_path)
    for name in ('batch', 'group'):
        a, b = (torch.load(tmp_path / f'{name} {i}.pth') for i in range(2))
        assert a['kept'] == b['kept'] == [4, 6] and a['recovered'] > 0
        for part in ('weights', 'masks', 'values'):
            assert a[part] and all(torch.equal(t, b[part][n]) for n, t in a[part].items()), part
        assert len(a['norms']) == (2 if name == 'group' else 0)
        assert all(torch.equal(x, y) for x, y in zip(a['norms'], b['norms'], strict=True))


@pytest.mark.parametrize('name', ['distributed', 'fsdp'])
def test_a_missing_folder_is_told_in_a_line(name):
    run = ranks(2, here.parent / 'examples' / f'{name}.py')
    assert (
        run.returncode
        and [o for o in run.stderr.splitlines() if 'usage' in o]
        == [f'usage: torchrun --nproc_per_node 2 examples/{name}.py FOLDER']
        and 'IndexError' not in run.stderr
    )


def test_batches_go_to_the_device_of_the_process(learner):
    learn, there = learner(), torch.device('cuda', 1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=there))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(passes, 'is_distributed', lambda learn: True)
        m.setitem(learn.__dict__, 'distributed_trainer', trainer)
        assert passes.device_of(learn) == there
    assert passes.device_of(learn) == next(learn.model.parameters()).device


def test_gpus_are_as_before(monkeypatch):
    asked, sent = [], []
    init = distributed._on_cpus(lambda self, **kwargs: asked.append(kwargs))
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('cuda'))
    init(None, sync_bn=True)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    init(None, sync_bn=True)
    init(None, cpu=False)
    assert asked == [dict(sync_bn=True), dict(sync_bn=True, cpu=True), dict(cpu=False)]
    monkeypatch.setattr(torch.distributed, 'get_backend', lambda: 'nccl')
    distributed._over_any_backend(lambda self, t, rank: sent.append((t, rank)))(None, [1, 2], 0)
    assert sent == [([1, 2], 0)]
