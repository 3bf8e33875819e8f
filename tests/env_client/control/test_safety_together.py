"""All steps of the safety filter together: their order, and that nothing unsafe gets through."""

from __future__ import annotations

from typing import Any

import numpy as np
from control_doubles import FPS, PER_RAD, env_spec, safety_filter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# Largest step of a joint in one tick with the default 1.5 rad/s, in the test arm's unit.
STEP = 1.5 / FPS * PER_RAD


def test_the_steps_come_in_the_fixed_order() -> None:
    """One action that every step has something to say to."""
    safety = safety_filter(
        hold=("joint_1.pos",),
        binarize_gripper=True,
        smooth=2,
        boundary_velocity=3.0,
        start=(97.0, 0.0, 100.0),
    )
    verdict = safety.apply(np.array([300.0, 70.0, 30.0]), boundary=True)
    clamp = 3.0 / FPS * PER_RAD
    expected = {
        "requested": [300, 70, 30],
        "parts": [300, 0, 30],
        "gripper": [300, 0, 0],
        "smooth": [(97 + 300) / 2, 0, 50],
        # The gripper is never slower at a boundary than elsewhere.
        "boundary": [97 + clamp, 0, 100 - 200 / FPS],
        "limits": [100, 0, 100 - 200 / FPS],
        "velocity": [97 + STEP, 0, 100 - 200 / FPS],
    }
    assert list(verdict.stages) == list(expected)
    for name, target in expected.items():
        np.testing.assert_allclose(verdict.stages[name], target, err_msg=name)
    assert set(safety.interventions) == {"gripper", "smooth", "boundary", "limits", "velocity"}


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e38, 3.4e38, 0.0, -0.0, 100.0, -100.0, 1e-45]),
    st.floats(-150, 150),
)
actions = st.one_of(
    st.none(),
    hnp.arrays(np.float64, 3, elements=numbers),
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5)),
    st.lists(numbers, max_size=5),
    st.sampled_from(["up", b"\0", {}, object(), True, 7]),
)
ticks = st.fixed_dictionaries(
    {
        "action": actions,
        "boundary": st.booleans(),
        "dt_s": st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 0.1)),
        "late_s": st.one_of(st.none(), st.floats(allow_nan=True)),
        "episode": st.sampled_from([None, 0, 1]),
        "direct": st.booleans(),
        "measured": st.one_of(st.none(), hnp.arrays(np.float32, 3, elements=st.floats(-150, 150, width=32))),
        "inner_step": st.one_of(st.none(), hnp.arrays(np.float64, 3, elements=numbers)),
    }
)
configs = st.fixed_dictionaries(
    {
        "max_velocity": st.floats(1e-3, 100),
        "gripper_max_velocity": st.floats(1e-3, 1e4),
        "smooth": st.integers(0, 6),
        "boundary_velocity": st.sampled_from([0.0, 0.3]),
        "binarize_gripper": st.booleans(),
        "hold": st.sampled_from([(), ("joint_1.pos",)]),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    start=hnp.arrays(np.float32, 3, elements=st.floats(-150, 150, width=32)),
    sequence=st.lists(ticks, min_size=1, max_size=25),
    config=configs,
    data=st.data(),
)
def test_whatever_comes_in_nothing_unsafe_goes_out(start: Any, sequence: Any, config: Any, data: Any) -> None:
    """Finite, (A,) float32; inside the limits or moving towards them; never faster than the limit allows."""
    spec = env_spec()
    safety = safety_filter(spec, start=start, **config)
    last, first = start.astype(np.float64), True
    for index, tick in enumerate(sequence):
        if index and data.draw(st.integers(0, 9)) == 0:
            pose = data.draw(hnp.arrays(np.float32, 3, elements=st.floats(-150, 150, width=32)))
            safety.rebase(pose)
            last, first = pose.astype(np.float64), True
        if first and tick["measured"] is not None:
            last = tick["measured"].astype(np.float64)
        verdict = safety.apply(**tick)
        sent = verdict.action
        assert sent.shape == (3,)
        assert sent.dtype == np.float32
        assert np.isfinite(sent).all()
        command = sent.astype(np.float64)
        dt = tick["dt_s"]
        dt = 1 / FPS if dt is None else min(dt, 1 / FPS) if dt > 0 else 0.0
        # A hold repeats the last command; the first one is at most one nominal step from the measured pose.
        reach = safety.speed * (1 / FPS if verdict.held else dt)
        assert (np.abs(command - last) <= reach).all()
        inside = (command >= spec.lower) & (command <= spec.upper)
        towards = np.abs(command - np.clip(command, spec.lower, spec.upper)) <= np.abs(
            last - np.clip(last, spec.lower, spec.upper)
        ) + (reach if first else 0.0)
        assert (inside | towards).all()
        if verdict.held and not first:
            np.testing.assert_array_equal(command, last)
        last, first = command, False
