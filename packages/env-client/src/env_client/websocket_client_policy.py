"""A policy on another machine, as an object: `WebsocketClientPolicy(host, port).infer(obs)["action"]`.

It speaks our protocol, and plain openpi where the server's metadata names no protocol.

Life cycle: the constructor waits for the server (with a visible message) and reads its metadata; `infer` is
lock-step; a lost connection raises `ConnectionLost` once and is opened again by the next call. Nothing has to
be told again after that: each request carries all that its answer depends on.
A connection that ended while nobody used it (a server that restarted, a proxy's time-out) is opened again at
once and without an error, if the same policy answers there: nothing had been sent on it.
One thread at a time may call it, but for `close`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException

from env_client.websocket import Connection, NothingSent
from env_client.wire import (
    Dialect,
    ErrorCode,
    Infer,
    InvalidInput,
    PolicySpec,
    RemoteError,
    RtcPrefix,
    encode_image,
    pack_parts,
    unpack,
)
from env_client.wire.images import ImageCodec

__all__ = ["ConnectionLost", "WebsocketClientPolicy"]

logger = logging.getLogger(__name__)

# Between two attempts to reach a server that is not there, in seconds.
RETRY_S = 0.5
# A handshake that takes longer is given up and tried again, in seconds.
HANDSHAKE_S = 10.0
# How often a waiting client says so, in seconds.
MESSAGE_EVERY_S = 5.0


class ConnectionLost(ConnectionError):
    """The server is gone or did not answer in time. The next call connects again."""


class WebsocketClientPolicy:
    """A remote policy.

    host: a name, an address, or a whole `ws://` or `wss://` URL (then `port` is not used).
    connect_timeout_s: how long to wait for a server that is not there; None waits for ever.
    timeout_s: how long one inference may take; the first of a connection may take `first_timeout_s`, because
        plain servers compile or load during it.
    on_status: called with each sentence about the connection; by default they are printed.
    image_codec: raw | jpeg | png, for servers that announce it; `jpeg_quality` is 1..100.
    Raises `ConnectionLost` when no server answers in time, `RemoteError` when it refuses (a wrong key, say).
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        api_key: str | None = None,
        *,
        connect_timeout_s: float | None = None,
        timeout_s: float = 30.0,
        first_timeout_s: float = 180.0,
        on_status: Callable[[str], None] | None = None,
        image_codec: ImageCodec = "raw",
        jpeg_quality: int = 90,
        dialect: Dialect | str = Dialect.OPENPI,
    ):
        if host.startswith(("ws://", "wss://")):
            self.url = host
        else:
            self.url = f"ws://{_bracket(host)}" + (f":{port}" if port else "")
        self.connect_timeout_s = connect_timeout_s
        self.timeout_s = timeout_s
        self.first_timeout_s = first_timeout_s
        self.image_codec = image_codec
        self.jpeg_quality = jpeg_quality
        self.dialect = Dialect(dialect)
        # What the server said when this connection was opened, and its policy; None on a plain openpi server.
        self.metadata: dict[str, Any] = {}
        self.spec: PolicySpec | None = None
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._say = on_status or (lambda sentence: print(sentence, flush=True))
        self._connection: Connection | None = None
        self._answered = False
        # The connection whose metadata is awaited; its metadata's bytes; whether it was told a prompt.
        self._opening: Connection | None = None
        self._announced = b""
        self._prompted = False
        self._seq = 0
        self._closing = threading.Event()
        self.connect()

    # ------------------------------------------------------------------------------------ connection

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def speaks_protocol(self) -> bool:
        """False on a plain openpi server, which knows only bare observations."""
        return "protocol" in self.metadata

    def connect(self) -> None:
        """Wait for the server and read its metadata. Does nothing when connected."""
        if self._connection is not None:
            return
        started = time.monotonic()
        announced: float | None = None
        while True:
            if self._closing.is_set():
                raise ConnectionLost(f"the client of {self.url} was closed")
            try:
                self._open()
            except (OSError, TimeoutError, WebSocketException) as error:
                self._raise_if_final(error)
                waited = time.monotonic() - started
                if self.connect_timeout_s is not None and waited >= self.connect_timeout_s:
                    raise ConnectionLost(
                        f"no policy server answered at {self.url} within {self.connect_timeout_s:g} s ({_reason(error)}): "
                        "is it running (serve_policy), is the address right, is the port open in the firewall?"
                    ) from error
                now = time.monotonic()
                if announced is None or now - announced >= MESSAGE_EVERY_S:
                    self._say(
                        f"Waiting for a policy server at {self.url} … ({_reason(error)}, {waited:.0f} s)"
                    )
                    announced = now
                self._closing.wait(RETRY_S)
            else:
                if announced is not None:
                    self._say(f"The policy server at {self.url} is there.")
                return

    def _open(self) -> None:
        connection = Connection.open(self.url, headers=self._headers, timeout=HANDSHAKE_S)
        try:
            self._opening = connection
            if self._closing.is_set():
                raise ConnectionLost(f"the client of {self.url} was closed")
            # The metadata of a server that loads while clients connect may be as late as a first inference.
            frame = connection.recv(timeout=self.first_timeout_s)
            if isinstance(frame, str):
                raise RemoteError(ErrorCode.NOT_READY, f"the server at {self.url} answered: {frame}")
            metadata, _ = unpack(frame)
            if not isinstance(metadata, dict):
                raise InvalidInput(
                    f"the first frame of {self.url} is not a map; a policy's metadata was expected"
                )
            spec = PolicySpec.from_wire(metadata["policy"]) if metadata.get("policy") is not None else None
            self._connection = connection
            if self._closing.is_set():
                raise ConnectionLost(f"the client of {self.url} was closed")
        except BaseException:
            self._connection = None
            connection.close()
            raise
        finally:
            self._opening = None
        self.metadata, self.spec = metadata, spec
        self._announced = bytes(frame)
        self._answered = self._prompted = False

    def _raise_if_final(self, error: Exception) -> None:
        """Some answers do not get better by waiting."""
        if isinstance(error, InvalidURI):
            raise InvalidInput(
                f"{self.url} is not a WebSocket address: give a host and a port, or ws://HOST:PORT"
            ) from error
        if isinstance(error, InvalidStatus):
            status = error.response.status_code
            body = bytes(error.response.body or b"").decode("utf-8", "replace").strip()
            if status in (401, 403):
                raise RemoteError(
                    ErrorCode.UNAUTHENTICATED,
                    f"the server at {self.url} refused the key (HTTP {status}): {body or 'give its --api_key'}",
                ) from error
            if status == 404:
                raise RemoteError(
                    ErrorCode.INVALID_INPUT, f"the server at {self.url}: {body or 'HTTP 404'}"
                ) from error

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _reopen(self, ended: NothingSent) -> Connection:
        """The same policy on a new connection, after the old one `ended` while it was idle."""
        announced = self._announced
        self._drop()
        if self._closing.is_set() or self._prompted:
            # A prompt belongs to its connection: the caller has to know that it is gone.
            raise ended
        self._open()
        connection = self._connection
        if connection is None or self._announced != announced:
            raise ConnectionLost(
                f"the server at {self.url} was started again and announces another policy: look at its spec"
            )
        return connection

    def close(self) -> None:
        """Close the connection. May be called twice, and from another thread to end a waiting call."""
        self._closing.set()
        opening = self._opening
        if opening is not None:
            opening.close()
        self._drop()

    def __enter__(self) -> "WebsocketClientPolicy":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------- requests

    def infer(
        self,
        obs: dict[str, Any],
        *,
        history: Sequence[dict[str, Any]] | None = None,
        prompt: str | None = None,
        episode: int | None = None,
        seq: int | None = None,
        rtc: RtcPrefix | None = None,
        capture_time: float | None = None,
    ) -> dict[str, Any]:
        """The server's reply for one observation; `reply["action"]` and `reply["actions"]` are the chunk,
        (horizon, action_dim) float32 in robot units.

        history: the observations of the ticks before `obs`, oldest first (`spec.n_obs_steps - 1` of them).
        On a plain openpi server only `obs` and `prompt` travel, and `seq`, `episode` and `capture_time` are
        put into the reply here.
        Raises `RemoteError` when the server answers with an error, `ConnectionLost` when it is gone or late.
        """
        self.connect()
        self._seq = self._seq + 1 if seq is None else seq
        if not self.speaks_protocol:
            bare = obs if prompt is None else obs | {"prompt": prompt}
            reply = self._exchange(pack_parts(bare, self.dialect))
            return _with_chunk(reply) | {"seq": self._seq, "episode": episode, "capture_time": capture_time}
        request = Infer(
            obs=self._encoded(obs),
            history=tuple(self._encoded(item) for item in history or ()),
            prompt=prompt,
            rtc=rtc,
            seq=self._seq,
            episode=episode,
            capture_time=capture_time,
        )
        return _with_chunk(self._exchange(pack_parts(request.to_wire(), self.dialect), seq=self._seq))

    def reset(self) -> None:
        """Tell the server that an episode begins. A plain openpi server knows no reset and is not told."""
        self.connect()
        if self.speaks_protocol:
            self._exchange(pack_parts({"reset": True}))

    def status(self) -> dict[str, Any]:
        """The server's state as plain values."""
        return self._call({"op": "status"})

    def set_prompt(self, prompt: str) -> None:
        """The prompt of this connection for requests that name none."""
        self._call({"op": "set_prompt", "prompt": prompt})
        self._prompted = True

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        self.connect()
        if not self.speaks_protocol:
            raise InvalidInput(f"the server at {self.url} speaks plain openpi, which has no {message['op']}")
        self._seq += 1
        return self._exchange(pack_parts(message | {"seq": self._seq}, self.dialect), seq=self._seq)

    def _exchange(self, frame: list[bytes | memoryview], seq: int | None = None) -> dict[str, Any]:
        connection = self._connection
        if connection is None:
            raise ConnectionLost(f"the client of {self.url} was closed")
        limit = self._limit()
        deadline = time.monotonic() + limit
        try:
            try:
                connection.send(frame, limit)
            except NothingSent as ended:
                connection = self._reopen(ended)
                # As on every new connection, the first answer may take longer.
                limit = self._limit()
                deadline = time.monotonic() + limit
                connection.send(frame, limit)
            while True:
                answer = connection.recv(timeout=max(0.0, deadline - time.monotonic()))
                reply = self._read(answer)
                # A reply to another request can only come after a caller was interrupted inside this method.
                if seq is None or reply.get("seq") in (seq, None):
                    break
        except ConnectionLost:
            raise
        except TimeoutError as error:
            # A late reply would be taken for the answer to the next request: this connection is spent.
            self._drop()
            raise ConnectionLost(f"{self.url} gave no answer within {limit:g} s") from error
        except (OSError, WebSocketException) as error:
            self._drop()
            raise ConnectionLost(f"the connection to {self.url} was lost ({_reason(error)})") from error
        except BaseException as error:
            if not isinstance(error, RemoteError):
                self._drop()
            raise
        self._answered = True
        return reply

    def _limit(self) -> float:
        return self.timeout_s if self._answered else max(self.first_timeout_s, self.timeout_s)

    def _read(self, answer: str | memoryview) -> dict[str, Any]:
        if isinstance(answer, str):
            code, separator, message = answer.partition(": ")
            if separator and code in ErrorCode.__members__:
                raise RemoteError(code, message)
            raise RemoteError(ErrorCode.INTERNAL, answer)
        reply, _ = unpack(answer)
        if not isinstance(reply, dict):
            raise InvalidInput(f"{self.url} answered with {type(reply).__name__}; a map was expected")
        if reply.get("op") == "error":
            raise RemoteError(
                str(reply.get("code")), str(reply.get("message")), retry_after_ms=reply.get("retry_after_ms")
            )
        return reply

    def _encoded(self, obs: dict[str, Any]) -> dict[str, Any]:
        images = obs.get("images")
        if self.image_codec == "raw" or not isinstance(images, dict):
            return obs
        if self.image_codec not in self.metadata.get("image_codecs", ()):
            return obs
        encoded = {
            name: encode_image(image, self.image_codec, self.jpeg_quality)
            if isinstance(image, np.ndarray)
            else image
            for name, image in images.items()
        }
        return obs | {"images": encoded}


def _with_chunk(reply: dict[str, Any]) -> dict[str, Any]:
    """Plain servers send `actions` or `action`; callers may read either."""
    chunk = reply.get("actions", reply.get("action"))
    return reply | {"actions": chunk, "action": chunk}


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _reason(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, InvalidHandshake):
        return f"no WebSocket answer: {error}"
    return str(error) or type(error).__name__
