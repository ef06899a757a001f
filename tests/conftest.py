import warnings

import pytest
import torch
from hypothesis import settings

# Tiny models: threads would cost more than they give.
torch.set_num_threads(1)

# The same examples on every run; `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        torch.manual_seed(0)
        yield
