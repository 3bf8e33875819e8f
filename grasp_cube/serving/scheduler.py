"""Requests -> batches -> the one thread that owns the device.

Life cycle: `start` begins the thread; `run` executes anything on it (warming up, freeing); `submit` queues a
request and returns a future; `close` finishes the running batch, answers the waiting ones and ends the thread.
Error policy: a policy that fails fails one batch; the thread lives as long as the server. A batch that is too large
for the device's memory is halved until it fits; a single request that does not is answered OVERLOADED. A request that
waits longer than its deadline is refused, one whose client has gone is not computed. Nobody can interrupt an inference
that hangs: who waits for it is told so, new requests are refused, and when it returns after all, the server goes on.

A batch begins with the oldest request of the client that has waited longest for its turn, and takes one request of
each client in turn that may share it, round after round: who asks often waits behind who asks rarely.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from env_client.wire import ErrorCode, WireError

from grasp_cube.policies.chunk import check_chunk
from grasp_cube.policies.devices import free_device_cache, is_out_of_memory
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest
from grasp_cube.serving.jobs import Job, Result, settle, tell

__all__ = ["BatchingConfig", "Scheduler"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchingConfig:
    """How requests become batches."""

    # Most requests that share one inference.
    max_size: int = 8
    # How long a batch that is not full waits for more, in ms; 0: what has queued while the device was busy.
    max_wait_ms: float = 0.0
    # Most requests that wait; more are answered OVERLOADED.
    max_queue: int = 64
    # A request that has waited so long is answered OVERLOADED, in seconds.
    deadline_s: float = 30.0
    # An inference that takes longer hangs: /readyz says so, and requests are refused, in seconds.
    hang_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_size < 1 or self.max_queue < 1:
            raise ValueError(
                "--batching.max-size and --batching.max-queue are numbers of requests, at least 1"
            )
        if self.max_wait_ms < 0 or self.deadline_s <= 0 or self.hang_s <= 0:
            raise ValueError(
                "--batching.max-wait-ms is 0 or above, --batching.deadline-s and --batching.hang-s above 0"
            )


class Scheduler:
    """The queue and the device's thread. `submit` is called on the event loop's thread only."""

    def __init__(self, config: BatchingConfig | None = None):
        self.config = config or BatchingConfig()
        self._tasks: deque[Callable[[], None]] = deque()
        # The waiting requests of each client, oldest first; the clients in the order of their turns.
        self._turns: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        # Requests that wait.
        self.waiting = 0
        self._lock = threading.Lock()
        # One token for each entry, which may be gone by then. A queue of C wakes the thread with less work than a
        # condition variable, whose waiter needs the lock and the interpreter that the notifier still holds.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closed = False
        # Requests in the batch that the device works on.
        self.running = 0
        # When that batch began; None while the device rests.
        self._began: float | None = None
        # The batch of which the log says already that it hangs.
        self._said_of: float | None = None
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def hangs(self) -> str | None:
        """Why nothing is computed any more; None while all is well."""
        began = self._began
        if began is None or time.perf_counter() - began < self.config.hang_s:
            return None
        return f"the policy hangs: one inference has been running for {time.perf_counter() - began:.0f} s"

    async def run[T](self, call: Callable[[], T]) -> T:
        """The value of `call`, made by the device's thread after the batch that runs."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def task() -> None:
            outcome: Any
            try:
                outcome = call()
            except BaseException as error:
                outcome = error
            tell(loop, future, outcome)

        with self._lock:
            self._refuse_when_closed()
            self._tasks.append(task)
        self._tokens.put(None)
        return await future

    def submit(
        self,
        policy: Policy,
        request: PolicyRequest,
        group: Hashable,
        *,
        client: Hashable,
        replaceable: bool,
        deadline_s: float | None = None,
    ) -> asyncio.Future[Result]:
        """Queue a request that `policy.check` has accepted.

        A newer `replaceable` request of the same client replaces an older one that has not started, which is
        answered SUPERSEDED. Raises `WireError` OVERLOADED when the queue is full; so ends a request that waits
        longer than `deadline_s` or the server's own deadline.
        """
        hangs = self.hangs
        if hangs is not None:
            raise WireError(ErrorCode.NOT_READY, hangs, retry_after_ms=1000)
        loop = asyncio.get_running_loop()
        job = Job(policy, request, group, client, replaceable, loop.create_future(), loop)
        if replaceable:
            self._supersede(client)
        with self._lock:
            self._refuse_when_closed()
            if self.waiting >= self.config.max_queue:
                raise WireError(
                    ErrorCode.OVERLOADED,
                    f"{self.config.max_queue} requests wait already: ask again later, or less often",
                    retry_after_ms=100,
                )
            self._turns.setdefault(client, deque()).append(job)
            self.waiting += 1
        self._tokens.put(None)
        limit = min(deadline_s or self.config.deadline_s, self.config.deadline_s)
        job.timer = loop.call_later(min(limit, self.config.hang_s), self._look_after, job, limit)
        # Also when its client is gone: then nobody else takes it out.
        job.future.add_done_callback(lambda _: self._settled(job))
        return job.future

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise WireError(ErrorCode.NOT_READY, "the server is shutting down")

    def _supersede(self, client: Hashable) -> None:
        with self._lock:
            old = [job for job in self._turns.get(client, ()) if job.replaceable]
            for job in old:
                self._remove(job)
        for job in old:
            settle(
                job.future,
                WireError(ErrorCode.SUPERSEDED, "a newer observation of this client replaced this one"),
            )

    def _look_after(self, job: Job, limit: float) -> None:
        """Refuse a job that has waited for `limit` seconds, or whose device hangs; else look again in time."""
        now, began, hangs = time.perf_counter(), self._began, self.hangs
        # A timer may fire some microseconds early.
        late = now > job.submitted + limit - 1e-3
        with self._lock:
            waited = (late or hangs is not None) and self._remove(job)
        if hangs is not None:
            if self._said_of != began:
                self._said_of = began
                logger.error("%s; requests are refused until it returns: restart the server", hangs)
            settle(job.future, WireError(ErrorCode.NOT_READY, hangs, retry_after_ms=1000))
        elif waited:
            settle(
                job.future,
                WireError(
                    ErrorCode.OVERLOADED,
                    f"the request waited for {limit * 1e3:.0f} ms without its turn: ask again with a newer observation",
                    retry_after_ms=100,
                ),
            )
        else:
            hang_s = self.config.hang_s if began is None else began + self.config.hang_s - now
            left = hang_s if late else min(hang_s, job.submitted + limit - now)
            job.timer = job.loop.call_later(max(left, 0.01), self._look_after, job, limit)

    def _settled(self, job: Job) -> None:
        if job.timer is not None:
            job.timer.cancel()
        if job.future.cancelled():
            with self._lock:
                self._remove(job)

    def _remove(self, job: Job) -> bool:
        """Take a job out of the queue, under the lock; whether it was there."""
        jobs = self._turns.get(job.client)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._turns[job.client]
        self.waiting -= 1
        return True

    def close(self, timeout_s: float | None = None) -> bool:
        """End the thread after the running batch; True when it ended in time."""
        with self._lock:
            self._closed = True
            left = [job for jobs in self._turns.values() for job in jobs]
            self._turns.clear()
            self.waiting = 0
        self._tokens.put(None)
        for job in left:
            job.finish(WireError(ErrorCode.NOT_READY, "the server is shutting down"))
        if self._thread.is_alive():
            # An inference that hangs is not waited for.
            self._thread.join(0.0 if self.hangs else timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------- on the device's thread

    def _main(self) -> None:
        while not self._closed:
            # A token that comes after this stands for an entry that `_next` may not see.
            with contextlib.suppress(queue.Empty):
                while True:
                    self._tokens.get_nowait()
            with self._lock:
                task, batch, wait_s = self._next()
            if task is not None:
                task()
            elif batch:
                self._infer(batch)
                self.running, self._began = 0, None
            else:
                with contextlib.suppress(queue.Empty):
                    self._tokens.get(timeout=wait_s)

    def _next(self) -> tuple[Callable[[], None] | None, list[Job], float | None]:
        """A task, or a batch, or how long to wait for one (None: until something comes); under the lock."""
        if self._closed:
            return None, [], 0.0
        if self._tasks:
            return self._tasks.popleft(), [], None
        batch = self._batch()
        if not batch:
            return None, [], None
        if self.config.max_wait_ms and len(batch) < self.config.max_size:
            oldest = min(job.submitted for job in batch)
            wait_s = oldest + self.config.max_wait_ms / 1e3 - time.perf_counter()
            if wait_s > 0:
                return None, [], wait_s
        for job in batch:
            self._remove(job)
            # Who was served goes to the end of the turns.
            if job.client in self._turns:
                self._turns.move_to_end(job.client)
        self.running, self._began = len(batch), time.perf_counter()
        return None, batch, 0.0

    def _batch(self) -> list[Job]:
        """The requests that are computed next, at most `max_size` of one group; under the lock."""
        first = next((jobs[0] for jobs in self._turns.values()), None)
        if first is None:
            return []
        batch: list[Job] = []
        for job in self._in_turn():
            if job.may_join(first):
                batch.append(job)
                if len(batch) == self.config.max_size:
                    break
        return batch

    def _in_turn(self) -> Iterator[Job]:
        """One request of each client, then their second ones, and so on."""
        depth = 0
        while True:
            found = False
            for jobs in self._turns.values():
                if depth < len(jobs):
                    found = True
                    yield jobs[depth]
            if not found:
                return
            depth += 1

    def _infer(self, batch: Sequence[Job]) -> None:
        policy = batch[0].policy
        # Each attempt is an inference of its own: parts of a batch that follow one another are no hang.
        started = self._began = time.perf_counter()
        too_large = False
        try:
            chunks = policy.get_actions_batch([job.request for job in batch])
            if len(chunks) != len(batch):
                raise PolicyError(f"the policy gave {len(chunks)} chunks for {len(batch)} requests")
        except WireError as error:
            self._fail(batch, error)
            return
        except BaseException as error:  # also a policy's sys.exit: without this thread nobody is served
            too_large = is_out_of_memory(error)
            if not too_large:
                logger.exception("inference failed")
                said = (
                    str(error)
                    if isinstance(error, PolicyError)
                    else "the policy failed; the server's log says why"
                )
                self._fail(batch, WireError(ErrorCode.INTERNAL, said))
                return
            logger.warning("no memory for %d request(s): %s", len(batch), error)
        # Here the exception is gone, and with it what its frames held of the device's memory.
        if too_large:
            self._halve(batch)
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

    def _halve(self, batch: Sequence[Job]) -> None:
        """What does not fit into the device's memory at once is computed in two parts."""
        free_device_cache()
        if len(batch) > 1:
            self._infer(batch[: len(batch) // 2])
            self._infer(batch[len(batch) // 2 :])
            return
        batch[0].finish(
            WireError(
                ErrorCode.OVERLOADED,
                "the device has no memory left for even one request: ask again later, or serve a smaller model",
                retry_after_ms=1000,
            )
        )

    def _fail(self, batch: Sequence[Job], error: WireError) -> None:
        """One bad request must not spoil the batch that it came in: each is tried alone."""
        if len(batch) == 1:
            batch[0].finish(error)
            return
        for job in batch:
            self._infer([job])
