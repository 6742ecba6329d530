"""Where the links of a file lead on the site"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from notebooks import PageError

ADDRESS = re.compile(r'[a-z][a-z0-9+.-]*:|//', re.IGNORECASE)


@dataclass
class Links:
    "Links between files of the repository, as links between pages of the site"

    root: Path  # The repository
    uris: dict  # Path in the repository -> path on the site, of pages (`tutorials/x.md`) and pictures
    git_url: str  # Address of the repository, for what the site has no page of
    made: set = field(default_factory=set)  # Further paths on the site, of pages that are generated

    def at(self, path, uri=None):
        "A function from a link in the file `path` of the repository to that link on the site"
        return lambda target: self.lead(target, path, uri or self.uris[path])

    def lead(self, target, path, uri):
        "The link `target` of the file `path`, whose page is `uri`"
        if ADDRESS.match(target) or target.startswith('#'):
            return target
        name, hash, anchor = target.partition('#')
        there = normpath(join(dirname(path), name))
        notebook = re.sub(r'\.html$', '.ipynb', there)
        on_site = normpath(join(dirname(uri), re.sub(r'\.(html|ipynb)$', '.md', name)))
        for page in (self.uris.get(there), self.uris.get(notebook), on_site if on_site in self.pages else None):
            if page:
                return relpath(page, dirname(uri) or '.') + hash + anchor
        if not (self.root / there).exists() or there.startswith('..'):
            raise PageError(f'{path}: the link {target!r} leads nowhere: no page and no file {there!r}')
        return f'{self.source(there)}{hash}{anchor}'

    def source(self, path):
        "Address of a file or folder at the repository's host"
        return f'{self.git_url}/{"tree" if (self.root / path).is_dir() else "blob"}/main/{path}'

    @property
    def pages(self):
        "All paths on the site"
        return {*self.uris.values(), *self.made}

    @property
    def notebooks(self):
        "The notebooks that are pages"
        return [self.root / p for p in self.uris if p.endswith('.ipynb')]
