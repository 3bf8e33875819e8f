"""The shipped recording is what the tests of this folder train on."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def recording() -> Path:
    """Three short episodes of the virtual robot, two cameras."""
    return ROOT / "datasets" / "lift"
