"What users need: `from fastprune.all import *`. The rest is imported from its module"

from .moved import find_of_all as __getattr__  # names that users do not need, for one release

# core
from .core.compute import compute_masks
from .core.files import load_state, save_state
from .core.masks import Masks
from .core.protocol import needs
from .core.scopes import lamp
from .core.sparse_files import load_sparse, save_sparse
from .core.weights import prunable_weights

# schedules
from .schedules.plot import plot_schedules
from .schedules.rates import lr_constant, lr_cyclical, lr_decay, lr_rounds, lr_warmup, plot_lrs, s_cyc_max_lr
from .schedules.retraining import RETRAINING, allr_discount, lr_retrain
from .schedules.sparsity import SCHEDULES, agp, cosine, cubic, cyclical, iterative, linear, ocp, one_shot, window

# criteria
from .criteria.flows import synflow, wanda
from .criteria.gradients import grasp, snip, taylor
from .criteria.registry import CRITERIA
from .criteria.weights import magnitude, magnitude_increase, movement, random_score, updating_movement

# engine
from .engine.method import Method
from .engine.sparsifier import Sparsifier

# zoo
from .zoo.data import TensorData, digits_dls
from .zoo.folders import folder_dls
from .zoo.images import FlipAndShift, cifar10_dls
from .zoo.make import make_model
from .zoo.models import cifar_mobilenet, cifar_resnet, cifar_vgg, digits_convnet

# learner
from .learner.report import plot_layers
from .learner.states import state_of
# its modules that add methods to Learner
from .learner import distributed as _
from .learner import files as _
from .learner import fit as _
from .learner import flops as _
from .learner import histogram as _
from .learner import keep as _

# training
from .training.callback import SparseMethod, SparsifyCallback
from .training.checkpoint import Checkpoint
# its modules that add methods to Learner
from .training import prune as _

# methods
from .methods.always_sparse import SET, SNFS, RigL
from .methods.budgeted import BudgetedCallback
from .methods.dense_behind import DNW, DPF, DenseBehind
from .methods.dense_until_end import GSM, LC, GradualL2
from .methods.gradual import GMP
from .methods.registry import BASELINES
from .methods.thresholds import DST, STR, search_strength

# recipes
from .recipes.rounds import Rounds
from .recipes.tickets import Ticket, Tickets
# its modules that add methods to Learner
from .recipes import compare as _
from .recipes import cyclical as _
from .recipes import iterative as _
from .recipes import lottery as _
from .recipes import oracle as _
from .recipes import retrain as _

# analysis
from .analysis.instability import Stability
from .analysis.paths import LinearPath
from .analysis.sweep import Sweep, paper_methods, sweep
from .analysis.weights import SignFlips, mask_overlap
# its modules that add methods to Learner
from .analysis import hessian as _
from .analysis import plane as _
from .analysis import sensitivity as _

# deploy
from .deploy.export import to_onnx
from .deploy.inference import sparse_inference
from .deploy.report_file import report_file
from .deploy.semi_structured import to_semi_structured
from .deploy.shrink import shrink
from .deploy.timing import latency
from .deploy.torch_prune import from_torch_prune, to_torch_prune
# its modules that add methods to Learner
from .deploy import plain_export as _
from .deploy import report as _
from .deploy import shrink_learner as _

# testing
from .testing import check_method

__all__ = [
    # core
    'Masks', 'compute_masks', 'prunable_weights', 'lamp', 'needs', 'save_sparse', 'load_sparse', 'save_state',
    'load_state',
    # schedules
    'SCHEDULES', 'one_shot', 'iterative', 'linear', 'cosine', 'cubic', 'agp', 'ocp', 'window', 'cyclical',
    'plot_schedules', 'lr_constant', 'lr_cyclical', 'lr_decay', 'lr_warmup', 'lr_rounds', 'lr_retrain', 'plot_lrs',
    's_cyc_max_lr', 'allr_discount', 'RETRAINING',
    # criteria
    'CRITERIA', 'magnitude', 'magnitude_increase', 'movement', 'updating_movement', 'random_score', 'taylor',
    'snip', 'grasp', 'synflow', 'wanda',
    # engine
    'Sparsifier', 'Method',
    # zoo
    'digits_dls', 'folder_dls', 'cifar10_dls', 'TensorData', 'FlipAndShift', 'digits_convnet', 'cifar_resnet',
    'cifar_vgg', 'cifar_mobilenet', 'make_model',
    # learner
    'plot_layers', 'state_of',
    # training
    'SparsifyCallback', 'SparseMethod', 'Checkpoint',
    # methods
    'BASELINES', 'GMP', 'DPF', 'DNW', 'GSM', 'LC', 'GradualL2', 'STR', 'DST', 'RigL', 'SET', 'SNFS',
    'BudgetedCallback', 'search_strength', 'DenseBehind',
    # recipes
    'Ticket', 'Tickets', 'Rounds',
    # analysis
    'LinearPath', 'Stability', 'SignFlips', 'mask_overlap', 'Sweep', 'sweep', 'paper_methods',
    # deploy
    'sparse_inference', 'latency', 'shrink', 'to_onnx', 'to_semi_structured', 'to_torch_prune', 'from_torch_prune',
    'report_file',
    # testing
    'check_method',
]
from .analysis.hessian import *
from .analysis.instability import *
from .analysis.overlap import *
from .analysis.paper_methods import *
from .analysis.paths import *
from .analysis.plane import *
from .analysis.sensitivity import *
from .analysis.states import *
from .analysis.sweep import *
from .analysis.weights import *
from .core.checks import *
from .core.compute import *
from .core.computed import *
from .core.dense import *
from .core.describe import *
from .core.differences import *
from .core.files import *
from .core.json_files import *
from .core.folders import *
from .core.granularity import *
from .core.layouts import *
from .core.masks import *
from .core.names import *
from .core.protocol import *
from .core.renamed import *
from .core.scopes import *
from .core.selection import *
from .core.selection_sharded import *
from .core.shards import *
from .core.sparse_files import *
from .core.targets import *
from .core.units import *
from .core.usage import *
from .core.weights import *
from .criteria.flows import *
from .criteria.gradients import *
from .criteria.ranking import *
from .criteria.registry import *
from .criteria.weights import *
from .deploy.export import *
from .deploy.inference import *
from .deploy.kernel import *
from .deploy.modules import copy_model as copy_model
from .deploy.plain_export import *
from .deploy.report import *
from .deploy.report_file import *
from .deploy.semi_structured import *
from .deploy.shrink import *
from .deploy.shrink_learner import *
from .deploy.threads import *
from .deploy.timing import *
from .deploy.torch_prune import *
from .engine.hooks import *
from .engine.keep import *
from .engine.method import *
from .engine.optimizers import *
from .engine.plan import *
from .engine.run import *
from .engine.sparsifier import *
from .engine.state import *
from .engine.targets import *
from .engine.track import *
from .learner.batches import *
from .learner.criteria import *
from .learner.describe import *
from .learner.distributed import *
from .learner.evaluate import *
from .learner.files import *
from .learner.fit import *
from .learner.flops import *
from .learner.gradients import *
from .learner.histogram import *
from .learner.inputs import *
from .learner.keep import *
from .learner.report import *
from .learner.states import *
from .methods.always_sparse import *
from .methods.budgeted import *
from .methods.dense_behind import *
from .methods.dense_until_end import *
from .methods.gradual import *
from .methods.moves import *
from .methods.registry import *
from .methods.thresholds import *
from .recipes.compare import *
from .recipes.cyclical import *
from .recipes.fitting import *
from .recipes.iterative import *
from .recipes.lottery import *
from .recipes.oracle import *
from .recipes.planning import *
from .recipes.pruning import *
from .recipes.retrain import *
from .recipes.round_training import *
from .recipes.rounds import *
from .recipes.store import *
from .recipes.table import *
from .recipes.ticket import *
from .recipes.tickets import *
from .schedules.plot import *
from .schedules.rates import *
from .schedules.retraining import *
from .schedules.sparsity import *
from .training.adapters import *
from .training.callback import *
from .training.callback_state import *
from .training.checkpoint import *
from .training.events import *
from .training.fit_state import *
from .training.identity import *
from .training.optimizer_state import *
from .training.prune import *
from .training.state import *
from .zoo.data import *
from .zoo.folders import *
from .zoo.images import *
from .zoo.make import *
from .zoo.models import *
from .zoo.learners import *
from .training.watch import *
