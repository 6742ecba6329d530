"""Write what has addresses in it, from settings.ini: `python scripts/addresses.py`

README.md is made from nbs/index.ipynb. Links there are relative to the root, and absolute in README.md, because PyPI
shows it, too. Each tutorial gets a cell below its title with a link to Colab."""

import json
import re
import subprocess
import sys
import uuid
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
config = ConfigParser(delimiters=['='])
config.read(root / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
repository, site = settings['git_url'], settings['doc_url']
tutorials = sorted((root / 'nbs' / 'tutorials').glob('*.ipynb'))
COLAB = 'https://colab.research.google.com'
LINK = re.compile(r'\]\((?!https?:|#)([^)\s]+)\)')


def absolute(link):
    "A link from the root as an address: pages of docs/ are on the site, other files in the repository"
    if link.startswith('../../'):  # as on GitHub: pages of the repository that are no files
        return f'{repository}/{link[6:]}'
    if not (root / link).exists():
        raise SystemExit(f'nbs/index.ipynb: the link {link} leads to no file; name one by its path from the root')
    if link.startswith('docs/'):
        page = link[5:].removesuffix('.md')
        return f'{site}{page}.html' if page else site
    return f'{repository}/{"raw" if link.endswith(".png") else "blob"}/main/{link}'


def write_readme(folder):
    "README.md and its pictures, in a folder"
    convert = [sys.executable, '-m', 'jupyter', 'nbconvert', '--log-level', 'WARN', '--to', 'markdown']
    subprocess.run([*convert, root / 'nbs/index.ipynb', '--output-dir', folder, '--output', 'README'], check=True)
    readme = Path(folder) / 'README.md'
    text = LINK.sub(lambda m: f']({absolute(m[1])})', readme.read_text(encoding='utf-8'))
    readme.write_text(text, encoding='utf-8')


FIRST = {  # What tutorials need that not all need
    '13_many_machines': f'`!git clone {repository}`, `%cd fastprune` and `%pip install .`',
    '14_small_and_fast': '`%pip install "fastprune[shrink,onnx,report]"`',
}


def colab_text(notebook):
    "What the cell below the title of a tutorial says"
    place, path = repository.removeprefix('https://github.com/'), notebook.relative_to(root).as_posix()
    badge = f'[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{place}/blob/main/{path})'
    return f'{badge} In Colab, run {FIRST.get(notebook.stem, "`%pip install fastprune`")} first.'


def is_colab(cell):
    return ''.join(cell['source']).startswith('[![Open in Colab](')


def write_colab(notebook):
    "Adds the cell, or corrects it"
    read = json.loads(notebook.read_text(encoding='utf-8'))
    cells = read['cells']
    if not is_colab(cells[1]):
        name = uuid.uuid5(uuid.NAMESPACE_URL, notebook.stem).hex[:8]
        cells.insert(1, dict(cell_type='markdown', id=name, metadata={}, source=[]))
    cells[1]['source'] = [colab_text(notebook)]
    notebook.write_text(json.dumps(read, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    write_readme(root)
    for notebook in tutorials:
        write_colab(notebook)
