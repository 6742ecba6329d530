"Everything that fastprune offers: `from fastprune.all import *`"
from .schedules import *
from .lr import *
from .weights import *
from .passes import *
from .criteria import *
from .masks import *
from .callback import *
from .learner import *
from .rounds import *
from .lottery import *
from .connectivity import *
from .baselines import *
from .recipes import *
from .analysis import *
from .sweep import *
from .data import *
from .models import *
