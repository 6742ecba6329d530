"Pages of the cookbook are short, have one form, and are all in its table. That they run is tested in test_project.py"

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
pages = sorted((root / 'nbs' / 'cookbook').glob('*.ipynb'))
MOST = 20
each_page = pytest.mark.parametrize('page', pages, ids=lambda p: p.stem)


@cache
def cells(page):
    "(type, source) of all cells"
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(page.read_text(encoding='utf-8'))['cells']]


def prose(page):
    return '\n\n'.join(source for kind, source in cells(page) if kind == 'markdown')


def is_aside(source):
    "Is it hidden on the site, or folded?"
    return source.startswith(('#| hide', '#| code-fold: true'))


def lines(page):
    "The lines of code that a reader sees"
    shown = [source for kind, source in cells(page) if kind == 'code' and not is_aside(source)]
    return [line for source in shown for line in source.splitlines() if line.strip() and not line.startswith('#|')]


@each_page
def test_at_most_20_lines_of_code(page):
    assert 0 < len(lines(page)) <= MOST, '\n'.join(lines(page))


@each_page
def test_one_cell_aside_without_fastprune(page):
    aside = [source for kind, source in cells(page) if kind == 'code' and is_aside(source)]
    assert len(aside) <= 1
    assert 'fastprune' not in ''.join(aside)


@each_page
def test_what_is_used_is_shown(page):
    "A cell that the site hides defines nothing that a later one uses"
    code = [source for kind, source in cells(page) if kind == 'code']
    hidden = [node for source in code if source.startswith('#| hide') for node in ast.parse(source).body]
    made = {t.id for n in hidden if isinstance(n, ast.Assign) for t in n.targets}
    made |= {n.name for n in hidden if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    used = {n.id for source in code for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    assert not made & used


@each_page
def test_form(page):
    "A task as title, a line about it, and at the end what to look out for and where to read on"
    kind, first = cells(page)[0]
    assert kind == 'markdown' and re.fullmatch(r'# .+\n\n> .+', first), first
    *_, look_out, more = re.findall(r'^## (.+)$', prose(page), re.MULTILINE)
    assert (look_out, more) == ('What to look out for', 'Read on')


@each_page
def test_links_lead_to_files(page):
    links = [link for link in re.findall(r'\]\(([^)#]+)', prose(page)) if '://' not in link]
    assert len(links) >= 2
    assert not [link for link in links if not (page.parent / link).is_file()]


def test_the_table_has_every_page():
    "Title, and lines of code"
    rows = re.findall(
        r'\| \[(.+)\]\(\.\./nbs/cookbook/(\w+)\.ipynb\) \| (\d+) \|', (root / 'docs' / 'cookbook.md').read_text()
    )
    titles = {p.stem: cells(p)[0][1].splitlines()[0].removeprefix('# ') for p in pages}
    assert sorted(rows, key=lambda row: row[1]) == [(titles[p.stem], p.stem, str(len(lines(p)))) for p in pages]
