"""How requests become batches: whose turn it is, what may share one, and what is not computed."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from env_client.wire import WireError
from numpy_policy import NumpyPolicy, Options, expected_chunk
from serving_parts import CAMERAS, make_observation

from grasp_cube.policies.policy import PolicyRequest
from grasp_cube.serving.scheduler import BatchingConfig, Scheduler

OPTIONS = Options(cameras=CAMERAS)


class Watched(NumpyPolicy):
    """The NumPy policy, whose batches are written down and may be held up."""

    def __init__(self) -> None:
        super().__init__(OPTIONS)
        self.batches: list[list[str]] = []
        self.held = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def get_actions_batch(self, requests):
        self.batches.append([str(request.prompt) for request in requests])
        self.held.set()
        assert self.go.wait(20)
        return super().get_actions_batch(requests)


def schedule(config: BatchingConfig, test: Callable[[Scheduler, Watched], Awaitable[None]]) -> Watched:
    """Run `test` with a scheduler whose device is held up by a first request until the policy's `go`."""
    policy = Watched()

    async def main() -> None:
        scheduler = Scheduler(config)
        scheduler.start()
        try:
            policy.go.clear()
            first = ask(scheduler, policy, "first", client="first")
            await asyncio.to_thread(policy.held.wait, 20)
            await test(scheduler, policy)
            policy.go.set()
            await first
        finally:
            policy.go.set()
            assert scheduler.close(10)

    asyncio.run(main())
    assert policy.batches[0] == ["first"]
    return policy


def ask(scheduler: Scheduler, policy: Watched, name: str, *, client: str, group=None, **options):
    request = PolicyRequest(make_observation(len(name)), prompt=name)
    return scheduler.submit(policy, request, group, client=client, **({"replaceable": False} | options))


def test_who_asks_often_waits_behind_who_asks_rarely():
    """Of three clients, one with six requests in the queue, each batch of three holds one of each while there are."""

    async def test(scheduler, policy):
        futures = [ask(scheduler, policy, f"greedy {i}", client="greedy") for i in range(6)]
        futures += [ask(scheduler, policy, f"a {i}", client="a") for i in range(2)]
        futures += [ask(scheduler, policy, f"b {i}", client="b") for i in range(1)]
        policy.go.set()
        results = await asyncio.gather(*futures)
        assert [result.batch_size for result in results] == [3] * 9

    policy = schedule(BatchingConfig(max_size=3), test)
    assert policy.batches[1:] == [
        ["greedy 0", "a 0", "b 0"],
        ["greedy 1", "a 1", "greedy 2"],
        ["greedy 3", "greedy 4", "greedy 5"],
    ]


def test_only_what_belongs_together_shares_a_batch():
    """Other groups, and other policies, come in batches of their own, in the order in which they came."""
    other = Watched()

    async def test(scheduler, policy):
        futures = [
            ask(scheduler, policy, "x0", client="a", group="x"),
            ask(scheduler, policy, "y0", client="b", group="y"),
            ask(scheduler, other, "o0", client="c", group="x"),
            ask(scheduler, policy, "x1", client="d", group="x"),
        ]
        policy.go.set()
        for future, name in zip(futures, ("x0", "y0", "o0", "x1"), strict=True):
            expected = expected_chunk(OPTIONS, make_observation(len(name)), (), name)
            assert np.array_equal((await future).actions, expected)

    policy = schedule(BatchingConfig(), test)
    assert policy.batches[1:] == [["x0", "x1"], ["y0"]]
    assert other.batches == [["o0"]]


def test_what_is_not_wanted_any_more_is_not_computed():
    """A replaced observation, one past its deadline, and one whose client has gone."""

    async def test(scheduler, policy):
        old = ask(scheduler, policy, "old", client="a", replaceable=True)
        late = ask(scheduler, policy, "late", client="b", deadline_s=0.01)
        gone = ask(scheduler, policy, "gone", client="c")
        new = ask(scheduler, policy, "new", client="a", replaceable=True)
        kept = ask(scheduler, policy, "kept", client="d")
        gone.cancel()
        for future, code, said in ((old, "SUPERSEDED", "newer"), (late, "OVERLOADED", "10 ms")):
            with pytest.raises(WireError, match=said) as caught:
                await future
            assert caught.value.code == code
        assert scheduler.waiting == 2
        policy.go.set()
        await asyncio.gather(new, kept)

    assert schedule(BatchingConfig(), test).batches[1:] == [["new", "kept"]]


def test_a_full_queue_refuses_and_an_end_answers_everybody():
    """OVERLOADED with a time to come back; NOT_READY for those who wait when the server ends."""

    async def test(scheduler, policy):
        waiting = [ask(scheduler, policy, str(i), client=str(i)) for i in range(2)]
        with pytest.raises(WireError) as caught:
            ask(scheduler, policy, "more", client="more")
        assert (caught.value.code, caught.value.retry_after_ms) == ("OVERLOADED", 100)
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close, 20))
        for future in waiting:
            with pytest.raises(WireError, match="shutting down"):
                await future
        policy.go.set()
        assert await closing
        with pytest.raises(WireError, match="shutting down"):
            ask(scheduler, policy, "late", client="late")

    assert len(schedule(BatchingConfig(max_queue=2), test).batches) == 1


@pytest.mark.parametrize(("max_wait_ms", "clients", "size"), [(60_000, 2, 2), (50, 1, 1)])
def test_a_batch_may_wait_for_company(max_wait_ms, clients, size):
    """With `max_wait_ms`, requests that come one after the other share a batch, which starts at once when it is full;
    a lonely one is answered alone in the end."""
    policy = Watched()

    async def main() -> None:
        scheduler = Scheduler(BatchingConfig(max_size=2, max_wait_ms=max_wait_ms))
        scheduler.start()
        futures = []
        for number in range(clients):
            futures.append(ask(scheduler, policy, str(number), client=str(number)))
            # The device's thread has seen it, and waits.
            await scheduler.run(lambda: None)
        results = await asyncio.wait_for(asyncio.gather(*futures), 30)
        assert [result.batch_size for result in results] == [size] * clients
        assert scheduler.close(10)

    asyncio.run(main())


def test_tasks_come_between_batches():
    """What warms up or frees a policy does not wait for the whole queue."""
    order: list[str] = []

    async def test(scheduler, policy):
        waiting = [ask(scheduler, policy, str(i), client=str(i)) for i in range(3)]
        task = asyncio.create_task(scheduler.run(lambda: order.append(f"after {len(policy.batches)}")))
        await asyncio.sleep(0)
        policy.go.set()
        await asyncio.gather(task, *waiting)

    schedule(BatchingConfig(max_size=1), test)
    assert order == ["after 1"]


def test_a_policy_that_exits_ends_no_thread():
    """`sys.exit` inside a policy fails its request; the next one is answered."""

    class Exits(NumpyPolicy):
        def get_actions_batch(self, requests):
            if requests[0].prompt == "exit":
                raise SystemExit(3)
            return super().get_actions_batch(requests)

    async def main() -> None:
        scheduler = Scheduler()
        scheduler.start()
        policy: Any = Exits(OPTIONS)
        with pytest.raises(WireError, match="the policy failed"):
            await asyncio.wait_for(ask(scheduler, policy, "exit", client=1), 20)
        assert (await asyncio.wait_for(ask(scheduler, policy, "good", client=1), 20)).actions.shape == (16, 6)
        assert scheduler.close(10)

    asyncio.run(main())
