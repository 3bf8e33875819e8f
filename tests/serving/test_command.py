"""`serve_policy` as a person types it: help, mistakes, signals."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import RemoteError
from grpc_client import MODEL_NOT_LOADED, OK, Client, compile_messages
from numpy_policy import write_checkpoint
from processes import ROOT, help_of, policy_server, running
from serving_parts import CAMERAS, client, get, make_observation, serving

SERVE = (sys.executable, "-m", "grasp_cube.serve_policy")


def refused(*arguments: object, cwd=ROOT) -> str:
    """The one line on stderr of a command that must not start."""
    # A free port unless the test names one: whoever runs the tests may have a server at 8000.
    done = subprocess.run(
        [*SERVE, "--port", "0", *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=cwd
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Waiting for client" not in done.stdout
    return lines[0]


def test_help_needs_nothing_heavy():
    """Help is answered without torch, LeRobot, OpenCV or the server's own modules."""
    said, imported = help_of("serve_policy", "torch", "lerobot", "cv2", "websockets", "pandas")
    assert "--policy.path" in said
    assert imported == []


def test_a_wrong_path_is_one_line(tmp_path):
    """The absolute path that was tried is named."""
    assert str(tmp_path / "missing") in refused("--policy.path", tmp_path / "missing")


def test_a_folder_without_config_is_one_line(tmp_path):
    """config.json is named."""
    assert "config.json" in refused("--policy.path", tmp_path)


def test_an_unknown_type_is_one_line(tmp_path):
    """The type that came and those that exist are named."""
    (tmp_path / "config.json").write_text('{"type": "telepathy"}')
    line = refused("--policy.path", tmp_path)
    assert "telepathy" in line
    assert "act" in line


def test_an_unknown_flag_is_one_line():
    """The closest flag is suggested."""
    assert "--policy.path" in refused("--policy.pth", "x")


def test_a_port_in_use_is_one_line(checkpoint):
    """Before anything is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("--policy.path", checkpoint, "--host", "127.0.0.1", "--port", port)
        assert str(port) in line
        assert "--port" in line


def test_a_port_out_of_range_is_one_line(checkpoint):
    """And a host that does not exist."""
    assert "70000" in refused("--policy.path", checkpoint, "--port", 70000)
    assert "256.1.1.1" in refused("--policy.path", checkpoint, "--host", "256.1.1.1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_running_inference(slow_checkpoint, number):
    """The client that waits still gets its chunk; the exit code is 0; nothing is printed but that it stops."""
    chunks: list[np.ndarray] = []
    with policy_server(slow_checkpoint) as (server, port), WebsocketClientPolicy("127.0.0.1", port) as policy:
        thread = threading.Thread(target=lambda: chunks.append(policy.infer(make_observation())["actions"]))
        with WebsocketClientPolicy("127.0.0.1", port) as observer:
            thread.start()
            while not observer.status()["running"]:
                pass
        assert server.end(number) == 0
        thread.join(10)
        assert [chunk.shape for chunk in chunks] == [(16, 6)]
        assert server.output.endswith("Stopped.")
        assert "Traceback" not in server.output


def test_a_signal_while_loading_ends_it(tmp_path):
    """Nobody waits for a checkpoint that nobody wants any more."""
    checkpoint = write_checkpoint(tmp_path / "loads", load_s=60)
    with running(*SERVE, "--policy.path", checkpoint, "--host", "127.0.0.1", "--port", "0") as server:
        # The handlers are in place once the port is taken, which shows in the process's sockets.
        while not _has_socket(server.process.pid):
            pass
        assert server.end(signal.SIGTERM) == 130
        assert "Stopped while loading." in server.output


def _has_socket(pid: int) -> bool:
    links = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            links.append(os.readlink(f"/proc/{pid}/fd/{number}"))
        except FileNotFoundError:
            continue
    # The event loop itself owns a pair of sockets.
    return sum(link.startswith("socket:") for link in links) >= 3


@pytest.mark.parametrize(
    ("behaviour", "sentence"), [("nan", "not finite"), ("wrong_dim", "[16, 7]"), ("raise", "log says why")]
)
def test_a_policy_that_fails_is_told_and_the_server_lives(tmp_path, behaviour, sentence):
    """No such chunk leaves the server; the traceback stays in its log; other prompts are still served."""
    checkpoint = write_checkpoint(
        tmp_path / behaviour, cameras=CAMERAS, behaviour=behaviour, behaviour_prompt="misbehave"
    )
    with policy_server(checkpoint) as (server, port), WebsocketClientPolicy("127.0.0.1", port) as policy:
        with pytest.raises(RemoteError) as caught:
            policy.infer(make_observation(), prompt="misbehave")
        assert caught.value.code == "INTERNAL"
        assert sentence in caught.value.message
        assert policy.infer(make_observation())["actions"].shape == (16, 6)
        if behaviour == "raise":
            server.wait_for("RuntimeError: numpy_test raises")


@pytest.mark.parametrize("script", ["serve_diffusion_policy.py", "serve_act_policy.py"])
def test_the_scripts_of_the_first_documents_start(script, checkpoint):
    """Under their old paths, with the old flags."""
    path = ROOT / "grasp_cube" / "real" / script
    command = (sys.executable, path, "--policy.path", checkpoint, "--device", "cpu", "--host", "127.0.0.1")
    with running(*command, "--port", "0") as server:
        server.wait_for("Waiting for client connections at ws://127.0.0.1:")
        assert server.end() == 0


def test_grpc_robots_are_served_beside_the_socket(checkpoint, tmp_path):
    """`--grpc.port` opens the gateway in front of the same policy; both give the same chunk; both ports close."""
    messages = compile_messages(tmp_path)
    with policy_server(checkpoint, "--grpc.port", "0") as (server, port):
        grpc_port = int(server.wait_for(r"gRPC robots at 127\.0\.0\.1:(\d+)")[1])
        obs = make_observation(1)
        with WebsocketClientPolicy("127.0.0.1", port) as policy, Client(grpc_port, messages) as robot:
            chunk = robot.predict_chunk(_observation(messages))
            assert chunk.status == OK, chunk.error_message
            actions = np.array([step.values for step in chunk.actions], np.float32)
            assert np.array_equal(actions, policy.infer(obs)["actions"])
        assert server.end() == 0


def test_metrics_count_what_happened(checkpoint):
    """Requests by kind, errors by code and the time histograms, in Prometheus' text format."""
    with policy_server(checkpoint) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as policy:
        policy.infer(make_observation())
        policy.infer(make_observation())
        policy.reset()
        with pytest.raises(RemoteError):
            policy.infer({"images": {}})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    for line in (
        'grasp_cube_requests_total{op="infer"} 3.0',
        'grasp_cube_requests_total{op="reset"} 1.0',
        'grasp_cube_errors_total{code="INVALID_INPUT"} 1.0',
        "grasp_cube_inference_seconds_count 2.0",
    ):
        assert line in page


def test_an_idle_server_of_both_kinds_is_configured_and_swapped_by_a_grpc_robot(tmp_path):
    """`--grpc.port` without a checkpoint: MODEL_NOT_LOADED, a failed Configure that says why, an episode, a swap; what the
    robot configures serves WebSocket clients as well, and all of it is counted."""
    messages = compile_messages(tmp_path)
    for name, horizon in (("one", 3), ("two", 4)):
        write_checkpoint(tmp_path / name, cameras=CAMERAS, horizon=horizon)
    with serving("--grpc.port", "0", "--policy.root", tmp_path) as (server, port):
        grpc_port = int(server.wait_for(r"gRPC robots at 127\.0\.0\.1:(\d+)")[1])
        with Client(grpc_port, messages) as robot, client(port) as early:
            obs = _observation(messages)
            assert not robot.status().is_ready
            assert robot.predict(obs).status == MODEL_NOT_LOADED
            failed = robot.configure(checkpoint_dir="../one")
            assert not failed.is_ready
            assert failed.message.startswith("INVALID_INPUT: the path '../one' holds '..'")
            assert robot.predict(obs).status == MODEL_NOT_LOADED
            done = robot.configure(
                checkpoint_dir=str(tmp_path / "one"), default_prompt="lift", config_name="pi05"
            )
            assert (done.is_ready, done.model_name, done.current_prompt) == (True, "one", "lift")
            for tick in range(7):
                answer = robot.predict(_observation(messages, frame_index=tick, episode_id=1))
                assert (answer.status, answer.server_frame_index) == (OK, tick + 1)
            with client(port) as policy:
                assert policy.spec.horizon == 3
                swapped = robot.configure(checkpoint_dir="two")
                assert (swapped.is_ready, swapped.action_horizon) == (True, 4)
                assert robot.predict_chunk(obs).chunk_size == 4
                assert policy.infer(make_observation())["actions"].shape == (3, 6)
            assert early.idle
        page = get(port, "/metrics")[1].decode()
        assert 'grasp_cube_requests_total{op="grpc"} 10.0' in page
        assert 'grasp_cube_errors_total{code="MODEL_NOT_LOADED"} 2.0' in page
        assert "grasp_cube_inference_seconds_count 5.0" in page
        assert server.end() == 0
        assert "Traceback" not in server.output


def _observation(messages, **fields):
    obs = make_observation(1)
    images = [
        messages["ImageData"](camera_name=name, data=image.tobytes(), width=32, height=24, encoding="rgb8")
        for name, image in obs["images"].items()
    ]
    return messages["Observation"](
        state=obs["states"]["arm"].tolist(), images=images, prompt=obs["task"], **fields
    )
