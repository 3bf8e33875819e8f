"""Every layout and every unit, there and back, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from env_client.envs.astribot_layout import ChassisFrame, Hardware, Layout, layout_names, read_hardware
from env_client.envs.env import EnvError
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT

HARDWARE = read_hardware(ROOT / "configs" / "robots" / "astribot_s1.yaml")
SIZES = (16, 22, 25)
# A busy machine is slow, not wrong.
often = settings(deadline=None, max_examples=60)


def rad(low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=32)


@st.composite
def robot_vectors(draw: st.DrawFn) -> np.ndarray:
    """A pose of the whole robot: grippers within the SDK's range."""
    return np.array([draw(rad(0, 100) if gripper else rad()) for gripper in HARDWARE.is_gripper])


layouts = st.one_of(
    st.sampled_from(SIZES).map(lambda size: layout_names(f"astribot_s1_{size}")),
    # Whatever order and choice of joints a policy may have.
    st.permutations(HARDWARE.joint_names).flatmap(
        lambda names: st.integers(1, len(names)).map(lambda n: tuple(names[:n]))
    ),
)
units = st.sampled_from(sorted(HARDWARE.units))


@often
@given(robot_vectors(), robot_vectors(), layouts, units)
def test_a_pose_survives_the_way_through_any_layout(
    vector: np.ndarray, base: np.ndarray, names: tuple[str, ...], unit: str
) -> None:
    """What the layout names comes back; what it does not name is the base's."""
    layout = Layout(HARDWARE, names, unit)
    back = layout.to_robot(layout.from_robot(vector), base)
    named = np.isin(np.arange(HARDWARE.size), layout.index)
    np.testing.assert_allclose(back[named], vector[named], atol=1e-9)
    np.testing.assert_array_equal(back[~named], base[~named])


@often
@given(layouts, units, st.data())
def test_an_action_survives_the_way_through_the_robot(
    names: tuple[str, ...], unit: str, data: st.DataObject
) -> None:
    """Values inside the gripper's range come back; the others come back cut to it."""
    layout = Layout(HARDWARE, names, unit)
    opened, closed = HARDWARE.units[unit]
    low, high = min(opened, closed), max(opened, closed)
    action = np.array([data.draw(rad(-200, 300) if gripper else rad()) for gripper in layout.is_gripper])
    robot = layout.to_robot(action, np.zeros(HARDWARE.size))
    grippers = robot[HARDWARE.is_gripper]
    assert (grippers >= 0).all()
    assert (grippers <= 100).all()
    expected = np.where(layout.is_gripper, np.clip(action, low, high), action)
    np.testing.assert_allclose(layout.from_robot(robot), expected, atol=1e-9 * (1 + abs(high)))


@often
@given(robot_vectors(), robot_vectors())
def test_waypoints_come_back(vector: np.ndarray, base: np.ndarray) -> None:
    """22 values in the SDK's waypoint order, and 25 with the chassis."""
    short = HARDWARE.to_waypoint(vector)
    assert [len(part) for part in short] == [4, 7, 1, 7, 1, 2]
    chassis = HARDWARE.part("chassis").where
    back = HARDWARE.from_waypoint(short, base)
    np.testing.assert_array_equal(back[chassis], base[chassis])
    assert np.array_equal(np.delete(back, chassis), np.delete(vector, chassis))
    np.testing.assert_array_equal(HARDWARE.from_waypoint(HARDWARE.to_waypoint(vector, True), base), vector)


@often
@given(robot_vectors(), robot_vectors())
def test_the_chassis_survives_its_frame(vector: np.ndarray, start: np.ndarray) -> None:
    """Relative to the start and back; the start itself is zero."""
    where = HARDWARE.part("chassis").where
    frame = ChassisFrame(where, start)
    np.testing.assert_allclose(frame.relative(start)[where], 0, atol=1e-12)
    back = frame.absolute(frame.relative(vector))
    np.testing.assert_allclose(back[where][:2], vector[where][:2], atol=1e-9)
    turn = back[where][2] - vector[where][2]
    assert abs(np.sin(turn / 2)) < 1e-9
    # Distances do not depend on the frame.
    moved = np.linalg.norm(vector[where][:2] - start[where][:2])
    assert np.isclose(np.linalg.norm(frame.relative(vector)[where][:2]), moved, atol=1e-9)


def test_the_chassis_turns_with_its_start() -> None:
    """A step forward is a step in the direction in which the robot stood."""
    start = np.zeros(25)
    start[:3] = 2.0, -1.0, np.pi / 2
    forward = start.copy()
    forward[:3] = 1.0, 0.0, 0.0
    np.testing.assert_allclose(ChassisFrame(slice(0, 3), start).absolute(forward)[:3], [2.0, 0.0, np.pi / 2])


@pytest.mark.parametrize("size", SIZES)
def test_the_state_has_the_same_order_as_the_action(size: int) -> None:
    """The embodiment's state parts, concatenated, are its action names."""
    content = yaml.safe_load((ROOT / "configs" / "embodiments" / f"astribot_s1_{size}.yaml").read_text())
    layout = Layout(HARDWARE, content["action_names"])
    assert len(layout) == size
    parts = layout.state_parts()
    chosen = np.concatenate([parts[state["name"]] for state in content["states"]])
    np.testing.assert_array_equal(chosen, layout.index)
    assert sum(len(index) for index in parts.values()) == HARDWARE.size


def test_a_head_in_another_order_is_read_and_written_in_it() -> None:
    """Tilt before pan: a matter of the list, for the state too."""
    layout = Layout(HARDWARE, ("head.tilt", "head.pan"))
    robot = layout.to_robot([0.7, 0.1], np.zeros(25))
    np.testing.assert_array_equal(robot[HARDWARE.part("head").where], [0.1, 0.7])
    np.testing.assert_array_equal(layout.convert(robot, layout.state_parts()["head"]), [0.7, 0.1])


@pytest.mark.parametrize(
    ("unit", "half_closed"), [("rad", 50), ("rad_gripper_0_1", 0.5), ("rad_gripper_1_0", 0.5)]
)
@pytest.mark.parametrize(("end", "sdk"), [("open", 0.0), ("closed", 100.0)])
def test_gripper_directions(unit: str, half_closed: float, end: str, sdk: float) -> None:
    """Open is 0 in the SDK, whatever the policy calls it."""
    layout = Layout(HARDWARE, ("gripper_left.pos",), unit)
    opened, closed = HARDWARE.units[unit]
    where = HARDWARE.part("gripper_left").where
    value = opened if end == "open" else closed
    assert layout.to_robot([value], np.zeros(25))[where] == sdk
    assert layout.to_robot([half_closed], np.zeros(25))[where] == 50.0


def test_so101_grippers_point_the_other_way() -> None:
    """0 closed, 100 open becomes 100 closed, 0 open."""
    layout = Layout(HARDWARE, ("gripper_right.pos",), "rad_gripper_100_0")
    where = HARDWARE.part("gripper_right").where
    assert layout.to_robot([0.0], np.zeros(25))[where] == 100.0
    assert layout.to_robot([80.0], np.zeros(25))[where] == pytest.approx(20.0)


@pytest.mark.parametrize("size", SIZES)
def test_a_wrong_length_is_named_with_both_numbers(size: int) -> None:
    layout = Layout(HARDWARE, layout_names(f"astribot_s1_{size}"))
    with pytest.raises(EnvError, match=rf"has {size} values; {size + 1} values came"):
        layout.to_robot(np.zeros(size + 1), np.zeros(25))
    with pytest.raises(EnvError, match="has 25 values; 22 values came"):
        layout.from_robot(np.zeros(22))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["waypoint"].remove("head"), "waypoint names"),
        (lambda c: c["ready_pose"].update(head=[0.0]), "a pose has 1 values for head; 2 were expected"),
        (lambda c: c["units"]["rad"].update(open=100), "the same value"),
        (lambda c: c["chassis"].update(reach=[1, 1, 0]), "three numbers above 0"),
        (lambda c: c.pop("cameras"), "cameras"),
    ],
)
def test_a_broken_robot_file_is_one_sentence(change: object, sentence: str, tmp_path) -> None:
    content = yaml.safe_load((ROOT / "configs" / "robots" / "astribot_s1.yaml").read_text())
    change(content)  # type: ignore[operator]
    file = tmp_path / "robot.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(EnvError, match=sentence):
        read_hardware(file)


@pytest.mark.parametrize(
    ("names", "unit", "sentence"),
    [
        (("arm_left.1", "elbow"), "rad", "names elbow, which this robot lacks"),
        (("arm_left.1", "arm_left.1"), "rad", "twice"),
        (("arm_left.1",), "degrees", "the robot file knows rad, rad_gripper_0_1"),
    ],
)
def test_a_wrong_layout_is_one_sentence(names: tuple[str, ...], unit: str, sentence: str) -> None:
    with pytest.raises(EnvError, match=sentence):
        Layout(HARDWARE, names, unit)


def test_hardware_is_in_the_sdks_order() -> None:
    assert isinstance(HARDWARE, Hardware)
    assert HARDWARE.size == 25
    assert [len(part.joints) for part in HARDWARE.parts] == [3, 4, 7, 1, 7, 1, 2]
