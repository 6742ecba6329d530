"The benchmark beside other engines: its table and targets, and an engine's process"

import sys
from pathlib import Path

import pytest

benchmarks = Path(__file__).resolve().parents[1] / 'benchmarks'


@pytest.fixture(scope='module', autouse=True)
def importable():
    "Modules of benchmarks can be imported; those of papers' benchmarks have the same names, and stay what they are"
    names = [f.stem for f in benchmarks.glob('*.py')]
    others = {n: sys.modules.pop(n) for n in names if n in sys.modules}
    sys.path.insert(0, str(benchmarks))
    yield
    sys.path.remove(str(benchmarks))
    for n in names:
        sys.modules.pop(n, None)
    sys.modules.update(others)


TIMES = {  # (sparsity, batch) -> ms
    (0.9, 1): {'sparse_inference': 8, 'sparse_inference bf16': 4, 'OpenVINO': 5, 'DeepSparse': 4},
    (0.9, 16): {'sparse_inference': 3, 'sparse_inference bf16': 6, 'OpenVINO': 2, 'DeepSparse': 4.5},
}


@pytest.fixture
def rows(tmp_path):
    import common
    import pandas as pd

    made = common.Rows('inference_peers', folder=tmp_path)
    for (sparsity, batch), times in TIMES.items():
        of = dict(network='MLP', sparsity=sparsity, batch=batch)
        made.add(**of, side='torch.compile', note='no compiler')
        for side, ms in times.items():
            note = f'{side.lower()} 1.0, f32'
            made.add(**of, side=side, ms=99, note='old')
            made.add(**of, side=side, ms=ms, relative_difference=f'{ms}e-07', note=note)
    return pd.read_csv(tmp_path / 'inference_peers.csv', keep_default_na=False)


def test_ratios_are_of_the_fastest_of_our_precisions(rows):
    import peer_targets

    wide = peer_targets.times(rows)
    assert list(wide['ours / DeepSparse']) == [2, pytest.approx(2 / 3)]
    assert list(wide['ours / OpenVINO']) == [0.8, 1.5]
    assert wide['ours / OpenVINO float32'].isna().all()
    assert peer_targets.missing(rows) == {'torch.compile': ['no compiler']}
    assert peer_targets.versions(rows) == ['deepsparse 1.0', 'openvino 1.0']


def test_targets_count_cells(rows, monkeypatch):
    import peer_targets

    found = [answers for _, _, *answers in peer_targets.verdicts(peer_targets.times(rows))]
    assert found == [['1 of 2', 'no'], ['1 of 2', 'no'], ['2.00, 1 of 2 above', 'no']]
    monkeypatch.setattr(peer_targets, 'AHEAD', {'ours / DeepSparse': 1})
    assert next(peer_targets.verdicts(peer_targets.times(rows)))[-1] == 'yes'


def test_the_page_has_a_table_of_all_engines(rows):
    import report

    page = report.peers(rows)
    assert '| MLP | 0.9 | 1 |  |  | 8 | 4 |  |  | 5 | 4 | 2.00 |  | 0.80 |' in page
    assert 'DeepSparse 4e-07' in page
    assert 'torch.compile has no times: no compiler.' in page


def test_sides_are_those_of_the_table():
    import inference_peers
    import peer_targets

    assert tuple(inference_peers.ENGINES) == peer_targets.SIDES
    assert set(inference_peers.ENVIRONMENTS) == set(peer_targets.SIDES[4:])


def test_an_engine_answers_and_reports_errors(tmp_path):
    import inference_peers
    import numpy as np
    import torch

    model, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    torch.save(model, tmp_path / 'm.pt')
    np.save(tmp_path / 'x.npy', x.numpy())
    case = dict(model=str(tmp_path / 'm.pt'), x=str(tmp_path / 'x.npy'), y=str(tmp_path / 'y.npy'))
    with open(tmp_path / 'log.txt', 'w') as log:
        side = inference_peers.Side('as it was', tmp_path, log)
        try:
            assert side.ask(120, case=case)['note'].startswith('torch ')
            assert len(side.turn(0.01, 1)['ms']) >= 2
            with pytest.raises(RuntimeError, match='FileNotFoundError'):
                side.ask(120, case=dict(case, model='nowhere.pt'))
        finally:
            side.stop()
    np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), model(x).detach().numpy(), rtol=1e-5)
    with pytest.raises(FileNotFoundError, match='peers.sh'):
        inference_peers.Side('DeepSparse', tmp_path, None).ask(1, case=case)
