"""The four ways of executing chunks: sync, async, ensemble, rtc.

sync        ask when the chunk is used up; the arm stands still for one latency
async       ask ahead by the measured latency; merge by actions really consumed; blend the overlap
ensemble    ask as fast as the server answers; average what all living chunks say of this tick (ACT)
rtc         as async, and the server continues the actions that will be executed meanwhile
"""

import logging
from collections import deque

import numpy as np

from env_client.control.network import ChunkRequest, Requester
from env_client.control.plan import Chunk, Plan, largest_step
from env_client.control.source import ChunkSource, SourceOptions
from env_client.wire import PolicySpec, RtcPrefix

__all__ = ["AsyncSource", "EnsembleSource", "RtcSource", "SyncSource"]

logger = logging.getLogger(__name__)


# Steps per tick, by unit, with which a seam may close a gap although nothing moves that fast inside the chunks:
# about 0.01 rad, a third of a radian per second at 30 Hz; of a gripper half a percent of its travel.
QUIET_STEP = {"rad": 0.01, "degrees": 0.5, "normalized": 0.5}
# Grippers of an Astribot in these units go from 0 to 1, in every other one from 0 to 100.
QUIET_GRIPPER = {"rad_gripper_0_1": 0.005, "rad_gripper_1_0": 0.005}


def quiet_steps(spec: PolicySpec) -> np.ndarray:
    """(A,) the quiet step of each action value. Units that begin with `rad` have grippers in another one."""
    if not spec.unit.startswith("rad"):
        return np.full(spec.action_dim, QUIET_STEP.get(spec.unit, QUIET_STEP["normalized"]))
    names = spec.action_names if len(spec.action_names) == spec.action_dim else [""] * spec.action_dim
    gripper = QUIET_GRIPPER.get(spec.unit, QUIET_STEP["normalized"])
    return np.array([gripper if "gripper" in name else QUIET_STEP["rad"] for name in names])


class _PlanSource(ChunkSource):
    """A source whose chunks form one plan."""

    def __init__(self, requester: Requester, spec: PolicySpec, fps: float, options: SourceOptions):
        super().__init__(requester, spec, fps, options)
        self._plan = Plan(spec.action_dim, quiet_steps(spec))
        self._chunk: Chunk | None = None
        self._boundary = True

    def _pop(self) -> np.ndarray | None:
        action = self._plan.pop()
        if action is None or self._chunk is None:
            self._boundary = True
            return None
        self._origin = self._from(self._chunk, self._boundary, self._plan.inner_step)
        self._boundary = False
        return action

    def _follow(self, chunk: Chunk) -> None:
        self._chunk = chunk
        # A policy that answers one action at a time has no seams, or nothing but: its steps are its motion.
        self._boundary |= len(chunk.actions) > 1

    def _forget(self) -> None:
        self._plan.clear()
        self._chunk = None
        self._boundary = True


class SyncSource(_PlanSource):
    """Ask when the chunk is used up. Nothing overlaps, so nothing is blended."""

    def _wants_chunk(self) -> bool:
        return self._plan.remaining == 0

    def _merge(self, chunk: Chunk) -> bool:
        self._plan.replace(chunk.actions)
        self._follow(chunk)
        return True


class AsyncSource(_PlanSource):
    """Ask ahead: when no more actions are left than will be consumed until the answer, and a few to blend.

    With one request in flight a chunk of H actions and a delay of d leaves H - d actions on arrival, and d are
    needed until the next one: H >= 2d. Where that fails the robot holds between chunks, and a log line says so.
    """

    def _wants_chunk(self) -> bool:
        return self._plan.remaining <= self._ask_point()

    def _ask_point(self) -> int:
        """Remaining actions at which the next chunk is asked for."""
        delay = self.latency.ticks(self.fps)
        if delay is None:
            return self.spec.horizon
        if delay >= self._stats.horizon:
            # No chunk can bridge the delay. Every action executed meanwhile would be cut off the new chunk too, so
            # asking early loses more than standing still: (H - r) of H - 2r + d ticks are used when r are left.
            return 0
        return delay + self.options.margin_ticks + self.blend_ticks

    def _merge(self, chunk: Chunk) -> bool:
        self._judge(len(chunk.actions))
        consumed = self._stats.consumed - chunk.consumed_at_capture
        if not self._plan.merge(chunk.actions, consumed, self.blend_ticks):
            return False
        self._follow(chunk)
        return True

    def _judge(self, horizon: int) -> None:
        """Say at once when the chunks are too short for the delay, with both numbers."""
        delay = self.latency.ticks(self.fps) or 0
        self._stats.infeasible = horizon < 2 * delay
        if self._stats.infeasible:
            self._say(
                "horizon",
                f"a chunk has {horizon} actions, but an answer takes {delay} ticks ({self.latency.upper_s:.2f} s at "
                f"{self.fps:g} Hz) and at least twice as many actions ({2 * delay}) are needed",
                "the robot will hold its pose between chunks",
            )
        elif "horizon" in self._said:
            self._said.remove("horizon")
            logger.info("chunks of %d actions suffice again for a delay of %d ticks", horizon, delay)


class RtcSource(AsyncSource):
    """Real-time chunking (Black et al. 2025, "Real-Time Execution of Action Chunking Flow Policies").

    H: rows of a chunk, d: expected delay in ticks, s: actions executed between two requests, d <= s <= H - d. A
    request carries the actions not yet executed, as they were received; the server freezes the first d of them, follows the rest
    with falling weight up to row H - s, and is free from there. Where d > H - d no s exists: the request goes
    without a prefix, as in `AsyncSource`, and a log line says so.
    """

    def __init__(self, requester: Requester, spec: PolicySpec, fps: float, options: SourceOptions):
        if not spec.supports_rtc:
            raise ValueError(
                f"--execution rtc needs a policy that can be guided by its last chunk, and {spec.type!r} cannot: real-time "
                "chunking works on flow policies (pi0, pi05). Use --execution async (blends) or ensemble (averages)"
            )
        super().__init__(requester, spec, fps, options)

    def _horizons(self) -> tuple[int, int] | None:
        """(d, s) for the next request; None when no s is feasible, or the delay is not known yet."""
        delay = self.latency.ticks(self.fps)
        if delay is None:
            return None
        horizon = self._stats.horizon
        delay += self.options.margin_ticks
        if 2 * delay > horizon:
            return None
        wanted = self.options.rtc_execution_horizon or horizon // 2
        return delay, min(max(wanted, delay, 1), horizon - delay)

    def _ask_point(self) -> int:
        horizons = self._horizons()
        if horizons is None:
            return super()._ask_point()
        return self._stats.horizon - horizons[1]

    def _prefix(self) -> RtcPrefix | None:
        left = self._plan.received
        if not len(left):
            return None
        horizons = self._horizons()
        if horizons is None or len(left) < horizons[0]:
            if horizons is None:
                delay = (self.latency.ticks(self.fps) or 0) + self.options.margin_ticks
                self._say(
                    "rtc",
                    f"real-time chunking is not feasible: the delay is {delay} ticks and a chunk has "
                    f"{self._stats.horizon} actions, at least {2 * delay} are needed",
                    "requests go without a prefix, as with --execution async",
                )
            return None
        if "rtc" in self._said:
            self._said.remove("rtc")
            logger.info("real-time chunking is feasible again")
        delay, executed = horizons
        return RtcPrefix(left, delay, min(self._stats.horizon - executed, len(left)))

    def _asked(self, request: ChunkRequest) -> None:
        self._stats.rtc_requests += request.rtc is not None
        self._stats.rtc_fallbacks += request.rtc is None and self._plan.remaining > 0


class EnsembleSource(ChunkSource):
    """Temporal ensembling as in ACT (Zhao et al. 2023, section IV.B): the action of a tick is the average of what
    every chunk says of it, with weights exp(-m * i), i = 0 for the oldest chunk.

    A chunk's row for this tick is found by counting actions, as everywhere here, not by the clock.
    """

    replaces = True

    def __init__(self, requester: Requester, spec: PolicySpec, fps: float, options: SourceOptions):
        super().__init__(requester, spec, fps, options)
        self._chunks: deque[Chunk] = deque(maxlen=MAX_LIVING)
        self._inner_step = np.zeros(spec.action_dim)
        self._boundary = True

    def _wants_chunk(self) -> bool:
        return True

    def _is_new(self, seq: int) -> bool:
        # Newer requests wait behind every answer here, so only the order of the answers counts.
        return seq > self._accepted

    def _merge(self, chunk: Chunk) -> bool:
        if self._stats.consumed - chunk.consumed_at_capture >= len(chunk.actions):
            return False
        self._chunks.append(chunk)
        self._inner_step = largest_step(chunk.actions)
        self._boundary = True
        return True

    def _pop(self) -> np.ndarray | None:
        now = self._stats.consumed
        while self._chunks and now - self._chunks[0].consumed_at_capture >= len(self._chunks[0].actions):
            self._chunks.popleft()
        rows = [
            chunk.actions[now - chunk.consumed_at_capture]
            for chunk in self._chunks
            if now - chunk.consumed_at_capture < len(chunk.actions)
        ]
        if not rows:
            self._boundary = True
            return None
        weights = np.exp(-self.options.ensemble_decay * np.arange(len(rows)))
        action = np.average(np.array(rows, np.float64), axis=0, weights=weights)
        self._origin = self._from(self._chunks[-1], self._boundary, self._inner_step)
        self._boundary = False
        return action.astype(np.float32)

    def _forget(self) -> None:
        self._chunks.clear()
        self._boundary = True


# Chunks that an ensemble keeps: one for each tick of a long chunk.
MAX_LIVING = 128
