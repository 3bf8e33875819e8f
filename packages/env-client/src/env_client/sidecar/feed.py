"""The control process's end of the sidecar: it starts that process and hands over what happens. Nothing here waits.

    loop --push--> queue --sender thread--> pictures: shared memory, the rest: a socket --> sidecar
                                            reader thread <-- lines for the user
                                           command thread <-- what a person asks for, from the page's own process

Life cycle: made at the start of a run, before anything is known of the robot; `begin_run` when it is; `close` at the
end waits until the files are finished. Error policy: a sidecar that dies or hangs is said once, and the robot goes
on; what it could not take is counted. One that cannot be started is an `OSError`, before anything moves.
"""

from __future__ import annotations

import logging
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any, Protocol

import numpy as np

from env_client.control import SourceStats, TickRecord
from env_client.control.plan import Chunk
from env_client.control.slices import short_slices
from env_client.panel.commands import receive_commands
from env_client.sidecar.config import SidecarConfig
from env_client.sidecar.ring import Ring
from env_client.sidecar.types import (
    Command,
    EpisodeEnd,
    EpisodeStart,
    Mark,
    RunInfo,
    TickData,
    TickOrigin,
)
from env_client.wire import EncodedImage

__all__ = ["Followed", "SidecarFeed"]

# Ticks that may wait for the sidecar: a second at 30 Hz.
_PENDING = 30
# A sidecar that gave no sign of life for so long hangs, seconds.
_SILENCE = 5.0
_COUNTERS = ("requests", "chunks", "consumed", "waiting", "starved", "delay_ticks", "horizon")


logger = logging.getLogger(__name__)


class Followed(Protocol):
    """What is read of an action source beside its ticks."""

    prompt: str | None

    @property
    def stats(self) -> SourceStats: ...


class SidecarFeed:
    """`push` (it serves as a tap of the loop) and the events are called by the thread that runs the episodes."""

    def __init__(
        self,
        config: SidecarConfig,
        *,
        say: Callable[[str], None],
        on_command: Callable[[Command], None] = lambda command: None,
    ) -> None:
        """`on_command` is called in a thread of this object's own."""
        self.lost = 0
        self._say, self._on_command = say, on_command
        self._followed: Followed | None = None
        self._chunk: Chunk | None = None
        self._queue: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._pushed = self._taken = self._lost_since = 0
        self._ready = threading.Event()
        self._closing = self._gone = False
        self._ring = Ring()
        self._connection, theirs = Pipe(duplex=True)
        fds = [theirs.fileno(), self._ring.fd]
        passed = list(fds)
        commands, pages = socket.socketpair()
        if config.panel_fd is not None:
            passed += [config.panel_fd, pages.fileno()]
            config = replace(config, command_fd=pages.fileno())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "env_client.sidecar.process", *map(str, fds)],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C is not for the process that still has files to finish.
                start_new_session=True,
            )
        finally:
            theirs.close()
            pages.close()
        self._queue.put(("config", config))
        for target, arguments in ((self._send, ()), (self._receive, ()), (self._take_commands, (commands,))):
            threading.Thread(
                target=target, args=arguments, name=f"sidecar{target.__name__}", daemon=True
            ).start()

    @property
    def pid(self) -> int:
        """The sidecar's process."""
        return self._process.pid

    @property
    def gone(self) -> bool:
        """Whether the sidecar ended before the run did."""
        return self._gone

    # --------------------------------------------------------------------------------- what happens

    def follow(self, source: Followed) -> None:
        """Read prompt, counters and connection state here from now on."""
        self._followed = source

    def wait_ready(self, timeout_s: float = 20.0) -> bool:
        """Whether the sidecar is there; for the time before anything moves."""
        end = time.monotonic() + timeout_s
        while not (ready := self._ready.wait(0.1)) and not self._gone and time.monotonic() < end:
            pass
        return ready

    def push(self, record: TickRecord) -> None:
        """A tick of the loop. Never waits: when the sidecar is behind, the tick is counted and forgotten."""
        if self._gone:
            return
        if self._pushed - self._taken >= _PENDING:
            self.lost += 1
            self._lost_since += 1
            return
        self._pushed += 1
        lost, self._lost_since = self._lost_since, 0
        self._queue.put(("tick", (record, lost)))

    def begin_run(self, run: RunInfo) -> None:
        self._queue.put(("begin_run", run))

    def begin_episode(self, start: EpisodeStart) -> None:
        self._queue.put(("begin_episode", start))

    def end_episode(self, end: EpisodeEnd) -> None:
        self._queue.put(("end_episode", end))

    def mark(self, mark: Mark) -> None:
        self._queue.put(("mark", mark))

    def state(self, state: dict[str, Any]) -> None:
        self._queue.put(("state", state))

    def close(self, timeout_s: float = 20.0) -> bool:
        """The run is over. Whether the sidecar has finished its files in time; otherwise it does so by itself."""
        if not self._closing:
            self._closing = True
            self._queue.put(None)
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._say(f"The records are still being finished, by process {self.pid}.")
            return False
        return code == 0

    # ------------------------------------------------------------------------------------- the threads

    def _send(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                event, value = item
                if event == "tick":
                    value = self._tick(*value)
                    self._taken += 1
                self._connection.send_bytes(pickle.dumps((event, value), protocol=pickle.HIGHEST_PROTOCOL))
            self._connection.send_bytes(pickle.dumps(("close", None)))
        except OSError:
            self._lose()
        except Exception:  # a defect here costs the records, not the run
            logger.exception("handing over to the sidecar failed")
            self._lose()

    def _receive(self) -> None:
        heard, hangs = time.monotonic(), False
        try:
            while True:
                if self._connection.poll(1.0):
                    heard = time.monotonic()
                    # From our child process, through a pipe that nobody else has.
                    kind, value = pickle.loads(self._connection.recv_bytes())  # nosec B301
                    if kind == "ready":
                        self._ready.set()
                    elif kind == "say":
                        self._say(value)
                silent = time.monotonic() - heard > _SILENCE
                if not self._closing and hangs != (self._ready.is_set() and silent):
                    hangs = not hangs
                    self._say(
                        "The process that records and shows the run hangs; the robot goes on."
                        if hangs
                        else "The process that records and shows the run is back."
                    )
        except (OSError, EOFError):
            self._lose()

    def _take_commands(self, commands: socket.socket) -> None:
        # Asleep until a person presses something; then a Stop is not to wait for anybody's turn.
        short_slices()
        with commands:
            receive_commands(commands, self._on_command)

    def _lose(self) -> None:
        if not self._gone and not self._closing:
            self._gone = True
            self._say("The process that records and shows the run ended; the robot goes on without records.")
        self._gone = True

    # ---------------------------------------------------------------------------------------- one tick

    def _tick(self, record: TickRecord, lost: int) -> TickData:
        """What travels: `images` holds (position, shape) in the ring, or a camera's own JPEG."""
        seen, origin = record.observation, record.origin
        chunk = origin.chunk if origin is not None else None
        fresh = chunk if chunk is not None and chunk is not self._chunk else None
        if fresh is not None:
            self._chunk = fresh
        tick = TickData(
            episode=record.episode,
            tick=record.tick,
            phase=record.phase,
            time=record.time,
            unix=time.time() - time.monotonic() + record.time,
            late_s=record.late_s,
            requested=record.requested,
            sent=record.sent,
            stages=record.stages,
            refused=record.refused,
            held=record.held,
            origin=None if origin is None else TickOrigin(origin.seq, origin.index, origin.boundary),
            chunk=None if fresh is None else fresh.actions,
            chunk_id=None if fresh is None else fresh.seq,
            chunk_capture_time=None if fresh is None else fresh.capture_time,
            round_trip_s=None if fresh is None else fresh.latency_s,
            read_s=record.read_s,
            think_s=record.think_s,
            send_s=record.send_s,
            error=record.error,
            lost=lost,
        )
        if seen is not None:
            images = {name: self._place(image) for name, image in seen.images.items()}
            kept: Any = {name: place for name, place in images.items() if place is not None}
            state = [np.ravel(part) for part in seen.states.values()]
            tick = replace(
                tick,
                images=kept,
                dropped=len(images) - len(kept),
                image_age=dict(seen.image_age),
                state=np.concatenate(state).astype(np.float32) if state else None,
                capture_time=seen.capture_time,
                prompt=seen.task,
            )
        if self._followed is None:
            return tick
        stats, prompt = self._followed.stats, self._followed.prompt
        return replace(
            tick,
            prompt=tick.prompt if prompt is None else prompt,
            counters={name: getattr(stats, name) for name in _COUNTERS},
            connection={
                "state": "trouble" if stats.trouble else "connected" if stats.chunks else "waiting",
                "text": stats.trouble,
            },
        )

    def _place(self, image: Any) -> Any:
        if isinstance(image, EncodedImage):
            return EncodedImage(image.codec, bytes(image.data), image.shape)
        # Whatever else a robot calls an image (a depth map) is not for people.
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
            return None
        position = self._ring.write(image)
        return None if position is None else (position, image.shape)
