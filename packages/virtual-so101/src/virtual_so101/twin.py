"""The virtual robot at work: a world, a servo bus for each arm, cameras; in real time or in lock step.

    driver -> pty -> ServoBus -> ServoChain -> Twin (physics thread) -> World
                                     ^                |
                                     +---- sense -----+          World -> CameraServer -> ZMQCamera

Threads: one per bus (answers from the servos' registers, never waits for physics; for the command in a process
of its own, see `virtual_so101.bus_process`), one for the physics (wall clock, absolute deadlines), one for the cameras. `world_lock` makes ticks, steps and resets exclusive; the
cameras do not take it, as `World.render` copies the state and draws without holding the physics up.

Modes: in real time the physics follows the wall clock; when it falls behind by more than `_SLIP` it lets the
time go and counts a slip. In lock step (`pause`) time moves only by `step`, and each step ends with fresh
pictures; what the driver sent before `step` was called takes part in it.

Error policy: an exception in a thread is kept in `error` and ends the real-time loop; `check` raises it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from virtual_so101.bus import Pace, ServoBus
from virtual_so101.bus_process import BusProcess, RemoteBus, RemoteChain, RemoteLog
from virtual_so101.calibration import ArmCalibration
from virtual_so101.cameras import CameraServer
from virtual_so101.chain import ServoChain
from virtual_so101.faults import Fault, FaultError, cause
from virtual_so101.motion import Motion
from virtual_so101.servo_log import ServoLog

__all__ = ["Twin", "WorldLike"]

# Real-time physics wakes up this often, seconds: what the driver reads is at most so old.
_TICK = 0.004
# Further behind the wall clock than this, seconds: give the time up instead of racing after it.
_SLIP = 0.25
# Longest step that one call may ask for, seconds of simulated time.
_LONGEST_STEP = 60.0
# How long `step` waits for goals that the caller says it has sent, seconds.
_GOAL_WAIT = 1.0


class WorldLike(Protocol):
    """What the twin needs of `virtual_so101.world.World`.

    `render` and `close` are called in the camera thread, while another one may be in `step`.
    """

    n_arms: int
    camera_names: tuple[str, ...]
    joint_lower: np.ndarray
    joint_upper: np.ndarray

    @property
    def time(self) -> float: ...
    @property
    def timestep(self) -> float: ...
    def reset(self, seed: int | None = None) -> None: ...
    def set_goal(self, arm: int, positions: np.ndarray) -> None: ...
    def set_torque(self, arm: int, enabled: np.ndarray) -> None: ...
    def positions(self, arm: int) -> np.ndarray: ...
    def velocities(self, arm: int) -> np.ndarray: ...
    def loads(self, arm: int) -> np.ndarray: ...
    def step(self, dt: float) -> None: ...
    def render(self, camera: str) -> np.ndarray: ...
    def success(self) -> bool: ...
    def close(self) -> None: ...


class Twin:
    """A virtual robot on `links` (one path per arm). Use it as a context manager, or `start` and `close`.

    `camera_port` None leaves the cameras out, 0 lets the system choose ports. `pace` makes the bus as slow as
    a real one; `log_path` writes what it was told. `bus_process` serves the bus from a process of its own,
    whose replies nothing here can delay; without it the servos' registers are open to the caller.
    """

    def __init__(
        self,
        world: WorldLike,
        links: Sequence[Path],
        *,
        camera_port: int | None = 0,
        camera_fps: int = 30,
        pace: bool = False,
        log_path: Path | None = None,
        bus_process: bool = False,
        realtime: bool = True,
        seed: int = 0,
    ) -> None:
        if len(links) != world.n_arms:
            raise ValueError(f"the world has {world.n_arms} arms, {len(links)} port links were given")
        self.world = world
        self.world_lock = threading.RLock()
        self.realtime = realtime
        self.error: BaseException | None = None
        # How often the physics fell so far behind that time was given up.
        self.slips = 0
        self.cameras: CameraServer | None = None
        if camera_port is not None:
            self.cameras = CameraServer(
                world.camera_names,
                world.render,
                port=camera_port,
                fps=camera_fps,
                clock=self._clock,
                finish=world.close,
            )
        self.log: ServoLog | RemoteLog
        self.buses: Sequence[ServoBus | RemoteBus]
        self._process: BusProcess | None = None
        try:
            self._make_buses(links, pace, log_path, bus_process, seed)
        except BaseException:
            if self.cameras is not None:
                self.cameras.close()
            raise
        self._motions = [Motion() for _ in range(world.n_arms)]
        self._hands: list[np.ndarray | None] = [None] * world.n_arms
        self._commanded: list[tuple[bytes, bytes]] = [(b"", b"")] * world.n_arms
        self._tick = max(1, round(_TICK / world.timestep)) * world.timestep
        # Where lock-step time should be: steps that are no multiple of the timestep add up right.
        self._due = world.time
        self._running = False
        self._wake = threading.Condition()
        self._timers: list[threading.Timer] = []
        self._thread = threading.Thread(target=self._run, name="physics", daemon=True)

    def _make_buses(
        self, links: Sequence[Path], pace: bool, log_path: Path | None, bus_process: bool, seed: int
    ) -> None:
        world = self.world
        lower, upper = world.joint_lower, world.joint_upper
        calibrations = [ArmCalibration.of_limits(lower, upper, arm) for arm in range(world.n_arms)]
        if bus_process:
            self._process = BusProcess(calibrations, links, pace=pace, log_path=log_path, seed=seed)
            self.log, self.buses = self._process.log, self._process.buses
        else:
            self.log = ServoLog(log_path, clock=self._clock)
            self.buses = [
                ServoBus(
                    ServoChain(calibration, **self.log.listeners(arm)),
                    links[arm],
                    arm=arm,
                    pace=Pace() if pace else None,
                    seed=seed + arm,
                )
                for arm, calibration in enumerate(calibrations)
            ]

    @property
    def chains(self) -> list[ServoChain | RemoteChain]:
        """The servos of each arm."""
        return [bus.chain for bus in self.buses]

    def __enter__(self) -> Twin:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, faults: Sequence[Fault] = ()) -> None:
        """Open the ports, send the first pictures, let time run; `faults` come at their own time."""
        for chain in self.chains:
            # As if a program had left torque on: the arm stands until a driver takes over.
            chain.enable_torque()
        self._settle()
        try:
            for bus in self.buses:
                bus.start()
            if self.cameras is not None:
                self.cameras.start(realtime=self.realtime)
        except BaseException:
            self.close()
            raise
        self._running = True
        self._thread.start()
        for fault in faults:
            if fault.after > 0.0:
                timer = threading.Timer(fault.after, self._timed_fault, (fault,))
                timer.daemon = True
                timer.start()
                self._timers.append(timer)
            else:
                self.apply(fault)

    def close(self) -> None:
        """End all threads, remove the links, free the ports. Safe to call twice."""
        for timer in self._timers:
            timer.cancel()
        with self._wake:
            was_running, self._running = self._running, False
            self._wake.notify_all()
        if was_running:
            self._thread.join(10.0)
        for bus in self.buses:
            bus.close()
        if self.cameras is not None:
            self.cameras.close()
        self.log.close()

    def check(self) -> None:
        """Raise what ended a thread, if anything did."""
        error = self.error or (self.cameras.error if self.cameras is not None else None)
        for bus in self.buses:
            failure = None if error is not None else bus.failure()
            if failure is not None:
                error = RuntimeError(failure)
        if error is not None:
            raise RuntimeError(f"the virtual robot stopped: {error}") from error

    def pause(self) -> None:
        """Stop the clock: from now on only `step` moves time."""
        with self._wake, self.world_lock:
            self.realtime = False
            self._due = self.world.time
            self._wake.notify_all()
        if self.cameras is not None:
            self.cameras.set_realtime(False)

    def resume(self) -> None:
        """Follow the wall clock again."""
        with self._wake:
            self.realtime = True
            self._wake.notify_all()
        if self.cameras is not None:
            self.cameras.set_realtime(True)

    def step(self, dt: float, goals: Sequence[int] | None = None, *, pictures: bool = True) -> None:
        """Advance simulated time by `dt` seconds in lock step; returns when the new pictures are sent.

        `pictures` False leaves them out: the cameras go on repeating the last ones.

        `goals`, one number per arm, first waits until each bus has received so many goal packets in all
        (`goal_packets` of the status): then nothing that the caller sent can come too late. Without it the
        call waits until the buses have been silent for 2 ms, which is as good on a machine with time to spare.
        """
        if self.realtime:
            raise ValueError("the virtual robot follows the wall clock; send pause before step")
        if not 0.0 < dt <= _LONGEST_STEP:
            raise ValueError(
                f"step needs dt in seconds, more than 0 and at most {_LONGEST_STEP:g}; got {dt!r}"
            )
        if goals is not None:
            self._await_goals(goals)
        else:
            for bus in self.buses:
                bus.drain()
        with self.world_lock:
            self._due += dt
            self._advance(round((self._due - self.world.time) / self.world.timestep))
        if pictures:
            self.publish()

    def _await_goals(self, goals: Sequence[int]) -> None:
        if len(goals) != len(self.buses):
            raise ValueError(f"goals needs one number per arm ({len(self.buses)}), got {len(goals)}")
        end = time.monotonic() + _GOAL_WAIT
        while any(chain.goal_packets < n for chain, n in zip(self.chains, goals, strict=True)):
            if time.monotonic() > end:
                seen = [chain.goal_packets for chain in self.chains]
                raise TimeoutError(f"waited {_GOAL_WAIT:g} s for goal packets {list(goals)}, saw {seen}")
            time.sleep(0.0005)

    def publish(self) -> dict[str, str]:
        """Render and send all cameras now; name -> base64 JPEG, empty without cameras."""
        return self.cameras.publish() if self.cameras is not None else {}

    def reset(self, seed: int | None = None) -> None:
        """A new episode: the world is reset, the servos hold the new pose, torque stays as it was."""
        with self.world_lock:
            self.world.reset(seed)
            self._settle()
            self._due = self.world.time
        self.log.add("reset", seed=seed)
        self.publish()

    def success(self) -> bool:
        """Whether the task is solved now."""
        with self.world_lock:
            return bool(self.world.success())

    def move_by_hand(self, arm: int, positions: Sequence[float] | None) -> None:
        """Move an arm's joints (rad) as a person does who holds them, torque or not; None lets go."""
        if not 0 <= arm < len(self.buses):
            raise ValueError(f"no arm {arm}; there are {len(self.buses)}")
        pose = None if positions is None else np.asarray(positions, dtype=float)
        if pose is not None and (pose.shape != (6,) or not np.all(np.isfinite(pose))):
            raise ValueError(f"a pose needs 6 finite joint angles in rad, got {positions!r}")
        with self.world_lock:
            self._hands[arm] = pose

    def apply(self, fault: Fault) -> None:
        """Let one fault happen now. Raises `FaultError` where it does not fit this robot."""
        if fault.arm >= len(self.buses):
            raise FaultError(f"fault {fault} is for the right arm; this robot has one arm")
        try:
            cause(self, fault)
        except ValueError as error:
            raise FaultError(str(error)) from None
        self.log.add("fault", fault=str(fault))

    def _timed_fault(self, fault: Fault) -> None:
        try:
            self.apply(fault)
        except Exception as error:
            self.error = error

    def status(self) -> dict[str, Any]:
        """Counters as plain values."""
        cameras = self.cameras
        return {
            "mode": "realtime" if self.realtime else "lockstep",
            "time": round(self._clock(), 6),
            "slips": self.slips,
            "fps": round(cameras.measured_fps, 2) if cameras else 0.0,
            "frames": cameras.rounds if cameras else 0,
            "missed_frames": cameras.missed if cameras else 0,
            "buses": [{"link": str(bus.link), **bus.counters()} for bus in self.buses],
        }

    def _clock(self) -> float:
        return float(self.world.time)

    def _settle(self) -> None:
        """Let servos and world agree on the world's present pose."""
        with self.world_lock:
            for arm, chain in enumerate(self.chains):
                self._sense(arm, 0.0)
                chain.hold()
                self._commanded[arm] = (b"", b"")

    def _sense(self, arm: int, dt: float) -> None:
        world = self.world
        if self._process is not None:
            self._process.shared.time[0] = world.time
        self.chains[arm].sense(dt, world.positions(arm), world.velocities(arm), world.loads(arm))

    def _advance(self, timesteps: int) -> None:
        """Run the physics for so many timesteps, tick by tick; the caller holds `world_lock`."""
        per_tick = round(self._tick / self.world.timestep)
        while timesteps > 0:
            count = min(per_tick, timesteps)
            dt = count * self.world.timestep
            for arm, chain in enumerate(self.chains):
                goals, torque = self._motions[arm].advance(dt, chain.command(), self.world.positions(arm))
                hand = self._hands[arm]
                if hand is not None:
                    goals, torque = hand, np.ones(6, dtype=bool)
                # A limp joint's set point follows its encoder: no command.
                before = self._commanded[arm]
                command = (np.where(torque, goals, 0.0).tobytes(), torque.tobytes())
                if command[1] != before[1]:
                    self.world.set_torque(arm, torque)
                if command != before:
                    self.world.set_goal(arm, goals)
                    self._commanded[arm] = command
            self.world.step(dt)
            for arm in range(len(self.buses)):
                self._sense(arm, dt)
            timesteps -= count

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self.error = error

    def _loop(self) -> None:
        per_tick = round(self._tick / self.world.timestep)
        deadline = time.monotonic()
        while self._running:
            with self._wake:
                if not self.realtime:
                    self._wake.wait(0.5)
                    deadline = time.monotonic()
                    continue
            with self.world_lock:
                # Under the lock again: a pause that came meanwhile must not be followed by one more tick.
                if self.realtime:
                    self._advance(per_tick)
            deadline += self._tick
            wait = deadline - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            elif wait < -_SLIP:
                self.slips += 1
                deadline = time.monotonic()
