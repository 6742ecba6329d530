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
from .criteria.brain_surgeon import obs
from .criteria.flows import synflow, wanda
from .criteria.gradients import fisher, grasp, snip, taylor
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
from .learner import owl as _
from .learner import summary as _

# training
from .training.callback import SparseMethod, SparsifyCallback
from .training.checkpoint import Checkpoint
from .training.distill import Distill
# its modules that add methods to Learner
from .training import prune as _
from .training import reconstruct as _

# methods
from .methods.always_sparse import SET, SNFS, RigL
from .methods.budgeted import BudgetedCallback
from .methods.dense_behind import DNW, DPF, DenseBehind
from .methods.dense_until_end import GSM, LC, GradualL2
from .methods.gradual import GMP
from .methods.registry import BASELINES
from .methods.thresholds import DST, STR, search_strength

# recipes
from .recipes.table import Rounds
from .recipes.ticket import Ticket
from .recipes.tickets import Tickets
# its modules that add methods to Learner
from .recipes import compare as _
from .recipes import cyclical as _
from .recipes import iterative as _
from .recipes import lottery as _
from .recipes import oracle as _
from .recipes import retrain as _

# analysis
from .analysis.envelope import Envelope, envelope
from .analysis.instability import Stability
from .analysis.overlap import mask_overlap
from .analysis.paper_methods import paper_methods
from .analysis.paths import LinearPath
from .analysis.search_start import search_start
from .analysis.sparse_regression import fit_sparse_regression, sparse_regression
from .analysis.swap import SwapTable, swap_table
from .analysis.sweep import Sweep, sweep
from .analysis.weights import SignFlips
# its modules that add methods to Learner
from .analysis import hessian as _
from .analysis import plane as _
from .analysis import retrain_envelope as _
from .analysis import sensitivity as _

# deploy
from .deploy.export import to_onnx
from .deploy.inference import sparse_inference
from .deploy.report_file import report_file
from .deploy.semi_structured import to_semi_structured
from .deploy.shrink import shrink
from .deploy.shrink_callback import ShrinkCallback
from .deploy.shrunk_file import load_shrunk, save_shrunk
from .deploy.timing import latency
from .deploy.torch_prune import from_torch_prune, to_torch_prune
# its modules that add methods to Learner
from .deploy import comparison as _
from .deploy import deploy as _
from .deploy import latency_target as _
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
    'snip', 'grasp', 'fisher', 'synflow', 'wanda', 'obs',
    # engine
    'Sparsifier', 'Method',
    # zoo
    'digits_dls', 'folder_dls', 'cifar10_dls', 'TensorData', 'FlipAndShift', 'digits_convnet', 'cifar_resnet',
    'cifar_vgg', 'cifar_mobilenet', 'make_model',
    # learner
    'plot_layers', 'state_of',
    # training
    'SparsifyCallback', 'SparseMethod', 'Checkpoint', 'Distill',
    # methods
    'BASELINES', 'GMP', 'DPF', 'DNW', 'GSM', 'LC', 'GradualL2', 'STR', 'DST', 'RigL', 'SET', 'SNFS',
    'BudgetedCallback', 'search_strength', 'DenseBehind',
    # recipes
    'Ticket', 'Tickets', 'Rounds',
    # analysis
    'LinearPath', 'Stability', 'SignFlips', 'mask_overlap', 'Sweep', 'sweep', 'paper_methods',
    'search_start', 'sparse_regression', 'fit_sparse_regression', 'SwapTable', 'swap_table', 'Envelope', 'envelope',
    # deploy
    'sparse_inference', 'latency', 'shrink', 'to_onnx', 'to_semi_structured', 'to_torch_prune', 'from_torch_prune',
    'report_file', 'ShrinkCallback', 'save_shrunk', 'load_shrunk',
    # testing
    'check_method',
]
