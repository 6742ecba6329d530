"""Run the quick tests with the oldest versions that settings.ini allows: `python scripts/oldest.py [TEST ...]`

It makes an environment in a temporary folder, with the Python that runs it, in which each of the package's requirements
has its lower bound. So run it with the oldest Python, too. What only tests need is the newest. Tests of kernels are not
among them: Triton 3.2, which torch 2.6 has, can't run ours, and PyTorch sorts there, with a warning."""

import subprocess
import sys
import tempfile
import venv
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
tests = ['tests/schedules', 'tests/core/test_masks.py', 'tests/core/test_files.py', 'tests/training/test_callback.py']
needed = ['pytest', 'pytest-xdist', 'hypothesis', 'nbdev']


def oldest(requirements):
    "Requirements with `==` in place of `>=`"
    for requirement in requirements.split():
        if '>=' not in requirement:
            raise SystemExit(f'settings.ini: requirements: {requirement} has no lower bound; write {requirement}>=...')
        yield requirement.replace('>=', '==')


def main(args):
    config = ConfigParser(delimiters=['='])
    config.read(root / 'settings.ini', encoding='utf-8')
    pins = list(oldest(config['DEFAULT']['requirements']))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / 'bin' / 'python'
        subprocess.run([python, '-m', 'pip', 'install', '-q', root, *needed, *pins], check=True)
        subprocess.run([python, '-m', 'pip', 'list'], check=True)
        return subprocess.run([python, '-m', 'pytest', *(args or tests)], cwd=root).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
