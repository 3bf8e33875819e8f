"""One run of the fault matrix over real processes, and what it proves.

Life cycle: `carry_out(plan, folder, served)` starts everything, waits for the plan's moment, strikes, looks whether the arm
moves again or the client says why not, ends what is left with SIGTERM, and reads the evidence. It raises nothing for what a
product does wrong: that is in `Result.problems`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from env_client.websocket_client_policy import WebsocketClientPolicy
from fault_evidence import Records, read_records, violations
from fault_plan import FaultPlan
from fault_world import HANG_S, SPEED, START_S, Broken, World, command_of, wait_for_port
from kinematic_robot import calibration, until
from virtual_so101.calibration import JOINTS

__all__ = ["Result", "carry_out"]

# Longest waits on a busy machine, seconds: until the arm moves again, until something has ended.
COME_BACK_S, END_S = 60.0, 60.0
# The arm moves when its goal has changed so often.
_CHANGES = 8
# The rest pose of configs/robots/so101.yaml, normalised.
_REST = (0, -98, 96, 74, 0, 10)
_ENDED = ("the supervisor stopped the robot", "no robot was held", "run_env_client:", "Stopped before")
_NOT_LEFT = ("could not be left in order", "NOT REACHED", "NOT COMPLETE", "not reached", "did not reach")


@dataclass
class Result:
    """What happened; one line of the results file."""

    seed: int
    victim: str
    how: str
    phase: str
    policy: str
    on_exit: str
    # The client's exit code, and whether it was ended by this run in order.
    code: int | None = None
    asked: bool = False
    # Seconds from the end of the disturbance until the arm moved again; None where the client ended instead.
    back_s: float | None = None
    # What the client said last when it ended by itself.
    says: str = ""
    goals: int = 0
    lines: int = 0
    lost_ticks: int = 0
    frames: int = 0
    # How the log's last episode ended.
    episode: str | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"ok": not self.problems}


def carry_out(plan: FaultPlan, folder: Path, served: Path) -> Result:
    """`served` is `checkpoint(plan.policy, …)`; `folder` is empty, and the run's own."""
    result = Result(plan.seed, plan.victim, plan.how, plan.phase, plan.policy, plan.on_exit)
    began = time.monotonic()
    with World(plan, folder, served) as world:
        run = _Run(plan, world, result)
        try:
            run.start()
            run.strike()
            run.come_back()
            run.finish()
        except Broken as broken:
            result.problems.append(str(broken))
    run.evidence(folder)
    result.says = result.says.replace(f"{folder}/", "")
    result.seconds = round(time.monotonic() - began, 2)
    return result


class _Run:
    def __init__(self, plan: FaultPlan, world: World, result: Result) -> None:
        self._plan, self._world, self._result = plan, world, result
        # Goals until records may be lost.
        self._commanded: int | None = None

    def start(self) -> None:
        """Up to the plan's moment."""
        plan, world = self._plan, self._world
        world.start_server()
        world.start_robot()
        world.start_client()
        if plan.phase == "start":
            time.sleep(plan.at)
            return
        self._until(self._moved, START_S, "the arm never moved")
        if plan.victim == "browser":
            world.open_page()
        time.sleep(plan.at)
        if plan.phase == "end":
            self._ask_to_end()
            time.sleep(plan.at)

    def _moved(self) -> bool:
        process = self._world.client.process
        if process.poll() is not None:
            raise Broken(f"the client ended with {process.returncode}: {self._world.client.output[-600:]}")
        return self._world.tail.read().changes >= _CHANGES

    # ------------------------------------------------------------------------------------------ the fault

    def strike(self) -> None:
        plan, world = self._plan, self._world
        match plan.victim, plan.how:
            case "network", how:
                assert world.proxy is not None
                world.proxy.begin(how)
                time.sleep(plan.lasts)
                world.proxy.end()
            case "clock", _:
                world.clock_jumps(plan.jump)
            case "disk", _:
                self._commanded = world.goals()
                for pid in world.pids():
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
            case victim, "stop":
                pids = world.pids()
                before = world.goals()
                _signal(pids, signal.SIGSTOP)
                time.sleep(plan.lasts)
                _signal(pids, signal.SIGCONT)
                if victim == "control" and plan.lasts > HANG_S:
                    # Killed by its supervisor, whose own goals on the way to the rest pose are in no log.
                    self._commanded = before
            case victim, _:
                pids = world.pids()
                if victim in ("control", "supervisor", "sidecar"):
                    self._commanded = world.goals()
                _signal(pids, signal.SIGKILL)
                if victim in ("server", "robot"):
                    (world.server if victim == "server" else world.robot).wait()
                    time.sleep(plan.lasts)
                    (world.start_server if victim == "server" else world.start_robot)()

    # ------------------------------------------------------------------------------------------ afterwards

    def come_back(self) -> None:
        """Until the arm moves again, or the client has ended and said why."""
        plan, client, tail = self._plan, self._world.client, self._world.tail
        if self._result.asked:
            return
        if (plan.victim, plan.how) == ("supervisor", "kill"):
            self._without_supervisor()
            return
        began, before = time.monotonic(), tail.read().changes
        slow = plan.phase == "start" or plan.policy != "numpy"
        while client.process.poll() is None:
            if tail.read().changes >= before + _CHANGES:
                self._result.back_s = round(time.monotonic() - began, 2)
                return
            if time.monotonic() - began > COME_BACK_S + (START_S if slow else 0):
                raise Broken(f"the arm did not move again, and the client said: {client.output[-600:]}")
            time.sleep(0.03)
        client.wait(5)
        self._said_why()

    def _without_supervisor(self) -> None:
        world, said = self._world, "The supervisor is gone; stopping."

        def gone() -> bool:
            return not any("env_client.rollout" in command_of(p) for p in world.processes())

        self._until(gone, END_S, "control outlived its supervisor")
        # Before anything was driven there is nothing to stop: it ends with its parent.
        if said in world.client.output:
            self._result.says = said
        elif self._plan.phase == "run":
            self._result.problems.append("control did not say that its supervisor is gone")

    def _said_why(self) -> None:
        output, plan, result = self._world.client.output, self._plan, self._result
        result.says = next((line for line in reversed(output.splitlines()) if line.strip()), "")[:300]
        if plan.victim not in ("control", "supervisor") and plan.phase != "start":
            result.problems.append(f"the client ended by itself: {result.says}")
        # Killed before it held a robot, control leaves nothing to be said.
        if not any(word in output for word in _ENDED) and plan.victim != "control":
            result.problems.append(f"the client ended and did not say why: {result.says}")

    def _ask_to_end(self) -> None:
        if self._commanded is None:
            self._commanded = self._world.goals()
        self._result.asked = True
        self._world.client.process.send_signal(signal.SIGTERM)

    def finish(self) -> None:
        """End in order what is left; the robot's state, a server that answers, and nobody left over."""
        world, result = self._world, self._result
        client = world.client.process
        if client.poll() is None:
            if not result.asked:
                self._ask_to_end()
            self._until(lambda: client.poll() is not None, END_S, "the client did not end after SIGTERM")
        result.code = client.wait()
        if not until(lambda: not world.left_over(), END_S, 0.1):
            result.problems.append(f"processes were left over: {world.left_over()}")
        self._check_exit_state()
        self._check_server()
        for process, end in ((world.server, world.server.terminate), (world.robot, world.end_robot)):
            end()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                result.problems.append(f"{process.args} did not end")
        if world.server.returncode != 0:
            result.problems.append(f"the server ended with {world.server.returncode}")
        if not until(lambda: not world.processes(), END_S, 0.1):
            left = [command_of(process) for process in world.processes()]
            result.problems.append(f"processes outlived the run: {left}")

    def _check_exit_state(self) -> None:
        """Torque and pose as `--on-exit` says, or the client's own words that it could not."""
        tail, output, how = self._world.tail.read(), self._world.client.output, self._plan.on_exit
        driven = "Episode" in output or self._world.goals() > 1
        if not (tail.torque and driven) or any(words in output for words in _NOT_LEFT):
            return
        right = set(tail.torque.values()) == {how == "hold"}
        if how == "rest-pose" and right:
            arm = calibration()
            pose = arm.to_normalized(arm.from_ticks(np.array([tail.last[joint] for joint in JOINTS])))
            right = bool(np.allclose(pose, _REST, atol=4))
        if not right:
            self._result.problems.append(
                f"--on-exit {how}, torque {tail.torque}, goals {tail.last}: {output[-300:]}"
            )

    def _check_server(self) -> None:
        """A new client gets its chunk."""
        wait_for_port(self._world.port)
        quiet = {"on_status": lambda sentence: None, "connect_timeout_s": START_S}
        with WebsocketClientPolicy("127.0.0.1", self._world.port, **quiet) as policy:
            spec = policy.spec
            assert spec is not None
            obs = {
                "images": {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in spec.cameras},
                "states": {part.name: np.zeros(part.size, np.float32) for part in spec.states},
                "task": "lift up the red cube",
            }
            shape = policy.infer(obs)["actions"].shape
        if shape[1] != 6:
            self._result.problems.append(f"afterwards the server answered a chunk of shape {shape}")

    def evidence(self, folder: Path) -> None:
        """Servo logs and records, when every process is gone."""
        result, world = self._result, self._world
        result.goals = world.goals()
        for log in world.logs:
            result.problems += violations(log, SPEED)
        commanded = result.goals if self._commanded is None else self._commanded
        try:
            records = read_records(folder, commanded, since=f"{result.victim} {result.how}")
        except (OSError, ValueError, KeyError) as error:
            result.problems.append(f"the records cannot be read: {error!r}")
            records = Records()
        result.problems += records.problems
        result.lines, result.lost_ticks, result.frames = records.lines, records.lost, records.frames
        result.episode = records.outcomes[-1] if records.outcomes else None

    def _until(self, happened: Callable[[], bool], limit: float, otherwise: str) -> None:
        if not until(happened, limit):
            raise Broken(f"{otherwise}; the client said: {self._world.client.output[-600:]}")


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
