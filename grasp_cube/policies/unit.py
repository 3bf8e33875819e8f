"""The one place that decides in which unit a checkpoint works: what is declared, else what its statistics exclude."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from env_client.wire.unit import UnitSource, beyond_normalized

from grasp_cube.policies.conversions import NO_CONVERSIONS
from grasp_cube.policies.embodiment import Embodiment
from grasp_cube.policies.policy import PolicyError

__all__ = ["choose_unit"]


def choose_unit(
    embodiment: Embodiment, stats: Mapping[str, Mapping[str, Any]], names: Sequence[str], folder: Path
) -> tuple[str, UnitSource, str]:
    """(unit, how it is known, that in words).

    `stats` as in `beyond_normalized`, in the checkpoint's own convention. Raises `PolicyError` where a declaration says
    what the statistics exclude.
    """
    # Converted values are not the robot's own.
    beyond = None if embodiment.convert != NO_CONVERSIONS else beyond_normalized(names, stats)
    reach = "" if beyond is None else f"the statistics of {beyond[0]} reach {beyond[1]:.0f}"
    if embodiment.unit == "normalized" and beyond is not None:
        raise PolicyError(
            f"{folder} is declared as normalized (-100..100), but {reach}: it was trained in degrees, so give "
            "--policy.unit degrees, or mend `unit` in the embodiment"
        )
    if embodiment.unit not in (None, "unknown"):
        return str(embodiment.unit), "declared", "declared"
    if embodiment.unit is None and beyond is not None:
        return "degrees", "inferred", reach
    unit = embodiment.unit or "normalized"
    return unit, "assumed", "assumed; nothing in the checkpoint says so; give --policy.unit"
