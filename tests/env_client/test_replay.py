"""Replaying an episode: which prediction belongs to which tick, and what happens when the server does not answer."""

import time
from typing import Any

import numpy as np
import pytest
from env_client.envs.dataset import DatasetEnv, DatasetEnvConfig
from env_client.fit import doubts, misfits
from env_client.record.replay_report import format_table, summarise
from env_client.replay import ATTEMPTS, ChunkAsker, EpisodeRecord, Pace, ReplayStopped, replay_episode
from env_client.websocket_client_policy import ConnectionLost
from env_client.wire import CameraSpec, ErrorCode, PolicySpec, RemoteError, StateSpec

HORIZON = 5


class FakePolicy:
    """In place of the connection: chunk `n` holds, in row `k`, 100 n + k; errors can be put before answers."""

    def __init__(self, spec: PolicySpec | None = None, errors: tuple[Exception, ...] = (), chunk: Any = None):
        self.spec = spec
        self.errors = list(errors)
        self.chunk = chunk
        self.asked: list[tuple[dict, list]] = []
        self.connects = self.resets = 0

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.spec,)

    def connect(self) -> None:
        self.connects += 1

    def reset(self) -> None:
        self.resets += 1

    def infer(self, obs, *, history=None, prompt=None, episode=None, capture_time=None):
        if self.errors:
            raise self.errors.pop(0)
        self.asked.append((obs, history or []))
        number = len(self.asked) - 1
        rows = np.arange(HORIZON, dtype=np.float32)[:, None] + np.zeros(6, np.float32) + 100 * number
        actions = rows if self.chunk is None else self.chunk
        return {"actions": actions, "action": actions, "server_timing": {"infer_ms": 7.0}}


def spec(**changes: Any) -> PolicySpec:
    values: dict[str, Any] = {
        "type": "test",
        "action_dim": 6,
        "horizon": HORIZON,
        "cameras": (CameraSpec("front", 48, 64, "stretch"),),
        "states": (StateSpec("arm", 6),),
    }
    return PolicySpec(**(values | changes))


def run(datasets, policy: FakePolicy, episode: int = 1) -> tuple[EpisodeRecord, ChunkAsker, list[str]]:
    said: list[str] = []
    env = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video", episodes=(episode,)))
    asker = ChunkAsker(policy, action_dim=6, say=said.append)  # type: ignore[arg-type]
    first = env.reset()
    record = EpisodeRecord.of(env)
    try:
        replay_episode(env, asker, record, first, Pace(None))
    finally:
        env.close()
    return record, asker, said


@pytest.fixture
def expected(datasets):
    """States and actions of episode 1 as LeRobot reads them."""
    columns = np.load(datasets / "video.npz")
    mine = columns["episode_index"] == 1
    return {key: columns[key][mine] for key in ("observation.state", "action", "front")}


def test_each_tick_has_the_prediction_made_for_it(datasets, expected):
    """Tick t is compared with row t - c of the chunk that was asked for at tick c, the latest one."""
    record, asker, _ = run(datasets, FakePolicy(spec()))
    assert record.boundaries == [0, 5, 10, 15]
    ticks = np.arange(17)
    np.testing.assert_array_equal(record.predicted[:, 3], 100 * (ticks // 5) + ticks % 5)
    np.testing.assert_array_equal(record.recorded, expected["action"])
    assert record.complete
    summary = summarise([record], asker, [f"j{i}" for i in range(6)])
    error = np.abs(record.predicted - expected["action"])
    assert summary["mean_absolute_error"] == pytest.approx(error.mean())
    assert list(summary["mean_absolute_error_per_joint"].values()) == pytest.approx(
        error.mean(axis=0).tolist()
    )
    assert summary["largest_error_per_joint"]["j2"] == pytest.approx(error[:, 2].max())
    state = expected["observation.state"]
    still = np.abs(state[ticks - ticks % 5] - expected["action"])
    assert summary["standing_still"] == pytest.approx(still.mean(), rel=1e-5)
    assert summary["server_infer_ms"] == {"p50": 7.0, "p99": 7.0}
    assert (summary["ticks"], summary["chunks"], summary["reconnects"]) == (17, 4, 0)


def test_the_observation_of_the_tick_travels(datasets, expected):
    """Only what the policy names is sent, in its size, and it is the observation of the chunk's first tick."""
    policy = FakePolicy(spec())
    run(datasets, policy)
    for number, (obs, history) in enumerate(policy.asked):
        assert history == []
        assert set(obs["images"]) == {"front"}
        assert obs["images"]["front"].shape == (48, 64, 3)
        assert obs["task"] == "task 1"
        np.testing.assert_array_equal(obs["states"]["arm"], expected["observation.state"][5 * number])
    assert policy.resets == 1


def test_history_is_the_ticks_right_before(datasets, expected):
    """With n_obs_steps 3 the two ticks before travel, oldest first; at the beginning there are none."""
    policy = FakePolicy(spec(n_obs_steps=3))
    run(datasets, policy)
    states = expected["observation.state"]
    assert [len(history) for _, history in policy.asked] == [0, 2, 2, 2]
    for number, (_, history) in enumerate(policy.asked[1:], start=1):
        for item, tick in zip(history, (5 * number - 2, 5 * number - 1), strict=True):
            np.testing.assert_array_equal(item["states"]["arm"], states[tick])
            assert item["images"]["front"].shape == (48, 64, 3)


def test_plain_server_gets_everything(datasets):
    """A server that does not describe its policy is sent every camera in its own size."""
    policy = FakePolicy(None)
    run(datasets, policy)
    assert {name: image.shape for name, image in policy.asked[0][0]["images"].items()} == {
        "front": (96, 128, 3),
        "wrist": (96, 128, 3),
    }


def test_lost_connection_is_told_and_the_same_question_asked_again(datasets):
    """After a loss the recording goes on where it was, without a hole."""
    policy = FakePolicy(spec(), errors=(ConnectionLost("the connection was lost"),))
    record, asker, said = run(datasets, policy)
    assert record.complete
    assert (policy.connects, asker.reconnects) == (1, 1)
    assert said[0].startswith("The connection was lost. Connecting again")
    assert "Connected again" in said[1]


def test_passing_errors_are_waited_for(datasets):
    """OVERLOADED and its like are asked again, after the pause that the server names."""
    overloaded = RemoteError(ErrorCode.OVERLOADED, "busy", retry_after_ms=5)
    policy = FakePolicy(
        spec(), errors=(overloaded, RemoteError(ErrorCode.SUPERSEDED, "newer", retry_after_ms=0))
    )
    record, _, _ = run(datasets, policy)
    assert record.complete
    policy = FakePolicy(spec(), errors=(overloaded,) * ATTEMPTS)
    with pytest.raises(ReplayStopped, match=rf"{ATTEMPTS} attempts .*OVERLOADED"):
        run(datasets, policy)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (np.zeros((4, 7), np.float32), r"\[4, 7\]; \(horizon, 6\)"),
        (np.zeros(6, np.float32), r"\[6\]"),
        (np.zeros((0, 6), np.float32), r"\[0, 6\]"),
        ("text", r"\[0\]"),
        (np.full((4, 6), np.nan, np.float32), "not finite"),
    ],
)
def test_bad_chunks_stop_the_replay(datasets, chunk, words):
    """A chunk of another shape, or with NaN, is not compared with anything."""
    with pytest.raises(ReplayStopped, match=words):
        run(datasets, FakePolicy(spec(), chunk=chunk))


def test_refusals_stop_the_replay(datasets):
    """What does not get better by waiting ends the replay with the server's own sentence."""
    policy = FakePolicy(spec(), errors=(RemoteError(ErrorCode.INVALID_INPUT, "no camera front"),))
    with pytest.raises(ReplayStopped, match=r"INVALID_INPUT.*no camera front"):
        run(datasets, policy)


def test_pace_keeps_the_rate_and_does_not_rush_after_a_wait():
    """Ticks keep their distance; a long wait for a chunk is not caught up."""
    pace = Pace(100.0)
    started = time.monotonic()
    for _ in range(10):
        pace.wait()
    assert time.monotonic() - started >= 0.09
    time.sleep(0.2)
    pace.wait()
    started = time.monotonic()
    for _ in range(5):
        pace.wait()
    assert time.monotonic() - started >= 0.045


def test_table_of_a_run_without_answers():
    """Nothing divides by nothing."""
    asker = ChunkAsker(FakePolicy(spec()), action_dim=1)  # type: ignore[arg-type]
    nothing = np.full((3, 1), np.nan, np.float32)
    record = EpisodeRecord(0, np.zeros((3, 1), np.float32), nothing, nothing)
    assert "in all" in format_table(summarise([record], asker, ["a"]), "rad")


# --------------------------------------------------------------------------------------------- fitting


def test_what_does_not_fit_is_said_with_both_numbers(datasets):
    """Dimension, unit, cameras, state and the order of joints are compared before anything is replayed."""
    one = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video")).spec
    two = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "two_arms")).spec
    assert misfits(one, spec(), "the dataset") == []
    assert misfits(one, spec(action_names=one.action_names), "the dataset") == []
    found = misfits(two, spec(), "the dataset")
    assert "6 values, the dataset has 12" in found[0]
    assert "arm (6 values); the dataset has left_arm (6), right_arm (6)" in found[1]
    assert "degrees, the dataset in normalized" in misfits(one, spec(unit="degrees"), "the dataset")[0]
    camera = CameraSpec("top", 4, 4)
    assert (
        "top, which the dataset lacks; it has front, wrist: add --env.cameras front=top"
        in misfits(one, spec(cameras=(camera,)), "the dataset")[0]
    )
    camera = CameraSpec("front", 480, 640)
    assert misfits(one, spec(cameras=(camera,)), "the dataset", {"front": (480, 640)}) == []
    assert (
        "640x480 (width x height) and nothing else, the dataset has 128x96"
        in (misfits(one, spec(cameras=(camera,)), "the dataset", {"front": (96, 128)})[0])
    )
    assert "orders its actions" in misfits(one, spec(action_names=one.action_names[::-1]), "the dataset")[0]


def test_what_looks_odd_is_told(datasets):
    """Another rate or other names may be meant: they are told, not refused."""
    one = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video")).spec
    assert doubts(one, spec(fps=30.0, action_names=one.action_names), "the dataset") == []
    odd = doubts(one, spec(fps=10.0, action_names=tuple("abcdef")), "the dataset")
    assert "10 Hz, the dataset runs at 30 Hz" in odd[0]
    assert "by their order" in odd[1]
