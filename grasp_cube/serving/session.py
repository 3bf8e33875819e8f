"""What belongs to one client, and to nobody else."""

import itertools
import time
from dataclasses import dataclass, field

from env_client.wire import Dialect

from grasp_cube.serving.limits import RateLimit
from grasp_cube.serving.served import ServedPolicy

__all__ = ["Session"]

_numbers = itertools.count(1)


@dataclass(eq=False)
class Session:
    """One connection's memory. Lives as long as the connection; `reset` begins a new episode."""

    # Address of the client, for the log.
    peer: str
    rate: RateLimit
    # Whether the client sits on the server's own machine.
    local: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    # The name under which the client's policy is served, and the policy that it was told of; None: none.
    slot: str = ""
    served: ServedPolicy | None = None
    # Whether a `configure` of this client is running.
    configuring: bool = False
    # Used by requests that name no prompt.
    prompt: str | None = None
    # The dialect of the last arrays that came; replies use the same.
    dialect: Dialect = Dialect.OPENPI
    # Whether the last request that could be read was a bare one: then errors are text frames.
    bare: bool = True
    # Chunks given out since the session began; a chunk's id.
    chunks: int = 0
    requests: int = 0
    errors: int = 0
    # Time in the server of the request before, in ms.
    prev_total_ms: float | None = None
    opened: float = field(default_factory=time.monotonic)
    # The client's count of its episodes, in its last request that named one; requests that are being answered.
    episode: int | None = None
    answering: int = 0
    # Whether it is sent elsewhere as soon as nothing is being answered.
    leaving: bool = False

    def reset(self) -> None:
        """Forget what belongs to an episode. The counters go on."""
        self.prompt = None
        self.prev_total_ms = None
