import warnings

import pytest
import torch

# Tiny models: threads would cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        torch.manual_seed(0)
        yield
