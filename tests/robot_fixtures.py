"""Fixtures that run the client as its users do: a robot, a policy server and `run_env_client`, each a process of its own.

Imported by the conftest.py of whoever needs them. The robot is the servo bus of `virtual_so101` on a world without physics
(`env_client/so101/kinematic_robot.py`).
"""

from __future__ import annotations

import contextlib
import itertools
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
from virtual_so101.control import ControlClient
from virtual_so101.servo_log import goals_of, read_servo_log

__all__ = [
    "Client",
    "Robot",
    "Server",
    "make_client",
    "robot_process",
    "server_process",
    "start_client",
    "start_robot",
    "start_server",
]

_ROBOT = Path(__file__).parent / "env_client" / "so101" / "kinematic_robot.py"


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
    """A `run_env_client` process, its output collected. It has a panel only where the flags say so: tests share ports."""

    def __init__(self, flags: list[str], env: dict[str, str] | None = None) -> None:
        if not any(flag.startswith("--panel") for flag in flags):
            flags = [*flags, "--no-panel"]
        if not any(flag.startswith(("--log", "--record", "--rerun")) for flag in flags):
            flags = [*flags, "--no-enable-logging", "--no-record"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "env_client.run_env_client", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | (env or {}),
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


@contextlib.contextmanager
def robot_process(folder: Path, arms: int = 1) -> Iterator[Robot]:
    """A virtual robot as a process; its files lie in `folder`."""
    process = subprocess.Popen(
        [sys.executable, str(_ROBOT), str(folder), "--arms", str(arms)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    port = json.loads(process.stdout.readline())["control_port"]
    control = ControlClient(port)
    try:
        yield Robot(folder, arms, process, control)
    finally:
        control.close()
        process.stdin.close()
        process.wait(10)


@contextlib.contextmanager
def server_process(folder: Path, **options: Any) -> Iterator[Server]:
    """`serve_policy` with the NumPy test policy in `folder`; `options` are the fields of its config.json."""
    from numpy_policy import write_checkpoint

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "grasp_cube.serve_policy", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--policy.path", str(write_checkpoint(folder, **options))]
    server = Server(command, port, _serve(command, port))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def start_robot(tmp_path: Path) -> Iterator[Callable[..., Robot]]:
    """Start a virtual robot as a process."""
    with contextlib.ExitStack() as stack:
        yield lambda arms=1: stack.enter_context(robot_process(tmp_path, arms))


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start `serve_policy` with the NumPy test policy; `options` are the fields of its config.json."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            server_process(tmp_path / f"policy{next(numbers)}", **options)
        )


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
