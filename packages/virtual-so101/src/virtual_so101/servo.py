"""One STS3215 servo: its register table and what its firmware does with it. No I/O, no physics.

Positions inside the servo are encoder ticks (4096 per turn). What the bus sees is
`encoder - homing offset`, wrapped into one turn, as the firmware does with bit 4 of `phase` cleared.

Life cycle of a value: an address below 40 is EEPROM. A write there always takes effect at once, but is kept
over a power cycle only while the lock register is 0; the rest is RAM. Read-only addresses ignore writes.

What the firmware does here, and where this model stops:

- a goal is cut to the position limits; while torque is off it is stored and moves nothing;
- switching torque on takes the present position as the goal, so that an arm moved by hand does not jump;
- writing 128 to torque enable makes the present position the middle (2048) by changing the offset;
- goal velocity and acceleration shape the motion when they ask for less than the motor can do; 0, and the
  254 that LeRobot writes, leave it to the physics;
- overload drops torque and sets its status bit until torque is switched off;
- only the position mode moves anything; in the other operating modes the servo keeps its pose.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from virtual_so101.calibration import TICKS_PER_TURN
from virtual_so101.protocol import ErrorBit

__all__ = [
    "BAUD_RATES",
    "EEPROM_SIZE",
    "MODEL_NUMBER",
    "REGISTERS",
    "Register",
    "Servo",
    "from_sign",
    "to_sign",
]

MODEL_NUMBER = 777
FIRMWARE = (3, 10)
EEPROM_SIZE = 40
# Index = the baud rate register's value, bit/s.
BAUD_RATES = (1_000_000, 500_000, 250_000, 128_000, 115_200, 57_600, 38_400, 19_200)
# No-load speed at 12 V, 45 rpm, ticks/s: a velocity limit above it limits nothing.
_FREE_SPEED = 45 / 60 * TICKS_PER_TURN
# One unit of the acceleration register, ticks/s².
_ACCELERATION_UNIT = 100
# Slower than this (ticks/s) counts as standing still.
_MOVING_THRESHOLD = 8
# Stall current of the motor in units of 6.5 mA (2.7 A).
_STALL_CURRENT = 415
_RECENTRE = 128


class Register(NamedTuple):
    """Where a value lies and what it is from the factory; `sign_bit` marks sign-magnitude coding."""

    address: int
    size: int = 1
    default: int = 0
    read_only: bool = False
    sign_bit: int | None = None


REGISTERS: dict[str, Register] = {
    # EEPROM
    "firmware_major": Register(0, default=FIRMWARE[0], read_only=True),
    "firmware_minor": Register(1, default=FIRMWARE[1], read_only=True),
    "model_number": Register(3, 2, MODEL_NUMBER, read_only=True),
    "id": Register(5, default=1),
    "baud_rate": Register(6, default=0),
    "return_delay": Register(7, default=250),  # 2 µs
    "response_level": Register(8, default=1),
    "min_limit": Register(9, 2, 0),
    "max_limit": Register(11, 2, 4095),
    "max_temperature": Register(13, default=70),  # °C
    "max_voltage": Register(14, default=140),  # 0.1 V
    "min_voltage": Register(15, default=40),
    "max_torque": Register(16, 2, 1000),  # 0.1 %
    "phase": Register(18, default=12),
    "unloading_condition": Register(19, default=44),
    "led_alarm": Register(20, default=47),
    "p_coefficient": Register(21, default=32),
    "d_coefficient": Register(22, default=32),
    "i_coefficient": Register(23, default=0),
    "startup_force": Register(24, 2, 16),
    "cw_dead_zone": Register(26, default=1),
    "ccw_dead_zone": Register(27, default=1),
    "protection_current": Register(28, 2, 500),
    "angular_resolution": Register(30, default=1),
    "homing_offset": Register(31, 2, 0, sign_bit=11),
    "operating_mode": Register(33, default=0),
    "protective_torque": Register(34, default=20),  # %
    "protection_time": Register(35, default=200),  # 10 ms
    "overload_torque": Register(36, default=80),  # %
    "velocity_p": Register(37, default=10),
    "overcurrent_time": Register(38, default=200),
    "velocity_i": Register(39, default=200),
    # RAM
    "torque_enable": Register(40),
    "acceleration": Register(41),  # 100 ticks/s²; 0 and 254 leave it to the motor
    "goal_position": Register(42, 2, 0, sign_bit=15),
    "goal_time": Register(44, 2),
    "goal_velocity": Register(46, 2, 0, sign_bit=15),  # ticks/s; 0 leaves it to the motor
    "torque_limit": Register(48, 2, 1000),
    "lock": Register(55, default=1),
    "present_position": Register(56, 2, read_only=True, sign_bit=15),
    "present_velocity": Register(58, 2, read_only=True, sign_bit=15),
    "present_load": Register(60, 2, read_only=True, sign_bit=10),  # 0.1 %
    "present_voltage": Register(62, default=120, read_only=True),
    "present_temperature": Register(63, default=30, read_only=True),
    "status": Register(65, read_only=True),
    "moving": Register(66, read_only=True),
    "present_current": Register(69, 2, read_only=True),  # 6.5 mA
    "goal_position_2": Register(71, 2, read_only=True, sign_bit=15),
    "moving_threshold": Register(80),
    "maximum_velocity": Register(84, default=0),
    "maximum_acceleration": Register(85, default=254),
}
_READ_ONLY = frozenset(r.address + i for r in REGISTERS.values() if r.read_only for i in range(r.size))


def to_sign(value: int, sign_bit: int) -> int:
    """Sign-magnitude code of `value`; a magnitude too large for the bits below `sign_bit` saturates."""
    return (1 << sign_bit if value < 0 else 0) | min(abs(value), (1 << sign_bit) - 1)


def from_sign(code: int, sign_bit: int) -> int:
    """The signed value of a sign-magnitude code."""
    magnitude = code & ((1 << sign_bit) - 1)
    return -magnitude if code >> sign_bit & 1 else magnitude


class Servo:
    """Registers and firmware of one servo. The owner serialises all calls."""

    def __init__(self, servo_id: int, **eeprom: int) -> None:
        self._memory = bytearray(256)
        self._eeprom = bytes(EEPROM_SIZE)
        # What the encoder and the shunt measure: unwrapped ticks, ticks/s, fraction of stall torque, °C.
        self.encoder = 0.0
        self.velocity = 0.0
        self.load = 0.0
        self.temperature = 30.0
        # No power at all: silent and limp.
        self.dead = False
        # Wired to the bus: motor set-up has one servo connected at a time.
        self.wired = True
        self.overloaded = False
        # Where it stands in the operating modes that this model does not move in.
        self._held = 0.0
        self.pending_write: tuple[int, bytes] | None = None
        self.factory_reset(servo_id)
        for name, value in eeprom.items():
            self.put(name, value)
        self._eeprom = bytes(self._memory[:EEPROM_SIZE])

    def factory_reset(self, servo_id: int) -> None:
        """Every register as it left the factory, except the id."""
        for name, register in REGISTERS.items():
            self.put(name, servo_id if name == "id" else register.default)
        self._eeprom = bytes(self._memory[:EEPROM_SIZE])

    def power_cycle(self) -> None:
        """Off and on: RAM from the start, EEPROM as last saved; torque is off afterwards."""
        for name, register in REGISTERS.items():
            self.put(name, register.default)
        self._memory[:EEPROM_SIZE] = self._eeprom
        self.overloaded = False
        self.pending_write = None

    def get(self, name: str) -> int:
        """A register's signed value."""
        r = REGISTERS[name]
        code = int.from_bytes(self._memory[r.address : r.address + r.size], "little")
        return code if r.sign_bit is None else from_sign(code, r.sign_bit)

    def put(self, name: str, value: int) -> None:
        """Set a register as the firmware itself does: no read-only check, no side effect."""
        r = REGISTERS[name]
        code = value if r.sign_bit is None else to_sign(value, r.sign_bit)
        self._memory[r.address : r.address + r.size] = code.to_bytes(r.size, "little")

    @property
    def error(self) -> int:
        """The error byte of the next status packet."""
        return int(ErrorBit.OVERLOAD) if self.overloaded else 0

    @property
    def baud_rate(self) -> int:
        """bit/s that this servo listens at."""
        return BAUD_RATES[min(self.get("baud_rate"), len(BAUD_RATES) - 1)]

    @property
    def driving(self) -> bool:
        """Whether the motor makes torque."""
        return self.get("torque_enable") == 1 and not self.overloaded and not self.dead

    @property
    def position(self) -> int:
        """The position that the bus sees: ticks, 0 to 4095."""
        return (round(self.encoder) - self.get("homing_offset")) % TICKS_PER_TURN

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the register table, present values included."""
        if (
            address + length > REGISTERS["present_position"].address
            and address <= REGISTERS["goal_position_2"].address
        ):
            self._refresh()
        return bytes(self._memory[address : address + length]).ljust(length, b"\0")

    def write(self, address: int, data: bytes) -> None:
        """A write from the bus, with everything that the firmware does because of it."""
        touched = range(address, min(address + len(data), len(self._memory)))
        was_on = self.get("torque_enable")
        for i in touched:
            if i not in _READ_ONLY:
                self._memory[i] = data[i - address]
        if self.get("lock") == 0:
            saved = bytearray(self._eeprom)
            for i in touched:
                if i < EEPROM_SIZE:
                    saved[i] = self._memory[i]
            self._eeprom = bytes(saved)
        if REGISTERS["torque_enable"].address in touched:
            self._torque_written(was_on)
        if REGISTERS["operating_mode"].address in touched:
            self._held = self.encoder
        if REGISTERS["goal_position"].address in touched:
            self.put("goal_position_2", self.get("goal_position"))

    def _torque_written(self, was_on: int) -> None:
        value = self.get("torque_enable")
        if value == _RECENTRE:
            offset = round(self.encoder) % TICKS_PER_TURN - TICKS_PER_TURN // 2
            self.put("homing_offset", offset)
            self.put("torque_enable", was_on)
        elif value:
            self.put("torque_enable", 1)
            if not was_on:
                self.hold()
        else:
            self.overloaded = False

    def hold(self) -> None:
        """Make the present position the goal, at rest."""
        self.put("goal_position", self.position)
        self.put("goal_position_2", self.position)
        self._held = self.encoder

    @property
    def target(self) -> float:
        """Where the goal register sends the motor: unwrapped encoder ticks, within the position limits."""
        if self.get("operating_mode") != 0:
            return self._held
        low, high = self.get("min_limit"), self.get("max_limit")
        goal = self.get("goal_position")
        if low < high:
            goal = min(max(goal, low), high)
        # The loop closes on the wrapped position: the turn that the joint is in now stays the turn.
        turn = math.floor((round(self.encoder) - self.get("homing_offset")) / TICKS_PER_TURN)
        return float(goal + self.get("homing_offset") + turn * TICKS_PER_TURN)

    @property
    def top_speed(self) -> float:
        """Speed limit in ticks/s that the bus set; 0 where it limits nothing that the motor could do."""
        limit = abs(self.get("goal_velocity"))
        return float(limit) if 0 < limit < _FREE_SPEED else 0.0

    @property
    def acceleration(self) -> float:
        """Acceleration in ticks/s² that the bus set; 0 where it leaves it to the motor."""
        units = self.get("acceleration")
        return float(units * _ACCELERATION_UNIT) if 0 < units < 254 else 0.0

    def _refresh(self) -> None:
        speed = round(self.velocity)
        self.put("present_position", self.position)
        self.put("present_velocity", speed)
        self.put("present_load", round(min(1.0, max(-1.0, self.load)) * 1000))
        self.put("present_current", round(min(1.0, abs(self.load)) * _STALL_CURRENT))
        self.put("present_temperature", round(self.temperature))
        self.put("moving", int(abs(speed) > _MOVING_THRESHOLD))
        self.put("status", self.error)
