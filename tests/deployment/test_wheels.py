"""Released packages: they build, and install from their wheels into an empty environment, far from this checkout."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from numpy_policy import write_checkpoint
from processes import ROOT, running
from serving_parts import CAMERAS, client, make_observation

pytestmark = pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")

# What the robot side needs on an Astribot, which LeRobot's arms do not: no torch.
ROBOT_EXTRAS = "astribot,dataset,panel,record,viz"
WITHOUT_TORCH = """
import json, sys
import env_client, env_client.websocket_client_policy, env_client.rollout
from env_client.cli import find_config_file
names = ("tasks/lift", "embodiments/astribot_s1_22", "robots/so101", "cameras/so101.json")
files = [str(find_config_file(name)) for name in names]
print(json.dumps({"files": files, "heavy": sorted({"torch", "lerobot", "grasp_cube"} & set(sys.modules))}))
"""


def uv(*arguments: object) -> str:
    """What uv says, in the project's own resolution: the day that pyproject.toml names."""
    done = subprocess.run(
        ["uv", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        # An active environment is not the one that is meant.
        env={name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Environment:
    """A virtual environment of wheels, and commands in it that see nothing of the checkout."""

    def __init__(self, folder: Path, *wheels: object):
        self.bin, self.cwd = folder / "environment" / "bin", folder / "elsewhere"
        self.cwd.mkdir(parents=True)
        uv("venv", "--quiet", "--python", "3.12", folder / "environment")
        uv("pip", "install", "--quiet", "--python", self.bin / "python", *wheels)

    def run(self, command: str, *arguments: str) -> str:
        done = subprocess.run(
            [self.bin / command, *arguments], cwd=self.cwd, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """A wheel of each package, each built from its source archive."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--all-packages", "--out-dir", folder)
    found = {file.name.partition("-")[0]: file for file in folder.glob("*.whl")}
    assert len(list(folder.glob("*.tar.gz"))) == len(found)
    assert {"env_client", "grasp_cube", "numpy_policy", "virtual_astribot", "virtual_so101"} <= found.keys()
    return found


@pytest.fixture
def environment_folder(tmp_path) -> Iterator[Path]:
    """Gigabytes of it are not kept for the next three runs."""
    yield tmp_path / "environment"
    shutil.rmtree(tmp_path / "environment")


def test_the_client_installs_by_itself(wheels, environment_folder):
    """Without torch and without a server; the default configs come with it."""
    environment = Environment(environment_folder, wheels["env_client"])
    told = json.loads(environment.run("python", "-c", WITHOUT_TORCH))
    assert told["heavy"] == []
    assert all("site-packages/env_client/configs" in file for file in told["files"])
    for command in ("run_env_client", "run_fake_env_client", "check_robot"):
        assert "--host" in environment.run(command, "--help") or command == "check_robot"
    listed = uv("pip", "list", "--python", environment.bin / "python")
    assert "torch" not in listed
    assert "lerobot" not in listed


@pytest.mark.parametrize("platform", ["aarch64-manylinux_2_28", "x86_64-manylinux_2_28"])
def test_the_client_installs_on_a_robots_computer(wheels, platform, tmp_path):
    """By its metadata: everything that an Astribot's side needs is there as a wheel for the platform."""
    said = uv(
        *("pip", "install", "--dry-run", "--python-version", "3.12", "--python-platform", platform),
        *("--only-binary", ":all:", "--target", str(tmp_path), f"{wheels['env_client']}[{ROBOT_EXTRAS}]"),
    )
    assert "Would install" in said
    assert "opencv-python-headless" in said
    assert "torch" not in said


@pytest.mark.slow
def test_the_server_installs_and_serves(wheels, environment_folder):
    """A checkpoint that a plug-in serves and the shipped one, both by commands from wheels."""
    environment = Environment(environment_folder, *wheels.values())
    assert "--policy.path" in environment.run("serve_policy", "--help")
    quick = write_checkpoint(environment.cwd / "quick", cameras=CAMERAS)
    for checkpoint, flags in ((quick, ()), (ROOT / "checkpoints" / "lift_act", ("--task", "lift"))):
        command = (environment.bin / "serve_policy", "--policy.path", checkpoint, "--device", "cpu", *flags)
        with running(*command, "--host", "127.0.0.1", "--port", "0", cwd=environment.cwd) as server:
            port = int(server.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)", 200)[1])
            policy = client(port)
            assert policy.infer(make_observation())["action"].shape[1] == 6
            policy.close()
