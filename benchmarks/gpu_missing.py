"Names of the packages among the wheels of a folder that this Python does not have: `python gpu_missing.py FOLDER`"

import importlib.metadata
import sys
from pathlib import Path


def missing(folder):
    for name in sorted({wheel.name.split('-')[0] for wheel in Path(folder).glob('*.whl')}):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name.replace('_', '-')


if __name__ == '__main__':
    if not list(Path(sys.argv[1]).glob('*.whl')):
        sys.exit(f'{sys.argv[1]} has no wheels: fill it by benchmarks/wheels.sh')
    print(*missing(sys.argv[1]))
