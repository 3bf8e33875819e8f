"""openpi's arithmetic, against numbers worked out from the published formulas by hand or by another way."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from env_client.wire import InvalidInput, resize_image
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_cube.policies.conversions import CURVES, Conversions, read_conversion
from grasp_cube.policies.embodiment import delta_mask, load_embodiment
from grasp_cube.policies.openpi_norm import find_norm_stats, read_norm_stats
from grasp_cube.policies.policy import PolicyError

PADDED = 32


def stats_file(folder: Path, *, padded: bool = False, **changes) -> Path:
    """norm_stats.json of two state and two action values, as openpi writes it, padded with what breaks a division."""
    pad = [0.0] * (PADDED - 2) if padded else []
    group = {"mean": [1.0, -2.0], "std": [2.0, 0.5], "q01": [-1.0, 0.0], "q99": [3.0, 10.0]}
    groups = {name: {key: value + pad for key, value in group.items()} for name in ("state", "actions")}
    for name, value in changes.items():
        groups[name].update(value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": groups}))
    return folder / "norm_stats.json"


def processors(mode: str, stats: dict):
    """LeRobot's own steps with these statistics."""
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

    features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        "action": PolicyFeature(FeatureType.ACTION, (2,)),
    }
    modes = dict.fromkeys((FeatureType.STATE, FeatureType.ACTION), NormalizationMode(mode))
    return (
        NormalizerProcessorStep(features=features, norm_map=modes, stats=stats, eps=0.0),
        UnnormalizerProcessorStep(features=features, norm_map=modes, stats=stats, eps=0.0),
    )


def through(step, key, values):
    import torch
    from lerobot.processor.converters import create_transition

    tensor = torch.tensor(values, dtype=torch.float32)
    if key == "action":
        return step(create_transition(action=tensor))["action"].numpy()
    return step(create_transition(observation={key: tensor}))["observation"][key].numpy()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("mode", "state", "normal", "action", "robot"),
    [
        # (5 - 1) / 2 = 2, (-2.25 + 2) / 0.5 = -0.5; 1.5 * 2 + 1 = 4, -3 * 0.5 - 2 = -3.5
        ("MEAN_STD", [5.0, -2.25], [2.0, -0.5], [1.5, -3.0], [4.0, -3.5]),
        # (5 + 1) / 4 * 2 - 1 = 2: outside the quantiles, and not clipped; (2.5 / 10) * 2 - 1 = -0.5
        # (1.5 + 1) / 2 * 4 - 1 = 4; (-3 + 1) / 2 * 10 + 0 = -10
        ("QUANTILES", [5.0, 2.5], [2.0, -0.5], [1.5, -3.0], [4.0, -10.0]),
    ],
)
def test_normalisation_and_its_inverse(tmp_path, padded, mode, state, normal, action, robot):
    """Both ways of normalising, with statistics of the robot's size and padded to the model's."""
    stats = read_norm_stats(stats_file(tmp_path, padded=padded)).for_lerobot(mode, 2, 2)
    normalize, unnormalize = processors(mode, stats)
    np.testing.assert_allclose(through(normalize, "observation.state", state), normal, atol=1e-5)
    np.testing.assert_allclose(through(unnormalize, "action", action), robot, atol=2e-5)


def test_a_value_that_never_moves_divides_by_a_millionth(tmp_path):
    """std 0: (1.000001 - 1) / 1e-6 = 1; q01 = q99 = 0: 0.5e-6 / 1e-6 * 2 - 1 = 0, where LeRobot alone would give 99."""
    still = {"state": {"mean": [0.0, 0.0], "std": [0.0, 0.0], "q01": [0.0, 40.0], "q99": [0.0, 40.0]}}
    stats = read_norm_stats(stats_file(tmp_path, **still))
    normalize, _ = processors("MEAN_STD", stats.for_lerobot("MEAN_STD", 2, 2))
    np.testing.assert_allclose(through(normalize, "observation.state", [1e-6, 0.0]), [1.0, 0.0], rtol=1e-5)
    normalize, _ = processors("QUANTILES", stats.for_lerobot("QUANTILES", 2, 2))
    # Far from zero single precision cannot hold a millionth; the value at rest is -1 all the same.
    np.testing.assert_allclose(
        through(normalize, "observation.state", [0.5e-6, 40.0]), [0.0, -1.0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "mode", "words"),
    [
        ({"state": {"q01": None}}, "QUANTILES", ["no q01 of state", "compute_norm_stats"]),
        ({"actions": {"mean": [1.0]}}, "MEAN_STD", ["mean of actions", "1 values", "has 2"]),
        ({"state": {"std": [1.0, math.nan]}}, "MEAN_STD", ["std of state", "1 of them finite"]),
        ({"state": {"std": [1.0, -1.0]}}, "MEAN_STD", ["std of state", "negative"]),
        ({"actions": {"q99": [-9.0, 1.0]}}, "QUANTILES", ["q99 of actions", "below q01"]),
        ({"actions": {"mean": "high"}}, "MEAN_STD", ["mean of actions", "a list of numbers"]),
    ],
)
def test_statistics_that_cannot_be_used(tmp_path, changes, mode, words):
    file = stats_file(tmp_path, **changes)
    with pytest.raises(PolicyError) as error:
        read_norm_stats(file).for_lerobot(mode, 2, 2)
    for word in [*words, str(file)]:
        assert word in str(error.value)


def test_the_asset_id_is_found_or_asked_for(tmp_path):
    """The only one is taken, in the folder or beside it; several, and a wrong one, list what is there."""
    folder = tmp_path / "step"
    folder.mkdir()
    with pytest.raises(PolicyError, match="no assets"):
        find_norm_stats(folder, None)
    stats_file(tmp_path / "assets" / "trossen")
    assert find_norm_stats(folder, None)[0] == "trossen"
    stats_file(folder / "assets" / "lab" / "cubes")
    assert find_norm_stats(folder, "lab/cubes")[1].file == folder / "assets/lab/cubes/norm_stats.json"
    with pytest.raises(
        PolicyError, match=r"several asset ids .* --policy\.asset_id one of lab/cubes, trossen"
    ):
        find_norm_stats(folder, None)
    with pytest.raises(PolicyError, match=r"'droid' is not in .* one of lab/cubes, trossen"):
        find_norm_stats(folder, "droid")


def test_resize_with_padding_by_hand():
    """Four columns into two: a triangle over three pixels with the weights 3/7, 3/7, 1/7; the lower row is padding."""
    image = np.repeat(np.array([0, 70, 140, 210], np.uint8)[None, :, None], 2, axis=0).repeat(3, axis=2)
    resized = resize_image(image, 2, 2, "openpi")
    np.testing.assert_array_equal(resized[:, :, 1], [[50, 160], [0, 0]])


def triangle(image: np.ndarray, axis: int, size: int) -> np.ndarray:
    """One axis through a triangle filter as wide as the shrinking, in double precision: what Pillow documents."""
    length = image.shape[axis]
    scale = length / size
    support = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - centres[:, None]) / support)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)


@pytest.mark.parametrize(
    ("height", "width", "inside"),
    [
        (480, 640, (slice(28, 196), slice(0, 224))),
        (640, 360, (slice(0, 224), slice(49, 175))),
        # 224 * 719 / 1280 = 125.8, rounded down.
        (719, 1280, (slice(49, 174), slice(0, 224))),
        (100, 120, (slice(19, 205), slice(0, 224))),
    ],
)
def test_resize_with_padding_of_whole_images(height, width, inside):
    """Within one of 255 levels of the filter in double precision (Pillow rounds after each axis); black around it."""
    random = np.random.default_rng(5)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = resize_image(image, 224, 224, "openpi")
    content = resized[inside]
    expected = triangle(triangle(image.astype(np.float64), 1, content.shape[1]), 0, content.shape[0])
    assert np.abs(content - expected).max() <= 1.01
    around = resized.copy()
    around[inside] = 0
    assert not around.any()


def test_without_pillow_the_rule_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(InvalidInput, match="pip install pillow"):
        resize_image(np.zeros((4, 4, 3), np.uint8), 2, 2, "openpi")


@pytest.mark.parametrize(
    ("runs", "dim", "mask"),
    [
        ((6, -1, 6, -1), 14, [1] * 6 + [0] + [1] * 6 + [0]),
        ((7, -1), 8, [1] * 7 + [0]),
        ((6, -1), 7, [1] * 6 + [0]),
        ((), 3, [0, 0, 0]),
        ((2,), 4, [1, 1, 0, 0]),
        ((9,), 4, [1, 1, 1, 1]),
    ],
)
def test_masks_of_relative_actions(runs, dim, mask):
    assert delta_mask(runs, dim) == tuple(map(bool, mask))


def test_alohas_grippers_and_joints():
    """Joints 1, 2, 8 and 9 turn the other way; the gripper is an angle between 0.5476 and 1.6296 rad."""
    convert = load_embodiment("aloha").convert
    state = np.arange(1, 15, dtype=np.float32) / 10
    state[[6, 13]] = [0.0, 1.0]
    seen = convert.state(state)
    assert seen.dtype == np.float32
    flipped = [0.1, -0.2, -0.3, 0.4, 0.5, 0.6, None, 0.8, -0.9, -1.0, 1.1, 1.2, 1.3, None]
    for index, value in enumerate(flipped):
        if value is not None:
            assert seen[index] == pytest.approx(value)
    # The law of cosines by hand. Closed: (0.022² + 0.01844² - 0.036²) / (2·0.022·0.01844) = -0.581698;
    # open: (0.022² + 0.058² - 0.036²) / (2·0.022·0.058) = 1.0 exactly, as 22 + 36 = 58 mm is the stretched arm.
    assert seen[6] == pytest.approx((math.asin(-0.5816979) - 0.5476) / 1.0820, abs=1e-6)
    assert seen[13] == pytest.approx((math.pi / 2 - 0.5476) / 1.0820, abs=1e-3)
    actions = np.zeros((2, 14), np.float32)
    actions[:, 1], actions[:, 6] = 0.25, [0.0, 1.0]
    out = convert.actions(actions)
    np.testing.assert_allclose(out[:, 1], [-0.25, -0.25])
    # (0 + 0.5476 + 0.6213) / 2.1123 and (1 + 0.5476 + 0.6213) / 2.1123
    np.testing.assert_allclose(out[:, 6], [0.553378, 1.026796], atol=1e-6)
    np.testing.assert_allclose(convert.actions_back(out), actions, atol=1e-6)
    assert actions[0, 6] == 0.0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4),
    st.floats(0.01, 50) | st.floats(-50, -0.01),
    st.floats(-10, 10),
)
def test_conversions_go_there_and_back(values, scale, offset):
    """What was sent to the robot, read back, is what the checkpoint said."""
    entries = [
        {"values": [0, 2], "scale": scale, "offset": offset},
        {"values": [3], "curve": "aloha_gripper"},
    ]
    convert = Conversions([read_conversion(entry, Path("a.yaml")) for entry in entries])
    actions = np.array([values])
    np.testing.assert_allclose(convert.actions_back(convert.actions(actions)), actions, atol=1e-6)
    np.testing.assert_allclose(convert.state(actions[0])[[0, 2]], scale * actions[0, [0, 2]] + offset)


def test_a_conversion_may_hold_for_states_or_actions_only():
    convert = Conversions([read_conversion({"values": [0], "scale": 2, "of": "state"}, Path("a.yaml"))])
    one = np.ones(1, np.float32)
    assert convert.state(one) == 2.0
    assert convert.actions(one) == 1.0
    assert set(CURVES) == {"aloha_gripper"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"values": [0], "sacle": 2}, "was expected"),
        ({"values": []}, "was expected"),
        ({"values": [-1], "scale": 2}, "was expected"),
        ({"values": [0], "scale": 0}, "was expected"),
        ({"values": [0], "scale": True}, "was expected"),
        ({"values": [0], "curve": "bezier"}, "'bezier' .* one of aloha_gripper"),
        ({"values": [0], "curve": "aloha_gripper", "scale": 2}, "was expected"),
        ({"values": [0], "of": "wheels"}, "was expected"),
        ([0], "was expected"),
    ],
)
def test_conversions_that_a_file_spells_wrongly(entry, words):
    with pytest.raises(PolicyError, match=words):
        read_conversion(entry, Path("a.yaml"))


def test_a_conversion_beyond_the_values_is_refused():
    convert = Conversions([read_conversion({"values": [7], "scale": 2, "of": "action"}, Path("a.yaml"))])
    convert.check(2, 8, "here")
    with pytest.raises(PolicyError, match="value 7 of the action, which has 7"):
        convert.check(14, 7, "here")
