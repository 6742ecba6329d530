"""All pages of the site, from docs/, nbs/, benchmarks/ and the package"""

import configparser
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from api import LAYERS, Api
from links import Links
from notebooks import FENCES, Page, check_directives, notebook_page, outside_code, text_page

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ('.svg', '.png', '.gif', '.jpg', '.webp')
SOURCES = {'benchmarks/README.md': 'benchmarks/index.md', 'benchmarks/paper/RESULTS.md': 'benchmarks/papers.md'}
HOME = ('docs/index.md', 'README.md')  # the first that exists

REPEAT = {
    'docs/cookbook.md': """Each page is a notebook. Run one in a checkout, with your changes:

```sh
pip install '.[dev]'
jupyter nbconvert --to notebook --execute --inplace nbs/cookbook/timm.ipynb
```""",
    'benchmarks/README.md': """Each script measures one thing, and `report.py` makes this page of what they wrote:

```sh
pip install '.[bench]'
python benchmarks/mask_update.py
python benchmarks/report.py
```""",
    'benchmarks/paper/RESULTS.md': """A table is one script, run at a scale of your choice:

```sh
python benchmarks/paper/run.py ocp_table2 --scale small
python benchmarks/paper/report.py
```""",
}
TUTORIALS = """Each page is a notebook, as it was run. Run one yourself, in a checkout:

```sh
pip install '.[dev]'
jupyter nbconvert --to notebook --execute --inplace nbs/tutorials/01_one_cycle_pruning.ipynb
```"""


def settings(root=ROOT):
    "The site's address and what else settings.ini says of the project"
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root / 'settings.ini', encoding='utf-8')
    return SimpleNamespace(**config['DEFAULT'])


def repository_uris(root=ROOT):
    "Path in the repository -> path on the site, of all that is not generated"
    uris = {p: u for p, u in SOURCES.items() if (root / p).exists()}
    home = next(p for p in HOME if (root / p).exists())
    uris |= {p.relative_to(root).as_posix(): p.name for p in sorted((root / 'docs').glob('*.md'))}
    uris[home] = 'index.md'
    if 'docs/cookbook.md' in uris:
        uris['docs/cookbook.md'] = 'cookbook/index.md'
    for path in sorted((root / 'nbs').rglob('*.ipynb')):
        name = path.relative_to(root / 'nbs').with_suffix('.md').as_posix()
        if name != 'index.md' and '.ipynb_checkpoints' not in path.parts:
            uris[path.relative_to(root).as_posix()] = name
    for folder, there in (('docs/img', 'img'), ('benchmarks/paper/figures', 'benchmarks/figures')):
        for path in sorted((root / folder).rglob('*')):
            if path.suffix in PICTURES:
                uris[path.relative_to(root).as_posix()] = f'{there}/{path.relative_to(root / folder).as_posix()}'
    if home == 'README.md':
        uris |= {f'README_files/{p.name}': f'README_files/{p.name}' for p in (root / 'README_files').iterdir()}
    return uris


def renamed_headings(anchors, text):
    "A text whose headings have other ids than `anchors`"

    def change(m):
        name = re.sub(r'[^\w.-]+', '-', m[1].strip().lower())
        return f'{m[0]} {{ #section-{name} }}' if name in anchors else m[0]

    return re.sub(r'^#+ (.+)$', change, text, flags=re.MULTILINE)


class Site:
    "Pages and files by their paths on the site, and the navigation"

    def __init__(self, root=ROOT):
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))  # the checkout's package, not an installed one
        self.root, self.settings = root, settings(root)
        self.uris = repository_uris(root)
        self.sources = {uri: path for path, uri in self.uris.items()}
        self.links = Links(root, self.uris, self.settings.git_url)
        self.links.made |= {'tutorials/index.md', 'api/index.md'}
        self.api = Api(root, self.links)
        self.links.made |= {e.page for e in self.api.entries}
        self.pages, self.files = {}, {}
        for path, uri in self.uris.items():
            self.add(path, uri)
        self.pages['tutorials/index.md'] = self.tutorials()
        for uri, page in self.api.pages().items():
            self.put(uri, page)
        self.distinguish()

    def add(self, path, uri):
        "A page or picture of the repository"
        link = self.links.at(path)
        if path.endswith('.ipynb'):
            is_module = not path.startswith(('nbs/tutorials/', 'nbs/cookbook/'))
            self.put(uri, self.module_page(path, uri, link) if is_module else notebook_page(self.root / path, link))
        elif path.endswith('.md'):
            page = text_page((self.root / path).read_text(encoding='utf-8'), link)
            if path in REPEAT:
                head, lead, rest = page.text.partition('{ .lead }\n')
                head, rest = (head + lead, rest) if lead else page.text.split('\n', 1)
                page.text = f'{head}\n\n{REPEAT[path]}\n\n{rest}'
            self.put(uri, page)
        else:
            self.files[uri] = (self.root / path).read_bytes()

    def put(self, uri, page):
        "A page, and the pictures beside it"
        check_directives(page.text, self.sources.get(uri, uri))
        if not uri.startswith('api/') and not page.head:
            page.text = self.api.linked_once(page.text, uri)
        folder = uri.rpartition('/')[0]
        self.pages[uri] = page
        self.files |= {f'{folder}/{name}'.lstrip('/'): data for name, data in page.files.items()}

    def module_page(self, path, uri, link):
        "The notebook that is the source of a module: where `doc` and the API's links to the source lead"
        anchors = set()
        page = notebook_page(self.root / path, link, partial(self.before, uri, anchors))
        module = uri.removesuffix('.md').replace('/', '.')
        page.title, page.head = f'fastprune.{module}', {'search': {'exclude': True}}
        rest = outside_code(page.text.split('\n', 1)[1], partial(renamed_headings, anchors), FENCES)
        page.text = f'# fastprune.{module}\n{rest}'
        page.description = page.description or f'Source of the module fastprune.{module}'
        return page

    def before(self, uri, anchors, cell):
        "The anchors of what a cell defines, which are added to `anchors`, and links to the pages of the API"
        if not cell.exported:
            return ''
        new = [n for n in dict.fromkeys(name.lower() for name in cell.names) if n not in anchors]
        anchors.update(new)
        places = ''.join(f'<a id="{name}"></a>' for name in new)
        here = [e for e in self.api.entries if e.definition in cell.names and e.source.split('#')[0] == uri]
        links = ', '.join(self.api.link_to(e, uri) for e in here)
        return f'<p class="defined" markdown>{places}{"API: " + links if links else ""}</p>' if places or links else ''

    def distinguish(self):
        "Give pages of folders another title where there is one like it: `Write your own method (tutorial)`"
        titles = Counter(page.title for page in self.pages.values())
        for uri, page in self.pages.items():
            if titles[page.title] > 1 and '/' in uri:
                page.title += f' ({uri.partition("/")[0].removesuffix("s")})'

    def tutorials(self):
        "A page that lists the tutorials"
        rows = ['| Tutorial | What it is about |', '|---|---|']
        for uri in self.of('tutorials'):
            page = self.pages[uri]
            rows.append(f'| [{page.title}]({uri.rpartition("/")[2]}) | {page.description.replace("|", "&#124;")} |')
        table = '\n'.join(rows)
        what = 'The methods of six papers, tried on small data, with what came out'
        return Page('Tutorials', what, f'# Tutorials\n\n{what}.\n{{ .lead }}\n\n{table}\n\n{TUTORIALS}')

    def of(self, folder):
        "The pages of a folder, in the order of their names"
        return sorted(u for u in self.pages if u.startswith(f'{folder}/') and not u.endswith('/index.md'))

    def nav(self):
        "The navigation, of the pages that there are"
        layers = [{LAYERS[k][0]: f'api/{k}.md'} for k in LAYERS if f'api/{k}.md' in self.pages]
        sections = {
            'Start': ['index.md', 'start.md'],
            'Cookbook': ['cookbook/index.md', *self.of('cookbook')],
            'Concepts': ['concepts.md'],
            'Tutorials': ['tutorials/index.md', *self.of('tutorials')],
            'Methods': ['methods.md'],
            'Write your own method': ['your_own_method.md'],
            'Deploy': ['deploy.md'],
            'API': ['api/index.md', *layers],
            'Benchmarks': [*SOURCES.values()],
            'FAQ': ['faq.md'],
        }
        listed = {u for uris in sections.values() for u in uris if isinstance(u, str)}
        sections['Start'] += [u for u in sorted(self.texts) if '/' not in u and u not in listed]
        sections = {k: [u for u in uris if isinstance(u, dict) or u in self.pages] for k, uris in sections.items()}
        return [{k: uris[0] if len(uris) == 1 else uris} for k, uris in sections.items() if uris]

    @property
    def texts(self):
        "The pages that are written in docs/"
        return {u for p, u in self.uris.items() if p.startswith('docs/') and p.endswith('.md')}
