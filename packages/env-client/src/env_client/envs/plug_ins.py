"""Robots of other packages: the entry-point group `env_client.envs` (docs/adding-a-robot.md builds one).

The entry point's name is what `--env.type` takes; its object is a frozen dataclass derived from `PlugInConfig`, whose
fields are the robot's flags and whose `make_env` makes the env.

Life cycle: a command calls `register_robots` once, before it reads its command line.
Error policy: a plug-in that cannot be used is said and left out; the other robots work as without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from env_client.envs.config import EnvConfig
from env_client.envs.robots import LiveEnvConfig

if TYPE_CHECKING:
    from env_client.envs.make import LiveEnv

__all__ = ["ENTRY_POINTS", "PlugInConfig", "register_robots"]

ENTRY_POINTS = "env_client.envs"


@dataclasses.dataclass(frozen=True)
class PlugInConfig(LiveEnvConfig):
    """The base of another package's robot. Its module must be light to import: `--help` imports it.

    `robot_config_path` should default to a file that the package brings: its poses and their unit.
    """

    def make_env(self, *, task: str, dry_run: bool) -> LiveEnv:
        """The env, not connected yet. `task` is the prompt that its observations carry; with `dry_run` the motors
        are neither switched on nor commanded. Raises `EnvError`."""
        raise NotImplementedError(f"{type(self).__name__} has no make_env")


def register_robots(warn: Callable[[str], object]) -> None:
    """Offer the robots of all installed packages as `--env.type`; `warn` gets one sentence for each that cannot be."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            EnvConfig.register_subclass(point.name, _config_class(point.load()))
        except Exception as error:  # another package's code raises anything
            reason = " ".join(str(error).split())
            warn(
                f"the robot {point.name!r} of a plug-in ({point.value}) cannot be used: "
                f"{type(error).__name__}: {reason}"
            )


def _config_class(found: object) -> type[PlugInConfig]:
    if not (isinstance(found, type) and issubclass(found, PlugInConfig)):
        raise TypeError(f"a class derived from PlugInConfig was expected, {found!r:.100} came")
    if "__dataclass_fields__" not in vars(found):
        raise TypeError(f"{found.__name__} is no dataclass: put @dataclass(frozen=True) above it")
    return found
