"""Feetech protocol 0 on the wire: bytes -> instruction packets, status packets -> bytes.

An instruction is `FF FF id length instruction params… checksum`, a status `FF FF id length error params…
checksum`; `length` counts what follows it, the checksum is the inverted sum of all bytes after the header.
A servo says nothing to a packet whose checksum is wrong, so neither does the parser: it skips.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["BROADCAST_ID", "ErrorBit", "Instruction", "Packet", "PacketParser", "status_packet"]

BROADCAST_ID = 0xFE
_HEADER = b"\xff\xff"
# Id, length, instruction and checksum around an empty parameter list.
_SHORTEST = 6


class Instruction(IntEnum):
    """What a packet asks of a servo."""

    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    REG_WRITE = 0x04
    ACTION = 0x05
    RESET = 0x06
    REBOOT = 0x08
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83


class ErrorBit(IntEnum):
    """Bits of a status packet's error byte."""

    VOLTAGE = 0x01
    ANGLE = 0x02
    OVERHEAT = 0x04
    OVERCURRENT = 0x08
    OVERLOAD = 0x20


class Packet(NamedTuple):
    """One instruction packet that arrived whole."""

    id: int
    instruction: int
    params: bytes

    @property
    def size(self) -> int:
        """Bytes that it took on the wire."""
        return len(self.params) + _SHORTEST


def _checksum(body: bytes) -> int:
    return ~sum(body) & 0xFF


def status_packet(servo_id: int, error: int, params: bytes = b"") -> bytes:
    """The answer of one servo."""
    body = bytes((servo_id, len(params) + 2, error)) + params
    return _HEADER + body + bytes((_checksum(body),))


class PacketParser:
    """Cuts a byte stream into packets; garbage and broken packets are skipped and counted."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        # Bytes that belonged to no valid packet.
        self.skipped = 0

    @property
    def pending(self) -> bool:
        """Whether the beginning of a packet waits for its end."""
        return bool(self._buffer)

    def clear(self) -> None:
        """Forget an unfinished packet, as a servo does when the line falls silent in the middle of one."""
        self.skipped += len(self._buffer)
        self._buffer.clear()

    def feed(self, data: bytes) -> list[Packet]:
        """Add what the line brought; the packets that are complete now, in order."""
        self._buffer += data
        packets: list[Packet] = []
        while (packet := self._next()) is not None:
            packets.append(packet)
        return packets

    def _next(self) -> Packet | None:
        buffer = self._buffer
        while len(buffer) >= _SHORTEST:
            # An id can be no 0xFF: of three in a row the last two are the header.
            if buffer[:2] != _HEADER or buffer[2] == 0xFF or buffer[3] < 2:
                self._skip(1)
                continue
            end = buffer[3] + 4
            if len(buffer) < end:
                return None
            body, checksum = bytes(buffer[2 : end - 1]), buffer[end - 1]
            if _checksum(body) != checksum:
                self._skip(2)
                continue
            del buffer[:end]
            return Packet(id=body[0], instruction=body[2], params=body[3:])
        return None

    def _skip(self, count: int) -> None:
        del self._buffer[:count]
        self.skipped += count
