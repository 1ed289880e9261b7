import os


# No test may depend on a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


collect_ignore = ["mutation.py"]  # needs cosmic-ray, for which the suite does not ask


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Every test compiles from nothing: Dynamo's recompile limit counts over the whole process."""
    yield
    torch.compiler.reset()
