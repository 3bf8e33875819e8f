"""`virtual_so101`: an SO-101 without the hardware, for LeRobot's unmodified driver and cameras.

Starts the physics, one servo bus per arm on a pseudo-terminal, the cameras and the control socket; writes the
calibration and camera config files; prints the client's command line and a live line; ends on Ctrl-C or
SIGTERM. Exit status: 0 ended as asked, 1 something failed while it ran, 2 it could not start as asked.

Everything heavy is imported after the command line is read.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from virtual_so101.control import DEFAULT_PORT

if TYPE_CHECKING:
    from virtual_so101.control import ControlServer
    from virtual_so101.faults import Fault
    from virtual_so101.twin import Twin
    from virtual_so101.world import World

__all__ = ["main"]

_CAMERA_PORT = 5555
# The live line: every second on a terminal, every ten seconds in a log.
_LIVE, _LOGGED = 1.0, 10.0
# A thread that wants the interpreter waits at most so long for one that computes, seconds: replies of the
# servo bus have to come within a millisecond.
_SWITCH_INTERVAL = 0.0005


class StartError(RuntimeError):
    """The robot cannot start as asked; the message says why and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command; returns the exit status."""
    args = _parser().parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        return _run(args, stop)
    except StartError as error:
        print(f"virtual_so101: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from virtual_so101 import faults

    parser = argparse.ArgumentParser(
        prog="virtual_so101",
        description="An SO-101 without the hardware: LeRobot's driver and cameras use it as if it were real.",
        epilog="faults:\n" + (faults.__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", default="lift", choices=("lift", "sort", "stack"), help="what stands on the table (lift)")
    add("--arms", type=int, choices=(1, 2), help="number of arms (the task's own: lift 1, sort 2, stack 1)")
    add(
        "--seed", type=int, default=0, metavar="N", help="seed of the first episode and of all randomness (0)"
    )
    add("--no-randomize", action="store_true", help="the same colours, light and camera pose in each episode")
    add(
        "--port-link",
        type=Path,
        default=Path("so101_port"),
        metavar="PATH",
        help="where the serial port appears; with two arms PATH_left and PATH_right (so101_port)",
    )
    add(
        "--robot-id",
        default="virtual",
        metavar="ID",
        help="id under which LeRobot finds the calibration (virtual)",
    )
    add(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="where calibration and config files go (the user's cache)",
    )
    add(
        "--camera-port",
        type=_port,
        default=_CAMERA_PORT,
        metavar="P",
        help=f"TCP port of the first camera, the others follow; 0 chooses ({_CAMERA_PORT})",
    )
    add(
        "--control-port",
        type=_port,
        default=DEFAULT_PORT,
        metavar="P",
        help=f"TCP port of the control socket; 0 chooses ({DEFAULT_PORT})",
    )
    add("--no-cameras", action="store_true", help="no pictures, and no OpenGL needed")
    add("--pace", action="store_true", help="make the bus as slow as 1 Mbit/s and a USB adapter are")
    add(
        "--fault",
        action="append",
        default=[],
        metavar="FAULT",
        help="let something go wrong: [ARM.]KIND[:VALUE][@SECONDS], may be repeated (see below)",
    )
    add(
        "--servo-log",
        type=Path,
        metavar="PATH",
        help="write every goal and torque switch to this JSON-lines file",
    )
    add("--lock-step", action="store_true", help="time moves only by the control socket's step op")
    add("--headless", action="store_true", default=True, help="no window (always: watch the client's panel)")
    add("--exit-with-parent", action="store_true", help="end when the process that started this one is gone")
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a TCP port is a number from 0 to 65535, got {text!r}")
    return int(text)


def _run(args: argparse.Namespace, stop: threading.Event) -> int:
    parent = os.getppid()
    # What is wrong with the command line is said before the physics are loaded.
    faults = _read_faults(args.fault)
    _check_links(args)
    control = _open_control(args, stop)
    sys.setswitchinterval(_SWITCH_INTERVAL)
    twin: Twin | None = None
    info: dict[str, object] = {}
    try:
        world = _build_world(args)
        twin = _build_twin(args, world)
        info = _start(args, world, twin, control, faults)
        return _watch(twin, stop, parent if args.exit_with_parent else None)
    finally:
        if info:
            from virtual_so101.launch import remove_description

            remove_description(info)
        control.close()
        if twin is not None:
            twin.close()


def _read_faults(texts: list[str]) -> list[Fault]:
    from virtual_so101.faults import Fault, FaultError

    try:
        return [Fault.parse(text) for text in texts]
    except FaultError as error:
        raise StartError(str(error)) from None


def _check_links(args: argparse.Namespace) -> None:
    from virtual_so101.bus import PortTakenError, check_link
    from virtual_so101.launch import port_links

    arms = args.arms or (2 if args.task == "sort" else 1)
    try:
        for link in port_links(args.port_link, arms):
            check_link(link)
    except PortTakenError as error:
        raise StartError(str(error)) from None


def _build_world(args: argparse.Namespace) -> World:
    from virtual_so101.gl import PACKAGES, gl_backend

    if not args.no_cameras and gl_backend() is None:
        raise StartError(f"{PACKAGES} Or pass --no-cameras.")
    print(f"Loading the physics for task {args.task} ...", flush=True)
    from virtual_so101.world import World

    try:
        return World(args.task, args.arms, seed=args.seed, randomize=not args.no_randomize)
    except ValueError as error:
        raise StartError(str(error)) from None


def _build_twin(args: argparse.Namespace, world: World) -> Twin:
    from virtual_so101.cameras import PortBusyError
    from virtual_so101.launch import port_links
    from virtual_so101.twin import Twin

    try:
        return Twin(
            world,
            port_links(args.port_link, world.n_arms),
            camera_port=None if args.no_cameras else args.camera_port,
            pace=args.pace,
            log_path=args.servo_log,
            bus_process=True,
            realtime=not args.lock_step,
            seed=args.seed,
        )
    except PortBusyError as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(f"the servo log {args.servo_log} cannot be written: {error}") from None


def _open_control(args: argparse.Namespace, stop: threading.Event) -> ControlServer:
    from virtual_so101.control import ControlServer

    try:
        return ControlServer(port=args.control_port, stop=stop.set)
    except OSError as error:
        raise StartError(
            f"control port {args.control_port} cannot be opened: {error}; stop what uses it or pass another "
            "--control-port (0 chooses one)"
        ) from None


def _start(
    args: argparse.Namespace, world: World, twin: Twin, control: ControlServer, faults: list[Fault]
) -> dict[str, object]:
    from virtual_so101.bus import PortTakenError
    from virtual_so101.faults import FaultError
    from virtual_so101.launch import client_command, default_state_dir, describe, write_state
    from virtual_so101.rendering import RenderingUnavailableError

    try:
        twin.start(faults)
    except (PortTakenError, FaultError) as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(f"the port {args.port_link} cannot be made: {error}") from None
    except RuntimeError as error:
        if isinstance(error.__cause__, RenderingUnavailableError):
            raise StartError(f"{error.__cause__} Or pass --no-cameras.") from None
        raise
    info = describe(
        twin,
        task=args.task,
        prompt=world.task.prompt,
        robot_id=args.robot_id,
        state_dir=args.state_dir or default_state_dir(args.port_link),
    )
    info["control_port"] = control.port
    try:
        write_state(twin, info)
    except OSError as error:
        raise StartError(f"the state folder cannot be written: {error}; pass another --state-dir") from None
    control.start(twin, info)
    arms = "one arm" if info["arms"] == 1 else "two arms"
    print(f"✓ {args.task}: {info['prompt']!r}, {arms}, seed {args.seed}")
    for bus in twin.buses:
        print(
            f"✓ servo bus at {bus.link} ({os.readlink(bus.link) if bus.link.is_symlink() else 'unplugged'})"
        )
    if twin.cameras is not None:
        cameras = ", ".join(f"{n} {p}" for n, p in zip(twin.cameras.names, twin.cameras.ports, strict=True))
        print(f"✓ cameras at 127.0.0.1: {cameras}")
    print(f"✓ control socket at 127.0.0.1:{control.port}")
    print(f"The virtual SO-101 is ready. Run the client:\n\n  {client_command(info)}\n", flush=True)
    return info


def _watch(twin: Twin, stop: threading.Event, parent: int | None) -> int:
    """Show the live line until the end; 1 when a part of the robot failed."""
    terminal = sys.stdout.isatty()
    before, goals = time.monotonic(), [0] * len(twin.buses)
    simulated = float(twin.world.time)
    due = before + (_LIVE if terminal else _LOGGED)
    while not stop.wait(_LIVE):
        try:
            twin.check()
        except RuntimeError as error:
            print(f"\nvirtual_so101: {error}", file=sys.stderr)
            return 1
        if parent is not None and os.getppid() != parent:
            break
        now = time.monotonic()
        if now < due:
            continue
        status = twin.status()
        counts = [bus["goal_packets"] for bus in status["buses"]]
        rates = [(n - old) / (now - before) for n, old in zip(counts, goals, strict=True)]
        speed = max(0.0, status["time"] - simulated) / (now - before)
        line = _live_line(status, rates, speed, twin.success())
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", flush=True)
        before, goals, simulated = now, counts, status["time"]
        due = now + (_LIVE if terminal else _LOGGED)
    if terminal:
        print()
    print("The virtual SO-101 has stopped.", flush=True)
    return 0


def _live_line(status: dict, rates: list[float], speed: float, success: bool) -> str:
    parts = [f"{status['time']:8.1f} s"]
    parts.append("lock step" if status["mode"] == "lockstep" else f"physics {speed:.2f}x")
    parts.append(f"cameras {status['fps']:.1f} fps")
    parts.append("goals " + " + ".join(f"{rate:.1f}" for rate in rates) + " Hz")
    off = [i for i, bus in enumerate(status["buses"]) if not bus["plugged"]]
    if off:
        parts.append("unplugged")
    elif not any(on for bus in status["buses"] for on in bus["torque"]):
        parts.append("torque off")
    parts.append("solved" if success else "not solved")
    return " · ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
