"""A listening socket and its WebSocket connections.

Life cycle: `async with listening(sock, handler, answer)` accepts until the block is left; then every client is told
(1001) and what does not end by itself within `CLOSE_S` is cut.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

from grasp_cube.serving.websocket import CLOSE_S, HANDSHAKE_S, SOCKET_BUFFER, Answer, Connection, Handler

__all__ = ["Listener", "listening"]


class Listener:
    """The connections of one listening socket. Made by `listening`."""

    def __init__(self, handler: Handler, answer: Answer, max_bytes: int, max_connections: int):
        self.handler = handler
        self.answer = answer
        self.max_bytes = max_bytes
        self.connections: set[Connection] = set()
        self._max_connections = max_connections
        # Whoever is accepted from now on is cut at once.
        self._closing = False
        self._gone = asyncio.Event()

    def admit(self, connection: Connection) -> bool:
        """Whether there is room for another one, which is then remembered until `forget`."""
        room = not self._closing and len(self.connections) < self._max_connections
        self.connections.add(connection)
        return room

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._gone.set()

    async def watch(self, message_s: float) -> None:
        """For ever: end the clients that take longer than `message_s`, and at most twice that, for one message."""
        while True:
            await asyncio.sleep(message_s)
            for connection in list(self.connections):
                connection.cut_if_stuck()

    async def _all_gone(self, timeout: float) -> None:
        self._gone.clear()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), timeout)

    async def close(self) -> None:
        """Tell everybody (1001), wait for `CLOSE_S`, cut the rest, and end the handlers."""
        self._closing = True
        tasks = [c.handling for c in self.connections if c.handling is not None and not c.handling.done()]
        for connection in list(self.connections):
            connection.close(1001) if connection.handling is not None else connection.transport.abort()
        await self._all_gone(CLOSE_S)
        for connection in list(self.connections):
            connection.transport.abort()
        # A socket is only closed when the loop has turned after the abort.
        await self._all_gone(CLOSE_S / 2)
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S / 2)
            for task in tasks:
                task.cancel()


@contextlib.asynccontextmanager
async def listening(
    sock: socket.socket,
    handler: Handler,
    answer: Answer,
    *,
    max_bytes: int,
    max_connections: int = 1_000_000,
    message_s: float = 60.0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Listener]:
    """Accept WebSocket clients on a bound socket until the block is left.

    max_bytes: of one message; a longer one closes its connection with 1009 before it is read.
    max_connections: more are cut when they come.
    message_s: how long one message may take to arrive; then its connection is closed with 1008.
    """
    # Inherited by what is accepted; later it would not widen a window that was agreed on.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    listener = Listener(handler, answer, max_bytes, max_connections)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(listener),
        sock=sock,
        ssl=tls,
        ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
    )
    watching = loop.create_task(listener.watch(message_s))
    try:
        yield listener
    finally:
        watching.cancel()
        # What was just accepted must become a connection first: a server that is closed in between drops it without
        # closing its socket, and the client would wait for ever.
        with contextlib.suppress(NotImplementedError):
            loop.remove_reader(sock)
        for _ in range(3):
            await asyncio.sleep(0)
        server.close()
        await listener.close()
