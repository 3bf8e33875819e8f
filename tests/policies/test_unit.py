"""In which unit a checkpoint works: declared, shown by its statistics, or assumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grasp_cube.policies.embodiment import load_embodiment
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.unit import choose_unit

ARM = load_embodiment("so101")
FOLDER = Path("run")


def stats(feature: str = "observation.state", **values: float) -> dict[str, Any]:
    """Statistics in which every joint is at 50 and shoulder_lift at these values."""
    return {feature: {key: np.array([0, value, 0, 0, 0, 100.0], np.float32) for key, value in values.items()}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (stats(min=-163, max=90), ("degrees", "inferred")),
        (stats("action", q99=130), ("degrees", "inferred")),
        # No extreme is there: the mean square alone cannot be that of values within 100.
        (stats(mean=60, std=90), ("degrees", "inferred")),
        (stats(mean=60, std=79), ("normalized", "assumed")),
        (stats(min=-100, max=100), ("normalized", "assumed")),
        # What a policy gave while it was recorded may lie a little beyond.
        (stats("action", max=104), ("normalized", "assumed")),
        ({}, ("normalized", "assumed")),
    ],
)
def test_statistics(found: dict[str, Any], expected: tuple[str, str]) -> None:
    assert choose_unit(ARM, found, ARM.action_names, FOLDER)[:2] == expected


def test_declarations() -> None:
    """One that the statistics exclude is refused."""
    from dataclasses import replace

    declared = replace(ARM, unit="normalized")
    assert choose_unit(declared, {}, ARM.action_names, FOLDER)[:2] == ("normalized", "declared")
    in_degrees = replace(ARM, unit="degrees")
    assert choose_unit(in_degrees, stats(max=50), ARM.action_names, FOLDER)[:2] == ("degrees", "declared")
    with pytest.raises(
        PolicyError, match=r"statistics of shoulder_lift.pos reach 163: .* --policy.unit degrees"
    ):
        choose_unit(declared, stats(max=163), ARM.action_names, FOLDER)
