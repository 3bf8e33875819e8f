"""WebSocket connections for the event loop, made for few clients with large messages.

Life cycle: made by a `listener.Listener` for each client that connects. `handler(connection)` runs as a task: iterate
over the connection for its messages, `await connection.send(...)` to answer, return to close.
Error policy: a peer that breaks the protocol is told the close code and cut; `ConnectionClosed` says to the
handler that nobody listens any more; what the handler raises is logged and the peer gets 1011.

The kernel writes a large payload straight into the memory in which it is handed out (`FrameReader`). Each
connection holds at most one message that is being read, `MAX_WAITING` that wait, and what `send` has not got rid
of; beyond that its socket is not read, or its sender waits.
A dead peer is found by TCP keepalive, not by pings: a robot client without a thread of its own cannot answer a
ping while it is between two requests, its kernel can. Sizes are bytes, times seconds.
"""

import asyncio
import contextlib
import http
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from env_client.websocket import keep_alive
from env_client.wire.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    ConnectionClosed,
    Control,
    Event,
    FrameError,
    FrameReader,
    close_payload,
    frame_header,
    read_close,
)
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

__all__ = ["CLOSE_S", "Answer", "Connection", "ConnectionClosed", "Handler"]

if TYPE_CHECKING:
    from grasp_cube.serving.listener import Listener

logger = logging.getLogger(__name__)

# The longest head of an HTTP request: a browser's cookies fit.
MAX_HEAD = 32 * 1024
# A client that has not shaken hands by then is cut.
HANDSHAKE_S = 10.0
# How long a peer may take to answer our close, or to read our last words.
CLOSE_S = 1.0
# A peer that takes nothing of what is sent to it for so long is cut.
DRAIN_S = 30.0
# Messages that wait for the handler before the socket is left alone: one is handled, one comes, one waits.
MAX_WAITING = 2
# The same in bytes; a message that is larger than a server's limits waits alone.
MAX_WAITING_BYTES = 32 * 1024 * 1024
# A client that sends faster than it is answered rests after so many messages, in seconds: without that one such client kept
# this loop busy all the time, and the others, with the device's thread, waited for the interpreter twice as long.
MAX_IN_A_ROW = 4
PAUSE_S = 0.001
# What waits to be written before the sender waits.
WRITE_LIMIT = 64 * 1024
# The kernel's buffer of what is to be sent, which is what a client that never reads gets computed for nothing: room for
# the largest chunks, of which a client has a few under way, and no more.
SEND_BUFFER = 64 * 1024
# The kernel's buffer of what came: it holds a whole raw observation, so that a client's send does not wait for us.
SOCKET_BUFFER = 4 * 1024 * 1024

# Where bytes go that nobody wants. Shared by all connections, since it is never read.
_DISCARD = memoryview(bytearray(256 * 1024))

Handler = Callable[["Connection"], Awaitable[None]]
# Looks at each HTTP request; a response ends it there, None goes on to the WebSocket handshake.
Answer = Callable[["Connection", Request], Response | None]


class Connection(asyncio.BufferedProtocol):
    """One client, from its TCP connection to its end. Belongs to the event loop's thread."""

    def __init__(self, listener: "Listener"):
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._http = ServerProtocol(logger=logger)
        self._head: bytearray | None = bytearray(4096)
        self._head_fill = 0
        self._reader = FrameReader(from_client=True, max_bytes=listener.max_bytes)
        self._messages: deque[str | memoryview] = deque()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Somebody waits for a message; senders wait for room.
        self._wanted: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._reading = True
        # Messages that lay there already when the handler came back for one.
        self._in_a_row = 0
        # The message that was being read when somebody looked, by its number.
        self._stuck_at: int | None = None
        # Why nothing more is sent; why nothing more comes. Both unset while the connection is open.
        self._closing: ConnectionClosed | None = None
        self._over = False
        self.transport: asyncio.Transport
        # (host, port) of the client, or more on IPv6; None when it was gone at once.
        self.remote_address: tuple | None = None
        # What the client asked for in its handshake; set before the handler runs.
        self.request: Request | None = None

    # ------------------------------------------------------------------------ what the handler uses

    def respond(self, status: http.HTTPStatus, text: str) -> Response:
        """A plain HTTP answer, for `Answer`."""
        return self._http.reject(status, text)

    def __aiter__(self) -> "Connection":
        return self

    async def __anext__(self) -> str | memoryview:
        """The next message; ends when the client closed with 1000 or 1001, else raises `ConnectionClosed`."""
        if self._messages:
            # Thousands of small ones may have come in one read: the other clients' turn comes between them.
            self._in_a_row += 1
            await asyncio.sleep(0 if self._in_a_row % MAX_IN_A_ROW else PAUSE_S)
        else:
            self._in_a_row = 0
        while not self._messages:
            if self._closing is not None:
                if self._closing.code in (1000, 1001):
                    raise StopAsyncIteration
                raise self._closing
            self._wanted = self._loop.create_future()
            try:
                await self._wanted
            finally:
                self._wanted = None
        message = self._messages.popleft()
        if not self._reading and len(self._messages) < MAX_WAITING:
            self._reading = True
            self.transport.resume_reading()
        return message

    async def send(self, message: str | bytes | Sequence[bytes | memoryview]) -> None:
        """One message: text, bytes, or the pieces of a binary message. Waits while the client reads too slowly."""
        if self._closing is not None:
            raise self._closing
        parts: Sequence[bytes | memoryview]
        if isinstance(message, str):
            opcode, parts = TEXT, [message.encode()]
        else:
            opcode, parts = BINARY, [message] if isinstance(message, bytes) else message
        # One write is one system call; replies are small.
        self.transport.write(b"".join((frame_header(opcode, sum(map(len, parts))), *parts)))
        if self._room is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._room), DRAIN_S)
            except TimeoutError:
                self._cut(ConnectionClosed(1006, f"the client read nothing for {DRAIN_S:g} s"))
            if self._closing is not None:
                raise self._closing

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye and end: when the client answers, or in `CLOSE_S`."""
        if self._closing is None:
            self._end(ConnectionClosed(code, reason))
            self.transport.write(_frame(CLOSE, close_payload(code, reason)))
            self._linger()

    # --------------------------------------------------------------------- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_LIMIT)
        self.remote_address = transport.get_extra_info("peername")
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            keep_alive(sock)
        if not self._listener.admit(self):
            transport.abort()
        self._timer = self._loop.call_later(HANDSHAKE_S, transport.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._over:
            return _DISCARD
        if self._head is None:
            return self._reader.buffer()
        if self._head_fill == len(self._head):
            self._head.extend(bytes(len(self._head)))
        return memoryview(self._head)[self._head_fill :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._over:
            return
        if self._head is not None:
            self._read_head(nbytes)
            return
        try:
            for event in self._reader.advance(nbytes):
                self._take(event)
        except FrameError as error:
            self._over = True
            if self._closing is None:
                self.close(error.code, error.reason)
                # What the client sends from here on is thrown away, its answer to our close as well.
                self._end_stream()

    def eof_received(self) -> bool:
        # Half a connection is none: the transport closes after what is still to be written.
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(ConnectionClosed(1006, str(exc or "the connection ended without a close")))
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._listener.forget(self)

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # ------------------------------------------------------------------------------------- handshake

    def _read_head(self, count: int) -> None:
        """The HTTP request, and what it is answered with."""
        head = self._head
        assert head is not None
        begin = max(0, self._head_fill - 3)
        self._head_fill += count
        end = head.find(b"\r\n\r\n", begin, self._head_fill)
        if end < 0:
            if self._head_fill >= MAX_HEAD:
                self._refuse(
                    self.respond(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the header is too long\n")
                )
            return
        self._http.receive_data(bytes(head[: end + 4]))
        requests = self._http.events_received()
        if not requests or not isinstance(requests[0], Request):
            self._refuse(self.respond(http.HTTPStatus.BAD_REQUEST, "this is no HTTP GET request\n"))
            return
        try:
            self.request = requests[0]
            response = self._listener.answer(self, requests[0]) or self._accept(requests[0])
        except Exception:
            logger.exception("a handshake could not be answered")
            response = self.respond(http.HTTPStatus.INTERNAL_SERVER_ERROR, "the server's log says why\n")
        if response.status_code != 101:
            self._refuse(response)
            return
        self.transport.write(response.serialize())
        if self._timer is not None:
            self._timer.cancel()
        rest = bytes(head[end + 4 : self._head_fill])
        self._head = None
        self._task = self._loop.create_task(self._handle())
        while rest and not self._over:
            room = self._reader.buffer()
            count = min(len(room), len(rest))
            room[:count], rest = rest[:count], rest[count:]
            self.buffer_updated(count)

    def _accept(self, request: Request) -> Response:
        # The library would log bytes that are no text as a failure of its own.
        if not all(key.isascii() for key in request.headers.get_all("Sec-WebSocket-Key")):
            return self.respond(http.HTTPStatus.BAD_REQUEST, "the Sec-WebSocket-Key is not ASCII\n")
        return self._http.accept(request)

    def _refuse(self, response: Response) -> None:
        self._end(ConnectionClosed(1006, f"answered with HTTP {response.status_code}"))
        self._over = True
        self.transport.write(response.serialize())
        # The end of the stream is the end of the answer; a client that keeps its side open is cut.
        self._linger()
        self._end_stream()

    async def _handle(self) -> None:
        try:
            await self._listener.handler(self)
        except ConnectionClosed:
            pass
        except asyncio.CancelledError:
            self.close(1001)
            raise
        except Exception:
            logger.exception("a connection's handler failed")
            self.close(1011)
        finally:
            self.close(1000)

    # ---------------------------------------------------------------------------------------- frames

    def _take(self, event: Event) -> None:
        if not isinstance(event, Control):
            if self._closing is None:
                self._messages.append(event)
                self._wake()
                full = (
                    len(self._messages) >= MAX_WAITING or sum(map(len, self._messages)) >= MAX_WAITING_BYTES
                )
                if full and self._reading:
                    self._reading = False
                    self.transport.pause_reading()
        elif event.opcode == PING:
            # A client that pings and does not read would fill the memory with answers.
            if self._closing is None and self._room is None:
                self.transport.write(_frame(PONG, event.payload))
        elif event.opcode == CLOSE:
            code, reason = read_close(event.payload)
            self._over = True
            if self._closing is None:
                self._end(ConnectionClosed(code if code != 1005 else 1000, reason))
                self.transport.write(_frame(CLOSE, event.payload[:2]))
            self._linger()
            # The server ends first, so that the client's port is free again at once.
            self._end_stream()

    def _end(self, why: ConnectionClosed) -> None:
        """Nothing more is sent or handed out."""
        if self._closing is not None:
            return
        self._closing = why
        self._messages.clear()
        self._wake()
        self.resume_writing()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _linger(self) -> None:
        """Read on for the client's last words: to close with bytes unread would take ours away from it."""
        if not self._reading and not self.transport.is_closing():
            self._reading = True
            self.transport.resume_reading()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(CLOSE_S, self.transport.abort)

    def _end_stream(self) -> None:
        """Nothing more is written; TLS cannot say so and end only its half, there the rest is written and all ends."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def cut_if_stuck(self) -> None:
        """Called from time to time: end a client whose message has not grown complete since the last call but one."""
        begun = self._reader.begun
        if begun is not None and begun == self._stuck_at and not self._over:
            self.close(1008, "a message took too long")
            self._over = True
        self._stuck_at = begun

    def _cut(self, why: ConnectionClosed) -> None:
        self._end(why)
        self.transport.abort()

    @property
    def handling(self) -> "asyncio.Task[None] | None":
        """The handler's task, once there is one."""
        return self._task


def _frame(opcode: int, payload: bytes) -> bytes:
    return frame_header(opcode, len(payload)) + payload
