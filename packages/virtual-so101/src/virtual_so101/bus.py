"""The serial line of one arm: a pseudo-terminal that the driver opens in place of a USB adapter.

Life cycle: `start` opens the pty, links `link` to it and starts the one thread that reads packets, asks the
`ServoChain` and answers; `close` ends the thread, closes the pty and removes the link. The thread does
nothing else, so that a reply takes well under a millisecond whatever physics and cameras do.

Error policy: what the line brings never raises; broken packets are skipped, as servos skip them. A driver
that does not read its replies loses them (counted in `dropped`); the thread never blocks on it.

Faults, each at run time from any thread: `lose` (every packet, instruction or status, vanishes with a given
probability), `stall` (the line falls silent once; requests of that time are answered afterwards, late, as on
real hardware), `unplug` and `replug`. Faults of single servos belong to the chain.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import select
import struct
import tempfile
import termios
import threading
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from virtual_so101.chain import ServoChain
from virtual_so101.protocol import Packet, PacketParser

__all__ = ["Pace", "PortTakenError", "ServoBus", "check_link"]

# Linux: bytes waiting in a terminal; a terminal's settings with its speed as a number (the structure holds
# four flags, 20 control bytes and two speeds).
_FIONREAD = 0x541B
_TCGETS2 = 0x802C542A
_TERMIOS2 = struct.Struct("4I20s2I")
_READ_SIZE = 4096
# A packet that stops in the middle is forgotten after so long, seconds.
_SILENCE = 0.1
# Nice value of the bus thread: its few microseconds go first.
_PRIORITY = -10
# How long a call from another thread waits for the bus thread, seconds.
_HANDOVER = 5.0


class PortTakenError(RuntimeError):
    """The path for the port's link is in use; the message says by what and what to do."""


@dataclass(frozen=True)
class Pace:
    """How long a real line takes: bits on the wire plus a delay for each transaction."""

    # Start bit, eight data bits, stop bit.
    bits_per_byte: int = 10
    # What the USB adapter adds to each transaction that is answered, seconds.
    latency: float = 0.001

    def duration(self, sent: int, answered: int, baud_rate: int, return_delay: float) -> float:
        """Seconds from the first byte of a request to the last one of its answers."""
        wire = (sent + answered) * self.bits_per_byte / (baud_rate or 1_000_000)
        return wire + (self.latency + return_delay if answered else 0.0)


class _Job:
    """Something that another thread wants done in the bus thread; what it raises belongs to that thread."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.done = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._action()
        except Exception as error:
            self.error = error
        self.done.set()


class ServoBus:
    """One arm's servos behind a pseudo-terminal at the symlink `link`.

    `arm` only names it in errors; `seed` makes the lost packets the same in each run.
    """

    def __init__(
        self, chain: ServoChain, link: Path, *, arm: int = 0, pace: Pace | None = None, seed: int = 0
    ) -> None:
        self.chain = chain
        self.link = link
        self.arm = arm
        self.pace = pace
        # Probability that a packet vanishes; one stall to come, seconds.
        self.lost = 0.0
        self._stall = 0.0
        # Counters for `status`: packets executed, replies that nobody read, time of the last packet.
        self.packets = 0
        self.dropped = 0
        self.last_packet = 0.0
        self._random = random.Random(seed)  # faults of a test robot  # nosec B311
        self._parser = PacketParser()
        self._master = self._slave = -1
        self._lock_file: TextIO | None = None
        self._wake_read, self._wake_write = os.pipe()
        self._jobs: list[_Job] = []
        self._running = self._closed = False
        self._busy = False
        # What ended the thread, if anything did.
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"servo-bus-{arm}", daemon=True)

    @property
    def plugged(self) -> bool:
        """Whether the port exists."""
        return self._master >= 0

    def start(self) -> None:
        """Open the port and answer from now on. Raises `PortTakenError` where the link's path is in use."""
        self._claim_link()
        self._open()
        self._running = True
        self._thread.start()

    def close(self) -> None:
        """End the thread, close the port, remove the link. Safe to call twice."""
        if self._running:
            self._running = False
            os.write(self._wake_write, b"x")
            self._thread.join(_HANDOVER)
        self._unlink_port()
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        if not self._closed:
            self._closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)

    def failure(self) -> str | None:
        """Why the bus no longer answers; None while it does, or before it was started."""
        return None if self._error is None else f"{type(self._error).__name__}: {self._error}"

    def lose(self, probability: float) -> None:
        """Let every packet, instruction or status, vanish with this probability."""
        self.lost = probability

    def stall(self, seconds: float) -> None:
        """Let the line fall silent once, before the next packet; that packet and its followers come late."""
        self._stall = seconds

    def unplug(self) -> None:
        """Pull the USB plug: the port vanishes with its link, the servos keep power, pose and goals."""
        self._in_thread(self._unlink_port)

    def replug(self) -> None:
        """Plug it in again: a new port behind the same link."""
        self._in_thread(self._open)

    def drain(self, quiet: float = 0.002, limit: float = 0.5) -> None:
        """Wait until the line has been quiet for `quiet` seconds: what was sent before has taken effect."""
        end = time.monotonic() + limit
        quiet_since = time.monotonic()
        while time.monotonic() < end:
            now = time.monotonic()
            if self._busy or self._waiting_bytes():
                quiet_since = now
            elif now - max(quiet_since, self.last_packet) >= quiet:
                return
            time.sleep(0.0005)

    def counters(self) -> dict[str, Any]:
        """What happened since the start, and which motors make torque now."""
        return {
            "plugged": self.plugged,
            "packets": self.packets,
            "goal_packets": self.chain.goal_packets,
            "dropped": self.dropped,
            "torque": [servo.driving for servo in self.chain.servos],
        }

    def _waiting_bytes(self) -> int:
        if self._master < 0:
            return 0
        with contextlib.suppress(OSError):
            return int(struct.unpack("i", fcntl.ioctl(self._master, _FIONREAD, b"\0" * 4))[0])
        return 0

    def _claim_link(self) -> None:
        """Refuse a path that holds something else; a link that a dead twin left behind is ours."""
        link = self.link
        check_link(link)
        name = hashlib.sha256(os.fsencode(link.absolute())).hexdigest()[:16]
        # Closed with the process, however that ends: it tells a live twin's link from a dead one's.
        path = Path(tempfile.gettempdir()) / f"virtual_so101-{os.getuid()}-{name}.lock"
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise PortTakenError(
                f"another virtual SO-101 serves {link}; stop it or pass another --port-link"
            ) from None
        self._lock_file = lock

    def _open(self) -> None:
        if self._master >= 0:
            return
        self._master, self._slave = os.openpty()
        # Raw on both ends: no echo, no line editing. The slave stays open here, so that a driver may close
        # and open the port without hanging it up.
        tty.setraw(self._master)
        tty.setraw(self._slave)
        # A driver sets its own speed; one that does not finds the servos' default.
        settings = termios.tcgetattr(self._slave)
        settings[4] = settings[5] = termios.B1000000
        termios.tcsetattr(self._slave, termios.TCSANOW, settings)
        os.set_blocking(self._master, False)
        self.link.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.link.with_name(f"{self.link.name}.{os.getpid()}")
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(os.ttyname(self._slave))
            os.replace(fresh, self.link)
        except OSError:
            fresh.unlink(missing_ok=True)
            self._unlink_port()
            raise

    def _unlink_port(self) -> None:
        if self._master < 0:
            return
        with contextlib.suppress(OSError):
            if os.readlink(self.link) == os.ttyname(self._slave):
                self.link.unlink()
        os.close(self._master)
        os.close(self._slave)
        self._master = self._slave = -1
        self._parser.clear()

    def _in_thread(self, job: Callable[[], None]) -> None:
        """Run `job` in the bus thread, which alone touches the port while it runs."""
        if not self._running:
            raise RuntimeError(f"the servo bus of arm {self.arm} is not running")
        task = _Job(job)
        self._jobs.append(task)
        os.write(self._wake_write, b"x")
        if not task.done.wait(_HANDOVER):
            raise TimeoutError(f"the servo bus of arm {self.arm} did not answer within {_HANDOVER:g} s")
        if task.error is not None:
            raise task.error

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self._error = error

    def _loop(self) -> None:
        # A servo does not wait for other programs. Without the right to ask for it this changes nothing.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PRIORITY)
        while self._running:
            watched = [self._wake_read] if self._master < 0 else [self._wake_read, self._master]
            ready, _, _ = select.select(watched, [], [], _SILENCE)
            if not ready and self._parser.pending:
                self._parser.clear()
            if self._wake_read in ready:
                os.read(self._wake_read, 64)
                while self._jobs:
                    self._jobs.pop(0).run()
            elif self._master in ready:
                self._busy = True
                self._receive()
                self._busy = False

    def _receive(self) -> None:
        try:
            data = os.read(self._master, _READ_SIZE)
        except OSError as error:
            # EIO: nobody has the other end open; it cannot happen while we hold the slave.
            if error.errno not in (errno.EAGAIN, errno.EIO):
                raise
            return
        # Each system call hands the interpreter to the other threads: one per direction, not one per servo.
        baud_rate = _speed(self._slave)
        for packet in self._parser.feed(data):
            self._serve(packet, baud_rate)
            self.last_packet = time.monotonic()

    def _serve(self, packet: Packet, baud_rate: int) -> None:
        start = time.monotonic()
        if self._stall:
            stall, self._stall = self._stall, 0.0
            time.sleep(stall)
        if self._vanishes():
            return
        self.packets += 1
        replies = self.chain.handle(packet, baud_rate)
        if self.pace is not None:
            delay = self.chain.servos[0].get("return_delay") * 2e-6 if replies else 0.0
            answered = sum(len(reply) for reply in replies)
            wait = start + self.pace.duration(packet.size, answered, baud_rate, delay) - time.monotonic()
            if wait > 0:
                time.sleep(wait)
        answer = b"".join(reply for reply in replies if not self._vanishes())
        if answer:
            try:
                os.write(self._master, answer)
            except BlockingIOError:
                self.dropped += 1

    def _vanishes(self) -> bool:
        return self.lost > 0.0 and self._random.random() < self.lost


def check_link(link: Path) -> None:
    """Raise `PortTakenError` where `link` is something else than what a virtual robot leaves there."""
    if link.is_symlink():
        target = os.readlink(link)
        if not target.startswith(("/dev/pts/", "/dev/tty")):
            raise PortTakenError(
                f"{link} is a link to {target}, not to a terminal; remove it or pass another --port-link"
            )
    elif link.exists():
        raise PortTakenError(
            f"{link} exists and is no link; the virtual robot's port needs this path: remove what is "
            "there or pass another --port-link"
        )


def _speed(terminal: int) -> int:
    """bit/s that the driver set on its end; 0 (any servo hears) where the system does not say."""
    try:
        settings = fcntl.ioctl(terminal, _TCGETS2, b"\0" * _TERMIOS2.size)
    except OSError:
        return 0
    return int(_TERMIOS2.unpack(settings)[6])
