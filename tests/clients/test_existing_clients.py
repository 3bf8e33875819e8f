"""Clients that exist, unmodified, as processes of their own, against our server."""

import subprocess
import sys

from numpy_policy import write_checkpoint
from processes import policy_server, running
from serving_parts import CAMERAS

# openpi-client as its users call it.
OPENPI_CLIENT = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_parts import CAMERAS, make_observation
from numpy_policy import Options, expected_chunk

client = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]), api_key=sys.argv[2] if sys.argv[2:] else None)
print(sorted(client.get_server_metadata()))
for seed in range(5):
    obs = make_observation(seed)
    reply = client.infer(obs)
    assert np.array_equal(reply["actions"], expected_chunk(Options(cameras=CAMERAS), obs)), seed
    client.reset()
print("server_timing", sorted(reply["server_timing"]))
try:
    client.infer({"images": {}})
except RuntimeError as error:
    print("raised", error)
print(client.infer(make_observation())["actions"].shape)
"""

# What an SO-101 client does: wait for the metadata, reset, then a chunk at a time, in openpi's array dialect.
SO101_CLIENT = """
import sys
import msgpack, numpy as np
from websockets.sync.client import connect
from serving_parts import CAMERAS, make_observation
from numpy_policy import Options, expected_chunk

def encode(value):
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(type(value))

def decode(value):
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    return value

with connect(f"ws://127.0.0.1:{sys.argv[1]}", compression=None, max_size=None) as socket:
    print(sorted(msgpack.unpackb(socket.recv())))
    socket.send(msgpack.packb({"reset": True}))
    assert msgpack.unpackb(socket.recv()) == {"reset": True}
    for seed in range(5):
        socket.send(msgpack.packb(make_observation(seed), default=encode))
        action = msgpack.unpackb(socket.recv(), object_hook=decode)["action"]
        assert np.array_equal(action, expected_chunk(Options(cameras=CAMERAS), make_observation(seed))), seed
    print(action.shape)
"""


def run(code: str, *arguments: object) -> str:
    """The output of a client in a process of its own."""
    tests = __file__.rpartition("/clients/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tests,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openpi_client_unmodified(tmp_path):
    """Metadata, five chunks with resets between them, an error as RuntimeError, and on it goes; with a key too."""
    checkpoint = write_checkpoint(tmp_path / "numpy", cameras=CAMERAS)
    with policy_server(checkpoint, "--api-key", "secret") as (_, port):
        said = run(OPENPI_CLIENT, port, "secret")
    assert "'protocol'" in said
    assert "'infer_ms'" in said
    assert "raised" in said
    assert "INVALID_INPUT" in said
    assert "(16, 6)" in said


def test_so101_client(tmp_path):
    """The handshake, the reset and the reply that SO-101 clients expect."""
    checkpoint = write_checkpoint(tmp_path / "numpy", cameras=CAMERAS)
    with policy_server(checkpoint) as (_, port):
        assert "(16, 6)" in run(SO101_CLIENT, port)


def test_the_peers_agree_with_each_other():
    """The plain server that we measure against serves the unmodified openpi-client, so it is a fair peer."""
    code = """
import sys
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_parts import make_observation
print(WebsocketClientPolicy("127.0.0.1", int(sys.argv[1])).infer(make_observation())["actions"].shape)
"""
    with running(sys.executable, "benchmarks/plain_server.py", "--port", "0") as server:
        port = server.wait_for(r"listening at ws://127\.0\.0\.1:(\d+)")[1]
        assert "(16, 6)" in run(code, port)
