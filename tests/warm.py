"""What many processes of the tests read and compile: once, in the process that they are forked from. They leave what
was imported there alone, in the garbage collector and at their end"""

import gc
import weakref

from fastprune.all import digits_dls
from fastprune.deploy.graph_program import program
from fastprune.deploy.threads import kernel_missing

digits_dls()
if kernel_missing() is None:
    program()
gc.freeze()
for finalizer in weakref.finalize._registry:  # a fork would do the work of this process's end
    finalizer.atexit = False
