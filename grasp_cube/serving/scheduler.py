"""Requests -> batches -> the one thread that owns the device.

Life cycle: `start` begins the thread; `run` executes anything on it (loading, warming up); `submit` queues a
request and returns a future; `close` finishes the running batch, answers the waiting ones and ends the thread.
Error policy: a policy that fails fails one batch; the thread lives as long as the server.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from env_client.wire import ErrorCode, WireError

from grasp_cube.policies.chunk import check_chunk
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest

__all__ = ["Result", "Scheduler", "SchedulerConfig"]

logger = logging.getLogger(__name__)


@dataclass
class SchedulerConfig:
    """How requests become batches."""

    # Most requests of one batch.
    max_size: int = 8
    # Most requests that wait; more are answered OVERLOADED.
    max_queue: int = 64


@dataclass(frozen=True)
class Result:
    """A chunk and what it cost."""

    # (horizon, action_dim) float32 in the spec's unit, finite.
    actions: np.ndarray
    # From submit to the start of the batch, in ms.
    queue_ms: float
    # Of the whole batch, in ms.
    infer_ms: float
    batch_size: int


@dataclass(eq=False)
class _Job:
    policy: Policy
    request: PolicyRequest
    group: Hashable
    client: object
    replaceable: bool
    future: asyncio.Future[Result]
    loop: asyncio.AbstractEventLoop
    submitted: float = field(default_factory=time.perf_counter)

    def finish(self, outcome: Result | BaseException) -> None:
        _tell(self.loop, self.future, outcome)


class Scheduler:
    """The queue and the device's thread. `submit` is called on the event loop's thread only."""

    def __init__(self, config: SchedulerConfig | None = None):
        self.config = config or SchedulerConfig()
        self._jobs: deque[_Job | Callable[[], None]] = deque()
        self._lock = threading.Lock()
        # One token for each entry, which may be gone by then. A queue of C wakes the thread with less work than a
        # condition variable, whose waiter needs the lock and the interpreter that the notifier still holds.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closed = False
        # Requests in the batch that the device works on.
        self.running = 0
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    @property
    def waiting(self) -> int:
        """Entries in the queue."""
        return len(self._jobs)

    def start(self) -> None:
        self._thread.start()

    async def run[T](self, call: Callable[[], T]) -> T:
        """The value of `call`, made by the device's thread after what is queued before it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def task() -> None:
            outcome: Any
            try:
                outcome = call()
            except BaseException as error:
                outcome = error
            _tell(loop, future, outcome)

        self._put(task)
        return await future

    def submit(
        self,
        policy: Policy,
        request: PolicyRequest,
        group: Hashable,
        *,
        client: object,
        replaceable: bool,
    ) -> asyncio.Future[Result]:
        """Queue a request that `policy.check` has accepted.

        A newer `replaceable` request of the same client replaces an older one that has not started, which is
        answered SUPERSEDED. Raises `WireError` OVERLOADED when the queue is full.
        """
        loop = asyncio.get_running_loop()
        job = _Job(policy, request, group, client, replaceable, loop.create_future(), loop)
        if replaceable:
            self._supersede(client)
        if len(self._jobs) >= self.config.max_queue:
            raise WireError(
                ErrorCode.OVERLOADED,
                f"{self.config.max_queue} requests wait already: ask again later, or less often",
                retry_after_ms=100,
            )
        self._put(job)
        return job.future

    def _supersede(self, client: object) -> None:
        with self._lock:
            old = [
                job
                for job in self._jobs
                if isinstance(job, _Job) and job.client is client and job.replaceable
            ]
            for job in old:
                self._jobs.remove(job)
        for job in old:
            _settle(
                job.future,
                WireError(ErrorCode.SUPERSEDED, "a newer observation of this client replaced this one"),
            )

    def _put(self, entry: "_Job | Callable[[], None]") -> None:
        with self._lock:
            if self._closed:
                raise WireError(ErrorCode.NOT_READY, "the server is shutting down")
            self._jobs.append(entry)
        self._tokens.put(None)

    def close(self, timeout_s: float | None = None) -> bool:
        """End the thread after the running batch; True when it ended in time."""
        with self._lock:
            self._closed = True
            left = list(self._jobs)
            self._jobs.clear()
        self._tokens.put(None)
        for entry in left:
            if isinstance(entry, _Job):
                entry.finish(WireError(ErrorCode.NOT_READY, "the server is shutting down"))
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------- on the device's thread

    def _main(self) -> None:
        while True:
            self._tokens.get()
            with self._lock:
                if self._closed:
                    return
                batch = self._take() if self._jobs else []
            if callable(batch):
                batch()
            elif batch:
                self.running = len(batch)
                self._infer(batch)
                self.running = 0

    def _take(self) -> "list[_Job] | Callable[[], None]":
        """The oldest entry, and with it the waiting requests that may share its batch."""
        first = self._jobs.popleft()
        if not isinstance(first, _Job):
            return first
        batch = [first]
        for job in list(self._jobs):
            if len(batch) == self.config.max_size or not isinstance(job, _Job):
                break
            if job.policy is first.policy and job.group == first.group:
                self._jobs.remove(job)
                batch.append(job)
        return [job for job in batch if not job.future.cancelled()]

    def _infer(self, batch: Sequence[_Job]) -> None:
        policy = batch[0].policy
        started = time.perf_counter()
        try:
            chunks = policy.get_actions_batch([job.request for job in batch])
            if len(chunks) != len(batch):
                raise PolicyError(f"the policy gave {len(chunks)} chunks for {len(batch)} requests")
        except WireError as error:
            self._fail(batch, error)
            return
        except Exception as error:
            logger.exception("inference failed")
            said = (
                str(error)
                if isinstance(error, PolicyError)
                else "the policy failed; the server's log says why"
            )
            self._fail(batch, WireError(ErrorCode.INTERNAL, said))
            return
        infer_ms = (time.perf_counter() - started) * 1e3
        for job, chunk in zip(batch, chunks, strict=True):
            try:
                checked = check_chunk(chunk, policy.spec)
            except WireError as error:
                logger.error("refused a chunk: %s", error.message)
                job.finish(error)
            else:
                job.finish(Result(checked, (started - job.submitted) * 1e3, infer_ms, len(batch)))

    def _fail(self, batch: Sequence[_Job], error: WireError) -> None:
        """One bad request must not spoil the batch that it came in: each is tried alone."""
        if len(batch) == 1:
            batch[0].finish(error)
            return
        for job in batch:
            self._infer([job])


def _tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future, outcome: Any) -> None:
    # A loop that was closed in the meantime has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_settle, future, outcome)


def _settle(future: asyncio.Future, outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
