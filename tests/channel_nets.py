"Small networks whose channels belong together: sums, concatenations, groups, norms over channels"

import random

import torch
from torch import nn
from torch.nn import functional as F


class RandomNet(nn.Module):
    "A network drawn from a seed: blocks that add, join, or convolve in groups"

    def __init__(self, seed, n_in=1, n_out=10):
        super().__init__()
        draw = random.Random(seed)
        width = 4 * draw.randint(1, 3)
        self.stem, self.blocks, self.kinds = nn.Conv2d(n_in, width, 3, padding=1), nn.ModuleList(), []
        for _ in range(draw.randint(1, 4)):
            kind, inner = draw.choice(['add', 'join', 'groups', 'plain']), 4 * draw.randint(1, 3)
            norm = draw.choice([nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), lambda n: nn.Identity()])
            out = width if kind in ('add', 'groups') else inner
            groups = 2 if kind == 'groups' else 1
            inside = nn.Sequential(
                *(nn.Conv2d(width, inner, 3, padding=1), norm(inner), nn.ReLU()),
                nn.Conv2d(inner, out, 3, padding=1, groups=groups),
            )
            self.blocks.append(inside)
            self.kinds.append(kind)
            width = width + out if kind == 'join' else out
        self.head = nn.Linear(width, n_out)

    def forward(self, x):
        x = self.stem(x)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            y = block(x)
            x = x + y if kind == 'add' else torch.cat([x, y], 1) if kind == 'join' else y
            x = F.relu(x)
        return self.head(x.mean((2, 3)))


class Tower(nn.Module):
    "A residual stream with a block of another width; `norm` makes its norms"

    def __init__(self, norm=nn.BatchNorm2d, n_in=1, n_out=10):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(n_in, 8, 3, padding=1), norm(8)
        self.up, self.norm_up, self.down = nn.Conv2d(8, 12, 3, padding=1), norm(12), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, n_out)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x + self.down(F.relu(self.norm_up(self.up(F.relu(x)))))
        return self.head(F.relu(x).mean((2, 3)))


class Attending(nn.Module):
    "One attention module in a residual stream, over the rows of an image"

    def __init__(self, size=8, width=16, heads=4, n_out=10):
        super().__init__()
        self.embed, self.norm = nn.Linear(size, width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp, self.out, self.head = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(width, n_out)

    def forward(self, x):
        x = self.embed(x.flatten(0, 1) if x.ndim == 4 else x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.out(F.gelu(self.mlp(x)))
        return self.head(x.mean(1))
