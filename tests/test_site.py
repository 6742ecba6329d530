"What makes the documentation site, without MkDocs: notebooks, links, examples, and the list of names"

import base64
import json
import sys
from functools import partial
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root / 'docs'))

import check
import notebooks
import pages
import table_rows
import usages
from api import Api, first_sentence, module_index, signature_text, type_text
from links import Links

import fastprune.all as every

picture = base64.b64encode(b'picture').decode()


def cell(source, kind='code', outputs=()):
    return {'cell_type': kind, 'source': source, 'outputs': list(outputs), 'id': 'abc'}


def stream(text):
    return {'output_type': 'stream', 'name': 'stdout', 'text': [text]}


def shown(**data):
    return {'output_type': 'display_data', 'data': {k.replace('_', '/'): v for k, v in data.items()}}


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'cells': list(cells)}))
    return path


title = cell('# A title\n\n> What `it` is for', 'markdown')


def page_of(tmp_path, *cells):
    return notebooks.notebook_page(write(tmp_path / 'n.ipynb', title, *cells), lambda target: f'to/{target}')


def test_directives_are_taken_off():
    found, source = notebooks.split_directives('#| export\n#| echo: false\n#|default_exp core.x\nx = 1  # #| here')
    assert found == {'export': '', 'echo': 'false', 'default_exp': 'core.x'}
    assert source == 'x = 1  # #| here'


def test_a_page_has_what_the_notebook_shows(tmp_path):
    page = page_of(
        tmp_path,
        cell('#| hide\nsecret = 1'),
        cell('#| export\nx = 1'),
        cell('#| code-fold: true\n#| code-summary: The data\nif True:\n\n    y = 2'),
        cell('#| echo: false\nquiet()', outputs=[stream('one\n'), stream('two\n')]),
        cell('plot()', outputs=[shown(image_png=picture, text_plain='<Figure>')]),
        cell('table', outputs=[shown(text_html='<style>a</style><table border="1"></table>', text_plain='t')]),
        cell('fit()', outputs=[shown(text_html='<style>a</style><progress></progress>')]),
        cell('See [b](b.ipynb) and `[c](c)`.', 'markdown'),
    )
    assert (page.title, page.description) == ('A title', 'What it is for')
    assert 'secret' not in page.text and '#|' not in page.text and 'quiet()' not in page.text
    assert '``` { .python }\nx = 1\n```' in page.text
    opened = '??? example "The data"\n\n    ``` { .python }\n    if True:\n\n        y = 2\n    ```'
    assert opened in page.text and '\ny = 2' not in page.text
    assert '``` { .text .output }\none\ntwo\n```' in page.text
    assert page.files == {'n_files/5-0.png': b'picture'} and '](n_files/5-0.png)' in page.text
    assert '>\n<table></table>\n</div>' in page.text and 'progress' not in page.text
    assert '[b](to/b.ipynb) and `[c](c)`' in page.text


def test_an_error_in_a_notebook_stops_the_build(tmp_path):
    error = {'output_type': 'error', 'ename': 'NameError', 'evalue': "name 'x' is not defined"}
    with pytest.raises(notebooks.PageError, match="n.ipynb: cell abc ends with NameError: name 'x' is not defined"):
        page_of(tmp_path, cell('x', outputs=[error]))


def test_a_directive_that_shows_stops_the_build(tmp_path):
    page = page_of(tmp_path, cell('x = 1\n#| export'))
    with pytest.raises(notebooks.PageError, match='not at the head of its cell'):
        notebooks.check_directives(page.text, 'n.ipynb')
    notebooks.check_directives('a `#| export` in a text', 'n.ipynb')


def test_a_notebook_needs_a_title(tmp_path):
    with pytest.raises(notebooks.PageError, match="the first cell needs '# title'"):
        notebooks.notebook_page(write(tmp_path / 'n.ipynb', cell('x = 1')), str)


def test_lists_are_those_of_jupyter():
    text = 'Some:\n- a\n  - b\n- c\n\nText\n- in\n  two lines\n\n```\nx\n- y\n```\n12. no list'
    assert notebooks.with_lists(text) == text.replace('Some:\n', 'Some:\n\n').replace('  - b', '    - b').replace(
        'Text\n', 'Text\n\n'
    )


def test_code_keeps_its_links():
    text = '[a](b)\n\n```\n[a](b)\n```\n\n`[a](b)` and [`x`](y "z")'
    changed = notebooks.with_links(text, str.upper)
    assert changed == '[a](B)\n\n```\n[a](b)\n```\n\n`[a](b)` and [`x`](Y "z")'


def test_links_lead_to_pages_or_to_the_host(tmp_path):
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'LICENSE').write_text('')
    uris = {'nbs/core/masks.ipynb': 'core/masks.md', 'nbs/tutorials/01.ipynb': 'tutorials/01.md', 'docs/a.md': 'a.md'}
    links = Links(tmp_path, uris, 'https://host')
    lead = links.at('nbs/tutorials/01.ipynb')
    assert lead('../core/masks.ipynb#x') == lead('../core/masks.html#x') == '../core/masks.md#x'
    assert lead('../../LICENSE') == 'https://host/blob/main/LICENSE'
    assert lead('../../tests') == 'https://host/tree/main/tests'
    assert lead('https://a.org/b') == 'https://a.org/b' and lead('#x') == '#x'
    assert links.at('docs/a.md')('tutorials/01.md') == links.at('docs/a.md')('../nbs/tutorials/01.ipynb')
    with pytest.raises(notebooks.PageError, match="01.ipynb: the link 'gone.ipynb' leads nowhere"):
        lead('gone.ipynb')


def test_an_example_comes_with_what_it_needs(tmp_path):
    path = write(
        tmp_path / 'm.ipynb',
        title,
        cell('#| hide\nimport torch\nw = torch.ones(3)'),
        cell('#| export\ndef f(x): return x'),
        cell("test_fail(lambda: f('a'), contains='a number')"),
        cell('Of ones:', 'markdown'),
        cell('y = f(w)\ny'),
    )
    found = usages.find_example('f', 'f', path)
    assert (found.index, found.before, found.intro) == (5, 'w = torch.ones(3)', 'Of ones:')
    assert usages.find_example('g', 'g', path) is None


def test_free_names():
    assert usages.free_names('y = f(x)\nfor i in range(y): g = lambda a: a + b') == {'f', 'x', 'b'}


def test_every_public_name_has_its_place_and_its_example():
    uris = pages.repository_uris(root)
    api = Api(root, Links(root, uris, 'https://host'))
    assert {*every.__all__} <= api.by_name.keys()
    assert {'learn.prune', 'learn.masks', 'learn.sparsity_report'} <= api.by_name.keys()
    own = [api.notebook(e.module) for e in api.entries]
    find = lambda e, path: usages.find_example(e.name, e.definition, path, api.links.notebooks)
    assert not [e.name for e, path in zip(api.entries, own, strict=True) if not find(e, path)]
    assert all(path.exists() for path in own)
    page = api.described('compute_masks', every.compute_masks, 'api/core.md')
    assert 'sparsity,' in page[1] and '| `keep` | <code>dict &#124; None</code> | <code>None</code> |' in page[2]


def test_addresses_of_the_index_are_anchors():
    "`doc` and nbdev's index lead to places that the pages of modules have"
    index = module_index(root)
    places = {}
    exec((root / 'fastprune' / '_modidx.py').read_text(), places)
    for module, names in places['d']['syms'].items():
        inner = module.removeprefix('fastprune.')
        assert {n.removeprefix(f'{module}.') for n in names} <= {*index[inner]}
        assert all(place.startswith(f'{inner.replace(".", "/")}.html#') for place, _ in names.values())


def test_signatures_and_types():
    def f(self, a, *, b: int | None = None, c=print, **kwargs): ...

    assert signature_text('C.f', f) == 'C.f(a, *, b=None, c=print, **kwargs)'
    assert signature_text('g', lambda a=partial(f, 1, b=(2,)): a) == 'g(a=partial(f, 1, b=(2,)))'
    assert type_text(int | None) == 'int | None'
    assert type_text('fastprune.core.masks.Masks | torch.Tensor') == 'Masks | Tensor'


def test_a_summary_is_a_whole_sentence():
    assert (
        first_sentence('Keeps the largest (Han et al. 2015).\nMore of it.\n\nAnd more')
        == 'Keeps the largest (Han et al. 2015)'
    )


def test_a_tuple_shows_its_names_and_a_table_no_empty_column():
    api = Api(root, Links(root, pages.repository_uris(root), 'https://host'))
    assert api.by_name['RETRAINING'].summary.startswith('Names: `ft`')
    assert "RETRAINING = ('ft'" in api.described('RETRAINING', every.RETRAINING, 'api/schedules.md')[1]
    assert 'Meaning |' not in api.table(lambda a: a, 'api/core.md', 'f')
    assert 'Meaning |' in api.table(every.lamp, 'api/core.md', 'lamp')


def test_examples_do_more_than_fail(tmp_path):
    only = cell("fails('no', lambda: f(0))\nfails('no', lambda: f(1))")
    path = write(tmp_path / 'f.ipynb', title, cell('#| export\ndef f(x): ...'), only)
    later = write(tmp_path / 'g.ipynb', title, cell('f(2)'))
    assert usages.find_example('f', 'f', path, [later]).code == 'f(2)'


def test_tables_of_words_name_their_columns():
    def table(*row):
        head = ''.join(f'<th>{name}</th>' for name in 'abc')
        return (
            f'<table>\n<thead>\n{head}\n</thead>\n<tbody>\n{"".join(f"<td>{x}</td>" for x in row)}\n</tbody>\n</table>'
        )

    words = table('CPU', '<code>sparse_inference</code>', 'five times as fast')
    shown = table_rows.with_rows(words)
    assert shown.startswith('<div class="rows"><table>') and '<td data-label="c">five times as fast</td>' in shown
    for other in (table('CPU', '12.5 ± 0.1', '3.25'), table('a claim', 'holds', "can't tell")):
        assert table_rows.with_rows(other) == other
    inside = f'<div class="arguments">\n{words}</div>'
    assert table_rows.with_rows(inside) == inside


def test_the_address_of_the_site_is_one_setting():
    address = pages.settings(root).doc_url
    assert address.endswith('/')
    files = [*(root / 'docs').glob('*.*'), root / 'setup.py', root / 'pyproject.toml']
    assert not [p.name for p in files if address in p.read_text(encoding='utf-8')]


def test_the_checker_finds_what_is_broken():
    good = '<html lang="en"><title>A</title><meta name="description" content="d"><article><h1>A</h1><pre></pre>'
    bad = '<html><title>B</title><article><h1>B</h1><h3>C</h3><img src="x.png"><a href="a.html#no">a</a>'
    bad += '<a data-md-component="source" href="https://x.org">b</a><script src="https://x.org/y.js"></script>'
    found = {}
    for name, text in (('a.html', good), ('b.html', bad)):
        found[name] = check.Found()
        found[name].feed(text)
    assert not [*check.problems_of_page('a.html', found['a.html'])]
    problems = '\n'.join(check.problems_of_page('b.html', found['b.html']))
    parts = ['level of headings is left out', 'a description', 'x.png has no text', 'has no example']
    for part in [*parts, 'loads https://x.org/y.js', 'loads figures of the repository']:
        assert part in problems
    links = [*check.problems_of_links('b.html', found['b.html'], found, {*found}, '/')]
    assert links == ['b.html: x.png leads to no file', 'b.html: a.html#no leads to no anchor']
