"""Images that are compressed while the request is on its way: fragments of one message, over real sockets."""

import socket
import threading

import numpy as np
import pytest
from env_client import websocket as client_module
from env_client.websocket import Connection
from env_client.wire import LaterImage, encode_image, pack, pack_frame
from env_client.wire.frames import FrameReader
from env_client.wire.images import encode_images_later
from serving_parts import client, make_observation


def noise(seed: int, shape: tuple[int, ...] = (120, 160, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("dialect", ["openpi", "msgpack-numpy"])
def test_the_fragments_are_the_frame_that_would_have_been_packed_at_once(dialect):
    """One for each image that is to be made; what lies between them, arrays as well, goes with the next one."""
    images = {"front": noise(0), "wrist": noise(1)}
    packed = {name: encode_image(image, "jpeg") for name, image in images.items()}
    value = {"obs": {"depth": noise(2), "images": packed}, "seq": 3}
    later = {"obs": {"depth": noise(2), "images": encode_images_later(images, "jpeg")}, "seq": 3}
    fragments = list(pack_frame(later, dialect).fragments())
    assert [last for _, last in fragments] == [False, True]
    assert b"".join(part for parts, _ in fragments for part in parts) == pack(value, dialect)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_image_is_on_its_way_before_the_next_is_compressed(monkeypatch, elsewhere):
    """The second picture is made only when the other end has the first; masked or not, it reads one message."""
    if elsewhere:
        monkeypatch.setattr(client_module, "_stays_here", lambda sock: False)
    first, second = noise(0).tobytes(), noise(1).tobytes()
    arrived = threading.Event()

    def make_second() -> bytes:
        assert arrived.wait(10), "the first image was kept back"
        return second

    frame = pack_frame(
        [LaterImage("jpeg", (1, 1, 3), lambda: first), LaterImage("png", (1, 1, 3), make_second)]
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
        ours.setblocking(False)
        sending = threading.Thread(target=lambda: Connection(ours).send_fragments(frame.fragments(), 30))
        sending.start()
        reader, messages, got = FrameReader(from_client=True, max_bytes=1 << 20), [], 0
        theirs.settimeout(10)
        while not messages:
            count = theirs.recv_into(reader.buffer())
            assert count
            messages += reader.advance(count)
            got += count
            if got >= len(first):
                arrived.set()
        sending.join(10)
        ours.close()
        theirs.close()
    packed = [{"__image__": "jpeg", "data": first, "shape": [1, 1, 3]}]
    packed += [{"__image__": "png", "data": second, "shape": [1, 1, 3]}]
    assert [bytes(message) for message in messages] == [pack(packed)]


def test_an_image_that_cannot_be_compressed_costs_one_connection(port):
    """Its message is half said by then: the client connects again, and the next request is answered."""
    too_wide = noise(0, (1, 70_000, 3))  # JPEG ends at 65,535 pixels
    obs = make_observation(4)
    with client(port, image_codec="jpeg") as policy:
        with pytest.raises(Exception, match=r"(?i)jpeg|encode"):
            policy.infer(obs | {"images": {"front": obs["images"]["front"], "wrist": too_wide}})
        assert not policy.connected
        assert np.isfinite(policy.infer(obs)["action"]).all()
