import os
import tempfile

from hub_server import TOKEN, HubServer

# What people have set for their own work must not decide how tests end: offline modes, caches, tokens, the settings of
# Accelerate and of a launcher. Before anything imports huggingface_hub, which reads its variables once.
FOREIGN = ("ACCELERATE_", "DATASETS_", "FSDP_", "GRADIO_", "HF_", "HUGGING", "MPL", "PEFT_", "TRANSFORMERS_", "TORCH")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONWARNINGS")
for variable in list(os.environ):
    if variable.startswith(FOREIGN) or variable in LAUNCHER:
        del os.environ[variable]

# No test can reach the real Hub.
HUB = HubServer()
HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HOME.name,
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

# Tiny models: threads would cost more than they give.
torch.set_num_threads(1)

# The same examples on every run; `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _dots_for_pictures(request, monkeypatch):
    """A dot in place of the ticket's picture, which takes half a second, except where a test asks for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("sfa_peft.hub.card.draw_ticket", lambda ticket, path: Image.new("RGB", (1, 1)).save(path))


@pytest.fixture(autouse=True)
def _streams_end_at_once(monkeypatch):
    """Datasets waits 5 seconds at the end of each pass over a stream of parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def pictures():
    """The real pictures of tickets in model cards."""


@pytest.fixture
def hub():
    """An empty Hub on loopback."""
    HUB.reset()
    return HUB
