"""The pages in docs: their Python runs and prints what they show, figures are those of the tables, links lead somewhere

Python blocks of a page share their names. A `text` block is what the block before it prints, without the bars and the
table of a training. A comment above a block:
`<!-- not run: why -->`, `<!-- needs NAME: why -->` (runs where that module is), `<!-- roughly: why -->` (numbers of the
output differ between machines by some percent)."""

import contextlib
import importlib.util
import io
import math
import re
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from fastai.basics import noop

from fastprune import cli

root = Path(__file__).parent.parent
docs = root / 'docs'
elsewhere = {'cookbook', 'overview', 'promises', 'without_fastai'}  # these have tests of their own
pages = [p for p in sorted(docs.glob('*.md')) if p.stem not in elsewhere]
by_name = pytest.mark.parametrize('page', pages, ids=lambda p: p.stem)

Block = namedtuple('Block', 'note kind code')
block = re.compile(r'(?:^<!-- ([^\n]*) -->\n\n?)?^```(\w*)[^\n]*\n(.*?)^```$', re.DOTALL | re.MULTILINE)
number = re.compile(r'-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?')
decimal = re.compile(r'(?<![\w.])\d+\.\d+(?=x|\b)(?!\.\d)')


def text_of(page):
    return page.read_text(encoding='utf-8')


def blocks(page):
    return [Block(*b) for b in block.findall(text_of(page))]


def lines(text):
    return [line.rstrip() for line in text.strip('\n').splitlines()]


def assert_printed(shown, printed, roughly=False):
    "Is this what the block prints? Roughly: the same words, and numbers that differ by at most a fifth"
    if not roughly:
        assert lines(printed) == lines(shown)
        return
    assert number.sub('#', ' '.join(printed.split())) == number.sub('#', ' '.join(shown.split())), printed
    for a, b in zip(number.findall(printed), number.findall(shown), strict=True):
        a, b = float(a.replace(',', '')), float(b.replace(',', ''))
        assert math.isclose(a, b, rel_tol=0.2, abs_tol=0.02), f'{a} in:\n{printed}'


def needed_by(b):
    "Modules that a block needs"
    note = re.match(r'needs ([\w., ]+): .', b.note)
    return note[1].split(', ') if note else []


def is_there(module):
    return importlib.util.find_spec(module) is not None


def printed_by(code, names):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exec(compile(code, '<block of the page>', 'exec'), names)
    return out.getvalue()


@pytest.mark.cpu_only  # its outputs are those of a CPU
@by_name
def test_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for printing in ('fastprogress.fastprogress.print', 'fastprogress.fastprogress.WRITER_FN', 'fastai.learner.print'):
        monkeypatch.setattr(printing, noop, raising=False)  # no bars, no table
    names, printed = {'__name__': '__main__'}, None
    for b in blocks(page):
        if b.kind == 'python':
            compile(b.code, page.name, 'exec')
            left_out = re.match(r'not run: .', b.note) or not all(map(is_there, needed_by(b)))
            printed = None if left_out else printed_by(b.code, names)
        elif b.kind == 'text' and printed is not None:
            assert_printed(b.code, printed, b.note.startswith('roughly: '))
    plt.close('all')


@pytest.mark.parametrize('words', [[], ['report'], ['compare']], ids=lambda w: ' '.join(w) or 'train')
def test_the_commands_help_is_shown(words, monkeypatch, capsys):
    command = ['fastprune', *words, '--help']
    monkeypatch.setattr(sys.modules['__main__'], '__file__', 'fastprune', raising=False)  # which a worker has not
    monkeypatch.setattr('sys.argv', command)
    with pytest.raises(SystemExit):
        cli.main()
    shown = [b.code for b in blocks(docs / 'command.md') if b.code.startswith(f'$ {" ".join(command)}\n')]
    assert [o.partition('\n')[2].split() for o in shown] == [capsys.readouterr().out.split()]


@by_name
def test_blocks_have_a_kind_and_notes_a_reason(page):
    for b in blocks(page):
        assert b.kind in ('python', 'text', 'sh', 'html'), b
        assert not b.note or re.match(r'(not run|roughly|needs [\w., ]+): \w+', b.note), b.note


def units(page):
    "Rows of tables, and sentences, without code"
    text = re.sub(r'`[^`\n]+`', ' ', block.sub('\n\n', text_of(page)))
    for part in re.split(r'\n\s*\n|\n(?=[|#-])', text):
        yield from [part] if part.lstrip().startswith('|') else re.split(r'(?<=[.;:])\s', part)


def test_figures_are_those_of_the_tables():
    "All decimals of a row or a sentence are in one line of a table of benchmarks, or in one output of the page"
    tables = [line for p in ('README.md', 'paper/RESULTS.md') for line in lines(text_of(root / 'benchmarks' / p))]
    found = [set(decimal.findall(line)) for line in tables]
    for page in pages:
        own = [set(decimal.findall(b.code)) for b in blocks(page)]
        for unit in units(page):
            figures = set(decimal.findall(unit))
            assert any(figures <= line for line in found + own), f'{page.name}: no table has {figures}: {unit}'


def test_verdicts_are_those_of_the_results():
    "Rows of claims are lines of RESULTS.md, word for word"
    results = set(lines(text_of(root / 'benchmarks' / 'paper' / 'RESULTS.md')))
    of_claim = {line.split(' | ')[0]: line for line in results}
    rows, inside = [], False
    for line in lines(text_of(docs / 'methods.md')):
        inside = line.startswith('|') and (inside or line.startswith(('| claim |', '| paper | claims |')))
        rows += [line] * (inside and not line.startswith('|---'))
    assert len(rows) > 20
    for row in rows:
        assert row in results, f'{row}\n\nis now:\n\n{of_claim.get(row.split(" | ")[0])}'


def anchors(page):
    titles = re.findall(r'^#+ (.*)$', block.sub('', text_of(page)), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', t.lower()).strip().replace(' ', '-') for t in titles}


@by_name
def test_links_lead_to_files(page):
    links = re.findall(r'\]\(([^)\s]+)\)', block.sub('', text_of(page)))
    assert links
    for link in links:
        if link.startswith(('http:', 'https:')):
            continue
        path, _, anchor = link.partition('#')
        target = docs / path if path else page
        assert target.exists(), link
        if anchor:
            assert target.suffix == '.md' and anchor in anchors(target), link


def test_pictures_are_used_and_have_a_description():
    used = [o for page in docs.glob('*.md') for o in re.findall(r'!\[([^\]]*)\]\(img/([^)]+)\)', text_of(page))]
    assert {name for _, name in used} == {p.name for p in (docs / 'img').iterdir()}
    assert all(len(description) > 20 for description, _ in used)


def test_every_baseline_has_a_row():
    from fastprune.all import BASELINES

    rows = re.findall(r'^\| `(\w+)` \|', text_of(docs / 'methods.md'), re.MULTILINE)
    assert rows == list(BASELINES)
