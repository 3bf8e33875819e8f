"""A WebSocket server in a thread that echoes, and a client of bytes, for tests of both sides."""

import asyncio
import base64
import os
import socket
import struct
import threading

from env_client.wire.frames import CLOSE
from websockets.frames import Frame, Opcode

from grasp_cube.serving.listener import listening
from grasp_cube.serving.websocket import Connection

__all__ = ["LIMIT", "Echo", "Raw", "masked"]

LIMIT = 128 * 1024 * 1024


class Echo:
    """A server in a thread: it sends back what comes, and knows some words."""

    def __init__(self) -> None:
        self.connections = 0
        self.seen: list[Connection] = []
        self.loop = asyncio.new_event_loop()
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._main(),))

    async def _handle(self, connection: Connection) -> None:
        self.connections += 1
        self.seen.append(connection)
        try:
            async for message in connection:
                if message == "fail":
                    raise RuntimeError("as asked")
                if message == "flood":
                    for _ in range(64):
                        await connection.send(bytes(1024 * 1024))
                if message == "leave":
                    return
                await connection.send(message if isinstance(message, str) else [message])
        finally:
            self.connections -= 1

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        async with listening(sock, self._handle, lambda connection, request: None, max_bytes=LIMIT):
            self._ready.set()
            await self._stop.wait()

    def __enter__(self) -> "Echo":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.loop.close()


def masked(opcode: int, payload: bytes = b"", fin: bool = True) -> bytes:
    return Frame(Opcode(opcode), payload, fin).serialize(mask=True, extensions=[])


class Raw:
    """A client of bytes."""

    def __init__(self, port: int, more: bytes = b"", headers: str = ""):
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        key = base64.b64encode(os.urandom(16)).decode()
        head = (
            f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Version: 13\r\n{headers}\r\n"
        )
        self.sock.sendall(head.encode() + more)
        self.head = b""
        while b"\r\n\r\n" not in self.head:
            self.head += self.sock.recv(1)

    def frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame."""
        first, length = self._exactly(2)
        if length >= 126:
            length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
        assert first & 0x80
        return first & 0x0F, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            assert piece, "the server ended the connection"
            data += piece
        return data

    def close_code(self) -> int:
        opcode, payload = self.frame()
        assert opcode == CLOSE
        return int(struct.unpack(">H", payload[:2])[0]) if payload else 1005

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()
