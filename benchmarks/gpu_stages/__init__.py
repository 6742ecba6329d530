"The stages of gpu.py, by name. They are imported when they run, so that a broken one stops no other"

from importlib import import_module


def _updates(run):
    from mask_update import GPU_NETWORKS, SMALL_NETWORKS, updates_on

    updates_on(run.device, SMALL_NETWORKS if run.small else GPU_NETWORKS, 1 if run.small else 9, run.out)


def _billion(run):
    from mask_update import billion_on

    billion_on(run.device, 32 if run.small else 2048, 2 if run.small else 5, run.out)


def _overhead(run):
    from overhead import GPU_SETUPS, SMALL_SETUPS, measure

    setups = SMALL_SETUPS if run.small else GPU_SETUPS
    measure(run.device, setups, 1 if run.small else 5, run.out, lambda: run.left)


def _two_of_four(run):
    from inference import semi_structured_on

    semi_structured_on(run.device, 64 if run.small else 4096, [8] if run.small else [64, 1024, 8192], run.out)


def _linear_layers(run):
    from inference import unstructured_on

    if run.small:
        return unstructured_on(run.device, ['MLP'], [0.9], [1], 0.1, run.out)
    unstructured_on(run.device, ['MLP 4096-16384-4096'], [0.5, 0.9], [1, 8, 32], 0.5, run.out)


def _networks(run):
    from inference import unstructured_on

    if not run.small:
        unstructured_on(run.device, ['resnet50', 'Transformer encoder'], [0.9], [1, 32], 0.5, run.out)


PARTS = {'deploy_linear': _linear_layers, 'deploy_networks': _networks, 'deploy_2_of_4': _two_of_four}


def _deploy(run):
    "Each part in a process of its own: after some errors a process can't use its GPU any more. They share the time"
    for i, part in enumerate(PARTS):
        run.stage(part, run.left / (len(PARTS) - i))


def _of(module, name):
    return lambda run: getattr(import_module(f'gpu_stages.{module}'), name)(run)


STAGES = {
    'env': _of('env', 'env'),
    'exact': _of('exact', 'exact'),
    'syncs': _of('syncs', 'syncs'),
    'updates': _updates,
    'overhead': _overhead,
    'billion': _billion,
    'tests': _of('suite', 'suite'),
    'deploy': _deploy,
    **PARTS,
    'semi': _of('semi', 'semi'),
    'skinny': _of('skinny', 'skinny'),
    'recipes': _of('recipes', 'recipes'),
    'precision': _of('precision', 'precision'),
    'tuning': _of('tuning', 'tuning'),
    'rounds': _of('paper', 'rounds'),
    'paper': _of('paper', 'paper'),
}
