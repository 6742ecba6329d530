"""The cases of `same.py`. Each takes an empty folder, and returns its results by name"""

from . import analyses, masks, methods, recipes
from .common import CASES

__all__ = ['CASES', 'analyses', 'masks', 'methods', 'recipes']
