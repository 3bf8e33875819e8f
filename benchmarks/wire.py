"""Round trips of raw and compressed images with an empty policy: ours against a plain openpi-style server and client.

    uv run python benchmarks/wire.py [--quick] [--json FILE]

The two are asked in turn, in one run, so that what the machine does to one it does to the other; the ratio is taken
pair by pair. The peer always sends raw images. The floor is a copy of the same bytes in memory.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from openpi_client.websocket_client_policy import WebsocketClientPolicy as OpenpiClient
from ratios import Part, Ratio, main, paired, timed

__all__ = ["HERE", "cameras_of", "measure", "observation", "pair", "start", "start_ours"]

HERE = Path(__file__).parent
# (name, height, width, codec of our client): the peer always sends raw images.
CASES = (
    ("raw_480x640", 480, 640, "raw"),
    ("raw_224x224", 224, 224, "raw"),
    ("jpeg_480x640", 480, 640, "jpeg"),
)


def run(quick: bool) -> Part:
    return Part("wire", [measure(case, 150 if quick else 600) for case in CASES[: 2 if quick else None]])


def measure(case: tuple[str, int, int, str], rounds: int) -> Ratio:
    """One row of the table."""
    name, height, width, codec = case
    obs = observation(height, width)
    with pair(height, width, codec) as (client, plain):
        ratio = paired(
            f"wire.{name}",
            f"round trip of two {height}x{width} images as {codec}, the peer's raw, loopback",
            lambda: client.infer(obs),
            lambda: plain.infer(obs),
            rounds=rounds,
            warm_up=20,
        )
    raw = np.concatenate([image.ravel() for image in obs["images"].values()])
    target = np.empty_like(raw)
    ratio.facts["ms of a copy in memory"] = float(
        np.median([timed(np.copyto, target, raw) for _ in range(200)])
    )
    return ratio


@contextmanager
def pair(
    height: int,
    width: int,
    codec: str = "raw",
    prefix: Sequence[str] = (),
    host: str = "127.0.0.1",
    through: Callable[[int], AbstractContextManager[int]] | None = None,
) -> Iterator[tuple[WebsocketClientPolicy, Any]]:
    """Our client at our server and openpi's at a plain one, both with an empty policy for images of that size.

    prefix: put before the servers' commands. host: where they listen. through: makes a port that leads to a port.
    """
    with tempfile.TemporaryDirectory() as folder:
        cameras = cameras_of(observation(height, width))
        checkpoint = write_checkpoint(Path(folder) / "empty", cameras=cameras, behaviour="constant")
        ours, our_port = start_ours(checkpoint, prefix=prefix, host=host)
        peer, peer_port = start(str(HERE / "plain_server.py"), "--port", "0", "--host", host, prefix=prefix)
        try:
            with (
                (through or nullcontext)(our_port) as our_port,
                (through or nullcontext)(peer_port) as peer_port,
            ):
                client = WebsocketClientPolicy(host, our_port, image_codec=codec, on_status=lambda line: None)  # type: ignore[arg-type]
                plain = OpenpiClient(host, peer_port)
                yield client, plain
                client.close()
                plain._ws.close()
        finally:
            for process in (ours, peer):
                process.kill()
                process.wait()


def cameras_of(obs: dict, resize: str = "none") -> tuple[dict[str, Any], ...]:
    """What a policy says of cameras that give such images."""
    return tuple(
        {"name": name, "height": image.shape[0], "width": image.shape[1], "resize": resize}
        for name, image in obs["images"].items()
    )


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


def start_ours(
    checkpoint: Path, prefix: Sequence[str] = (), host: str = "127.0.0.1"
) -> tuple[subprocess.Popen[str], int]:
    """`serve_policy` on a free port; with the port."""
    command = ("-m", "grasp_cube.serve_policy", "--policy.path", str(checkpoint))
    return start(*command, "--host", host, "--port", "0", prefix=prefix)


def start(*command: str, prefix: Sequence[str] = ()) -> tuple[subprocess.Popen[str], int]:
    """A server that prints its ws:// address; with the port."""
    process = subprocess.Popen(
        [*prefix, sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "ws://" in line:
            return process, int(line.rsplit(":", 1)[1])
    raise RuntimeError(f"{' '.join(command)} ended before it listened")


if __name__ == "__main__":
    main(run, __doc__)
