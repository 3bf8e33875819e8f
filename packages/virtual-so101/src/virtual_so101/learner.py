"""A policy at the arms, in lock step with the physics: alone, or until the expert has to take over.

    drive           one tick after the other, each chunk asked for at the moment it is used
    until_it_fails  the policy's episode up to a failure; what the expert does from there is what it has yet to learn

To learn from one's own failures is DAgger (Ross et al., 2011); an expert that takes over for good after one is its
human-gated form (Kelly et al., 2019).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import PolicySpec

from virtual_so101.calibration import ArmCalibration
from virtual_so101.expert import EmptyJaws, follow
from virtual_so101.scene import CUBE_EDGE
from virtual_so101.world import World

__all__ = ["Chunks", "Learner", "drive", "served", "until_it_fails"]

# (observation, those of the ticks before it) -> (horizon, action_dim) in LeRobot's normalised unit.
Chunks = Callable[[dict[str, Any], tuple[dict[str, Any], ...]], np.ndarray]

# The expert takes over after this share of the grasps that come up empty, and so many ticks later at the most.
_TAKEN_OVER, _LATE = 0.6, 20
# Who carries a cube when the time is over may go on with it so long, seconds: the expert would drop it.
_LONGER = 5.0


def drive(world: World, spec: PolicySpec, chunks: Chunks, chunk_steps: int | None = None) -> Iterator[None]:
    """The policy's episode without end, tick by tick: each yield comes after one.

    Args:
        spec: what the policy gives, and how many observations it sees.
        chunks: the policy.
        chunk_steps: actions of each chunk that are executed; None executes all.

    Raises:
        ValueError: when the policy's actions are not those of the task's arms.
    """
    expected = 6 * world.n_arms
    if spec.action_dim != expected or spec.unit != "normalized":
        raise ValueError(
            f"the policy gives {spec.action_dim} actions in {spec.unit}; the virtual robot of {world.task.name} takes "
            f"{expected} in normalized"
        )
    arms, n_obs_steps = world.calibrations, spec.n_obs_steps
    history: deque[dict[str, Any]] = deque(maxlen=max(1, n_obs_steps - 1))
    chunk: list[np.ndarray] = []
    while True:
        # Drawn are the ticks that the next request shows.
        obs = _observation(world, arms) if len(chunk) < n_obs_steps else None
        if not chunk:
            assert obs is not None
            chunk = list(chunks(obs, tuple(history) if n_obs_steps > 1 else ())[:chunk_steps])
        if obs is not None:
            history.append(obs)
        action = chunk.pop(0)
        goals = [c.from_normalized(action[6 * arm : 6 * arm + 6]) for arm, c in enumerate(arms)]
        follow(world, np.concatenate(goals))
        yield


@dataclass(frozen=True)
class Learner:
    """A policy that is to learn from what it gets wrong."""

    name: str
    # Its ticks in a world that was just reset.
    work: Callable[[World], Iterator[None]]


def served(policy: WebsocketClientPolicy) -> Learner:
    """A policy behind a server as a learner; `ValueError` when the server serves none that it describes."""
    spec = policy.spec
    if spec is None:
        raise ValueError(f"the server at {policy.url} names no policy: start one of ours with serve_policy")

    def work(world: World) -> Iterator[None]:
        def chunks(obs: dict[str, Any], history: tuple[dict[str, Any], ...]) -> np.ndarray:
            return np.asarray(policy.infer(obs, history=history, prompt=world.task.prompt)["actions"])

        policy.reset()
        return drive(world, spec, chunks)

    return Learner(str(policy.metadata.get("policy_id")), work)


def until_it_fails(world: World, ticks: Iterator[None]) -> bool:
    """Let the policy behind `ticks` work until it has failed; False when it solves the task instead.

    It fails with a grasp that comes up empty, though not always with the first one, so that the failures of a second
    try are seen as well, or when the task's time is over.
    """
    rng = np.random.default_rng([world.seed, 3])
    jaws = [EmptyJaws(world, arm) for arm in range(world.n_arms)]
    while world.time < world.task.duration + (_LONGER if _carries(world) else 0.0):
        next(ticks)
        if world.success():
            return False
        # Every arm is asked: each counts its own ticks.
        empty = [jaw.come_up() for jaw in jaws]
        if any(empty) and rng.random() < _TAKEN_OVER:
            for _ in range(rng.integers(_LATE + 1)):
                next(ticks)
            return not world.success()
    return True


def _carries(world: World) -> bool:
    return any(world.cube_position(cube.name)[2] > CUBE_EDGE for cube in world.task.layout.cubes)


def _observation(world: World, arms: tuple[ArmCalibration, ...]) -> dict[str, Any]:
    names = ("arm",) if len(arms) == 1 else ("left_arm", "right_arm")
    return {
        "images": {camera: world.render(camera) for camera in world.camera_names},
        "states": {
            name: calibration.to_normalized(world.positions(arm)).astype(np.float32)
            for arm, (name, calibration) in enumerate(zip(names, arms, strict=True))
        },
        "task": world.task.prompt,
    }
