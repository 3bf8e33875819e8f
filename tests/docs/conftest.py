"""Where the documents are followed: in this checkout, and from wheels alone."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from walkthrough import Place, from_wheels, from_workspace


@pytest.fixture(
    params=["workspace", pytest.param("wheels", marks=pytest.mark.slow)],
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder beside an installation of this project."""
    if request.param == "workspace":
        return from_workspace(tmp_path)
    return from_wheels(tmp_path, "packages/env-client", "packages/numpy-policy", ".")
