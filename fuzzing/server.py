"""The whole WebSocket server behind one connection: HTTP head, frames, messages, answers.

The connection is the product's, on an event loop; only the socket is replaced, by one that takes and gives bytes in
memory. The server waits for a policy, so that nothing depends on one: what is asked is read to its end and refused.
"""

import asyncio
import logging
from typing import Any

from env_client.wire import pack
from env_client.wire.frames import BINARY, CLOSE, PING, TEXT, FrameReader, close_payload, frame_header

from fuzzing.wire import RECORDED
from grasp_cube.serving.access import Access
from grasp_cube.serving.configure import Policies
from grasp_cube.serving.limits import LimitsConfig
from grasp_cube.serving.listener import Listener
from grasp_cube.serving.loading import Loader
from grasp_cube.serving.pages import answer_http
from grasp_cube.serving.scheduler import Scheduler
from grasp_cube.serving.server import PolicyServer
from grasp_cube.serving.service import PolicyService
from grasp_cube.serving.websocket import Connection

__all__ = ["connection", "seeds_of"]

LIMITS = LimitsConfig(max_rate=0)
# What one connection may take, in bytes, for any input that there is here.
MAX_ANSWER = 2_000_000
HEAD = (
    b"GET %s HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n"
)


class _Failures(logging.Handler):
    """What the server logs as its own failure."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _Transport(asyncio.Transport):
    """A socket of memory."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 40000), "socket": _Socket()})
        self.written = bytearray()
        self.closed = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Socket:
    def setsockopt(self, *given: Any) -> None:
        raise OSError("none of these is a real one's")


class _Server:
    """Made once for a process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.failures = _Failures()
        for name in ("grasp_cube", "asyncio"):
            logging.getLogger(name).addHandler(self.failures)
            logging.getLogger(name).propagate = False
        # With a key, for the inputs that bring it, and without one.
        self.listeners = [self._listener(Access("sesame")), self._listener(Access())]

    def _listener(self, access: Access) -> Listener:
        service = PolicyService(Policies(Loader(Scheduler())), Scheduler(), access=access, limits=LIMITS)
        server = PolicyServer(service)
        return Listener(
            server._connection,
            lambda made, request: answer_http(service, server.sessions, made, request),
            max_bytes=100_000,
            max_connections=10,
        )

    async def connection(self, listener: Listener, data: bytes, step: int) -> bytes:
        transport, made = _Transport(), Connection(listener)
        made.connection_made(transport)
        at = 0
        while at < len(data) and not transport.closed:
            room = made.get_buffer(-1)
            count = min(len(room), len(data) - at, step)
            room[:count] = data[at : at + count]
            # A head grows where it lies; nobody may hold on to it.
            del room
            at += count
            made.buffer_updated(count)
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        made.connection_lost(None)
        if made.handling is not None:
            await asyncio.wait_for(made.handling, 5)
        return bytes(transport.written)


_SERVERS: list[_Server] = []


def connection(data: bytes) -> None:
    """The first byte: whether there is a key, and how large the pieces are."""
    if not data:
        return
    if not _SERVERS:
        _SERVERS.append(_Server())
    server = _SERVERS[0]
    step = 65536 if data[0] & 2 else 1 + (data[0] >> 2)
    written = server.loop.run_until_complete(server.connection(server.listeners[data[0] & 1], data[1:], step))
    failed, server.failures.records = server.failures.records, []
    assert not failed, "; ".join(record.getMessage() + str(record.exc_info) for record in failed)
    assert len(written) <= MAX_ANSWER, f"{len(written)} bytes were answered"
    if written:
        head, _, rest = written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 "), written[:100]
        if head.startswith(b"HTTP/1.1 101"):
            _read_frames(rest)


def _read_frames(data: bytes) -> None:
    """What the server says is in order."""
    reader = FrameReader(from_client=False, max_bytes=MAX_ANSWER)
    at = 0
    while at < len(data):
        room = reader.buffer()
        count = min(len(room), len(data) - at)
        room[:count] = data[at : at + count]
        at += count
        reader.advance(count)


def seeds_of(name: str) -> list[bytes]:
    key = b"\0\0\0\0"

    def frame(opcode: int, payload: bytes) -> bytes:
        return frame_header(opcode, len(payload), key) + payload

    asked = [file.read_bytes() for file in sorted(RECORDED.rglob("*.request.msgpack"))]
    asked = [request for request in asked if len(request) < 2000]
    talk = b"".join(frame(BINARY, request) for request in asked)
    heads = [
        HEAD % (b"/", b""),
        HEAD % (b"/lift?x=1", b"Authorization: Api-Key sesame\r\n"),
        HEAD % (b"/%41%ff", b"Origin: http://evil.example\r\nCookie: a=b\r\n"),
        *(
            b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % page
            for page in (b"healthz", b"readyz", b"metrics", b"status")
        ),
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    ]
    seeds = [b"\x03" + head for head in heads]
    seeds += [b"\x03" + heads[0] + frame(BINARY, request) for request in asked]
    seeds += [
        b"\x03" + heads[0] + talk,
        b"\x41" + heads[0] + frame(TEXT, b"x") + frame(PING, b"p") + frame(BINARY, pack({"op": "status"})),
        b"\x02" + heads[1] + frame(BINARY, pack({"op": "configure", "path": "..", "seq": 1})),
        b"\x03" + heads[0] + frame(CLOSE, close_payload(1000, "bye")),
    ]
    return seeds
