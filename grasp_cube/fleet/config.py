"""What configs/fleet.yaml says. Light: nothing of Ray is imported here."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from grasp_cube.policies.policy import PolicyError
from grasp_cube.serving.checkpoints import fingerprint

__all__ = ["FleetConfig", "GroupConfig"]

_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class GroupConfig:
    """One policy of the fleet: what its servers are told, and how many of them there are."""

    # Folder of the checkpoint, on every machine of the fleet.
    path: str = ""
    # Replicas that are always there, and that there may be.
    min_replicas: int = 1
    max_replicas: int = 1
    # Of each replica; 0 on a CPU. A part of a GPU (0.5) lets two replicas share one.
    gpus: float = 1.0
    # CPU cores that Ray sets aside for each replica; 0: it does not count them.
    cpus: float = 0.0
    # Requests, waiting and running, of each replica that the number of replicas is chosen for.
    target_queue: float = 2.0
    # Further flags of serve_policy, such as [--policy.dtype, bfloat16].
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("each policy of the fleet needs the path of a checkpoint")
        if not 1 <= self.min_replicas <= self.max_replicas <= 1000:
            raise ValueError(
                f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; numbers from 1 on were "
                "expected, the second not below the first"
            )
        if self.gpus < 0 or self.cpus < 0 or self.target_queue <= 0:
            raise ValueError("gpus and cpus are 0 or above, target_queue above 0")

    def flags(self, name: str) -> list[str]:
        """What its servers are started with."""
        device = [] if self.gpus else ["--policy.device", "cpu"]
        return ["--policy.path", f"{name}={self.path}", *device, *self.arguments]

    def generation(self) -> str:
        """What makes its replicas other ones: the flags, the devices, and the checkpoint's files as they are now."""
        folder = Path(self.path).expanduser()
        # A folder of the other machines only is told apart by its name.
        files = fingerprint(folder) if folder.is_dir() else ""
        said = json.dumps([self.flags(""), self.gpus, self.cpus, files])
        return hashlib.sha256(said.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class FleetConfig:
    """Everything that `serve_fleet` can be told."""

    # The policies, by the name in their URL (ws://HOST:8000/NAME); the first one is also at ws://HOST:8000.
    policies: dict[str, GroupConfig] = field(default_factory=dict)
    # Address to listen on; 127.0.0.1 keeps the fleet to this machine.
    host: str = "0.0.0.0"
    # Port to listen on; 0 takes a free one and prints it.
    port: int = 8000
    # Key that clients must send; default: the key file, else the environment variable GRASP_CUBE_API_KEY, else none.
    api_key: str | None = None
    # File whose first line is the key.
    api_key_file: Path | None = None
    # PEM file with a certificate, its chain and its private key, for wss://; default: no encryption.
    tls_pem: Path | None = None
    # During an update clients may finish their episodes for so long before they are sent on, in seconds.
    drain_s: float = 600.0
    # During an update so many more replicas, in percent, may run than otherwise, at least one; 0 where there is no GPU to spare: then old ones end first.
    surge_percent: int = 1
    # How long the load must ask for more replicas, and for fewer, in seconds.
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    # Address of a running Ray cluster, or auto; default: Ray is started on this machine.
    ray_address: str | None = None
    # The haproxy command; default: the one that Ray brings, else the system's.
    haproxy: str | None = None
    # Have the running fleet take over this file: changed policies are replaced, no episode is lost.
    update: bool = False

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError(
                "the fleet serves no policy; name one in the config file: policies: {lift: {path: …}}"
            )
        for name in self.policies:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the policy's name {name!r}; letters, digits and _ were expected")
        if not 0 <= self.drain_s <= 86400:
            raise ValueError("--drain-s is a number of seconds from 0 to 86400 (a day)")
        if not 0 <= self.surge_percent <= 100:
            raise ValueError("--surge-percent is a number from 0 to 100")
        if self.upscale_delay_s < 0 or self.downscale_delay_s < 0:
            raise ValueError("--upscale-delay-s and --downscale-delay-s are 0 or above")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}; a number from 0 to 65535 was expected")

    def check_paths(self) -> None:
        """Raises `PolicyError` for a checkpoint that is not on this machine, when Ray runs on this machine only."""
        for name, group in self.policies.items():
            folder = Path(group.path).expanduser()
            if self.ray_address is None and not folder.is_dir():
                raise PolicyError(
                    f"the checkpoint of {name}, {folder.absolute()}, is no folder; the one that holds config.json was "
                    "expected"
                )
