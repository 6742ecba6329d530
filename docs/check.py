"""Check the site that was built: `python docs/check.py [FOLDER]`, after `mkdocs build`.

Every link within the site leads to a page, and its anchor to a place there; so do all addresses of nbdev's index. Links
to other hosts are not followed, nor is the site's own address, which may not be public yet. Each page has one heading
of the first level, a title of its own, a description, an example, and a text for each picture, and loads nothing from
other hosts."""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, settings


@dataclass
class Found(HTMLParser):
    "What a page has"

    title: str = ''
    description: str = ''
    language: str = ''
    ids: list = field(default_factory=list)
    links: list = field(default_factory=list)
    headings: list = field(default_factory=list)  # levels, within the article
    unnamed: list = field(default_factory=list)  # pictures without a text
    loaded: list = field(default_factory=list)  # what a browser loads from other hosts
    examples: int = 0  # blocks of code, within the article
    sections: dict = field(default_factory=dict)  # id of a heading of level 2 -> has it an example?

    def __post_init__(self):
        super().__init__()
        self.inside, self.section, self.in_title = False, None, False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs['id']] if 'id' in attrs else []
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        if tag in ('img', 'script', 'iframe', 'link') and attrs.get('rel') != 'canonical':
            self.loaded += [v for k in ('href', 'src') if urlsplit(v := attrs.get(k) or '').netloc]
        if attrs.get('data-md-component') == 'source':
            self.loaded.append('figures of the repository')
        self.inside = self.inside or tag == 'article'
        self.in_title = tag == 'title' and not self.title
        if tag == 'html':
            self.language = attrs.get('lang', '')
        if tag == 'meta' and attrs.get('name') == 'description':
            self.description = attrs.get('content', '')
        if self.inside:
            self.in_article(tag, attrs)

    def in_article(self, tag, attrs):
        if re.fullmatch('h[1-6]', tag):
            self.headings.append(int(tag[1]))
            if tag == 'h2':
                self.section = attrs.get('id')
                self.sections[self.section] = False
        if tag == 'img' and not attrs.get('alt', '').strip():
            self.unnamed.append(attrs.get('src'))
        if tag == 'pre':
            self.examples += 1
        if 'example' in (attrs.get('class') or '').split():
            self.sections[self.section] = True

    def handle_endtag(self, tag):
        self.in_title = self.in_title and tag != 'title'
        self.inside = self.inside and tag != 'article'

    def handle_data(self, data):
        if self.in_title:
            self.title += data


def read(path):
    found = Found()
    found.feed(path.read_text(encoding='utf-8'))
    return found


def problems_of_links(name, found, pages, files, base):
    "Links of a page that lead nowhere"
    for link in found.links:
        url = urlsplit(link)
        if url.scheme or url.netloc:
            continue
        path = url.path.removeprefix(base) if url.path.startswith('/') else url.path
        there = normpath(join('' if url.path.startswith('/') else dirname(name), unquote(path))) if path else name
        there = 'index.html' if there == '.' else there
        if there not in files:
            yield f'{name}: {link} leads to no file'
        elif url.fragment and there in pages and unquote(url.fragment) not in pages[there].ids:
            yield f'{name}: {link} leads to no anchor'


def problems_of_page(name, found):
    "What a page lacks"
    if found.headings.count(1) != 1:
        yield f'{name}: {found.headings.count(1)} headings of the first level'
    if any(b > a + 1 for a, b in zip(found.headings, found.headings[1:], strict=False)):
        yield f'{name}: a level of headings is left out: {found.headings}'
    if not (found.title.strip() and found.description.strip() and found.language):
        yield f'{name}: needs a title, a description and a language'
    for picture in found.unnamed:
        yield f'{name}: the picture {picture[:60]} has no text'
    for what in found.loaded:
        yield f'{name}: loads {what} from another host'
    if not found.examples:
        yield f'{name}: has no example'
    if name.startswith('api/') and name != 'api/index.html':
        yield from (f'{name}: {k} has no example' for k, has in found.sections.items() if not has)
    yield from (f'{name}: two places have the id {k!r}' for k, n in Counter(found.ids).items() if n > 1)


def problems_of_index(pages):
    "Addresses of nbdev's index, where `doc` leads, that the site does not have"
    places = {}
    exec((ROOT / 'fastprune' / '_modidx.py').read_text(encoding='utf-8'), places)
    for names in places['d']['syms'].values():
        for name, (place, _) in names.items():
            page, _, anchor = place.partition('#')
            if page not in pages or anchor not in pages[page].ids:
                yield f'{name}: {place} is not on the site'


def check(folder):
    "All problems of a site, and how many pages and links there are"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}
    pages = {name: read(folder / name) for name in sorted(files) if name.endswith('.html')}
    base = urlsplit(settings().doc_url).path.rstrip('/') + '/'
    problems = []
    for name, found in pages.items():
        problems += problems_of_links(name, found, pages, files, base)
        problems += problems_of_page(name, found) if name != '404.html' else []
    titles = Counter(found.title for found in pages.values())
    problems += [f'{n} pages have the title {title!r}' for title, n in titles.items() if n > 1]
    problems += problems_of_index(pages)
    return problems, len(pages), sum(len(found.links) for found in pages.values())


if __name__ == '__main__':
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / '_docs'
    if not (folder / 'index.html').exists():
        sys.exit(f'{folder} has no site: build it first, with `mkdocs build --strict -f docs/mkdocs.yml`')
    problems, n_pages, n_links = check(folder)
    print('\n'.join([*problems, f'{n_pages} pages, {n_links} links, {len(problems)} problems']))
    sys.exit(bool(problems))
