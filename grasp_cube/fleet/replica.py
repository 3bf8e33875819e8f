"""One replica: an actor of Ray Serve with a whole policy server as its child process.

Life cycle: the constructor starts the server and waits until it is warm; then the replica is in the directory. Ray
asks `check_health` and `record_autoscaling_stats`, and calls `__del__` when the replica is to end: its clients are
then sent on, at once where others of the same checkpoint are left, and during an update when their episodes end.
Error policy: a server that does not start is a `RuntimeError` with its last lines, which Ray Serve shows; one that
died fails the health check, and Ray starts another replica.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from typing import Any

import ray
from ray import serve

from grasp_cube.fleet.directory import ACTOR, NAMESPACE, ReplicaEntry
from grasp_cube.serving.access import KEY_VARIABLE

__all__ = ["LOAD", "Replica"]

# The name under which the load is reported.
LOAD = "load"
STATUS_S = 2.0
# How long the server may take to load its policy, in seconds.
START_S = 1800.0
# How long the server may take for its end beside the episodes that are waited for, in seconds.
END_S = 20.0
_READY = re.compile(r"Waiting for client connections at ws://\S+:(\d+)")


class Replica:
    """The class that is deployed. `local` keeps the server to loopback, where the fleet is one machine."""

    def __init__(
        self, policy: str, generation: str, flags: list[str], key: str | None, drain_s: float, local: bool
    ):
        self._key, self._drain_s = key, drain_s
        self._directory = ray.get_actor(ACTOR, namespace=NAMESPACE)
        self._host = "127.0.0.1" if local else ray.util.get_node_ip_address()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._lines: deque[str] = deque(maxlen=20)
        self._ready = threading.Event()
        self._port = 0
        self._server = self._start(flags)
        if not self._ready.wait(START_S):
            self._server.kill()
        if not self._port:
            # Its reader saw the end of the output.
            code = self._server.wait()
            raise RuntimeError(f"the server ended with exit code {code}: {' | '.join(self._lines)}")
        entry = ReplicaEntry(self._name, policy, generation, self._host, self._port, self._server.pid)
        ray.get(self._directory.join.remote(entry))

    def _start(self, flags: list[str]) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.pop(KEY_VARIABLE, None)
        # Ray says 1 to what it counts no cores for.
        environment.pop("OMP_NUM_THREADS", None)
        if self._key is not None:
            environment[KEY_VARIABLE] = self._key
        place = ["--host", self._host, "--port", "0", "--drain-s", str(self._drain_s)]
        server = subprocess.Popen(
            [sys.executable, "-m", "grasp_cube.fleet.guard", *flags, *place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        threading.Thread(target=self._read, args=(server,), name="server-output", daemon=True).start()
        return server

    def _read(self, server: "subprocess.Popen[str]") -> None:
        assert server.stdout is not None
        for line in server.stdout:
            print(line, end="", flush=True)
            self._lines.append(line.strip())
            found = _READY.search(line)
            if found:
                self._port = int(found[1])
                self._ready.set()
        self._ready.set()
        # However it ended: nobody is to be sent there any more.
        with contextlib.suppress(Exception):
            ray.get(self._directory.forget.remote(self._name))

    def check_health(self) -> None:
        code = self._server.poll()
        if code is not None:
            raise RuntimeError(f"the server ended with exit code {code}: {' | '.join(self._lines)}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Requests that wait or run."""
        status = await asyncio.to_thread(self._status)
        return {LOAD: float(status["queue"] + status["running"])}

    def _status(self) -> dict[str, Any]:
        host = f"[{self._host}]" if ":" in self._host else self._host
        request = urllib.request.Request(f"http://{host}:{self._port}/status")
        if self._key is not None:
            request.add_header("Authorization", f"Api-Key {self._key}")
        with urllib.request.urlopen(request, timeout=STATUS_S) as answer:  # a replica of ours, by http  # nosec B310
            return json.load(answer)

    async def __del__(self) -> None:
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        server = getattr(self, "_server", None)
        if server is None or server.poll() is not None:
            return
        replaced: Any = ray.get(self._directory.leave.remote(self._name))
        server.send_signal(signal.SIGTERM)
        if not replaced:
            server.send_signal(signal.SIGINT)
        try:
            server.wait(END_S + (self._drain_s if replaced else 0.0))
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
