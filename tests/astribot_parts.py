"""The stand-in's robot as a process, envs on it, and policy servers that answer what a test wants."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter, TickRecord, make_source
from env_client.envs.astribot import AstribotEnv
from env_client.envs.astribot_config import AstribotConfig, AstribotSdkConfig
from env_client.envs.astribot_layout import Hardware, read_hardware
from env_client.envs.astribot_make import VirtualAstribot, make_astribot
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import CameraSpec, PolicySpec, StateSpec, pack, unpack
from processes import ROOT
from virtual_astribot.body import PARTS
from virtual_astribot.control import Control
from websockets.sync.server import serve

FPS = 30.0
CAMERAS = ("head", "left_wrist", "right_wrist")


class Robot:
    """A running stand-in: its faults and what it was told."""

    def __init__(self, log: Path) -> None:
        self.process = VirtualAstribot(
            AstribotConfig(astribot=AstribotSdkConfig(virtual=True, virtual_log=str(log)))
        )
        self.address = self.process.address
        self.control = Control(int(self.address.rpartition(":")[2]))
        self._log, self._mark = log, 0

    def mark(self) -> None:
        """What was logged before this is another test's."""
        self._mark = len(self._log.read_text().splitlines())

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()[self._mark :]]

    @property
    def commands(self) -> list[dict[str, Any]]:
        """The accepted commands, in order."""
        return [entry for entry in self.log if "goal" in entry and "refused" not in entry]

    def goals(self, part: str) -> np.ndarray:
        """(n, dof) what the part was sent, in order."""
        return np.array([entry["goal"][part] for entry in self.commands if part in entry["goal"]])

    def close(self) -> None:
        self.control.close()
        self.process.close()


@pytest.fixture(scope="module")
def started_robot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Robot]:
    robot = Robot(tmp_path_factory.mktemp("robot") / "commands.jsonl")
    yield robot
    robot.close()


@pytest.fixture
def robot(started_robot: Robot) -> Iterator[Robot]:
    """The module's robot, without faults and with a log that begins here."""
    started_robot.control.heal()
    started_robot.mark()
    yield started_robot
    started_robot.control.heal()
    started_robot.control.free_rights()


@pytest.fixture(scope="session")
def hardware() -> Hardware:
    return read_hardware(ROOT / "configs" / "robots" / "astribot_s1.yaml")


MakeEnv = Callable[..., AstribotEnv]


@pytest.fixture
def make_env(robot: Robot, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEnv]:
    """A connected and engaged env; keyword arguments are fields of its config and of its SDK's."""
    envs: list[AstribotEnv] = []
    # One robot answers at one address; another module's SDK may be imported already.
    monkeypatch.setenv("VIRTUAL_ASTRIBOT", robot.address)

    def make(policy: PolicySpec | None = None, *, engage: bool = True, **fields: Any) -> AstribotEnv:
        sdk = {name: fields.pop(name) for name in ("call_timeout_s", "high_control_rights") if name in fields}
        # A busy machine is no robot that hangs.
        settings = AstribotSdkConfig(
            virtual=True, virtual_address=robot.address, **({"call_timeout_s": 2.0} | sdk)
        )
        env = make_astribot(AstribotConfig(astribot=settings, **fields), task="tidy up")
        envs.append(env)
        env.suit(policy)
        env.connect()
        if engage:
            env.engage()
        return env

    yield make
    for env in envs:
        env.close()


def spec_of(layout: int = 22, **fields: Any) -> PolicySpec:
    """The spec of a policy that was trained with one of the embodiments."""
    import yaml

    file = ROOT / "configs" / "embodiments" / f"astribot_s1_{layout}.yaml"
    content = yaml.safe_load(file.read_text())
    plain: dict[str, Any] = {
        "type": "scripted",
        "action_dim": layout,
        "horizon": 30,
        "action_names": tuple(content["action_names"]),
        "unit": content["unit"],
        "cameras": tuple(CameraSpec(name, 224, 224, "pad") for name in CAMERAS),
        "states": tuple(StateSpec(**state) for state in content["states"]),
        "fps": FPS,
    }
    return PolicySpec(**(plain | fields))


class ScriptedServer:
    """A policy server over a real socket; `answer(obs)` is (horizon, action_dim), or raises."""

    def __init__(
        self, spec: PolicySpec, answer: Callable[[dict[str, Any]], np.ndarray], port: int = 0
    ) -> None:
        self.spec, self.answer = spec, answer
        self.observations: list[dict[str, Any]] = []
        self.connections: list[Any] = []
        self._server = serve(self._serve, "127.0.0.1", port, compression=None, max_size=None)
        self.port: int = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _serve(self, connection: Any) -> None:
        self.connections.append(connection)
        connection.send(
            pack(
                {
                    "protocol": "grasp-cube/1",
                    "policy": self.spec.to_wire(),
                    "image_codecs": ["raw", "jpeg", "png"],
                }
            )
        )
        for frame in connection:
            request, _ = unpack(frame)
            if request.get("reset"):
                connection.send(pack({"reset": True}))
                continue
            self.observations.append(request["obs"])
            actions = np.asarray(self.answer(request["obs"]), np.float32)
            echoed = {key: request.get(key) for key in ("op", "seq", "episode", "capture_time")}
            connection.send(pack(echoed | {"actions": actions, "action": actions}))

    def close(self) -> None:
        self._server.shutdown()


MakeServer = Callable[..., ScriptedServer]


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    servers: list[ScriptedServer] = []

    def make(
        spec: PolicySpec, answer: Callable[[dict[str, Any]], np.ndarray], port: int = 0
    ) -> ScriptedServer:
        servers.append(ScriptedServer(spec, answer, port))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


class Run:
    """A control loop on an env and a server, as `run_env_client` builds it."""

    def __init__(self, env: AstribotEnv, client: Any, *, execution: str = "async", **safety: Any) -> None:
        self.env = env
        spec = client.spec
        self.source = make_source(execution, client, spec, FPS)
        self.safety = SafetyFilter(env.spec, env.safety(SafetyConfig(**safety)), FPS)
        self.loop = ControlLoop(env, self.source, self.safety, FPS)
        self.records: list[TickRecord] = []
        self.loop.attach(self.records.append, size=10_000)
        self.stop = threading.Event()

    def in_background(self, **limits: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: self.episode(**limits), daemon=True)
        thread.start()
        return thread

    def episode(self, **limits: Any) -> Any:
        self.result = self.loop.run_episode(stop=self.stop, **limits)
        return self.result

    def close(self) -> None:
        self.stop.set()
        self.source.close()


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run() -> Iterator[MakeRun]:
    runs: list[tuple[Run, Any]] = []

    def make(env: AstribotEnv, port: int, **options: Any) -> Run:
        client = WebsocketClientPolicy("127.0.0.1", port, on_status=lambda _: None, connect_timeout_s=20)
        client.connect_timeout_s = 5.0
        run = Run(env, client, **options)
        runs.append((run, client))
        return run

    yield make
    for run, client in runs:
        run.close()
        client.close()


def state_of(obs: dict[str, Any]) -> np.ndarray:
    """The measured values in the order of an action of 16, 22 or 25 values."""
    return np.concatenate(list(obs["states"].values()))


def assert_within_limits(robot: Robot) -> None:
    """Every command that the robot accepted lies within the limits, and none was refused for leaving them."""
    for part in PARTS:
        goals = robot.goals(part.name)
        if len(goals):
            assert (goals >= np.array(part.lower) - 1e-4).all(), part.name
            assert (goals <= np.array(part.upper) + 1e-4).all(), part.name
    assert not [entry for entry in robot.log if "limits" in entry.get("refused", "")]


PYTHON = sys.executable
