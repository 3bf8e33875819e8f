"""What the gRPC gateway remembers of each peer, and for how long.

A peer is one connection (`ipv4:ADDRESS:PORT`), as gRPC names it: a client that reconnects begins anew. gRPC does
not say when a connection ends, so sessions expire, and their number is bounded. They are small: no image is kept.

Life cycle: `with sessions.use(peer) as session` for each call; `session.lock` puts the calls of one peer in
order. Everything here runs on the event loop's thread.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from env_client.openpi_grpc import openpi_inference_pb2 as pb2
from env_client.wire import InvalidInput

from grasp_cube.serving.limits import RateLimit
from grasp_cube.serving.served import ServedPolicy

__all__ = ["PeerSession", "Sessions", "obey"]

# A peer that has been silent for so long is forgotten, in seconds: longer than the pause between two episodes,
# because with it goes its prompt.
IDLE_S = 3600.0
# A peer that has been silent for so long is not counted as connected, in seconds.
ACTIVE_S = 60.0
# Peers that are remembered; the one that has been silent longest goes first.
MAX_SESSIONS = 256
# After a pause of so many seconds the robot may stand elsewhere: the rest of a chunk is not given out any more.
MAX_PAUSE_S = 2.0


@dataclass(eq=False)
class PeerSession:
    """One peer's memory."""

    peer: str
    rate: RateLimit = field(default_factory=lambda: RateLimit(0))
    # The policy that this peer is served by, since its first call, its last reset or its last Configure.
    served: ServedPolicy | None = None
    # The name under which it is served.
    slot: str | None = None
    # What CMD_SET_PROMPT or Configure said; used by observations that name no prompt.
    prompt: str | None = None
    episode: int = 0
    # Answers given in this episode.
    frames: int = 0
    # Why this peer gets no actions: the policy that it asked for could not be loaded. None: it may ask.
    refusal: str | None = None
    # Calls of Configure that are running.
    configuring: int = 0
    # Calls that use this session at the moment.
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    # The actions of the last chunk that Predict has not given out, each (action_dim,) float32.
    _rest: deque[np.ndarray] = field(default_factory=deque)
    _policy: ServedPolicy | None = None
    _prompt: str | None = None
    _frame_index: int = 0
    _given: float = 0.0

    def begin_episode(self, episode: int | None = None) -> None:
        """Forget what belongs to an episode. The prompt stays, as the peers of this protocol expect."""
        if episode is not None:
            self.episode = episode
        self.frames = 0
        self.drop_chunk()

    def drop_chunk(self) -> None:
        self._rest.clear()
        self._policy = None

    def keep(self, policy: ServedPolicy, prompt: str | None, chunk: np.ndarray) -> None:
        """Hold the (n, action_dim) actions that were not given out yet."""
        self._rest = deque(chunk)
        self._policy, self._prompt = policy, prompt

    def next_action(self, policy: ServedPolicy, prompt: str | None, frame_index: int) -> np.ndarray | None:
        """The next action of the chunk that is held; None when there is none that still fits.

        It does not fit when another policy or prompt is asked for, when the frames count backwards (an episode
        began without a word), or after a pause.
        """
        fits = (
            self._policy is policy
            and self._prompt == prompt
            and frame_index >= self._frame_index
            and time.monotonic() - self._given <= MAX_PAUSE_S
        )
        if not fits:
            self.drop_chunk()
        return self._rest.popleft() if self._rest else None

    def gave(self, frame_index: int) -> int:
        """Count an answer; its number in the episode."""
        self.frames += 1
        self._frame_index = frame_index
        self._given = time.monotonic()
        return self.frames


class Sessions:
    """The peers that are remembered, least recently used first."""

    def __init__(
        self,
        max_sessions: int = MAX_SESSIONS,
        idle_s: float = IDLE_S,
        max_rate: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_sessions = max_sessions
        self.idle_s = idle_s
        self.max_rate = max_rate
        self._clock = clock
        self._by_peer: OrderedDict[str, PeerSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_peer)

    def __iter__(self) -> Iterator[PeerSession]:
        return iter(list(self._by_peer.values()))

    def active(self) -> int:
        """Peers that asked for something within the last `ACTIVE_S`; gRPC does not say when one leaves."""
        now = self._clock()
        return sum(session.users > 0 or now - session.used <= ACTIVE_S for session in self)

    @contextlib.contextmanager
    def use(self, peer: str) -> Iterator[PeerSession]:
        """The session of a peer, which is not forgotten before the block is left."""
        self._forget(new=peer not in self._by_peer)
        session = self._by_peer.get(peer)
        if session is None:
            session = self._by_peer[peer] = PeerSession(peer, RateLimit(self.max_rate))
        session.users += 1
        self._touch(session)
        try:
            yield session
        finally:
            session.users -= 1
            self._touch(session)

    def _touch(self, session: PeerSession) -> None:
        session.used = self._clock()
        if session.peer in self._by_peer:
            self._by_peer.move_to_end(session.peer)

    def _forget(self, *, new: bool) -> None:
        """Drop the expired and, for a new one, the oldest; never one that is in use."""
        now = self._clock()
        for session in self:
            crowded = new and len(self._by_peer) >= self.max_sessions
            if not crowded and now - session.used <= self.idle_s:
                break
            if session.users == 0:
                del self._by_peer[session.peer]


def obey(session: PeerSession, command: pb2.ControlCommand) -> str:
    """Carry a command out; what is said about it. Raises `InvalidInput`."""
    match command.type:
        case pb2.CMD_RESET:
            session.begin_episode()
            # Whatever is served now.
            session.served = None
            return "reset"
        case pb2.CMD_SET_EPISODE:
            text = command.params.get("episode", "")
            try:
                episode = int(text)
                if not -(2**31) <= episode < 2**31:
                    raise ValueError
            except ValueError:
                raise InvalidInput(
                    f"CMD_SET_EPISODE with episode={text!r:.40}; a 32-bit integer was expected"
                ) from None
            session.begin_episode(episode)
            return f"episode {episode}"
        case pb2.CMD_SET_PROMPT:
            if "prompt" not in command.params:
                raise InvalidInput("CMD_SET_PROMPT without the parameter 'prompt'")
            session.prompt = command.params["prompt"] or None
            return f"prompt {session.prompt!r}" if session.prompt else "the policy's default prompt"
        case other:
            raise InvalidInput(
                f"the command {other}; CMD_RESET, CMD_SET_EPISODE or CMD_SET_PROMPT was expected"
            )
