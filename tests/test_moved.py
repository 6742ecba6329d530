"Old module paths, old names and old files lead to where the code is now, for one release"

import importlib
from pathlib import Path

import pytest
import torch
from fastai.basics import load_learner

from fastprune.all import SparsifyCallback

PUBLIC = {  # the flat package's public names, by module
    'analysis': 'SignFlips Overlap mask_overlap WeightHistogram Sensitivity CyclePaths',
    'baselines': (
        'BASELINES GMP DPF DNW STR DST search_strength GSM coupled_decay LC GradualL2 RigL SET SNFS shared_out'
    ),
    'callback': 'KeepMasks set_masks is_frozen ranked hold_rows check_rows SparsifyCallback',
    'connectivity': 'Barrier LinearPath Stability Plane',
    'criteria': (
        'CRITERIA magnitude squared_magnitude small_magnitude random_score large_init small_init '
        'large_init_large_final small_init_small_final magnitude_increase movement '
        'updating_magnitude_increase updating_movement updating_movmag has_gradients taylor snip grasp '
        'synflow wanda asks_for'
    ),
    'data': 'TensorData check_split digits_dls folder_dls FlipAndShift cifar10_dls',
    'export': 'to_onnx to_torch_prune from_torch_prune semi_structured_layers to_semi_structured',
    'folders': 'sole_owner',
    'identity': (
        'describe loader_identity data_identity pruned_by pruning_identity arguments_of callbacks_identity '
        'scheduled_names fit_identity model_identity learner_identity state_checksum start_identity '
        'remember_start differences'
    ),
    'inference': 'copy_model latency sparse_inference',
    'inputs': (
        'map_tensors tensors_in Inputs call_model error_line shapes_of call_example batch_size has_batch '
        'n_items at_most as_inputs model_device learner_inputs'
    ),
    'kernel': 'LANES TILE BLOCKS kernel_missing looks_like SparseLinear SparseConv',
    'learner': 'plot_layers GradientHistogram',
    'lottery': 'REWINDS KINDS Ticket Tickets plan_of count_steps Comparison',
    'lr': (
        'RETRAINING lr_constant lr_decay lr_cyclical lr_warmup plot_lrs s_cyc_max_lr at_prune_rate lr_rounds '
        'lr_retrain allr_discount'
    ),
    'masks': (
        'GRANULARITIES SCOPES nonzeros Masks check_granularity unit_dims count_units unfit_weights '
        'fitting_weights check_scope lamp layer_counts check_scores check_nan check_bool compute_masks'
    ),
    'models': 'digits_convnet cifar_resnet cifar_vgg cifar_mobilenet',
    'passes': (
        'reset_state in_fit train_loader sparse_embeddings random_kept undisturbed device_of takes_part '
        'as_in_fit to_model a_batch forward loss_of together everyones mean_everywhere check_whole '
        'check_n_batches dense_gradients gradients second_derivatives summed_gradients'
    ),
    'radix': 'BITS BITS_EACH FEW LARGE SAMPLE SAMPLE_EACH SPREAD ordered_bits lowest_everywhere',
    'recipes': 'REWIND group_rates BudgetedCallback',
    'report': 'report_file',
    'resume': (
        'rng_state check_rng_state set_rng_state pack unpack check_kept states_of opt_state check_opt_state '
        'load_opt_state fit_state check_fit_state restore_fit Checkpoint'
    ),
    'rounds': (
        'Rounds RoundStore check_numbers load_into borrowed state_of seed_round smaller_is_better '
        'BestEpoch StateAt end_before_training StartAt starting_at steps_by_epoch bar_over '
        ''
    ),
    'schedules': (
        'agp SCHEDULES one_shot iterative linear cosine cubic ocp check_schedule progress_at schedule_name '
        'window cyclical update_steps plot_schedules'
    ),
    'selection': 'PIECE PIECE_ELSEWHERE SMALL SPREAD NaNError Pieces lowest',
    'shards': 'is_dtensor Parts shard_like agree',
    'shrink': 'shrink',
    'sweep': 'paper_methods Sweep sweep',
    'torchfile': 'load_torch',
    'usage': 'Uses uses_of',
    'weights': (
        'EXPERTS EXPERTS_TURNED unwrap named_as_weight match parameter_names state_names shape_of '
        'to_state_names from_state_names prunable_weights check_sparsity check_sparsities asked_for '
        'expand_sparsity is_turned_linear transposed_groups in_use check_zeros_stay normed_rows torch_pruned '
        'check_not_torch_pruned'
    ),
}


@pytest.mark.parametrize('module', PUBLIC)
def test_public_names_are_found_by_their_old_paths(module):
    old = importlib.import_module(f'fastprune.{module}')
    for name in PUBLIC[module].split():
        with pytest.warns(FutureWarning, match=rf'fastprune\.{module} has moved: fastprune\.\w+\.\w+ has it now'):
            assert getattr(old, name) is not None


def test_what_was_never_there():
    with pytest.raises(AttributeError, match="'fastprune.callback' has no attribute 'nothing'"):
        exec('from fastprune import callback; callback.nothing')
    with pytest.raises(ModuleNotFoundError, match='fastprune.nothing'):
        importlib.import_module('fastprune.nothing')


@pytest.mark.filterwarnings('ignore')
def test_an_exported_learner_of_the_flat_package():
    "Its callback, criterion, schedule, masks and data are pickled by their old paths"
    learn = load_learner(Path(__file__).parent / 'data' / 'export_of_the_flat_package.pkl')
    assert isinstance(learn.sparsify, SparsifyCallback) and learn.sparsify.sparsity == 0.8
    assert learn.masks.n_kept == 81
    assert learn.model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert all(not p[~learn.masks[n]].any() for n, p in learn.model.named_parameters() if n in learn.masks)
