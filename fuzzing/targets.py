"""The targets by name. Light: a target's module is imported by `load`, inside atheris's instrumentation."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote."""

    # MODULE:FUNCTION of a function of bytes; MODULE also has `seeds_of(FUNCTION)`.
    place: str
    # Longest input in bytes.
    max_len: int
    # Modules whose branches guide the fuzzer.
    instrumented: tuple[str, ...]

    def load(self) -> Callable[[bytes], None]:
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)

    def seeds(self) -> list[bytes]:
        module, _, name = self.place.partition(":")
        return importlib.import_module(module).seeds_of(name)


_WIRE = ("env_client.wire", "env_client.answers", "grasp_cube.policies.observation")

TARGETS = {
    # Requests and answers: decoder, messages, images, observations.
    "wire": Target("fuzzing.wire:message", 12_000, _WIRE),
    # WebSocket frames, as a server and as a client reads them.
    "frames": Target("fuzzing.wire:frames", 4_000, _WIRE),
    # Compressed images.
    "images": Target("fuzzing.wire:image", 4_000, _WIRE),
    # HTTP heads and what follows them, against the whole server.
    "server": Target("fuzzing.server:connection", 4_000, ("grasp_cube.serving", *_WIRE)),
    # The gRPC gateway's messages.
    "grpc": Target("fuzzing.gateway:message", 6_000, ("grasp_cube.gateways", *_WIRE)),
    # A checkpoint's files.
    "checkpoint": Target(
        "fuzzing.files:checkpoint", 9_000, ("grasp_cube.policies", "env_client.config_folders")
    ),
    # What a person writes: tasks, embodiments, robots, cameras, option files.
    "settings": Target(
        "fuzzing.files:settings", 4_000, ("grasp_cube.policies", "env_client.envs", "env_client.cli")
    ),
    # A recorded dataset's files.
    "dataset": Target("fuzzing.files:dataset", 5_000, ("env_client.envs",)),
    # Logs and records of a run.
    "log": Target("fuzzing.files:log", 3_000, ("env_client.record",)),
}
