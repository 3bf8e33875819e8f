"""How a new chunk joins the plan."""

from __future__ import annotations

import numpy as np
import pytest
from env_client.control.plan import LatencyEstimate, Plan, largest_step
from hypothesis import given, settings
from hypothesis import strategies as st


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def drain(plan: Plan) -> list[float]:
    rows = []
    while (row := plan.pop()) is not None:
        rows.append(float(row[0]))
    return rows


def test_the_past_of_a_chunk_is_skipped_by_count() -> None:
    """As many rows as were consumed since its observation."""
    plan = Plan(1)
    assert plan.merge(column(0, 1, 2, 3, 4), consumed=0, blend=0)
    assert [plan.pop() for _ in range(2)] == [0, 1]
    assert plan.merge(column(0, 1, 2, 3, 4, 5, 6), consumed=2, blend=0)
    assert drain(plan) == [2, 3, 4, 5, 6]


def test_a_chunk_whose_every_row_is_past_is_too_late() -> None:
    """The plan goes on as it was."""
    plan = Plan(1)
    plan.merge(column(7, 8), 0, 0)
    assert not plan.merge(column(1, 2), consumed=2, blend=4)
    assert drain(plan) == [7, 8]


def test_the_old_plan_fades_out_linearly() -> None:
    """Equal weights' steps over the overlap, then the new chunk alone."""
    plan = Plan(1)
    # The last step, of 30, is how fast this policy can move.
    plan.merge(column(*range(0, 100, 10), 120), 0, 0)
    plan.pop()
    # The new chunk says 3 more everywhere; 3 rows of blending weigh it 1/4, 2/4, 3/4.
    plan.merge(column(*(10 * k + 3 for k in range(1, 9))), 0, blend=3)
    np.testing.assert_allclose(drain(plan)[:5], [10.75, 21.5, 32.25, 43, 53])


def test_a_plan_that_cannot_catch_up_lags() -> None:
    """At constant speed any catching up would be faster than the chunks: it does not jump, it stays behind."""
    plan = Plan(1)
    plan.merge(column(*range(0, 100, 10)), 0, 0)
    plan.pop()
    plan.merge(column(*(10 * k + 3 for k in range(1, 9))), 0, blend=3)
    np.testing.assert_allclose(drain(plan)[:5], [10, 20, 30, 40, 50])


def test_no_step_at_the_seam_is_larger_than_inside_the_chunks() -> None:
    """Without any overlap the gap is closed at the chunks' own speed."""
    plan = Plan(1)
    plan.merge(column(0, 1, 2), 0, 0)
    assert drain(plan) == [0, 1, 2]
    plan.merge(column(*range(10, 30)), 0, blend=5)
    steps = np.diff([2.0, *drain(plan)])
    assert steps.max() <= 1.0 + 1e-6


def test_a_joint_that_stands_still_in_its_chunks_still_gets_there() -> None:
    """The gap is spread evenly over the rest of the plan, in quiet steps."""
    plan = Plan(1, quiet_step=0.5)
    plan.merge(column(5, 5), 0, 0)
    drain(plan)
    plan.merge(column(*[7.0] * 10), 0, blend=0)
    rows = drain(plan)
    assert rows[-1] == 7
    np.testing.assert_allclose(np.diff([5, *rows]), np.full(10, 0.2), rtol=1e-5)


def test_the_first_chunk_is_taken_as_it_is() -> None:
    """Nothing was handed out yet: the safety filter limits the way from the measured pose."""
    plan = Plan(1)
    plan.merge(column(50, 50), 0, 6)
    assert drain(plan) == [50, 50]


def test_what_was_received_is_kept_beside_what_is_blended() -> None:
    """Real-time chunking sends the rows back as they came."""
    plan = Plan(1)
    plan.merge(column(0, 1, 2, 3), 0, 0)
    plan.pop()
    plan.merge(column(5, 6, 7, 8), 1, blend=2)
    plan.pop()
    np.testing.assert_array_equal(plan.received, column(7, 8))


@settings(max_examples=200, deadline=None)
@given(
    first=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20),
    second=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20),
    popped=st.integers(1, 20),
    consumed=st.integers(0, 20),
    blend=st.integers(0, 8),
)
def test_seams_hold_for_any_two_chunks(
    first: list[float], second: list[float], popped: int, consumed: int, blend: int
) -> None:
    """Every step from the last action on is at most the largest step inside either chunk, or a quiet one."""
    plan = Plan(1, quiet_step=0.25)
    plan.merge(column(*first), 0, 0)
    last = [plan.pop() for _ in range(min(popped, len(first)))][-1]
    assert last is not None
    if not plan.merge(column(*second), consumed, blend):
        assert consumed >= len(second)
        return
    fresh = second[consumed:]
    allowed = max(largest_step(column(*first))[0], largest_step(column(*second))[0], 0.25)
    rows = drain(plan)
    assert len(rows) == len(fresh)
    assert np.abs(np.diff([float(last[0]), *rows])).max() <= allowed * (1 + 1e-5) + 1e-4


def test_the_latency_estimate_overlooks_a_single_spike() -> None:
    """One slow answer among ten is an accident, two are the network; after ten others both are forgotten."""
    estimate = LatencyEstimate(window=10)
    assert estimate.ticks(30) is None
    estimate.add(1.0)
    assert estimate.ticks(30) == 30
    for _ in range(4):
        estimate.add(0.1)
    assert estimate.ticks(30) == 3
    estimate.add(0.9)
    assert estimate.ticks(30) == 27
    for _ in range(10):
        estimate.add(0.1)
    assert estimate.upper_s == pytest.approx(0.1)
