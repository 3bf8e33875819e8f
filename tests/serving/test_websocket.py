"""Server connections over real sockets: conformance, bad peers, and every client library at hand."""

import asyncio
import contextlib
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import websockets.asyncio.client
import websockets.sync.client
from echo_server import LIMIT, Echo, Raw, masked
from env_client import websocket as client_module
from env_client.websocket import Connection as OurClient
from env_client.websocket import NothingSent
from env_client.wire.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, ConnectionClosed, apply_mask
from websockets.exceptions import ConnectionClosed as LibraryClosed
from websockets.exceptions import InvalidStatus
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode

from grasp_cube.serving import websocket as under_test
from grasp_cube.serving.listener import listening
from grasp_cube.serving.websocket import Connection


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


@pytest.fixture
def url(echo) -> str:
    return f"ws://127.0.0.1:{echo.port}"


# -------------------------------------------------------------------------------------------- clients


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_the_library_s_blocking_client(url, compression):
    """With compression offered, as it does by default, and declined."""
    with websockets.sync.client.connect(url, compression=compression, max_size=None) as client:
        for message in ("text é", b"", b"x" * 125, b"y" * 70_000, b"z" * 3_000_000):
            client.send(message)
            assert client.recv() == message
        client.send(iter(["in ", "three ", "fragments"]))
        assert client.recv() == "in three fragments"
        assert client.ping().wait(10)
        assert not client.protocol.extensions


def test_the_library_s_asyncio_client(url):
    """Many clients at once, each gets its own back."""

    async def one(number: int) -> None:
        async with websockets.asyncio.client.connect(url, max_size=None) as client:
            for size in (10, 100_000, 1_000_000):
                message = bytes([number]) * size
                await client.send(message)
                assert await client.recv() == message

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(16)))

    asyncio.run(main())


def test_a_browser_is_welcome(echo):
    """Its headers, its cookies of ten kilobytes; its offer of compression is declined."""
    headers = (
        "Origin: http://robot.local\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
        f"Cookie: {'a' * 5000}\r\nX-More: {'b' * 5000}\r\nPragma: no-cache\r\n"
    )
    with Raw(echo.port, headers=headers) as client:
        assert client.head.startswith(b"HTTP/1.1 101")
        assert b"permessage-deflate" not in client.head
        client.sock.sendall(masked(TEXT, b"hello"))
        assert client.frame() == (TEXT, b"hello")


def test_a_frame_may_come_with_the_handshake(echo):
    """In the same packet."""
    with Raw(echo.port, masked(TEXT, b"early") + masked(BINARY, b"x" * 50_000)) as client:
        assert client.frame() == (TEXT, b"early")
        assert client.frame() == (BINARY, b"x" * 50_000)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_our_client(url, monkeypatch, elsewhere):
    """Large messages, text, pieces; nothing that was handed out changes later. Masked for a server elsewhere."""
    if elsewhere:
        monkeypatch.setattr(client_module, "_stays_here", lambda sock: False)
    client = OurClient.open(url)
    image = np.random.default_rng(0).integers(0, 256, 2_000_003, np.uint8)
    before = image.tobytes()
    client.send([b"head", memoryview(image), b"tail"], 10)
    first = client.recv(10)
    client.send("text é", 10)
    assert client.recv(10) == "text é"
    client.send(bytes(2_000_011), 10)
    client.recv(10)
    assert first == b"head" + before + b"tail"
    assert image.tobytes() == before
    client.send([bytes([number % 256]) * (number % 7) for number in range(3000)], 10)
    assert client.recv(10) == b"".join(bytes([number % 256]) * (number % 7) for number in range(3000))
    client.close()
    with pytest.raises((ConnectionClosed, OSError, ValueError)):
        client.send("late", 1)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_our_client_masks_what_leaves_the_machine(monkeypatch, elsewhere):
    """With another random key for each message; what stays here goes as it is, to a reader that takes it in bits."""
    if elsewhere:
        monkeypatch.setattr(client_module, "_stays_here", lambda sock: False)
    payload = np.random.default_rng(1).integers(0, 256, 3_000_000, np.uint8)
    keys = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
        ours.setblocking(False)
        client = OurClient(ours)
        sending = threading.Thread(
            target=lambda: [client.send([memoryview(payload), b"end"], 30) for _ in "12"]
        )
        sending.start()
        for _ in "12":
            frame = bytearray()
            while len(frame) < 14 + len(payload) + 3:
                data = theirs.recv(min(30_011, 14 + len(payload) + 3 - len(frame)))
                assert data
                frame += data
            assert frame[:2] == b"\x82\xff"
            keys.append(bytes(frame[10:14]))
            body = np.frombuffer(frame, np.uint8)[14:].copy()
            apply_mask(body, keys[-1])
            assert body.tobytes() == payload.tobytes() + b"end"
        sending.join(10)
        ours.close()
        theirs.close()
    assert (len(set(keys)) == 2) if elsewhere else (set(keys) == {bytes(4)})


def test_our_client_notices_an_end_before_it_sends(url):
    """A connection that the server closed in the meantime is not written to."""
    client = OurClient.open(url)
    client.send("leave", 10)
    time.sleep(0.2)
    with pytest.raises(NothingSent, match="1000"):
        client.send("again", 10)
    client.close()


def test_our_client_gives_up_in_time_and_is_ended_from_another_thread(url):
    """A wait has a limit, and `close` ends it before."""
    client = OurClient.open(url)
    with pytest.raises(TimeoutError):
        client.recv(0.05)
    threading.Timer(0.2, client.close).start()
    started = time.monotonic()
    with pytest.raises((ConnectionClosed, OSError)):
        client.recv(30)
    assert time.monotonic() - started < 5


# --------------------------------------------------------------------------------------- conformance


def test_fragments_with_pings_between_them(echo):
    """The ping is answered at once, the message when it is complete."""
    with Raw(echo.port) as client:
        client.sock.sendall(
            masked(BINARY, b"ab", fin=False) + masked(PING, b"now") + masked(CONTINUATION, b"cd")
        )
        assert client.frame() == (PONG, b"now")
        assert client.frame() == (BINARY, b"abcd")
        client.sock.sendall(masked(PONG, b"unasked") + masked(TEXT, b"on"))
        assert client.frame() == (TEXT, b"on")


def test_a_sender_of_single_bytes(echo):
    """Header, key and payload one byte at a time."""
    with Raw(echo.port) as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in masked(BINARY, bytes(range(200))):
            client.sock.sendall(bytes([byte]))
        assert client.frame() == (BINARY, bytes(range(200)))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x01x", 1002),
        (b"\xc2\x80\0\0\0\0", 1002),
        (b"\x83\x80\0\0\0\0", 1002),
        (b"\x89\xfe\0\x7e" + bytes(130), 1002),
        (b"\x09\x80\0\0\0\0", 1002),
        (masked(CONTINUATION, b"x"), 1002),
        (masked(TEXT, b"\xff\xfe"), 1007),
        (masked(CLOSE, b"\x03"), 1002),
        (masked(CLOSE, b"\x03\xed"), 1002),
        (masked(CLOSE, b"\x03\xe8\xff"), 1007),
        (b"\x82\xff" + (LIMIT + 1).to_bytes(8, "big") + bytes(4), 1009),
        (b"\x82\xff" + b"\xff" * 8 + bytes(4), 1009),
        (masked(CLOSE, b"\x03\xe8bye"), 1000),
        (masked(CLOSE, b"\x0f\xa0"), 4000),
        (masked(CLOSE), 1005),
    ],
)
def test_close_codes(echo, data, code):
    """Each breach of the protocol and each proper close is answered by its code, then the server ends."""
    with Raw(echo.port) as client:
        client.sock.sendall(data)
        assert client.close_code() == code
        assert client.sock.recv(1) == b""


def test_a_handler_that_fails_closes_with_1011_and_the_server_lives_on(url):
    """Only its own connection."""
    with websockets.sync.client.connect(url) as other, websockets.sync.client.connect(url) as client:
        client.send("fail")
        with pytest.raises(LibraryClosed, match="1011"):
            client.recv(10)
        other.send("still here")
        assert other.recv(10) == "still here"


def test_a_message_of_more_than_the_limit_is_refused_while_it_comes(url):
    """The client reads 1009, whatever it still sends."""
    with websockets.sync.client.connect(url, compression=None) as client:
        with contextlib.suppress(LibraryClosed):
            client.send(bytes(LIMIT + 1))
        with pytest.raises(LibraryClosed, match="1009"):
            client.recv(10)


def test_a_message_of_the_limit_arrives(url):
    """128 MB, grown as it comes."""
    client = OurClient.open(url)
    data = zlib.compress(b"x") * 10
    client.send([memoryview(bytes(40 * 1024 * 1024)), data], 60)
    answer = client.recv(60)
    assert len(answer) == 40 * 1024 * 1024 + len(data)
    assert answer[-len(data) :] == data
    client.close()


# ----------------------------------------------------------------------------------------- bad peers


def wait_until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["reset", "end", "half"])
def test_a_client_that_vanishes_is_forgotten(how):
    """By a reset, by an end without a close, by closing one direction; in the middle of a message."""
    with Echo() as server:
        client = Raw(server.port, b"\x82\xff" + (1_000_000).to_bytes(8, "big") + b"abcd" + bytes(5000))
        wait_until(lambda: server.connections == 1)
        if how == "reset":
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half":
            client.sock.shutdown(socket.SHUT_WR)
        else:
            client.sock.close()
        wait_until(lambda: server.connections == 0)
        client.sock.close()


def test_a_client_that_never_reads_is_cut(monkeypatch):
    """The handler waits for room, not for ever; what waits to be sent stays small."""
    monkeypatch.setattr(under_test, "DRAIN_S", 0.5)
    with Echo() as server, Raw(server.port) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sock.sendall(masked(TEXT, b"flood"))
        wait_until(lambda: server.connections == 1)
        # The flood's messages have a megabyte; the next one waits.
        assert server.seen[0].transport.get_write_buffer_size() < 1024 * 1024 + 3 * under_test.WRITE_LIMIT
        wait_until(lambda: server.connections == 0)


def test_a_client_that_sends_faster_than_it_is_answered_waits():
    """Messages beyond two stay in the sender's own memory."""
    with Echo() as server, Raw(server.port) as client:
        client.sock.settimeout(0.5)
        message = masked(BINARY, bytes(1024 * 1024))
        with pytest.raises(TimeoutError):
            client.sock.sendall(message * 200)
        (connection,) = server.seen
        assert len(connection._messages) <= under_test.MAX_WAITING


def test_a_client_that_sends_faster_than_it_is_answered_rests(monkeypatch):
    """After a few messages that lay there already, and only it: another client's next message is never one of those."""
    monkeypatch.setattr(under_test, "PAUSE_S", 3600.0)
    with Echo() as server, Raw(server.port) as flood:
        flood.sock.sendall(masked(TEXT, b"again") * 10)
        with websockets.sync.client.connect(f"ws://127.0.0.1:{server.port}") as other:
            for number in range(5 * under_test.MAX_IN_A_ROW):
                other.send(str(number))
                assert other.recv(10) == str(number)
        (connection,) = (each for each in server.seen if each._messages)
        assert len(connection._messages) == 10 - under_test.MAX_IN_A_ROW


def test_a_client_that_does_not_shake_hands_is_cut(monkeypatch):
    """Silence and a header without end."""
    monkeypatch.setattr(under_test, "HANDSHAKE_S", 0.3)
    with Echo() as server:
        with socket.create_connection(("127.0.0.1", server.port), 10) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection(("127.0.0.1", server.port), 10) as endless:
            endless.sendall(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 7000)
            assert b" 431 " in endless.recv(1000)


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\0\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", b"\r\n\r\n"]
)
def test_what_is_no_request_gets_an_answer_and_an_end(echo, data):
    """TLS on a plain port, a form, nothing."""
    with socket.create_connection(("127.0.0.1", echo.port), 10) as client:
        client.sendall(data)
        assert client.recv(1000).startswith(b"HTTP/1.1 400")


def test_a_wrong_version_is_refused(echo):
    """With a reason."""
    with pytest.raises(AssertionError), Raw(echo.port, headers="Sec-WebSocket-Version: 8\r\n") as client:
        assert client.head.startswith(b"HTTP/1.1 101")


# ------------------------------------------------------------------------------------------ the end


def test_at_the_end_everybody_is_told_within_a_second():
    """1001 to open connections, an end to those that had not begun, and to those that do not answer."""
    server = Echo()
    with contextlib.ExitStack() as stack:
        with server:
            client = stack.enter_context(Raw(server.port))
            library = stack.enter_context(websockets.sync.client.connect(f"ws://127.0.0.1:{server.port}"))
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            wait_until(lambda: server.connections == 2)
            started = time.monotonic()
        assert time.monotonic() - started < 3
        assert client.close_code() == 1001
        with pytest.raises(LibraryClosed, match="1001"):
            library.recv(5)
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
    assert server.connections == 0


def test_an_http_answer_comes_whole():
    """What `answer` gives is sent instead of a handshake."""

    async def main() -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]

        async def handler(connection: Connection) -> None:
            raise AssertionError("never reached")

        async with listening(sock, handler, lambda c, r: c.respond(401, "no key\n"), max_bytes=LIMIT):  # type: ignore[arg-type]
            with pytest.raises(InvalidStatus) as caught:
                async with websockets.asyncio.client.connect(f"ws://127.0.0.1:{port}"):
                    pass
            assert caught.value.response.body == b"no key\n"
            with pytest.raises(InvalidStatus) as caught:
                await asyncio.to_thread(OurClient.open, f"ws://127.0.0.1:{port}")
            assert caught.value.response.body == b"no key\n"

    asyncio.run(main())


def test_a_compressed_frame_is_a_breach(url):
    """A client that compresses though it was declined is told."""
    with Raw(int(url.rsplit(":", 1)[1])) as client:
        extension = ClientPerMessageDeflateFactory().process_response_params([], [])
        frame = Frame(Opcode.TEXT, b"hello hello")
        client.sock.sendall(frame.serialize(mask=True, extensions=[extension]))
        assert client.close_code() == 1002
