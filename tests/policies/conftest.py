"""The small checkpoints, made once for the whole run."""

import shutil
import sys
from pathlib import Path

import pytest

# LeRobot's wheel installs a package named `tests`, so ours cannot be imported by that name.
sys.path.insert(0, str(Path(__file__).parents[1]))

from openpi_checkpoints import SETTINGS, save_openpi
from small_checkpoints import save_act, save_diffusion


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Models this small run no faster on two threads, and far slower where the machine is busy."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def act(tmp_path_factory, one_thread) -> Path:
    """An ACT checkpoint; tests copy it before they change it."""
    return save_act(tmp_path_factory.mktemp("checkpoints") / "act")


@pytest.fixture(scope="session")
def diffusion(tmp_path_factory, one_thread) -> Path:
    """A Diffusion checkpoint with a history of two ticks; tests copy it before they change it."""
    return save_diffusion(tmp_path_factory.mktemp("checkpoints") / "diffusion")


@pytest.fixture
def broken(act, tmp_path) -> Path:
    """A copy of the ACT checkpoint that a test may damage."""
    return Path(shutil.copytree(act, tmp_path / "broken"))


@pytest.fixture(scope="session")
def made(tmp_path_factory, one_thread) -> Path:
    """pi0 (ALOHA, relative actions) and pi05 (LIBERO) in the PyTorch layout, pi0_jax as parameters, and their configs."""
    root = tmp_path_factory.mktemp("openpi")
    for name, text in SETTINGS.items():
        (root / f"{name}.yaml").write_text(text)
    save_openpi(root / "pi0", "pi0")
    save_openpi(root / "pi05", "pi05", dim=7, state_dim=8, asset_id="me/cubes")
    save_openpi(
        root / "pi05_jax", "pi05", dim=7, state_dim=8, asset_id="me/cubes", layout="jax", trained=True
    )
    return root
