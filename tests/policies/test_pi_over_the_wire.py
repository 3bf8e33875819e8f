"""Pi0 and Pi0.5 through the real command and a real socket, against LeRobot's own answer in this process."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import RemoteError, RtcPrefix
from pi_reference import PATIENCE_S, PiReference, pi_observation, pi_server

from grasp_cube.tiny_checkpoint import make_tiny_checkpoint

# Two imports of LeRobot, one after the other.
pytestmark = pytest.mark.timeout(2 * PATIENCE_S)

SEED = 42
KINDS = ("pi0", "pi05")
# Normalised values of 1 are 60 of the robot's units here.
CLOSE = {"atol": 60 * 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, one_thread) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pi")
    made = {kind: make_tiny_checkpoint(folder / kind, kind) for kind in KINDS}
    return made | {"relative": make_tiny_checkpoint(folder / "relative", "pi0", use_relative_actions=True)}


@pytest.fixture(scope="module")
def references(checkpoints) -> dict[str, PiReference]:
    return {name: PiReference(folder) for name, folder in checkpoints.items()}


@pytest.fixture(scope="module")
def port(checkpoints) -> Iterator[int]:
    """One server with the three checkpoints, in LeRobot's arithmetic, with fixed noise and LeRobot's guidance."""
    paths = [flag for name, folder in checkpoints.items() for flag in ("--policy.path", f"{name}={folder}")]
    exact = ("--policy.optimize", "none", "--policy.noise-seed", SEED, "--policy.rtc", "guided")
    with pi_server(*paths, *exact, "--batching.max-wait-ms", "2000") as number:
        yield number


def connected(port: int, name: str) -> WebsocketClientPolicy:
    return WebsocketClientPolicy("127.0.0.1", port, path=name, on_status=lambda sentence: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pi0", "pi05", "relative"])
def test_equal_to_lerobot_in_process(name, port, references):
    """The chunk, one that lacks a camera, and one that is guided by the rest of the last: all to 1e-4 normalised."""
    obs, later = pi_observation(1), pi_observation(2)
    with connected(port, name) as policy:
        assert policy.spec is not None
        assert (policy.spec.wants_prompt, policy.spec.supports_rtc) == (True, True)
        chunk = policy.infer(obs)["actions"]
        np.testing.assert_allclose(chunk, references[name].chunk(obs, SEED), **CLOSE)

        blind = pi_observation(1, cameras=("wrist",))
        answer = policy.infer(blind)["actions"]
        np.testing.assert_allclose(answer, references[name].chunk(blind, SEED), **CLOSE)
        assert np.abs(answer - chunk).max() > 0.1, "the camera left no mark"

        left = chunk[12:]
        answer = policy.infer(later, rtc=RtcPrefix(left, delay=4, mask_end=20))["actions"]
        prev = references[name].in_model_space(later, left)
        expected = references[name].chunk(
            later, SEED, inference_delay=4, prev_chunk_left_over=prev, execution_horizon=20
        )
        np.testing.assert_allclose(answer, expected, **CLOSE)
        free = policy.infer(later)["actions"]
        assert np.abs(answer - free).max() > 0.1, "the guidance left no mark"


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_prompts_share_a_batch(name, port, references):
    """Two clients with prompts of different length are answered by one inference, each as if it were alone."""
    prompts = ("lift up the red cube", "sort the cubes by color, and do not drop any of them on the way")
    replies: dict[str, dict] = {}
    ready = threading.Barrier(2)

    def ask(prompt: str) -> None:
        with connected(port, name) as policy:
            policy.connect()
            ready.wait(60)
            replies[prompt] = policy.infer(pi_observation(5, prompt))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [reply["server_timing"]["batch_size"] for reply in replies.values()] == [2, 2]
    for prompt, reply in replies.items():
        np.testing.assert_allclose(
            reply["actions"], references[name].chunk(pi_observation(5, prompt), SEED), **CLOSE
        )
    assert np.abs(replies[prompts[0]]["actions"] - replies[prompts[1]]["actions"]).max() > 0.1


@pytest.mark.slow
def test_misfits_are_named_and_the_connection_stays_open(port):
    """No prompt, no camera, a misspelt camera, a delay that is not feasible: each is told, with what is."""
    obs = pi_observation(1)
    wrong = [
        ({"obs": {key: obs[key] for key in ("images", "states")}}, "no prompt came"),
        ({"obs": obs | {"images": {}}}, "is missing"),
        (
            {"obs": obs | {"images": {"front": obs["images"]["front"], "wirst": obs["images"]["wrist"]}}},
            "'wirst'",
        ),
        ({"obs": obs, "rtc": RtcPrefix(np.zeros((50, 6), np.float32), 30, 40)}, "0 to 25 was expected"),
        ({"obs": obs, "rtc": RtcPrefix(np.zeros((50, 6), np.float32), 10, 5)}, "10 (the delay) to 50"),
        ({"obs": obs, "rtc": RtcPrefix(np.zeros((50, 7), np.float32), 1, 5)}, "(n, 6) was expected"),
        ({"obs": obs, "rtc": RtcPrefix(np.zeros((3, 6), np.float32), 4, 5)}, "the rows in prev"),
    ]
    with connected(port, "pi05") as policy:
        for request, words in wrong:
            with pytest.raises(RemoteError) as caught:
                policy.infer(**request)
            assert words in str(caught.value)
        assert policy.infer(obs)["actions"].shape == (50, 6)
