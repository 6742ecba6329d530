"Masks of sharded tensors are those of the whole tensors, to the bit"

from pathlib import Path

import pytest
from processes import printed, ranks

from fastprune.all import Masks

here = Path(__file__).parent


@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_to_the_whole(tmp_path, n):
    assert 'all checks passed' in printed(ranks, n, here / 'sharded.py', tmp_path / 'masks.safetensors')


@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_example(tmp_path, n):
    "By `torchrun` itself it runs in the tutorial about many machines"
    tmp_path = tmp_path / 'a new folder'
    lines = printed(ranks, n, here.parent / 'examples' / 'fsdp.py', tmp_path).splitlines()
    assert (
        len(lines) == 4
        and lines[-1].endswith('sparsity 0.9500')
        and float(lines[-1].split('accuracy ')[1].split(',')[0]) > 0.8
    )
    masks = Masks.load(tmp_path / 'masks.safetensors')
    n = sum(m.numel() for m in masks.values())
    assert masks.n_kept == n - round(0.95 * n)
