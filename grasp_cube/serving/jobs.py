"""One request on its way through the scheduler: what it waits with, and how whoever waits for it is told.

Life cycle: made by `Scheduler.submit`, ended by its future. Error policy: nothing here raises; a future that has ended, and a
loop that was closed in the meantime, are left alone.
"""

import asyncio
import contextlib
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grasp_cube.policies.policy import Policy, PolicyRequest

__all__ = ["Job", "Result", "settle", "tell"]


@dataclass(frozen=True)
class Result:
    """A chunk and what it cost."""

    # (horizon, action_dim) float32 in the spec's unit, finite.
    actions: np.ndarray
    # From submit to the start of the batch, in ms.
    queue_ms: float
    # Of the whole batch, in ms.
    infer_ms: float
    batch_size: int


@dataclass(eq=False)
class Job:
    """One request in the queue or on the device."""

    policy: Policy
    request: PolicyRequest
    group: Hashable
    client: Hashable
    replaceable: bool
    future: asyncio.Future[Result]
    loop: asyncio.AbstractEventLoop
    submitted: float = field(default_factory=time.perf_counter)
    # Looks after it: in the queue, then on the device.
    timer: asyncio.TimerHandle | None = None

    def finish(self, outcome: Result | BaseException) -> None:
        tell(self.loop, self.future, outcome)

    def may_join(self, first: "Job") -> bool:
        return self.policy is first.policy and self.group == first.group


def tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future, outcome: Any) -> None:
    """`settle`, from another thread."""
    # A loop that was closed in the meantime has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle, future, outcome)


def settle(future: asyncio.Future, outcome: Any) -> None:
    """Give a future its value, or its exception. On its loop's thread."""
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
