from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
repository = cfg['git_url']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license=cfg['license'],
    license_files=['LICENSE'],
    classifiers=cfg['classifiers'].strip().splitlines(),
    url=repository,
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['fastprune', 'fastprune.*']),
    package_data={'fastprune': ['py.typed']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    project_urls={
        'Documentation': cfg['doc_url'],
        'Source': repository,
        'Changelog': f'{repository}/blob/main/CHANGELOG.md',
        'Issues': f'{repository}/issues',
    },
)
