"""What the WebSocket server and the gRPC gateway share: a request on its way to the device, and what is counted.

One request: its reader decodes it (in the image pool) -> `policy.check` names what does not fit -> images that must be
resized are resized in the pool, while the device works on the batch before -> the scheduler -> a chunk.

Life cycle: one for each server; `close` when the sockets are closed.
Error policy: whatever keeps a request from its chunk is a `WireError`; fronts put it into their own words.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any

from env_client.wire import ErrorCode, WireError

from grasp_cube.policies.policy import Policy, PolicyRequest
from grasp_cube.serving.access import Access
from grasp_cube.serving.configure import Policies
from grasp_cube.serving.images import ImagePool
from grasp_cube.serving.jobs import Result
from grasp_cube.serving.limits import LimitsConfig
from grasp_cube.serving.metrics import ServerMetrics
from grasp_cube.serving.scheduler import Scheduler
from grasp_cube.serving.served import ServedPolicy

__all__ = ["PolicyService"]

# Reads a request for a policy: decodes its images, resolves its prompt.
Read = Callable[[Policy], Awaitable[PolicyRequest]]


class PolicyService:
    """The policies at work. `device_memory` gives bytes for /metrics; None leaves the figure out."""

    def __init__(
        self,
        policies: Policies,
        scheduler: Scheduler,
        *,
        access: Access | None = None,
        limits: LimitsConfig | None = None,
        device_memory: Callable[[], float] | None = None,
    ):
        self.policies = policies
        self.scheduler = scheduler
        self.access = access or Access()
        self.limits = limits or LimitsConfig()
        self.images = ImagePool(self.limits.decode_threads, self.limits.max_images)
        self.started = time.monotonic()
        # Set when the server ends, so that nobody sends new robots here.
        self.closing = False
        # Each front counts its own clients.
        self.session_counts: list[Callable[[], int]] = []
        self.metrics = ServerMetrics(
            queue=lambda: scheduler.waiting,
            sessions=lambda: self.sessions,
            policies=lambda: sum(policy["in_memory"] for policy in policies.status()),
            device_memory=device_memory,
        )

    @property
    def sessions(self) -> int:
        """Clients of all fronts."""
        return sum(count() for count in self.session_counts)

    def not_ready(self) -> str | None:
        """Why robots should not be sent here, None when they should."""
        if self.closing:
            return "the server is shutting down"
        if self.scheduler.hangs is not None:
            return self.scheduler.hangs
        if self.policies.ready:
            return None
        return "a policy is being loaded" if self.policies.loading else "no policy is loaded"

    async def answer(
        self,
        served: ServedPolicy,
        read: Read,
        *,
        client: Hashable,
        replaceable: bool = False,
        deadline_ms: float | None = None,
    ) -> tuple[Result, float]:
        """A chunk for one request, and the ms from its arrival. Raises `WireError`."""
        started = time.perf_counter()
        with self.policies.use(served):
            policy = await self.policies.loaded(served)
            request = await read(policy)
            group = policy.check(request)
            request = await self.images.resized(request, policy.spec)
            result = await self.scheduler.submit(
                policy,
                request,
                group,
                client=client,
                replaceable=replaceable,
                deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
            )
        total_ms = (time.perf_counter() - started) * 1e3
        # Counted when the answer has left.
        asyncio.get_running_loop().call_soon(
            partial(
                self.metrics.answered,
                queue_ms=result.queue_ms,
                infer_ms=result.infer_ms,
                total_ms=total_ms,
                batch_size=result.batch_size,
            )
        )
        return result, total_ms

    def refuse_full(self, count: int) -> str | None:
        """Why a front that has so many clients takes no more, None when it does."""
        if count >= self.limits.max_sessions:
            return f"{count} clients are connected already, as many as --limits.max-sessions allows"
        return None

    def may_configure(self, *, local: bool) -> None:
        """Raises `WireError` for a client that may not have checkpoints loaded."""
        if not self.access.may_configure(local=local):
            raise WireError(
                ErrorCode.UNAUTHENTICATED,
                "without a key only clients on the server's own machine may configure it: give the server an --api-key",
            )

    def status(self) -> dict[str, Any]:
        """The server's state as plain values."""
        return {
            "ready": self.not_ready() is None,
            "loading": self.policies.loading,
            "sessions": self.sessions,
            "queue": self.scheduler.waiting,
            "running": self.scheduler.running,
            "uptime_s": round(time.monotonic() - self.started, 1),
            "policies": self.policies.status(),
        }

    def close(self) -> None:
        self.images.close()
        self.policies.loader.close()
