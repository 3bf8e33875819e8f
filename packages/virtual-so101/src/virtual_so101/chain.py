"""Six servos on one line: joint angles on one side, instruction packets on the other. No I/O.

The physics calls `sense` and `command` once per tick; the bus calls `handle` for each packet. Both sides take
the chain's lock for microseconds, so neither waits for the other: a reply never waits for a physics step.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Collection, Iterator

import numpy as np

from virtual_so101.calibration import JOINTS, MID_TICK, TICKS_PER_RAD, ArmCalibration
from virtual_so101.protocol import BROADCAST_ID, Instruction, Packet, status_packet
from virtual_so101.servo import REGISTERS, Servo, from_sign

__all__ = ["GoalListener", "ServoChain"]

# Called with the goals of one packet: joint index -> signed goal ticks, as received, before any limit.
GoalListener = Callable[[dict[int, int]], None]

_GOAL = REGISTERS["goal_position"]
_TORQUE = REGISTERS["torque_enable"].address
_READING = (Instruction.PING, Instruction.READ, Instruction.SYNC_READ)
# Thermal model of a small servo: °C per second at stall, and the time constant of cooling, seconds.
_HEATING = 0.25
_COOLING = 180.0
_AMBIENT = 28.0
# A 12 V supply sags a little when all motors pull: 0.1 V per servo at stall.
_SUPPLY, _SAG = 121.0, 3.0


class ServoChain:
    """The six servos of one arm.

    `on_goal` and `on_torque` are told, in the caller's thread, what the bus commanded: goals as received,
    and torque as {joint index: on}.
    """

    def __init__(
        self,
        calibration: ArmCalibration,
        *,
        on_goal: GoalListener | None = None,
        on_torque: Callable[[dict[int, bool]], None] | None = None,
    ) -> None:
        self.calibration = calibration
        self.lock = threading.Lock()
        self.servos = tuple(
            Servo(
                j.id,
                min_limit=j.range_min,
                max_limit=j.range_max,
                homing_offset=j.homing_offset,
                return_delay=0,
            )
            for j in calibration.joints
        )
        # How the horns are mounted: the encoder's reading in the middle of each joint's range. It stays
        # when someone calibrates the arm anew; only the offset register changes then.
        self._encoder_middle = np.array([MID_TICK + j.homing_offset for j in calibration.joints], dtype=float)
        # Packets that wrote a goal, since the start: lock-step callers wait for it.
        self.goal_packets = 0
        self._on_goal = on_goal
        self._on_torque = on_torque
        self._elapsed = 0.0
        self._sensed: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._command: np.ndarray = np.zeros((4, 6))
        self.sense(0.0, calibration.middle, np.zeros(6), np.zeros(6))
        with self._changing():
            pass

    def sense(self, dt: float, positions: np.ndarray, velocities: np.ndarray, loads: np.ndarray) -> None:
        """Where the physics has the joints `dt` seconds later: rad, rad/s, fraction of stall; each (6,)."""
        with self.lock:
            self._elapsed += dt
            self._sensed = (positions, velocities, loads)

    def command(self) -> np.ndarray:
        """What the servos want of their motors, (4, 6): see `virtual_so101.motion`."""
        return self._command

    def _take_sensed(self) -> None:
        """Hand the newest measurements to the servos; done when a packet comes, not at every tick."""
        if self._sensed is None:
            return
        positions, velocities, loads = self._sensed
        dt, self._elapsed, self._sensed = self._elapsed, 0.0, None
        encoders = (positions - self.calibration.middle) * TICKS_PER_RAD + self._encoder_middle
        speeds = velocities * TICKS_PER_RAD
        voltage = int(_SUPPLY - _SAG * float(np.abs(loads).sum()))
        for i, servo in enumerate(self.servos):
            servo.encoder = float(encoders[i])
            servo.velocity = float(speeds[i])
            load = float(loads[i])
            servo.load = load
            # What heating and cooling balance at under this load, and the way there.
            goal = _AMBIENT + _HEATING * _COOLING * load * load
            servo.temperature += (goal - servo.temperature) * -math.expm1(-dt / _COOLING)
            servo.put("present_voltage", voltage)

    def _update_command(self) -> None:
        """Make a new command array of the registers: readers keep the old one whole."""
        command = np.array(
            [
                [servo.target for servo in self.servos],
                [servo.driving for servo in self.servos],
                [servo.top_speed for servo in self.servos],
                [servo.acceleration for servo in self.servos],
            ]
        )
        command[0] -= self._encoder_middle
        command[[0, 2, 3]] /= TICKS_PER_RAD
        command[0] += self.calibration.middle
        self._command = command

    @contextlib.contextmanager
    def _changing(self, changing: bool = True) -> Iterator[None]:
        """Around everything that changes registers, and (False) around what only reads them."""
        with self.lock:
            self._take_sensed()
            yield
            if changing:
                self._update_command()

    def hold(self) -> None:
        """Forget the goals: every servo holds where it is. For after the world was reset."""
        with self._changing():
            for servo in self.servos:
                servo.hold()

    def enable_torque(self) -> None:
        """Switch all motors on, as if the bus had done it."""
        with self._changing():
            for servo in self.servos:
                servo.put("torque_enable", 1)
                servo.hold()

    def handle(self, packet: Packet, baud_rate: int) -> list[bytes]:
        """Execute one packet; the status packets that the servos answer, in the order of the wire.

        Servos set to another baud rate hear nothing, and neither do dead or unwired ones.
        """
        with self._changing(packet.instruction not in _READING):
            hearing = [
                s
                for s in self.servos
                if not s.dead and s.wired and (not baud_rate or s.baud_rate == baud_rate)
            ]
            goals: dict[int, int] = {}
            torque: dict[int, bool] = {}
            replies = self._execute(packet, hearing, goals, torque)
        if goals:
            self._count_goals()
            if self._on_goal is not None:
                self._on_goal(goals)
        if torque and self._on_torque is not None:
            self._on_torque(torque)
        return replies

    def _count_goals(self) -> None:
        self.goal_packets += 1

    def _execute(
        self, packet: Packet, hearing: list[Servo], goals: dict[int, int], torque: dict[int, bool]
    ) -> list[bytes]:
        params = packet.params
        if packet.instruction == Instruction.SYNC_READ and len(params) > 2:
            address, length = params[0], params[1]
            asked = [s for servo_id in params[2:] for s in hearing if s.get("id") == servo_id]
            return [status_packet(s.get("id"), s.error, s.read(address, length)) for s in asked]
        if packet.instruction == Instruction.SYNC_WRITE and len(params) > 2:
            address, length = params[0], params[1]
            for start in range(2, len(params) - length, length + 1):
                for servo in hearing:
                    if servo.get("id") == params[start]:
                        self._write(servo, address, params[start + 1 : start + 1 + length], goals, torque)
            return []
        to_all = packet.id == BROADCAST_ID
        meant = [s for s in hearing if to_all or s.get("id") == packet.id]
        replies: list[bytes] = []
        for servo in meant:
            # The answer carries the id and the state that the servo had when the packet came.
            servo_id, error = servo.get("id"), servo.error
            data = self._apply(servo, packet, goals, torque)
            if data is None or (to_all and packet.instruction != Instruction.PING):
                continue
            quiet = servo.get("response_level") == 0
            if quiet and packet.instruction not in (Instruction.PING, Instruction.READ):
                continue
            replies.append(status_packet(servo_id, error, data))
        return replies if to_all else _collide(replies)

    def _apply(
        self, servo: Servo, packet: Packet, goals: dict[int, int], torque: dict[int, bool]
    ) -> bytes | None:
        """What one servo does with a packet meant for it; its answer's parameters, or None for silence."""
        params = packet.params
        match packet.instruction:
            case Instruction.PING:
                return b""
            case Instruction.READ if len(params) == 2:
                return servo.read(params[0], params[1])
            case Instruction.WRITE if len(params) > 1:
                self._write(servo, params[0], params[1:], goals, torque)
                return b""
            case Instruction.REG_WRITE if len(params) > 1:
                servo.pending_write = (params[0], params[1:])
                return b""
            case Instruction.ACTION:
                if servo.pending_write is not None:
                    self._write(servo, *servo.pending_write, goals, torque)
                    servo.pending_write = None
                return b""
            case Instruction.RESET:
                servo.factory_reset(servo.get("id"))
                return b""
            case Instruction.REBOOT:
                servo.power_cycle()
                return b""
        return None

    def _write(
        self, servo: Servo, address: int, data: bytes, goals: dict[int, int], torque: dict[int, bool]
    ) -> None:
        servo.write(address, data)
        joint = self.servos.index(servo)
        if address <= _GOAL.address and address + len(data) >= _GOAL.address + _GOAL.size:
            start = _GOAL.address - address
            code = int.from_bytes(data[start : start + _GOAL.size], "little")
            goals[joint] = from_sign(code, _GOAL.sign_bit or 15)
        if address <= _TORQUE < address + len(data):
            torque[joint] = servo.get("torque_enable") == 1

    def power_cycle(self) -> None:
        """Switch the arm's supply off and on: torque is off, RAM is new, EEPROM as last saved."""
        with self._changing():
            for servo in self.servos:
                servo.power_cycle()

    def set_dead(self, joint: int, dead: bool = True) -> None:
        """Cut (or restore) the power of one servo, by joint index; it comes back as after a power cycle."""
        with self._changing():
            if self.servos[joint].dead and not dead:
                self.servos[joint].power_cycle()
            self.servos[joint].dead = dead

    def set_overload(self, joint: int, overloaded: bool = True) -> None:
        """Trip (or clear) the overload protection of one servo: its torque drops, its status bit is set."""
        with self._changing():
            self.servos[joint].overloaded = overloaded

    def wire(self, joints: Collection[int] | None) -> None:
        """Connect only these joints to the line (None: all), as motor set-up asks for."""
        with self._changing():
            for i, servo in enumerate(self.servos):
                servo.wired = joints is None or i in joints

    def as_from_factory(self) -> None:
        """All six servos as they come out of the box: id 1, no calibration. For motor set-up."""
        with self._changing():
            for servo in self.servos:
                servo.power_cycle()
                servo.factory_reset(1)

    def joint_of_id(self, servo_id: int) -> int:
        """Index of the joint whose servo has this id."""
        for i, servo in enumerate(self.servos):
            if servo.get("id") == servo_id:
                return i
        ids = [servo.get("id") for servo in self.servos]
        raise ValueError(f"no servo has id {servo_id}; the ids on this bus are {ids} ({', '.join(JOINTS)})")


def _collide(replies: list[bytes]) -> list[bytes]:
    """Two servos with one id answer at the same time: the line carries garbage."""
    if len(replies) < 2:
        return replies
    mixed = bytearray(replies[0])
    mixed[-1] ^= 0xFF
    return [bytes(mixed)]
