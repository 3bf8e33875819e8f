"""The images: built, started, asked and measured. Needs podman and minutes; without it, the reason is told."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from containers import Engine, missing_tools
from processes import ROOT, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        os.environ.get("GRASP_CUBE_CONTAINERS") != "1",
        reason="building images takes 15 GB and more minutes than CI has: GRASP_CUBE_CONTAINERS=1 runs it",
    ),
    pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools())),
]

# What the issue of the image's size allows, in bytes, uncompressed.
MAX_BYTES = 5e9

OPENPI_CLIENT = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
client = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]))
image = np.zeros((480, 640, 3), np.uint8)
reply = client.infer({"images": {"front": image, "wrist": image}, "states": {"arm": np.zeros(6, np.float32)}})
print(reply["actions"].shape, np.isfinite(reply["actions"]).all())
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("containers") / "engine")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server_image(engine) -> str:
    size = engine.build("Dockerfile.diffusion", "grasp-cube")
    print(f"\ngrasp-cube: {size / 1e9:.2f} GB uncompressed")
    assert size < MAX_BYTES
    return "grasp-cube"


@pytest.fixture(scope="module")
def robot_image(engine) -> str:
    size = engine.build("Dockerfile.robot", "grasp-cube-robot")
    print(f"\ngrasp-cube-robot: {size / 1e9:.2f} GB uncompressed")
    return "grasp-cube-robot"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_the_server_image_answers_its_clients(engine, server_image, robot_image, tmp_path):
    """Without any volume: the shipped checkpoint, by the openpi client, the fake client, and the robot image's."""
    port = free_port()
    started = time.monotonic()
    with engine.container(server_image, DEVICE="cpu", PORT=str(port)) as (server, name):
        server.wait_for("Waiting for client connections", 600)
        listening = time.monotonic() - started
        openpi = subprocess.run(
            [sys.executable, "-c", OPENPI_CLIENT, str(port)], capture_output=True, text=True, timeout=120
        )
        assert openpi.returncode == 0, openpi.stderr
        assert openpi.stdout.split("\n")[0] == "(50, 6) True"
        print(
            f"\nstart to listening {listening:.1f} s, to the first answer {time.monotonic() - started:.1f} s"
        )

        assert engine.podman("exec", name, "id", "-u") == "1000"
        # The first process is the server itself, not a shell that would keep signals from it.
        assert "serve_policy" in engine.podman("exec", name, "cat", "/proc/1/cmdline")
        # What a timer does where there is systemd; fails when the check does.
        engine.podman("healthcheck", "run", name)
        state = json.loads(engine.podman("container", "inspect", name))[0]["State"]
        assert (state.get("Health") or state["Healthcheck"])["Status"] == "healthy"

        fake = ("run_fake_env_client", "--fast", "--episodes", "0", "--port", str(port), "--env.dataset-path")
        command = [sys.executable, "-m", f"env_client.{fake[0]}", *fake[1:], ROOT / "datasets" / "lift"]
        with running(*command, "--output-dir", tmp_path / "fake") as client:
            client.wait_for("Connected!")
            assert client.process.wait(300) == 0, client.output
        summary = json.loads((tmp_path / "fake" / "summary.json").read_text())
        assert summary

        # The image's user is not the one whose recordings these are, and encoders write files for their owner only.
        shutil.copytree(ROOT / "datasets" / "lift", tmp_path / "lift", copy_function=shutil.copyfile)
        volume = ("--volume", f"{tmp_path / 'lift'}:/datasets/lift:ro")
        with running(*engine.command(robot_image, *fake, "/datasets/lift", options=volume)) as client:
            client.wait_for("Connected!", 120)
            assert client.process.wait(300) == 0, client.output

        # SIGTERM; after docker's default of ten seconds it would be SIGKILL, and 137 the exit code.
        told = time.monotonic()
        engine.podman("stop", "--time", "10", name)
        assert server.process.wait(60) == 0
        print(f"stop to the end {time.monotonic() - told:.1f} s")
        server.wait_for(r"Stopped\.")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TASK": "fold"}, "'fold' is not one of the tasks in configs/tasks (lift, sort, stack)"),
        ({"PORT": "abc"}, "PORT is 'abc'; a number from 1 to 65535 was expected"),
        ({"MODEL_PATH": "/checkpoints", "DEVICE": "cpu"}, "the folder /checkpoints holds no config.json"),
        ({"MODEL_PATH": "/checkpoints/mine"}, "which is not in the container"),
        ({}, "the device 'cuda' is not available"),
    ],
)
def test_a_wrong_value_ends_the_container_with_one_line(engine, server_image, variables, words):
    done = subprocess.run(
        engine.command(server_image, **variables), capture_output=True, text=True, timeout=300
    )
    if not variables and "Waiting for" in done.stdout:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if "level=" not in line]
    print(f"\n{variables}: {lines}")
    assert len(lines) == 1
    assert words in lines[0]


def test_the_robot_image_needs_no_torch(engine, robot_image):
    done = subprocess.run(
        engine.command(
            robot_image, "python3", "-c", "import env_client.rollout, env_client.envs.astribot, torch"
        ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "No module named 'torch'" in done.stderr
    shown = subprocess.run(engine.command(robot_image), capture_output=True, text=True, timeout=120)
    assert "--env.type" in shown.stdout


@pytest.mark.skipif(
    "GRASP_CUBE_ALL_IMAGES" not in os.environ, reason="GRASP_CUBE_ALL_IMAGES=1 builds this one as well"
)
def test_the_image_for_lerobots_arms(engine):
    """Larger than the server's, since LeRobot's drivers bring torch along."""
    size = engine.build("Dockerfile.robot", "grasp-cube-so101", ROBOT="so101")
    print(f"\ngrasp-cube-so101: {size / 1e9:.2f} GB uncompressed")
    done = subprocess.run(
        engine.command(
            "grasp-cube-so101", "python3", "-c", "import lerobot.robots.so_follower as m; print(m)"
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
