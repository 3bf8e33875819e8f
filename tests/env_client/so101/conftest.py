"""A virtual SO-101 for the client's tests: the servo bus of `virtual_so101` on a world without physics.

The world is fast (no MuJoCo, no GPU), the bus and LeRobot's driver are the real ones. `make_twin` runs it in
this process; `kinematic_robot.py` beside this file is the same as a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from env_client.envs.robots import BiSO101Config, BiSO101RobotConfig, SO101Config, SO101RobotConfig
from env_client.envs.so101 import SO101Env, make_so101
from env_client.envs.so101_arm import ArmConfig
from virtual_so101.calibration import arm_ids
from virtual_so101.control import ControlClient
from virtual_so101.servo_log import goals_of, read_servo_log
from virtual_so101.twin import Twin

sys.path.insert(0, str(Path(__file__).parent))
from kinematic_robot import KinematicWorld


@pytest.fixture
def make_twin(tmp_path: Path) -> Iterator[Callable[..., Twin]]:
    """Start a virtual robot; its calibration files lie in `tmp_path/calibration`, its cameras in cameras.json."""
    twins: list[Twin] = []

    def make(arms: int = 1, **options: Any) -> Twin:
        options.setdefault("camera_port", None)
        twin = Twin(KinematicWorld(arms), [tmp_path / f"port{arm}" for arm in range(arms)], **options)
        for chain, name in zip(twin.chains, arm_ids("virtual", arms), strict=True):
            chain.calibration.save(tmp_path / "calibration" / f"{name}.json")
        twin.start()
        twins.append(twin)
        if twin.cameras is not None:
            (tmp_path / "cameras.json").write_text(json.dumps(twin.cameras.config))
        return twin

    yield make
    for twin in twins:
        twin.close()


@pytest.fixture
def make_env(tmp_path: Path) -> Iterator[Callable[..., SO101Env]]:
    """An env for the twin with the same number of arms; not connected yet."""
    envs: list[SO101Env] = []

    def make(arms: int = 1, *, dry_run: bool = False, cameras: bool = False, **options: Any) -> SO101Env:
        common = {
            "calibration_dir": str(tmp_path / "calibration"),
            "id": options.pop("id", "virtual"),
        }
        if cameras:
            options["camera_config_path"] = str(tmp_path / "cameras.json")
        config: SO101Config | BiSO101Config
        if arms == 1:
            port = options.pop("port", str(tmp_path / "port0"))
            config = SO101Config(robot=SO101RobotConfig(port=port, **common), **options)
        else:
            sides = [ArmConfig(port=str(tmp_path / f"port{arm}")) for arm in range(2)]
            config = BiSO101Config(robot=BiSO101RobotConfig(*sides, **common), **options)
        envs.append(make_so101(config, dry_run=dry_run))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


@dataclass
class Robot:
    """A virtual robot in a process of its own."""

    folder: Path
    arms: int
    process: subprocess.Popen[str]
    control: ControlClient

    @property
    def flags(self) -> list[str]:
        """The client's flags for it."""
        ports = [str(self.folder / f"port{arm}") for arm in range(self.arms)]
        if self.arms == 1:
            flags = ["--env.type", "so101", "--env.robot.port", ports[0]]
        else:
            flags = ["--env.type", "bi_so101", "--env.robot.left_arm_config.port", ports[0]]
            flags += ["--env.robot.right_arm_config.port", ports[1]]
        flags += [
            "--env.robot.id",
            "virtual",
            "--env.robot.calibration_dir",
            str(self.folder / "calibration"),
        ]
        return [*flags, "--env.camera-config-path", str(self.folder / "cameras.json")]

    def events(self) -> list[dict[str, Any]]:
        """Everything that the servos were told so far."""
        return read_servo_log(self.folder / "servos.jsonl")

    def goals(self) -> dict[tuple[int, str], Any]:
        return goals_of(self.events())

    def torque(self, arm: int = 0) -> dict[str, bool]:
        """The last torque switch of each joint."""
        state: dict[str, bool] = {}
        for event in self.events():
            if event["kind"] == "torque" and event["arm"] == arm:
                state |= event["torque"]
        return state


@dataclass
class Server:
    """A `serve_policy` process with the NumPy test policy."""

    command: list[str]
    port: int
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = _serve(self.command, self.port)


class Client:
    """A `run_env_client` process, its output collected."""

    def __init__(self, flags: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "env_client.run_env_client", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def control_pid(self) -> int:
        """The control process: the supervisor's only child that runs `rollout`."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in map(int, pids):
            if b"env_client.rollout" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError(f"no control process; the client said:\n{self.output}")

    def wait(self, limit: float = 40.0) -> int:
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the client did not end within {limit:g} s; it said:\n{self.output}"
            ) from None
        self._reader.join(2.0)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            # The control process is in the same session: end the whole group.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start_robot(tmp_path: Path) -> Iterator[Callable[..., Robot]]:
    """Start a virtual robot as a process."""
    robots: list[Robot] = []

    def start(arms: int = 1) -> Robot:
        script = Path(__file__).parent / "kinematic_robot.py"
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(arms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["control_port"]
        robots.append(Robot(tmp_path, arms, process, ControlClient(port)))
        return robots[-1]

    yield start
    for robot in robots:
        robot.control.close()
        assert robot.process.stdin is not None
        robot.process.stdin.close()
        robot.process.wait(10)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start `serve_policy` with the NumPy test policy; `options` are the fields of its config.json."""
    servers: list[Server] = []

    def start(**options: Any) -> Server:
        from numpy_policy import write_checkpoint

        folder = write_checkpoint(tmp_path / f"policy{len(servers)}", **options)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "grasp_cube.serve_policy", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--policy.path", str(folder)]
        servers.append(Server(command, port, _serve(command, port)))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def _serve(command: list[str], port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return process
        assert process.poll() is None, "the server did not start"
        time.sleep(0.05)
    raise AssertionError("the server did not listen within 60 s")


@pytest.fixture
def make_client() -> Iterator[Callable[..., Client]]:
    """Start `run_env_client` with these flags."""
    clients: list[Client] = []

    def make(flags: list[str]) -> Client:
        clients.append(Client(flags))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def start_client(make_client: Callable[..., Client]) -> Callable[..., Client]:
    """Start `run_env_client` on a robot and a server, with further flags."""

    def start(robot: Robot, server: Server | None, *flags: str, hang: float = 5.0) -> Client:
        port = [] if server is None else ["--port", str(server.port)]
        common = ["--task", "lift" if robot.arms == 1 else "sort", "--hang-timeout-s", str(hang)]
        return make_client([*robot.flags, *common, *port, *flags])

    return start
