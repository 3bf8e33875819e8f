"""The registry behind `--env.type`: each env's config registers itself under its name."""

from dataclasses import dataclass

import draccus

__all__ = ["EnvConfig"]


@dataclass(frozen=True)
class EnvConfig(draccus.ChoiceRegistry):
    """The base of every env's config; `EnvConfig.register_subclass("name")` adds one."""
