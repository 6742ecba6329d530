"Modules and README come from the notebooks; importing is light; every notebook runs"

import ast
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

root = Path(__file__).parent.parent
by_hand = ('all.py', 'files.py', 'moved.py')
notebooks = sorted(p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def named(nb):
    return nb.relative_to(root / 'nbs').with_suffix('').as_posix()


def run(*cmd, cwd=root):
    return subprocess.run([str(c) for c in cmd], capture_output=True, text=True, cwd=cwd)


def tree(path):
    return ast.dump(ast.parse(path.read_text(encoding='utf-8')))


def test_modules_are_exported_from_the_notebooks(tmp_path):
    for name in ('nbs', 'fastprune'):
        shutil.copytree(
            root / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
        )
    shutil.copy(root / 'pyproject.toml', tmp_path)
    made = {p.relative_to(tmp_path) for p in (tmp_path / 'fastprune').rglob('*.py')}
    made -= {Path('fastprune') / p for p in by_hand} | {p for p in made if p.name == '__init__.py'}
    for p in made:
        (tmp_path / p).unlink()
    r = run(sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    for p in made:
        assert (tmp_path / p).exists(), f'{p} has no notebook'
        same = (tmp_path / p).read_bytes() == (root / p).read_bytes()
        assert same or tree(tmp_path / p) == tree(root / p), f'{p} differs from its notebook: run nbdev-export'
    assert {p.relative_to(tmp_path) for p in (tmp_path / 'fastprune').rglob('*.py')} == {
        p.relative_to(root) for p in (root / 'fastprune').rglob('*.py') if '__pycache__' not in p.parts
    }


def test_readme_is_made_from_its_notebook(tmp_path):
    runpy.run_path(str(root / 'scripts' / 'addresses.py'))['write_readme'](tmp_path)
    assert (tmp_path / 'README.md').read_text() == (root / 'README.md').read_text()
    pictures = sorted(p.name for p in (tmp_path / 'README_files').iterdir())
    assert pictures == sorted(p.name for p in (root / 'README_files').iterdir())
    for name in pictures:
        assert (tmp_path / 'README_files' / name).read_bytes() == (root / 'README_files' / name).read_bytes()


def test_import_is_light():
    code = (
        "import sys, fastprune; assert not {'torch', 'fastai', 'numpy', 'pandas', 'matplotlib'} & "
        "set(sys.modules); assert fastprune.__version__"
    )
    r = run(sys.executable, '-c', code)
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize('nb', notebooks, ids=named)
def test_notebook_is_committed_clean(nb):
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    assert all(c['metadata'] == {} for c in cells)
    outputs = [o for c in cells if c['cell_type'] == 'code' for o in c['outputs']]
    if nb.stem == 'index' or nb.parent.name in ('tutorials', 'cookbook'):
        assert outputs, 'committed without outputs'
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert nb.stat().st_size < 300_000


slow = {
    '01_one_cycle_pruning',
    '04_cyclical_pruning',
    '05_s_cyc',
    '06_budgeted',
    '07_lottery_tickets',
    '08_stability',
    '09_sparse_from_the_start',
    '10_sculpt',
    '11_why_cycles',
    '12_baselines',
    '13_many_machines',
    '14_small_and_fast',
    '15_your_own_method',
    '16_channels',
    '18_ocp_ramp',
}  # some up to a quarter of an hour, or `torchrun`: by hand, with `pytest -m slow`


less = {
    'seconds=1': 'seconds=0.1',
    'seconds=2': 'seconds=0.2',
    'for seed in range(3)': 'for seed in range(1)',
    'digits_dls(size=32, channels=3)': 'digits_dls(size=32, channels=3, valid_pct=0.1, test_pct=0.8)',
    'digits_dls(size=16, channels=3)': 'digits_dls(size=16, channels=3, valid_pct=0.1, test_pct=0.8)',
    'dls = digits_dls(size=16)': 'dls = digits_dls(size=16, valid_pct=0.1, test_pct=0.8)',
    'dls = digits_dls()': 'dls = digits_dls(valid_pct=0.1, test_pct=0.6)',
    'learn = Learner(digits_dls(), digits_convnet(), loss_func=nn': 'learn = Learner(digits_dls(test_pct=0.6), '
    'digits_convnet(), loss_func=nn',
    'return Learner(digits_dls(), digits_convnet(), ': 'return Learner(digits_dls(valid_pct=0.1, test_pct=0.6), '
    'digits_convnet(), ',
    'return Learner(digits_dls(), model or': 'return Learner(digits_dls(bs=32, valid_pct=0.2, test_pct=0.4), model or',
    'pixels[:360]': 'pixels[:90]',
    'range(2000)': 'range(600)',
    '(0.3, 1, 3, 10, 100), (None, 0.1, 0.2, 0.3, 0.5)': '(0.3, 3, 100), (None, 0.3)',
    'text_learner(seed), 6,': 'text_learner(seed), 1,',
    'fit(learn, 6,': 'fit(learn, 1,',
    'fit(6, 2e-3,': 'fit(2, 2e-3,',
    'fit(20, 2e-3,': 'fit(5, 2e-3,',
    'fine_tune(3, 0.01': 'fine_tune(1, 0.01',
    'fine_tune(4, 0.01': 'fine_tune(1, 0.01',
    'fine_tune(5, 0.01': 'fine_tune(1, 0.01',
    'fit_one_cycle(4, 0.01': 'fit_one_cycle(1, 0.01',
    'fit_one_cycle(4, 3e-3': 'fit_one_cycle(1, 3e-3',
    'fit_one_cycle(5, 0.01, cbs=SparsifyCallback(': 'fit_one_cycle(1, 0.01, cbs=SparsifyCallback(',
    'fit_one_cycle(6, 0.01': 'fit_one_cycle(1, 0.01',
    "for recover in (True, 'alive', False)": "for recover in (True, 'alive')",
    'for sparsity in (0.9, 0.95):': 'for sparsity in (0.9,):',
    'def fit(learn, cbs):\n    learn.fit_one_cycle(5, 0.1': 'def fit(learn, cbs):\n    learn.fit_one_cycle(2, 0.1',
    'learn.fit_one_cycle(3, 1e-2': 'learn.fit_one_cycle(1, 1e-2',
    'fit_cyclical(3, 6,': 'fit_cyclical(3, 2,',
    'n = 6 * len': 'n = 2 * len',
    'fit_sculpt(0.9, 0.6, 2, 4,': 'fit_sculpt(0.9, 0.6, 2, 1,',
    'n = 4 * len': 'n = 1 * len',
    'fit_one_cycle(8, 1e-2, cbs=cb)': 'fit_one_cycle(2, 1e-2, cbs=cb)',
    'learn.iterative_prune(6, 3,': 'learn.iterative_prune(6, 1,',
    "'60 steps', learn.find_tickets": "'24 steps', learn.find_tickets",
    '[0, 12, 36, 60]': '[0, 60]',
    "['ocp', 'agp', 'snip', 'lrr', 'sculpt']": "['ocp', 'lrr']",
    '(1, 2, 3), (1, 2, 4), 0.95, seeds=(0, 1)': '(1, 2), (1, 2), 0.95, seeds=(0, 1)',
    'test_eq(len(runs), 18)': 'test_eq(len(runs), 8)',
    'reached, 0.8, 1e-3, 1.0, tol=0.02': 'reached, 0.8, 1e-3, 1.0, tol=0.1',
    "learn.plane(learn, *others, bn='recalibrate'": "learn.plane(learn, *others, 5, bn='recalibrate'",
    'drawn.losses.shape, (15, 15)': 'drawn.losses.shape, (5, 5)',
    "[sizes(dense, 'dense'), sizes(learn": '[sizes(learn',
    'seeds=((0, 1), (2, 3)))\ntest_eq((same': 'seeds=((0, 1),))\ntest_eq((same',
    'stability.step == 60]), [0, 0])': 'stability.step == 60]), [0])',
    'for k in (0, 300)': 'for k in (0, 60)',
    'learn.fit(300, float(5': 'learn.fit(60, float(5',
}  # seconds of a timing, seeds of a table, images, channels, files of images, grids, sentences, epochs, sparsities,
# and methods
running = """
import json, re, sys
from fastai.basics import defaults
from nbdev import test

class Less(test.NBProcessor):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for cell in self.nb.cells:
            for all_of_it, part in json.loads(sys.argv[2]).items():
                cell.set_source(cell.source.replace(all_of_it, part))
            if 'few' in sys.argv and not cell.source.startswith('#| export'):
                few = lambda m: f"digits_dls({m[1] or ''}{', ' * bool(m[1])}valid_pct=0.1, test_pct=0.6)"
                cell.set_source(re.sub(r'digits_dls\\((bs=\\w+)?\\)', few, cell.source))

defaults.cpus = 0  # batches are made in this process
test.NBProcessor = Less
test.nbdev_test(path=sys.argv[1], n_workers=0, flags='slow' if 'whole' in sys.argv else '')
"""


# notebooks with numbers of all digits; the others train on a third of them
all_digits = {'instability', 'paths', 'comparison', 'always_sparse', 'dense_behind', 'cyclical', 'iterative', 'lottery'}
all_digits |= {'planning', 'round_training', 'callback', 'identity', 'data'}


def run_notebook(nb, replaced, *how):
    r = python(running, nb, json.dumps(replaced), *how, folder=root, timeout=900)
    assert r.returncode == 0 and 'Success' in r.stdout, r.stderr[-4000:]


@pytest.mark.cpu_only  # its outputs and comparisons are those of a CPU
@pytest.mark.parametrize(
    'nb', [pytest.param(nb, id=named(nb), marks=[pytest.mark.slow] * (nb.stem in slow)) for nb in notebooks]
)
def test_notebook_runs(nb):
    """They train and time `less`, with the same code, but for cells with `#| slow`. Those that take minutes are whole,
    and run by hand, and so is `data`, which counts images"""
    if nb.stem in (*slow, 'data'):
        run_notebook(nb, {}, 'whole')
    else:
        few = [] if nb.stem in all_digits or nb.parent.name == 'tutorials' else ['few']
        run_notebook(nb, less, *few)


def has_more(nb):
    return nb.parent.name in ('tutorials', 'cookbook') or '"#| slow\\n"' in nb.read_text(encoding='utf-8')


@pytest.mark.slow
@pytest.mark.cpu_only
@pytest.mark.parametrize('nb', [nb for nb in notebooks if has_more(nb) and nb.stem not in slow], ids=named)
def test_whole_notebook_runs(nb):
    run_notebook(nb, {}, 'whole')
