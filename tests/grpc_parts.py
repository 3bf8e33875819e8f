"""A gRPC gateway as a process, and a robot that asks it: for the tests of the gateway."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy_policy import Options, expected_chunk
from processes import ROOT, Running, running

CAMERAS = tuple(
    {"name": name, "height": 24, "width": 32, "resize": "none"} for name in ("head", "left_wrist")
)
OPTIONS = Options(cameras=CAMERAS, states=({"name": "arms", "size": 16},), action_dim=16, horizon=4)
FIELDS = {key: getattr(OPTIONS, key) for key in ("cameras", "states", "action_dim", "horizon")}


@contextlib.contextmanager
def grpc_gateway(checkpoint: Path | None, **options) -> Iterator[tuple[Running, int]]:
    """A gateway process, and its port."""
    config = json.dumps(options | {"checkpoint": str(checkpoint) if checkpoint else None})
    with running(sys.executable, ROOT / "tests" / "gateways" / "gateway_process.py", config) as process:
        yield process, int(process.wait_for(r"port (\d+)")[1])


class Robot:
    """Random observations: as the gateway should see them, and as they are sent."""

    def __init__(self, messages, seed: int):
        rng = np.random.default_rng(seed)
        self.messages = messages
        self.head, self.wrist = (rng.integers(0, 256, (24, 32, 3), np.uint8) for _ in range(2))
        self.state = rng.uniform(-1, 1, 16).astype(np.float32)

    def image(self, name: str, encoding: str, data: bytes, width: int = 32, height: int = 24):
        return self.messages["ImageData"](
            camera_name=name, data=data, width=width, height=height, encoding=encoding
        )

    def observation(self, images=None, **fields):
        if images is None:
            images = [
                self.image("head_rgbd", "rgb8", self.head.tobytes()),
                self.image("left_wrist_rgbd", "raw", self.wrist.tobytes()),
            ]
        return self.messages["Observation"](**({"state": self.state.tolist(), "images": images} | fields))

    def chunk(self, prompt: str = "tidy up", head: np.ndarray | None = None) -> np.ndarray:
        images = {"head": self.head if head is None else head, "left_wrist": self.wrist}
        return expected_chunk(OPTIONS, {"images": images, "state": self.state}, prompt=prompt)


def refused(code: grpc.StatusCode, call, *arguments, **options) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    assert caught.value.code() == code
    return caught.value.details()
