"""What the server knows of a policy, and what a new policy family must provide.

Life cycle: `load_policy` returns a ready policy; `warm_up` is called once; then `check` from any thread for
each request, and `get_actions_batch` from one and the same thread, the one that owns the device.
Error policy: `InvalidInput` for what a client can mend, `PolicyError` for what the operator must.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from env_client.wire import PolicySpec, RtcPrefix

__all__ = ["Policy", "PolicyError", "PolicyRequest", "PolicySpec"]


class PolicyError(RuntimeError):
    """A checkpoint or an option that cannot be served. One sentence: what came, what was expected, what to do."""


@dataclass(frozen=True)
class PolicyRequest:
    """One request as a policy sees it: everything that its answer depends on."""

    # The observation of the current tick as it came, images decoded: {"images": {name: (H, W, 3) uint8 RGB},
    # "states": {part: (n,) float}, "task": str}, or the keys that the embodiment maps.
    obs: dict[str, Any]
    # Observations of the ticks before it, oldest first; fewer than n_obs_steps - 1 are padded by repetition.
    history: tuple[dict[str, Any], ...] = ()
    # Already resolved: the request's, else the session's. None leaves it to the policy's default.
    prompt: str | None = None
    rtc: RtcPrefix | None = None


@runtime_checkable
class Policy(Protocol):
    """A loaded policy. Stateless between calls: sessions live in the server."""

    @property
    def spec(self) -> PolicySpec: ...

    @property
    def metadata(self) -> dict[str, Any]:
        """Plain values that the metadata frame carries beside the spec (what the checkpoint brought along)."""
        ...

    def warm_up(self) -> None:
        """Run until the first real request is as fast as the later ones."""
        ...

    def check(self, request: PolicyRequest) -> Hashable:
        """Validate without the device and return the batch group: requests of equal groups may share a batch.

        Raises `InvalidInput` that names the part of the observation, what came and what was expected.
        """
        ...

    def get_actions(self, obs: dict[str, Any], **request: Any) -> np.ndarray:
        """The chunk for one observation: (horizon, action_dim) float32 in the spec's unit, finite.

        `request` are the further fields of `PolicyRequest`.
        """
        ...

    def get_actions_batch(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray]:
        """One chunk for each request, in order, as `get_actions` would give it alone."""
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...
