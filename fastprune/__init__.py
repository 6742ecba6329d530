"""Modules:

- `fastprune.moved`: Old module paths, for one release: they warn, and lead to where the code is now."""

from importlib.metadata import version

from .moved import install

__version__ = version('fastprune')
install()
