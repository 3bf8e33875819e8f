"""Messages between the stand-in's client and its robot: a length and a msgpack value, over TCP on this machine."""

import socket
import struct
from typing import Any

import msgpack

__all__ = ["receive", "send"]

_HEAD = struct.Struct("<I")


def send(connection: socket.socket, message: Any) -> None:
    body = msgpack.packb(message)
    connection.sendall(_HEAD.pack(len(body)) + body)


def receive(connection: socket.socket) -> Any:
    """The next message. Raises `ConnectionError` at the end."""
    (size,) = _HEAD.unpack(_exactly(connection, _HEAD.size))
    return msgpack.unpackb(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the other side closed the connection")
        data += piece
    return bytes(data)
