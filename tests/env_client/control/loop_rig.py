"""The control loop with everything around it in simulated time."""

from __future__ import annotations

from typing import Any

import numpy as np
from control_doubles import FPS, Arm, policy_spec, reply
from env_client.control import ControlLoop, LoopConfig, SafetyConfig, SafetyFilter, make_source
from env_client.control.simulated import SimulatedServer
from env_client.envs.env import EnvError

__all__ = ["TICK", "Rig", "away"]

TICK = 1 / FPS


class Rig:
    """A loop with everything around it in simulated time."""

    def __init__(
        self,
        answer: Any = None,
        latency_s: Any = 0.1,
        execution: str = "async",
        arm: Arm | None = None,
        safety: SafetyConfig | None = None,
        heartbeat: Any = None,
        **config: Any,
    ):
        self.arm = arm or Arm()
        self.clock = self.arm.clock
        joints = self.arm.spec.action_dim
        self.server = SimulatedServer(
            self.clock, answer or (lambda request: reply(np.full((50, joints), 20.0), request)), latency_s
        )
        spec = policy_spec(joints)
        self.source = make_source(execution, None, spec, FPS, requester=self.server)
        self.safety = SafetyFilter(self.arm.spec, safety or SafetyConfig(), FPS)
        self.loop = ControlLoop(
            self.arm, self.source, self.safety, FPS,
            config=LoopConfig(**config), clock=self.clock, heartbeat=heartbeat,
        )  # fmt: skip

    @property
    def sent(self) -> np.ndarray:
        return np.array([action for _, action in self.arm.sent])

    @property
    def times(self) -> np.ndarray:
        return np.array([moment for moment, _ in self.arm.sent])

    def check_speed(self) -> None:
        """No two commands of the log are further apart than the limit allows for one period."""
        reach = self.safety.speed * TICK
        assert (np.abs(np.diff(self.sent, axis=0)) <= reach * (1 + 1e-6) + 1e-6).all()


def away(first: int, last: int) -> Any:
    """What an arm's `on_read` is for a bus that does not answer the readings `first` to `last` - 1."""

    def on_read(count: int) -> None:
        if first <= count < last:
            raise EnvError("the bus does not answer")

    return on_read
