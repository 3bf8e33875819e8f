"""openpi's norm_stats.json: found, checked, and in the form in which LeRobot's processors take statistics.

openpi normalises by (x - mean) / (std + 1e-6) for Pi0 and by (x - q01) / (q99 - q01 + 1e-6) * 2 - 1, unclipped, for
Pi0.5. Its statistics may be padded to the model's 32 values; only those that the robot has are ever used, so what
stands in the padding cannot blow up.
Error policy: `PolicyError` that names the file, the asset ids that are there, and the flag that chooses.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from env_client.wire import shown

from grasp_cube.policies.config_files import read_json
from grasp_cube.policies.policy import PolicyError

__all__ = ["NormStats", "find_norm_stats", "read_norm_stats"]

FILE = "norm_stats.json"
# What openpi adds to a deviation or a range before it divides.
EPSILON = 1e-6
# The two ways of normalising: LeRobot's name -> the statistics that it reads.
MODES = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99")}


@dataclass(frozen=True)
class NormStats:
    """The statistics of one recorded dataset."""

    file: Path
    # {"state" | "actions": {"mean" | "std" | "q01" | "q99": (n,) float64}}
    values: dict[str, dict[str, np.ndarray]]

    def for_lerobot(self, mode: str, state_size: int, action_dim: int) -> dict[str, dict[str, np.ndarray]]:
        """{feature: statistics} with which LeRobot's own formula, without an epsilon, gives openpi's numbers.

        `mode` is MEAN_STD or QUANTILES. Raises `PolicyError` when statistics are missing, too short or not finite.
        """
        stats = {}
        for feature, name, size in (
            ("observation.state", "state", state_size),
            ("action", "actions", action_dim),
        ):
            low, high = (self._get(name, key, size, mode) for key in MODES[mode])
            if mode == "MEAN_STD":
                if (high < 0).any():
                    raise PolicyError(
                        f"std of {name} in {self.file} is negative: compute the statistics again"
                    )
                stats[feature] = {"mean": low, "std": high + EPSILON}
                continue
            if (high < low).any():
                raise PolicyError(
                    f"q99 of {name} in {self.file} lies below q01: compute the statistics again"
                )
            # In single precision the range of a value that never moves, far from zero, would be nothing.
            above = np.nextafter(low.astype(np.float32), np.float32(np.inf)).astype(np.float64)
            stats[feature] = {"q01": low, "q99": np.maximum(high + EPSILON, above)}
        return stats

    def _get(self, name: str, key: str, size: int, mode: str) -> np.ndarray:
        values = self.values.get(name, {}).get(key)
        if values is None:
            raise PolicyError(
                f"{self.file} has no {key} of {name}, which this checkpoint is normalised with ({mode}): compute the "
                "statistics again with openpi's scripts/compute_norm_stats.py"
            )
        if len(values) < size or not np.isfinite(values[:size]).all():
            raise PolicyError(
                f"{key} of {name} in {self.file} has {len(values)} values, {int(np.isfinite(values).sum())} of them "
                f"finite; the embodiment has {size}: choose the embodiment or the asset id that belongs to the checkpoint"
            )
        return values[:size]


def find_norm_stats(folder: Path, asset_id: str | None) -> tuple[str, NormStats]:
    """(asset id, statistics) of a checkpoint: in its own assets folder, else in the one beside it.

    `asset_id` None takes the only one there is. Raises `PolicyError` that lists what is there.
    """
    places = [folder / "assets", folder.parent / "assets"]
    found: dict[str, Path] = {}
    for place in reversed(places):
        found |= {str(file.parent.relative_to(place)): file for file in place.rglob(FILE)}
    here = ", ".join(sorted(found)) or "none"
    if asset_id is None and len(found) == 1:
        asset_id = next(iter(found))
    if asset_id is None or asset_id not in found:
        if not found:
            raise PolicyError(
                f"{folder} has no assets/<asset id>/{FILE}, nor has the folder beside it: without normalisation stats its "
                "actions would be meaningless, so copy the assets folder of the training run into it"
            )
        asked = f"the asset id {asset_id!r} is not in" if asset_id else "there are several asset ids in"
        raise PolicyError(f"{asked} {places[0]}: choose with --policy.asset_id one of {here}")
    return asset_id, read_norm_stats(found[asset_id])


def read_norm_stats(file: Path) -> NormStats:
    """The statistics in one norm_stats.json. Raises `PolicyError`."""
    content = read_json(file)
    groups = content.get("norm_stats") if isinstance(content, dict) else None
    if not isinstance(groups, dict):
        raise PolicyError(
            f"{file} has no map named norm_stats; the statistics that openpi saves were expected"
        )
    values: dict[str, dict[str, np.ndarray]] = {}
    for name in ("state", "actions"):
        group = groups.get(name)
        if not isinstance(group, dict):
            raise PolicyError(f"{file} has no statistics of {name}: copy the checkpoint again")
        values[name] = {key: _vector(group[key], name, key, file) for key in group if group[key] is not None}
    return NormStats(file, values)


def _vector(value: Any, name: str, key: str, file: Path) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.zeros(())
    if array.ndim != 1:
        raise PolicyError(f"{key} of {name} in {file} is {shown(value)}; a list of numbers was expected")
    return array
