"What is published says what is true: README, metadata, sdist, citation, workflows, links to Colab"

import json
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pandas as pd
import pytest
import yaml

root = Path(__file__).resolve().parents[1]
addresses = runpy.run_path(str(root / 'scripts' / 'addresses.py'))
repository, site = addresses['repository'], addresses['site']
config = ConfigParser(delimiters=['='])
config.read(root / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']


def text(path):
    return (root / path).read_text(encoding='utf-8')


def cells(notebook):
    return json.loads(notebook.read_text(encoding='utf-8'))['cells']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The metadata, and the files of an sdist"
    folder = tmp_path_factory.mktemp('egg')
    command = [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', folder]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    egg = folder / f'{settings["lib_name"]}.egg-info'
    return message_from_string((egg / 'PKG-INFO').read_text()), (egg / 'SOURCES.txt').read_text().splitlines()


def test_metadata_comes_from_the_settings(made):
    metadata, _ = made
    urls = dict(u.split(', ') for u in metadata.get_all('Project-URL'))
    assert urls['Documentation'] == site and urls['Source'] == repository
    assert urls['Changelog'] == f'{repository}/blob/main/CHANGELOG.md' and urls['Issues'] == f'{repository}/issues'
    assert metadata['Version'] == settings['version'] and len(metadata['Keywords'].split(',')) > 5
    assert 'Typing :: Typed' in metadata.get_all('Classifier')


def test_sdist_has_what_its_tests_need(made):
    _, files = made
    needed = {'settings.ini', 'pytest.ini', 'README.md', 'LICENSE', 'CHANGELOG.md', 'CONTRIBUTING.md', 'CITATION.cff'}
    needed |= {'.ci/run', 'benchmarks/paper/RESULTS.md', 'benchmarks/prunable.csv', 'README_files/README_1_1.png'}
    for folder, ending in (('tests', '*.py'), ('nbs', '*.ipynb'), ('examples', '*.py'), ('docs', '*.md')):
        found = (p.relative_to(root) for p in (root / folder).rglob(ending))
        needed |= {p.as_posix() for p in found if not {'.ipynb_checkpoints', '_build'} & set(p.parts)}
    assert not needed - set(files)
    assert not [f for f in files if '__pycache__' in f or f.startswith('benchmarks/paper/cache/')]


def test_every_requirement_has_an_oldest_version():
    oldest = runpy.run_path(str(root / 'scripts' / 'oldest.py'))['oldest']
    pins = list(oldest(settings['requirements']))
    assert len(pins) == len(settings['requirements'].split()) and all(re.fullmatch(r'[\w-]+==[\d.]+', p) for p in pins)
    with pytest.raises(SystemExit, match='scipy has no lower bound; write scipy>='):
        list(oldest('torch>=2.6 scipy'))


def test_version_and_date_agree():
    version, date = re.search(r'^## (\S+) \((\d{4}-\d\d-\d\d)\)$', text('CHANGELOG.md'), re.MULTILINE).groups()
    citation = yaml.safe_load(text('CITATION.cff'))
    assert settings['version'] == version == citation['version'] and str(citation['date-released']) == date


def test_addresses_are_those_of_the_settings():
    citation = yaml.safe_load(text('CITATION.cff'))
    links = yaml.safe_load(text('.github/ISSUE_TEMPLATE/config.yml'))['contact_links']
    assert citation['repository-code'] == repository
    assert citation['url'] == site == links[0]['url']


def test_citation_has_every_paper():
    titles = {r['title'] for r in yaml.safe_load(text('CITATION.cff'))['references']}
    papers = text('docs/overview.md').split('## Papers')[1]
    assert titles == set(re.findall(r', \*(.*?)\*, \d{4}$', papers, re.MULTILINE)) and len(titles) == 7


@pytest.mark.parametrize('notebook', addresses['tutorials'], ids=lambda p: p.stem)
def test_tutorial_opens_in_colab(notebook):
    title, colab = cells(notebook)[:2]
    assert ''.join(title['source']).startswith('# ')
    assert ''.join(colab['source']) == addresses['colab_text'](notebook), 'run python scripts/addresses.py'
    assert colab['cell_type'] == 'markdown' and sum(map(addresses['is_colab'], cells(notebook))) == 1


def test_workflows_run_what_there_is():
    flows = {p.stem: yaml.safe_load(text(p)) for p in (root / '.github' / 'workflows').glob('*.yml')}
    assert set(flows) == {'tests', 'slow', 'docs', 'release'}
    commands = [s['run'] for f in flows.values() for j in f['jobs'].values() for s in j['steps'] if 'run' in s]
    scripts = {s for c in commands for s in re.findall(r'(?:bash|python) ([\w./]+)', c)}
    assert scripts == {'.ci/run', 'docs/check.py', 'scripts/oldest.py', 'scripts/distribution.sh'}
    assert all((root / s).exists() for s in scripts)
    classified = re.findall(r'Python :: (3\.\d+)$', settings['classifiers'], re.MULTILINE)
    assert flows['tests']['jobs']['tests']['strategy']['matrix']['python'] == classified
    assert classified[0] == settings['min_python']


def test_readme_fits_on_a_screen():
    readme = text('README.md')
    (code,) = re.findall(r'^```python\n(.*?)^```', readme, re.DOTALL | re.MULTILINE)
    (shell,) = re.findall(r'^```sh\n(.*?)^```', readme, re.DOTALL | re.MULTILINE)
    rows = re.findall(r'^\| (?!You get)\w', readme, re.MULTILINE)
    assert len([line for line in code.splitlines() if line]) <= 10
    assert len(shell.splitlines()) == 2 and len(rows) == 5
    assert readme.count('README_files/') == 1 and len(readme.splitlines()) <= 80


def test_readme_has_only_whole_addresses():
    links = re.findall(r'\]\(([^)\s]+)\)', text('README.md'))
    assert f'{repository}/raw/main/README_files/README_1_1.png' in links and f'{site}promises.html' in links
    for link in links:
        known = link.startswith((f'{repository}/', site, 'https://img.shields.io/'))
        assert known, f'{link}: run python scripts/addresses.py'
        if '/main/' in link:
            assert (root / link.split('/main/')[1]).exists()
        elif link.startswith(site) and link != site:
            assert (root / 'docs' / link.removeprefix(site)).with_suffix('.md').exists()


def test_a_wrong_link_is_named():
    with pytest.raises(SystemExit, match='nbs/index.ipynb: the link docs/none.md leads to no file'):
        addresses['absolute']('docs/none.md')


def test_readme_counts_the_papers_claims():
    "Its sentence is made from the first table of RESULTS.md"
    table = text('benchmarks/paper/RESULTS.md').split('| **all** |')
    papers = len(re.findall(r'^\| [^|]+ \| \d+ \|', table[0], re.MULTILINE))
    n, holds, in_part, does_not, unknown, none, not_run = map(int, table[1].splitlines()[0].strip(' |').split(' | '))
    parts = [
        f'of {n} claims in {"one two three four five six seven".split()[papers - 1]} papers, '
        f'{holds} {"holds" if holds == 1 else "hold"}',
        *[f'{in_part} {"holds" if in_part == 1 else "hold"} in part'] * bool(in_part),
        f'{does_not} {"doesn" if does_not == 1 else "don"}\'t',
        f"{unknown} can't be told",
        f'{none} {"has" if none == 1 else "have"} no verdict',
        *[f'{not_run} {"was" if not_run == 1 else "were"} not run'] * bool(not_run),
    ]
    expected = f'{", ".join(parts[:-1])} and {parts[-1]}'
    assert expected in ' '.join(text('README.md').split())


@pytest.mark.parametrize('page', ['README.md', 'docs/overview.md'])
def test_speeds_are_measured(page):
    "Claims of benchmarks/overhead.csv and inference.csv, on a CPU; those of ours may be too modest"
    said = ' '.join(text(page).split())
    slower = pd.read_csv(root / 'benchmarks' / 'overhead.csv').query('device == "cpu"')
    ours = slower[slower.side.str.startswith('fastprune') & slower.side.str.contains('interval 1$')]
    theirs = slower[slower.side.str.startswith('fasterai')].ratio
    most = int(re.search(r'ResNet-18 trains at most (\d+)% longer', said)[1])
    assert most >= round(100 * (ours.ratio.max() - 1))
    assert f'{100 * (theirs.min() - 1):.0f} to {100 * (theirs.max() - 1):.0f}% longer' in said
    fast = pd.read_csv(root / 'benchmarks' / 'inference.csv').query('device == "cpu" and side == "sparse_inference"')
    for name, network in {'Transformer encoder': 'Transformer encoder', 'MLP': 'MLP', 'ResNet-50': 'resnet50'}.items():
        speedup = fast.query('network == @network and sparsity == 0.95').speedup
        found = re.search(rf'{name} (?:runs )?([\d.]+) to ([\d.]+) times', said)
        assert found or page == 'README.md' and network != 'Transformer encoder'
        assert not found or found.groups() == (f'{speedup.min():.1f}', f'{speedup.max():.1f}')
