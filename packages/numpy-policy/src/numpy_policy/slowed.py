"""Any other checkpoint, answered late: what a larger model or a slower device would be to the robot, without the load on it.

Life cycle: as of the policy behind it. `config.json` holds `{"type": "slowed", "path": FOLDER, "delay_s": SECONDS}`; options of
the command line (`--policy.rtc` and so on) go to the policy behind it.
Error policy: the other policy's own.
"""

import json
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest

__all__ = ["Slowed", "load", "write_slowed"]

TYPE = "slowed"


def write_slowed(folder: str | Path, checkpoint: str | Path, delay_s: float) -> Path:
    """Write a folder that `serve_policy --policy.path` takes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"type": TYPE, "path": str(Path(checkpoint).resolve()), "delay_s": delay_s}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def load(config: PolicyConfig) -> "Slowed":
    """The entry point. Raises `PolicyError`."""
    values = json.loads((Path(config.path or ".") / "config.json").read_text())
    try:
        path, delay_s = str(values["path"]), float(values["delay_s"])
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(
            f"{config.path}/config.json has no usable {error}; path and delay_s were expected"
        ) from error
    return Slowed(load_policy(replace(config, path=path, type=None)), delay_s)


class Slowed:
    """A `Policy` whose batches take `delay_s` seconds, however fast the policy behind it is."""

    def __init__(self, policy: Policy, delay_s: float):
        self.policy = policy
        self.delay_s = delay_s
        self.spec = policy.spec
        self.metadata: dict[str, Any] = policy.metadata

    def warm_up(self) -> None:
        self.policy.warm_up()

    def check(self, request: PolicyRequest) -> Hashable:
        return self.policy.check(request)

    def get_actions(self, obs: dict[str, Any], **request: Any) -> np.ndarray:
        return self.get_actions_batch([PolicyRequest(obs, **request)])[0]

    def get_actions_batch(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray]:
        due = time.monotonic() + self.delay_s
        chunks = self.policy.get_actions_batch(requests)
        time.sleep(max(0.0, due - time.monotonic()))
        return chunks

    def close(self) -> None:
        self.policy.close()
