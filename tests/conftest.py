import gc
import os
import sys
from collections import defaultdict
from zlib import crc32

os.environ['MPLBACKEND'] = 'agg'
os.environ['OMP_NUM_THREADS'] = '1'  # the tests run on as many processes as there are cores

import pytest
from hypothesis import settings

settings.register_profile('fastprune', deadline=None, max_examples=40, derandomize=True)
settings.load_profile('fastprune')


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='where data and models are: cpu, or cuda, cuda:1, mps')


def pytest_configure(config):
    "Chooses the device. fastai looks for a GPU when it is imported, so nothing above imports it"
    name = config.getoption('device')
    if name == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # a machine with a GPU tests what one without a GPU does
        if getattr(config.option, 'numprocesses', 0) and not hasattr(config, 'workerinput'):
            return  # this process runs no test: its workers need not wait until it has imported all that
    else:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # for the fixture `deterministic`
    import devices
    from fastai.basics import defaults

    devices.start(name)
    if name == 'cpu' and sys.platform == 'linux' and hasattr(config, 'workerinput'):  # CUDA does not survive a fork
        import processes

        processes.serve()
    defaults.cpus = 0  # data of the tests are small: by default no process is forked to make batches or tokens


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "Each test and its fixtures have the device, or the CPU if their subject is there"
    import devices

    with devices.on('cpu' if item.get_closest_marker('cpu_only') else item.config.getoption('device')):
        return (yield)


@pytest.fixture
def device():
    "Where the test's data and models are"
    import devices

    return devices.device


@pytest.fixture
def deterministic(device):
    "For tests in which two trainings have the same bits: on a GPU they have to ask for it"
    import devices

    if device.type == 'cpu':
        yield
    else:
        with devices.deterministic():
            yield


@pytest.fixture
def learner(tmp_path):
    """Makes Learners that train on 359 digits, 12 steps of 32 images in an epoch, or on 719 in steps of `bs`; `data`
    goes to `digits_dls`, other keyword arguments to `Learner`"""
    from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed

    from fastprune.all import digits_convnet, digits_dls

    def make(model=None, bs=None, data=(), **kwargs):
        set_seed(42, reproducible=True)
        kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path) | kwargs
        few = dict(bs=bs or 64, test_pct=0.4) if bs or data else dict(bs=32, valid_pct=0.1, test_pct=0.7)
        dls = digits_dls(**(few | dict(data)))
        return Learner(dls, digits_convnet(widths=(8, 16, 16)) if model is None else model, **kwargs)

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


def _sample(items):
    "Of a test with the mark `sample(n)`, all but n cases are slow: each test has others, so together they have all"
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker('sample') and not item.get_closest_marker('slow'):
            cases[item.nodeid.partition('[')[0]].append(item)
    for name, of_test in cases.items():
        n, size = of_test[0].get_closest_marker('sample').args[0], len(of_test)
        chosen = {(crc32(name.encode()) + i * size // n) % size for i in range(n)}
        for i, item in enumerate(of_test):
            if i not in chosen and size > n:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before slow ones are left out
def pytest_collection_modifyitems(items):
    "Long tests first, so that no process is left alone with one at the end"
    _sample(items)
    items.sort(key=lambda item: not any(part in item.nodeid for part in LONG))


def pytest_collection_finish():
    "Libraries and collected tests stay until the end: the garbage collector need not look at them again and again"
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
