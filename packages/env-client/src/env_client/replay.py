"""Replaying a recorded episode against a policy, tick by tick.

The replay is in lock step: when a chunk is used up, the next one is asked for with the observation of that very
tick, and the recording waits for the answer. So each tick has a prediction that was made for it: action
`tick - captured` of the chunk whose observation was captured at tick `captured`.

Error policy: a lost connection is opened again and the same question is asked again; what cannot be cured ends
the replay with `ReplayStopped`, and what was recorded up to there stays in the `EpisodeRecord`.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from env_client.control.network import encode_observation
from env_client.envs.dataset import DatasetEnv
from env_client.envs.env import Observation
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import ErrorCode, WireError

__all__ = ["ChunkAsker", "EpisodeRecord", "Pace", "ReplayStopped", "ReplayedTick", "replay_episode"]

# Answers that get better by waiting.
PASSING = (ErrorCode.OVERLOADED, ErrorCode.NOT_READY, ErrorCode.SUPERSEDED)
# The same question is asked so often before the replay ends.
ATTEMPTS = 6
# The first pause between two attempts, in seconds; it doubles.
PAUSE_S = 0.2


class ReplayStopped(RuntimeError):
    """The replay cannot go on; the message is one sentence."""


@dataclass
class EpisodeRecord:
    """What an episode gave, of T ticks and A values in an action; filled while it runs."""

    episode: int
    # (T, A) float32
    recorded: np.ndarray
    # (T, A) float32; NaN where the replay did not come.
    predicted: np.ndarray
    # (T, A) float32: the pose at the moment that the chunk was asked for; what a policy that does nothing predicts.
    still: np.ndarray
    # Ticks at which a chunk begins.
    boundaries: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, env: DatasetEnv) -> "EpisodeRecord":
        actions = env.recorded_actions
        return cls(env.episode, actions, np.full_like(actions, np.nan), np.full_like(actions, np.nan))

    @property
    def ticks(self) -> int:
        """Ticks that have a prediction."""
        return int(np.isfinite(self.predicted[:, :1]).sum())

    @property
    def complete(self) -> bool:
        return self.ticks == len(self.recorded)

    @property
    def errors(self) -> np.ndarray:
        """(ticks, A) absolute differences between what was predicted and what was recorded."""
        return np.abs(self.predicted - self.recorded)[np.isfinite(self.predicted[:, 0])]

    @property
    def errors_of_standing_still(self) -> np.ndarray:
        """(ticks, A) the same for an arm that keeps the pose in which each chunk was asked for; NaN where the
        recording has no state that belongs to the action."""
        return np.abs(self.still - self.recorded)[np.isfinite(self.predicted[:, 0])]


class Pace:
    """Ticks at a rate; None runs as fast as it can. The clock waits while the recording waits."""

    def __init__(self, fps: float | None):
        self._period = None if fps is None else 1.0 / fps
        self._deadline = time.monotonic()

    def wait(self) -> None:
        if self._period is None:
            return
        now = time.monotonic()
        # Behind time, because a chunk was waited for: begin anew instead of rushing through the next ticks.
        self._deadline = max(self._deadline + self._period, now)
        time.sleep(self._deadline - now)


class ChunkAsker:
    """The policy as the replay sees it: it asks until there is an answer, and counts."""

    def __init__(
        self,
        client: WebsocketClientPolicy,
        *,
        action_dim: int,
        prompt: str | None = None,
        say: Callable[[str], None] = print,
    ):
        self.client = client
        self.prompt = prompt
        # Seconds of each answered question, the first one first.
        self.round_trips: list[float] = []
        # Milliseconds that the server says its policy took.
        self.infer_ms: list[float] = []
        self.reconnects = 0
        self._spec = client.spec
        self._identity = client.identity
        self._action_dim = action_dim
        self._say = say

    @property
    def history_ticks(self) -> int:
        """Ticks before the present one that the policy looks at."""
        return max(0, self._spec.n_obs_steps - 1) if self._spec is not None else 0

    def encode(self, observation: Observation) -> dict[str, Any]:
        """The observation as it travels: the cameras and parts that the policy names, in its sizes."""
        return observation.to_wire() if self._spec is None else encode_observation(observation, self._spec)

    def begin_episode(self) -> None:
        """Tell the server. Raises `ReplayStopped`."""
        self._until_answered(self.client.reset)

    def ask(self, observation: Observation, history: Sequence[Observation], episode: int) -> np.ndarray:
        """(horizon, action_dim) float32 for this tick and those after it. Raises `ReplayStopped`."""

        def infer() -> dict[str, Any]:
            started = time.perf_counter()
            reply = self.client.infer(
                self.encode(observation),
                history=[self.encode(earlier) for earlier in history] or None,
                prompt=self.prompt,
                episode=episode,
                capture_time=observation.capture_time,
            )
            self.round_trips.append(time.perf_counter() - started)
            return reply

        reply = self._until_answered(infer)
        timing = reply.get("server_timing")
        if isinstance(timing, dict) and isinstance(timing.get("infer_ms"), int | float):
            self.infer_ms.append(float(timing["infer_ms"]))
        return self._checked(reply.get("actions"))

    def _until_answered(self, question: Callable[[], Any]) -> Any:
        for attempt in range(ATTEMPTS):
            pause_s = PAUSE_S * 2**attempt
            try:
                return question()
            except ConnectionLost as error:
                self._say(f"{_sentence(error)} Connecting again; the recording waits.")
                self._connect_again()
                reason = str(error)
            except WireError as error:
                if error.code not in PASSING:
                    raise ReplayStopped(f"the server refused ({error.code}): {error.message}") from error
                reason = f"{error.code}: {error.message}"
                if error.retry_after_ms is not None:
                    pause_s = error.retry_after_ms / 1e3
            time.sleep(pause_s)
        raise ReplayStopped(f"the server gave no answer in {ATTEMPTS} attempts ({reason})")

    def _connect_again(self) -> None:
        try:
            self.client.connect()
        except (ConnectionLost, WireError) as error:
            raise ReplayStopped(str(error)) from error
        if self.client.identity != self._identity:
            raise ReplayStopped("the server came back with another policy: run the replay again")
        self.reconnects += 1
        self._say("Connected again; the replay goes on.")

    def _checked(self, actions: Any) -> np.ndarray:
        try:
            chunk = np.asarray(actions, np.float32)
        except (TypeError, ValueError):
            chunk = np.zeros(0, np.float32)
        if chunk.ndim != 2 or not len(chunk) or chunk.shape[1] != self._action_dim:
            raise ReplayStopped(
                f"the server's chunk has the shape {list(chunk.shape)}; (horizon, {self._action_dim}) was expected"
            )
        if not np.isfinite(chunk).all():
            raise ReplayStopped("the server's chunk holds values that are not finite")
        return chunk


@dataclass(frozen=True)
class ReplayedTick:
    """One tick of the replay, as whoever looks on gets it."""

    tick: int
    observation: Observation
    # (A,) what the policy says, and what was commanded when it was recorded.
    action: np.ndarray
    recorded: np.ndarray
    # (H, A) the chunk that the action comes from, and its row.
    chunk: np.ndarray
    index: int


def replay_episode(
    env: DatasetEnv,
    asker: ChunkAsker,
    record: EpisodeRecord,
    first: Observation,
    pace: Pace,
    on_tick: Callable[[ReplayedTick], object] = lambda tick: None,
    turn: Callable[[], bool] = lambda: True,
) -> None:
    """Fill `record` from the episode that `env.reset()` has just begun with the observation `first`.

    `turn` is asked before each tick and may wait; where it says False, the episode ends.
    """
    asker.begin_episode()
    observation, past = first, deque[Observation](maxlen=asker.history_ticks)
    chunk, captured = np.zeros((0, env.spec.action_dim), np.float32), 0
    pose = np.full(env.spec.action_dim, np.nan, np.float32)
    while not env.done and turn():
        tick = env.tick
        if tick - captured >= len(chunk):
            chunk, captured = asker.ask(observation, tuple(past), env.episode), tick
            record.boundaries.append(tick)
            pose = _pose(env, observation)
        action = chunk[tick - captured]
        record.predicted[tick], record.still[tick] = action, pose
        pace.wait()
        on_tick(ReplayedTick(tick, observation, action, env.recorded_action(), chunk, tick - captured))
        env.apply_action(action)
        past.append(observation)
        observation = env.get_observation()


def _pose(env: DatasetEnv, observation: Observation) -> np.ndarray:
    """(A,) the measured value of each action value; NaN where the state has another size than the action."""
    if sum(part.size for part in env.spec.states) != env.spec.action_dim:
        return np.full(env.spec.action_dim, np.nan, np.float32)
    state = np.concatenate([observation.states[part.name] for part in env.spec.states])
    return state[env.spec.state_index]


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + "."
