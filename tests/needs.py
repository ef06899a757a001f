"""What a test needs of the installed libraries, where the oldest that are admitted do not have it."""

import pytest
import torch
from packaging.version import Version


def torch_since(lowest, why):
    """Skip a test with an older torch. `why` says what does not work there."""
    return pytest.mark.skipif(Version(torch.__version__) < Version(lowest), reason=f"torch before {lowest}: {why}")
