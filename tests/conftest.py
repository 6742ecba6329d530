import os

os.environ['MPLBACKEND'] = 'agg'
os.environ['OMP_NUM_THREADS'] = '1'  # the tests run on as many processes as there are cores

import pytest
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from hypothesis import settings

from fastprune.all import digits_convnet, digits_dls

settings.register_profile('fastprune', deadline=None, max_examples=40, derandomize=True)
settings.load_profile('fastprune')


@pytest.fixture
def learner(tmp_path):
    "Makes Learners on digits; keyword arguments go to `Learner`"

    def make(model=None, bs=64, **kwargs):
        set_seed(42, reproducible=True)
        kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path) | kwargs
        return Learner(digits_dls(bs=bs), digits_convnet(widths=(8, 16, 16)) if model is None else model, **kwargs)

    return make


@pytest.fixture
def fit():
    "Fits without table or bar"

    def run(learn, n=1, lr=1e-2, how='fit', **kwargs):
        with learn.no_bar(), learn.no_logging():
            getattr(learn, how)(n, lr, **kwargs)
        return learn

    return run


LONG = ('[tutorials/', '[training/callback]', 'test_ray_', 'test_sharded', 'test_distributed', 'test_cli.py')


def pytest_collection_modifyitems(items):
    "Long tests first, so that no process is left alone with one at the end"
    items.sort(key=lambda item: not any(part in item.nodeid for part in LONG))
