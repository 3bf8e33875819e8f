"""`serve_policy`: read the config, load the policies, serve.

Life cycle: the port is taken before anything is loaded (a busy one is told at once), it listens only when the
policies are loaded and warm, and SIGINT or SIGTERM ends it: its clients get the answers to what they asked and are told
to connect again (`serving/draining.py`). Without a checkpoint it listens at once and waits for a client to say what is served.
"""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from env_client.cli import fail, parse
from env_client.wire import Progress

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.places import checkpoint_name
from grasp_cube.policies.policy import PolicyError
from grasp_cube.serving.access import Access, TlsConfig, is_loopback, read_key
from grasp_cube.serving.limits import LimitsConfig
from grasp_cube.serving.logs import LogFormat, set_up, tell
from grasp_cube.serving.scheduler import BatchingConfig

if TYPE_CHECKING:
    from grasp_cube.serving.service import PolicyService

__all__ = ["GrpcConfig", "ServeConfig", "ServedConfig", "main", "serve"]

PROG = "serve_policy"
DESCRIPTION = "Serve an ACT, Diffusion, Pi0 or Pi0.5 checkpoint to robots over a WebSocket."

# How long the end of a running inference is waited for at shutdown, in seconds.
SHUTDOWN_S = 60.0


@dataclass(frozen=True)
class ServedConfig(PolicyConfig):
    """What is served: one set of options for one or several checkpoints."""

    # Folder of a checkpoint, or NAME=FOLDER; may be given several times: clients choose by the URL (ws://HOST:8000/NAME). Without one, and without a task, the server waits for a client to configure it.
    path: tuple[str, ...] = ()  # type: ignore[assignment]
    # Where the checkpoints must lie that clients may name; default: the folder of the command, on a server that was started without a checkpoint.
    root: Path | None = None

    def one(self, path: str | None = None, name: str | None = None) -> PolicyConfig:
        """The config of one checkpoint."""
        plain = {field.name: getattr(self, field.name) for field in fields(PolicyConfig)}
        return PolicyConfig(**plain | {"path": path, "name": name or self.name})

    def each(self) -> Iterator[tuple[str, PolicyConfig]]:
        """(name, config) of each checkpoint that was given; a single one needs no name."""
        given = []
        for text in self.path:
            name, equals, path = text.partition("=")
            # A folder's own name may hold the sign; a name of ours holds no slash.
            given.append((name, path) if equals and "/" not in name else ("", text))
        taken = [name or checkpoint_name(Path(path).expanduser()) for name, path in given]
        for (name, path), run in zip(given, taken, strict=True):
            if not name and len(given) > 1:
                # Two steps of one run: RUN-050000.
                name = checkpoint_name(Path(path).expanduser(), with_step=taken.count(run) > 1)
            yield name, self.one(path, name)
        if not self.path and self.task is not None:
            yield "", self.one()


@dataclass(frozen=True)
class GrpcConfig:
    """The gateway for robots that speak the older gRPC service OpenPiInferenceService."""

    # Its port, such as 50052; default: none.
    port: int | None = None
    # Calls that it handles at the same time.
    workers: int = 10


@dataclass(frozen=True)
class ServeConfig:
    """Everything that `serve_policy` can be told."""

    # What is served.
    policy: ServedConfig = field(default_factory=ServedConfig)
    # Address to listen on; 127.0.0.1 keeps the server to this machine.
    host: str = "0.0.0.0"
    # Port to listen on; 0 takes a free one and prints it.
    port: int = 8000
    # Key that clients must send; default: the key file, else the environment variable GRASP_CUBE_API_KEY, else none.
    api_key: str | None = None
    # File whose first line is the key.
    api_key_file: Path | None = None
    # When the server is told to end, its clients may finish their episodes for so long before they are sent elsewhere, in seconds; a second signal sends them at once.
    drain_s: float = 0.0
    # Origins of web pages that may connect where there is no key, such as https://lab.example; pages of this machine always may.
    allow_origin: tuple[str, ...] = ()
    # What the policies in memory may take, by the size of their files; those used least recently leave first. Default: no limit.
    memory_budget_gb: float | None = None
    # Form of the log's lines.
    log_format: LogFormat = "text"
    # Also log each request.
    verbose: bool = False
    # How requests become batches.
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    # Caps that keep one client from taking everything.
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    # Encrypted connections (wss://), also of the gRPC port.
    tls: TlsConfig = field(default_factory=TlsConfig)
    # Robots that speak the older gRPC service.
    grpc: GrpcConfig = field(default_factory=GrpcConfig)

    def __post_init__(self) -> None:
        if self.memory_budget_gb is not None and self.memory_budget_gb <= 0:
            raise ValueError("--memory-budget-gb is a number of gigabytes above 0")
        if not 0 <= self.drain_s <= 86400:
            raise ValueError("--drain-s is a number of seconds from 0 to 86400 (a day)")


# What the first documents write without the prefix.
ALIASES = {
    "device": "policy.device",
    "task": "policy.task",
    "policy-path": "policy.path",
    "checkpoint": "policy.path",
    "grpc-port": "grpc.port",
    "grpc-workers": "grpc.workers",
    "workers": "grpc.workers",
    "batch-size": "batching.max_size",
    "max-queue": "batching.max_queue",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(ServeConfig, argv, prog=PROG, description=DESCRIPTION, aliases=ALIASES)
    set_up(config.log_format, verbose=config.verbose)
    # torch's worker threads spin while they wait for each other. On a machine with other work to do (a robot client,
    # a recorder) the spinning keeps the core that the other thread needs: seen 4 times slower on two busy cores.
    # Read when torch is imported, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imports and a model make a million objects that stay: looking through them again and again took a quarter of the start.
    # `serve` switches the collector on again.
    gc.disable()
    try:
        code = asyncio.run(serve(config))
    except PolicyError as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        code = 130
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    # Not sys.exit: the device's thread may be inside a native call that nobody can interrupt.
    os._exit(code)


async def serve(config: ServeConfig) -> int:
    """Load, warm up and serve until a signal; the exit code. Raises `PolicyError` before it listens."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    # For what looks at folders. asyncio's own pool adds a thread now and then until it has four more than cores.
    loop.set_default_executor(ThreadPoolExecutor(2, thread_name_prefix="folders"))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    access = Access(read_key(config.api_key, config.api_key_file), config.allow_origin)
    tls = config.tls.context()
    sock = _bind(config.host, config.port)
    _allow_many_files()
    from grasp_cube.serving.configure import Policies
    from grasp_cube.serving.loading import Loader
    from grasp_cube.serving.scheduler import Scheduler

    scheduler = Scheduler(config.batching)
    scheduler.start()
    budget = None if config.memory_budget_gb is None else int(config.memory_budget_gb * 1e9)
    checkpoints = list(config.policy.each())
    root = _root(config.policy.root, idle=not checkpoints)
    policies = Policies(Loader(scheduler, budget), base=config.policy.one(), root=root)
    for name, policy in checkpoints:
        policies.add(policy, name)
    loading = asyncio.create_task(policies.load_first(_say))
    # Imported while the loader's thread imports torch.
    from grasp_cube.policies.devices import device_memory
    from grasp_cube.serving.server import PolicyServer
    from grasp_cube.serving.service import PolicyService

    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        tell("Stopped while loading.")
        return 130
    await loading
    gc.enable()
    service = PolicyService(
        policies, scheduler, access=access, limits=config.limits, device_memory=device_memory
    )
    try:
        server = PolicyServer(service)
        async with server.serving(sock, tls):
            async with _gateway(config, service):
                _announce(sock, config, service)
                await stop.wait()
                tell("Stopping …")
                service.closing = True
                await server.draining.run(config.drain_s, hurry)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(scheduler.close, SHUTDOWN_S), SHUTDOWN_S)
    except OSError as error:
        raise PolicyError(_port_taken(config.host, config.port, error)) from error
    finally:
        service.close()
    tell("Stopped.")
    return 0


@contextlib.asynccontextmanager
async def _gateway(config: ServeConfig, service: "PolicyService") -> AsyncIterator[None]:
    """The gRPC port, open while the block runs; nothing without `--grpc.port`. Raises `PolicyError`."""
    if config.grpc.port is None:
        yield
        return
    from grasp_cube.gateways.grpc import GrpcGateway

    gateway = GrpcGateway(
        service,
        workers=config.grpc.workers,
        host=config.host,
        port=config.grpc.port,
        tls=config.tls.pem(),
    )
    await gateway.start()
    tell(f"✓ gRPC robots at {config.host}:{gateway.port}")
    try:
        yield
    finally:
        await gateway.stop()


def _say(progress: Progress) -> None:
    """A load at the start, on the terminal."""
    if progress.stage != "ready":
        tell(f"{'…' if progress.stage in ('queued', 'loading') else '✓'} {progress.text}")


def _root(given: Path | None, *, idle: bool) -> Path | None:
    """Where clients' checkpoints must lie; None where clients may not name any. Raises `PolicyError`."""
    if given is None:
        return Path.cwd() if idle else None
    root = given.expanduser().resolve()
    if not root.is_dir():
        raise PolicyError(
            f"--policy.root {root} is no folder; the one that holds the checkpoints was expected"
        )
    return root


def _allow_many_files() -> None:
    """As many connections as the system lets this user have: the usual soft limit of 1024 files is soon reached."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


def _announce(sock: socket.socket, config: ServeConfig, service: "PolicyService") -> None:
    host, port = sock.getsockname()[:2]
    if service.access.api_key is None and not is_loopback(host):
        tell("! no --api_key: everybody who can reach this port can ask for actions")
    shown = f"{'wss' if config.tls.cert else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"
    names = [f"{shown}/{name}" for name, _ in config.policy.each() if name]
    if names:
        tell(f"✓ policies by name: {', '.join(names)}")
    if not names and not service.policies.ready:
        tell(
            f"… no policy yet: waiting for a client to configure one (checkpoints below {service.policies.root})",
        )
    tell(f"Waiting for client connections at {shown}")


if __name__ == "__main__":
    main()
