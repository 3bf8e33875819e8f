"""Clients that die in the middle, never read, never wait, send a byte a second, or only sit there: the others are served."""

import concurrent.futures
import contextlib
import json
import os
import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from bad_clients import IDLE, WAYS, frame, misbehaving, raw_client
from env_client.wire import pack
from env_client.wire.frames import BINARY, frame_header
from numpy_policy import Options, expected_chunk
from serving_parts import CAMERAS, client, get, make_observation, serving
from websockets.sync.client import connect

OPTIONS = Options(cameras=CAMERAS)


def drive(port: int, number: int, requests: int = 60) -> None:
    """A good client, every chunk of which is checked."""
    with client(port) as policy:
        for seed in range(requests):
            obs = make_observation(1000 * number + seed)
            assert np.array_equal(policy.infer(obs)["actions"], expected_chunk(OPTIONS, obs))


@pytest.mark.parametrize("way", WAYS[:-1])
def test_the_others_are_served(port, way):
    """Four good clients beside a bad one: each gets its own chunks."""
    with misbehaving(port, way), concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: drive(port, number), range(4)))
    drive(port, 9, 5)


def test_who_reads_nothing_has_little_computed(checkpoint):
    """Of thousands of requests those are answered whose answers fit into small buffers, and the rest when they are read."""
    asked, answers = 4000, bytearray()
    with (
        serving("--policy.path", checkpoint, "--limits.max-rate", "0") as (_, port),
        raw_client(port, buffer=4096) as sock,
    ):
        sock.sendall(frame({"op": "status"}) * asked)
        before = 0
        while (count := statuses(port)) != before or not count:
            before = count
            time.sleep(0.5)
        assert count < asked / 4
        drive(port, 0, 5)
        # Each names this once.
        while answers.count(b"uptime_s") < asked:
            received = sock.recv(1 << 20)
            assert received
            answers += received
        assert statuses(port) == asked


def statuses(port: int) -> int:
    """How often the server was asked for its status and has read it."""
    found = re.search(
        r'^grasp_cube_requests_total{op="status"} (\S+)', get(port, "/metrics")[1].decode(), re.M
    )
    assert found is not None
    return int(float(found[1]))


def test_five_hundred_idle_connections(checkpoint):
    """They are counted, the others are served, and when they are gone nothing of them is left."""
    with serving("--policy.path", checkpoint) as (server, port):
        drive(port, 0, 5)
        before = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        idle = [raw_client(port) for _ in range(IDLE)]
        until(lambda: json.loads(get(port, "/status")[1])["sessions"] == IDLE)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: drive(port, number), range(4)))
        for sock in idle:
            sock.close()
        until(lambda: json.loads(get(port, "/status")[1])["sessions"] == 0)
        until(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= before + 3)
        assert "Traceback" not in server.output


def test_a_message_that_takes_too_long_ends_its_connection(checkpoint):
    """With 1008; an idle client between two messages, and one whose every byte is a message, stay."""
    with (
        serving("--policy.path", checkpoint, "--limits.message-s", "0.3") as (_, port),
        client(port) as quiet,
        raw_client(port) as slow,
        connect(f"ws://127.0.0.1:{port}", compression=None) as busy,
    ):
        busy.recv()
        slow.sendall(frame_header(BINARY, 1000, b"\0\0\0\0"))
        received = b""
        while b"\x03\xf0" not in received:
            with contextlib.suppress(OSError):
                slow.send(b"\0")
            busy.send(pack({"reset": True}))
            busy.recv()
            slow.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                received += slow.recv(4096)
        # A close frame with 1008 and the reason.
        assert b"\x03\xf0a message took too long" in received
        assert quiet.infer(make_observation())["actions"].shape == (16, 6)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
