"""What many processes of the tests import, read and compile: once, in the process that they are forked from. They leave
what was imported there alone, in the garbage collector and at their end"""

import contextlib
import gc
import importlib
import weakref

from matplotlib.backends import backend_registry

from fastprune.all import digits_dls
from fastprune.deploy.graph_program import program
from fastprune.deploy.threads import kernel_missing

# all of fastai, what runs notebooks and what their shell imports when it starts, and what an export to ONNX imports
for name in (
    'IPython.core.application',
    'IPython.core.magics.execution',
    'fastai.vision.all',
    'matplotlib_inline.backend_inline',
    'nbdev.test',
    'networkx',
    'onnxruntime',
    'onnxscript',
    'pytest',
    'sqlite3',
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
backend_registry.list_all()  # reads the entry points of all packages
digits_dls()
if kernel_missing() is None:
    program()
gc.freeze()
for finalizer in weakref.finalize._registry:  # a fork would do the work of this process's end
    finalizer.atexit = False
