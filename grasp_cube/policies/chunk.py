"""The last look at a chunk of actions before it leaves for a robot."""

from typing import Any

import numpy as np
from env_client.wire import ErrorCode, PolicySpec, WireError

__all__ = ["check_chunk"]


def check_chunk(actions: Any, spec: PolicySpec) -> np.ndarray:
    """`actions` as (horizon, action_dim) float32, C order, in the spec's unit.

    Raises `WireError` with the code INTERNAL when the policy gave another shape, another kind of values, or one
    that is not finite: such a chunk must never reach a motor.
    """
    if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iuf":
        raise WireError(
            ErrorCode.INTERNAL, f"the policy gave {type(actions).__name__} instead of an array of actions"
        )
    if actions.shape != (spec.horizon, spec.action_dim):
        raise WireError(
            ErrorCode.INTERNAL,
            f"the policy gave actions of shape {list(actions.shape)}; ({spec.horizon}, {spec.action_dim}), "
            "horizon by action dimension, was expected",
        )
    with np.errstate(over="ignore"):
        actions = np.ascontiguousarray(actions, np.float32)
    if not np.isfinite(actions).all():
        bad = int((~np.isfinite(actions)).sum())
        raise WireError(
            ErrorCode.INTERNAL,
            f"{bad} of {actions.size} values in the policy's actions are not finite, so the chunk was withheld",
        )
    return actions
