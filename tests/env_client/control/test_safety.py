"""What may reach a motor: each step alone, then together, then against whatever Hypothesis can think of."""

from __future__ import annotations

import logging
from typing import Any

import draccus
import numpy as np
import pytest
from control_doubles import FPS, PER_RAD, env_spec, safety_filter
from env_client.control.safety import SafetyConfig, SafetyFilter, Verdict
from env_client.wire import StateSpec

# Largest step of a joint in one tick with the default 1.5 rad/s, in the test arm's unit.
STEP = 1.5 / FPS * PER_RAD


def run(safety: SafetyFilter, target: Any, ticks: int, **kwargs: Any) -> Verdict:
    for _ in range(ticks):
        verdict = safety.apply(np.array(target, np.float32), **kwargs)
    return verdict


# --------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "config",
    [
        {"max_velocity": 0.0},
        {"max_velocity": -1.0},
        {"max_velocity": float("nan")},
        {"gripper_max_velocity": 0.0},
        {"max_velocity_per_frame": -0.1},
        {"smooth": -1},
        {"boundary_velocity": float("inf")},
        {"binarize_gripper": True, "gripper_open_at": 50.0, "gripper_close_at": 50.0},
    ],
)
def test_a_limit_that_limits_nothing_is_an_error(config: dict[str, Any]) -> None:
    """Zero velocity, negative and non-finite values, and thresholds without a gap are refused at start."""
    with pytest.raises(ValueError, match=next(iter(config)) + r"|gripper_open_at"):
        SafetyConfig(**config)


def test_the_config_is_read_from_a_command_line() -> None:
    """draccus fills the dataclass from flags."""
    config = draccus.parse(
        SafetyConfig, args=["--max_velocity", "0.5", "--hold", "[gripper.pos]", "--smooth", "3"]
    )
    assert config == SafetyConfig(max_velocity=0.5, hold=("gripper.pos",), smooth=3)


def test_an_unknown_name_to_hold_is_an_error() -> None:
    """The sentence names the parts and the joints that exist."""
    with pytest.raises(ValueError, match=r"'head'.*parts arm.*joint_0.pos"):
        SafetyFilter(env_spec(), SafetyConfig(hold=("head",)), FPS)


def test_limits_that_do_not_fit_the_robot_are_an_error() -> None:
    """One limit per action value, lower below upper, scales above 0."""
    with pytest.raises(ValueError, match="lower"):
        SafetyFilter(env_spec(lower=np.zeros(2)), SafetyConfig(), FPS)
    with pytest.raises(ValueError, match="lower <= upper"):
        SafetyFilter(env_spec(lower=np.full(3, 200.0)), SafetyConfig(), FPS)
    with pytest.raises(ValueError, match="unit_per_rad"):
        SafetyFilter(env_spec(unit_per_rad=np.array([1.0, 0.0, 1.0])), SafetyConfig(), FPS)


def test_nothing_is_sent_before_a_pose_is_known() -> None:
    """apply before begin_episode is a defect, and a pose that is no pose is refused."""
    safety = SafetyFilter(env_spec(), SafetyConfig(), FPS)
    with pytest.raises(RuntimeError, match="begin_episode"):
        safety.apply(np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        safety.begin_episode(np.array([0.0, np.nan, 0.0]))
    with pytest.raises(ValueError, match="wrong dimension"):
        safety.begin_episode(np.zeros(4))


# ------------------------------------------------------------------------------------- each step alone


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ([0.0, np.nan, 0.0], "not finite"),
        ([0.0, np.inf, 0.0], "not finite"),
        ([0.0, 1e300, 0.0], "not finite"),
        ([0.0, 0.0], "wrong dimension"),
        ([[0.0, 0.0, 0.0]], "wrong dimension"),
        (0.0, "wrong dimension"),
        ("up", "not finite"),
        ([None, object(), 1], "not finite"),
    ],
)
def test_a_wrong_action_holds_the_last_command(action: Any, reason: str) -> None:
    """NaN, infinity, what float32 cannot hold, other shapes and things that are no numbers."""
    safety = safety_filter()
    last = run(safety, [1.0, -1.0, 51.0], 1).action
    verdict = safety.apply(action)
    assert verdict.refused == reason
    assert verdict.held
    np.testing.assert_array_equal(verdict.action, last)
    assert verdict.action.dtype == np.float32
    assert safety.counters[reason] == 1


def test_a_stale_action_holds() -> None:
    """Of another episode, or meant for a moment that is too long ago or unknown."""
    safety = safety_filter(max_late_s=2.0)
    assert safety.apply(np.ones(3), episode=1).refused == "stale"
    assert safety.apply(np.ones(3), late_s=2.1).refused == "stale"
    assert safety.apply(np.ones(3), late_s=float("nan")).refused == "stale"
    assert safety.apply(np.ones(3), episode=0, late_s=1.9).refused is None
    assert safety.counters["stale"] == 3


def test_no_action_holds_and_counts_as_starved() -> None:
    """None is not a refusal."""
    safety = safety_filter()
    verdict = safety.apply(None)
    assert verdict.refused is None
    assert verdict.held
    assert safety.counters["starved"] == 1
    np.testing.assert_array_equal(verdict.action, [0.0, 0.0, 50.0])


def test_a_refusal_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A hundred bad ticks are one log line; after a good one the next is said again."""
    safety = safety_filter()
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            safety.apply(np.full(3, np.nan))
        assert len(caplog.records) == 1
        safety.apply(np.zeros(3))
        safety.apply(np.full(3, np.nan))
    assert len(caplog.records) == 2
    assert safety.counters["not finite"] == 101


def test_held_joints_keep_their_pose() -> None:
    """A joint by its name, or a part with all its joints."""
    safety = safety_filter(hold=("joint_0.pos",))
    assert run(safety, [50.0, 50.0, 50.0], 100).action[0] == 0.0
    two = env_spec(6, gripper=False, states=(StateSpec("left_arm", 3), StateSpec("right_arm", 3)))
    safety = safety_filter(two, start=np.zeros(6), hold=("right_arm",))
    np.testing.assert_allclose(run(safety, np.full(6, 9.0), 100).action, [9, 9, 9, 0, 0, 0])


def test_the_gripper_is_binarized_with_hysteresis() -> None:
    """Between the thresholds it keeps its side; beyond them it goes all the way."""
    safety = safety_filter(binarize_gripper=True, start=(0.0, 0.0, 100.0))
    targets = [run(safety, [0, 0, value], 1).stages["gripper"][2] for value in (50, 41, 40, 50, 59, 60, 45)]
    assert targets == [100, 100, 0, 0, 0, 100, 100]
    closed = safety_filter(binarize_gripper=True, start=(0.0, 0.0, 10.0))
    assert run(closed, [0, 0, 50], 1).stages["gripper"][2] == 0


def test_the_gripper_may_close_upwards() -> None:
    """On the Astribot 100 is closed: the order of the thresholds says so."""
    safety = safety_filter(
        binarize_gripper=True, gripper_open_at=40.0, gripper_close_at=60.0, start=(0.0, 0.0, 0.0)
    )
    targets = [run(safety, [0, 0, value], 1).stages["gripper"][2] for value in (50, 60, 50, 40)]
    assert targets == [0, 100, 100, 0]
    safety = safety_filter(binarize_gripper=True, gripper_closed_value=8.0, gripper_open_value=70.0)
    assert run(safety, [0, 0, 20], 1).stages["gripper"][2] == 8
    assert run(safety, [0, 0, 90], 1).stages["gripper"][2] == 70


def test_smoothing_averages_the_last_targets() -> None:
    """N targets, of which those before the first are the start pose."""
    safety = safety_filter(smooth=4)
    means = [run(safety, [1.0, 0, 50], 1).stages["smooth"][0] for _ in range(5)]
    assert means == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_smoothing_starts_anew_after_a_hold() -> None:
    """What was meant before a pause is not averaged with what is meant after it."""
    safety = safety_filter(smooth=4)
    run(safety, [2.0, 0, 50], 3)
    stood = safety.apply(None).action[0]
    np.testing.assert_allclose(run(safety, [2.0, 0, 50], 1).stages["smooth"][0], (3 * stood + 2.0) / 4)


def test_the_boundary_clamp_lasts_until_the_gap_is_closed() -> None:
    """The jump does not move from the boundary tick to the tick after it."""
    safety = safety_filter(boundary_velocity=0.3)
    clamp = 0.3 / FPS * PER_RAD
    sent = [safety.apply(np.array([2.0, 0, 50]), boundary=index == 0).action[0] for index in range(6)]
    np.testing.assert_allclose(np.diff([0.0, *sent[:4]]), [clamp, clamp, clamp, 2.0 - 3 * clamp], rtol=1e-5)
    assert sent[4] == sent[5] == 2.0
    # Caught up: from here the velocity limit alone counts.
    assert safety.apply(np.array([4.0, 0, 50])).action[0] == pytest.approx(4.0)


def test_the_boundary_clamp_allows_the_steps_of_the_chunk_itself() -> None:
    """A fast chunk is not slowed down where it begins."""
    safety = safety_filter(boundary_velocity=0.3)
    verdict = safety.apply(np.array([2.0, 2.0, 50]), boundary=True, inner_step=np.array([2.5, 0.0, 0.0]))
    np.testing.assert_allclose(verdict.action[:2], [2.0, 0.3 / FPS * PER_RAD], rtol=1e-5)


def test_the_limits_cut() -> None:
    """Beyond a limit the limit is commanded."""
    np.testing.assert_array_equal(run(safety_filter(), [500, -500, 500], 200).action, [100, -100, 100])
    np.testing.assert_array_equal(run(safety_filter(), [0, 0, -20], 200).action, [0, 0, 0])


def test_a_pose_outside_the_limits_only_moves_inwards() -> None:
    """At limited speed, whatever is asked; a hold leaves it where it is."""
    safety = safety_filter(start=(-110.0, 0.0, 50.0))
    assert safety.apply(None).action[0] == -110
    sent = [safety.apply(np.array([-150.0, 0, 50])).action[0] for _ in range(10)]
    steps = np.diff([-110.0, *sent])
    assert (steps >= 0).all()
    assert (steps <= STEP + 1e-4).all()
    assert sent[-1] == -100


def test_the_velocity_is_limited_against_the_last_command() -> None:
    """rad/s are converted through the robot's scale; the gripper has its own limit in % per second."""
    verdict = run(safety_filter(), [90, -90, 0], 3)
    np.testing.assert_allclose(verdict.action, [3 * STEP, -3 * STEP, 50 - 3 * 200 / FPS], rtol=1e-5)


def test_the_older_flag_counts_in_radians_per_frame() -> None:
    """max_velocity_per_frame replaces max_velocity; the gripper's limit stays."""
    verdict = run(safety_filter(max_velocity_per_frame=0.1), [90, -90, 0], 1)
    np.testing.assert_allclose(verdict.action, [0.1 * PER_RAD, -0.1 * PER_RAD, 50 - 200 / FPS], rtol=1e-5)


def test_a_late_tick_gets_no_larger_step() -> None:
    """One nominal period counts, however late; an early tick counts as what it is."""
    assert run(safety_filter(), [90, 0, 50], 1, dt_s=1.0).action[0] == pytest.approx(STEP, rel=1e-5)
    assert run(safety_filter(), [90, 0, 50], 1, dt_s=0.5 / FPS).action[0] == pytest.approx(STEP / 2, rel=1e-5)
    for broken in (0.0, -1.0, float("nan")):
        assert run(safety_filter(), [90, 0, 50], 1, dt_s=broken).action[0] == 0.0


def test_the_first_command_is_limited_against_the_measured_pose() -> None:
    """The pose of the tick itself, not the one that the episode began with."""
    safety = safety_filter()
    verdict = safety.apply(np.array([90.0, 0, 50]), measured=np.array([10.0, 0, 50]))
    assert verdict.action[0] == pytest.approx(10 + STEP, rel=1e-5)
    # From here on the command counts, not where gravity pulls the arm.
    verdict = safety.apply(np.array([90.0, 0, 50]), measured=np.array([0.0, 0, 50]))
    assert verdict.action[0] == pytest.approx(10 + 2 * STEP, rel=1e-5)


def test_a_measured_pose_that_is_no_pose_holds() -> None:
    """The first command waits for a pose that it can be limited against."""
    safety = safety_filter()
    verdict = safety.apply(np.ones(3), measured=np.array([0.0, np.nan, 0.0]))
    assert verdict.refused == "measured pose not finite"
    np.testing.assert_array_equal(verdict.action, [0, 0, 50])


def test_after_an_outage_the_measured_pose_counts_again() -> None:
    """Within one step of it, and inside of that as near to the last command as can be."""
    safety = safety_filter()
    run(safety, [40.0, 0, 50], 100)
    safety.rebase(np.array([39.0, 0.0, 50.0]))
    assert safety.apply(np.array([40.0, 0, 50]), measured=np.array([39.0, 0, 50])).action[0] == 40
    safety.rebase(np.array([-20.0, 0.0, 50.0]))
    first = safety.apply(np.array([40.0, 0, 50]), measured=np.array([-20.0, 0, 50])).action[0]
    assert first == pytest.approx(-20 + STEP, rel=1e-5)


def test_a_hold_does_not_follow_the_measured_pose() -> None:
    """An arm that is told its own sagging pose at each tick would creep down."""
    safety = safety_filter()
    run(safety, [40.0, 0, 50], 100)
    safety.rebase(np.array([-20.0, 0.0, 50.0]))
    held = [safety.apply(None, measured=np.array([-20.0 - tick, 0, 50])).action[0] for tick in range(20)]
    assert len(set(held)) == 1
    assert abs(held[0] + 20) <= STEP + 1e-4


def test_our_own_paths_are_neither_smoothed_nor_binarized() -> None:
    """`direct` leaves limits and velocity in force."""
    safety = safety_filter(smooth=10, binarize_gripper=True)
    verdict = safety.apply(np.array([1.0, 0, 52.0]), direct=True)
    np.testing.assert_allclose(verdict.action, [1, 0, 52])
    assert run(safety, [500.0, 0, 52.0], 100, direct=True).action[0] == 100
