"""Stand-ins for a robot and a server, small enough to be checked by reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from env_client.control import SafetyConfig, SafetyFilter
from env_client.control.chunks import make_source
from env_client.control.network import ChunkRequest
from env_client.control.simulated import SimulatedClock, SimulatedServer
from env_client.control.source import ChunkSource, SourceOptions
from env_client.envs.env import EnvError, EnvSpec, Observation
from env_client.wire import PolicySpec, StateSpec

FPS = 30.0
# Units per radian of the test arm: like a normalised SO-101 joint, -100..100 over about 3.7 rad.
PER_RAD = 54.0


def env_spec(joints: int = 3, gripper: bool = True, **changes: Any) -> EnvSpec:
    """An arm of `joints` values in -100..100, the last one a gripper in 0..100."""
    names = [f"joint_{index}.pos" for index in range(joints)]
    lower, upper = np.full(joints, -100.0), np.full(joints, 100.0)
    per_rad, is_gripper = np.full(joints, PER_RAD), np.zeros(joints, bool)
    if gripper:
        names[-1], lower[-1], per_rad[-1], is_gripper[-1] = "gripper.pos", 0.0, 1.0, True
    fields: dict[str, Any] = {
        "type": "test",
        "action_names": tuple(names),
        "unit": "normalized",
        "lower": lower,
        "upper": upper,
        "unit_per_rad": per_rad,
        "gripper": is_gripper,
        "state_index": np.arange(joints),
        "states": (StateSpec("arm", joints),),
        "cameras": (),
        "fps": FPS,
    }
    return EnvSpec(**(fields | changes))


def policy_spec(joints: int = 3, horizon: int = 50, **changes: Any) -> PolicySpec:
    fields: dict[str, Any] = {"type": "test", "action_dim": joints, "horizon": horizon}
    return PolicySpec(**(fields | changes))


def observation(pose: np.ndarray, time: float = 0.0, **changes: Any) -> Observation:
    fields: dict[str, Any] = {
        "images": {},
        "states": {"arm": np.asarray(pose, np.float32)},
        "task": "do it",
        "capture_time": time,
    }
    return Observation(**(fields | changes))


class Arm:
    """An `Env` that is at once where it is told to be; `faults` maps a call number to what then happens."""

    def __init__(self, spec: EnvSpec | None = None, clock: SimulatedClock | None = None):
        self._spec = spec or env_spec()
        self.clock = clock or SimulatedClock()
        self.pose = np.zeros(self._spec.action_dim, np.float32)
        self.sent: list[tuple[float, np.ndarray]] = []
        self.reads = 0
        self.resets: list[int | None] = []
        # Called at each reading with its number; may raise, advance the clock or return changed fields.
        self.on_read: Callable[[int], dict[str, Any] | None] = lambda count: None
        self.on_send: Callable[[int], None] = lambda count: None
        # As `on_send`, but the command has already arrived.
        self.after_send: Callable[[int], None] = lambda count: None
        self.ends_after: int | None = None
        self.solved: bool | None = None

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def done(self) -> bool:
        return self.ends_after is not None and len(self.sent) >= self.ends_after

    def reset(self, seed: int | None = None) -> Observation:
        self.resets.append(seed)
        return self.get_observation()

    def get_observation(self) -> Observation:
        self.reads += 1
        changes = self.on_read(self.reads) or {}
        return observation(self.pose, self.clock.now(), **changes)

    def apply_action(self, action: np.ndarray) -> None:
        self.on_send(len(self.sent) + 1)
        self.sent.append((self.clock.now(), np.array(action)))
        self.pose = np.array(action)
        self.after_send(len(self.sent))

    def hold(self) -> None:
        raise EnvError("the loop never calls hold: it repeats its last command")

    def success(self) -> bool | None:
        return self.solved

    def close(self) -> None:
        pass


def counting_chunk(request: ChunkRequest, horizon: int = 50, joints: int = 3) -> dict[str, Any]:
    """Row k says which action of the whole run it is: consumed + k. Every width has the same value."""
    rows = request.consumed + np.arange(horizon, dtype=np.float32)
    return reply(np.repeat(rows[:, None], joints, axis=1), request)


def reply(actions: Any, request: ChunkRequest, **changes: Any) -> dict[str, Any]:
    fields = {"actions": actions, "seq": request.seq, "episode": request.episode, "chunk_id": request.seq}
    return fields | changes


class Bench:
    """A source over a simulated server, one `tick` after the other."""

    def __init__(
        self,
        execution: str,
        answer: Callable[[ChunkRequest], Any] = counting_chunk,
        latency_s: Any = 0.1,
        spec: PolicySpec | None = None,
        options: SourceOptions | None = None,
    ):
        self.clock = SimulatedClock()
        self.server = SimulatedServer(self.clock, answer, latency_s)
        self.source: ChunkSource = make_source(
            execution, None, spec or policy_spec(), FPS, options, requester=self.server
        )
        self.source.reset(0)
        self.tick = 0

    def step(self, state: float = 0.0) -> np.ndarray | None:
        """One control tick at its deadline."""
        self.clock.sleep_until(self.tick / FPS)
        seen = observation(np.full(self.source.spec.action_dim, state), self.clock.now())
        action = self.source.next_action(seen, self.tick)
        self.tick += 1
        return action

    def run(self, ticks: int) -> list[np.ndarray | None]:
        return [self.step() for _ in range(ticks)]


def numbers(actions: list[np.ndarray | None]) -> list[float]:
    """The first value of each action that there was."""
    return [float(action[0]) for action in actions if action is not None]


def safety_filter(spec: Any = None, start: Any = (0.0, 0.0, 50.0), **config: Any) -> SafetyFilter:
    """A filter that has begun an episode at `start`; the boundary clamp is off unless asked for."""
    config = {"boundary_velocity": 0.0} | config
    safety = SafetyFilter(spec or env_spec(), SafetyConfig(**config), FPS)
    safety.begin_episode(np.array(start, np.float32), 0)
    return safety
