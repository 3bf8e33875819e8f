"""The cases of the Autobahn test suite that matter here, against the server's socket layer over raw sockets.

The suite itself needs Python 2. Its groups: 1 framing, 2 pings and pongs, 3 reserved bits, 4 opcodes, 5 fragmentation,
6 UTF-8, 7 closing, 9 limits (`test_websocket.py` has more of it, and bad peers). 12 and 13 are compression, which is declined.
"""

import itertools
import socket
from collections.abc import Iterator

import pytest
from echo_server import LIMIT, Echo, Raw
from env_client.wire.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, close_payload, frame_header


def masked(opcode: int, payload: bytes = b"", fin: bool = True) -> bytes:
    """Also the frames that no library would write."""
    return frame_header(opcode, len(payload), b"\0\0\0\0", final=fin) + payload


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


BYE = masked(CLOSE, close_payload(1000))


def said(echo: Echo, data: bytes, answers: int | None = None) -> list[tuple[int, bytes]]:
    """Everything that the server answers until it closes; after so many `answers` the client closes. (It may not do so
    before: whoever closes does not listen any more, so what was not answered by then is not.)"""
    frames: list[tuple[int, bytes]] = []
    with Raw(echo.port) as client:
        client.sock.sendall(data)
        if answers is not None:
            frames = [client.frame() for _ in range(answers)]
            client.sock.sendall(BYE)
        while not frames or frames[-1][0] != CLOSE:
            frames.append(client.frame())
        assert client.sock.recv(1) == b""
    return frames


def code_of(frames: list[tuple[int, bytes]]) -> int:
    opcode, payload = frames[-1]
    assert opcode == CLOSE
    return int.from_bytes(payload[:2], "big") if payload else 1005


@pytest.mark.parametrize("kind", [TEXT, BINARY])
@pytest.mark.parametrize("length", [0, 125, 126, 127, 128, 65535, 65536])
def test_1_framing(echo, kind, length):
    """Every form of length, and a close that is answered by its code."""
    payload = b"*" * length
    assert said(echo, masked(kind, payload), answers=1) == [(kind, payload), (CLOSE, b"\x03\xe8")]


def test_2_pings_and_pongs(echo):
    """Each ping is answered by its own payload and in order, up to 125 bytes; pongs that nobody asked for are not."""
    payloads = [b"", b"Hello", b"\0\xff\xfe\xfd", b"\xfe" * 125, *(bytes([i]) for i in range(10))]
    data = b"".join(masked(PING, payload) + masked(PONG, b"unasked") for payload in payloads)
    assert said(echo, data, answers=len(payloads))[:-1] == [(PONG, payload) for payload in payloads]


@pytest.mark.parametrize("length", [126, 65536])
@pytest.mark.parametrize("opcode", [PING, PONG, CLOSE])
def test_2_control_frames_beyond_125_bytes(echo, opcode, length):
    """They end the connection, and nothing of them is answered."""
    assert code_of(said(echo, masked(opcode, b"x" * length))) == 1002


@pytest.mark.parametrize("bits", range(1, 8))
def test_3_reserved_bits(echo, bits):
    """They are a breach, on data and on control frames, also after what was in order; nothing behind it is answered. (What
    comes in one segment with a breach may go unanswered as well.)"""
    for opcode in (TEXT, PING, CLOSE):
        bad = bytearray(masked(opcode, b"x" if opcode != CLOSE else b""))
        bad[0] |= bits << 4
        with Raw(echo.port) as client:
            client.sock.sendall(masked(PING, b"first"))
            assert client.frame() == (PONG, b"first")
            client.sock.sendall(bytes(bad) + masked(PING, b"never"))
            assert client.close_code() == 1002
            assert client.sock.recv(1) == b""


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_4_reserved_opcodes(echo, opcode):
    """With and without a payload."""
    for payload in (b"\x80\0\0\0\0", b"\x81\0\0\0\0x"):
        assert code_of(said(echo, bytes([0x80 | opcode]) + payload)) == 1002


@pytest.mark.parametrize("kind", [TEXT, BINARY])
def test_5_fragments(echo, kind):
    """Empty ones, single bytes, with control frames between them that are answered at once."""
    pieces = [b"", b"a", b"", b"bc", b""]
    data = b"".join(
        masked(kind if number == 0 else CONTINUATION, piece, fin=number == 4) + masked(PING, bytes([number]))
        for number, piece in enumerate(pieces)
    )
    frames = said(echo, data, answers=6)
    assert [frame for frame in frames if frame[0] == PONG] == [(PONG, bytes([n])) for n in range(5)]
    assert (kind, b"abc") in frames
    # An answer to a ping within the message comes before the message's own.
    assert frames.index((PONG, b"\3")) < frames.index((kind, b"abc"))


@pytest.mark.parametrize(
    "data",
    [
        masked(PING, b"x", fin=False),
        masked(PONG, b"x", fin=False),
        masked(CLOSE, fin=False),
        masked(CONTINUATION, b"x", fin=False),
        masked(CONTINUATION, b"x"),
        masked(TEXT, b"x", fin=False) + masked(TEXT, b"y"),
        masked(TEXT, b"x", fin=False) + masked(BINARY, b"y", fin=False),
        masked(TEXT, b"x", fin=False) + masked(CONTINUATION, b"y") + masked(CONTINUATION, b"z"),
        masked(TEXT, b"x", fin=False) + masked(PING, b"x", fin=False),
    ],
)
def test_5_fragments_out_of_order(echo, data):
    """Control frames are never fragmented, a continuation continues something, and a message holds no other."""
    assert code_of(said(echo, data)) == 1002


VALID = [
    "κόσμε",
    "\0",
    "\x7f",
    "\u0080",
    "\u07ff",
    "\u0800",
    "\ud7ff",
    "\ue000",
    "\ufffd",
    "\U00010000",
    "\U0010ffff",
]
INVALID = [
    b"\x80", b"\xbf", b"\xc0\xaf", b"\xc1\xbf", b"\xc2", b"\xe0\x80\xaf", b"\xe2\x82", b"\xed\xa0\x80", b"\xed\xbf\xbf",
    b"\xf0\x80\x80\xaf", b"\xf0\x90\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xfe", b"\xff",
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
]  # fmt: skip


def test_6_valid_text(echo):
    """Whole, and cut between any two bytes, also in the middle of a character."""
    data, expected = b"", []
    for text in VALID:
        payload = text.encode()
        for at in range(len(payload) + 1):
            data += masked(TEXT, payload[:at], fin=False) + masked(CONTINUATION, payload[at:])
            expected.append((TEXT, payload))
    with Raw(echo.port) as client:
        client.sock.sendall(data)
        assert [client.frame() for _ in expected] == expected


@pytest.mark.parametrize("payload", INVALID, ids=bytes.hex)
def test_6_invalid_text(echo, payload):
    """Whole and in fragments: 1007. As a binary message it is bytes like others."""
    assert code_of(said(echo, masked(TEXT, b"before " + payload))) == 1007
    assert (
        code_of(said(echo, masked(TEXT, payload[:1], fin=False) + masked(CONTINUATION, payload[1:]))) == 1007
    )
    assert said(echo, masked(BINARY, payload), answers=1)[0] == (BINARY, payload)


@pytest.mark.parametrize(
    "code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999]
)
def test_7_valid_close_codes(echo, code):
    """Each is answered by itself, with the longest reason there can be."""
    for reason in ("", "é", "x" * 123):
        assert code_of(said(echo, masked(CLOSE, close_payload(code, reason)))) == code


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
def test_7_invalid_close_codes(echo, code):
    """Those that may not travel, and those that mean nothing."""
    assert code_of(said(echo, masked(CLOSE, code.to_bytes(2, "big")))) == 1002


def test_7_after_a_close(echo):
    """Nothing is answered any more: neither a message, nor a ping, nor a second close; a reason must be UTF-8."""
    for more in (masked(TEXT, b"x"), masked(PING, b"x"), BYE, masked(CONTINUATION, b"x")):
        assert said(echo, BYE + more) == [(CLOSE, b"\x03\xe8")]
    assert said(echo, masked(CLOSE)) == [(CLOSE, b"")]
    assert code_of(said(echo, masked(CLOSE, b"\x03\xe8\xce\xba\xed\xa0\x80"))) == 1007
    assert code_of(said(echo, masked(CLOSE, b"\x03"))) == 1002


def test_9_frames_that_are_too_large(echo):
    """By their header alone, by their fragments together, and with a length that no 64 bits hold."""
    for header in (
        b"\x82\xff" + (LIMIT + 1).to_bytes(8, "big"),
        b"\x82\xff" + (2**63).to_bytes(8, "big"),
        masked(BINARY, b"x", fin=False) + b"\x80\xff" + LIMIT.to_bytes(8, "big"),
    ):
        assert code_of(said(echo, header + bytes(4))) == 1009


@pytest.mark.parametrize("key", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\2\3\4"])
def test_masks(echo, key):
    """Every frame of a client is masked, control frames as well; any key will do."""
    payload = bytes(range(200))
    sealed = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    assert said(echo, b"\x82\xfe\0\xc8" + key + sealed, answers=1)[0] == (BINARY, payload)
    for opcode, bare in itertools.product((TEXT, BINARY, PING, PONG, CLOSE), (b"", b"\x03\xe8")):
        assert code_of(said(echo, bytes([0x80 | opcode, len(bare)]) + bare)) == 1002


def test_a_slow_sender_in_pieces_of_any_size(echo):
    """A message with a ping in it, cut at each place once."""
    data = masked(TEXT, b"ab", fin=False) + masked(PING, b"p") + masked(CONTINUATION, b"cd")
    for at in range(1, len(data)):
        with Raw(echo.port) as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sock.sendall(data[:at])
            client.sock.sendall(data[at:])
            assert [client.frame() for _ in range(2)] == [(PONG, b"p"), (TEXT, b"abcd")]


HEAD = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
)


def test_pipelined_requests(echo):
    """What follows a handshake is frames, never a second request; what follows a request that was refused is not looked at."""
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with Raw(echo.port, HEAD + key) as client:
        assert client.close_code() == 1002
        assert client.sock.recv(1) == b""
    with socket.create_connection(("127.0.0.1", echo.port), 10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD + key + masked(TEXT, b"x"))
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b" 426 " in answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEAD + b"\r\n", 400),
        (HEAD + b"Sec-WebSocket-Key: short\r\n\r\n", 400),
        (HEAD + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" * 2 + b"\r\n", 400),
        (HEAD.replace(b"GET", b"POST") + b"\r\n", 400),
        (HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n", 400),
        (HEAD.replace(b"websocket", b"h2c") + b"\r\n", 426),
        (HEAD.replace(b": 13", b": 8") + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\n\r\nhello", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (HEAD + b"X: \x00\r\n\r\n", 400),
        (HEAD + b" folded: x\r\n\r\n", 400),
        (HEAD + b"X: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    ],
)
def test_handshakes_that_are_none(echo, head, status):
    """Each gets one answer and an end."""
    with socket.create_connection(("127.0.0.1", echo.port), 10) as sock:
        sock.sendall(head)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
