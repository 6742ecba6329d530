"The method of the tutorial `15_your_own_method`: small, of public names alone, right, and the paper's algorithm"

import ast
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune.all import Sparsifier
from fastprune.testing import CHECKS, check_method

pytestmark = pytest.mark.usefixtures('deterministic')  # results are compared to the bit

notebook = Path(__file__).parents[2] / 'nbs' / 'tutorials' / '15_your_own_method.ipynb'
cells = [
    ''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'
]
(source,) = [c for c in cells if c.startswith('class TopKAST(')]
imports = next(c for c in cells if c.startswith('from fastai'))


def made():
    "The class, from the notebook's imports and its own cell"
    names = {}
    exec(imports + '\n' + source, names)
    cls = names['TopKAST']
    cls.__module__, globals()['TopKAST'] = __name__, cls  # pickles look it up there
    return cls


TopKAST = made()


def statements(code):
    return [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.stmt)]


def test_top_kast_has_at_most_25_statements():
    assert 20 <= len(statements(source)) <= 25


def test_the_notebook_uses_public_names_alone():
    for node in ast.walk(ast.parse('\n'.join(cells))):
        names = [getattr(node, 'attr', ''), getattr(node, 'id', ''), *(getattr(node, 'module', '') or '').split('.')]
        names += [a.name for a in getattr(node, 'names', ()) if isinstance(a, ast.alias)]
        assert not [n for n in names if n.startswith('_') and n not in ('_', '__init__', '__name__')]


@pytest.mark.sample(2)
@pytest.mark.parametrize('check', CHECKS)
def test_top_kast_passes_the_shared_checks(check):
    check_method(TopKAST, checks=check)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)).double()


def largest(w, k):
    "Mask of the k largest by magnitude"
    order = sorted(range(w.numel()), key=lambda i: -abs(float(w.flatten()[i])))
    mask = torch.zeros(w.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view_as(w)


def slow_top_kast(batches, D, M, penalty, interval, lr, momentum):
    "The paper's algorithm: dense weights theta, and a network that gets those of A"
    net = network()
    names = ['0.weight', '2.weight']
    theta = {n: net.get_parameter(n).detach().clone() for n in names}
    speed = {n: torch.zeros_like(p) for n, p in net.named_parameters()}

    def sets():
        A = {n: largest(w, w.numel() - round((1 - D) * w.numel())) for n, w in theta.items()}
        B = {n: largest(w, w.numel() - round((1 - D - M) * w.numel())) for n, w in theta.items()}
        return A, B

    A, B = sets()
    for t, (x, y) in enumerate(batches):
        for n in names:
            net.get_parameter(n).data = theta[n] * A[n]
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        for n, p in net.named_parameters():
            g, w = p.grad, theta.get(n, p.data)
            if n in theta:
                g = torch.where(B[n], g + penalty * torch.where(A[n], w, w / D), 0.0)
            speed[n] = momentum * speed[n] + g
            w -= lr * speed[n] * B.get(n, True)
        if t % interval == 0:
            A, B = sets()
    return net, theta, A, B


@pytest.mark.sample(2)
@pytest.mark.parametrize('momentum, lr', ((0.0, 1.0), (0.9, 0.1)))
@pytest.mark.parametrize('interval', (1, 4))
def test_top_kast_is_the_papers_algorithm(momentum, lr, interval):
    D, M, penalty = 0.2, 0.3, 0.02
    torch.manual_seed(1)
    batches = [(torch.randn(16, 12).double(), torch.randint(5, (16,))) for _ in range(40)]
    slow, theta, A, B = slow_top_kast(batches, D, M, penalty, interval, lr, momentum)
    first = network()
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=0.0)
    method = TopKAST(1 - D, exploration=M, penalty=penalty, interval=interval)
    sparsifier = Sparsifier(net, method, total_steps=len(batches) + 1, optimizer=opt)
    for x, y in batches:
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        sparsifier.step()
    moved = 0
    for n, w in theta.items():
        assert torch.equal(sparsifier.masks[n], A[n]) and torch.equal(method.updated[n], B[n])
        assert torch.allclose(method.dense[n], w, atol=1e-12)
        assert torch.allclose(net.get_parameter(n), w * A[n], atol=1e-12)
        moved += int((A[n] & ~largest(first.get_parameter(n), int(A[n].sum()))).sum())
    assert moved > 5  # or this would compare nothing
    assert torch.allclose(net.get_parameter('2.bias'), slow.get_parameter('2.bias'), atol=1e-12)
    sparsifier.close()
