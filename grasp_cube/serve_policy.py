"""`serve_policy`: read the config, load the policy, serve.

Life cycle: the port is taken before anything is loaded (a busy one is told at once), it listens only when the
policy is loaded and warm, and SIGINT or SIGTERM ends it after the inference that is running.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from env_client.cli import fail, parse

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.policy import Policy, PolicyError

if TYPE_CHECKING:
    from grasp_cube.serving.scheduler import Scheduler

__all__ = ["ServeConfig", "main", "serve"]

PROG = "serve_policy"
DESCRIPTION = "Serve an ACT or Diffusion checkpoint to robots over a WebSocket."

# How long the end of a running inference is waited for at shutdown, in seconds.
SHUTDOWN_S = 60.0
# How often a load that takes its time says that it goes on (importing PyTorch and LeRobot alone takes 10 to 25 s).
SAY_EVERY_S = 5.0


@dataclass
class ServeConfig:
    """Everything that `serve_policy` can be told."""

    # What is served.
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    # Address to listen on; 127.0.0.1 keeps the server to this machine.
    host: str = "0.0.0.0"
    # Port to listen on; 0 takes a free one and prints it.
    port: int = 8000
    # Key that clients must send; default: the environment variable GRASP_CUBE_API_KEY, else none.
    api_key: str | None = None
    # Port of the gateway for robots that speak the older gRPC service OpenPiInferenceService, such as 50052; default: none.
    grpc_port: int | None = None
    # Calls that the gateway handles at the same time.
    grpc_workers: int = 10
    # Most requests that share one inference.
    batch_size: int = 8
    # Most requests that wait; more are answered OVERLOADED.
    max_queue: int = 64
    # Also log every request that is refused.
    verbose: bool = False


# What the first documents write without the prefix.
ALIASES = {
    "device": "policy.device",
    "task": "policy.task",
    "policy-path": "policy.path",
    "checkpoint": "policy.path",
    "grpc.port": "grpc_port",
    "grpc.workers": "grpc_workers",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(ServeConfig, argv, prog=PROG, description=DESCRIPTION, aliases=ALIASES)
    logging.basicConfig(
        level=logging.INFO if config.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    # Connections are worth a line each; the library's own lines about them are not.
    logging.getLogger("grasp_cube").setLevel(logging.INFO)
    logging.getLogger("websockets").setLevel(logging.ERROR)
    # torch's worker threads spin while they wait for each other. On a machine with other work to do (a robot client,
    # a recorder) the spinning keeps the core that the other thread needs: seen 4 times slower on two busy cores.
    # Read when torch is imported, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = asyncio.run(serve(config))
    except PolicyError as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the device's thread may be inside a native call that nobody can interrupt.
    os._exit(code)


async def serve(config: ServeConfig) -> int:
    """Load, warm up and serve until a signal; the exit code. Raises `PolicyError` before it listens."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    sock = _bind(config.host, config.port)
    from grasp_cube.serving.scheduler import Scheduler, SchedulerConfig

    scheduler = Scheduler(SchedulerConfig(config.batch_size, config.max_queue))
    scheduler.start()
    loading = asyncio.create_task(scheduler.run(lambda: _load(config.policy)))
    # Imported while the device's thread imports torch.
    from grasp_cube.serving.server import PolicyServer, ServerConfig

    stopping = asyncio.create_task(stop.wait())
    started = time.perf_counter()
    while not (loading.done() or stopping.done()):
        await asyncio.wait((loading, stopping), timeout=SAY_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        if not (loading.done() or stopping.done()):
            print(f"… loading, {time.perf_counter() - started:.0f} s", flush=True)
    if not loading.done():
        print("Stopped while loading.", flush=True)
        return 130
    policy = await loading
    api_key = config.api_key or os.environ.get("GRASP_CUBE_API_KEY")
    server = PolicyServer(policy, scheduler, ServerConfig(api_key))
    try:
        async with server.serving(sock):
            async with _gateway(config, policy, scheduler, api_key):
                _announce(sock, open_to_all=api_key is None)
                await stop.wait()
                print("Stopping …", flush=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(scheduler.close, SHUTDOWN_S), SHUTDOWN_S)
    except OSError as error:
        raise PolicyError(_port_taken(config.host, config.port, error)) from error
    print("Stopped.", flush=True)
    return 0


@contextlib.asynccontextmanager
async def _gateway(
    config: ServeConfig, policy: Policy, scheduler: "Scheduler", api_key: str | None
) -> AsyncIterator[None]:
    """The gRPC port, open while the block runs; nothing without `--grpc.port`. Raises `PolicyError`."""
    if config.grpc_port is None:
        yield
        return
    from grasp_cube.gateways.grpc import GrpcGateway

    gateway = GrpcGateway(
        lambda: policy,
        scheduler,
        workers=config.grpc_workers,
        host=config.host,
        port=config.grpc_port,
        api_key=api_key,
    )
    await gateway.start()
    print(f"✓ gRPC robots at {config.host}:{gateway.port}", flush=True)
    try:
        yield
    finally:
        await gateway.stop()


def _load(config: PolicyConfig):
    """On the device's thread: the policy, warm."""
    from grasp_cube.policies.load import load_policy

    started = time.perf_counter()
    policy = load_policy(config, report=lambda line: print(f"✓ {line}", flush=True))
    loaded = time.perf_counter()
    print(f"✓ loaded in {loaded - started:.1f} s, warming up …", flush=True)
    policy.warm_up()
    print(f"✓ warm after {time.perf_counter() - loaded:.1f} s", flush=True)
    return policy


def _bind(host: str, port: int) -> socket.socket:
    """The bound socket, not yet listening."""
    # The resolver takes larger numbers modulo 65536.
    if not 0 <= port <= 65535:
        raise PolicyError(f"--port is {port}; a number from 0 to 65535 was expected")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        raise PolicyError(_port_taken(host, port, error)) from error
    return sock


def _port_taken(host: str, port: int, error: Exception) -> str:
    return (
        f"{host}:{port} cannot be listened on ({getattr(error, 'strerror', None) or error}): is another server "
        f"running (ss -tlnp | grep {port})? Take another --port or --host"
    )


def _announce(sock: socket.socket, *, open_to_all: bool) -> None:
    host, port = sock.getsockname()[:2]
    if open_to_all and not host.startswith("127.") and host != "::1":
        print("! no --api_key: everybody who can reach this port can ask for actions", flush=True)
    shown = f"[{host}]" if ":" in host else host
    print(f"Waiting for client connections at ws://{shown}:{port}", flush=True)


if __name__ == "__main__":
    main()
