"""What the tests of the server share: observations, cameras, servers and questions over plain HTTP."""

import contextlib
import http.client
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from env_client.websocket_client_policy import WebsocketClientPolicy
from processes import Running, running

# Small frames keep the tests quick; the size itself is no special case anywhere.
CAMERAS = tuple({"name": name, "height": 24, "width": 32, "resize": "none"} for name in ("front", "wrist"))


def make_observation(seed: int = 0, task: str = "lift up the red cube") -> dict:
    """An SO-101 observation with random content."""
    rng = np.random.default_rng(seed)
    return {
        "images": {name: rng.integers(0, 256, (24, 32, 3), np.uint8) for name in ("front", "wrist")},
        "states": {"arm": rng.uniform(-50, 50, 6).astype(np.float32)},
        "task": task,
    }


@contextlib.contextmanager
def serving(
    *arguments: object, cwd: Path | None = None, address: str = "127.0.0.1", **env: str
) -> Iterator[tuple[Running, int]]:
    """`serve_policy` with these flags on a free port, with the port."""
    command = [sys.executable, "-m", "grasp_cube.serve_policy", "--host", address, "--port", "0"]
    place = {} if cwd is None else {"cwd": cwd}
    with running(*command, *map(str, arguments), env=env, **place) as server:
        found = server.wait_for(rf"Waiting for client connections at wss?://{address}:(\d+)")
        yield server, int(found[1])


def client(port: int, **options) -> WebsocketClientPolicy:
    """Our client, which says nothing."""
    return WebsocketClientPolicy(
        "127.0.0.1", port, **({"connect_timeout_s": 20, "on_status": lambda sentence: None} | options)
    )


def get(
    port: int, path: str, timeout: float = 10, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a GET request."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def add_weights(folder: Path, megabytes: float) -> Path:
    """A safetensors file of that size, all zeros; it takes no room on the disk."""
    header = b"{}"
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(int(megabytes * 1e6))
    return folder
