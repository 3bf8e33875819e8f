"""Set-points between two actions: never faster than the actions, never outside of them, never beyond the last one."""

import numpy as np
import pytest
from env_client.envs.astribot_executor import SetPoints
from hypothesis import given, settings
from hypothesis import strategies as st

PERIOD, CYCLE, SPEED = 1 / 30, 1 / 250, 1.5


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0.2, 1.6)), min_size=1, max_size=40),
    st.sampled_from([PERIOD, 0.12, 0.5]),
)
def test_set_points_are_no_faster_than_their_targets(
    moves: list[tuple[float, float]], blend_s: float
) -> None:
    """Whatever targets the safety filter lets through, early or late: no set-point moves faster than allowed."""
    points, now, target = SetPoints(blend_s), 10.0, np.zeros(1)
    points.begin(target, now)
    last = points.at(now)
    lowest = highest = 0.0
    since = PERIOD
    for share, wait in moves:
        # As the filter does it: at most one nominal period's step, less when the tick came early behind the last one.
        target = target + share * SPEED * min(since, PERIOD)
        since = dt = PERIOD * wait
        lowest, highest = min(lowest, float(target[0])), max(highest, float(target[0]))
        points.aim(target, now)
        end = now + dt
        while now < end:
            step = min(CYCLE, end - now)
            now += step
            point = points.at(now)
            assert abs(point - last)[0] <= SPEED * step + 1e-9
            assert lowest - 1e-12 <= point[0] <= highest + 1e-12
            last = point
    np.testing.assert_array_equal(points.at(now + 10), target)


def test_it_begins_where_the_robot_stands() -> None:
    points = SetPoints(0.1)
    assert points.at(0.0) is None
    with pytest.raises(RuntimeError, match="begin comes first"):
        points.aim(np.ones(1), 0.0)
    points.begin(np.array([2.0]), 0.0)
    # A second beginning changes nothing: the robot is under way.
    points.begin(np.array([9.0]), 0.0)
    points.aim(np.array([3.0]), 1.0)
    assert points.at(1.05)[0] == pytest.approx(2.5)
    points.clear()
    assert points.at(1.1) is None
