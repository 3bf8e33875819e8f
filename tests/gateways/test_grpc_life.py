"""A gateway's life over real sockets: idle, configured, swapped, failing, slow, locked and stopped."""

import concurrent.futures
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_client import ERROR, MODEL_NOT_LOADED, NOT_READY, OK, Client
from grpc_parts import FIELDS, grpc_gateway, refused
from numpy_policy import write_checkpoint


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("raise", "log says why"), ("nan", "not finite"), ("wrong_dim", "[4, 17]")],
)
def test_a_policy_that_fails_is_an_error(folder, messages, robot, behaviour, said):
    """ERROR, no values, no traceback; the next request is answered."""
    checkpoint = write_checkpoint(folder / behaviour, behaviour=behaviour, behaviour_prompt="fail", **FIELDS)
    with grpc_gateway(checkpoint) as (_, port), Client(port, messages) as client:
        action = client.predict(robot.observation(prompt="fail"))
        assert (action.status, list(action.values)) == (ERROR, [])
        assert said in action.error_message
        assert "Traceback" not in action.error_message
        assert client.predict(robot.observation(prompt="work")).status == OK


def test_from_idle_to_a_policy_and_to_another(folder, messages, robot):
    """MODEL_NOT_LOADED, NOT_READY while it loads, a failed Configure, a swap that others are told of."""
    write_checkpoint(folder / "one", load_s=1.0, **FIELDS)
    write_checkpoint(folder / "two", **FIELDS | {"horizon": 3})
    with (
        grpc_gateway(None, root=str(folder)) as (process, port),
        Client(port, messages) as client,
        Client(port, messages) as other,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        observation = robot.observation(prompt="go")
        assert not client.status().is_ready
        assert client.predict(observation).status == MODEL_NOT_LOADED
        load = pool.submit(client.configure, checkpoint_dir=str(folder / "one"), default_prompt="wipe")
        time.sleep(0.4)
        assert client.predict(observation).status == NOT_READY
        assert load.result().is_ready
        assert load.result().message == "serving one"
        assert load.result().current_prompt == "wipe"
        assert np.array_equal(np.float32(client.predict(observation).values), robot.chunk("go")[0])
        failed = other.configure(checkpoint_dir=str(folder / "missing"))
        assert not failed.is_ready
        assert failed.message.startswith("INVALID_INPUT: there is no checkpoint at")
        assert other.predict(observation).status == MODEL_NOT_LOADED
        assert np.array_equal(np.float32(client.predict(observation).values), robot.chunk("go")[1])
        swapped = other.configure(checkpoint_dir=str(folder / "two"))
        assert (swapped.is_ready, swapped.action_horizon, swapped.current_prompt) == (True, 3, "")
        assert other.predict(observation).status == OK
        replaced = client.predict(observation)
        assert (replaced.status, list(replaced.values)) == (MODEL_NOT_LOADED, [])
        assert "had two loaded in place of one: call Reset" in replaced.error_message
        assert not client.status().is_ready
        client.reset()
        assert client.status().model_name == "two"
        assert np.array_equal(np.float32(client.predict(observation).values), robot.chunk("go")[0])
        assert "Traceback" not in process.output


def test_a_slow_policy_blocks_nobody_and_the_end_is_told(folder, messages, robot):
    """GetStatus is quick during an inference; more calls than workers are refused; an open stream is ended."""
    checkpoint = write_checkpoint(folder / "slow", delay_s=3.0, **FIELDS)
    with (
        grpc_gateway(checkpoint, workers=2) as (process, port),
        Client(port, messages) as client,
        Client(port, messages) as other,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        other.status()
        slow = pool.submit(client.predict, robot.observation())
        time.sleep(0.3)
        assert other.status().is_ready
        assert not slow.done()
        assert slow.result().status == OK
        refused(
            grpc.StatusCode.DEADLINE_EXCEEDED, client.predict, robot.observation(frame_index=-1), timeout=0.2
        )
        assert client.predict(robot.observation()).status == OK

        leave = threading.Event()

        def observations():
            yield robot.observation()
            leave.wait(20)

        streams = [connection.stream(observations()) for connection in (client, other)]
        assert [next(stream).status for stream in streams] == [OK, OK]
        refused(grpc.StatusCode.RESOURCE_EXHAUSTED, client.status)
        started = time.monotonic()
        assert process.end() == 0
        assert time.monotonic() - started < 10
        for stream in streams:
            assert "shutting down" in refused(grpc.StatusCode.UNAVAILABLE, next, stream)
        leave.set()
        assert float(process.wait_for(r"stopped in ([\d.]+)")[1]) < 3
        assert "Traceback" not in process.output


def test_a_key_opens_every_call(folder, messages, robot):
    """No key, a wrong one or another scheme: UNAUTHENTICATED, streams too."""
    checkpoint = write_checkpoint(folder / "keyed", **FIELDS)
    with grpc_gateway(checkpoint, api_key="sesame") as (_, port):
        for key in (None, "Api-Key wrong", "Basic sesame", "sesame"):
            with Client(port, messages, key=key) as client:
                refused(grpc.StatusCode.UNAUTHENTICATED, client.predict, robot.observation(prompt="go"))
                refused(grpc.StatusCode.UNAUTHENTICATED, next, client.stream(iter([robot.observation()])))
        for key in ("Api-Key sesame", "Bearer sesame"):
            with Client(port, messages, key=key) as client:
                assert client.predict(robot.observation(prompt="go")).status == OK
