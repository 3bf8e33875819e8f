"""The control socket: what no real robot offers (reset, success, faults, lock step), beside the servo bus.

TCP on 127.0.0.1; one JSON object per line each way, strictly request and reply; several connections may be
open. A request is `{"op": NAME, ...}`, a reply `{"ok": true, ...}` or `{"ok": false, "error": sentence}`;
a bad request never closes the connection. A line longer than 1 MiB does, and so does one that speaks HTTP.

    reset      seed?: int                 new episode                 -> time
    success                               is the task solved          -> success
    status                                clocks and counters         -> fields of `Twin.status`, success
    info                                  paths, ports, joint limits  -> what the command wrote to robot.json
    pause                                 from real time to lock step
    resume                                back to real time
    step       dt: s, goals?: [n per arm], pictures?: bool
                                          lock step: advance          -> time, success, goal_packets
    render                                pictures of this moment     -> time, images {name: base64 JPEG}
    fault      fault: str                 see `virtual_so101.faults`
    hand       arm?: int, positions: [6 rad] | null   move an arm by hand, or let go
    servo_log  last?: int                 newest events               -> events (see `virtual_so101.servo_log`)
    stop                                  end the command

Pictures are JPEG as `ZMQCamera` gets them: decoded by OpenCV without swapping channels they are RGB.
In lock step `step` sees what was sent to the bus before; name the goal packets that you have sent (`goals`)
to rely on it under any load. Importing this module needs the standard library only.

From a shell: `python -m virtual_so101.control [--port P] OP [VALUE]`, for example `fault late:80`, `reset 7`,
`step 0.5`, `status`.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virtual_so101.twin import Twin

__all__ = ["DEFAULT_PORT", "ControlClient", "ControlError", "ControlServer", "main"]

# Where the command listens unless it is told otherwise.
DEFAULT_PORT = 5550
_ADDRESS = "127.0.0.1"
_LONGEST_LINE = 1 << 20
# Events that one servo_log reply holds at most.
_MOST_EVENTS = 10_000


class ControlError(RuntimeError):
    """The virtual robot refused an op, or its control socket cannot be reached; the message says why."""


class ControlServer:
    """Takes the port at once (0: the system chooses) and serves `twin` from `start` on.

    `stop` is called when a client asks the command to end. Raises `OSError` where the port is in use.
    """

    def __init__(self, *, port: int = 0, stop: Callable[[], None] = lambda: None) -> None:
        self.info: dict[str, Any] = {}
        self._stop = stop
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                while line := self.rfile.readline(_LONGEST_LINE + 1):
                    # A web page could post lines to this port; it cannot do so without naming its protocol.
                    if len(line) > _LONGEST_LINE or b" HTTP/" in line:
                        return
                    reply = outer.answer(line)
                    try:
                        self.wfile.write(json.dumps(reply).encode() + b"\n")
                    except OSError:
                        return

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server((_ADDRESS, port), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="control", daemon=True)

    def start(self, twin: Twin, info: dict[str, Any] | None = None) -> None:
        """Answer from now on; `info` is what the op of that name replies."""
        self._twin = twin
        self.info = info or {}
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(5.0)
        self._server.server_close()

    def answer(self, line: bytes) -> dict[str, Any]:
        """The reply to one request line."""
        try:
            request = json.loads(line)
        except ValueError as error:
            return _refusal(f"expected one JSON object per line: {error}")
        if not isinstance(request, dict) or not isinstance(request.get("op"), str):
            return _refusal('expected an object with a string "op", for example {"op": "status"}')
        op = request.pop("op")
        handler = getattr(self, f"_op_{op}", None)
        if handler is None:
            ops = sorted(name.removeprefix("_op_") for name in dir(self) if name.startswith("_op_"))
            return _refusal(f"unknown op {op!r}; known are {', '.join(ops)}")
        try:
            result = handler(**request)
        except TypeError as error:
            return _refusal(f"op {op} does not take these fields: {error}")
        except Exception as error:
            return _refusal(str(error))
        return {"ok": True, **(result or {})}

    def _op_reset(self, seed: int | None = None) -> dict[str, Any]:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"seed must be a whole number or null, got {seed!r}")
        self._twin.check()
        self._twin.reset(seed)
        return {"time": self._twin.world.time}

    def _op_success(self) -> dict[str, Any]:
        return {"success": self._twin.success()}

    def _op_status(self) -> dict[str, Any]:
        self._twin.check()
        return {**self._twin.status(), "success": self._twin.success()}

    def _op_info(self) -> dict[str, Any]:
        return self.info

    def _op_pause(self) -> None:
        self._twin.pause()

    def _op_resume(self) -> None:
        self._twin.resume()

    def _op_step(
        self, dt: float, goals: Sequence[int] | None = None, pictures: bool = True
    ) -> dict[str, Any]:
        if isinstance(dt, bool) or not isinstance(dt, int | float):
            raise ValueError(f"dt must be a number of seconds, got {dt!r}")
        self._twin.check()
        self._twin.step(float(dt), goals, pictures=bool(pictures))
        return {
            "time": self._twin.world.time,
            "success": self._twin.success(),
            "goal_packets": [chain.goal_packets for chain in self._twin.chains],
        }

    def _op_render(self) -> dict[str, Any]:
        return {"time": self._twin.world.time, "images": self._twin.publish()}

    def _op_fault(self, fault: str) -> None:
        from virtual_so101.faults import Fault

        self._twin.apply(Fault.parse(str(fault)))

    def _op_hand(self, positions: Sequence[float] | None, arm: int = 0) -> None:
        self._twin.move_by_hand(arm, positions)

    def _op_servo_log(self, last: int = 1000) -> dict[str, Any]:
        if not 0 < last <= _MOST_EVENTS:
            raise ValueError(f"last must be from 1 to {_MOST_EVENTS}, got {last!r}")
        return {"events": self._twin.log.events(last)}

    def _op_stop(self) -> None:
        self._stop()


def _refusal(message: str) -> dict[str, Any]:
    return {"ok": False, "error": message}


class ControlClient:
    """The other end, for tests, `--env.type virtual` and evaluation. Not thread-safe; use one per thread."""

    def __init__(self, port: int, host: str = _ADDRESS, *, timeout: float = 30.0) -> None:
        """Connect; `timeout` (seconds) also limits each reply."""
        try:
            self._socket = socket.create_connection((host, port), timeout=timeout)
        except OSError as error:
            raise ControlError(
                f"no virtual robot answers at {host}:{port} ({error}); is virtual_so101 running, and is this "
                "its control port?"
            ) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the robot goes on."""
        self._file.close()
        self._socket.close()

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send one op; its reply. Raises `ControlError` where it was refused or the robot is gone."""
        try:
            self._socket.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            line = self._file.readline()
        except OSError as error:
            raise ControlError(f"the virtual robot did not answer {op}: {error}") from error
        if not line:
            raise ControlError(f"the virtual robot closed its control socket during {op}")
        reply: dict[str, Any] = json.loads(line)
        if not reply.pop("ok"):
            raise ControlError(reply["error"])
        return reply

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode."""
        self.call("reset", seed=seed)

    def success(self) -> bool:
        """Whether the task is solved now."""
        return bool(self.call("success")["success"])

    def status(self) -> dict[str, Any]:
        """Clocks and counters."""
        return self.call("status")

    def info(self) -> dict[str, Any]:
        """Paths, ports, calibration and joint limits."""
        return self.call("info")

    def pause(self) -> None:
        """Switch to lock step."""
        self.call("pause")

    def resume(self) -> None:
        """Switch to real time."""
        self.call("resume")

    def step(self, dt: float, goals: Sequence[int] | None = None, *, pictures: bool = True) -> dict[str, Any]:
        """Advance `dt` seconds in lock step: time, success, goal_packets (see `Twin.step`)."""
        counts = None if goals is None else list(goals)
        return self.call("step", dt=dt, goals=counts, pictures=pictures)

    def render(self) -> dict[str, bytes]:
        """Pictures of this moment: name -> JPEG (channels as `ZMQCamera` expects them)."""
        import base64

        return {name: base64.b64decode(data) for name, data in self.call("render")["images"].items()}

    def fault(self, fault: str) -> None:
        """Let a fault happen, for example `lost:0.05` (see `virtual_so101.faults`)."""
        self.call("fault", fault=fault)

    def hand(self, positions: Sequence[float] | None, arm: int = 0) -> None:
        """Move an arm by hand to these joint angles (rad), or let go (None)."""
        self.call("hand", arm=arm, positions=None if positions is None else [float(p) for p in positions])

    def servo_log(self, last: int = 1000) -> list[dict[str, Any]]:
        """The newest events that the bus saw, oldest first."""
        events: list[dict[str, Any]] = self.call("servo_log", last=last)["events"]
        return events

    def stop(self) -> None:
        """Ask the command to end."""
        self.call("stop")


# The field that the shell's VALUE goes to.
_SHELL_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "fault": ("fault", str),
    "reset": ("seed", int),
    "step": ("dt", float),
    "servo_log": ("last", int),
}


def main(argv: list[str] | None = None) -> int:
    """Send one op from a shell and print its reply; the exit status is 1 where it was refused."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(prog="python -m virtual_so101.control", description="Send one op.")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"the control port ({DEFAULT_PORT})")
    parser.add_argument(
        "op", help="reset, success, status, info, pause, resume, step, fault, servo_log, stop"
    )
    parser.add_argument("value", nargs="?", help="fault: what goes wrong; reset: the seed; step: seconds")
    args = parser.parse_args(argv)
    fields: dict[str, Any] = {}
    if args.value is not None:
        if args.op not in _SHELL_FIELDS:
            parser.error(f"{args.op} takes no value, got {args.value!r}")
        name, read = _SHELL_FIELDS[args.op]
        try:
            fields[name] = read(args.value)
        except ValueError:
            parser.error(f"{args.op} needs {read.__name__} {name}, got {args.value!r}")
    try:
        with ControlClient(args.port) as client:
            print(json.dumps(client.call(args.op, **fields), indent=2))
    except ControlError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
