"""Three cameras of an Astribot S1 (1280x720, 640x360, 640x360, JPEG): what sending them costs the robot.

    uv run python benchmarks/astribot_cameras.py [--quick] [--rounds 200] [--json FILE]

pass through    the cameras' own JPEGs, untouched (what `run_env_client` does)
resized         decoded and brought to the policy's 224x224 on the robot, sent raw (what it does for plain servers)
raw             decoded on the robot, sent raw in their full size
re-encoded      decoded and compressed again on the robot, in their full size

The four are asked in turn, A B C D A B …, in one run against an empty policy. `robot` is the CPU time of the client's
thread for one observation, `round trip` the whole request, in which the server decodes what is compressed.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from env_client.control.network import encode_observation
from env_client.envs.env import Observation
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import CameraSpec, EncodedImage, PolicySpec, decode_image, encode_image
from numpy_policy import write_checkpoint
from tqdm import tqdm
from virtual_astribot.body import CAMERAS
from virtual_astribot.cameras import film
from wire import start_ours

NAMES = {"head_rgbd": "head", "left_wrist_rgbd": "left_wrist", "right_wrist_rgbd": "right_wrist"}
WAYS = ("pass through", "resized", "raw", "re-encoded")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="10 rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = measure(10 if options.quick else options.rounds)
    print(f"\n{os.cpu_count()} cores, {rows[0]['rounds']} observations each way; ms")
    print(
        f"{'way':14}{'kB':>9}{'at 30 Hz MB/s':>15}{'robot p50':>11}{'p99':>8}{'round trip p50':>16}{'p99':>8}"
    )
    for row in rows:
        print(
            f"{row['way']:14}{row['bytes'] / 1e3:9.0f}{row['bytes'] * 30 / 1e6:15.1f}{row['robot_p50']:11.2f}"
            f"{row['robot_p99']:8.2f}{row['trip_p50']:16.2f}{row['trip_p99']:8.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row for each way."""
    films = {NAMES[c.name]: (c, film(c)) for c in CAMERAS if c.name in NAMES}
    cameras = tuple(CameraSpec(name, 224, 224, "pad") for name in films)
    spec = PolicySpec("numpy_test", 22, 50, unit="rad", cameras=cameras)
    taken: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    plain = spec.to_wire()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(
            folder,
            behaviour="constant",
            action_dim=22,
            horizon=50,
            cameras=plain["cameras"],
            states=(),
            unit="rad",
        )
        server, port = start_ours(checkpoint)
        with contextlib.closing(WebsocketClientPolicy("127.0.0.1", port)) as client:
            for index in tqdm(range(rounds + 5), unit="round", disable=None):
                frames = {
                    name: EncodedImage("jpeg", jpegs[index % len(jpegs)], (camera.height, camera.width, 3))
                    for name, (camera, jpegs) in films.items()
                }
                for way in WAYS:
                    began, cpu = time.perf_counter(), time.thread_time()
                    obs = prepare(way, frames, spec, client.image_codecs)
                    client.infer(obs)
                    spent = time.thread_time() - cpu, time.perf_counter() - began
                    taken[way].append((spent[0] * 1e3, spent[1] * 1e3, size(obs)))
        server.kill()
    rows = []
    for way, all_figures in taken.items():
        # The first rounds warm both sides up.
        robot, trip, sizes = np.array(all_figures[5:]).T
        rows.append(
            {"way": way, "rounds": rounds, "bytes": float(sizes.mean())}
            | {f"robot_p{p}": float(np.percentile(robot, p)) for p in (50, 99)}
            | {f"trip_p{p}": float(np.percentile(trip, p)) for p in (50, 99)}
        )
    return rows


def prepare(
    way: str, frames: dict[str, EncodedImage], spec: PolicySpec, codecs: tuple[str, ...]
) -> dict[str, Any]:
    """The observation as it is sent."""
    if way == "pass through":
        return encode_observation(Observation(frames, {}), spec, codecs)
    if way == "resized":
        return encode_observation(Observation(frames, {}), spec)
    images: dict[str, Any] = {name: decode_image(frame) for name, frame in frames.items()}
    if way == "re-encoded":
        images = {name: encode_image(image, "jpeg", 85) for name, image in images.items()}
    return {"images": images, "states": {}, "task": ""}


def size(obs: dict[str, Any]) -> int:
    """Bytes of the images on the wire."""
    return sum(len(i.data) if isinstance(i, EncodedImage) else i.nbytes for i in obs["images"].values())


if __name__ == "__main__":
    main()
