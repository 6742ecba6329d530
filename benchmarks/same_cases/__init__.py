"""What `same.py` runs: each case takes an empty folder and returns what it has computed, by name"""

from . import analyses, masks, methods, recipes
from .common import CASES

__all__ = ['CASES', 'analyses', 'masks', 'methods', 'recipes']
