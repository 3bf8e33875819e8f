"""Faults as text: what `--fault` and the control socket take.

    [ARM.]KIND[:VALUE][@SECONDS]

`ARM` is `left` (default; also the only arm) or `right`; `@SECONDS` waits so long after the start, because
LeRobot's `connect` does not retry and most faults are for later.

    lost:0.05        every packet vanishes with this probability (0 ends it)
    late:80          the bus falls silent once for so many ms; replies come late from then on
    dead:3           the servo with this id has no power: silent and limp (alive:3 ends it)
    overload:6       this servo trips its overload protection: no torque, status bit set (recovered:6 ends it)
    unplug           the port vanishes; replug brings it back behind the same link
    power_cycle      the arm's supply goes off and on: torque off, RAM registers new
    freeze:front     this camera repeats its last picture (all of them without a name)
    blind:front      this camera sends nothing more (all of them without a name)
    wire:6           only these ids' joints (comma between them) are on the line; wire alone: all
    factory          all servos as out of the box: id 1, no calibration, for motor set-up
    clear            ends everything above that can be ended, on both arms and all cameras
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtual_so101.twin import Twin

__all__ = ["FAULT_KINDS", "Fault", "FaultError", "cause"]

_ARMS = {"left": 0, "right": 1}
# Kind -> whether it takes a value: "no", "optional" or what the value is.
FAULT_KINDS = {
    "lost": "a probability from 0 to 1",
    "late": "milliseconds, more than 0",
    "dead": "a servo id",
    "alive": "a servo id",
    "overload": "a servo id",
    "recovered": "a servo id",
    "unplug": "no",
    "replug": "no",
    "power_cycle": "no",
    "freeze": "optional",
    "blind": "optional",
    "wire": "optional",
    "factory": "no",
    "clear": "no",
}


class FaultError(ValueError):
    """A fault that cannot be read or does not fit this robot; the message says why."""


@dataclass(frozen=True)
class Fault:
    """One fault, checked: `value` is what its kind demands."""

    kind: str
    value: str = ""
    # Index of the arm: 0 left or only, 1 right.
    arm: int = 0
    # Seconds after the start.
    after: float = 0.0

    def __post_init__(self) -> None:
        wanted = FAULT_KINDS.get(self.kind)
        if wanted is None:
            raise FaultError(f"unknown fault {self.kind!r}; known are {', '.join(FAULT_KINDS)}")
        if wanted == "no" and self.value:
            raise FaultError(f"fault {self.kind} takes no value, got {self.value!r}")
        if self.arm not in (0, 1):
            raise FaultError(f"fault {self.kind} names arm {self.arm!r}; expected 0 (left) or 1 (right)")
        if self.kind == "lost" and not 0.0 <= self.number() <= 1.0:
            raise FaultError(f"fault lost needs {wanted}, got {self.value!r}")
        if self.kind == "late" and not 0.0 < self.number() <= 60_000.0:
            raise FaultError(f"fault late needs {wanted} and at most 60000, got {self.value!r}")
        if wanted == "a servo id":
            self.servo_id()
        if self.kind == "wire":
            self.servo_ids()

    def number(self) -> float:
        """The value as a number."""
        try:
            return float(self.value)
        except ValueError:
            wanted = FAULT_KINDS[self.kind]
            raise FaultError(
                f"fault {self.kind} needs {wanted}, got {self.value!r}: write {self.kind}:VALUE"
            ) from None

    def servo_id(self) -> int:
        """The value as a servo id."""
        if not self.value.isdigit() or not 0 <= int(self.value) < 254:
            raise FaultError(f"fault {self.kind} needs a servo id (1 to 6), got {self.value!r}")
        return int(self.value)

    def servo_ids(self) -> list[int]:
        """The value as a comma-separated list of joint numbers, 1 to 6; empty: all."""
        numbers = [part.strip() for part in self.value.split(",") if part.strip()]
        if not all(part.isdigit() and 1 <= int(part) <= 6 for part in numbers):
            raise FaultError(f"fault wire needs joint numbers from 1 to 6, got {self.value!r}")
        return [int(part) for part in numbers]

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `[ARM.]KIND[:VALUE][@SECONDS]`."""
        rest, at, seconds = text.partition("@")
        after = 0.0
        if at:
            try:
                after = float(seconds)
            except ValueError:
                raise FaultError(f"fault {text!r}: expected seconds after '@', got {seconds!r}") from None
            if not 0.0 <= after < float("inf"):
                raise FaultError(f"fault {text!r}: the seconds after '@' must be 0 or more")
        arm = 0
        head, dot, tail = rest.partition(".")
        if dot and head.isalpha() and ":" not in head:
            if head not in _ARMS:
                raise FaultError(f"fault {text!r}: expected the arm 'left' or 'right', got {head!r}")
            arm, rest = _ARMS[head], tail
        kind, _, value = rest.partition(":")
        return cls(kind=kind.strip(), value=value.strip(), arm=arm, after=after)

    def __str__(self) -> str:
        arm = "right." if self.arm == 1 else ""
        return f"{arm}{self.kind}" + (f":{self.value}" if self.value else "")


def cause(twin: Twin, fault: Fault) -> None:
    """Let `fault` happen to `twin` now. Raises `ValueError` where there is no such servo or camera."""
    bus = twin.buses[fault.arm]
    chain = bus.chain
    actions: dict[str, Callable[[], None]] = {
        "lost": lambda: bus.lose(fault.number()),
        "late": lambda: bus.stall(fault.number() / 1000.0),
        "dead": lambda: chain.set_dead(chain.joint_of_id(fault.servo_id())),
        "alive": lambda: chain.set_dead(chain.joint_of_id(fault.servo_id()), False),
        "overload": lambda: chain.set_overload(chain.joint_of_id(fault.servo_id())),
        "recovered": lambda: chain.set_overload(chain.joint_of_id(fault.servo_id()), False),
        "unplug": bus.unplug,
        "replug": bus.replug,
        "power_cycle": chain.power_cycle,
        "wire": lambda: chain.wire({n - 1 for n in fault.servo_ids()} or None),
        "factory": chain.as_from_factory,
        "clear": lambda: _clear(twin),
    }
    if fault.kind in ("freeze", "blind"):
        if twin.cameras is None:
            raise FaultError(f"fault {fault}: this robot runs without cameras")
        (twin.cameras.freeze if fault.kind == "freeze" else twin.cameras.blind)(fault.value)
    else:
        actions[fault.kind]()


def _clear(twin: Twin) -> None:
    for bus in twin.buses:
        bus.lose(0.0)
        bus.replug()
        bus.chain.wire(None)
        for joint in range(6):
            bus.chain.set_dead(joint, False)
            bus.chain.set_overload(joint, False)
    if twin.cameras is not None:
        twin.cameras.clear()
