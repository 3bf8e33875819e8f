"""The server over real sockets: what it answers, in whose dialect, and what it refuses without falling over."""

import concurrent.futures
import contextlib
import threading
import time

import cv2
import msgpack
import msgpack_numpy
import numpy as np
import pytest
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import InferReply, RemoteError, pack, unpack
from numpy_policy import Options, expected_chunk
from serving_parts import CAMERAS, client, get, make_observation
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

OPTIONS = Options(cameras=CAMERAS)


def open_socket(port: int):
    """A bare WebSocket after the metadata frame."""
    socket = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
    metadata, _ = unpack(socket.recv())
    return socket, metadata


def test_the_metadata_comes_first_and_describes_the_policy(port):
    """Protocol, codecs and the whole spec, before anything is asked."""
    socket, metadata = open_socket(port)
    with socket:
        assert metadata["protocol"] == "grasp-cube/1"
        assert metadata["image_codecs"] == ["raw", "jpeg", "png"]
        assert metadata["policy"]["action_dim"] == 6
        assert metadata["policy"]["n_obs_steps"] == 1
        assert [camera["name"] for camera in metadata["policy"]["cameras"]] == ["front", "wrist"]


def test_a_bare_observation_gets_a_bare_reply(port):
    """As the SO-101 clients speak: `action`, no envelope, both timings; and `{"reset": True}` is echoed."""
    obs = make_observation(1)
    socket, _ = open_socket(port)
    with socket:
        socket.send(pack(obs))
        reply, _ = unpack(socket.recv())
        assert set(reply) == {"action", "actions", "server_timing", "policy_timing"}
        assert reply["action"].dtype == np.float32
        assert np.array_equal(reply["action"], expected_chunk(OPTIONS, obs))
        assert reply["policy_timing"]["infer_ms"] == reply["server_timing"]["infer_ms"]
        socket.send(pack({"reset": True}))
        assert unpack(socket.recv())[0] == {"reset": True}


def test_a_client_of_msgpack_numpy_is_answered_in_its_dialect(port):
    """PyPI's msgpack-numpy reads the reply."""
    socket, _ = open_socket(port)
    with socket:
        socket.send(msgpack.packb(make_observation(2), default=msgpack_numpy.encode))
        reply = msgpack.unpackb(socket.recv(), object_hook=msgpack_numpy.decode)
        assert np.array_equal(reply["actions"], expected_chunk(OPTIONS, make_observation(2)))


def test_an_enveloped_request_gets_its_envelope_back(port):
    """seq, episode and capture_time are echoed, the chunk is numbered."""
    with client(port) as policy:
        reply = policy.infer(make_observation(3), episode=7, seq=41, capture_time=12.5)
        assert (reply["op"], reply["seq"], reply["episode"], reply["capture_time"]) == ("infer", 41, 7, 12.5)
        assert reply["chunk_id"] == 1
        assert np.array_equal(reply["actions"], expected_chunk(OPTIONS, make_observation(3)))
        again = policy.infer(make_observation(3))
        assert again["chunk_id"] == 2
        assert again["server_timing"]["prev_total_ms"] > 0


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_images_may_come_compressed(port, codec):
    """The policy sees what the codec gives back; PNG is exact."""
    obs = make_observation(4)
    with client(port, image_codec=codec) as policy:
        chunk = policy.infer(obs)["actions"]
    if codec == "jpeg":
        for name, image in obs["images"].items():
            data = cv2.imencode(".jpeg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            obs["images"][name] = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(chunk, expected_chunk(OPTIONS, obs))


def test_prompts_belong_to_one_session(port):
    """set_prompt serves requests that name none, only of its own connection, until reset; `prompt` wins over `task`."""
    obs = {key: value for key, value in make_observation(5).items() if key != "task"}
    with client(port) as one, client(port) as other:
        one.set_prompt("sort the cubes by color")
        assert np.array_equal(
            one.infer(obs)["actions"], expected_chunk(OPTIONS, obs, (), "sort the cubes by color")
        )
        assert np.array_equal(other.infer(obs)["actions"], expected_chunk(OPTIONS, obs))
        named = obs | {"task": "a", "prompt": "b"}
        assert np.array_equal(one.infer(named)["actions"], expected_chunk(OPTIONS, obs, (), "b"))
        assert np.array_equal(one.infer(named, prompt="c")["actions"], expected_chunk(OPTIONS, obs, (), "c"))
        one.reset()
        assert np.array_equal(one.infer(obs)["actions"], expected_chunk(OPTIONS, obs))


def without(obs: dict, group: str, name: str) -> dict:
    return obs | {group: {key: value for key, value in obs[group].items() if key != name}}


def with_image(image) -> dict:
    obs = make_observation()
    return obs | {"images": obs["images"] | {"front": image}}


def marked(**fields) -> bytes:
    return msgpack.packb({b"__ndarray__": True} | {key.encode(): value for key, value in fields.items()})


GOOD = make_observation()
# name -> (frame, what the answer must say)
BAD = {
    "missing camera": (pack(without(GOOD, "images", "wrist")), "'wrist' is missing"),
    "missing state": (pack(without(GOOD, "states", "arm")), "'arm' is missing"),
    "wrong image shape": (pack(with_image(np.zeros((10, 32, 3), np.uint8))), "32x10"),
    "image without colour": (pack(with_image(np.zeros((24, 32), np.uint8))), "uint8 RGB"),
    "float image": (pack(with_image(np.zeros((24, 32, 3), np.float32))), "float32"),
    "image as text": (pack(with_image("front.png")), "uint8 RGB"),
    "wrong state shape": (pack(GOOD | {"states": {"arm": np.zeros(7, np.float32)}}), "7"),
    "NaN in the state": (
        pack(GOOD | {"states": {"arm": np.array([0, 0, np.nan, 0, 0, 0], np.float32)}}),
        "finite",
    ),
    "damaged JPEG": (
        pack(with_image({"__image__": "jpeg", "data": b"\xff\xd8", "shape": [24, 32, 3]})),
        "jpeg",
    ),
    "empty map": (pack({}), "empty"),
    "a list": (pack([1, 2]), "a map was expected"),
    "unknown op": (pack({"op": "dance", "seq": 9}), "the op 'dance'"),
    "op of another type": (pack({"op": 3}), "the op 3"),
    "infer without obs": (pack({"op": "infer", "seq": 1}), "obs is None"),
    "history of numbers": (pack({"op": "infer", "obs": GOOD, "history": [1]}), "history[0]"),
    "endless history": (pack({"op": "infer", "obs": GOOD, "history": [{"a": 1}] * 33}), "at most 32"),
    "prompt of another type": (pack({"op": "infer", "obs": GOOD, "prompt": 5}), "prompt is 5"),
    "rtc of another shape": (pack({"op": "infer", "obs": GOOD, "rtc": {"prev": np.zeros(6)}}), "rtc.prev"),
    "object array": (marked(data=b"\0" * 8, dtype="|O", shape=[1]), "dtype '|O'"),
    "pickle": (
        msgpack.packb({b"nd": True, b"type": "|O", b"kind": b"O", b"data": b"cos\nsystem\n"}),
        "kind 'O'",
    ),
    "negative shape": (marked(data=b"", dtype="<f4", shape=[-1]), "zero or more"),
    "surplus bytes in an array": (marked(data=b"\0" * 9, dtype="<f4", shape=[2]), "9 came"),
    "surplus bytes": (pack(GOOD) + b"\0", "surplus"),
    "200-deep nesting": (b"\x91" * 200 + b"\xc0", "nests deeper"),
    "100 MB": (b"\xc6\x05\xf5\xe1\x00" + bytes(100_000_000), "at most"),
    "text": ("hello", "text frame"),
    "garbage": (bytes(range(256)), "surplus"),
    "nothing": (b"", "ends after 0 bytes"),
}


@pytest.fixture(scope="module")
def ill_treated(port):
    """One connection that lives through all of it."""
    socket, _ = open_socket(port)
    with socket:
        yield socket


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_connection_lives_on(ill_treated, name):
    """Each gets an INVALID_INPUT with a sentence, and the next good observation on the same connection a chunk."""
    frame, sentence = BAD[name]
    ill_treated.send(frame)
    answer = ill_treated.recv(timeout=30)
    if isinstance(answer, bytes):
        reply, _ = unpack(answer)
        assert (reply["op"], reply["code"]) == ("error", "INVALID_INPUT")
        answer = reply["message"]
    else:
        assert answer.startswith("INVALID_INPUT: ")
    assert sentence in answer
    assert "Traceback" not in answer
    ill_treated.send(pack(GOOD))
    assert np.array_equal(unpack(ill_treated.recv())[0]["actions"], expected_chunk(OPTIONS, GOOD))


def test_enveloped_errors_are_maps_with_the_seq_and_bare_ones_are_text(port):
    """Clients that exist raise a text frame; ours reads the code."""
    socket, _ = open_socket(port)
    with socket:
        socket.send(pack({"op": "infer", "seq": 5, "obs": {"images": {}}}))
        reply, _ = unpack(socket.recv())
        assert (reply["op"], reply["seq"], reply["code"]) == ("error", 5, "INVALID_INPUT")
        socket.send(pack({"images": {}}))
        assert isinstance(socket.recv(), str)
    with client(port) as policy:
        with pytest.raises(RemoteError) as caught:
            policy.infer({"images": {}})
        assert caught.value.code == "INVALID_INPUT"
        assert policy.connected


def test_a_frame_beyond_reason_closes_only_its_own_connection(port):
    """More than 128 MB is not read at all; another client notices nothing."""
    with client(port) as other:
        socket, _ = open_socket(port)
        with socket:
            # The close may come before all of it is written.
            with contextlib.suppress(ConnectionClosed):
                socket.send(bytes(130 * 1024 * 1024))
            with pytest.raises(ConnectionClosed, match="1009"):
                socket.recv(timeout=30)
        assert other.infer(GOOD)["actions"].shape == (16, 6)


def test_healthz_and_new_clients_do_not_wait_for_a_running_model(slow_port):
    """Both are answered while the inference that was asked for before still runs."""
    answered = threading.Event()
    with client(slow_port) as busy:

        def ask() -> None:
            busy.infer(GOOD)
            answered.set()

        thread = threading.Thread(target=ask)
        thread.start()
        with client(slow_port) as second:
            assert get(slow_port, "/healthz") == (200, b"OK\n")
            assert second.status()["ready"] is True
        assert not answered.is_set()
        thread.join()
        assert answered.is_set()


def test_a_newer_observation_replaces_one_that_waits(slow_port):
    """Every request is answered: the running one, the replaced one (SUPERSEDED) and the newest."""
    socket, _ = open_socket(slow_port)
    with socket, client(slow_port) as observer:
        socket.send(pack({"op": "infer", "seq": 1, "obs": make_observation(1)}))
        while (status := observer.status())["queue"] or not status["running"]:
            time.sleep(0.01)
        for seq in (2, 3):
            socket.send(pack({"op": "infer", "seq": seq, "obs": make_observation(seq)}))
        replies = {reply["seq"]: reply for reply in (unpack(socket.recv())[0] for _ in range(3))}
    assert replies[2]["code"] == "SUPERSEDED"
    for seq in (1, 3):
        assert np.array_equal(replies[seq]["actions"], expected_chunk(OPTIONS, make_observation(seq)))


def test_a_full_queue_answers_overloaded(slow_port):
    """More than one running and four waiting requests are refused at once, with a time to come back."""
    sockets = [open_socket(slow_port)[0] for _ in range(8)]
    for socket in sockets:
        socket.send(pack({"op": "infer", "seq": 1, "obs": GOOD}))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = [unpack(frame)[0] for frame in pool.map(lambda socket: socket.recv(timeout=60), sockets)]
    for socket in sockets:
        socket.close()
    refused = [reply for reply in replies if reply["op"] == "error"]
    assert {reply["code"] for reply in refused} == {"OVERLOADED"}
    assert all(reply["retry_after_ms"] > 0 for reply in refused)
    assert 2 <= len(refused) <= 4


def test_configure_is_refused_and_status_tells(port):
    """A server that was started for one checkpoint says so."""
    with client(port) as policy:
        with pytest.raises(RemoteError, match="cannot be configured"):
            policy._call({"op": "configure", "path": "x"})
        status = policy.status()
        assert status["policy"]["type"] == "numpy_test"
        assert status["sessions"] >= 1


def test_other_http_requests_are_told_what_this_is(port):
    """A browser gets a sentence, not a hang."""
    status, body = get(port, "/")
    assert status == 426
    assert b"WebSocket" in body


def test_a_reply_names_both_keys_for_the_two_kinds_of_clients():
    """`action` and `actions` are the same array."""
    reply = InferReply(np.zeros((2, 6), np.float32), 1, {"infer_ms": 1.0}).to_wire(bare=True)
    assert reply["action"] is reply["actions"]


def test_a_client_without_a_server_says_so_and_gives_up_in_time(unused_port):
    """A visible message while it waits, and cures when it gives up."""
    said: list[str] = []
    with pytest.raises(ConnectionLost, match="is it running"):
        WebsocketClientPolicy("127.0.0.1", unused_port, connect_timeout_s=1.0, on_status=said.append)
    assert "Waiting for a policy server" in said[0]
