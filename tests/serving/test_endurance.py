"""What thousands of requests, connections and swaps leave behind in the server's process: nothing that grows."""

import json
import os

import numpy as np
import psutil
import pytest
from env_client.wire import pack
from numpy_policy import write_checkpoint
from serving_parts import CAMERAS, client, get, make_observation, serving

pytestmark = pytest.mark.slow

REQUESTS, CONNECTIONS, SWAPS = 20_000, 2_000, 50
# What a process may take more at the end than after its first tenth, in bytes: less than one policy's weights.
GROWTH = 24e6
WEIGHTS_MB = 40
# Threads that come when the first two pieces of work for their pool meet (decoding, folders, loading), which may be late.
POOLS = 3


def of_process(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open files, threads."""
    process = psutil.Process(pid)
    return process.memory_info().rss, len(os.listdir(f"/proc/{pid}/fd")), process.num_threads()


def check_flat(curve: list[tuple[int, int, int]]) -> None:
    """The last fifth of a curve beside its second fifth: the first one fills caches."""
    fifth = len(curve) // 5
    early, late = (np.median(curve[at : at + fifth], axis=0) for at in (fifth, len(curve) - fifth))
    print([f"{rss / 1e6:.0f} MB, {files} files, {threads} threads" for rss, files, threads in curve])
    assert late[0] - early[0] < GROWTH
    assert late[1] - early[1] <= 2
    assert late[2] - early[2] <= POOLS


def test_requests(checkpoint):
    """Twenty thousand of them, raw and compressed, good and bad."""
    with serving("--policy.path", checkpoint) as (server, port), client(port) as policy:
        good, bad = make_observation(), pack({"op": "infer", "obs": {"images": {}}})
        curve = []
        for number in range(REQUESTS):
            policy.images.codec = "png" if number % 5 == 0 else "raw"
            if number % 10 == 9:
                policy._connection.send(bad, 10)
                policy._connection.recv(10)
            else:
                policy.infer(good)
            if number % (REQUESTS // 20) == 0:
                curve.append(of_process(server.process.pid))
        check_flat(curve)


def test_connections(checkpoint):
    """Two thousand that come, ask once and go, half of them without a goodbye."""
    with serving("--policy.path", checkpoint) as (server, port):
        curve = []
        for number in range(CONNECTIONS):
            policy = client(port)
            policy.infer(make_observation())
            policy._connection._sock.close() if number % 2 else policy.close()
            if number % (CONNECTIONS // 20) == 0:
                curve.append(of_process(server.process.pid))
        check_flat(curve)
        assert json.loads(get(port, "/status")[1])["sessions"] <= 1


def test_swaps(tmp_path):
    """Fifty, between two policies of 40 MB each, beside a client that keeps on asking and one that reconnects."""
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, cameras=CAMERAS, hold_mb=WEIGHTS_MB)
    with serving("--policy.root", tmp_path) as (server, port), client(port) as policy:
        curve = []
        for number in range(SWAPS):
            policy.configure(path="ab"[number % 2], on_progress=lambda progress: None)
            policy.infer(make_observation())
            with client(port) as other:
                other.infer(make_observation())
            curve.append(of_process(server.process.pid))
        check_flat(curve)
        policies = policy.status()["policies"]
        assert [p["name"] for p in policies if p["in_memory"]] == ["b"]
