"""What the fleet's layout adds to a round trip: a replica asked through the fleet's address, in turn with itself asked directly.

    uv run python benchmarks/fleet.py [--quick] [--json FILE]

`serve_fleet` runs as it does in earnest (Ray Serve, one replica for each policy, HAProxy in front); the peer is the same
server process without anything in front of it. The policy is empty and the images are raw: two of 480x640 (1.84 MB) and
two of 160x160 (150 kB).
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import yaml
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from ratios import Part, Ratio, main, paired
from wire import cameras_of, observation

__all__ = ["run"]

# (name, height, width) of each of the two images.
CASES = (("raw_1840kB", 480, 640), ("raw_150kB", 160, 160))


def run(quick: bool) -> Part:
    part = Part("fleet")
    with fleet() as (port, direct):
        for name, height, width in CASES:
            part.ratios.append(
                measure(name, observation(height, width), port, direct[name], 200 if quick else 1500)
            )
    for ratio in part.ratios:
        part.tables[f"{ratio.name}: added milliseconds"] = {
            f"p{percent}": float(np.percentile(ratio.ours, percent) - np.percentile(ratio.peer, percent))
            for percent in (50, 90, 99)
        }
    return part


def measure(name: str, obs: dict, port: int, direct: str, rounds: int) -> Ratio:
    with (
        WebsocketClientPolicy(f"ws://127.0.0.1:{port}/{name}", on_status=lambda line: None) as through,
        WebsocketClientPolicy(f"ws://{direct}/{name}", on_status=lambda line: None) as bare,
    ):
        return paired(
            f"fleet.{name}",
            "round trip through the fleet's address, the peer the same server without it",
            lambda: through.infer(obs),
            lambda: bare.infer(obs),
            rounds=rounds,
            warm_up=20,
        )


@contextmanager
def fleet() -> Iterator[tuple[int, dict[str, str]]]:
    """The fleet's port, and the address of each policy's replica."""
    with tempfile.TemporaryDirectory() as folder:
        policies = {}
        for name, height, width in CASES:
            cameras = cameras_of(observation(height, width))
            path = write_checkpoint(Path(folder) / name, cameras=cameras, behaviour="constant")
            policies[name] = {"path": str(path), "gpus": 0}
        config = Path(folder) / "fleet.yaml"
        config.write_text(yaml.safe_dump({"policies": policies, "host": "127.0.0.1", "port": 0}))
        command = [sys.executable, "-m", "grasp_cube.serve_fleet", "--config", str(config)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            ready = next((line for line in process.stdout if line.startswith("Waiting")), None)
            if ready is None:
                raise SystemExit(f"serve_fleet ended with exit code {process.wait()}")
            port = int(ready.rsplit(":", 1)[1])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=30) as answer:
                status = json.load(answer)
            yield port, {name: status["policies"][name]["replicas"][0]["address"] for name in policies}
        finally:
            process.terminate()
            process.wait(120)


if __name__ == "__main__":
    main(run, __doc__)
