"""A blocking WebSocket connection on a plain socket, for lock-step requests with large payloads.

Life cycle: `Connection.open(url)` connects and shakes hands; then `send` and `recv` in turn, by one thread at a
time; `close` may be called by any thread and ends a waiting call.
There is no thread of its own: the socket is read while `recv` waits and, for what came in the meantime (a ping, a
close, the end of the connection), right before `send`. A server that demands pongs of an idle client within
seconds will therefore drop it, which `send` notices before it sends anything (`NothingSent`).
Error policy: `OSError`, `TimeoutError` (of the whole call) and `ConnectionClosed` end a connection; close it.
A refused handshake raises the `websockets` package's `InvalidHandshake`, an address that is none `InvalidURI`.
Times are seconds, sizes bytes.
"""

import contextlib
import ipaddress
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake
from websockets.uri import parse_uri

from env_client.wire.frames import (
    BINARY,
    CHUNK,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    SERVICE_RESTART,
    TEXT,
    ConnectionClosed,
    Control,
    FrameError,
    FrameReader,
    close_payload,
    frame_header,
    masked_chunks,
    read_close,
)

__all__ = ["Connection", "NothingSent", "keep_alive"]

# Kernel buffers that hold a whole raw observation, so that a send does not wait for the reader.
SOCKET_BUFFER = 4 * 1024 * 1024
# The largest message that is read: what a server answers is small.
MAX_BYTES = 128 * 1024 * 1024
# The longest header of a server's answer to the handshake.
MAX_HEAD = 64 * 1024
# Messages that may have come unasked while the client was idle.
MAX_WAITING = 64
# Pieces of one message that one system call takes; the system's own limit is 1024.
MAX_PIECES = 512
# The masking key of messages that stay on this machine. A random one protects proxies on the way from payloads that look
# like requests to them (RFC 6455, 10.3); here nobody is on the way, and zeros spare both sides a pass over each image.
NO_MASK = bytes(4)
# How long `close` may take to say goodbye and to wait for a call that it ends.
CLOSE_S = 1.0

# Pieces of a binary message, and whether they are its last.
Fragment = tuple[Sequence[bytes | memoryview], bool]

_NOT_YET = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class NothingSent(ConnectionClosed):
    """The connection had ended before the message was begun, by us or, as it says (1012), by the server: the message may
    be sent again on another connection."""


class Connection:
    """One open WebSocket. Made by `open`."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._reader = FrameReader(from_client=False, max_bytes=MAX_BYTES)
        self._messages: deque[str | memoryview] = deque()
        # Where messages are masked; None where they need no mask and are sent from where they lie.
        self._scratch = None if _stays_here(sock) else np.empty(CHUNK + 16, np.uint8)
        self._can_read, self._can_write = select.poll(), select.poll()
        self._can_read.register(sock, select.POLLIN)
        self._can_write.register(sock, select.POLLOUT)
        # Held by a call that uses the socket, so that it is not closed under it.
        self._using = threading.Lock()
        self._ended: ConnectionClosed | None = None

    @classmethod
    def open(
        cls, url: str, *, headers: Mapping[str, str] | None = None, timeout: float = 10.0
    ) -> "Connection":
        """Connect and shake hands. `wss://` verifies the server's certificate against the system's."""
        uri = parse_uri(url)
        deadline = time.monotonic() + timeout
        sock = socket.create_connection((uri.host, uri.port), timeout)
        try:
            # Asked for as soon as there is a socket: the receive window is agreed on early.
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
            if uri.secure:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=uri.host)
            sock.setblocking(False)
            connection = cls(sock)
            connection._shake_hands(ClientProtocol(uri), headers or {}, deadline)
        except BaseException:
            sock.close()
            raise
        return connection

    def _shake_hands(self, protocol: ClientProtocol, headers: Mapping[str, str], deadline: float) -> None:
        request = protocol.connect()
        for name, value in headers.items():
            request.headers[name] = value
        protocol.send_request(request)
        for data in protocol.data_to_send():
            self._send(memoryview(data), deadline)
        head, room = bytearray(), memoryview(bytearray(4096))
        end = -1
        while end < 0:
            count = self._receive(room, deadline)
            head += room[:count]
            end = head.find(b"\r\n\r\n")
            if not count or (end < 0 and len(head) > MAX_HEAD):
                break
        # Frames may follow in the same read; only what is an HTTP answer goes to the protocol.
        switching = end >= 0 and head.split(b" ", 2)[1:2] == [b"101"]
        rest = bytes(head[end + 4 :]) if switching else b""
        protocol.receive_data(bytes(head[: end + 4]) if switching else bytes(head))
        # Another answer than 101 has a body, which says why.
        while protocol.handshake_exc is None and not protocol.events_received():
            if switching:
                raise InvalidHandshake("the server's answer to the handshake is not complete")
            count = self._receive(room, deadline)
            protocol.receive_data(bytes(room[:count])) if count else protocol.receive_eof()
        if protocol.handshake_exc is not None:
            raise protocol.handshake_exc
        while rest:
            space = self._reader.buffer()
            count = min(len(space), len(rest))
            space[:count], rest = rest[:count], rest[count:]
            self._take(count, deadline)

    # ------------------------------------------------------------------------------------ messages

    def send(self, parts: str | bytes | Sequence[bytes | memoryview], timeout: float) -> None:
        """One message: text, bytes, or the pieces of a binary message.

        The pieces stay as they are: they are masked into a buffer of ours, or need no mask (`NO_MASK`).

        What came before is looked at first: `NothingSent` says that the connection had ended already.
        """
        if isinstance(parts, str):
            self._send_message(TEXT, [([parts.encode()], True)], timeout)
        else:
            self._send_message(BINARY, [([parts] if isinstance(parts, bytes) else parts, True)], timeout)

    def send_fragments(self, fragments: Iterable[Fragment], timeout: float) -> None:
        """One binary message whose pieces are still being made: each fragment is on its way while the next one is.

        fragments: (pieces, whether they are the last). Otherwise like `send`; when making one raises, the message stays
        half said: close the connection.
        """
        self._send_message(BINARY, fragments, timeout)

    def _send_message(self, opcode: int, fragments: Iterable[Fragment], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._using:
            self._catch_up(deadline)
            for parts, last in fragments:
                self._write(opcode, parts, deadline, final=last)
                opcode = CONTINUATION

    def recv(self, timeout: float) -> str | memoryview:
        """The next message; a memoryview is read-only and belongs to the caller."""
        deadline = time.monotonic() + timeout
        with self._using:
            while not self._messages:
                if self._ended is not None:
                    raise self._ended
                # An answer is never there at once, so that waiting comes before reading.
                self._fill(deadline, wait_first=True)
            return self._messages.popleft()

    def _catch_up(self, deadline: float) -> None:
        """Everything that has come already, without waiting."""
        try:
            while self._ended is None and len(self._messages) < MAX_WAITING:
                try:
                    count = self._sock.recv_into(self._reader.buffer())
                except _NOT_YET:
                    return
                self._take(count, deadline)
        except (OSError, FrameError) as error:
            raise NothingSent(reason=str(error) or type(error).__name__) from error
        if self._ended is not None:
            raise NothingSent(self._ended.code, self._ended.reason)

    def _fill(self, deadline: float, *, wait_first: bool = False) -> None:
        count = self._receive(self._reader.buffer(), deadline, wait_first=wait_first)
        try:
            self._take(count, deadline)
        except FrameError as error:
            self._ended = ConnectionClosed(error.code, error.reason)
            with contextlib.suppress(OSError):
                self._write(CLOSE, [close_payload(error.code, error.reason)], deadline)
            raise self._ended from error

    def _take(self, count: int, deadline: float) -> None:
        """Messages wait for `recv`; pings and a close are answered."""
        if count == 0:
            self._ended = self._ended or ConnectionClosed(reason="the other side ended the connection")
            return
        for event in self._reader.advance(count):
            if not isinstance(event, Control):
                self._messages.append(event)
            elif event.opcode == PING:
                self._write(PONG, [event.payload], deadline)
            elif event.opcode == CLOSE:
                code, reason = read_close(event.payload)
                ended = NothingSent if code == SERVICE_RESTART else ConnectionClosed
                self._ended = ended(code, reason)
                with contextlib.suppress(OSError):
                    self._write(CLOSE, [event.payload[:2]], deadline)

    def _write(
        self, opcode: int, parts: Sequence[bytes | memoryview], deadline: float, *, final: bool = True
    ) -> None:
        if self._scratch is None:
            header = frame_header(opcode, sum(map(len, parts)), NO_MASK, final=final)
            self._send_pieces([memoryview(piece) for piece in (header, *parts)], deadline)
            return
        for chunk in masked_chunks(opcode, parts, os.urandom(4), self._scratch, final=final):
            self._send(chunk, deadline)

    # ---------------------------------------------------------------------------------------- bytes

    def _send(self, data: memoryview, deadline: float) -> None:
        while True:
            try:
                sent = self._sock.send(data)
            except ssl.SSLWantReadError:
                self._wait(self._can_read, deadline)
            except _NOT_YET:
                self._wait(self._can_write, deadline)
            else:
                if sent == len(data):
                    return
                data = data[sent:]

    def _send_pieces(self, pieces: list[memoryview], deadline: float) -> None:
        at = 0
        while at < len(pieces):
            try:
                sent = self._sock.sendmsg(pieces[at : at + MAX_PIECES])
            except _NOT_YET:
                self._wait(self._can_write, deadline)
                continue
            while at < len(pieces) and sent >= len(pieces[at]):
                sent -= len(pieces[at])
                at += 1
            if sent:
                pieces[at] = pieces[at][sent:]

    def _receive(self, room: memoryview, deadline: float, *, wait_first: bool = False) -> int:
        """Bytes read into `room`, 0 at the end of the connection."""
        # TLS may hold bytes that the socket no longer has.
        if wait_first and not isinstance(self._sock, ssl.SSLSocket):
            self._wait(self._can_read, deadline)
        while True:
            try:
                return self._sock.recv_into(room)
            except ssl.SSLWantWriteError:
                self._wait(self._can_write, deadline)
            except _NOT_YET:
                self._wait(self._can_read, deadline)

    @staticmethod
    def _wait(poll: select.poll, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1e3):
            raise TimeoutError("timed out")

    def close(self) -> None:
        """Say goodbye if that is possible at once, and end. A call that waits in another thread is ended first."""
        if self._using.acquire(blocking=False):
            try:
                if self._ended is None:
                    self._ended = ConnectionClosed(1000, "closed by this side")
                    with contextlib.suppress(OSError, ValueError):
                        self._write(CLOSE, [close_payload(1000)], time.monotonic())
                self._shut_down()
                self._sock.close()
            finally:
                self._using.release()
            return
        # In the middle of somebody's message there is no room for a goodbye.
        self._shut_down()
        if self._using.acquire(timeout=CLOSE_S):
            try:
                self._sock.close()
            finally:
                self._using.release()

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _stays_here(sock: socket.socket) -> bool:
    """Whether the other end is a process of this machine, so that no proxy of the network lies between."""
    if isinstance(sock, ssl.SSLSocket):
        return False
    try:
        here, there = sock.getsockname()[0], sock.getpeername()[0]
    except OSError:
        return False
    return here == there or ipaddress.ip_address(there).is_loopback


def keep_alive(sock: socket.socket, *, idle: int = 20, interval: int = 5, count: int = 4) -> None:
    """Let the kernel find out, within `idle + interval * count` seconds, that the other machine is gone.

    In place of the protocol's pings: a client without a thread cannot answer those while its robot thinks, and a
    server whose model runs on the event loop cannot either; both machines' kernels can.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Named differently, or missing, on other systems, which then use their own times.
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # What was sent and not acknowledged counts as well; milliseconds.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (idle + interval * count) * 1000)
