"""What a policy may do to the device's thread: run out of memory, hang, raise, answer NaN. The server lives, and says so."""

import concurrent.futures
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from env_client.wire import WireError
from numpy_policy import Options, expected_chunk, write_checkpoint
from processes import running
from serving_parts import CAMERAS, client, get, make_observation, serving
from small_checkpoints import save_act

from grasp_cube.policies.devices import is_out_of_memory

OPTIONS = Options(cameras=CAMERAS)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable]:
    """A server whose NumPy policy has these options."""

    def begin(*flags: object, **options):
        checkpoint = write_checkpoint(tmp_path / "policy", cameras=CAMERAS, **options)
        return serving("--policy.path", checkpoint, *flags)

    return begin


def refused(port: int, prompt: str | None = None) -> WireError:
    with client(port) as policy, pytest.raises(WireError) as caught:
        policy.infer(make_observation(), prompt=prompt)
    return caught.value


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_batch_without_memory_is_split(start):
    """Six clients at once where two fit: each gets its own chunk, from batches of at most two."""

    def ask(port: int, number: int) -> list[int]:
        with client(port) as policy:
            sizes = []
            for seed in range(5):
                obs = make_observation(100 * number + seed)
                reply = policy.infer(obs)
                assert np.array_equal(reply["actions"], expected_chunk(OPTIONS, obs))
                sizes.append(reply["server_timing"]["batch_size"])
            return sizes

    with (
        start("--batching.max-wait-ms", "1000", "--batching.max-size", "6", fits=2) as (server, port),
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):
        sizes = [size for sizes in pool.map(lambda number: ask(port, number), range(6)) for size in sizes]
        assert max(sizes) <= 2
        assert "no memory for" in server.output
        assert "Traceback" not in server.output


def test_a_request_without_memory_is_refused_and_the_server_lives(start):
    """OVERLOADED with a pause; it is ready, and goes on answering."""
    with start(fits=0) as (server, port):
        for _ in range(3):
            error = refused(port)
            assert error.code == "OVERLOADED"
            assert error.retry_after_ms == 1000
            assert "no memory left for even one request" in error.message
        assert get(port, "/readyz")[0] == 200
        assert json.loads(get(port, "/status")[1])["queue"] == 0
        assert server.end() == 0


def test_a_real_model_without_memory_is_answered_in_smaller_batches(tmp_path):
    """LeRobot's ACT in a batch that does not fit: each client gets its chunk; where nothing fits, OVERLOADED."""
    fits = tmp_path / "fits"
    fits.write_text("2")
    checkpoint = save_act(tmp_path / "act", size=(24, 32))
    command = [
        sys.executable,
        str(Path(__file__).with_name("short_of_memory.py")),
        fits,
        "--policy.path",
        checkpoint,
    ]
    command += [
        "--policy.optimize",
        "none",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--batching.max-wait-ms",
        "1000",
    ]
    with running(*map(str, command)) as server:
        port = int(server.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)")[1])
        obs = make_observation()

        def ask(_: int) -> dict:
            with client(port) as policy:
                return policy.infer(obs)

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(ask, range(6)))
        assert "no memory for" in server.output
        assert max(reply["server_timing"]["batch_size"] for reply in replies) <= 2
        for reply in replies:
            np.testing.assert_allclose(reply["actions"], replies[0]["actions"], atol=1e-4)
        fits.write_text("0")
        error = refused(port)
        assert (error.code, error.retry_after_ms) == ("OVERLOADED", 1000)
        fits.write_text("2")
        np.testing.assert_allclose(ask(0)["actions"], replies[0]["actions"], atol=1e-4)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    """Types and sentences of torch, cuBLAS and NumPy; nothing else."""
    assert is_out_of_memory(error) is expected


def test_an_inference_that_hangs_is_said_and_ends_with_the_server(start):
    """Its client and all others are told; /healthz lives, /readyz says why; SIGTERM does not wait for it."""
    flags = ("--batching.hang-s", "3")
    with start(*flags, behaviour="hang", behaviour_prompt="hang") as (server, port):
        with client(port) as policy:
            assert policy.infer(make_observation())["actions"].shape == (16, 6)
        error = refused(port, "hang")
        assert error.code == "NOT_READY"
        assert "the policy hangs: one inference has been running for" in error.message
        assert refused(port).code == "NOT_READY"
        assert get(port, "/healthz")[0] == 200
        status, why = get(port, "/readyz")
        assert status == 503
        assert b"the policy hangs" in why
        assert "restart the server" in server.output
        assert server.end(signal.SIGTERM) == 0


@pytest.mark.slow
def test_an_inference_that_comes_back_is_no_hang_any_more(start):
    """It hung for eight seconds: afterwards the same server answers as if nothing had been."""
    flags = ("--batching.hang-s", "2")
    with start(*flags, behaviour="hang", behaviour_prompt="hang", hang_s=8.0) as (server, port):
        assert refused(port, "hang").code == "NOT_READY"
        until(lambda: get(port, "/readyz")[0] == 200)
        with client(port) as policy:
            obs = make_observation()
            assert np.array_equal(policy.infer(obs)["actions"], expected_chunk(OPTIONS, obs))
        assert server.output.count("restart the server") == 1


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["raise", "nan"])
def test_a_policy_that_fails_fails_its_own_request_only(start, behaviour):
    """In one batch with good ones, again and again: the others get their chunks."""
    with (
        start("--batching.max-wait-ms", "50", behaviour=behaviour, behaviour_prompt="bad") as (_, port),
        client(port) as good,
        client(port) as bad,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        for seed in range(5):
            obs = make_observation(seed)
            answer = pool.submit(good.infer, obs)
            with pytest.raises(WireError) as caught:
                bad.infer(make_observation(seed), prompt="bad")
            assert caught.value.code == "INTERNAL"
            assert np.array_equal(answer.result(20)["actions"], expected_chunk(OPTIONS, obs))
        assert get(port, "/readyz")[0] == 200
