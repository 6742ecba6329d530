"The house rules of DESIGN and STYLE, read off the source: every message lists all that breaks a rule"

import ast
import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import fastai.callback.schedule
import fastai.learner
import pytest

root = Path(__file__).resolve().parent.parent
package = root / 'fastprune'
LAYERS = (
    *('core', 'schedules', 'criteria', 'engine', 'zoo', 'learner', 'training', 'methods', 'recipes', 'analysis'),
    *('deploy', 'files', 'testing', 'cli_flags', 'cli_train', 'cli_save', 'cli', 'doc_index', 'moved', 'all'),
)
WITHOUT_FASTAI = ('core', 'schedules', 'criteria', 'engine')
GENERATED = {'_modidx.py'}
LONG = {'deploy/kernel.py'}  # a kernel in one place


@cache
def modules():
    "Name inside of the package, as `core.masks` -> syntax tree"
    paths = sorted(p for p in package.rglob('*.py') if p.name not in {*GENERATED, '__init__.py'})
    names = {'.'.join(p.relative_to(package).with_suffix('').parts): p for p in paths}
    return {name: ast.parse(p.read_text(encoding='utf-8')) for name, p in names.items()}


def layer(name):
    return LAYERS.index(name.split('.')[0])


def once(items):
    "A function of a module's name that finds its items once"
    return cache(lambda name: list(items(name)))


@once
def imports(name):
    "As `imports_of` a module"
    return imports_of(modules()[name], name.split('.')[:-1])


def imports_of(tree, folder=()):
    "(line, module of the package, name taken from it or None) of all imports, those inside of functions too"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith('fastprune.'):
                    yield node.lineno, alias.name.removeprefix('fastprune.'), None
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = [*folder][: len(folder) - node.level + 1]
            elif (node.module or '').split('.')[0] == 'fastprune':
                start = []
            else:
                continue
            path = [*start, *(node.module or '').removeprefix('fastprune').strip('.').split('.')]
            source = '.'.join(filter(None, path))
            for alias in node.names:
                inner = f'{source}.{alias.name}' if source else alias.name
                yield (node.lineno, inner, None) if inner in modules() else (node.lineno, source, alias.name)


def decorator_names(node):
    called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {getattr(d, 'id', '') for d in called}


def patched_class(node):
    "The class that a function is patched into, or None"
    if not isinstance(node, ast.FunctionDef) or not {'patch', 'patch_to'} & decorator_names(node):
        return None
    return ast.unparse(node.args.args[0].annotation) if node.args.args and node.args.args[0].annotation else None


@cache
def fastai_names():
    "What a Learner has by fastai alone"
    names = set()
    for module in (fastai.learner, fastai.callback.schedule):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
    return names


@cache
def learner_methods():
    "Name of a method or property that the package adds to Learner -> modules that add it"
    added = {}
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if patched_class(node) == 'Learner' and node.name not in fastai_names():
                added.setdefault(node.name, set()).add(name)
    return added


@once
def learner_calls(name):
    "As `learner_calls_of` a module"
    return learner_calls_of(modules()[name])


def learner_calls_of(tree):
    "(line, name) of attributes of Learners that are read or called"
    patched = {id(n) for f in ast.walk(tree) if patched_class(f) == 'Learner' for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in learner_methods():
            of = ast.unparse(node.value)
            if of.split('.')[-1] in ('learn', 'learner') or of == 'self' and id(node) in patched:
                yield node.lineno, node.attr


def reached(names):
    "All modules that are imported with these"
    seen, todo = set(), [n for n in names if n in modules()]
    while todo:
        seen.add(at := todo.pop())
        todo += [s for _, s, _ in imports(at) if s in modules() and s not in seen]
    return seen


def listing(problems, rule):
    assert not problems, f'{rule}: {len(problems)}\n' + '\n'.join(problems)


def test_imports_go_down():
    problems = []
    for name in modules():
        for line, source in sorted({(line, source) for line, source, _ in imports(name)}):
            if source and layer(source) > layer(name):
                problems.append(f'{name}:{line} imports {source}')
        for line, method in learner_calls(name):
            if all(layer(source) > layer(name) for source in learner_methods()[method]):
                problems.append(f'{name}:{line} uses learn.{method} of {", ".join(learner_methods()[method])}')
    listing(problems, f'imports go down only, in the order {", ".join(LAYERS)}')


def test_methods_of_a_learner_are_imported_where_they_are_used():
    "So that a module does what it says wherever it is imported alone, as in a worker of a sweep"
    problems = []
    for name in modules():
        known = reached([name])
        for line, method in learner_calls(name):
            if not learner_methods()[method] & known:
                problems.append(
                    f'{name}:{line} uses learn.{method}, and does not import any of {learner_methods()[method]}'
                )
    listing(problems, 'a module imports what patches the methods that it uses')


def test_methods_of_a_learner_are_imported_in_each_notebook():
    "So that `nbdev-test` runs it in a process of its own"
    problems = []
    for path, cells in notebooks().items():
        code = '\n'.join(source for _, source, _ in code_cells(cells))
        tree = ast.parse('\n'.join('pass' if o.lstrip().startswith(('%', '!')) else o for o in code.split('\n')))
        own = '.'.join(path.with_suffix('').parts)
        known = reached([s for _, s, _ in imports_of(tree)] + [own] * (own in modules()))
        missing = {m for _, m in learner_calls_of(tree) if not learner_methods()[m] & known}
        problems += [f'nbs/{path}: learn.{m} of {", ".join(learner_methods()[m])}' for m in sorted(missing)]
    listing(problems, 'a notebook imports what patches the methods that it uses')


def test_no_module_takes_a_private_name():
    problems = []
    for name, tree in modules().items():
        for line, source, taken in imports(name):
            if taken and taken.startswith('_') and taken != '_' and source != name:
                problems.append(f'{name}:{line} takes {taken} from {source}')
        bound = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                for alias in node.names:
                    bound[alias.asname or alias.name.split('.')[0]] = alias.name
        inner = {m.split('.')[-1] for m in modules()}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith('_')
                and not node.attr.startswith('__')
                and isinstance(node.value, ast.Name)
                and bound.get(node.value.id) in inner
            ):
                problems.append(f'{name}:{node.lineno} takes {ast.unparse(node)}')
    listing(problems, 'a name that begins with _ stays in its module')


def test_no_cycles():
    sources = {name: {s for _, s, _ in imports(name) if s in modules()} for name in modules()}
    problems, done = [], set()

    def visit(name, path):
        if name in path:
            problems.append(' -> '.join([*path[path.index(name) :], name]))
        elif name not in done:
            for source in sorted(sources[name]):
                visit(source, [*path, name])
            done.add(name)

    for name in sorted(sources):
        visit(name, [])
    listing(problems, 'modules do not import each other in a circle')


@cache
def classes():
    "(module, name of a class) -> its node"
    return {
        (name, node.name): node
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def ancestors(module, node):
    "(module, node) of the classes of the package that a class inherits from"
    taken = {as_name: source for _, source, as_name in imports(module) if as_name}
    for base in node.bases:
        name = base.id if isinstance(base, ast.Name) else getattr(base, 'attr', '')
        for source in (module, taken.get(name)):
            if (source, name) in classes():
                found = classes()[source, name]
                yield source, found
                yield from ancestors(source, found)
                break


def own_attributes(node):
    "Names that a class defines: in its body, and on `self`"
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id
        elif (
            isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == 'self'
        ):
            yield inner.attr


def test_methods_touch_no_private_attribute_of_their_bases():
    problems = []
    for (module, name), node in classes().items():
        if not module.startswith('methods.'):
            continue
        foreign = {
            attribute: f'{source}.{base.name}'
            for source, base in ancestors(module, node)
            if source != module
            for attribute in own_attributes(base)
            if attribute.startswith('_') and not attribute.startswith('__')
        }
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) in ('self', 'super()', 'cls'):
                used = inner.attr
            else:
                used = inner.name if isinstance(inner, ast.FunctionDef) else None
            if used in foreign:
                problems.append(f'{module}:{inner.lineno} {name} touches {used} of {foreign[used]}')
    listing(problems, 'a method uses public attributes and hooks alone')


def test_what_knows_no_learner_imports_without_fastai():
    names = [name for name in modules() if name.split('.')[0] in WITHOUT_FASTAI]
    problems = []
    for name in names:
        for node in ast.walk(modules()[name]):
            taken = [node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else []
            taken = [a.name for a in node.names] if isinstance(node, ast.Import) else taken
            problems += [f'{name}:{node.lineno} imports {n}' for n in taken if n.split('.')[0] == 'fastai']
    listing(problems, f'{", ".join(WITHOUT_FASTAI)} do without fastai')
    code = (
        'import importlib, sys\n'
        f'for name in {names}:\n'
        '    importlib.import_module("fastprune." + name)\n'
        '    if "fastai" in sys.modules: sys.exit(f"fastprune.{name} imports fastai")\n'
    )
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr


def public_functions(tree):
    "(qualified name, function) of public functions, and of public methods and constructors of public classes"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for inner in node.body:
                public = isinstance(inner, ast.FunctionDef) and not inner.name.startswith('_')
                if public or getattr(inner, 'name', '') == '__init__':
                    yield f'{node.name}.{inner.name}', inner


def test_public_parameters_are_annotated():
    "But for `self`, `cls`, `*args` and `**kwargs`; ruff looks at what functions return"
    problems = []
    for name, tree in modules().items():
        for where, node in public_functions(tree):
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if '.' in where and 'staticmethod' not in decorator_names(node):
                args = args[1:]
            bare = [a.arg for a in args if a.annotation is None]
            if bare:
                problems.append(f'{name}:{node.lineno} {where}: {", ".join(bare)}')
    listing(problems, 'public parameters have a type')


def test_modules_have_at_most_300_lines():
    problems = []
    for path in sorted(package.rglob('*.py')):
        n = len(path.read_text(encoding='utf-8').splitlines())
        where = path.relative_to(package).as_posix()
        if n > 300 and path.name not in GENERATED and where not in LONG:
            problems.append(f'{where}: {n} lines')
    listing(problems, 'a module has at most 300 lines')


def test_classes_have_at_most_15_methods():
    patched = {}
    for tree in modules().values():
        for node in ast.walk(tree):
            patched.setdefault(patched_class(node), []).append(node)
    problems = []
    for (module, name), node in classes().items():
        own = {n.name for n in [*node.body, *patched.get(name, [])] if isinstance(n, ast.FunctionDef)}
        if len(own) > 15:
            problems.append(f'{module}:{node.lineno} {name}: {len(own)} methods')
    listing(problems, 'a class has at most 15 methods')


@cache
def notebooks():
    "Path inside of nbs -> cells"
    paths = sorted(p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    return {p.relative_to(root / 'nbs'): json.loads(p.read_text(encoding='utf-8'))['cells'] for p in paths}


def directives(source):
    return {w for line in source.splitlines() if line.startswith('#|') for w in line[2:].split()[:1]}


def code_cells(cells):
    "(id, source, directives) of cells of code"
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            yield cell.get('id', ''), source, directives(source)


def test_exported_cells_have_at_most_60_lines():
    problems = []
    for path, cells in notebooks().items():
        for cell, source, kinds in code_cells(cells):
            lines = [line for line in source.strip().splitlines() if not line.startswith('#|')]
            if kinds & {'export', 'exporti'} and len(lines) > 60:
                problems.append(f'{path.as_posix()} cell {cell}: {len(lines)} lines: {lines[0][:60]}')
    listing(problems, 'an exported cell has at most 60 lines')


def test_lines_have_at_most_120_columns():
    problems = []
    for folder in ('fastprune', 'tests', 'benchmarks', 'examples'):
        for path in sorted((root / folder).rglob('*.py')):
            made = path.relative_to(package).with_suffix('.ipynb') in notebooks() if folder == 'fastprune' else False
            if path.name not in GENERATED and not made:  # the lines of a notebook are looked at there
                for i, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
                    if len(line) > 120:
                        problems.append(f'{path.relative_to(root)}:{i}: {len(line)} columns')
    for path, cells in notebooks().items():
        for cell, source, _ in code_cells(cells):
            for i, line in enumerate(source.splitlines(), 1):
                if len(line) > 120:
                    problems.append(f'nbs/{path.as_posix()} cell {cell} line {i}: {len(line)} columns')
    listing(problems, 'a line has at most 120 columns')


def public_names(tree):
    "The names of `__all__`, and of the methods that a module adds to Learner"
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            yield from ast.literal_eval(node.value)
    for node in ast.walk(tree):
        if patched_class(node) == 'Learner' and not node.name.startswith('_') and node.name not in fastai_names():
            yield node.name


def names_used(source):
    "Names and attributes in a cell; `show_doc(name)` alone is no example"
    try:
        tree = ast.parse('\n'.join('pass' if line.lstrip()[:1] in ('%', '!') else line for line in source.splitlines()))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'show_doc':
            node.args.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_public_names_have_an_example():
    "But for constants that users are not offered: sizes of buffers, thresholds of algorithms"
    offered = ast.literal_eval(modules()['all'].body[-1].value)
    problems = []
    for name, tree in modules().items():
        path = Path(*name.split('.')).with_suffix('.ipynb')
        if path not in notebooks():
            continue
        shown = set()
        for _, source, kinds in code_cells(notebooks()[path]):
            if not kinds & {'export', 'exporti', 'exports', 'hide'}:
                shown |= set(names_used(source))
        names = [n for n in dict.fromkeys(public_names(tree)) if not n.isupper() or n in offered]
        missing = [n for n in names if n not in shown]
        if missing:
            problems.append(f'nbs/{path.as_posix()}: {", ".join(missing)}')
    listing(problems, 'a public name has an example in its notebook')


def test_every_module_has_its_notebook():
    by_hand = {'all', 'files', 'moved', 'testing'}
    problems = [
        f'{name} has no notebook at nbs/{"/".join(name.split("."))}.ipynb'
        for name in modules()
        if name not in by_hand and Path(*name.split('.')).with_suffix('.ipynb') not in notebooks()
    ]
    listing(problems, 'notebooks are named after their modules')


def test_tests_import_no_test_module():
    names = {p.stem for p in (root / 'tests').rglob('test_*.py')}
    problems = []
    for path in sorted((root / 'tests').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            taken = [node.module] if isinstance(node, ast.ImportFrom) else []
            taken = [a.name for a in node.names] if isinstance(node, ast.Import) else taken
            problems += [f'{path.relative_to(root)}:{node.lineno} imports {n}' for n in taken if n in names]
    listing(problems, 'what test files share is in tests/helpers.py')


@pytest.mark.parametrize('folder', ['tests'])
def test_the_same_tree(folder):
    "Folders of tests are layers"
    found = {p.parent.relative_to(root / folder).parts for p in (root / folder).rglob('test_*.py')}
    assert {parts[0] for parts in found if parts} <= set(LAYERS)
