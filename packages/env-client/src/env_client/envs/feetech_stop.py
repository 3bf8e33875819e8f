"""Stopping SO-101 arms without a driver: three registers of Feetech's protocol 0, straight to the port.

This is what the supervisor calls when the process that owned the bus is dead. It imports pyserial only, so
that it acts within milliseconds, where LeRobot's driver takes seconds to import.

`stop` first makes every arm hold the pose that it has (goal := measured, cut to the calibrated range; torque
on), and only then lets go or moves to the rest pose: at no moment is an arm both limp and unattended, unless
`relax` asks for it. Each transaction is tried a few times; a port that is gone is waited for until `limit_s`
has passed, then the result says so. Nothing here raises for what a bus does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["BusError", "FeetechBus", "stop"]

_BAUD_RATE = 1_000_000
_PING, _READ, _WRITE, _SYNC_WRITE = 1, 2, 3, 0x83
_BROADCAST = 0xFE
_TORQUE, _GOAL, _PRESENT = 40, 42, 56
_SIGN = 1 << 15
# How long one servo may take to answer, seconds, and how often it is asked.
_ANSWER = 0.03
_TRIES = 4
# The period of the commands on the way to the rest pose, seconds.
_PERIOD = 0.02
# Closer than this to its goal (ticks, 2 degrees) a joint has arrived.
_ARRIVED = 25


class BusError(RuntimeError):
    """A servo or a port did not answer; the message names it."""


class FeetechBus:
    """One serial line with STS3215 servos. Raises `BusError` (no answer) and `OSError` (no port)."""

    def __init__(self, port: str) -> None:
        import serial

        self.port = port
        self._serial = serial.Serial(port, _BAUD_RATE, timeout=_ANSWER, write_timeout=0.5)
        self._serial.reset_input_buffer()

    def close(self) -> None:
        """Close the port; the servos keep what they were told."""
        self._serial.close()

    def positions(self, ids: Sequence[int]) -> list[int]:
        """Present position of each servo, ticks."""
        return [self._read_position(servo) for servo in ids]

    def torque(self, ids: Sequence[int], on: bool) -> None:
        """Switch the motors on or off; every servo has confirmed when this returns."""
        for servo in ids:
            self._ask(servo, _WRITE, bytes((_TORQUE, int(on))))

    def goals(self, ids: Sequence[int], ticks: Sequence[int]) -> None:
        """Command goal positions, all servos in one packet that no servo answers."""
        body = bytearray((_GOAL, 2))
        for servo, tick in zip(ids, ticks, strict=True):
            code = (_SIGN | -tick) if tick < 0 else tick
            body += bytes((servo, code & 0xFF, code >> 8 & 0xFF))
        self._send(_BROADCAST, _SYNC_WRITE, bytes(body))

    def _read_position(self, servo: int) -> int:
        code = int.from_bytes(self._ask(servo, _READ, bytes((_PRESENT, 2)), answer=2), "little")
        return -(code & ~_SIGN) if code & _SIGN else code

    def _send(self, servo: int, instruction: int, body: bytes) -> None:
        packet = bytes((servo, len(body) + 2, instruction)) + body
        self._serial.write(b"\xff\xff" + packet + bytes((~sum(packet) & 0xFF,)))

    def _ask(self, servo: int, instruction: int, body: bytes, answer: int = 0) -> bytes:
        for _ in range(_TRIES):
            # What a dead process left unread would be taken for this servo's answer.
            self._serial.reset_input_buffer()
            self._send(servo, instruction, body)
            reply = self._serial.read(6 + answer)
            if (
                len(reply) == 6 + answer
                and reply[:3] == bytes((0xFF, 0xFF, servo))
                and reply[3] == answer + 2
                and ~sum(reply[2:-1]) & 0xFF == reply[-1]
            ):
                return reply[5 : 5 + answer]
        raise BusError(f"servo {servo} on {self.port} does not answer")


def stop(
    arms: Sequence[dict[str, Any]],
    on_exit: str,
    *,
    ticks_per_s: float = 330.0,
    limit_s: float = 15.0,
    port_wait_s: float = 2.0,
) -> str:
    """Bring arms into the state that `on_exit` (hold, relax, rest-pose) names; what was reached, as a sentence.

    Each arm is `{"port": str, "ids": [6], "lower": [6], "upper": [6], "rest": [6] | None}` with positions in
    ticks. `ticks_per_s` is the speed to the rest pose (330 is half a radian per second), `limit_s` the longest
    that this takes altogether, `port_wait_s` how long a missing port is waited for.
    """
    results: list[str] = []
    holding: list[tuple[dict[str, Any], FeetechBus]] = []
    end = time.monotonic() + limit_s
    for arm in arms:
        try:
            bus = _open(str(arm["port"]), time.monotonic() + port_wait_s)
        except Exception as error:  # pyserial and termios raise kinds of their own
            results.append(f"{arm['port']}: NOT REACHED ({error}); its servos keep their last goal")
            continue
        try:
            if on_exit == "relax":
                bus.torque(arm["ids"], False)
                results.append(f"{arm['port']}: torque off")
                bus.close()
            else:
                _hold(arm, bus)
                holding.append((arm, bus))
        except Exception as error:
            results.append(f"{arm['port']}: NOT COMPLETE ({error})")
            bus.close()
    if on_exit == "rest-pose":
        try:
            _to_rest(holding, ticks_per_s, end, results)
        except Exception as error:
            results.append(f"the way to the rest pose broke off ({error}); torque on")
    else:
        results += [f"{arm['port']}: holds its pose, torque on" for arm, _ in holding]
    for _, bus in holding:
        bus.close()
    return "; ".join(results) or "no arm to stop"


def _open(port: str, until: float) -> FeetechBus:
    while True:
        try:
            return FeetechBus(port)
        except OSError:
            if time.monotonic() >= until:
                reason = "the port cannot be opened" if Path(port).exists() else "the port does not exist"
                raise BusError(reason) from None
            time.sleep(0.05)


def _hold(arm: dict[str, Any], bus: FeetechBus) -> list[int]:
    """Goal := measured pose, torque on. The goal comes first: torque must not pull back. A joint outside its range
    keeps the goal and the torque that it has: the servo would cut another goal to the range and jump there."""
    ticks = bus.positions(arm["ids"])
    inside = [
        (servo, cut)
        for servo, at, cut in zip(arm["ids"], ticks, _within(arm, ticks), strict=True)
        if abs(at - cut) <= _ARRIVED
    ]
    ids = [servo for servo, _ in inside]
    bus.goals(ids, [cut for _, cut in inside])
    bus.torque(ids, True)
    return ticks


def _within(arm: dict[str, Any], ticks: Sequence[int]) -> list[int]:
    return [min(max(t, low), high) for t, low, high in zip(ticks, arm["lower"], arm["upper"], strict=True)]


def _to_rest(
    holding: list[tuple[dict[str, Any], FeetechBus]], speed: float, end: float, results: list[str]
) -> None:
    """Move all arms together, slowly, then switch off the torque of those that arrived."""
    moving = [
        (arm, bus, [float(t) for t in bus.positions(arm["ids"])]) for arm, bus in holding if arm.get("rest")
    ]
    results += [f"{a['port']}: holds its pose (it has no rest pose)" for a, _ in holding if not a.get("rest")]
    while moving and time.monotonic() < end:
        started = time.monotonic()
        for arm, bus, at in moving:
            rest = _within(arm, arm["rest"])
            step = speed * _PERIOD
            at[:] = [a + min(max(r - a, -step), step) for a, r in zip(at, rest, strict=True)]
            bus.goals(arm["ids"], _within(arm, [round(a) for a in at]))
        if all(a == r for arm, _, at in moving for a, r in zip(at, _within(arm, arm["rest"]), strict=True)):
            break
        time.sleep(max(0.0, started + _PERIOD - time.monotonic()))
    settled = min(end, time.monotonic() + 1.0)
    for arm, bus, _ in moving:
        while not (arrived := _arrived(arm, bus)) and time.monotonic() < settled:
            time.sleep(_PERIOD)
        if arrived:
            bus.torque(arm["ids"], False)
        results.append(
            f"{arm['port']}: in its rest pose, torque off"
            if arrived
            else f"{arm['port']}: did not reach its rest pose, holds where it is"
        )


def _arrived(arm: dict[str, Any], bus: FeetechBus) -> bool:
    rest = _within(arm, arm["rest"])
    return all(abs(t - r) <= _ARRIVED for t, r in zip(bus.positions(arm["ids"]), rest, strict=True))
