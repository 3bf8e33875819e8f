"""What belongs to one client, and to nobody else."""

import itertools
import time
from dataclasses import dataclass, field

from env_client.wire import Dialect

__all__ = ["Session"]

_numbers = itertools.count(1)


@dataclass(eq=False)
class Session:
    """One connection's memory. Lives as long as the connection; `reset` begins a new episode."""

    # Address of the client, for the log.
    peer: str
    number: int = field(default_factory=lambda: next(_numbers))
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

    def reset(self) -> None:
        """Forget what belongs to an episode. The counters go on."""
        self.prompt = None
        self.prev_total_ms = None
