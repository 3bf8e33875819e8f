"""One small scripted dataset for all tests of this folder: making it is the slow part."""

from pathlib import Path

import pytest

from grasp_cube.training.scripted_dataset import ScriptedDatasetConfig, make_scripted_dataset


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes with 48x64 cameras."""
    root = tmp_path_factory.mktemp("scripted") / "lift"
    return make_scripted_dataset(ScriptedDatasetConfig(str(root), episodes=2, image_size="48x64"))
