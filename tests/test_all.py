"What `from fastprune.all import *` gives: about 100 names, none of which is a name of Python, torch or fastai"

import builtins
import importlib

import pytest
import torch
from processes import python
from torch import nn

import fastprune.all as everything

PEERS = ('fastai.basics', 'fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'fastai.callback.all')


def names_of(module):
    "What a star import takes from a module"
    module = importlib.import_module(module)
    return set(getattr(module, '__all__', [n for n in vars(module) if not n.startswith('_')]))


def test_about_100_names_each_from_one_place():
    names = everything.__all__
    assert 80 <= len(names) <= 110 and len(set(names)) == len(names)
    scope = {}
    exec('from fastprune.all import *', scope)
    assert set(scope) - {'__builtins__'} == set(names)
    for name in names:
        assert getattr(everything, name) is not None
        module = getattr(getattr(everything, name), '__module__', 'fastprune')
        assert module.startswith('fastprune'), f'{name} is of {module}'


@pytest.mark.parametrize('module', PEERS)
def test_no_name_is_fastais(module):
    if module == 'fastai.text.all':
        pytest.importorskip('spacy')
    theirs = importlib.import_module(module)
    clash = [n for n in everything.__all__ if n in names_of(module)]
    assert not [n for n in clash if getattr(theirs, n) is not getattr(everything, n)]


@pytest.mark.parametrize('module', [builtins, torch, nn], ids=lambda m: m.__name__)
def test_no_name_is_of_python_or_torch(module):
    assert not [n for n in everything.__all__ if hasattr(module, n)]


def test_after_fastais_own_star_imports():
    "In either order users get the same"
    stars = [f'from {m} import *' for m in (*PEERS[1:2], 'fastprune.all')]
    for lines in (stars, stars[::-1]):
        scope = {}
        exec('\n'.join(lines), scope)
        assert all(scope[n] is getattr(everything, n) for n in everything.__all__)


def test_all_methods_of_a_learner_come_with_it():
    "Each module of the package that adds one is imported"
    code = """
import ast, pathlib, sys
import fastprune.all
from fastai.basics import Learner
for path in pathlib.Path(fastprune.all.__file__).parent.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.FunctionDef) and 'patch' in map(ast.unparse, node.decorator_list):
            first = node.args.args[0].annotation
            if first is not None and ast.unparse(first) == 'Learner' and not hasattr(Learner, node.name):
                sys.exit(f'{node.name} of {path}')
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_names_that_have_left_lead_to_their_modules():
    from fastprune.learner.states import load_into

    with pytest.warns(FutureWarning, match="no 'load_into' any more: import 'load_into' from fastprune.learner.states"):
        assert everything.load_into is load_into
    with pytest.raises(AttributeError, match="'fastprune.all' has no attribute 'nothing'"):
        everything.__getattr__('nothing')
