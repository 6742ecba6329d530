"""Old module paths, for one release: they warn, and lead to where the code is now.

Each old module is a list of the modules that its names have gone to. The table serves imports, and the pickles in
files such as `export.pkl`, which name modules, too."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

MOVED = {
    'analysis': ('analysis.weights', 'analysis.overlap', 'analysis.sensitivity', 'learner.flops'),
    'baselines': (
        'methods.dense_until_end',
        'methods.always_sparse',
        'methods.thresholds',
        'methods.dense_behind',
        'methods.gradual',
        'methods.moves',
        'methods.registry',
        'training.adapters',
    ),
    'callback': ('criteria.ranking', 'learner.keep', 'learner.fit', 'training.callback'),
    'connectivity': ('analysis.instability', 'analysis.paths', 'analysis.plane'),
    'criteria': (
        'criteria.weights',
        'criteria.gradients',
        'criteria.flows',
        'core.protocol',
        'criteria.registry',
        'learner.criteria',
    ),
    'data': ('zoo.images', 'zoo.data', 'zoo.folders'),
    'export': ('deploy.semi_structured', 'deploy.stand_ins', 'deploy.torch_prune', 'deploy.export'),
    'folders': ('core.folders',),
    'identity': ('training.identity', 'core.describe', 'core.differences'),
    'inference': (
        'core.usage',
        'deploy.attention',
        'deploy.forms',
        'deploy.inference',
        'deploy.modules',
        'core.copies',
        'deploy.timing',
    ),
    'inputs': ('learner.inputs', 'core.json_files', 'core.nested'),
    'kernel': ('deploy.kernel', 'deploy.tiles', 'deploy.threads'),
    'learner': ('learner.histogram', 'learner.report'),
    'lottery': (
        'recipes.planning',
        'recipes.compare',
        'recipes.round_training',
        'core.selection_sharded',
        'engine.plan',
        'recipes.ticket',
        'recipes.tickets',
    ),
    'lr': ('schedules.rates', 'schedules.retraining'),
    'masks': ('core.granularity', 'core.masks', 'core.scopes', 'core.compute', 'core.units'),
    'models': ('zoo.models',),
    'passes': ('learner.batches', 'learner.gradients', 'core.checks', 'core.dense', 'criteria.gradients'),
    'radix': ('core.selection_sharded',),
    'recipes': ('methods.budgeted', 'recipes.cyclical', 'recipes.fitting', 'recipes.round_training'),
    'report': ('deploy.report_file',),
    'resume': ('training.state', 'training.optimizer_state', 'training.fit_state', 'training.checkpoint'),
    'rounds': ('learner.states', 'learner.progress', 'recipes.planning', 'recipes.store', 'recipes.table'),
    'schedules': ('schedules.sparsity', 'schedules.plot'),
    'selection': ('core.selection',),
    'shards': ('core.shards',),
    'shrink': ('deploy.shrink',),
    'sweep': ('analysis.paper_methods', 'analysis.sweep'),
    'torchfile': ('deploy.torchfile', 'deploy.torch_pickle'),
    'usage': ('core.usage',),
    'weights': ('core.names', 'core.computed', 'core.targets', 'core.layouts', 'core.weights'),
}

RENAMED = {  # names that have changed, too
    'REWIND': 'REWINDS',
    'borrowed': 'restoring',
    'check_zeros_stay': 'check_preserves_zeros',
    'everyones': 'gathered',
    'mean_everywhere': 'mean_over_processes',
    'random_kept': 'preserved_rng',
    'together': 'is_distributed',
}


def find(old: str, name: str) -> object:
    "What was called `name` in the module `fastprune.<old>`. Raises `AttributeError` if nothing was"
    for new in MOVED[old]:
        module = importlib.import_module(f'fastprune.{new}')
        for same in (name, name.lstrip('_'), RENAMED.get(name, name)):
            if getattr(module, same, None) is not None:
                public = f"fastprune.{new} has it now; `from fastprune.all import *` has what users need"
                warnings.warn(f"fastprune.{old} has moved: {public}", FutureWarning, stacklevel=3)
                return getattr(module, same)
    raise AttributeError(f"module 'fastprune.{old}' has no attribute {name!r}")


def find_of_all(name: str) -> object:
    "What `fastprune.all` had by this name. Raises `AttributeError` if it had nothing"
    present = RENAMED.get(name, name)
    for new in () if name.startswith('__') else dict.fromkeys(new for modules in MOVED.values() for new in modules):
        module = importlib.import_module(f'fastprune.{new}')
        defined = getattr(getattr(module, present, None), '__module__', '') == module.__name__
        if defined or present in module.__all__:
            left = f"fastprune.all has no {name!r} any more: import {present!r} from fastprune.{new}"
            warnings.warn(left, FutureWarning, stacklevel=2)
            return getattr(module, present)
    raise AttributeError(f"module 'fastprune.all' has no attribute {name!r}")


def attribute_of(old: str) -> Callable:
    "A module's `__getattr__`, for names that the old module had"

    def __getattr__(name):
        present = Path(__file__).parent / old / f'{name}.py'  # that `from package import module` is about to import
        if name.startswith('__') or present.exists():
            raise AttributeError(f"module 'fastprune.{old}' has no attribute {name!r}")
        return find(old, name)

    return __getattr__


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Imports of old module paths"

    def find_spec(
        self, fullname: str, path: list | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition('.')
        if package == 'fastprune' and old in MOVED:
            return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = attribute_of(spec.name.partition('.')[2])
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        "There is nothing to run: names are looked up when they are asked for"


def install() -> None:
    "Serve old paths, where no present module has the name"
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
