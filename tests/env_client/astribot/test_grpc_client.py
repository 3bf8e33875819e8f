"""The same client on older gRPC servers, over real sockets: one written from the message description, and our gateway."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astribot_parts import FPS, MakeEnv, Robot, spec_of
from env_client.client_config import ClientConfig
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter, make_source
from env_client.envs.astribot_config import AstribotConfig
from env_client.fit import misfits
from env_client.grpc_client_policy import GrpcClientPolicy
from env_client.policy_server import SamePolicy, connect, plain_spec, require_policy
from env_client.websocket_client_policy import ConnectionLost
from env_client.wire import ErrorCode, RemoteError, decode_image, encode_image
from grpc_parts import FIELDS, OPTIONS, grpc_gateway
from numpy_policy import expected_chunk, write_checkpoint
from processes import ROOT, Running, running

SCRIPT = ROOT / "tests" / "env_client" / "astribot" / "old_grpc_server.py"
MakeOld = Callable[..., tuple[Running, int]]


@pytest.fixture
def old_server() -> Iterator[MakeOld]:
    """Start an older server; the keyword arguments are its options."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> tuple[Running, int]:
            settings = json.dumps({"action_dim": 22, "horizon": 30} | options)
            process = stack.enter_context(running(sys.executable, SCRIPT, settings))
            return process, int(process.wait_for(r"port (\d+)")[1])

        yield start


def calls(process: Running, name: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in process.output.splitlines() if line.startswith("{")]
    return [entry for entry in entries if entry["call"] == name]


def client_of(port: int, **options: Any) -> GrpcClientPolicy:
    return GrpcClientPolicy("127.0.0.1", port, on_status=lambda _: None, connect_timeout_s=20, **options)


@pytest.mark.parametrize("use_chunk", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_older_server_drives_the_robot(
    use_chunk: bool, old_server: MakeOld, make_env: MakeEnv, robot: Robot
) -> None:
    """Chunks, or one action for each request; the state as 22 values, three JPEGs as the cameras compressed them."""
    process, port = old_server()
    config = ClientConfig(
        env=AstribotConfig(),
        host="grpc://127.0.0.1",
        port=port,
        policy_unit="rad",
        prompt="tidy up",
        use_chunk=use_chunk,
    )
    client = connect(config, "tidy up", lambda _: None)
    require_policy(client)
    assert isinstance(client, GrpcClientPolicy)
    assert client.spec is None
    assert client.dimensions == (30, 22)
    env = make_env(control_way="direct")
    spec = plain_spec(env.spec, config.policy_unit, client, env.plain_states)
    assert not misfits(env.spec, spec, "the robot")
    how, options = config.chunking
    source = make_source(how, SamePolicy(client), spec, FPS, options)
    loop = ControlLoop(env, source, SafetyFilter(env.spec, env.safety(SafetyConfig()), FPS), FPS)
    start = env.get_observation().states["arm_left"][0]
    robot.mark()
    result = loop.run_episode(episode=3, max_steps=30)
    source.close()
    client.close()
    assert result.outcome == "steps"
    assert len(calls(process, "predict")) >= (30 if not use_chunk else 1)
    asked = calls(process, "predict")[0]
    assert (asked["state"], asked["prompt"], asked["episode"]) == (22, "tidy up", 3)
    assert {i["name"]: i["size"] for i in asked["images"]}["head"] == [720, 1280]
    assert {(i["encoding"], i["head"]) for i in asked["images"]} == {("jpeg", "ffd8")}
    assert len(calls(process, "reset")) == 1
    if use_chunk:
        assert robot.goals("astribot_arm_left")[-1, 0] > start + 0.03


def test_a_failed_request_is_not_the_end_of_the_episode(old_server: MakeOld, make_env: MakeEnv) -> None:
    """Errors are counted, the robot holds, and the episode goes on."""
    process, port = old_server(fail=3)
    client = client_of(port)
    env = make_env(enable_camera=False)
    spec = plain_spec(env.spec, "rad", client)
    source = make_source("async", client, spec, FPS)
    loop = ControlLoop(env, source, SafetyFilter(env.spec, env.safety(SafetyConfig()), FPS), FPS)
    result = loop.run_episode(max_steps=20)
    assert result.outcome == "steps"
    assert source.stats.errors[ErrorCode.INTERNAL] == 3
    assert not process.process.poll()
    source.close()
    client.close()


def test_an_idle_server_loads_what_the_client_names(old_server: MakeOld) -> None:
    """--config, --checkpoint and --device reach the server's Configure; its refusal is one sentence."""
    process, port = old_server(loaded=False)
    client = client_of(port)
    assert client.idle
    with pytest.raises(RemoteError, match="serves no policy yet"):
        require_policy(client)
    with pytest.raises(RemoteError, match="no such checkpoint"):
        client.configure(path="/elsewhere", config_name="pi05_astribot_lora")
    config = ClientConfig(
        host="grpc://127.0.0.1",
        port=port,
        config_name="pi05_astribot_lora",
        checkpoint="/checkpoints/9999",
        device="cuda:1",
    )
    configured = connect(config, "tidy up", lambda _: None)
    assert not configured.idle
    process.wait_for("9999")
    assert calls(process, "configure")[-1] == {
        "call": "configure", "config_name": "pi05_astribot_lora", "checkpoint_dir": "/checkpoints/9999",
        "default_prompt": "tidy up", "device": "cuda:1",
    }  # fmt: skip
    configured.close()
    client.close()


def test_a_wrong_size_is_named_with_both_numbers(old_server: MakeOld, make_env: MakeEnv) -> None:
    _, port = old_server(action_dim=16)
    client = client_of(port)
    env = make_env(spec_of(22), enable_camera=False)
    found = misfits(env.spec, plain_spec(env.spec, "rad", client), "the robot")
    assert any("16 values" in sentence and "22" in sentence for sentence in found)
    env.suit(None, action_dim=client.dimensions[1])
    client.close()


def test_a_server_that_goes_away_is_found_again(old_server: MakeOld) -> None:
    process, port = old_server()
    client = client_of(port, timeout_s=5)
    obs = {"states": {"arm": np.zeros(22, np.float32)}}
    assert client.infer(obs, episode=1)["actions"].shape == (30, 22)
    process.end()
    client.connect_timeout_s = 0.2
    with pytest.raises(ConnectionLost, match="was lost"):
        client.infer(obs, episode=1)
    with pytest.raises(ConnectionLost, match="no policy server answered"):
        client.infer(obs, episode=1)
    client.close()
    with pytest.raises(ConnectionLost):
        client.infer(obs)


@pytest.mark.slow
def test_our_own_gateway_answers_the_same_client(tmp_path: Path) -> None:
    """It describes its policy, so nothing needs to be declared; pictures arrive pixel by pixel."""
    checkpoint = write_checkpoint(tmp_path / "wave", **FIELDS)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (24, 32, 3), np.uint8) for name in ("head", "left_wrist")}
    state = rng.uniform(-1, 1, 16).astype(np.float32)
    with grpc_gateway(checkpoint) as (_, port):
        client = client_of(port)
        assert client.spec == OPTIONS.spec()
        obs = {"images": images, "states": {"arms": state}}
        reply = client.infer(obs, prompt="tidy up", seq=4, episode=2, capture_time=1.5)
        expected = expected_chunk(OPTIONS, {"images": images, "state": state}, prompt="tidy up")
        np.testing.assert_array_equal(reply["actions"], expected)
        assert (reply["seq"], reply["episode"], reply["capture_time"]) == (4, 2, 1.5)
        # Compressed on the way, it is the compressed picture that counts.
        squeezed = client_of(port, image_codec="jpeg")
        seen = {name: decode_image(encode_image(image, "jpeg", 90)) for name, image in images.items()}
        expected = expected_chunk(OPTIONS, {"images": seen, "state": state}, prompt="tidy up")
        np.testing.assert_array_equal(squeezed.infer(obs, prompt="tidy up")["actions"], expected)
        with pytest.raises(RemoteError, match="INVALID_INPUT") as caught:
            client.infer({"images": {}, "states": {"arms": state}})
        assert caught.value.code == ErrorCode.INVALID_INPUT
        squeezed.close()
        client.close()
