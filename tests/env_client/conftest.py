"""What the tests of the robot side share."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets that LeRobot wrote, each with what LeRobot's reader gives for it (`NAME.npz`)."""
    folder = tmp_path_factory.mktemp("datasets")
    script = Path(__file__).parent / "make_datasets.py"
    made = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return folder
