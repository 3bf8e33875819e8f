"""While a model computes for three seconds: how long does /healthz take, and how long a second client's connection?

    uv run python benchmarks/blocking.py

Ours beside a plain openpi-style server, whose inference blocks its event loop.
"""

import http.client
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from wire import HERE, observation, start, start_ours, timed

DELAY_S = 3.0


def main() -> None:
    obs = observation(24, 32)
    cameras = tuple({"name": n, "height": 24, "width": 32, "resize": "none"} for n in obs["images"])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "slow", cameras=cameras, delay_s=DELAY_S)
        servers = {
            "ours": start_ours(checkpoint),
            "plain": start(str(HERE / "plain_server.py"), "--port", "0", "--delay-s", str(DELAY_S)),
        }
        print(
            f"{'while a model runs for 3 s':28}{'/healthz p50':>14}{'worst':>10}{'second client':>16}   (ms)"
        )
        for name, (process, port) in servers.items():
            health, connection = probe(port, obs)
            print(f"{name:28}{np.median(health):14.1f}{max(health):10.1f}{connection:16.1f}")
            process.kill()


def probe(port: int, obs: dict) -> tuple[list[float], float]:
    """Milliseconds of ten /healthz requests, and of a second client's connection with its metadata."""
    with WebsocketClientPolicy("127.0.0.1", port) as busy:
        thread = threading.Thread(target=busy.infer, args=(obs,))
        thread.start()
        time.sleep(0.3)
        connection = timed(lambda: WebsocketClientPolicy("127.0.0.1", port).close())
        if not thread.is_alive():
            # The connection waited for the model; measure /healthz against another inference.
            thread = threading.Thread(target=busy.infer, args=(obs,))
            thread.start()
            time.sleep(0.3)
        health = [timed(get_health, port) for _ in range(10)]
        thread.join()
    return health, connection


def get_health(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/healthz")
    connection.getresponse().read()


if __name__ == "__main__":
    main()
