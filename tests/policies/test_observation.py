"""Every observation that does not fit is refused with the part, what came and what was expected."""

import numpy as np
import pytest
from env_client.wire import CameraSpec, InvalidInput, PolicySpec, StateSpec, resize_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grasp_cube.policies.observation import ObservationReader, resolve_prompt
from grasp_cube.policies.policy import PolicyRequest

FRONT, WRIST = CameraSpec("front", 24, 32), CameraSpec("wrist", 24, 32, "pad")
READER = ObservationReader(
    (FRONT, WRIST), (StateSpec("left_arm", 6), StateSpec("right_arm", 6)), n_obs_steps=3
)


def observation(**changes) -> dict:
    image = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
    states = {"right_arm": np.arange(6, 12, dtype=np.float32), "left_arm": np.arange(6, dtype=np.float32)}
    return {"images": {"front": image, "wrist": image[::-1]}, "states": states, "task": ""} | changes


def images(**changes) -> dict:
    return {"images": observation()["images"] | changes}


def states(**changes) -> dict:
    return {"states": observation()["states"] | changes}


def without(name: str, part: str) -> dict:
    return {name: {key: value for key, value in observation()[name].items() if key != part}}


def test_parts_are_joined_in_the_specs_order():
    """The order of the keys in the message does not matter, and what is not wanted is left unread."""
    frame = READER.frame(observation(**states(chassis=np.zeros(3)), **images(torso="not even an image")))
    np.testing.assert_array_equal(frame.state, np.arange(12, dtype=np.float32))
    assert frame.state.dtype == np.float32
    assert list(frame.images) == ["front", "wrist"]


@pytest.mark.parametrize(
    "obs",
    [
        observation(states=np.arange(12)),
        observation(states=list(range(12))),
        {**observation(), "states": None, "observation.state": np.arange(12, dtype=np.float64)},
        {**observation(), "states": None, "state": np.arange(12, dtype=np.float16)},
        {
            "observation.images.front": observation()["images"]["front"],
            "observation.images.wrist": observation()["images"]["wrist"],
            "observation.state": np.arange(12),
        },
    ],
)
def test_flat_spellings_are_read_where_they_are_unambiguous(obs):
    obs = {key: value for key, value in obs.items() if value is not None}
    frame = READER.frame(obs)
    np.testing.assert_array_equal(frame.state, np.arange(12, dtype=np.float32))
    np.testing.assert_array_equal(frame.images["front"], observation()["images"]["front"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (without("images", "wrist"), ["camera 'wrist' is missing", "came front", "expected front, wrist"]),
        ({"images": {}}, ["camera 'front' is missing", "came none"]),
        ({"images": [1, 2]}, ["images", "a map from camera name"]),
        (images(front=np.zeros((24, 32), np.uint8)), ["camera 'front'", "[24, 32]", "(H, W, 3) uint8"]),
        (images(front=np.zeros((3, 24, 32), np.uint8)), ["camera 'front'", "[3, 24, 32]"]),
        (images(front=np.zeros((24, 32, 3), np.float32)), ["camera 'front'", "float32", "uint8"]),
        (images(front="front.jpg"), ["camera 'front'", "str"]),
        (images(front=np.zeros((48, 64, 3), np.uint8)), ["camera 'front'", "64x48", "32x24", "'none'"]),
        (
            without("states", "left_arm"),
            ["'left_arm' is missing", "came right_arm", "left_arm (6,), right_arm (6,)"],
        ),
        ({"states": {}}, ["'left_arm' is missing", "came none"]),
        ({"states": np.zeros(6, np.float32)}, ["states", "[6]", "(12,) was expected"]),
        ({"states": "home"}, ["states", "(12,) float32"]),
        (states(left_arm=np.zeros(7, np.float32)), ["states.left_arm", "[7]", "(6,) was expected"]),
        (states(left_arm=np.zeros((1, 6), np.float32)), ["states.left_arm", "[1, 6]"]),
        (states(left_arm=np.zeros(6, bool)), ["states.left_arm", "bool"]),
        (states(left_arm=np.zeros(6, "U3")), ["states.left_arm", "<U3"]),
        (states(left_arm=[[1], [1, 2]]), ["states.left_arm", "list"]),
        (states(left_arm=None), ["states.left_arm", "None"]),
        (
            states(left_arm=np.array([0, 1, np.nan, 3, 4, np.inf])),
            ["states.left_arm", "not finite", "[2, 5]"],
        ),
        (states(left_arm=np.full(6, 1e300)), ["states.left_arm", "not finite"]),
    ],
)
def test_misfits_are_named(changes, words):
    """The same sentence from the quick check and from the reading, and no other exception."""
    request = PolicyRequest(observation(**changes))
    for read in (READER.check, READER.frames):
        with pytest.raises(InvalidInput) as caught:
            read(request)
        for word in words:
            assert word in caught.value.message


@given(
    st.dictionaries(
        st.sampled_from(
            ["images", "states", "task", "observation.state", "observation.images.front", "prompt"]
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=3)
            | st.binary(max_size=3)
            | st.sampled_from([np.zeros(6, np.float32), np.zeros((24, 32, 3), np.uint8), np.float32("nan")]),
            lambda inner: (
                st.lists(inner, max_size=13)
                | st.dictionaries(
                    st.sampled_from(["front", "wrist", "left_arm", "right_arm"]), inner, max_size=4
                )
            ),
            max_leaves=20,
        ),
    )
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_comes_is_read_or_refused(obs):
    """No other exception than InvalidInput, and what is read is finite and of the right size."""
    request = PolicyRequest(obs, history=(obs,))
    try:
        frames = READER.frames(request)
    except InvalidInput:
        return
    READER.check(request)
    assert all(frame.state.shape == (12,) and np.isfinite(frame.state).all() for frame in frames)


def test_no_states_at_all_lists_the_keys():
    with pytest.raises(InvalidInput, match="came the keys images, task"):
        READER.check(PolicyRequest({"images": observation()["images"], "task": ""}))


def test_history_is_padded_by_its_oldest_frame():
    """Three ticks are wanted: none, one, two and five earlier ones."""

    def firsts(count: int) -> list[float]:
        ticks = [observation(**states(left_arm=np.full(6, tick))) for tick in range(count + 1)]
        frames = READER.frames(PolicyRequest(ticks[-1], history=tuple(ticks[:-1])))
        return [float(frame.state[0]) for frame in frames]

    assert firsts(0) == [0, 0, 0]
    assert firsts(1) == [0, 0, 1]
    assert firsts(2) == [0, 1, 2]
    assert firsts(5) == [3, 4, 5]


def test_a_bad_tick_of_the_history_is_named():
    bad = observation(**states(left_arm=np.full(6, np.nan)))
    with pytest.raises(InvalidInput, match=r"history\[1\]"):
        READER.check(PolicyRequest(observation(), history=(observation(), bad)))


def test_other_sizes_follow_the_cameras_rule():
    large = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    frame = READER.frame(observation(**images(wrist=large)))
    np.testing.assert_array_equal(frame.images["wrist"], resize_image(large, 24, 32, "pad"))


def test_the_prompts_order():
    """The request's own, then `prompt`, then `task`, then the policy's default; else it is asked for."""
    spec = PolicySpec("pi0", 6, 10, wants_prompt=True, default_prompt="default")
    assert resolve_prompt(PolicyRequest({"prompt": "p", "task": "t"}, prompt="own"), spec) == "own"
    assert resolve_prompt(PolicyRequest({"prompt": "p", "task": "t"}), spec) == "p"
    assert resolve_prompt(PolicyRequest({"task": "t"}), spec) == "t"
    assert resolve_prompt(PolicyRequest({"task": ""}), spec) == "default"
    with pytest.raises(InvalidInput, match="no prompt"):
        resolve_prompt(PolicyRequest({"task": ""}), PolicySpec("pi0", 6, 10, wants_prompt=True))
    assert resolve_prompt(PolicyRequest({}), PolicySpec("act", 6, 10)) is None
