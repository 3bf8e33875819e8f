"""How much one client, and all of them together, may ask of the server."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from env_client.wire import DEFAULT_LIMITS, ErrorCode, Limits, WireError

__all__ = ["LimitsConfig", "RateLimit"]


@dataclass(frozen=True)
class LimitsConfig:
    """Caps that keep one client from taking everything."""

    # Largest message of a client, in MB; larger ones are refused.
    max_message_mb: float = DEFAULT_LIMITS.max_bytes / 2**20
    # Connections at a time, whatever they are; more are cut.
    max_connections: int = 2000
    # Clients at a time, WebSocket and gRPC each; more are answered HTTP 503.
    max_sessions: int = 1000
    # Requests of one client in a second; more are answered OVERLOADED; 0: no limit.
    max_rate: float = 2000.0
    # Images that wait to be decoded; more are answered OVERLOADED.
    max_images: int = 256
    # Threads that decode and resize images.
    decode_threads: int = 2
    # A client that takes longer to send one message is cut, in seconds.
    message_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_sessions", "max_images", "decode_threads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--limits.{name.replace('_', '-')} is {getattr(self, name)}; at least 1 was expected"
                )
        if not 0 < self.max_message_mb <= 1024:
            raise ValueError("--limits.max-message-mb is a size of up to 1024 MB")
        if self.max_rate < 0 or self.message_s <= 0:
            raise ValueError("--limits.max-rate is 0 or above, --limits.message-s above 0")

    @property
    def wire(self) -> Limits:
        return replace(DEFAULT_LIMITS, max_bytes=int(self.max_message_mb * 2**20))


class RateLimit:
    """A client's allowance: `rate` requests a second, a second's worth of them at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic):
        self._rate = rate
        self._clock = clock
        self._left = rate
        self._when = clock()

    def take(self) -> None:
        """Use one. Raises `WireError` OVERLOADED when there is none, with the time until there is."""
        if not self._rate:
            return
        now = self._clock()
        self._left = min(max(self._rate, 1.0), self._left + (now - self._when) * self._rate)
        self._when = now
        if self._left < 1:
            wait_ms = int((1 - self._left) / self._rate * 1e3) + 1
            raise WireError(
                ErrorCode.OVERLOADED,
                f"more than {self._rate:g} requests in a second came from this client: ask less often",
                retry_after_ms=wait_ms,
            )
        self._left -= 1
