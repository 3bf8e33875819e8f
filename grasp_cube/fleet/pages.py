"""What the fleet says of itself and of all its replicas: /healthz, /readyz, /status and /metrics.

Life cycle: `Pages(config, access)`; `follow` every second asks the replicas, `answer` gives what was heard last, at once.
Error policy: a replica that does not answer is shown as such; its figures are left out until it does.
"""

import asyncio
import http
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from websockets.http11 import Request, Response

from grasp_cube.fleet.config import FleetConfig
from grasp_cube.fleet.directory import ReplicaEntry
from grasp_cube.serving.access import Access, is_loopback
from grasp_cube.serving.pages import PROBES, metrics_page, no_key, probe, status_page
from grasp_cube.serving.websocket import Connection

__all__ = ["Pages", "gathered"]

ASK_S = 2.0
# Of a replica's own status.
SHOWN = ("ready", "sessions", "queue", "running", "uptime_s")


@dataclass
class _Heard:
    """What a replica said last; None: it did not answer."""

    entry: ReplicaEntry
    status: dict[str, Any] | None = None
    metrics: str | None = None


class Pages:
    """Asks the replicas and answers for them."""

    def __init__(self, config: FleetConfig, access: Access):
        self.config = config
        self.updating = False
        self.closing = False
        self._access = access
        self._started = time.monotonic()
        self._heard: list[_Heard] = []

    async def follow(self, session: aiohttp.ClientSession, replicas: Sequence[ReplicaEntry]) -> None:
        """Ask each replica for its figures."""
        self._heard = list(await asyncio.gather(*(self._ask(session, entry) for entry in replicas)))

    async def _ask(self, session: aiohttp.ClientSession, entry: ReplicaEntry) -> _Heard:
        key = self._access.api_key
        headers = {} if key is None else {"Authorization": f"Api-Key {key}"}
        heard = _Heard(entry)
        try:
            async with asyncio.timeout(ASK_S):
                async with session.get(f"http://{entry.address}/status", headers=headers) as answer:
                    heard.status = await answer.json()
                async with session.get(f"http://{entry.address}/metrics", headers=headers) as answer:
                    heard.metrics = await answer.text()
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return _Heard(entry)
        return heard

    # ------------------------------------------------------------------------------------------ answers

    def answer(self, connection: Connection, request: Request) -> Response:
        """To a plain HTTP request, and to a WebSocket whose path names none of the policies."""
        path = request.path.partition("?")[0]
        if path in PROBES:
            return probe(connection, path, self.not_ready)
        allowed = self._access.lets_in(request.headers.get_all("Authorization"))
        address = connection.remote_address
        # HAProxy names whom it asks for.
        forwarded = {name.lower(): value for name, value in request.headers.raw_items()}
        asking = forwarded.pop("x-forwarded-for", address[0] if isinstance(address, tuple) else None)
        if path in ("/metrics", "/status") and (allowed or is_loopback(asking, forwarded)):
            if path == "/metrics":
                return metrics_page(connection, self.metrics())
            return status_page(connection, self.status())
        if not allowed:
            return no_key(connection)
        names = ", ".join(f"/{name}" for name in self.config.policies)
        return connection.respond(
            http.HTTPStatus.NOT_FOUND, f"this fleet serves {names}: connect there by WebSocket\n"
        )

    def not_ready(self) -> str | None:
        """Why robots should not be sent here, None when they should."""
        if self.closing:
            return "the fleet is shutting down"
        ready = {heard.entry.policy for heard in self._heard if _ready(heard)}
        missing = [name for name in self.config.policies if name not in ready]
        return f"no replica of {', '.join(missing)} is ready" if missing else None

    def status(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "ready": self.not_ready() is None,
            "updating": self.updating,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "policies": {
                name: {
                    "path": group.path,
                    "min_replicas": group.min_replicas,
                    "max_replicas": group.max_replicas,
                    "replicas": [_shown(heard) for heard in self._heard if heard.entry.policy == name],
                }
                for name, group in self.config.policies.items()
            },
        }

    def metrics(self) -> bytes:
        """All replicas' figures, with the labels `replica` and `policy`, and how many replicas there are."""
        texts = {
            (heard.entry.replica, heard.entry.policy): heard.metrics
            for heard in self._heard
            if heard.metrics is not None
        }
        replicas = Metric("grasp_cube_replicas", "Replicas of the fleet, by what they do.", "gauge")
        for name in self.config.policies:
            mine = [heard for heard in self._heard if heard.entry.policy == name]
            for state, count in (
                ("ready", sum(_ready(heard) for heard in mine)),
                ("draining", sum(heard.entry.draining for heard in mine)),
                ("silent", sum(heard.status is None for heard in mine)),
            ):
                replicas.add_sample("grasp_cube_replicas", {"policy": name, "state": state}, count)
        return gathered(texts, [replicas])


def gathered(texts: Mapping[tuple[str, str], str], more: Iterable[Metric] = ()) -> bytes:
    """One page from the pages of several replicas, {(replica, policy): page}, in Prometheus' text format."""
    families: dict[str, Metric] = {}
    for (replica, policy), text in texts.items():
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = sample.labels | {"replica": replica, "policy": policy}
                known.add_sample(sample.name, labels, sample.value)

    class _All(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from more
            yield from families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_All())
    return generate_latest(registry)


def _ready(heard: _Heard) -> bool:
    return heard.status is not None and bool(heard.status.get("ready")) and not heard.entry.draining


def _shown(heard: _Heard) -> dict[str, Any]:
    entry = asdict(heard.entry) | {"address": heard.entry.address}
    for name in ("policy", "host", "port"):
        del entry[name]
    told = heard.status or {}
    return entry | {"answers": heard.status is not None} | {name: told.get(name) for name in SHOWN}
