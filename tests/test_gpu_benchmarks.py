"The scripts that measure on a GPU, tried on a CPU: tables by device, targets, and all stages with small sizes"

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
benchmarks = root / 'benchmarks'


@pytest.fixture(scope='module', autouse=True)
def importable():
    sys.path.insert(0, str(benchmarks))
    yield
    sys.path.remove(str(benchmarks))


def rows_of(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def test_a_row_replaces_only_rows_of_its_device(tmp_path, monkeypatch):
    import common

    monkeypatch.setattr(common, 'device_name', lambda device: {'cuda': 'H200'}.get(device, device))
    for device, ms in (('cpu', 1), ('cuda', 2), ('cpu', 3)):
        common.Rows('mask_update', device, tmp_path).add(network='a', scores='dense', scope='local', side='b', ms=ms)
    common.Rows('mask_update', 'cuda', tmp_path).add(network='a', scores='dense', scope='global', side='b', ms=4)
    found = [(r['device'], r['scope'], r['ms']) for r in rows_of(tmp_path / 'mask_update.csv')]
    assert found == [('H200', 'local', '2'), ('cpu', 'local', '3'), ('H200', 'global', '4')]
    common.write('mask_update', [dict(network='c', ms=5)], folder=tmp_path)
    found = [(r['device'], r['network'], r['ms']) for r in rows_of(tmp_path / 'mask_update.csv')]
    assert found == [('H200', 'a', '2'), ('H200', 'a', '4'), ('cpu', 'c', '5')]


def test_every_table_names_the_device_of_its_rows():
    import common

    for name in set(common.KEYS) - {'checks', 'tuning'}:
        rows = rows_of(benchmarks / f'{name}.csv')
        assert all(r['device'] for r in rows), name
        assert rows[0].keys() >= set(common.KEYS[name]), name


def test_targets_are_met_missed_or_not_measured(tmp_path):
    import common
    import gpu_targets

    of = dict(network='resnet50', side='a step of the engine', device='H200')
    rows = [dict(of, scores=s, scope='local', ms=ms) for s, ms in (('dense', 0.8), ('90% zeros', 0.9))]
    common.write_rows(tmp_path / 'mask_update.csv', [*rows, dict(of, scores='dense', scope='global', ms=1.2)])
    found = {what: (limit, *answers) for what, limit, *answers in gpu_targets.verdicts(tmp_path)}
    assert found['one update of ResNet-50, local: a step of the engine'] == ('1 ms', '0.9 ms, met')
    assert found['one update of ResNet-50, global: a step of the engine'] == ('1 ms', '1.2 ms, missed')
    assert found['masks of a billion weights, global'] == ('20 ms', 'not measured')


def test_the_targets_are_of_what_is_measured():
    import gpu_targets
    import mask_update
    import overhead

    assert set(gpu_targets.LIMITS) == set(overhead.GPU_SETUPS)
    networks = {t.rows['network'] for t in gpu_targets.TARGETS if t.table == 'mask_update'}
    assert networks <= set(mask_update.GPU_NETWORKS)
    sides = {t.rows['side'] for t in gpu_targets.TARGETS if t.table == 'overhead'}
    assert sides <= set(overhead.every_side())


def is_running(pid):
    "Not ended, nor waiting for its parent to notice that"
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc')
def test_a_part_of_a_stage_ends_with_all_that_it_has_started(tmp_path, monkeypatch):
    from gpu_stages import run as stages

    script, pid = tmp_path / 'sleeps.py', tmp_path / 'pid'
    script.write_text(
        'import pathlib, subprocess, time\n'
        f"pathlib.Path({str(pid)!r}).write_text(str(subprocess.Popen(['sleep', '60']).pid))\n"
        'time.sleep(60)\n'
    )
    start = subprocess.Popen
    monkeypatch.setattr(stages, 'LEAST', 0)
    monkeypatch.setattr(stages.subprocess, 'Popen', lambda cmd, **kwargs: start([cmd[0], str(script)], **kwargs))
    stages.Run('cpu', True, str(tmp_path)).stage('sleeps', 0.0)
    (row,) = rows_of(tmp_path / 'checks.csv')
    assert row['case'] == 'sleeps' and row['result'] == 'FAILED: its time is up'
    ends = time.monotonic() + 10  # a signal takes a moment
    while is_running(pid.read_text()) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not is_running(pid.read_text())


def test_parts_share_the_time_that_is_left(monkeypatch):
    from gpu_stages import PARTS, STAGES
    from gpu_stages import run as stages

    shares = []
    monkeypatch.setattr(stages.Run, 'left', 90.0)
    monkeypatch.setattr(stages.Run, 'stage', lambda self, name, seconds: shares.append((name, seconds)))
    STAGES['deploy'](stages.Run('cpu', True, '.'))
    assert shares == [*zip(PARTS, (30.0, 45.0, 90.0), strict=True)]


def test_methods_without_time_are_left_out_as_soon_as_that_is_known(monkeypatch):
    monkeypatch.syspath_prepend(str(benchmarks / 'paper'))
    import gpu_tables

    now, left = [0.0], []
    monkeypatch.setattr(gpu_tables.time, 'monotonic', lambda: now[0])
    trainings = {(m, seed): f'{m} {seed}' for m in ('one-shot', 'gradual', 'cyclical') for seed in (0, 1)}
    running = [*trainings.values()]
    report = gpu_tables.Report(trainings, running, gpu_tables.Sizes(cycle=20), limit=450.0)
    report.add = lambda *args: now.__setitem__(0, now[0] + 1)  # its time is not a training's
    for epoch in range(22):
        now[0] += (1.0 if epoch < 9 else 2.0) * len(trainings)  # from the tenth epoch on, it goes slower
        report(epoch)
        left.append(len({name for name, _ in trainings}))
    assert left == [3] * 3 + [2] * 7 + [1] * 12 and running == ['one-shot 0', 'one-shot 1']


def run(tmp_path, stages, wheels=('torch-1-py3-none-any.whl',)):
    "Run `gpu.sh --cpu`, with wheels of nothing that is missing"
    folder, out = tmp_path / 'wheels', tmp_path / 'out'
    folder.mkdir()
    for name in wheels:
        (folder / name).touch()
    env = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', **stages}
    cmd = ['bash', str(benchmarks / 'gpu.sh'), '--cpu', str(folder), str(out)]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.mark.slow
def test_a_stage_fails_alone_and_rows_come_as_they_are_measured(tmp_path):
    said, out = run(tmp_path, {'STAGES': 'nothing:60+billion:60'})
    ended = {r['case']: r['result'] for r in rows_of(out / 'checks.csv') if r['stage'] == 'stages'}
    assert ended['billion'] == 'ended' and ended['nothing'].startswith('FAILED: KeyError')
    assert len(rows_of(out / 'mask_update_growth.csv')) == 4
    assert 'nothing: exit code 1' in said and 'masks of a billion weights' in said


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path):
    said, out = run(tmp_path, {'DEADLINE': '580'})
    ended = {r['case']: r['result'] for r in rows_of(out / 'checks.csv') if r['stage'] == 'stages'}
    import gpu_stages

    asked_for = {'semi', 'rounds', 'paper'}  # by STAGES alone
    assert ended == dict.fromkeys(set(gpu_stages.STAGES) - asked_for, 'ended'), said
    assert len(list(out.iterdir())) <= 8  # as many files as the machine gives back


@pytest.mark.slow
def test_a_papers_table_is_filled_side_by_side(tmp_path):
    said, out = run(tmp_path, {'STAGES': 'rounds:60 paper:120'})
    ended = {r['case']: r['result'] for r in rows_of(out / 'checks.csv') if r['stage'] == 'stages'}
    assert ended == {'rounds': 'ended', 'paper': 'ended'}, said
    rows = rows_of(out / 'results.csv')
    found = {r['method'] for r in rows if r['what'] == 'accuracy'}
    assert found == {'dense', 'one-shot', 'gradual', 'cyclical'}
    zeros = {float(r['value']) for r in rows if r['what'] == 'sparsity' and r['method'] != 'dense'}
    assert len(zeros) == 1 and abs(zeros.pop() - 0.99) < 0.001
    assert {r['step'] for r in rows if r['what'] == 'mask distance'} == set('12345')
