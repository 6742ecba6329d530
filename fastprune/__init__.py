"Sparse training for fastai: prune while you train, exactly, in one line"
from importlib.metadata import version

__version__ = version('fastprune')
del version
