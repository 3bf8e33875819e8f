"""WebSocket frames (RFC 6455) without I/O: headers, masking, and a reader that both sides share.

Life cycle: one `FrameReader` for each connection. Ask it for a `buffer()`, let the socket write into that, tell
`advance()` how many bytes came, and take the messages and control frames that are complete.
A payload that is longer than the first read lies from its first received byte in the memory in which it is
handed out: the kernel writes it there, it is unmasked there, and decoded arrays are views into it. Such memory
is never used again for something else.
Error policy: what breaks the protocol raises `FrameError` with the close code that the peer has to be told.
Sizes are bytes. Needs NumPy only.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "BINARY",
    "CLOSE",
    "CONTINUATION",
    "PING",
    "PONG",
    "SERVICE_RESTART",
    "TEXT",
    "ConnectionClosed",
    "Control",
    "Event",
    "FrameError",
    "FrameReader",
    "apply_mask",
    "close_payload",
    "frame_header",
    "masked_chunks",
    "read_close",
]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
# The close code of a server that ends: connect again. What it has not answered it never began.
SERVICE_RESTART = 1012

# A first read goes here; what is longer continues in memory of its own. A camera's frame costs one copy of this
# size, a small message one system call.
INBOX = 16 * 1024
# Memory that a declared length gets before its bytes have come; it doubles as they come.
FIRST_ALLOCATION = 4 * 1024 * 1024
# A message is copied, masked and sent in pieces that stay in a core's second-level cache; each piece wakes the
# reader, so that smaller ones cost more than they gain.
CHUNK = 512 * 1024
# The header's place before the first payload byte in a chunk: longest header, kept to whole words.
_HEADROOM = 16
_MAX_CONTROL = 125

_SHORT, _LONG = struct.Struct(">H"), struct.Struct(">Q")


class FrameError(Exception):
    """The peer broke the protocol. `code` is the close code that says how."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code
        self.reason = reason


class ConnectionClosed(ConnectionError):
    """The connection is over. `code` is the peer's or our close code; 1006 means that it just ended."""

    def __init__(self, code: int = 1006, reason: str = ""):
        super().__init__(f"closed with {code}" + (f": {reason}" if reason else ""))
        self.code = code
        self.reason = reason


class Control(NamedTuple):
    """A control frame: CLOSE, PING or PONG."""

    opcode: int
    payload: bytes


# A text message, a binary message (read-only), or a control frame.
Event = str | memoryview | Control


def frame_header(opcode: int, length: int, key: bytes | None = None, *, final: bool = True) -> bytes:
    """The 2 to 14 bytes before a payload of `length` bytes; `key` are the 4 bytes that mask it, if any."""
    first = opcode | (0x80 if final else 0)
    mask = 0 if key is None else 0x80
    if length < 126:
        header = bytes((first, mask | length))
    elif length < 65536:
        header = bytes((first, mask | 126)) + _SHORT.pack(length)
    else:
        header = bytes((first, mask | 127)) + _LONG.pack(length)
    return header if key is None else header + key


def apply_mask(payload: np.ndarray, key: bytes) -> None:
    """Mask or unmask, in place, a uint8 array whose first byte meets the first byte of `key`.

    Whole 64-bit words where the memory allows it, which is as fast as a copy.
    """
    words = len(payload) // 8
    if words:
        view = payload[: words * 8].view(np.uint64)
        np.bitwise_xor(view, np.frombuffer(key * 2, np.uint64), out=view)
    rest = payload[words * 8 :]
    if len(rest):
        np.bitwise_xor(rest, np.frombuffer(key * 2, np.uint8)[: len(rest)], out=rest)


def masked_chunks(
    opcode: int,
    parts: Sequence[bytes | memoryview],
    key: bytes,
    scratch: np.ndarray,
    *,
    final: bool = True,
) -> Iterator[memoryview]:
    """One masked frame as pieces to be sent in turn, each valid until the next is asked for.

    The parts are gathered into `scratch` (uint8, more than 64 bytes, a multiple of 8) and masked there, so that
    the caller's arrays stay as they are and no buffer of the message's size is made. `key` of zeros leaves the
    payload as it is.
    """
    header = frame_header(opcode, sum(len(part) for part in parts), key, final=final)
    room = memoryview(scratch)
    start = _HEADROOM - len(header)
    room[start:_HEADROOM] = header
    fill, capacity = _HEADROOM, len(scratch)
    for part in parts:
        at, size = 0, len(part)
        piece = memoryview(part)
        while at < size:
            count = min(size - at, capacity - fill)
            room[fill : fill + count] = piece[at : at + count]
            at, fill = at + count, fill + count
            if fill == capacity:
                apply_mask(scratch[_HEADROOM:], key)
                yield room[start:]
                # Full pieces are whole words, so the next one begins with the key's first byte again.
                start = fill = _HEADROOM
    if fill > start:
        apply_mask(scratch[_HEADROOM:fill], key)
        yield room[start:fill]


def close_payload(code: int, reason: str = "") -> bytes:
    """What a close frame carries; a reason that is too long is cut between characters."""
    return _SHORT.pack(code) + reason.encode()[: _MAX_CONTROL - 2].decode("utf-8", "ignore").encode()


def read_close(payload: bytes) -> tuple[int, str]:
    """Code and reason of a received close frame; 1005 stands for none. Raises `FrameError`."""
    if not payload:
        return 1005, ""
    if len(payload) == 1:
        raise FrameError(1002, "a close frame with one byte")
    (code,) = _SHORT.unpack_from(payload)
    if not (1000 <= code <= 1014 or 3000 <= code <= 4999) or code in (1004, 1005, 1006):
        raise FrameError(1002, f"a close frame with the code {code}")
    try:
        return code, str(payload[2:], "utf-8")
    except UnicodeDecodeError:
        raise FrameError(1007, "a close reason that is not UTF-8") from None


class FrameReader:
    """Bytes from the peer -> messages and control frames.

    from_client: frames must be masked (a server reads them), otherwise they must not be.
    max_bytes: of one message, fragments together; more raises `FrameError` 1009 before it is read.
    """

    __slots__ = (
        "_ahead",
        "_clear",
        "_count",
        "_ended",
        "_expected",
        "_fill",
        "_final",
        "_from_client",
        "_got",
        "_inbox",
        "_key",
        "_kind",
        "_lead",
        "_length",
        "_max_bytes",
        "_message",
        "_opcode",
        "_payload",
        "_room",
    )

    def __init__(self, *, from_client: bool, max_bytes: int):
        self._from_client = from_client
        self._max_bytes = max_bytes
        self._inbox = memoryview(bytearray(INBOX))
        self._fill = 0
        # A camera's messages are all of one size: the next one is read, header and all, into memory in which its
        # payload can stay. `_lead` puts that payload on a whole word behind the header of a large frame.
        self._expected = 0
        self._ahead: np.ndarray | None = None
        self._lead = _HEADROOM - (14 if from_client else 10)
        # The data frame that is being read past the inbox, if any: memory, its view, bytes that came, bytes of
        # those that are unmasked.
        self._payload: np.ndarray | None = None
        self._room = memoryview(b"")
        self._length = self._got = self._clear = 0
        self._key = b""
        self._opcode, self._final = 0, True
        # The fragmented message that is open, if any.
        self._kind: int | None = None
        self._message = bytearray()
        self._ended = False
        self._count = 0

    @property
    def begun(self) -> int | None:
        """The number of the message that has begun and is not complete; None between two messages."""
        return self._count if self._payload is not None or self._fill or self._kind is not None else None

    def buffer(self) -> memoryview:
        """Where the next received bytes go; never empty."""
        if self._payload is not None:
            return self._room[self._got :]
        if self._expected and not self._fill:
            if self._ahead is None:
                self._ahead = _words(_HEADROOM + self._expected)
            return memoryview(self._ahead)[self._lead :]
        return self._inbox[self._fill :]

    def advance(self, count: int) -> list[Event]:
        """What is complete after `count` more bytes in `buffer()`. Nothing is read after a close frame."""
        events: list[Event] = []
        if self._ended:
            return events
        if self._payload is not None:
            self._got += count
            self._more(self._payload, events)
        elif self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            if not self._adopt(ahead, count, events):
                self._parse(memoryview(ahead)[self._lead : self._lead + count], events)
        else:
            self._parse(self._inbox[: self._fill + count], events)
        return events

    def _adopt(self, ahead: np.ndarray, count: int, events: list[Event]) -> bool:
        """Whether one large frame, of about the size of the last one, begins this memory; then it stays there."""
        view = memoryview(ahead)[self._lead :]
        header = _HEADROOM - self._lead
        if count < header or view[0] & 0x0F >= CLOSE or view[1] & 0x7F != 127:
            return False
        (length,) = _LONG.unpack_from(view, 2)
        if not max(count - header, self._expected // 2) <= length <= self._expected:
            return False
        self._check(view[0], view[1])
        self._check_size(length)
        self._opcode, self._final = view[0] & 0x0F, view[0] >= 0x80
        self._key = bytes(view[10:header])
        self._length, self._got, self._clear = length, count - header, 0
        self._expected = length
        payload = self._payload = ahead[_HEADROOM : _HEADROOM + (length + 7) // 8 * 8]
        self._room = memoryview(payload)[:length]
        self._more(payload, events)
        return True

    def _parse(self, inbox: memoryview, events: list[Event]) -> None:
        """Every frame that lies in `inbox`, whose memory is used again."""
        at, end = 0, len(inbox)
        while end - at >= 2:
            first, second = inbox[at], inbox[at + 1]
            opcode, length = first & 0x0F, second & 0x7F
            self._check(first, second)
            body = at + 2 + (4 if self._from_client else 0)
            if length >= 126:
                body += 2 if length == 126 else 8
            if body > end:
                break
            if length == 126:
                (length,) = _SHORT.unpack_from(inbox, at + 2)
            elif length == 127:
                (length,) = _LONG.unpack_from(inbox, at + 2)
            key = bytes(inbox[body - 4 : body]) if self._from_client else b""
            stop = body + length
            if opcode >= CLOSE:
                if stop > end:
                    break
                events.append(Control(opcode, _unmasked(inbox[body:stop], key).tobytes()))
                at = stop
                if opcode == CLOSE:
                    self._ended = True
                    return
                continue
            self._check_size(length)
            self._opcode, self._final = opcode, first >= 0x80
            if stop <= end:
                self._deliver(memoryview(_unmasked(inbox[body:stop], key)), events)
                at = stop
                continue
            self._begin(length, key, inbox[body:end], events)
            at = end
        # At most a header and a control frame's payload are left.
        self._fill = end - at
        self._inbox[: self._fill] = bytes(inbox[at:end])

    def _check_size(self, length: int) -> None:
        if length + len(self._message) > self._max_bytes:
            raise FrameError(1009, f"a message of more than {self._max_bytes} bytes")

    def _check(self, first: int, second: int) -> None:
        """The rules for a frame's first two bytes."""
        opcode = first & 0x0F
        if first & 0x70:
            raise FrameError(1002, "reserved bits are set, and no extension was agreed on")
        if bool(second & 0x80) != self._from_client:
            raise FrameError(1002, "a frame that is not masked" if self._from_client else "a masked frame")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise FrameError(1002, f"the opcode {opcode}")
            if first < 0x80 or second & 0x7F > _MAX_CONTROL:
                raise FrameError(1002, "a control frame that is fragmented or longer than 125 bytes")
        elif opcode > BINARY:
            raise FrameError(1002, f"the opcode {opcode}")
        elif (opcode == CONTINUATION) != (self._kind is not None):
            raise FrameError(
                1002, "a continuation of nothing" if opcode == CONTINUATION else "a message inside a message"
            )

    def _begin(self, length: int, key: bytes, have: memoryview, events: list[Event]) -> None:
        """A data frame that does not end in the inbox continues in memory of its own."""
        self._length, self._key, self._clear = length, key, 0
        self._expected = length if INBOX < length <= FIRST_ALLOCATION else 0
        payload = self._payload = _words(min(length, max(FIRST_ALLOCATION, len(have))))
        self._room = memoryview(payload)[: min(length, len(payload))]
        self._got = len(have)
        self._room[: len(have)] = have
        self._more(payload, events)

    def _more(self, payload: np.ndarray, events: list[Event]) -> None:
        """Unmask what came, while it is still in the cache; deliver it when it is all."""
        got, complete = self._got, self._got == self._length
        if self._key and self._key != b"\0\0\0\0":
            # Whole words only, but for the end of the frame: there the memory is whole words as well.
            first, last = self._clear // 8, (got + 7 if complete else got) // 8
            words = payload.view(np.uint64)[first:last]
            np.bitwise_xor(words, np.frombuffer(self._key * 2, np.uint64), out=words)
            self._clear = last * 8
        if complete:
            room, self._room, self._payload = self._room, memoryview(b""), None
            self._fill = 0
            self._deliver(room, events)
        elif got == len(self._room):
            larger = _words(min(self._length, 2 * got))
            larger[:got] = payload[:got]
            self._payload = larger
            self._room = memoryview(larger)[: min(self._length, len(larger))]

    def _deliver(self, payload: memoryview, events: list[Event]) -> None:
        opcode = self._opcode
        self._count += self._final
        if opcode != CONTINUATION and self._final:
            events.append(_message(opcode, payload))
        elif self._final:
            self._message += payload
            whole, self._message = self._message, bytearray()
            kind, self._kind = self._kind, None
            events.append(_message(kind or BINARY, memoryview(whole)))
        else:
            # Fragments are joined as they come: a list of them could weigh a hundred times what was sent.
            if opcode != CONTINUATION:
                self._kind = opcode
            self._message += payload


def _unmasked(data: memoryview, key: bytes) -> np.ndarray:
    """A copy."""
    payload = np.frombuffer(data, np.uint8).copy()
    if key and len(payload):
        apply_mask(payload, key)
    return payload


def _words(count: int) -> np.ndarray:
    """Memory for `count` bytes and up to a whole word, not touched yet: the system gives pages as bytes come."""
    return np.empty((count + 7) // 8 * 8, np.uint8)


def _message(opcode: int, payload: memoryview) -> str | memoryview:
    if opcode == BINARY:
        return payload.toreadonly()
    try:
        return str(payload, "utf-8")
    except UnicodeDecodeError:
        raise FrameError(1007, "a text message that is not UTF-8") from None
