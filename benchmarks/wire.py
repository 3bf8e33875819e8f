"""Round trips of raw and compressed images with an empty policy: ours against a plain openpi-style server and client.

    uv run python benchmarks/wire.py [--rounds 300] [--json FILE]

The two are asked in turn, A B A B …, in one run, so that what the machine does to one it does to the other; the
ratio is taken pair by pair. The floor is a copy of the same bytes in memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from openpi_client.websocket_client_policy import WebsocketClientPolicy as OpenpiClient
from tqdm import tqdm

HERE = Path(__file__).parent
# (name, height, width, codec of our client): the peer always sends raw images.
CASES = (
    ("2 x 480x640x3 raw", 480, 640, "raw"),
    ("2 x 224x224x3 raw", 224, 224, "raw"),
    ("2 x 480x640x3 JPEG 90", 480, 640, "jpeg"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = [measure(case, options.rounds) for case in CASES]
    print(f"\n{os.cpu_count()} cores, {options.rounds} paired round trips each, ms")
    print(
        f"{'images':24}{'ours p50':>10}{'p99':>8}{'peer p50':>10}{'p99':>8}{'ratio':>8}{'memcpy':>9}{'x floor':>9}"
    )
    for row in rows:
        print(
            f"{row['case']:24}{row['ours_p50']:10.2f}{row['ours_p99']:8.2f}{row['peer_p50']:10.2f}"
            f"{row['peer_p99']:8.2f}{row['ratio']:8.2f}{row['memcpy']:9.3f}{row['ours_p50'] / row['memcpy']:9.0f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(case: tuple[str, int, int, str], rounds: int) -> dict[str, float | str]:
    """One row of the table."""
    name, height, width, codec = case
    obs = observation(height, width)
    cameras = tuple({"name": n, "height": height, "width": width, "resize": "none"} for n in obs["images"])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "empty", cameras=cameras, behaviour="constant")
        ours, our_port = start_ours(checkpoint)
        peer, peer_port = start(str(HERE / "plain_server.py"), "--port", "0")
        try:
            client = WebsocketClientPolicy("127.0.0.1", our_port, image_codec=codec)  # type: ignore[arg-type]
            plain = OpenpiClient("127.0.0.1", peer_port)
            for _ in range(20):
                client.infer(obs)
                plain.infer(obs)
            pairs = np.array(
                [(timed(client.infer, obs), timed(plain.infer, obs)) for _ in tqdm(range(rounds), desc=name)]
            )
            client.close()
        finally:
            ours.kill()
            peer.kill()
    raw = np.concatenate([image.ravel() for image in obs["images"].values()])
    target = np.empty_like(raw)
    copies = [timed(np.copyto, target, raw) for _ in range(200)]
    return {
        "case": name,
        "ours_p50": float(np.percentile(pairs[:, 0], 50)),
        "ours_p99": float(np.percentile(pairs[:, 0], 99)),
        "peer_p50": float(np.percentile(pairs[:, 1], 50)),
        "peer_p99": float(np.percentile(pairs[:, 1], 99)),
        "ratio": float(np.median(pairs[:, 0] / pairs[:, 1])),
        "memcpy": float(np.median(copies)),
    }


def observation(height: int, width: int) -> dict:
    """Two pictures with structure and some noise, as cameras give them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=-1)
    picture = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    return {
        "images": {"front": picture, "wrist": picture[::-1].copy()},
        "states": {"arm": np.zeros(6, np.float32)},
        "task": "lift up the red cube",
    }


def timed(call: Callable, *arguments: object) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - started) * 1e3


def start_ours(checkpoint: Path) -> tuple[subprocess.Popen[str], int]:
    """`serve_policy` on a free loopback port; with the port."""
    command = ("-m", "grasp_cube.serve_policy", "--policy.path", str(checkpoint))
    return start(*command, "--host", "127.0.0.1", "--port", "0")


def start(*command: str) -> tuple[subprocess.Popen[str], int]:
    """A server that prints its ws:// address; with the port."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "ws://127.0.0.1:" in line:
            return process, int(line.rsplit(":", 1)[1])
    raise RuntimeError(f"{' '.join(command)} ended before it listened")


if __name__ == "__main__":
    main()
