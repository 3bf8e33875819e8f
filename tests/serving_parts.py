"""An SO-101 observation and the cameras that the NumPy policy is given in tests."""

import numpy as np

# Small frames keep the tests quick; the size itself is no special case anywhere.
CAMERAS = tuple({"name": name, "height": 24, "width": 32, "resize": "none"} for name in ("front", "wrist"))


def make_observation(seed: int = 0, task: str = "lift up the red cube") -> dict:
    """An SO-101 observation with random content."""
    rng = np.random.default_rng(seed)
    return {
        "images": {name: rng.integers(0, 256, (24, 32, 3), np.uint8) for name in ("front", "wrist")},
        "states": {"arm": rng.uniform(-50, 50, 6).astype(np.float32)},
        "task": task,
    }
