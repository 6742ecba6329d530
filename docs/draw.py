"""Draw the pictures of the documentation: `python docs/draw.py [NAME ...]` writes docs/img/NAME.svg"""

import sys
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use('svg')

import matplotlib.pyplot as plt
import numpy as np
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle

from fastprune.all import (
    SparsifyCallback,
    compute_masks,
    cosine,
    cubic,
    cyclical,
    digits_convnet,
    digits_dls,
    iterative,
    linear,
    lr_warmup,
    ocp,
    one_shot,
    prunable_weights,
    s_cyc_max_lr,
    window,
)

# ink on a light card, which can be read on a dark page, too
paper, ink, faint, line = '#f6f8fa', '#1f2328', '#59636e', '#d1d9e0'
blue, orange, green, purple, brown, pink = '#1f6fb4', '#c2570c', '#1a7f4b', '#7a4fc4', '#8a5a2b', '#b8336a'

plt.rcParams.update(
    {
        'svg.hashsalt': 'fastprune',
        'figure.facecolor': paper,
        'savefig.facecolor': paper,
        'axes.facecolor': paper,
        'axes.edgecolor': faint,
        'axes.labelcolor': ink,
        'axes.titlecolor': ink,
        'axes.titlesize': 11,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.prop_cycle': matplotlib.cycler(color=[blue, orange, green, purple, brown, pink]),
        'text.color': ink,
        'xtick.color': faint,
        'ytick.color': faint,
        'legend.frameon': False,
        'legend.fontsize': 9,
        'font.size': 10,
        'grid.color': line,
        'axes.axisbelow': True,
    }
)


def panels(*shape, **kwargs):
    return plt.subplots(*shape, layout='constrained', **kwargs)


def bare(ax, title=''):
    "Axes for a drawing, without axes"
    ax.set_aspect('equal')
    ax.axis('off')
    ax.set_title(title)


def cells(ax, colors, texts=None, x=0.0, y=0.0, size=1.0):
    "A matrix of squares, the first row on top; None for a square that is empty"
    rows, columns = len(colors), len(colors[0])
    for i in range(rows):
        for j in range(columns):
            at = x + size * j, y - size * (i + 1)
            face = colors[i][j] or 'none'
            ax.add_patch(Rectangle(at, size, size, facecolor=face, edgecolor=faint, lw=0.6))
            if texts is not None:
                dark = face in (blue, orange)
                middle = at[0] + size / 2, at[1] + size / 2
                ax.text(*middle, texts[i][j], ha='center', va='center', fontsize=9, color='white' if dark else faint)
    ax.set(xlim=(x - 0.1, x + size * columns + 0.1), ylim=(y - size * rows - 0.1, y + 0.1))


def start():
    "What the ten lines of the first page have done"
    set_seed(42, reproducible=True)
    learn = Learner(digits_dls(), digits_convnet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    cb = SparsifyCallback(0.9)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(8, 1e-2, cbs=cb)
    fig, (left, right) = panels(1, 2, figsize=(9, 3))
    fig.get_layout_engine().set(wspace=0.08)  # the second axis of the left picture has a label, too
    left.plot(cb.iters, [100 * s for s in cb.reached], color=orange, lw=2)
    left.set(xlabel='iteration', ylabel='zeros (%)', ylim=(0, 103), title='One-Cycle Pruning to 90%')
    rate = left.twinx()
    rate.plot(cb.iters, cb.lrs, color=faint, ls=':')
    rate.set_ylabel('learning rate (dotted)')
    values = np.array(learn.recorder.values)
    epochs = np.arange(1, len(values) + 1)
    right.plot(epochs, 100 * values[:, 2], color=blue, marker='o', ms=4, lw=2, label='accuracy (%)')
    right.plot(epochs, 100 * values[:, 3], color=orange, marker='o', ms=4, lw=2, label='zeros (%)')
    right.set(xlabel='epoch', ylim=(0, 103), xticks=epochs, title='After each epoch, on validation images')
    right.legend(loc='lower right')
    right.grid()


def mask():
    "A mask says which weights are kept"
    rng = np.random.default_rng(3)
    w = rng.normal(0, 0.5, (4, 5)).round(1)
    kept = compute_masks({'w': torch.tensor(w).abs()}, 0.6)['w'].numpy()
    fig, axs = panels(1, 3, figsize=(8.5, 2.4))
    numbers = [[f'{o:.1f}' for o in row] for row in w]
    titles = 'weights', 'mask: 60% sparsity', 'weights in the model'
    for ax, title in zip(axs, titles, strict=True):
        bare(ax, title)
    cells(axs[0], [[blue] * 5] * 4, numbers)
    cells(axs[1], np.where(kept, orange, None), np.where(kept, '1', '0'))
    cells(axs[2], np.where(kept, blue, None), np.where(kept, numbers, '0'))
    for ax, sign in zip(axs, '×=', strict=False):
        ax.text(5.6, -2, sign, fontsize=18, ha='center', va='center', clip_on=False)


def schedule():
    "Six schedules"
    u = np.linspace(0, 1, 600)
    named = {
        'one_shot, from 40%': window(one_shot, 0.4),
        'iterative': iterative,
        'linear': linear,
        'cosine': cosine,
        'cubic': cubic,
        'ocp': ocp,
    }
    fig, (left, right) = panels(1, 2, figsize=(9, 3.2), sharey=True)
    for name, f in named.items():
        left.plot(u, [f(o) for o in u], label=name, lw=2.5 if name == 'ocp' else 1.5)
    left.set(xlabel='position in training', ylabel='progress to the target', title='Schedules')
    left.legend(loc='lower right')
    combined = {'window(cubic, 0.2, 0.8)': window(cubic, 0.2, 0.8), 'cyclical(cubic, 3)': cyclical(cubic, 3)}
    for (name, f), c in zip(combined.items(), (green, purple), strict=True):
        right.plot(u, [f(o) for o in u], label=name, color=c, lw=1.8)
    right.set(xlabel='position in training', title='Combined')
    right.legend(loc='lower right')
    for ax in (left, right):
        ax.grid()


def scope():
    "What each scope keeps of each layer of a network"
    set_seed(42, reproducible=True)
    weights = {n: p.detach().abs() for n, p in prunable_weights(digits_convnet()).items()}
    labels = [f'{n}\n{p.numel():,} weights' for n, p in weights.items()]
    scopes = 'local', 'global', 'erk', 'balanced'
    fig, ax = panels(figsize=(9, 3.2))
    for i, name in enumerate(scopes):
        masks = compute_masks(weights, 0.9, scope=name)
        kept = [100 * m.float().mean().item() for m in masks.values()]
        ax.bar(np.arange(len(kept)) + 0.2 * (i - 1.5), kept, 0.19, label=f"scope='{name}'")
    ax.set(xticks=range(len(labels)), xticklabels=labels, ylabel='weights kept (%)', ylim=(0, 108))
    ax.set_title('The same 90% in four scopes: digits_convnet before training, ranked by magnitude')
    ax.legend(ncols=2)
    ax.grid(axis='y')


def square(x, y, size):
    return matplotlib.transforms.Affine2D().scale(size).translate(x, y)


def kernels(ax, kept, title):
    "A convolution's mask [filters, inputs, 3, 3], a row for each filter"
    bare(ax, title)
    filters, inputs = kept.shape[:2]
    squares = {True: [], False: []}
    for i, j, y, x in np.ndindex(kept.shape):
        at = 1.15 * j + x / 3, -1.15 * i - (y + 1) / 3
        squares[bool(kept[i, j, y, x])].append(matplotlib.path.Path.unit_rectangle().transformed(square(*at, 1 / 3)))
    for is_kept, color in ((True, blue), (False, '#e0e5ea')):
        whole = matplotlib.path.Path.make_compound_path(*squares[is_kept])
        ax.add_patch(PathPatch(whole, facecolor=color, edgecolor=paper, lw=0.8))
    ax.set(xlim=(-0.1, inputs * 1.15), ylim=(-filters * 1.15, 0.1))


def granularity():
    "Half of a convolution's weights, in six units"
    torch.manual_seed(1)
    score = torch.rand(4, 4, 3, 3)
    fig, axs = panels(1, 6, figsize=(10, 2.1))
    names = 'weight', '2:4', 'row', 'kernel', 'filter'
    for ax, name in zip(axs, names, strict=False):
        kernels(ax, compute_masks({'w': score}, 0.5, granularity=name)['w'].numpy(), f"'{name}'")
    rows = score.mean((1, 2, 3)).argsort(descending=True)[:2]
    columns = score.mean((0, 2, 3)).argsort(descending=True)[:2]
    kept = np.zeros(score.shape, bool)
    kept[np.ix_(rows, columns)] = True
    kernels(axs[5], kept, "'channel'")


def bars(ax, values, colors, title, ghost=None):
    ax.bar(range(len(values)), values, color=colors, width=0.7)
    if ghost is not None:
        ax.bar(range(len(values)), ghost, color='none', edgecolor=faint, ls=':', width=0.7)
    ax.axhline(0, color=faint, lw=0.8)
    ax.set(title=title, xticks=[], yticks=[], ylim=(-1.1, 1.1))
    for side in ('left', 'bottom'):
        ax.spines[side].set_visible(False)


def recovery():
    "How weights come back"
    w = np.array([0.9, 0, -0.7, 0, 0, 0.6, 0, -0.8, 0, 0])
    moved = w + np.array([-0.05, 0.12, 0.1, -0.35, 0.08, -0.1, 0.42, 0.05, -0.1, 0.15])
    kept = compute_masks({'w': torch.tensor(moved).abs()}, 0.4)['w'].numpy()
    back = kept & (w == 0)
    fig, axs = panels(1, 3, figsize=(9.5, 2.5))
    bars(axs[0], w, blue, '1. Six of ten weights are zero')
    bars(axs[1], moved, np.where(w == 0, orange, blue), '2. The optimizer moves all ten', ghost=w)
    bars(axs[2], moved * kept, np.where(back, orange, blue), '3. Four zeros: two are back')


def ramp():
    "The ramp of OCP, and one with a start and an end"
    u = np.linspace(0, 1, 400)
    fig, (left, right) = panels(1, 2, figsize=(9, 3.1), sharey=True)
    for (a, b), c, style in (
        ((14, 5), blue, '-'),
        ((14, 3), green, '--'),
        ((14, 7), purple, '--'),
        ((8, 3), orange, ':'),
    ):
        left.plot(u, [90 * ocp(o, a, b) for o in u], color=c, ls=style, lw=2, label=f'α={a}, β={b}')
    left.set(xlabel='position in training', ylabel='zeros (%)', title='ocp: α is how steep, β is how late')
    left.legend(loc='lower right')
    right.plot(u, [90 * window(cubic, 0.2, 0.8)(o) for o in u], color=blue, lw=2)
    right.axvspan(0.2, 0.8, color=line, alpha=0.6, lw=0)
    for x, text in ((0.1, 'dense'), (0.5, 'ramp'), (0.9, 'fixed')):
        right.text(x, 97, text, ha='center', va='center')
    right.set(xlabel='position in training', title='window(cubic, 0.2, 0.8)', ylim=(-2, 103))
    for ax in (left, right):
        ax.grid()


def hooks():
    "Where the hooks are in one step of training"
    fig, ax = panels(figsize=(10, 2.1))
    ax.axis('off')
    steps = [
        ('before_forward', orange),
        ('forward,\nbackward', line),
        ('before_step', orange),
        ("optimizer's\nstep", line),
        ('after_step', orange),
        ('scores\nnew_masks', orange),
        ('pruned weights\nare zero', line),
    ]
    for i, (text, color) in enumerate(steps):
        box = FancyBboxPatch((i * 1.5, 0), 1.16, 0.8, boxstyle='round,pad=0.03', facecolor=color, edgecolor='none')
        ax.add_patch(box)
        dark = color == orange
        ax.text(i * 1.5 + 0.58, 0.4, text, ha='center', va='center', fontsize=9, color='white' if dark else ink)
        if i:
            arrow = FancyArrowPatch((i * 1.5 - 0.3, 0.4), (i * 1.5 - 0.04, 0.4), arrowstyle='->', mutation_scale=12)
            ax.add_patch(arrow)
    ax.text(7.5 + 0.58, 0.98, 'if masks are due', ha='center', color=faint)
    ax.set(xlim=(-0.1, 10.3), ylim=(-0.15, 1.2))


def over_training(ax, u, sparsity, rate, title):
    ax.plot(u, sparsity, color=orange, lw=2)
    ax.plot(u, rate, color=blue, lw=1.5, ls=':')
    ax.set(title=title, ylim=(-0.04, 1.1), yticks=[0, 0.9], yticklabels=['0', '90%'], xticks=[], xlabel='training')


def one_cycle(u):
    "fastai's one-cycle rate, relative to the largest"
    up = u < 0.25
    return np.where(up, 0.52 - 0.48 * np.cos(np.pi * u / 0.25), 0.5 + 0.5 * np.cos(np.pi * (u - 0.25) / 0.75))


def papers():
    "Sparsity and learning rate over training, for each paper"
    u = np.linspace(0, 1 - 1e-6, 600)
    fig, axs = panels(2, 3, figsize=(9.5, 4.6))
    axs = axs.flatten()
    over_training(axs[0], u, [0.9 * ocp(o) for o in u], one_cycle(u), 'One-Cycle Pruning')
    x = np.linspace(-1, 1, 200)
    axs[1].plot((x + 1) / 2, 0.15 + 0.7 * (1 - x**2) ** 2, color=orange, lw=2, label='unstable')
    axs[1].plot((x + 1) / 2, 0.12 + 0 * x, color=blue, lw=2, label='stable')
    axs[1].set(title='Linear Mode Connectivity', xlabel='from one copy to the other', ylabel='error')
    axs[1].set(xticks=[0, 1], yticks=[], ylim=(0, 1.1))
    axs[1].legend(loc='upper right')
    cycles = cyclical(window(cubic, 0, 0.8), 4)
    step = lr_warmup(1.0, warmup=0.0, drops=(0.75,))
    over_training(axs[2], u, [0.9 * cycles(o) for o in u], [step(o * 4 % 1) for o in u], 'Cyclical Pruning')
    rounds, largest = 8, partial(s_cyc_max_lr, eps=0.4, delta=0.6)
    shape = [lr_warmup(largest(m), warmup=0.15, drops=(0.5, 0.75)) for m in range(rounds)]
    left = [1 - 0.8 ** int(o * rounds) for o in u]
    over_training(axs[3], u, left, [shape[int(o * rounds)](o * rounds % 1) for o in u], 'S-Cyc: rounds of 20%')
    axs[3].set(yticks=[0, 1], yticklabels=['0', '100%'])
    dense = u < 0.6
    bimp = np.where(dense, 0, np.where(u < 0.8, 0.7, 0.9))
    rate = np.where(dense, 1 - u, 0.75 * (1 - (u - 0.6) % 0.2 / 0.2))
    over_training(axs[4], u, bimp, rate, 'Budgeted IMP')
    sculpt = np.where(u < 0.8, 0.7, 0.9)
    warm = lr_warmup(1.0, warmup=0.1, drops=(0.5, 0.75))
    over_training(axs[5], u, sculpt, [warm(o * 5 % 1) for o in u], 'SCULPT')
    handles = [plt.Line2D([], [], color=orange, lw=2), plt.Line2D([], [], color=blue, lw=1.5, ls=':')]
    fig.legend(handles, ['zeros', 'learning rate'], loc='outside lower center', ncols=2)


PICTURES = {f.__name__: f for f in (start, mask, schedule, scope, granularity, recovery, ramp, hooks, papers)}

if __name__ == '__main__':
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]()
        plt.savefig(Path(__file__).parent / 'img' / f'{name}.svg', metadata={'Date': None})
        plt.close('all')
