"""`serve_fleet`: many policy servers behind one address, from one file.

    serve_fleet --config configs/fleet.yaml              start, and serve until a signal
    serve_fleet --config configs/fleet.yaml --update     have the running fleet take over the changed file

Life cycle: the port is taken first, then Ray starts the replicas; robots are let in when every policy has one. SIGINT or
SIGTERM sends the robots away after the answers to what they asked, and ends Ray where this command started it. An update
replaces one replica after the other: new ones are ready before old ones let their robots finish their episodes. One that
fails leaves the old ones serving.
Exit codes: 0; 1 when an update failed; 2 with one sentence when the fleet cannot start; 130 when it was stopped before.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from env_client.cli import fail, parse

from grasp_cube.fleet.config import FleetConfig
from grasp_cube.policies.policy import PolicyError
from grasp_cube.serving.access import is_loopback

if TYPE_CHECKING:
    from grasp_cube.fleet.running import Fleet

__all__ = ["main"]

PROG = "serve_fleet"
DESCRIPTION = "Serve policies on many GPUs at one address, with as many servers as the robots need."


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = [
        "--config-path" + text.removeprefix("--config") if text.partition("=")[0] == "--config" else text
        for text in (sys.argv[1:] if argv is None else argv)
    ]
    config = parse(FleetConfig, arguments, prog=PROG, description=DESCRIPTION)
    try:
        config.check_paths()
        try:
            from grasp_cube.fleet import running
        except ImportError as error:
            raise PolicyError(
                f"the fleet needs Ray Serve ({error}): pip install 'grasp-cube[fleet]', or uv sync --extra fleet"
            ) from error
        code = running.update(config) if config.update else asyncio.run(_serve(config))
    except PolicyError as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        fail(PROG, "interrupted", 130)
    raise SystemExit(code)


async def _serve(config: FleetConfig) -> int:
    from grasp_cube.fleet.running import Fleet

    stop = asyncio.Event()
    async with Fleet.started(config) as fleet:
        # Ray has handlers of its own, which end the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        for name, group in config.policies.items():
            print(f"… {name}: {group.min_replicas} of {group.path}", flush=True)
        if not await fleet.until_ready(stop):
            print("Stopped while loading.", flush=True)
            return 130
        _announce(config, fleet)
        await fleet.until(stop)
        print("Stopping …", flush=True)
    print("Stopped.", flush=True)
    return 0


def _announce(config: FleetConfig, fleet: "Fleet") -> None:
    host, port = fleet.address
    if fleet.key is None and not is_loopback(host):
        print("! no --api-key: everybody who can reach this port can ask for actions", flush=True)
    shown = f"{'wss' if config.tls_pem else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"✓ policies by name: {', '.join(f'{shown}/{name}' for name in config.policies)}", flush=True)
    with contextlib.suppress(BrokenPipeError):
        print(f"Waiting for client connections at {shown}", flush=True)


if __name__ == "__main__":
    main()
