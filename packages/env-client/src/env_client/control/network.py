"""The one thread that talks to the server: one request in flight, the newest input waiting, nothing more.

Life cycle: `NetworkThread` starts its thread with the first request and ends it in `close`. It never raises
into the control loop: every failure becomes an `Outcome` with a sentence, and the next request waits a little
longer (0.1 s, doubling, at most 2 s; or what the server asked for). The loop never waits for it: `submit` and
`poll` only take a lock that is never held over I/O.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from env_client.envs.env import Observation
from env_client.wire import (
    CameraSpec,
    EncodedImage,
    ErrorCode,
    InvalidInput,
    PolicySpec,
    RtcPrefix,
    WireError,
    decode_image,
    resize_image,
)

__all__ = ["ChunkRequest", "InferClient", "NetworkThread", "Outcome", "Requester", "encode_observation"]

logger = logging.getLogger(__name__)


class InferClient(Protocol):
    """What is needed of `env_client.websocket_client_policy.WebsocketClientPolicy`."""

    def infer(
        self,
        obs: dict[str, Any],
        *,
        history: list[dict[str, Any]] | None = None,
        prompt: str | None = None,
        episode: int | None = None,
        seq: int | None = None,
        rtc: RtcPrefix | None = None,
        capture_time: float | None = None,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ChunkRequest:
    """A wish for a chunk, with images still as the cameras gave them."""

    observation: Observation
    # Observations of the ticks right before it, oldest first.
    history: tuple[Observation, ...]
    seq: int
    episode: int
    # Grows at every reset: answers to requests of an older generation are dropped.
    generation: int
    # Actions handed out before the observation's tick.
    consumed: int
    prompt: str | None = None
    rtc: RtcPrefix | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    request: ChunkRequest
    # The server's reply, or None when it failed.
    reply: dict[str, Any] | None
    # Why it failed, one sentence.
    error: str | None = None
    # A code of the wire, "CONNECTION" or "CLIENT".
    code: str = ""
    # From the start of the request to the answer, in seconds.
    latency_s: float = 0.0


class Requester(Protocol):
    """How an action source reaches a server without waiting for it."""

    def submit(self, request: ChunkRequest, *, replace: bool = False) -> bool:
        """Take `request`, in place of one that still waits. With a request of the same generation in flight, or its
        answer not fetched, it is only taken if `replace`; False says that it was not."""
        ...

    def poll(self) -> list[Outcome]:
        """What became known since the last call. Never waits."""
        ...

    def discard(self) -> None:
        """Forget the request that waits and the outcomes that nobody fetched."""
        ...

    def close(self) -> None:
        """End. May be called twice."""
        ...


class NetworkThread:
    """A `Requester` over a client, in one daemon thread."""

    def __init__(
        self, client: InferClient, spec: PolicySpec, retry_min_s: float = 0.1, retry_max_s: float = 2.0
    ):
        self._client, self._spec = client, spec
        self._retry_min_s, self._retry_max_s = retry_min_s, retry_max_s
        self._wake = threading.Condition()
        self._waiting: ChunkRequest | None = None
        self._current: ChunkRequest | None = None
        self._outcomes: deque[Outcome] = deque(maxlen=16)
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, request: ChunkRequest, *, replace: bool = False) -> bool:
        with self._wake:
            # An answer that nobody has fetched yet counts: asked now, it would be taken for an old one.
            known = (self._current, *(outcome.request for outcome in self._outcomes))
            busy = any(other is not None and other.generation == request.generation for other in known)
            if self._closed or (busy and not replace):
                return False
            self._waiting = request
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="env-client-network", daemon=True)
                self._thread.start()
            self._wake.notify()
            return True

    def poll(self) -> list[Outcome]:
        with self._wake:
            outcomes = list(self._outcomes)
            self._outcomes.clear()
            return outcomes

    def discard(self) -> None:
        with self._wake:
            self._waiting = None
            self._outcomes.clear()

    def close(self, timeout_s: float = 1.0) -> None:
        """The thread ends after its request; it is a daemon, so a stuck one does not keep the process."""
        with self._wake:
            self._closed = True
            self._waiting = None
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        failures, not_before = 0, 0.0
        while True:
            with self._wake:
                self._current = None
                while not self._closed:
                    pause = not_before - time.monotonic()
                    if self._waiting is not None and pause <= 0:
                        break
                    self._wake.wait(pause if self._waiting is not None else None)
                if self._closed:
                    return
            # A server that is away may take a while: the observation is chosen when it is there again.
            error = self._connect()
            with self._wake:
                request, self._waiting = self._waiting, None
                self._current = request
            if request is None:
                continue
            started, reply = time.monotonic(), None
            if error is None:
                try:
                    reply = self._ask(request)
                except Exception as caught:  # a thread that died silently would starve the robot for ever
                    error = caught
            outcome, retry_ms = _outcome(request, reply, error, time.monotonic() - started)
            failures = 0 if error is None else failures + 1
            pause_s = 0.0
            if error is not None:
                pause_s = min(self._retry_max_s, self._retry_min_s * 2 ** min(failures - 1, 16))
                if retry_ms is not None:
                    pause_s = min(self._retry_max_s, retry_ms / 1e3)
            not_before = time.monotonic() + pause_s
            with self._wake:
                self._outcomes.append(outcome)

    def _connect(self) -> Exception | None:
        """Open the client's connection, where it has one to open; why that failed."""
        connect = getattr(self._client, "connect", None)
        try:
            if connect is not None:
                connect()
        except Exception as caught:
            return caught
        return None

    def _ask(self, request: ChunkRequest) -> dict[str, Any]:
        # Of the connection that is open now: another server may read less.
        codecs = getattr(self._client, "image_codecs", ())
        return self._client.infer(
            encode_observation(request.observation, self._spec, codecs),
            history=[encode_observation(earlier, self._spec, codecs) for earlier in request.history] or None,
            prompt=request.prompt,
            episode=request.episode,
            seq=request.seq,
            rtc=request.rtc,
            capture_time=request.observation.capture_time,
        )


def encode_observation(
    observation: Observation, spec: PolicySpec, codecs: Collection[str] = ()
) -> dict[str, Any]:
    """What the policy looks at, in its sizes: other cameras and parts stay at home.

    An image that the camera compressed already goes as it is where the server reads its codec (`codecs`) and
    brings it to the policy's size itself; anywhere else it is decoded here.
    Runs in the network thread: two 640x480 images cost some milliseconds, a control tick has none to give.
    Raises `InvalidInput` when a camera or a part of the state is missing.
    """
    plain = observation.to_wire()
    if spec.cameras:
        images: dict[str, np.ndarray | EncodedImage] = {}
        for camera in spec.cameras:
            if camera.optional and camera.name not in observation.images:
                continue
            if camera.name not in observation.images:
                raise InvalidInput(
                    f"the policy looks through a camera {camera.name!r}; this robot has "
                    f"{', '.join(observation.images) or 'none'}"
                )
            try:
                images[camera.name] = _fitted(observation.images[camera.name], camera, codecs)
            except InvalidInput as error:
                raise InvalidInput(f"the camera {camera.name!r} gives {error.message}") from error
        plain["images"] = images
    elif not codecs:
        plain["images"] = {name: decode_image(image) for name, image in observation.images.items()}
    if spec.states:
        missing = [part.name for part in spec.states if part.name not in observation.states]
        if missing:
            raise InvalidInput(
                f"the policy reads the state of {', '.join(missing)}; this robot has "
                f"{', '.join(observation.states) or 'none'}"
            )
        plain["states"] = {part.name: observation.states[part.name] for part in spec.states}
    return plain


def _fitted(
    image: np.ndarray | EncodedImage, camera: CameraSpec, codecs: Collection[str]
) -> np.ndarray | EncodedImage:
    if isinstance(image, EncodedImage):
        fits = camera.resize != "none" or image.shape[:2] == (camera.height, camera.width)
        if fits and image.codec in codecs:
            return image
        image = decode_image(image)
    return resize_image(image, camera.height, camera.width, camera.resize)


def _outcome(
    request: ChunkRequest, reply: Any, error: Exception | None, latency_s: float
) -> tuple[Outcome, float | None]:
    """The outcome, and the pause in ms that the error itself asks for."""
    if error is None:
        return Outcome(request, reply, latency_s=latency_s), None
    sentence = str(error) or type(error).__name__
    if isinstance(error, WireError):
        # Replaced by a newer observation of ours: nothing is wrong, and the newer one may go at once.
        pause = 0.0 if error.code == ErrorCode.SUPERSEDED else error.retry_after_ms
        return Outcome(request, None, sentence, error.code, latency_s), pause
    if isinstance(error, OSError | EOFError):
        return Outcome(request, None, sentence, "CONNECTION", latency_s), None
    logger.error("the request for a chunk failed in the client itself", exc_info=error)
    return Outcome(request, None, f"{type(error).__name__}: {sentence}", "CLIENT", latency_s), None
