"Several processes have the same masks, to the bit, and the files are those of the first"
import json, os, subprocess, sys
from pathlib import Path
import pytest
from fastprune.all import Masks, Ticket, load_tensors

pytest.importorskip('accelerate')
here = Path(__file__).parent


@pytest.mark.parametrize('n', [2, 4])
def test_example(tmp_path, n):
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), here/'launch.py', here.parent/'examples'/'distributed.py', tmp_path], capture_output=True, text=True, env=env, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('epoch     train_loss') == 0 or r.stdout.count('sparsity') == 5                     # each table once
    for name, s in dict(OCP=0.9, taylor=0.9, DPF=0.8, RigL=0.8, STR=0.8, snip=0.9, grasp=0.9, wanda=0.9, synflow=0.9, random_score=0.9).items():
        masks = [Masks.load(tmp_path/f'{name}_{i}.safetensors') for i in range(n)]
        assert all(m == masks[0] for m in masks) and (masks[0].sparsity == pytest.approx(s, abs=2e-3) or name == 'STR' and masks[0].sparsity > s) and not any('module.' in k for k in masks[0]), name
    paths = [json.loads((tmp_path/f'path_{i}.json').read_text()) for i in range(n)]
    assert all(p == paths[0] for p in paths)
    assert Ticket.load(tmp_path/'ticket.safetensors').sparsity == pytest.approx(0.5, abs=1e-2)
    assert len(json.loads((tmp_path/'tickets'/'rounds.json').read_text())['rows']) == 2
    for name in ('OCP', 'DPF', 'STR'): load_tensors(tmp_path/'models'/f'{name}.safetensors')
