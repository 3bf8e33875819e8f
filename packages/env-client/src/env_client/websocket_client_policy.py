"""A policy on another machine, as an object: `WebsocketClientPolicy(host, port).infer(obs)["action"]`.

It speaks our protocol, and plain openpi where the server's metadata names no protocol.

Life cycle: the constructor waits for the server (with a visible message) and reads its metadata; `infer` is
lock-step; a lost connection raises `ConnectionLost` once and is opened again by the next call. Nothing has to
be told again after that: each request carries all that its answer depends on.
A connection that ended while nobody used it (a server that restarted, a proxy's time-out), or whose server says that it
ends and did not begin the request (1012), is opened again at once and without an error, if the same policy answers there;
so is one that ends in this way right after.
One thread at a time may call it, but for `close`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import WebSocketException

from env_client.answers import raise_if_final, read_answer, read_metadata, reason, with_chunk
from env_client.image_sender import CodecChoice, ImageSender
from env_client.websocket import Connection, NothingSent
from env_client.wire import (
    Configure,
    Dialect,
    Frame,
    Infer,
    InvalidInput,
    PolicySpec,
    Progress,
    RemoteError,
    RtcPrefix,
    pack,
    pack_frame,
)

__all__ = ["ConnectionLost", "WebsocketClientPolicy"]

logger = logging.getLogger(__name__)

# Between two attempts to reach a server that is not there, in seconds.
RETRY_S = 0.5
# A handshake that takes longer is given up and tried again, in seconds.
HANDSHAKE_S = 10.0
# How often a waiting client says so, in seconds.
MESSAGE_EVERY_S = 5.0
# Connections of one request that may end before it is begun and are replaced at once; with several servers that are sent
# away one after the other (an update of all of them) there can be more than one.
REOPENINGS = 3
# How long a load that a client asked for may take, in seconds.
CONFIGURE_S = 1800.0


class ConnectionLost(ConnectionError):
    """The server is gone or did not answer in time. The next call connects again."""


class WebsocketClientPolicy:
    """A remote policy.

    host: a name, an address, or a whole `ws://` or `wss://` URL (then `port` is not used).
    path: the name of one of the server's policies, such as "lift"; by default its first one.
    connect_timeout_s: how long to wait for a server that is not there; None waits for ever.
    timeout_s: how long one inference may take; the first of a connection may take `first_timeout_s`, because
        plain servers compile or load during it.
    on_status: called with each sentence about the connection; by default they are printed.
    image_codec: raw | jpeg | png, for servers that announce it, or auto: JPEG where the link is slow; `jpeg_quality` is 1..100.
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
        image_codec: CodecChoice = "raw",
        jpeg_quality: int = 90,
        dialect: Dialect | str = Dialect.OPENPI,
        path: str | None = None,
    ):
        if host.startswith(("ws://", "wss://")):
            self.url = host
        else:
            self.url = f"ws://{_bracket(host)}" + (f":{port}" if port else "")
        if path:
            self.url = f"{self.url.rstrip('/')}/{path.lstrip('/')}"
        self.connect_timeout_s = connect_timeout_s
        self.timeout_s = timeout_s
        self.first_timeout_s = first_timeout_s
        self.images = ImageSender(image_codec, jpeg_quality)
        self.dialect = Dialect(dialect)
        # What the server said when this connection was opened or configured, and its policy; None on a plain openpi
        # server, and on one of ours that waits for `configure`.
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

    @property
    def idle(self) -> bool:
        """Whether the server serves no policy here yet and waits for `configure`."""
        return self.speaks_protocol and self.spec is None

    @property
    def image_codecs(self) -> tuple[str, ...]:
        """How images may be compressed for this server; a plain openpi server reads arrays only."""
        return tuple(self.metadata.get("image_codecs", ()))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells policies apart: equal specs may belong to two checkpoints, which the server's id distinguishes."""
        return self.spec, self.metadata.get("policy_id")

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
                raise_if_final(error, self.url)
                waited = time.monotonic() - started
                if self.connect_timeout_s is not None and waited >= self.connect_timeout_s:
                    raise ConnectionLost(
                        f"no policy server answered at {self.url} within {self.connect_timeout_s:g} s ({reason(error)}): "
                        "is it running (serve_policy), is the address right, is the port open in the firewall?"
                    ) from error
                now = time.monotonic()
                if announced is None or now - announced >= MESSAGE_EVERY_S:
                    self._say(
                        f"Waiting for a policy server at {self.url} … ({reason(error)}, {waited:.0f} s)"
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
            metadata, spec = read_metadata(connection.recv(timeout=self.first_timeout_s), self.url)
            self._connection = connection
            if self._closing.is_set():
                raise ConnectionLost(f"the client of {self.url} was closed")
        except BaseException:
            self._connection = None
            connection.close()
            raise
        finally:
            self._opening = None
        self._adopt(metadata, spec)
        self._answered = self._prompted = False

    def _adopt(self, metadata: dict[str, Any], spec: PolicySpec | None) -> None:
        self.metadata, self.spec = metadata, spec
        self._announced = pack(metadata)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _reopen(self) -> Connection:
        """The same policy on a new connection, after the old one ended while it was idle."""
        announced = self._announced
        self._drop()
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
        deadline_ms: float | None = None,
    ) -> dict[str, Any]:
        """The server's reply for one observation; `reply["action"]` and `reply["actions"]` are the chunk,
        (horizon, action_dim) float32 in robot units.

        history: the observations of the ticks before `obs`, oldest first (`spec.n_obs_steps - 1` of them).
        deadline_ms: how long the request may wait for the device before it is refused (OVERLOADED).
        On a plain openpi server only `obs` and `prompt` travel, and `seq`, `episode` and `capture_time` are
        put into the reply here.
        Raises `RemoteError` when the server answers with an error, `ConnectionLost` when it is gone or late.
        """
        self.connect()
        self._seq = self._seq + 1 if seq is None else seq
        if not self.speaks_protocol:
            bare = obs if prompt is None else obs | {"prompt": prompt}
            reply = self._exchange(pack_frame(bare, self.dialect))
            return with_chunk(reply) | {"seq": self._seq, "episode": episode, "capture_time": capture_time}
        started = time.monotonic()
        sent, *earlier = self.images.encoded((obs, *(history or ())), self.image_codecs)
        request = Infer(
            obs=sent,
            history=tuple(earlier),
            prompt=prompt,
            rtc=rtc,
            seq=self._seq,
            episode=episode,
            capture_time=capture_time,
            deadline_ms=deadline_ms,
        )
        reply = self._exchange(pack_frame(request.to_wire(), self.dialect), seq=self._seq)
        if changed := self.images.answered(time.monotonic() - started, reply):
            self._say(changed)
        return with_chunk(reply)

    def reset(self) -> None:
        """Tell the server that an episode begins. A plain openpi server knows no reset and is not told."""
        self.connect()
        if self.speaks_protocol:
            self._exchange(pack_frame({"reset": True}))

    def status(self) -> dict[str, Any]:
        """The server's state as plain values."""
        return self._call({"op": "status"})

    def set_prompt(self, prompt: str) -> None:
        """The prompt of this connection for requests that name none."""
        self._call({"op": "set_prompt", "prompt": prompt})
        self._prompted = True

    def configure(
        self,
        *,
        path: str | None = None,
        type: str | None = None,
        config_name: str | None = None,
        prompt: str | None = None,
        device: str | None = None,
        name: str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float | None = None,
    ) -> PolicySpec:
        """Have the server load a policy, and be served by it from here on; the policy's spec.

        path: a folder on the server, absolute or below the server's root. Without a path, `name` chooses one of
            the policies that the server has. The other fields are those of `env_client.wire.Configure`.
        on_progress: called with each `Progress` that the server streams; by default its sentence goes to `on_status`.
        timeout_s: how long the whole load may take.
        Raises `RemoteError` with the server's reason; the policy that served before goes on serving then.
        """
        self.connect()
        self._need_protocol("configure")
        tell = on_progress or (lambda progress: self._say(progress.text))
        self._seq += 1
        request = Configure(path, type, config_name, prompt, device, name, seq=self._seq)
        reply = self._exchange(
            pack_frame(request.to_wire(), self.dialect),
            seq=self._seq,
            limit_s=timeout_s or CONFIGURE_S,
            on_progress=tell,
        )
        spec = PolicySpec.from_wire(reply.get("policy"))
        self._adopt(reply.get("metadata") or {}, spec)
        if name is not None:
            # Where a reconnect finds the same policy.
            self.url = urlsplit(self.url)._replace(path=f"/{name}").geturl()
        return spec

    def _need_protocol(self, what: str) -> None:
        if not self.speaks_protocol:
            raise InvalidInput(f"the server at {self.url} speaks plain openpi, which has no {what}")

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        self.connect()
        self._need_protocol(message["op"])
        self._seq += 1
        return self._exchange(pack_frame(message | {"seq": self._seq}, self.dialect), seq=self._seq)

    def _exchange(
        self,
        frame: Frame,
        seq: int | None = None,
        *,
        limit_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> dict[str, Any]:
        connection = self._connection
        if connection is None:
            raise ConnectionLost(f"the client of {self.url} was closed")
        limit = limit_s or self._limit()
        try:
            for reopenings in range(1 + REOPENINGS):
                try:
                    if reopenings:
                        connection = self._reopen()
                        # As on every new connection, the first answer may take longer.
                        limit = limit_s or self._limit()
                    reply = self._ask(connection, frame, seq, limit, on_progress)
                    break
                except NothingSent:
                    # A prompt belongs to its connection: the caller has to know that it is gone.
                    if reopenings == REOPENINGS or self._closing.is_set() or self._prompted:
                        raise
        except ConnectionLost:
            raise
        except TimeoutError as error:
            # A late reply would be taken for the answer to the next request: this connection is spent.
            self._drop()
            raise ConnectionLost(f"{self.url} gave no answer within {limit:g} s") from error
        except (OSError, WebSocketException) as error:
            self._drop()
            raise ConnectionLost(f"the connection to {self.url} was lost ({reason(error)})") from error
        except BaseException as error:
            if not isinstance(error, RemoteError):
                self._drop()
            raise
        self._answered = True
        return reply

    def _ask(
        self,
        connection: Connection,
        frame: Frame,
        seq: int | None,
        limit: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> dict[str, Any]:
        """Send, and the answer; `on_progress` gets what comes before it."""
        deadline = time.monotonic() + limit
        connection.send_fragments(frame.fragments(), limit)
        while True:
            answer = connection.recv(timeout=max(0.0, deadline - time.monotonic()))
            reply = read_answer(answer, self.url)
            # A reply to another request can only come after a caller was interrupted inside this method.
            if seq is not None and reply.get("seq") not in (seq, None):
                continue
            if reply.get("op") != "progress":
                return reply
            if on_progress is not None:
                on_progress(Progress.from_wire(reply))

    def _limit(self) -> float:
        return self.timeout_s if self._answered else max(self.first_timeout_s, self.timeout_s)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
