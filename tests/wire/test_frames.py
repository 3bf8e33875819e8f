"""Frames, with the `websockets` package's own frames as the judge."""

import tracemalloc

import numpy as np
import pytest
from env_client.wire import frames, pack, pack_parts
from env_client.wire.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    FIRST_ALLOCATION,
    INBOX,
    PING,
    PONG,
    TEXT,
    Control,
    FrameError,
    FrameReader,
    apply_mask,
    close_payload,
    frame_header,
    masked_chunks,
    read_close,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Close, Frame, Opcode

KEYS = st.binary(min_size=4, max_size=4)
LIMIT = 8 * 1024 * 1024


def judge(opcode: int, payload: bytes, *, mask: bool, fin: bool = True) -> bytes:
    """A frame as the library writes it."""
    return Frame(Opcode(opcode), payload, fin).serialize(mask=mask, extensions=[])


def feed(reader: FrameReader, data: bytes, step: int | None = None) -> list:
    """Everything that a reader makes of `data`, given at most `step` bytes at a time."""
    events, at = [], 0
    while at < len(data):
        room = reader.buffer()
        count = min(len(room), len(data) - at, step or len(data))
        room[:count] = data[at : at + count]
        events += reader.advance(count)
        at += count
    return events


def server_reader(limit: int = LIMIT) -> FrameReader:
    return FrameReader(from_client=True, max_bytes=limit)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from((TEXT, BINARY, CONTINUATION)), st.integers(0, 1 << 20), st.booleans(), st.none() | KEYS
)
def test_headers_are_those_of_the_library(opcode, length, final, key):
    """Every length form, masked or not."""
    header = frame_header(opcode, length, key, final=final)
    expected = Frame(Opcode(opcode), bytes(length), final).serialize(mask=False, extensions=[])
    expected = expected[: len(expected) - length]
    if key is not None:
        expected = bytes((expected[0], expected[1] | 0x80)) + expected[2:] + key
    assert header == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), KEYS, st.integers(0, 8))
def test_masking_is_an_xor_with_the_key(payload, key, offset):
    """At every alignment of the memory; twice gives back what it was."""
    memory = np.frombuffer(bytes(offset) + payload, np.uint8).copy()[offset:]
    apply_mask(memory, key)
    assert memory.tobytes() == bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    apply_mask(memory, key)
    assert memory.tobytes() == payload


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=6), KEYS, st.integers(9, 40))
def test_pieces_are_one_frame(parts, key, words):
    """Whatever the parts and however small the buffer, the pieces joined are the masked frame."""
    scratch = np.empty(words * 8, np.uint8)
    sent = b"".join(bytes(piece) for piece in masked_chunks(BINARY, parts, key, scratch))
    payload = b"".join(parts)
    assert sent.startswith(frame_header(BINARY, len(payload), key))
    (message,) = feed(server_reader(), sent)
    assert message == payload


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from((TEXT, BINARY)), st.text(max_size=200), st.integers(1, 4), st.booleans())
    ),
    st.booleans(),
    st.integers(1, 700),
)
def test_what_the_library_writes_is_read(messages, from_client, step):
    """Whole and fragmented messages with pings between the fragments, in pieces of any size."""
    data, expected = b"", []
    for kind, text, fragments, ping in messages:
        payload = text.encode()
        size = len(payload) // fragments + 1
        pieces = [payload[i : i + size] for i in range(0, max(len(payload), 1), size)]
        for number, piece in enumerate(pieces):
            opcode = kind if number == 0 else CONTINUATION
            data += judge(opcode, piece, mask=from_client, fin=number == len(pieces) - 1)
            if ping:
                data += judge(PING, b"p", mask=from_client)
        expected += [Control(PING, b"p")] * (len(pieces) - 1) * ping
        expected.append(text if kind == TEXT else payload)
        expected += [Control(PING, b"p")] * ping
    assert feed(FrameReader(from_client=from_client, max_bytes=LIMIT), data, step) == expected


@pytest.mark.parametrize("length", [0, 1, 125, 126, 65535, 65536, INBOX - 14, INBOX, INBOX + 1, 3_000_001])
@pytest.mark.parametrize("step", [None, 4099])
def test_lengths_around_every_border(length, step):
    """Nothing is lost where a payload leaves the inbox, and the next frame is found."""
    payload = np.random.default_rng(length).bytes(length)
    data = judge(BINARY, payload, mask=True) + judge(PONG, b"end", mask=True)
    assert feed(server_reader(), data, step) == [payload, Control(PONG, b"end")]


def test_a_message_owns_its_memory_and_is_read_only():
    """What was handed out does not change when more comes."""
    reader = server_reader()
    (first,) = feed(reader, judge(BINARY, b"a" * 100, mask=True))
    (large,) = feed(reader, judge(BINARY, b"b" * 100_000, mask=True))
    feed(reader, judge(BINARY, b"c" * 100_000, mask=True))
    assert (bytes(first), bytes(large)) == (b"a" * 100, b"b" * 100_000)
    assert first.readonly
    assert large.readonly


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from((0, 5, 20_000, 70_000, 70_001, 100_000, 300_000, 5_000_000)), max_size=8),
    st.sampled_from((None, 7, 5000, 70_010)),
    st.booleans(),
)
def test_sizes_that_repeat_and_sizes_that_change(lengths, step, from_client):
    """The memory that waits for a message like the last one takes whatever comes, and is never shared."""
    payloads = [bytes([number + 1]) * length for number, length in enumerate(lengths)]
    if step == 7:
        payloads = [payload[:70_001] for payload in payloads]
    data = b"".join(judge(BINARY, payload, mask=from_client) for payload in payloads)
    assert feed(FrameReader(from_client=from_client, max_bytes=LIMIT), data, step) == payloads


# name -> (bytes from a client, close code)
BROKEN = {
    "unmasked": (judge(BINARY, b"x", mask=False), 1002),
    "reserved bits": (b"\xc2\x80\0\0\0\0", 1002),
    "opcode 3": (b"\x83\x80\0\0\0\0", 1002),
    "opcode 11": (b"\x8b\x80\0\0\0\0", 1002),
    "fragmented ping": (b"\x09\x80\0\0\0\0", 1002),
    "ping of 126 bytes": (b"\x89\xfe\0\x7e", 1002),
    "continuation of nothing": (judge(CONTINUATION, b"x", mask=True), 1002),
    "message inside a message": (judge(TEXT, b"x", mask=True, fin=False) * 2, 1002),
    "text that is not UTF-8": (judge(TEXT, b"\xff", mask=True), 1007),
    "fragmented text that is not UTF-8": (
        judge(TEXT, b"\xe2\x82", mask=True, fin=False) + judge(CONTINUATION, b"x", mask=True),
        1007,
    ),
    "too long": (b"\x82\xff" + (LIMIT + 1).to_bytes(8, "big") + bytes(4), 1009),
    "negative length": (b"\x82\xff" + b"\xff" * 8 + bytes(4), 1009),
    "fragments that are too long together": (
        judge(BINARY, bytes(LIMIT), mask=True, fin=False) + judge(CONTINUATION, b"x", mask=True),
        1009,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_protocol_gets_its_close_code(name):
    """Before the payload is there, where the header says enough."""
    data, code = BROKEN[name]
    with pytest.raises(FrameError) as caught:
        feed(server_reader(), data)
    assert caught.value.code == code


def test_a_masked_frame_from_a_server_is_refused():
    """Servers do not mask."""
    with pytest.raises(FrameError, match="masked"):
        feed(FrameReader(from_client=False, max_bytes=LIMIT), judge(BINARY, b"x", mask=True))


def test_nothing_is_read_after_a_close():
    """A second message behind it is not delivered."""
    data = judge(CLOSE, close_payload(1000), mask=True) + judge(BINARY, b"x", mask=True)
    assert feed(server_reader(), data) == [Control(CLOSE, close_payload(1000))]


def held_by_the_reader() -> int:
    """Bytes that the frames' own code holds since `tracemalloc.start`, whatever other threads did meanwhile; ends the trace."""
    own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, frames.__file__)])
    tracemalloc.stop()
    return sum(trace.size for trace in own.traces)


def test_a_lying_length_gets_no_memory():
    """A declared 100 MB with ten bytes behind it costs the first allocation and no more."""
    reader = server_reader(128 * 1024 * 1024)
    tracemalloc.start()
    feed(reader, b"\x82\xff" + (100_000_000).to_bytes(8, "big") + b"abcd" + b"0123456789")
    assert held_by_the_reader() < FIRST_ALLOCATION + 100_000


def test_many_tiny_fragments_weigh_what_they_hold():
    """A list of thirty thousand one-byte objects would be megabytes."""
    reader = server_reader()
    fragment = judge(CONTINUATION, b"x", mask=True, fin=False) * 1000
    tracemalloc.start()
    feed(reader, judge(BINARY, b"x", mask=True, fin=False))
    for _ in range(30):
        feed(reader, fragment)
    assert held_by_the_reader() < 200_000
    (message,) = feed(reader, judge(CONTINUATION, b"", mask=True))
    assert message == b"x" * 30_001


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60), st.booleans(), st.integers(1, 60))
def test_garbage_gives_frames_or_a_close_code(data, from_client, step):
    """Nothing else."""
    codes: list[int] = []
    try:
        feed(FrameReader(from_client=from_client, max_bytes=1000), data, step)
    except FrameError as error:
        codes.append(error.code)
    assert set(codes) <= {1002, 1007, 1009}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from((1000, 1001, 1002, 1009, 1011, 3000, 4999)), st.text(max_size=200))
def test_close_frames_are_those_of_the_library(code, reason):
    """A reason that is too long is cut between characters."""
    payload = close_payload(code, reason)
    assert len(payload) <= 125
    assert (Close.parse(payload).code, Close.parse(payload).reason) == read_close(payload)
    assert reason.startswith(read_close(payload)[1])


@pytest.mark.parametrize("payload", [b"\x03", b"\x03\xed", b"\x03\xee", b"\0\0", b"\xff\xff", b"\x0b\xb7"])
def test_bad_close_codes_are_refused(payload):
    """One byte, reserved and unused numbers."""
    with pytest.raises(FrameError):
        read_close(payload)
    assert read_close(b"") == (1005, "")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9000), st.sampled_from(("uint8", "float32", "bool")))),
    st.sampled_from(("openpi", "msgpack-numpy")),
)
def test_parts_joined_are_the_packed_frame(arrays, dialect):
    """Views or copies, the same bytes."""
    value = {
        "arrays": [np.ones(size, dtype) for size, dtype in arrays],
        "name": "x",
        "image": np.zeros((2, 3))[:, ::2],
    }
    assert b"".join(pack_parts(value, dialect)) == pack(value, dialect)


def test_large_arrays_are_views():
    """The camera's own memory goes to the socket."""
    image = np.zeros((480, 640, 3), np.uint8)
    views = [part for part in pack_parts({"front": image}) if isinstance(part, memoryview)]
    assert len(views) == 1
    assert np.shares_memory(np.frombuffer(views[0], np.uint8), image)
