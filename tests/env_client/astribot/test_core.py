"""What the loop, the wire and the command line needed for this robot: units that differ between joints, speed limits of
the robot's own, pictures that are compressed already, and the flags as its users know them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from astribot_parts import spec_of
from env_client.cli import parse
from env_client.client_config import ALIASES, ClientConfig
from env_client.control import SafetyConfig, SafetyFilter, SourceOptions
from env_client.control.execution import AsyncSource, quiet_steps
from env_client.control.network import ChunkRequest, Outcome, encode_observation
from env_client.control.plan import Plan
from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.env import EnvSpec, Observation
from env_client.wire import CameraSpec, EncodedImage, InvalidInput, StateSpec, encode_image


def config_of(*flags: str) -> ClientConfig:
    return parse(ClientConfig, ["--env.type", "astribot", *flags], prog="run_env_client", aliases=ALIASES)


def robot_of(config: ClientConfig) -> AstribotConfig:
    assert isinstance(config.env, AstribotConfig)
    return config.env


def test_the_flags_as_users_know_them() -> None:
    """One line with all of them."""
    config = config_of(
        "--prompt", "tidy up", "--use-chunk", "--execution", "sync", "--n-action-steps", "20", "--enable-camera",
        "--control-freq", "30", "--max-frames", "300", "--smooth", "3", "--max-velocity", "1.0",
        "--max-velocity-per-frame", "0.05", "--binarize-gripper", "--move-to-ready", "--episode", "4", "--device", "cuda:1",
        "--execute-chassis", "--no-head", "--no-torso", "--control-way", "direct", "--server", "10.0.0.2:8001",
        "--config", "pi05_astribot_lora", "--checkpoint", "/models/9999", "--env.astribot.sdk_path", "/opt/sdk",
    )  # fmt: skip
    env = robot_of(config)
    assert (config.prompt, config.fps, config.max_steps, config.first_episode) == ("tidy up", 30.0, 300, 4)
    assert config.chunking == ("sync", replace(SourceOptions(), n_action_steps=20))
    assert (config.safety.smooth, config.safety.max_velocity, config.safety.max_velocity_per_frame) == (
        3,
        1.0,
        0.05,
    )
    assert config.safety.binarize_gripper
    assert (config.host, config.port) == ("10.0.0.2", 8001)
    assert (config.config_name, config.checkpoint, config.device) == (
        "pi05_astribot_lora",
        "/models/9999",
        "cuda:1",
    )
    assert (env.execute_chassis, env.head, env.torso, env.control_way) == (True, False, False, "direct")
    assert (env.enable_camera, env.astribot.sdk_path) == (True, "/opt/sdk")


def test_defaults_and_their_opposites() -> None:
    """The ready pose is on for this robot only; chassis and executor are off."""
    config = config_of()
    assert config.goes_to_ready
    assert not config_of("--no-move-to-ready").goes_to_ready
    assert not parse(ClientConfig, [], prog="run_env_client", aliases=ALIASES).goes_to_ready
    env = robot_of(config)
    assert (env.execute_chassis, env.executor_hz, env.control_way) == (False, 0.0, "filter")
    assert not robot_of(config_of("--no-enable-camera")).enable_camera
    assert robot_of(config_of("--env.virtual")).astribot.virtual
    assert config_of("--no-use-chunk").chunking == ("sync", replace(SourceOptions(), n_action_steps=1))
    older = config_of("--server", "grpc://10.0.0.3:50052")
    assert (older.host, older.port) == ("grpc://10.0.0.3", 50052)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--env.executor-hz", "500"], "0 to 250 Hz"),
        (["--env.astribot.virtual", "--env.astribot.sdk-path", "/opt/sdk"], "a virtual one"),
        (["--env.astribot.call-timeout-s", "0"], "above 0"),
        (["--server", "grpc://somewhere"], "HOST:PORT was expected"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        config_of(*flags)
    assert sentence in capsys.readouterr().err


def test_a_seam_compares_joints_of_different_units() -> None:
    """A gripper that moves 20 % a tick is no licence for an arm joint to jump 20 rad a tick."""
    spec = spec_of(16)
    quiet = quiet_steps(spec)
    assert quiet[0] == 0.01
    assert quiet[14] == 0.5
    assert quiet_steps(replace(spec, unit="rad_gripper_0_1"))[14] == 0.005
    assert quiet_steps(replace(spec, unit="normalized"))[0] == 0.5
    plan = Plan(16, quiet)
    first = np.zeros((10, 16))
    first[:, 14] = np.linspace(0, 100, 10)
    plan.merge(first, 0, 0)
    for _ in range(4):
        last = plan.pop()
    assert last is not None
    second = np.zeros((10, 16))
    second[:, 0] = 3.0
    second[:, 14] = np.linspace(100, 0, 10)
    plan.merge(second, 0, 0)
    following = plan.pop()
    assert following is not None
    # A ninth of the gripper's travel in a tick is 22 of its quiet steps: as many are allowed to the arm.
    assert abs(following[0] - last[0]) <= 0.01 * (100 / 9) / 0.5 + 1e-6


def test_the_robots_own_speed_counts_beside_the_users() -> None:
    spec = EnvSpec(
        type="astribot",
        action_names=("torso.1", "gripper.pos"),
        unit="rad",
        lower=np.array([-1.0, 0.0]),
        upper=np.array([1.0, 100.0]),
        unit_per_rad=np.ones(2),
        gripper=np.array([False, True]),
        state_index=np.arange(2),
        states=(StateSpec("all", 2),),
        cameras=(),
        speed=np.array([0.6, 1000.0]),
    )
    safety = SafetyFilter(spec, SafetyConfig(max_velocity=6.0, boundary_velocity=0), 30.0)
    safety.begin_episode(np.zeros(2))
    sent = safety.apply(np.array([1.0, 100.0])).action
    np.testing.assert_allclose(sent, [0.6 / 30, 200 / 30], rtol=1e-5)
    with pytest.raises(ValueError, match="own speed limits"):
        SafetyFilter(replace(spec, speed=np.array([0.0, 1.0])), SafetyConfig(), 30.0)


@pytest.fixture
def picture() -> EncodedImage:
    image = np.zeros((36, 64, 3), np.uint8)
    image[:, :32] = (250, 10, 10)
    encoded = encode_image(image, "jpeg", 90)
    assert isinstance(encoded, EncodedImage)
    return encoded


@pytest.mark.parametrize(
    ("resize", "codecs", "passes"),
    [("pad", ("raw", "jpeg"), True), ("pad", ("raw",), False), ("none", ("jpeg",), False)],
)
def test_a_compressed_picture_passes_where_the_server_can_read_it(
    picture: EncodedImage, resize: Any, codecs: tuple[str, ...], passes: bool
) -> None:
    """And where it also resizes; anywhere else it is decoded, the right way round, and resized here."""
    spec = spec_of(16, cameras=(CameraSpec("head", 18, 32, resize),), states=())
    observation = Observation({"head": picture}, {})
    if resize == "none":
        with pytest.raises(InvalidInput, match=r"64x36 \(width x height\) where the policy takes 32x18"):
            encode_observation(observation, spec, codecs)
        return
    sent = encode_observation(observation, spec, codecs)["images"]["head"]
    if passes:
        assert sent is picture
    else:
        assert sent.shape == (18, 32, 3)
        assert sent[9, 4, 0] > 200 > sent[9, 4, 2]
    everything = encode_observation(observation, replace(spec, cameras=()), ())["images"]["head"]
    assert everything.shape == (36, 64, 3)


class _Answers:
    """A requester that answers each request at once."""

    def __init__(self, rows: int) -> None:
        self.rows, self.waiting = rows, []  # type: ignore[var-annotated]

    def submit(self, request: ChunkRequest, *, replace: bool = False) -> bool:
        self.waiting.append(
            Outcome(request, {"actions": np.zeros((self.rows, 16), np.float32)}, latency_s=0.01)
        )
        return True

    def poll(self) -> list[Outcome]:
        found, self.waiting = self.waiting, []
        return found

    def discard(self) -> None:
        self.waiting = []

    def close(self) -> None: ...


def test_only_so_many_actions_of_a_chunk_are_executed() -> None:
    """--n-action-steps 4 of chunks of 50."""
    source = AsyncSource(
        _Answers(50), spec_of(16), 30.0, SourceOptions(n_action_steps=4, blend_s=0, margin_ticks=0)
    )
    source.reset(0)
    for tick in range(20):
        source.next_action(Observation({}, {}, capture_time=tick / 30), tick)
    assert source.stats.horizon == 4
    assert source.stats.chunks >= 4
