"""What a client makes of the unit, and of the cameras, that a server names."""

from typing import Any

import numpy as np
import pytest
from env_client.control.network import encode_observation
from env_client.envs.env import EnvError, Observation
from env_client.fit import likely_names
from env_client.policy_server import settled_unit
from env_client.wire import CameraSpec, PolicySpec


def spec(**fields: Any) -> PolicySpec:
    return PolicySpec("test", 6, 10, **fields)


def test_the_unit_that_is_driven() -> None:
    """An assumption is confirmed by the flag; what the server knows is not overruled; an old server is believed."""
    said: list[str] = []
    assumed = spec(unit_source="assumed")
    with pytest.raises(
        EnvError, match=r"--policy-unit degrees .* or --policy-unit normalized.*Nothing was moved"
    ):
        settled_unit(assumed, None, real=True, say=said.append)
    assert settled_unit(assumed, "degrees", real=True, say=said.append).unit == "degrees"
    assert not said
    assert settled_unit(assumed, None, real=False, say=said.append) == assumed
    assert "is assumed" in said[0]
    for source in ("declared", "inferred", None):
        known = spec(unit="degrees", unit_source=source)
        assert settled_unit(known, None, real=True, say=said.append) == known
        with pytest.raises(EnvError, match="works in degrees"):
            settled_unit(known, "normalized", real=True, say=said.append)


def test_an_optional_camera_on_the_wire() -> None:
    """It travels in the spec, and the observation goes without it."""
    cameras = (CameraSpec("front", 4, 4), CameraSpec("wrist", 4, 4, optional=True))
    policy = PolicySpec.from_wire(spec(cameras=cameras, unit_source="inferred").to_wire())
    assert policy.cameras == cameras
    assert policy.unit_source == "inferred"
    seen = Observation({"front": np.zeros((4, 4, 3), np.uint8)}, {"arm": np.zeros(6, np.float32)})
    assert list(encode_observation(seen, policy)["images"]) == ["front"]


def test_likely_cameras() -> None:
    """The wrist's view is the wrist's, whatever the order."""
    pairs = likely_names(["base_0_rgb", "left_wrist_0_rgb"], ["wrist", "front"])
    assert dict(pairs) == {"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"}
