"""An example of a public name, from the notebooks"""

import ast
import builtins
import re
import symtable
from dataclasses import dataclass
from functools import cache

from notebooks import Cell, read_cells

MOST = 15  # lines that are put before an example, so that its names are defined
LONG = 40  # lines of an example, where there is a shorter one


@dataclass
class Example:
    "An example: cell `index` of a notebook, with what stands before it"

    path: object
    index: int
    code: str
    before: str  # Earlier lines of the notebook, which define names of `code`
    intro: str  # The text above it
    cell: object


cells_of = cache(read_cells)


def _is_shown(cell):
    return cell.kind == 'code' and cell.source and not cell.exported and not cell.hidden


def _uses(cell, pattern):
    "Is the name used, outside of imports?"
    if not _is_shown(cell):
        return False
    lines = [line for line in cell.source.splitlines() if not re.match(r'\s*(from|import) |\s*#', line)]
    return bool(re.search(pattern, '\n'.join(lines)))


BLOCK = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)
FAILS = re.compile(r'\b(test_fail|fails|raises|ExceptionExpected)\b')


def _only_fails(cell, pattern):
    "Is the name used in nothing but errors?"
    return not any(re.search(pattern, text) for text in _statements(ast.parse(cell.source)))


def _statements(node):
    "The text of each simple statement and each head of a block, without what tests errors"
    head = ast.unparse(node).split(':\n')[0] if not isinstance(node, ast.Module) else ''
    if FAILS.search(head):
        return
    yield head
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, (ast.stmt, ast.ExceptHandler)):
            yield from _statements(inner)


def pattern_of(name):
    "A regular expression of uses of `name`, a function, or a method as `learn.prune`"
    return rf'\.{name.partition(".")[2]}\b' if '.' in name else rf'(?<![\w.]){name}\b'


def find_example(name, definition, path, others=()):
    "The example after the cell of `path` that defines `definition`; or one of the `others`"
    pattern = pattern_of(name)
    for nb in (path, *others):
        cells = cells_of(nb)
        places = [i for i, c in enumerate(cells) if c.exported and definition in c.names]
        start = places[0] if places and nb == path else 0
        found = [i for i, c in enumerate(cells) if _uses(c, pattern) and not _only_fails(c, pattern)]
        if found:
            long = {i for i in found if len(cells[i].source.splitlines()) > LONG}
            return _example(nb, min(found, key=lambda i, start=start, long=long: (i in long, i < start, i)))
        for i, cell in enumerate(cells if nb == path else ()):
            for code in BLOCK.findall(cell.source if cell.kind == 'markdown' else ''):
                if re.search(pattern, code):  # code that no test can run, as on a GPU
                    return Example(nb, i, code.strip('\n'), '', '', Cell('code', code, {}, []))
    return None


def without_failures(source):
    "A cell without the statements that test errors; as it is if nothing else is left"
    nodes, lines = ast.parse(source).body, source.splitlines()
    failing = [n for n in nodes if FAILS.search(ast.unparse(n).split('\n')[0])]
    if len(failing) == len(nodes):
        return source
    for n in reversed(failing):
        del lines[n.lineno - 1 : n.end_lineno]
    return '\n'.join(lines).strip('\n')


def _example(path, index):
    cells = cells_of(path)
    above = cells[index - 1]
    intro = above.source if above.kind == 'markdown' and index > 1 else ''
    intro = re.sub(r'^#+ .*\n?', '', intro, flags=re.MULTILINE).strip()
    code = without_failures(cells[index].source)
    return Example(path, index, code, definitions(cells, index), intro, cells[index])


def definitions(cells, index):
    "Earlier statements that define the names of a cell; empty if they are long"
    missing, lines = free_names(without_failures(cells[index].source)), []
    for cell in reversed(cells[:index]):
        if cell.kind != 'code' or cell.exported or not cell.source:
            continue
        for node in reversed(ast.parse(cell.source).body):
            text = _text(node, cell.source)
            if not isinstance(node, (ast.Import, ast.ImportFrom)) and missing & bound_names(text):
                missing = missing - bound_names(text) | free_names(text)
                lines = [*text.splitlines(), *lines]
    return '\n'.join(lines) if len(lines) <= MOST else ''


def _text(node, source):
    first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))])
    return '\n'.join(source.splitlines()[first - 1 : node.end_lineno])


def _tables(table):
    yield table
    for inner in table.get_children():
        yield from _tables(inner)


def bound_names(source):
    "Names that statements define for those after them"
    return {s.get_name() for s in symtable.symtable(source, '', 'exec').get_symbols() if s.is_assigned()}


def free_names(source):
    "Names that statements need and do not define"
    tables = list(_tables(symtable.symtable(source, '', 'exec')))
    top = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in tables[0].get_symbols() if s.is_referenced()}
    used |= {s.get_name() for t in tables[1:] for s in t.get_symbols() if s.is_global()}
    return used - top - set(dir(builtins))
