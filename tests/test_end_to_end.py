"""The whole way: a real checkpoint, the real commands, real sockets, and LeRobot's own answer to compare with."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from env_client.websocket_client_policy import WebsocketClientPolicy
from lerobot_reference import Reference
from processes import ROOT, Running, policy_server, running
from small_checkpoints import observation, save_act, save_diffusion

SEED = 42
EXACT = ("--policy.optimize", "none", "--policy.device", "cpu")


@contextmanager
def as_many_threads_as(server: Running) -> Iterator[None]:
    """Sums of floats depend on how many threads share them: here as many as the server says that it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(server.wait_for(r"device cpu \((\d+) threads?\)")[1]))
    yield
    torch.set_num_threads(before)


def test_act_over_the_wire_equals_lerobot_in_process(tmp_path):
    """To 1e-5, for several observations in a row and for a client that sends bare observations."""
    checkpoint = save_act(tmp_path / "act")
    reference = Reference(checkpoint)
    with (
        policy_server(checkpoint, *EXACT) as (server, port),
        WebsocketClientPolicy("127.0.0.1", port) as policy,
        as_many_threads_as(server),
    ):
        for seed in range(3):
            obs = observation(seed)
            reply = policy.infer(obs)
            np.testing.assert_allclose(reply["actions"], reference.chunk(obs), atol=1e-5, rtol=0)


def test_diffusion_over_the_wire_equals_lerobot_in_process(tmp_path):
    """To 1e-5, with fixed noise and a history of two consecutive ticks in the request."""
    checkpoint = save_diffusion(tmp_path / "diffusion")
    reference = Reference(checkpoint)
    arguments = (*EXACT, "--policy.noise-seed", str(SEED))
    before, now = observation(1), observation(2)
    with (
        policy_server(checkpoint, *arguments) as (server, port),
        WebsocketClientPolicy("127.0.0.1", port) as policy,
        as_many_threads_as(server),
    ):
        assert policy.spec is not None
        assert policy.spec.n_obs_steps == 2
        chunk = policy.infer(now, history=[before])["actions"]
        np.testing.assert_allclose(chunk, reference.chunk(before, now, seed=SEED), atol=1e-5, rtol=0)
        alone = policy.infer(now)["actions"]
        np.testing.assert_allclose(alone, reference.chunk(now, now, seed=SEED), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The README's first command, run once; its output and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "grasp_cube.demo", "--fast", "--output-dir", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


def test_the_demo_serves_replays_and_shows(demo):
    """It says what it loads and that it waits, that it is connected, and a table; plots and summary lie where it says."""
    output, folder = demo
    assert "✓" in output
    assert re.search(r"Waiting for client connections at ws://127\.0\.0\.1:\d+", output)
    assert "Connected!" in output
    assert "shoulder_pan.pos" in output
    assert "p99" in output
    assert "Traceback" not in output
    assert len(list(folder.glob("episode_*_actions.png"))) == 3
    assert str(folder) in output


def test_the_shipped_checkpoint_follows_the_shipped_episodes(demo):
    """Its error is far below that of an arm that stands still."""
    summary = json.loads((demo[1] / "summary.json").read_text())
    assert summary["mean_absolute_error"] < 0.35 * summary["standing_still"]


@pytest.mark.slow
def test_the_scripts_under_their_first_paths_work_together(demo):
    """As the first documents spell them, with the task's own checkpoint."""
    real = ROOT / "grasp_cube" / "real"
    server = (sys.executable, real / "serve_act_policy.py", "--policy.task", "lift", "--device", "cpu")
    with running(*server, "--host", "127.0.0.1", "--port", "0") as serving:
        port = serving.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)")[1]
        client = (sys.executable, real / "run_fake_env_client.py", "--env.dataset-path", "datasets/lift")
        with running(
            *client,
            "--no-panel",
            "--no-enable-logging",
            "--port",
            port,
            "--fast",
            "--num-episodes",
            "1",
            "--output-dir",
            demo[1] / "real",
        ) as fake:
            fake.wait_for("Connected!")
            assert fake.process.wait(120) == 0, fake.output


def test_the_robot_side_needs_no_torch():
    """Neither its import, nor its client, nor its command's help."""
    code = (
        "import sys, env_client, env_client.wire, env_client.websocket_client_policy, env_client.control, env_client.envs\n"
        "import env_client.run_fake_env_client, env_client.run_env_client\n"
        "print([m for m in ('torch', 'lerobot', 'cv2', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
