"""Prune a model while it trains with FSDP2, which shards the weights over processes: `torchrun --nproc_per_node 2
examples/fsdp.py out`

Each process holds a shard of each weight. All processes find the same threshold from sums of counts, without sending
weights. Masks are sharded like the weights."""

import os
import sys
from pathlib import Path

import torch
from fastai.basics import rank_distrib, set_seed
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn import functional as F

from fastprune.all import compute_masks, digits_dls, ocp, prunable_weights

if __name__ == '__main__':
    if len(sys.argv) != 2 or 'RANK' not in os.environ:
        sys.exit(2 if rank_distrib() else 'usage: torchrun --nproc_per_node 2 examples/fsdp.py FOLDER')
    out, device = Path(sys.argv[1]), 'cuda' if torch.cuda.is_available() else 'cpu'
    out.mkdir(parents=True, exist_ok=True)
    if device == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    else:
        torch.set_num_threads(1)
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    rank, size = dist.get_rank(), dist.get_world_size()
    set_seed(0)  # the same model in each process
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    ).to(device)
    mesh = init_device_mesh(device, (size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt, dls = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), digits_dls(bs=64, device=device)
    weights, masks, epochs = prunable_weights(model), None, 4
    T, t = epochs * len(dls.train), 0
    for epoch in range(epochs):
        model.train()
        for x, y in dls.train:
            F.cross_entropy(model(x[rank::size]), y[rank::size]).backward()
            opt.step()
            opt.zero_grad()
            t += 1
            if t % 10 == 0 or t == T:
                masks = compute_masks(weights, 0.95 * ocp(t / T), scope='global', absolute=True)
            if masks is not None:
                masks.apply_(weights)
        model.eval()
        with torch.no_grad():
            right = torch.cat([model(x).argmax(1) == y for x, y in dls.valid])
        sparsity = masks.sparsity  # counts over all processes
        if rank == 0:
            print(f'epoch {epoch}: accuracy {right.float().mean():.3f}, sparsity {sparsity:.4f}', flush=True)
    masks.save(out / 'masks.safetensors')  # all processes call this, and the first one writes
    dist.barrier()
    dist.destroy_process_group()
