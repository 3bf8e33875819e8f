"""Counters and histograms for operators, in Prometheus' text format.

Life cycle: one `ServerMetrics` for each server, with a registry of its own, so that two servers in one process (or
one after the other in tests) never add up. `received`, `failed` and `answered` are called for each request, from any
thread, and cost a few microseconds; gauges are read when `render` is called.
Error policy: nothing here raises on the way of a request; a gauge that cannot be read is NaN.
"""

import math
from collections.abc import Callable

from env_client.wire import ErrorCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

# The header of what `render` returns.
CONTENT_TYPE = CONTENT_TYPE_LATEST

# Upper bounds in seconds, from a small policy on a GPU to a first inference that compiles.
TIME_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# What a request may be counted as; anything else that a client makes up is "other", so that the number of series
# stays bounded.
OPERATIONS = ("infer", "reset", "configure", "set_prompt", "status", "grpc")
OTHER = "other"


class ServerMetrics:
    """What one server has done so far.

    `queue`, `sessions`, `policies` (in memory) and `device_memory` (bytes in use on the device) are read at each
    `render`, on the caller's thread, so they must be quick; None leaves the gauge out.
    """

    def __init__(
        self,
        *,
        queue: Callable[[], float],
        sessions: Callable[[], float],
        policies: Callable[[], float] | None = None,
        device_memory: Callable[[], float] | None = None,
    ):
        self.registry = CollectorRegistry()
        requests = Counter(
            "grasp_cube_requests", "Requests that came, by operation.", ["op"], registry=self.registry
        )
        errors = Counter(
            "grasp_cube_errors", "Requests that were answered by an error.", ["code"], registry=self.registry
        )
        # Looked up once: a lookup by label costs more than the count.
        self._requests = {op: requests.labels(op) for op in (*OPERATIONS, OTHER)}
        self._errors = {str(code): errors.labels(str(code)) for code in (*ErrorCode, OTHER)}
        self._batch_size = Histogram(
            "grasp_cube_batch_size",
            "Requests that shared an inference, as each request found it.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._queue_time = self._times("queue", "From submission to the start of the inference.")
        self._infer_time = self._times("inference", "Of the inference that a request was part of.")
        self._total_time = self._times("total", "From a whole request to its answer, decoding included.")
        self._gauge("grasp_cube_queue_length", "Requests that wait for the device.", queue)
        self._gauge("grasp_cube_sessions", "Clients that are connected.", sessions)
        if policies is not None:
            self._gauge("grasp_cube_policies", "Policies in memory.", policies)
        if device_memory is not None:
            self._gauge("grasp_cube_device_memory_bytes", "Memory in use on the device.", device_memory)

    def received(self, op: str) -> None:
        """Count a request."""
        self._requests.get(op, self._requests[OTHER]).inc()

    def failed(self, code: str) -> None:
        """Count an answer that was an error; `code` is one of `ErrorCode`."""
        self._errors.get(code, self._errors[OTHER]).inc()

    def answered(self, *, queue_ms: float, infer_ms: float, total_ms: float, batch_size: int) -> None:
        """Count an answer that was a chunk, with the fields of the scheduler's `Result`."""
        self._batch_size.observe(batch_size)
        self._queue_time.observe(queue_ms / 1e3)
        self._infer_time.observe(infer_ms / 1e3)
        self._total_time.observe(total_ms / 1e3)

    def render(self) -> bytes:
        """The page for /metrics; its content type is `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def _times(self, name: str, text: str) -> Histogram:
        return Histogram(f"grasp_cube_{name}_seconds", text, buckets=TIME_BUCKETS, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        def value() -> float:
            try:
                return float(read())
            except Exception:
                return math.nan

        Gauge(name, text, registry=self.registry).set_function(value)
