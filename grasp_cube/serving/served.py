"""One checkpoint under its options, in memory or not: what a session is greeted with and keeps."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from env_client.wire import IMAGE_CODECS, PROTOCOL, PolicySpec, Progress, pack

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.places import checkpoint_name
from grasp_cube.policies.policy import Policy, PolicyError
from grasp_cube.serving.checkpoints import fingerprint, size_on_disk

__all__ = ["ServedPolicy", "metadata_of"]


def metadata_of(spec: PolicySpec | None, own: dict[str, Any], policy_id: str | None) -> dict[str, Any]:
    """The first frame of a connection: the checkpoint's own metadata under ours; no spec stands for an idle server."""
    return own | {
        "protocol": PROTOCOL,
        "policy": None if spec is None else spec.to_wire(),
        "policy_id": policy_id,
        "image_codecs": list(IMAGE_CODECS),
    }


@dataclass(eq=False)
class ServedPolicy:
    """What `Policies` knows of one policy. Belongs to the event loop's thread."""

    config: PolicyConfig
    folder: Path
    # What tells its checkpoint from others, on any machine.
    policy_id: str
    # What it takes in memory, by its files, in bytes.
    size: int
    # None: not in memory.
    policy: Policy | None = None
    # Known since it was loaded for the first time; they stay the same.
    metadata: dict[str, Any] = field(default_factory=dict)
    greeting: bytes = b""
    # Sessions that were greeted with it; requests that are being answered.
    sessions: int = 0
    requests: int = 0
    # Whether another policy took its name.
    retired: bool = False
    used: float = field(default_factory=time.monotonic)
    loading: "asyncio.Task[None] | None" = None
    listeners: list[Any] = field(default_factory=list)
    # Why, and when, it could not be loaded the last time.
    failure: str | None = None
    failed: float = 0.0

    @classmethod
    def on_disk(cls, config: PolicyConfig, folder: Path) -> "ServedPolicy":
        """Looks at the files. Raises `PolicyError`."""
        try:
            return cls(config, folder, fingerprint(folder), size_on_disk(folder))
        except OSError as error:
            raise PolicyError(f"{folder} cannot be read ({error}): check its permissions") from error

    @property
    def name(self) -> str:
        return str(self.metadata.get("name") or self.config.name or checkpoint_name(self.folder))

    def same_as(self, other: "ServedPolicy") -> bool:
        return (self.config, self.folder, self.policy_id) == (other.config, other.folder, other.policy_id)

    def say(self, stage: str, text: str) -> None:
        """Tell everybody who waits for it."""
        for tell in tuple(self.listeners):
            tell(Progress(stage, text))

    def changed(self) -> bool:
        """Whether the files are not those any more that sessions were told about."""
        try:
            return fingerprint(self.folder) != self.policy_id
        except OSError:
            return True

    def check_unchanged(self) -> None:
        """Raises `PolicyError` when what is read again is not what sessions were told."""
        if self.greeting and self.changed():
            raise PolicyError(
                f"the checkpoint at {self.folder} was changed while it was not in memory: connect again"
            )

    def check_same(self, policy: Policy) -> None:
        """Raises `PolicyError` when a policy that was loaded again is not what sessions were told."""
        if (
            self.greeting
            and pack(metadata_of(policy.spec, dict(policy.metadata), self.policy_id)) != self.greeting
        ):
            raise PolicyError(f"{self.name} was loaded again and describes itself otherwise: connect again")

    def adopt(self, policy: Policy) -> None:
        """It is in memory, and warm."""
        self.policy = policy
        self.used = time.monotonic()
        self.failure = None
        if not self.greeting:
            self.metadata = metadata_of(policy.spec, dict(policy.metadata), self.policy_id)
            self.greeting = pack(self.metadata)

    def status(self) -> dict[str, Any]:
        """Plain values for operators."""
        return {
            "name": self.name,
            "type": self.metadata["policy"]["type"] if self.metadata else None,
            "folder": str(self.folder),
            "policy_id": self.policy_id,
            "in_memory": self.policy is not None,
            "loading": self.loading is not None,
            "size_bytes": self.size,
            "sessions": self.sessions,
            "requests": self.requests,
            "error": self.failure,
        }
