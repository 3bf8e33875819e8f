"""What every way of executing chunks shares: asking, accepting, refusing and counting."""

import logging
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from env_client.control.network import ChunkRequest, Outcome, Requester
from env_client.control.plan import Chunk, LatencyEstimate
from env_client.envs.env import Observation
from env_client.wire import ErrorCode, PolicySpec, RtcPrefix

__all__ = ["ActionSource", "ChunkSource", "Origin", "SourceOptions", "SourceStats"]

logger = logging.getLogger(__name__)

# An answer that takes so much longer than the robust upper estimate (factor, and seconds on top) is stale.
STALL_FACTOR, STALL_S = 3.0, 1.0
# More rows than any policy answers with: a larger chunk is refused.
MAX_CHUNK = 1000
REFUSED = "it is refused as a whole"


@dataclass(frozen=True)
class SourceOptions:
    """How chunks are executed."""

    # Over how many seconds an old chunk fades into a new one (async, rtc).
    blend_s: float = 0.2
    # Ticks by which the next chunk is asked for earlier than the measured delay demands (async, rtc).
    margin_ticks: int = 1
    # m in the weights exp(-m * i) of temporal ensembling, i = 0 for the oldest chunk (ensemble).
    ensemble_decay: float = 0.01
    # Actions executed between two requests of real-time chunking; 0 = half of the chunk (rtc).
    rtc_execution_horizon: int = 0
    # Actions of each chunk that are executed before the next one; 0 = all of them.
    n_action_steps: int = 0
    # Pause after a failed request, in s; it doubles up to the largest.
    retry_min_s: float = 0.1
    # Largest pause between two requests, in s.
    retry_max_s: float = 2.0

    def __post_init__(self) -> None:
        names = (
            "blend_s",
            "margin_ticks",
            "rtc_execution_horizon",
            "n_action_steps",
            "retry_min_s",
            "retry_max_s",
        )
        for name in names:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value}; 0 or a number above it was expected")
        if not math.isfinite(self.ensemble_decay):
            raise ValueError(f"ensemble_decay is {self.ensemble_decay}; a number was expected")


@dataclass(frozen=True)
class Origin:
    """Where the last action came from."""

    episode: int
    seq: int
    # The moment that the action was meant for, in the loop's seconds: its row's tick after the observation.
    due: float
    # True for the first action of a new chunk, and after a pause.
    boundary: bool
    # (A,) largest step inside the chunk.
    inner_step: np.ndarray
    # The newest chunk that the action comes from, and the action's row in it.
    chunk: Chunk | None = None
    index: int = 0


@dataclass
class SourceStats:
    """Counters since the source was made. Written by the loop's thread only."""

    requests: int = 0
    chunks: int = 0
    # Actions handed out.
    consumed: int = 0
    # Ticks without an action before an episode's first chunk, and after it.
    waiting: int = 0
    starved: int = 0
    # Chunks refused, by reason: "other episode", "old chunk", "not finite", "wrong dimension", "stale",
    # "too late" (every row lies in the past).
    dropped: Counter[str] = field(default_factory=Counter)
    # Requests that failed, by the code of the wire, "CONNECTION" or "CLIENT".
    errors: Counter[str] = field(default_factory=Counter)
    # Newest and robust upper latency of a request, in s, and the latter in ticks; 0 before the first answer.
    latency_s: float = 0.0
    latency_upper_s: float = 0.0
    delay_ticks: int = 0
    # Rows of the newest chunk.
    horizon: int = 0
    # True while the horizon is too short for the delay: the robot holds between chunks.
    infeasible: bool = False
    # Why the newest request failed, one sentence; empty after a good answer.
    trouble: str = ""
    # rtc: requests that carried the prefix, and requests that fell back to async.
    rtc_requests: int = 0
    rtc_fallbacks: int = 0

    def snapshot(self) -> dict[str, Any]:
        """Plain values."""
        return self.__dict__ | {"dropped": dict(self.dropped), "errors": dict(self.errors)}


class ActionSource(Protocol):
    """Where the control loop gets its actions from."""

    # Used instead of the observation's own task when not None; may be changed at any time.
    prompt: str | None

    @property
    def origin(self) -> Origin | None:
        """Where the action of the last `next_action` came from; None when there was none."""
        ...

    @property
    def stats(self) -> SourceStats: ...

    def next_action(self, observation: Observation, tick: int) -> np.ndarray | None:
        """The action (A,) float32 for this tick; None means starved: the loop holds. Never waits, never raises."""
        ...

    def reset(self, episode: int) -> None:
        """Forget every chunk, asked for or planned: `episode` begins, or goes on after an interruption."""
        ...

    def close(self) -> None:
        """End the network thread."""
        ...


class ChunkSource:
    """The base of the four ways. A subclass says when to ask, and what becomes of a chunk."""

    # Whether a newer observation may take the place of one that still waits behind a request in flight.
    replaces: ClassVar[bool] = False

    def __init__(self, requester: Requester, spec: PolicySpec, fps: float, options: SourceOptions):
        if not math.isfinite(fps) or fps <= 0:
            raise ValueError(f"the control rate is {fps} Hz; a rate above 0 was expected")
        self.spec, self.fps, self.options = spec, fps, options
        self.prompt: str | None = None
        self.blend_ticks = round(options.blend_s * fps)
        self.latency = LatencyEstimate()
        self._requester = requester
        self._stats = SourceStats()
        self._origin: Origin | None = None
        self._past: deque[tuple[int, Observation]] = deque(maxlen=max(1, spec.n_obs_steps))
        self._episode = 0
        self._generation = 0
        self._seq = 0
        # Of the newest request is `_seq`; this is of the newest accepted answer.
        self._accepted = 0
        self._had_chunk = False
        self._said: set[str] = set()

    @property
    def origin(self) -> Origin | None:
        return self._origin

    @property
    def stats(self) -> SourceStats:
        return self._stats

    def next_action(self, observation: Observation, tick: int) -> np.ndarray | None:
        self._past.append((tick, observation))
        for outcome in self._requester.poll():
            self._receive(outcome)
        if self._wants_chunk():
            self._ask(observation, tick)
        action = self._pop()
        if action is not None:
            self._stats.consumed += 1
            return action
        self._origin = None
        if self._had_chunk:
            self._stats.starved += 1
        else:
            self._stats.waiting += 1
        return None

    def reset(self, episode: int) -> None:
        self._episode = episode
        self._generation += 1
        self._had_chunk = False
        self._origin = None
        self._past.clear()
        self._requester.discard()
        self._forget()

    def close(self) -> None:
        self._requester.close()

    # --------------------------------------------------------------------------- what a subclass provides

    def _wants_chunk(self) -> bool:
        """Whether to ask with this tick's observation. Asked at every tick."""
        raise NotImplementedError

    def _merge(self, chunk: Chunk) -> bool:
        """Use a good chunk. False when it comes too late for every one of its rows."""
        raise NotImplementedError

    def _pop(self) -> np.ndarray | None:
        """The action of this tick, with `_origin` set; None when starved."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop what is planned."""
        raise NotImplementedError

    def _prefix(self) -> RtcPrefix | None:
        """What a request carries for real-time chunking."""
        return None

    def _asked(self, request: ChunkRequest) -> None:
        """A request was taken."""

    # ------------------------------------------------------------------------------------------ in common

    def _ask(self, observation: Observation, tick: int) -> None:
        request = ChunkRequest(
            observation=observation,
            history=self._history(tick),
            seq=self._seq + 1,
            episode=self._episode,
            generation=self._generation,
            consumed=self._stats.consumed,
            prompt=self.prompt if self.prompt is not None else observation.task or None,
            rtc=self._prefix(),
        )
        if self._requester.submit(request, replace=self.replaces):
            self._seq += 1
            self._stats.requests += 1
            self._asked(request)

    def _history(self, tick: int) -> tuple[Observation, ...]:
        """The observations of the ticks right before `tick`, oldest first, as far as there is no gap.

        A policy with a history was trained on consecutive ticks; the server repeats the oldest frame where fewer
        come, as training did at the start of an episode.
        """
        history: list[Observation] = []
        for earlier, observation in reversed(list(self._past)[:-1]):
            if earlier != tick - 1 - len(history):
                break
            history.append(observation)
        return tuple(reversed(history[: max(0, self.spec.n_obs_steps - 1)]))

    def _receive(self, outcome: Outcome) -> None:
        request = outcome.request
        if request.generation != self._generation:
            self._drop("other episode")
            return
        if outcome.reply is None:
            self._stats.errors[outcome.code] += 1
            if outcome.code != ErrorCode.SUPERSEDED:
                self._stats.trouble = outcome.error or outcome.code
                self._say(
                    f"request {outcome.code}",
                    f"no chunk came: {outcome.error}",
                    "the robot holds its pose when it has none left",
                )
            return
        chunk = self._check(outcome)
        if isinstance(chunk, str):
            self._drop(chunk)
            return
        self._accepted = chunk.seq
        usual = self.latency.upper_s
        self._measure(chunk)
        if usual is not None and chunk.latency_s > STALL_FACTOR * usual + STALL_S:
            # The network stalled: a fresh observation gets an answer sooner than this one is worth. Should such
            # answers be the rule from now on, the estimate has learned it and the next one is taken.
            self._drop("stale")
            return
        if not self._merge(chunk):
            self._drop("too late")
            return
        self._stats.chunks += 1
        self._stats.trouble = ""
        self._had_chunk = True
        failures = {topic for topic in self._said if topic.startswith("request")}
        if failures:
            self._said -= failures
            logger.warning("chunks come again")

    def _check(self, outcome: Outcome) -> Chunk | str:
        """The chunk in a reply, or why it is dropped."""
        request, reply = outcome.request, outcome.reply
        if not isinstance(reply, dict):
            return "wrong dimension"
        # A bare server echoes neither; its replies come in lock step.
        episode, seq = reply.get("episode", request.episode), reply.get("seq", request.seq)
        if episode not in (None, request.episode):
            self._say("chunk", f"a chunk of episode {episode} came in episode {request.episode}", REFUSED)
            return "other episode"
        if seq not in (None, request.seq) or not self._is_new(request.seq):
            self._say("chunk", f"the answer to request {seq} came where {self._seq} was asked", REFUSED)
            return "old chunk"
        try:
            with np.errstate(over="ignore"):
                actions = np.array(reply.get("actions"), dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            return "not finite"
        if (
            actions.ndim != 2
            or actions.shape[1] != self.spec.action_dim
            or not 1 <= len(actions) <= MAX_CHUNK
        ):
            self._say(
                "chunk",
                f"a chunk of shape {actions.shape} came; (1 to {MAX_CHUNK}, {self.spec.action_dim}) was expected",
                REFUSED,
            )
            return "wrong dimension"
        if not np.isfinite(actions).all():
            self._say("chunk", "a chunk with values that are not finite came", REFUSED)
            return "not finite"
        self._said.discard("chunk")
        return Chunk(
            actions=actions[: self.options.n_action_steps or None],
            seq=request.seq,
            episode=request.episode,
            consumed_at_capture=request.consumed,
            capture_time=request.observation.capture_time,
            latency_s=outcome.latency_s,
        )

    def _is_new(self, seq: int) -> bool:
        """Whether an answer to this request may still be used: it must belong to the newest one."""
        return seq == self._seq

    def _from(self, chunk: Chunk, boundary: bool, inner_step: np.ndarray) -> Origin:
        """The origin of the next action, whose newest source is `chunk`."""
        index = self._stats.consumed - chunk.consumed_at_capture
        due = chunk.capture_time + index / self.fps
        return Origin(chunk.episode, chunk.seq, due, boundary, inner_step, chunk, index)

    def _measure(self, chunk: Chunk) -> None:
        self.latency.add(chunk.latency_s)
        stats = self._stats
        stats.latency_s = chunk.latency_s
        stats.latency_upper_s = self.latency.upper_s or 0.0
        stats.delay_ticks = self.latency.ticks(self.fps) or 0
        stats.horizon = len(chunk.actions)

    def _drop(self, reason: str) -> None:
        self._stats.dropped[reason] += 1

    def _say(self, topic: str, what: str, then: str) -> None:
        """One log line when something begins, none while it lasts: whoever sees its end removes the topic."""
        if topic not in self._said:
            self._said.add(topic)
            logger.warning("%s; %s", what, then)
