"Fixtures of the tests of graphs"

import pytest
import torch


@pytest.fixture
def seeded_and_without_gradients():
    number = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(number)
