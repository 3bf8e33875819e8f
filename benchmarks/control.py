"""How steady and how smooth: execution mode x latency x horizon, and the loop's jitter over a real WebSocket.

    uv run python benchmarks/control.py [--quick] [--json FILE]

The first table runs in simulated time: the real loop, sources and safety filter, with a clock and a server that
are not real, so its figures are the same on every machine. The policy follows a smooth motion and changes its mind
with every chunk, by so much that seams of about 0.2 rad come up, as in logs of real robots. The answers to rtc are
those of an ideal server, which follows the prefix exactly as the mask says.

    starved      ticks without an action, of 3,000, after the first chunk
    seam         largest step at a chunk boundary that the source asked for, rad
    sent         the largest that was sent after it had been through the safety filter, rad
    inside       largest step inside the policy's chunks, rad
    jerk         root mean square of the third difference of what was sent, rad/s^3

The second runs in real time: `serve_policy` with the NumPy policy in another process, two 480x640 cameras, and
this process as the robot. Jitter is how far the intervals between commands are from the period. An "idle" loop, which
only sleeps, runs before each: what it shows is the machine's own.
"""

import argparse
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from env_client.control import EXECUTIONS, ControlLoop, SafetyConfig, SafetyFilter, make_source
from env_client.control.clock import MonotonicClock, Pacer, Timing
from env_client.control.network import ChunkRequest
from env_client.control.simulated import SimulatedClock, SimulatedServer
from env_client.envs.env import EnvSpec, Observation
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import PolicySpec, StateSpec
from numpy_policy import write_checkpoint
from tqdm import tqdm
from wire import observation as picture_pair
from wire import start

FPS = 30.0
JOINTS = 6
LATENCIES_S = (0.0, 0.1, 0.3, 1.0)
HORIZONS = (16, 50, 100)
# The policy's motion: 0.8 rad to either side, at most 0.03 rad per tick; and how far it changes its mind.
AMPLITUDE, SPEED, MIND = 0.8, 0.03, 0.06

SPEC = EnvSpec(
    type="benchmark",
    action_names=tuple(f"joint_{index}.pos" for index in range(JOINTS)),
    unit="rad",
    lower=np.full(JOINTS, -math.pi),
    upper=np.full(JOINTS, math.pi),
    unit_per_rad=np.ones(JOINTS),
    gripper=np.zeros(JOINTS, bool),
    state_index=np.arange(JOINTS),
    states=(StateSpec("arm", JOINTS),),
    cameras=(),
    fps=FPS,
)


class Arm:
    """An `Env` that goes nine tenths of the way to its command in each tick."""

    spec, done = SPEC, False

    def __init__(self, now: Callable[[], float], images: dict[str, np.ndarray] | None = None):
        self._now, self._images = now, images or {}
        self.pose = np.zeros(JOINTS, np.float32)

    def reset(self, seed: int | None = None) -> Observation:
        return self.get_observation()

    def get_observation(self) -> Observation:
        images = {name: image.copy() for name, image in self._images.items()}
        return Observation(images, {"arm": self.pose.copy()}, "benchmark", self._now())

    def apply_action(self, action: np.ndarray) -> None:
        self.pose += np.float32(0.9) * (action - self.pose)

    def hold(self) -> None:
        pass

    def success(self) -> bool | None:
        return None

    def close(self) -> None:
        pass


class Policy:
    """Row k is where the motion is k actions after the request's, and how the policy sees it this time."""

    def __init__(self, horizon: int):
        self.horizon = horizon
        self.inside = 0.0
        self._mind = np.random.default_rng(0)

    def __call__(self, request: ChunkRequest) -> dict[str, Any]:
        at = (request.consumed + np.arange(self.horizon))[:, None] * (SPEED / AMPLITUDE)
        motion = AMPLITUDE * np.sin(at + np.linspace(0, math.pi, JOINTS))
        actions = motion + self._mind.normal(0, MIND, JOINTS)
        if request.rtc is not None:
            actions = guided(actions, request.rtc.prev, request.rtc.delay, request.rtc.mask_end)
        self.inside = max(self.inside, float(np.abs(np.diff(actions, axis=0)).max()))
        return {"actions": actions.astype(np.float32), "seq": request.seq, "episode": request.episode}


def guided(free: np.ndarray, prev: np.ndarray, delay: int, mask_end: int) -> np.ndarray:
    """`free` pulled to `prev` by the soft mask of real-time chunking (Black et al. 2025, equation 5)."""
    i = np.arange(len(free))
    c = (mask_end - i) / (mask_end - delay + 1)
    weight = np.where(i < delay, 1.0, np.where(i < mask_end, c * np.expm1(c) / math.expm1(1), 0.0))
    rows = min(len(prev), len(free))
    result = free.copy()
    result[:rows] += weight[:rows, None] * (prev[:rows] - free[:rows])
    return result


@dataclass
class Cell:
    """One row of the first table."""

    execution: str
    latency_s: float
    horizon: int
    feasible: bool
    starved: int
    waiting: int
    seam: float
    sent: float
    inside: float
    jerk: float


def simulate(execution: str, latency_s: float, horizon: int, ticks: int) -> Cell:
    clock = SimulatedClock()
    arm, policy = Arm(clock.now), Policy(horizon)
    spec = PolicySpec("benchmark", JOINTS, horizon, unit="rad", supports_rtc=True)
    server = SimulatedServer(clock, policy, latency_s)
    source = make_source(execution, None, spec, FPS, requester=server)
    loop = ControlLoop(arm, source, SafetyFilter(SPEC, SafetyConfig(), FPS), FPS, clock=clock)
    tap = loop.subscribe(size=ticks + 1)
    # The seconds before the first chunk are not counted, so the time for it comes on top.
    result = loop.run_episode(time_s=(ticks + math.ceil(latency_s * FPS) + 1) / FPS)
    records = []
    while (record := tap.pull()) is not None:
        records.append(record)
    sent = np.array([record.sent for record in records if record.sent is not None])
    step = np.abs(np.diff(sent, axis=0)).max(axis=1)
    asked = [record for record in records if record.requested is not None]
    seams, at_seam, last = [0.0], [0.0], None
    for record in asked:
        assert record.origin is not None
        if record.origin.boundary and last is not None:
            seams.append(float(np.abs(record.requested - last).max()))
        last = record.requested
    for index, record in enumerate(records[1:]):
        if record.origin is not None and record.origin.boundary and record.tick > asked[0].tick:
            at_seam.append(float(step[index]))
    jerk = np.diff(sent[asked[0].tick :], n=3, axis=0) * FPS**3
    return Cell(
        execution=execution,
        latency_s=latency_s,
        horizon=horizon,
        feasible=horizon >= 2 * math.ceil(latency_s * FPS),
        starved=result.starved,
        waiting=result.waiting,
        seam=max(seams),
        sent=max(at_seam),
        inside=policy.inside,
        jerk=float(np.sqrt(np.mean(jerk**2))),
    )


def matrix(ticks: int, latencies: tuple[float, ...], horizons: tuple[int, ...]) -> list[Cell]:
    cases = [(e, s, h) for s in latencies for h in horizons for e in EXECUTIONS]
    cells = [simulate(*case, ticks) for case in tqdm(cases, desc="simulated time", unit="cell")]
    print(f"\nSimulated time, {ticks} ticks at {FPS:g} Hz, velocity limit 1.5 rad/s = 0.05 rad per tick")
    print(
        f"{'latency':>8}{'horizon':>9}  {'execution':10}{'starved':>8}{'seam':>8}{'sent':>8}{'inside':>8}{'jerk':>8}"
    )
    for cell in cells:
        note = "" if cell.feasible else "  H < 2d"
        print(
            f"{cell.latency_s * 1e3:6.0f}ms{cell.horizon:9}  {cell.execution:10}{cell.starved:8}{cell.seam:8.3f}"
            f"{cell.sent:8.3f}{cell.inside:8.3f}{cell.jerk:8.1f}{note}"
        )
    return cells


def real_time(seconds: float, delays: tuple[float, ...]) -> list[dict[str, Any]]:
    images = picture_pair(480, 640)["images"]
    cameras = tuple({"name": name, "height": 480, "width": 640, "resize": "none"} for name in images)
    executions = ["idle", *(execution for execution in EXECUTIONS if execution != "rtc")]
    rows = []
    bar = tqdm(total=len(delays) * len(executions), desc="real time", unit="run")
    for delay in delays:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_checkpoint(
                Path(folder) / "wave", horizon=100, delay_s=delay, cameras=cameras, unit="rad"
            )
            process, port = start(
                "-m", "grasp_cube.serve_policy", "--policy.path", str(checkpoint), "--host", "127.0.0.1", "--port", "0"
            )  # fmt: skip
            try:
                for execution in executions:
                    rows.append(
                        {"execution": execution, "delay_s": delay} | drive(execution, port, images, seconds)
                    )
                    bar.update()
            finally:
                process.kill()
    bar.close()
    print(f"\nReal time over a WebSocket, {seconds:g} s each, 2 x 480x640 raw, {os.cpu_count()} cores, ms")
    print(
        f"{'model':>8}  {'execution':10}{'ticks':>7}{'starved':>8}{'overruns':>9}{'jitter p50':>12}{'p99':>7}{'max':>7}"
        f"{'latency':>9}{'cpu':>6}"
    )
    for row in rows:
        print(
            f"{row['delay_s'] * 1e3:6.0f}ms  {row['execution']:10}{row['ticks']:7.0f}{row['starved']:8}{row['overruns']:9.0f}"
            f"{row['jitter_p50_ms']:12.2f}{row['jitter_p99_ms']:7.2f}{row['jitter_max_ms']:7.2f}"
            f"{row['latency_s'] * 1e3:9.0f}{row['cpu']:6.2f}"
        )
    return rows


def idle(seconds: float) -> dict[str, Any]:
    """A loop with nothing to do."""
    pacer, timing = Pacer(MonotonicClock(), 1 / FPS), Timing(1 / FPS)
    for _ in range(round(seconds * FPS)):
        timing.ticked(pacer.wait())
        timing.sent(time.monotonic())
    return timing.summary() | {"starved": 0, "latency_s": 0.0, "cpu": 0.0}


def drive(execution: str, port: int, images: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
    if execution == "idle":
        return idle(seconds)
    client = WebsocketClientPolicy("127.0.0.1", port, on_status=lambda sentence: None)
    assert client.spec is not None
    source = make_source(execution, client, client.spec, FPS)
    arm = Arm(MonotonicClock().now, images)
    loop = ControlLoop(arm, source, SafetyFilter(SPEC, SafetyConfig(), FPS), FPS)
    cpu = time.process_time()
    result = loop.run_episode(time_s=seconds)
    cpu = (time.process_time() - cpu) / result.duration_s
    client.close()
    source.close()
    return result.timing | {
        "starved": result.starved,
        "latency_s": result.source["latency_upper_s"],
        "cpu": cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a part of each table, half a minute")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    # What is said about infeasible delays stands in the table.
    logging.getLogger("env_client").setLevel(logging.ERROR)
    if options.quick:
        cells = matrix(600, (0.1, 1.0), (50,))
        rows = real_time(5.0, (0.1,))
    else:
        cells = matrix(3000, LATENCIES_S, HORIZONS)
        rows = real_time(12.0, (0.0, 0.3, 1.0))
    if options.json:
        figures = {"simulated": [cell.__dict__ for cell in cells], "real_time": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
