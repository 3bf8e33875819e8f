"""The servo buses in a process of their own, so that nothing else in the twin can delay a reply.

In one process a reply waits for whoever holds the interpreter, and on a busy machine that is a physics or
camera thread which has just lost its core. A late reply is more than slow: the driver stays one cycle behind
from then on. Here the bus threads share their interpreter with nobody.

    twin  -- shared memory: positions, velocities, loads, simulated time -->  bus process
          <-- shared memory: arm commands, goal counters --
          -- JSON lines on a socket: start, faults, counters, log -->

`BusProcess` is the twin's end; its `buses` and `log` stand in for `ServoBus` (with its chain) and `ServoLog`.
`python -m virtual_so101.bus_process` is the other end: it lives as long as the socket, ignores Ctrl-C (the
terminal sends it to both), and removes its ports when the twin is gone, however that ended.

Error policy: what an op raises there is raised here, with its type and sentence; a process that is gone
raises `RuntimeError`.
"""

from __future__ import annotations

import json
import mmap
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from virtual_so101.bus import Pace, PortTakenError, ServoBus
from virtual_so101.calibration import ArmCalibration, JointCalibration
from virtual_so101.chain import ServoChain
from virtual_so101.servo_log import ServoLog

__all__ = ["BusProcess", "RemoteBus", "RemoteChain", "RemoteLog"]

# Doubles of one arm: positions, velocities and loads (6 each), the command (4 x 6), the goal counter.
_SENSED, _COMMAND, _COUNTER, _ARM_SIZE = slice(0, 18), slice(18, 42), 42, 43
# Longest wait for an answer, seconds; and for the process to end.
_LIMIT, _END = 10.0, 5.0
_ERRORS = {e.__name__: e for e in (PortTakenError, ValueError, OSError, TimeoutError, RuntimeError)}
# What the twin may call in the other process.
_BUS_OPS = ("start", "lose", "stall", "unplug", "replug", "drain", "counters", "failure")
_CHAIN_OPS = (
    "hold",
    "enable_torque",
    "power_cycle",
    "set_dead",
    "set_overload",
    "wire",
    "as_from_factory",
    "joint_of_id",
)


class _Shared:
    """The shared block: simulated time, then `_ARM_SIZE` doubles per arm."""

    def __init__(self, descriptor: int, arms: int) -> None:
        values = np.frombuffer(mmap.mmap(descriptor, self.size(arms)), dtype=np.float64)
        self.time = values[:1]
        self.arms = [values[1 + _ARM_SIZE * i : 1 + _ARM_SIZE * (i + 1)] for i in range(arms)]

    @staticmethod
    def size(arms: int) -> int:
        """Bytes of the block."""
        return 8 * (1 + _ARM_SIZE * arms)


class BusProcess:
    """Starts the process that will serve `calibrations` on `links`; `close` ends it and removes the links.

    Raises `OSError` where `log_path` cannot be written.
    """

    def __init__(
        self,
        calibrations: Sequence[ArmCalibration],
        links: Sequence[Path],
        *,
        pace: bool = False,
        log_path: Path | None = None,
        seed: int = 0,
    ) -> None:
        arms = len(links)
        with tempfile.TemporaryFile() as memory:
            memory.truncate(_Shared.size(arms))
            self.shared = _Shared(memory.fileno(), arms)
            self._socket, theirs = socket.socketpair()
            passed = (memory.fileno(), theirs.fileno())
            command = [sys.executable, "-m", "virtual_so101.bus_process", *map(str, passed)]
            with theirs:
                self._process = subprocess.Popen(command, pass_fds=passed, stdin=subprocess.DEVNULL)
        self._socket.settimeout(_LIMIT)
        self._file = self._socket.makefile("rb")
        self._lock = threading.Lock()
        self.log = RemoteLog(self)
        pairs = list(zip(links, calibrations, strict=True))
        self.buses = [
            RemoteBus(self, i, link, RemoteChain(self, i, calibration))
            for i, (link, calibration) in enumerate(pairs)
        ]
        for bus in self.buses:
            bus.chain.sense(0.0, bus.chain.calibration.middle, np.zeros(6), np.zeros(6))
        try:
            self.call(
                "setup",
                arms=[
                    {
                        "link": str(link.absolute()),
                        "joints": [vars(joint) for joint in calibration.joints],
                        "middle": calibration.middle.tolist(),
                    }
                    for link, calibration in pairs
                ],
                pace=pace,
                log=str(log_path.absolute()) if log_path is not None else None,
                seed=seed,
            )
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the other process runs."""
        return self._process.poll() is None

    def call(self, op: str, **fields: Any) -> Any:
        """Let the other process do one op; its result."""
        with self._lock:
            try:
                self._socket.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
                line = self._file.readline()
            except (OSError, ValueError) as error:
                raise RuntimeError(f"the servo bus process did not answer {op}: {error}") from error
        if not line:
            raise RuntimeError(f"the servo bus process ended (status {self._process.poll()})")
        reply = json.loads(line)
        if "error" in reply:
            raise _ERRORS.get(reply["kind"], RuntimeError)(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """End the process; it closes its ports and its log. Safe to call twice."""
        # Not only our end: a reader of the same connection would keep it open.
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        self._file.close()
        self._socket.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RemoteLog:
    """`ServoLog` in the bus process."""

    def __init__(self, process: BusProcess) -> None:
        self._process = process

    def add(self, kind: str, **fields: Any) -> None:
        """Append one event, stamped now."""
        self._process.call("log_add", kind=kind, fields=fields)

    def events(self, last: int | None = None) -> list[dict[str, Any]]:
        """The newest events, oldest first."""
        events: list[dict[str, Any]] = self._process.call("log_events", last=last)
        return events

    def close(self) -> None:
        """The bus process closes its log when it ends."""


class RemoteChain:
    """`ServoChain` in the bus process, as the physics and the faults use it."""

    def __init__(self, process: BusProcess, arm: int, calibration: ArmCalibration) -> None:
        self.calibration = calibration
        self._process = process
        self._arm = arm
        self._block = process.shared.arms[arm]

    @property
    def goal_packets(self) -> int:
        """Packets that wrote a goal, since the start."""
        return int(self._block[_COUNTER])

    def sense(self, dt: float, positions: np.ndarray, velocities: np.ndarray, loads: np.ndarray) -> None:
        """Where the physics has the joints: rad, rad/s, fraction of stall; each (6,)."""
        self._block[_SENSED] = np.concatenate((positions, velocities, loads))

    def command(self) -> np.ndarray:
        """What the servos want of their motors, (4, 6): see `virtual_so101.motion`."""
        return self._block[_COMMAND].reshape(4, 6).copy()

    def _call(self, name: str, *args: Any) -> Any:
        return self._process.call("chain", arm=self._arm, name=name, args=args)

    def hold(self) -> None:
        """Forget the goals: every servo holds where it is."""
        self._call("hold")

    def enable_torque(self) -> None:
        """Switch all motors on."""
        self._call("enable_torque")

    def power_cycle(self) -> None:
        """Switch the arm's supply off and on."""
        self._call("power_cycle")

    def set_dead(self, joint: int, dead: bool = True) -> None:
        """Cut (or restore) the power of one servo."""
        self._call("set_dead", joint, dead)

    def set_overload(self, joint: int, overloaded: bool = True) -> None:
        """Trip (or clear) the overload protection of one servo."""
        self._call("set_overload", joint, overloaded)

    def wire(self, joints: Collection[int] | None) -> None:
        """Connect only these joints to the line (None: all)."""
        self._call("wire", None if joints is None else sorted(joints))

    def as_from_factory(self) -> None:
        """All six servos as they come out of the box."""
        self._call("as_from_factory")

    def joint_of_id(self, servo_id: int) -> int:
        """Index of the joint whose servo has this id."""
        return int(self._call("joint_of_id", servo_id))


class RemoteBus:
    """`ServoBus` in the bus process."""

    def __init__(self, process: BusProcess, arm: int, link: Path, chain: RemoteChain) -> None:
        self.link = link
        self.chain = chain
        self._process = process
        self._arm = arm

    def _call(self, name: str, *args: Any) -> Any:
        return self._process.call("bus", arm=self._arm, name=name, args=args)

    def start(self) -> None:
        """Open the port and answer from now on."""
        self._call("start")

    def close(self) -> None:
        """Ends with the process."""
        self._process.close()

    def lose(self, probability: float) -> None:
        """Let every packet vanish with this probability."""
        self._call("lose", probability)

    def stall(self, seconds: float) -> None:
        """Let the line fall silent once, before the next packet."""
        self._call("stall", seconds)

    def unplug(self) -> None:
        """Pull the USB plug."""
        self._call("unplug")

    def replug(self) -> None:
        """Plug it in again."""
        self._call("replug")

    def drain(self) -> None:
        """Wait until the line is quiet."""
        self._call("drain")

    def failure(self) -> str | None:
        """Why the bus no longer answers; None while it does."""
        return self._call("failure") if self._process.alive else "the servo bus process has ended"

    def counters(self) -> dict[str, Any]:
        """See `ServoBus.counters`."""
        counters: dict[str, Any] = self._call("counters")
        return counters


class _SharedChain(ServoChain):
    """The chain in the bus process: measurements come from the shared block, commands go there."""

    def __init__(self, shared: _Shared, arm: int, calibration: ArmCalibration, **options: Any) -> None:
        self._clock = shared.time
        self._block = shared.arms[arm]
        self._taken = 0.0
        super().__init__(calibration, **options)

    def _take_sensed(self) -> None:
        now = float(self._clock[0])
        positions, velocities, loads = self._block[_SENSED].reshape(3, 6).copy()
        # A reset sets the clock back.
        self._elapsed, self._taken = max(0.0, now - self._taken), now
        self._sensed = (positions, velocities, loads)
        super()._take_sensed()

    def _update_command(self) -> None:
        super()._update_command()
        self._block[_COMMAND] = self._command.ravel()

    def _count_goals(self) -> None:
        super()._count_goals()
        self._block[_COUNTER] = self.goal_packets


class _Server:
    """The bus process's side of the socket."""

    def __init__(self, shared: int, connection: socket.socket) -> None:
        self._descriptor = shared
        self._connection = connection
        self._buses: list[ServoBus] = []
        self._log = ServoLog()

    def run(self) -> None:
        """Answer until the twin is gone; then close the ports."""
        try:
            for line in self._connection.makefile("rb"):
                request = json.loads(line)
                try:
                    reply = {"result": getattr(self, f"_op_{request.pop('op')}")(**request)}
                except Exception as error:
                    kinds = [c.__name__ for c in type(error).__mro__ if c.__name__ in _ERRORS]
                    reply = {"error": str(error), "kind": kinds[0] if kinds else "RuntimeError"}
                self._connection.sendall(json.dumps(reply).encode() + b"\n")
        except OSError:
            # The twin went while it was being answered: the same end.
            pass
        finally:
            for bus in self._buses:
                bus.close()
            self._log.close()

    def _op_setup(self, arms: list[dict[str, Any]], pace: bool, log: str | None, seed: int) -> None:
        shared = _Shared(self._descriptor, len(arms))
        self._log = ServoLog(Path(log) if log else None, clock=lambda: float(shared.time[0]))
        for i, arm in enumerate(arms):
            joints = tuple(JointCalibration(**joint) for joint in arm["joints"])
            calibration = ArmCalibration(joints, np.array(arm["middle"]))
            chain = _SharedChain(shared, i, calibration, **self._log.listeners(i))
            link = Path(arm["link"])
            self._buses.append(ServoBus(chain, link, arm=i, pace=Pace() if pace else None, seed=seed + i))

    def _op_bus(self, arm: int, name: str, args: list[Any]) -> Any:
        if name not in _BUS_OPS:
            raise ValueError(f"no bus op {name!r}")
        return getattr(self._buses[arm], name)(*args)

    def _op_chain(self, arm: int, name: str, args: list[Any]) -> Any:
        if name not in _CHAIN_OPS:
            raise ValueError(f"no chain op {name!r}")
        return getattr(self._buses[arm].chain, name)(*args)

    def _op_log_add(self, kind: str, fields: dict[str, Any]) -> None:
        self._log.add(kind, **fields)

    def _op_log_events(self, last: int | None) -> list[dict[str, Any]]:
        return self._log.events(last)


def main() -> None:
    """The bus process: arguments are the descriptors of the shared block and of the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    memory, connection = map(int, sys.argv[1:3])
    _Server(memory, socket.socket(fileno=connection)).run()


if __name__ == "__main__":
    main()
