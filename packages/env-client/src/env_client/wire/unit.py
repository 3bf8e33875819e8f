"""What statistics of joint values say about their unit. Values without a unit cannot be told apart by looking at one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

__all__ = ["UnitSource", "beyond_normalized"]

# A file or a flag says the unit; or statistics exclude the other one; or nothing says it.
UnitSource = Literal["declared", "inferred", "assumed"]

# LeRobot cuts a measured value at 100; an action that a policy gave while it was recorded may lie a little beyond.
LIMITS = {"observation.state": 100.01, "action": 110.0}


def beyond_normalized(
    names: Sequence[str], stats: Mapping[str, Mapping[str, Any]]
) -> tuple[str, float] | None:
    """(joint, how far it reaches) where statistics exclude -100..100; None where they do not.

    `names`: one for each value; `stats`: {feature: {min, max, q01, …, mean, std: (n,)}}. A gripper is 0..100 in both
    units. The mean square of values within ±100 is at most 100², so mean and std alone can exclude it as well.
    """
    farthest: tuple[str, float] | None = None
    for feature, limit in LIMITS.items():
        found = {
            key: np.asarray(value, np.float64).reshape(-1) for key, value in stats.get(feature, {}).items()
        }
        reach = [
            np.abs(value) for key, value in found.items() if key in ("min", "max", "mean") or key[:1] == "q"
        ]
        if "mean" in found and "std" in found and found["mean"].shape == found["std"].shape:
            reach.append(np.hypot(found["mean"], found["std"]))
        for values in reach:
            if values.shape != (len(names),):
                continue
            for name, value in zip(names, values, strict=True):
                if "gripper" not in name and limit < value < np.inf and (not farthest or value > farthest[1]):
                    farthest = (name, float(value))
    return farthest
