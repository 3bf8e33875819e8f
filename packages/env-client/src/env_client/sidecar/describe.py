"""A run as its records and its page describe it, made from what the control process knows."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from env_client.envs.env import EnvSpec
from env_client.sidecar.types import RunInfo
from env_client.wire import PolicySpec

__all__ = ["describe_run", "plain_config"]

# What must not be written down or shown.
_SECRETS = ("api_key", "token")


def plain_config(config: Any) -> dict[str, Any]:
    """A config as plain values, without keys and tokens."""
    return _without_secrets(json.loads(json.dumps(asdict(config), default=str)))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_secrets(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _SECRETS
    }


def describe_run(
    config: Any,
    robot: EnvSpec,
    policy: PolicySpec | None,
    *,
    fps: float,
    server: str,
    prompt: str,
    execution: str,
) -> RunInfo:
    """`config` is the command's own dataclass; `server` is HOST:PORT."""
    started = time.time()
    return RunInfo(
        run_id=time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(started)),
        started=started,
        config=plain_config(config),
        robot=robot.type,
        action_names=robot.action_names,
        unit=robot.unit,
        lower=robot.lower,
        upper=robot.upper,
        state_index=robot.state_index,
        unit_per_rad=robot.unit_per_rad,
        states={part.name: part.size for part in robot.states},
        cameras=robot.cameras,
        fps=fps,
        policy=None if policy is None else policy.to_wire(),
        server=server,
        prompt=prompt,
        execution=execution,
    )
