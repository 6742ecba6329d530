"Read and write sparse files without fastai: the same functions as in `fastprune.core`"

from .core.files import *
from .core.json_files import *
from .core.sparse_files import *
