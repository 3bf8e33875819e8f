"""Action sources: where the control loop's actions come from, chosen by `--execution`.

    make_source("async", client, policy_spec, fps=30.0).next_action(observation, tick) -> (A,) or None

One request is in flight at a time, in one background thread; the loop never waits for it. A chunk is refused as
a whole when it holds a value that is not finite or has another width, when it answers another episode, or when
it is older than the newest request. Every failure of the client is survived: None is returned once the plan is
used up, the loop holds, and the source keeps asking with growing pauses.
"""

from typing import Literal, get_args

from env_client.control.execution import AsyncSource, EnsembleSource, RtcSource, SyncSource
from env_client.control.network import InferClient, NetworkThread, Requester
from env_client.control.plan import Chunk
from env_client.control.source import ActionSource, ChunkSource, Origin, SourceOptions, SourceStats
from env_client.wire import PolicySpec

__all__ = [
    "EXECUTIONS",
    "ActionSource",
    "AsyncSource",
    "Chunk",
    "EnsembleSource",
    "Execution",
    "Origin",
    "RtcSource",
    "SourceOptions",
    "SourceStats",
    "SyncSource",
    "make_source",
]

Execution = Literal["sync", "async", "ensemble", "rtc"]

EXECUTIONS: tuple[Execution, ...] = get_args(Execution)

_SOURCES: dict[str, type[ChunkSource]] = {
    "sync": SyncSource,
    "async": AsyncSource,
    "ensemble": EnsembleSource,
    "rtc": RtcSource,
}


def make_source(
    execution: str,
    client: InferClient | None,
    policy_spec: PolicySpec,
    fps: float,
    options: SourceOptions | None = None,
    *,
    requester: Requester | None = None,
) -> ChunkSource:
    """The action source for `execution`: sync, async, ensemble or rtc.

    `client` is a `WebsocketClientPolicy` or anything with its `infer`; from here on only the source's own thread
    calls it. `requester` takes its place in simulated time.

    Raises `ValueError` for an unknown execution, and for rtc with a policy that cannot be guided.
    """
    if execution not in _SOURCES:
        raise ValueError(f"the execution {execution!r}; one of {', '.join(EXECUTIONS)} was expected")
    options = options or SourceOptions()
    if requester is None:
        if client is None:
            raise ValueError("an action source needs a client or a requester; neither came")
        requester = NetworkThread(client, policy_spec, options.retry_min_s, options.retry_max_s)
    return _SOURCES[execution](requester, policy_spec, fps, options)
