"""Policies into memory and out of it.

Life cycle: one `Loader` for each server; `bring` for what is asked for, `free` for what is not wanted any more, `close`
at the end.

Reading a checkpoint takes seconds to minutes and is done on a thread of its own, so that the policies that are there
go on serving; the device's thread warms it up and frees it, between two batches. (What a family does while it reads
must therefore leave torch's process-wide defaults alone.) One load runs at a time.

Within a memory budget the policy that was used least recently leaves first, never one that has requests.
Error policy: `PolicyError` for a checkpoint that cannot be served, `WireError` OVERLOADED when there is no room at the
moment. Everything but the reading itself runs on the event loop's thread.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from env_client.wire import ErrorCode, Progress, WireError

from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import Policy, PolicyError
from grasp_cube.serving.memory import give_back
from grasp_cube.serving.scheduler import Scheduler
from grasp_cube.serving.served import ServedPolicy

__all__ = ["Loader", "Tell"]

logger = logging.getLogger(__name__)

# Loads that wait or run; more are answered OVERLOADED.
MAX_LOADS = 8
# How long a load waits for the policies in its way to have no requests, in seconds.
ROOM_S = 10.0
# How often a load that takes its time says that it goes on, in seconds.
SAY_EVERY_S = 5.0
# A load that failed is not tried again for so long, in seconds: requests come 30 times a second.
RETRY_S = 5.0

Tell = Callable[[Progress], None]


class Loader:
    """What is in memory. `budget_bytes` is what it may take, by the size of the checkpoints' files; None: no limit."""

    def __init__(self, scheduler: Scheduler, budget_bytes: int | None = None):
        self.scheduler = scheduler
        self.budget_bytes = budget_bytes
        # Every policy that was in memory and is not forgotten.
        self.known: set[ServedPolicy] = set()
        # Loads that wait or run.
        self.pending = 0
        # Whether failures are told to clients, and so belong into the log; those of the start end the command.
        self.serving = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def close(self) -> None:
        """End; what is being read is left to the process's end."""
        for task in self._tasks:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check_size(self, served: ServedPolicy) -> None:
        """Raises `PolicyError` for a policy that is too large for the budget whatever leaves."""
        if self.budget_bytes is not None and served.size > self.budget_bytes:
            raise PolicyError(
                f"{served.name} takes about {served.size / 1e9:.2f} GB and --memory-budget-gb is "
                f"{self.budget_bytes / 1e9:.2f}: raise it, or serve a smaller model"
            )

    def forget(self, served: ServedPolicy) -> None:
        """Free what nobody asks for any more."""
        self.known.discard(served)
        if served.policy is not None:
            self.keep(asyncio.create_task(self.free(served)))

    async def bring(self, served: ServedPolicy, tell: Tell | None) -> None:
        """Into memory, once however many ask. Raises `PolicyError` or `WireError`."""
        if served.policy is not None:
            return
        if served.failure is not None and time.monotonic() - served.failed < RETRY_S:
            raise PolicyError(served.failure)
        if tell is not None:
            served.listeners.append(tell)
        if served.loading is None:
            if self.pending >= MAX_LOADS:
                raise WireError(ErrorCode.OVERLOADED, "other policies wait to be loaded", retry_after_ms=1000)
            served.loading = asyncio.create_task(self._load(served))
            self.keep(served.loading)
        try:
            await asyncio.shield(served.loading)
        finally:
            if tell in served.listeners:
                served.listeners.remove(tell)

    async def _load(self, served: ServedPolicy) -> None:
        self.pending += 1
        try:
            if self._turn.locked():
                served.say("queued", "waiting for another load")
            async with self._turn:
                await self._make_room(served)
                policy = await self._read(served)
                self.known.add(served)
                served.adopt(policy)
            served.say("ready", f"{served.name} serves")
        except PolicyError as error:
            served.failure, served.failed = str(error), time.monotonic()
            if self.serving:
                logger.warning("%s was not loaded: %s", served.name, error)
            raise
        finally:
            served.loading = None
            self.pending -= 1

    async def _read(self, served: ServedPolicy) -> Policy:
        """The policy, warm."""
        loop = asyncio.get_running_loop()
        started = time.monotonic()

        def report(line: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone when the server ends meanwhile
                loop.call_soon_threadsafe(served.say, "loaded", line)

        served.say("loading", f"loading {served.name}")
        await loop.run_in_executor(self._thread, served.check_unchanged)
        reading = loop.run_in_executor(self._thread, lambda: load_policy(served.config, report=report))
        policy = await _with_signs_of_life(reading, lambda s: served.say("loading", f"loading, {s:.0f} s"))
        loaded = time.monotonic()
        served.say("warming_up", f"loaded in {loaded - started:.1f} s, warming up …")
        try:
            served.check_same(policy)
            await self.scheduler.run(policy.warm_up)
        except BaseException as error:
            await self.scheduler.run(policy.close)
            if isinstance(error, PolicyError | WireError) or not isinstance(error, Exception):
                raise
            logger.exception("%s could not be warmed up", served.name)
            raise PolicyError(
                f"{served.folder} was loaded, but its first inference failed: {error}"
            ) from error
        served.say("loaded", f"warm after {time.monotonic() - loaded:.1f} s")
        return policy

    async def _make_room(self, wanted: ServedPolicy) -> None:
        """Free what was used least recently until `wanted` fits. Raises `PolicyError` when it never does."""
        if self.budget_bytes is None:
            return
        self.check_size(wanted)
        deadline = time.monotonic() + ROOM_S
        while True:
            resident = [served for served in self.known if served.policy is not None]
            if sum(served.size for served in resident) + wanted.size <= self.budget_bytes:
                return
            unused = [served for served in resident if not served.requests]
            if unused:
                oldest = min(unused, key=lambda served: (not served.retired, served.used))
                wanted.say("loading", f"{oldest.name} leaves the memory for {wanted.name}")
                await self.free(oldest)
            elif time.monotonic() > deadline:
                raise WireError(
                    ErrorCode.OVERLOADED,
                    "every policy in memory has requests, and the budget has no room for another: ask again",
                    retry_after_ms=1000,
                )
            else:
                await asyncio.sleep(0.02)

    async def free(self, served: ServedPolicy) -> None:
        """Out of memory; its next request loads it again."""
        policy, served.policy = served.policy, None
        if policy is None:
            return
        logger.info("%s leaves the memory", served.name)
        await self.scheduler.run(policy.close)
        del policy
        await asyncio.get_running_loop().run_in_executor(self._thread, give_back)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """The loop itself holds tasks weakly; and a failure that nobody waits for any more was logged already."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _with_signs_of_life[T](work: asyncio.Future[T], say: Callable[[float], None]) -> T:
    started = time.monotonic()
    while not work.done():
        await asyncio.wait((work,), timeout=SAY_EVERY_S)
        if not work.done():
            say(time.monotonic() - started)
    return work.result()
