"""Sixteen clients at once, each with its own prompts and histories: nobody gets anything of another one's."""

import concurrent.futures
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small_checkpoints
from env_client.wire import RemoteError
from numpy_policy import Options, expected_chunk, write_checkpoint
from serving_parts import CAMERAS, client, make_observation, serving

CLIENTS = 16
STEPS = 3


@pytest.mark.parametrize("requests", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_chunk_equals_the_one_that_its_session_gets_alone(tmp_path, requests):
    """Interleaved requests of 16 clients to a policy whose answer depends on every pixel of three ticks and on the
    prompt, which some name in the request, some in the observation, some set for the session, and some leave out."""
    options = Options(cameras=CAMERAS, n_obs_steps=STEPS, default_prompt="the default")
    checkpoint = write_checkpoint(
        tmp_path / "numpy", cameras=CAMERAS, n_obs_steps=STEPS, default_prompt="the default", delay_s=0.001
    )

    def drive(number: int) -> Counter[int]:
        ticks = [
            {k: v for k, v in make_observation(100 * number + i).items() if k != "task"} for i in range(40)
        ]
        sizes: Counter[int] = Counter()
        with client(port) as policy:
            for step in range(requests // CLIENTS):
                at = (step * (1 + number % 3)) % len(ticks)
                obs, past = ticks[at], ticks[max(0, at - number % STEPS) : at]
                own, prompt, told = f"client {number}", None, {}
                match (step // 10 + number) % 4:
                    case 0:
                        prompt = told["prompt"] = own
                    case 1:
                        obs = obs | {"task": f"the task of {own}"}
                        prompt = obs["task"]
                    case 2:
                        if step % 10 == 0:
                            policy.set_prompt(own)
                            prompt = own
                        else:
                            prompt = policy.status()["prompt"]
                            assert prompt in (None, own)
                    case 3:
                        policy.reset()
                reply = policy.infer(obs, history=past, **told)
                sizes[reply["server_timing"]["batch_size"]] += 1
                assert reply["seq"] == policy._seq
                assert np.array_equal(reply["actions"], expected_chunk(options, obs, past, prompt))
        return sizes

    with (
        serving("--policy.path", checkpoint, "--batching.max-size", "8") as (_, port),
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool,
    ):
        sizes = sum(pool.map(drive, range(CLIENTS)), Counter())
    assert sizes.total() == requests // CLIENTS * CLIENTS
    # They did share batches, or this showed nothing.
    assert sum(count for size, count in sizes.items() if size > 1) > requests // 4


@pytest.mark.slow
def test_the_same_with_a_diffusion_checkpoint(tmp_path):
    """Requests of 16 clients, with histories, fixed noise and LeRobot's own arithmetic: to 1e-5 of the action's range,
    which is what float32 leaves of it when another number of requests is added up in one batch."""
    checkpoint = small_checkpoints.save_diffusion(tmp_path / "diffusion")
    flags = ("--policy.noise-seed", "5", "--policy.optimize", "none", "--device", "cpu")
    requests = [
        (small_checkpoints.observation(3 * i), [small_checkpoints.observation(3 * i + 1)]) for i in range(64)
    ]
    with serving("--policy.path", checkpoint, *flags) as (_, port):
        with client(port) as policy:
            alone = [policy.infer(obs, history=past)["actions"] for obs, past in requests]

        def drive(number: int) -> list[tuple[np.ndarray, int]]:
            with client(port) as policy:
                replies = [policy.infer(obs, history=past) for obs, past in requests[number::CLIENTS]]
            return [(reply["actions"], reply["server_timing"]["batch_size"]) for reply in replies]

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            together = list(pool.map(drive, range(CLIENTS)))
    assert max(size for answers in together for _, size in answers) > 1
    scale = max(np.abs(chunk).max() for chunk in alone)
    for number, answers in enumerate(together):
        for (chunk, _), expected in zip(answers, alone[number::CLIENTS], strict=True):
            assert np.abs(chunk - expected).max() <= 1e-5 * scale


def test_different_image_sizes_share_a_server(tmp_path):
    """Images of the spec's size and others, which are brought to it: each answer is that of its own image."""
    cameras = tuple({**camera, "resize": "stretch"} for camera in CAMERAS)
    options = Options(cameras=cameras)
    checkpoint = write_checkpoint(tmp_path / "stretch", cameras=cameras, delay_s=0.01)

    def drive(number: int) -> None:
        rng = np.random.default_rng(number)
        shape = (24, 32, 3) if number % 2 else (30 + number, 50, 3)
        with client(port, image_codec="png" if number % 3 else "raw") as policy:
            for _ in range(10):
                images = {name: rng.integers(0, 256, shape, np.uint8) for name in ("front", "wrist")}
                obs = make_observation(number) | {"images": images}
                assert np.array_equal(policy.infer(obs)["actions"], expected_chunk(options, obs))

    with (
        serving("--policy.path", checkpoint) as (_, port),
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(drive, range(8)))


def test_a_request_that_waits_too_long_is_refused(slow_port):
    """`deadline_ms` of the client counts; the server's own for everybody."""
    with (
        client(slow_port) as busy,
        client(slow_port) as hurried,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        running = pool.submit(busy.infer, make_observation())
        while not hurried.status()["running"]:
            time.sleep(0.01)
        with pytest.raises(RemoteError) as caught:
            hurried.infer(make_observation(), deadline_ms=50)
        assert caught.value.code == "OVERLOADED"
        assert "50 ms" in caught.value.message
        assert not running.done()
        assert running.result()["actions"].shape == (16, 6)


def test_reset_ends_only_its_own_session(tmp_path: Path):
    """Its prompt is gone, the other's is not."""
    checkpoint = write_checkpoint(tmp_path / "numpy", cameras=CAMERAS)
    with serving("--policy.path", checkpoint) as (_, port), client(port) as one, client(port) as two:
        for policy, prompt in ((one, "a"), (two, "b")):
            policy.set_prompt(prompt)
        one.reset()
        assert (one.status()["prompt"], two.status()["prompt"]) == (None, "b")
