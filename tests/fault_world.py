"""The processes of one run of the fault matrix: a policy server, a robot, a client, a page in Chromium, a proxy.

    server <- (proxy) <- client: supervisor, control, sidecar -> robot's servo bus;   page in Chromium

Everything that is started carries a mark in its environment, by which it is found whoever its parent is by then; nothing of it
outlives the `World`'s block.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
from fault_evidence import ServoTail, marked
from fault_plan import FaultPlan
from fault_proxy import FaultProxy, RepeatingProxy
from kinematic_robot import until
from needs_browser import ARGUMENTS, CHROMIUM
from numpy_policy import write_checkpoint
from processes import ROOT
from robot_fixtures import Client

__all__ = ["HANG_S", "SPEED", "START_S", "Broken", "World", "checkpoint", "command_of", "wait_for_port"]

# The supervisor's patience here: a busy machine must not look like a hang.
HANG_S = 5.0
# rad/s that the run allows, which is the client's default.
SPEED = 1.5
# Longest wait for a start on a busy machine, seconds.
START_S = 180.0
# Rows and columns of the cameras.
SIZE = (48, 64)
_MARK = "GRASP_CUBE_FAULT_RUN"
_ROBOT = ROOT / "tests/env_client/so101/kinematic_robot.py"


class Broken(Exception):
    """The run cannot go on; what it found until then counts."""


class World:
    """`with World(plan, folder, served) as world`: nothing runs yet. `served` is the checkpoint."""

    def __init__(self, plan: FaultPlan, folder: Path, served: Path) -> None:
        self._plan, self._folder, self._served = plan, folder, served
        self._token = uuid.uuid4().hex
        self._env = {_MARK: self._token, "PYTHONUNBUFFERED": "1"}
        self._stack = contextlib.ExitStack()
        self._browser: list[psutil.Process] = []
        self.port, self._camera_port = _free_port(1), _free_port(2)
        # The servo log of each robot: one that was killed and started again writes a new one.
        self.logs: list[Path] = []
        self.tail: ServoTail
        # Goals of the robots before the one that runs.
        self._before = 0
        self.proxy: FaultProxy | RepeatingProxy | None = None
        self.server: subprocess.Popen[bytes]
        self.robot: subprocess.Popen[bytes]
        self.client: Client
        if plan.victim == "clock":
            self.clock_jumps(0.0)
            path = [str(ROOT / "tests/clock_jump"), os.environ.get("PYTHONPATH", "")]
            self._env |= {
                "GRASP_CUBE_CLOCK": str(self._clock),
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
            }

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for started in (getattr(self, name, None) for name in ("server", "robot")):
            if started is not None:
                _close_pipes(started)
                started.wait()

    def processes(self) -> list[psutil.Process]:
        """All that live, and what they have started."""
        return marked(_MARK, self._token)

    def left_over(self) -> list[str]:
        """The commands of those that are neither the server nor of the robot."""
        mine = {self.server.pid, self.robot.pid, *_children(self.robot.pid)}
        return [command_of(process) for process in self.processes() if process.pid not in mine]

    # ----------------------------------------------------------------------------------------- starting

    def start_server(self) -> None:
        command = [sys.executable, "-m", "grasp_cube.serve_policy", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--policy.path", str(self._served)]
        if self._plan.policy == "pi05":
            # It sees 224x224.
            command += ["--policy.resize", "pad"]
        with (self._folder / "server.txt").open("ab") as said:
            self.server = subprocess.Popen(
                command, stdout=said, stderr=said, env=os.environ | self._env, cwd=self._folder
            )

    def start_robot(self) -> None:
        """Also again, at the same port and with the same cameras, after the one before was killed."""
        if self.logs:
            self._before = self.goals()
            _close_pipes(self.robot)
        log = self._folder / f"servos{len(self.logs)}.jsonl"
        command = [sys.executable, str(_ROBOT), str(self._folder), "--log", log.name, "--noise"]
        command += ["--camera-port", str(self._camera_port), "--size", *map(str, SIZE)]
        self.robot = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | self._env,
            start_new_session=True,
        )
        assert self.robot.stdout is not None
        self.robot.stdout.readline()
        self.logs.append(log)
        self.tail = ServoTail(log)

    def start_client(self) -> None:
        plan, folder, port = self._plan, self._folder, self.port
        if plan.victim == "network":
            wait_for_port(port)
            self.proxy = RepeatingProxy(port) if plan.how == "duplicate" else FaultProxy(port, plan.seed)
            self._stack.enter_context(self.proxy)
            port = self.proxy.port
        flags = ["--env.type", "so101", "--env.robot.port", str(folder / "port0")]
        flags += ["--env.robot.id", "virtual", "--env.robot.calibration_dir", str(folder / "calibration")]
        flags += ["--env.camera-config-path", str(folder / "cameras.json"), "--task", "lift"]
        flags += ["--port", str(port), "--hang-timeout-s", str(HANG_S), "--on-exit", plan.on_exit]
        flags += ["--rest-velocity", str(SPEED), "--execution", plan.execution, "--episode-time-s", "600"]
        flags += ["--log.dir", str(folder / "logs"), "--record.dir", str(folder / "records")]
        flags += ["--record.plots=false", "--record.rrd=false"]
        flags += ["--panel.port", "0"] if plan.victim == "browser" else ["--no-panel"]
        self.client = Client(flags, self._env)
        self._stack.callback(self.client.close)

    def open_page(self) -> None:
        """In headless Chromium, until it shows the running episode."""
        from playwright.sync_api import sync_playwright

        url = self.client.output.split("Panel: ")[1].split()[0]
        playwright = self._stack.enter_context(sync_playwright())
        before = set(psutil.Process().children(recursive=True))
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        page = browser.new_page()
        # Its 3D view is drawn by software here.
        page.route("**/scene/**", lambda route: route.abort())
        page.goto(url, wait_until="domcontentloaded", timeout=START_S * 1e3)
        page.wait_for_function("() => document.body.dataset.phase === 'running'", timeout=START_S * 1e3)
        self._browser = [p for p in psutil.Process().children(recursive=True) if p not in before]

    # ------------------------------------------------------------------------------------ finding, looking

    def pids(self) -> list[int]:
        """The processes of the plan's victim; none when the client ended before it had one."""
        match self._plan.victim:
            case "server":
                return [self.server.pid]
            case "supervisor":
                return [self.client.process.pid]
            case "robot":
                return [self.robot.pid, *_children(self.robot.pid)]
            case "browser":
                return [process.pid for process in self._browser]
            case "control":
                command = "env_client.rollout"
            case _:
                command = "env_client.sidecar.process"
        found: list[int] = []

        def there() -> bool:
            found[:] = [p.pid for p in self.processes() if command in command_of(p).split()]
            return bool(found) or self.client.process.poll() is not None

        if not until(there, START_S):
            raise Broken(f"there is no {self._plan.victim}; the client said: {self.client.output[-600:]}")
        return found

    def goals(self) -> int:
        """Goals that the servos were given so far."""
        return self._before + self.tail.read().goals

    @property
    def _clock(self) -> Path:
        return self._folder / "clock"

    def clock_jumps(self, seconds: float) -> None:
        """The wall clock of all processes from now on; see `clock_jump/sitecustomize.py`."""
        # In place: they have mapped the file.
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("d", seconds))

    def end_robot(self) -> None:
        _close_pipes(self.robot)


def checkpoint(policy: str, folder: Path) -> Path:
    """The checkpoint that a plan's policy stands for, made below `folder` where it is not shipped."""
    if policy == "act":
        return ROOT / "checkpoints/lift_act"
    if policy == "diffusion":
        from small_checkpoints import save_diffusion

        return save_diffusion(folder / policy)
    if policy == "pi05":
        from grasp_cube.tiny_checkpoint import make_tiny_checkpoint

        return make_tiny_checkpoint(folder / policy, policy)
    sizes = {"height": SIZE[0], "width": SIZE[1], "resize": "none"}
    cameras = [{"name": name} | sizes for name in ("front", "wrist")]
    return write_checkpoint(folder / policy, cameras=cameras, horizon=20, delay_s=0.03)


def wait_for_port(port: int, limit: float = START_S) -> None:
    """Until somebody listens there. Raises `Broken`."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
            return True
        return False

    if not until(listens, limit, 0.05):
        raise Broken(f"nobody listens on port {port}")


def command_of(process: psutil.Process) -> str:
    """Its command line; "?" when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "?"


def _free_port(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first: int = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for number in range(1, count):
                stack.enter_context(socket.create_server(("127.0.0.1", first + number)))
            return first


def _children(pid: int) -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return set()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
