"""The panel as a consumer of the sidecar: ticks become pictures, rows and a status line for the door's process.

Life cycle: one `Panel` for a run, on a socket that was opened before the run began; it starts the door (`process.py`), which
serves the browsers and hands their commands to the control process itself; `close` ends the door and viser. The methods of a
consumer are called by one thread, the sidecar's. With no browser open a tick costs a row; viser starts with the first browser.

Error policy: a door that is gone is an `OSError`, which ends this consumer and no other.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import socket
import subprocess
import sys
import threading
from collections import deque
from multiprocessing import Pipe
from typing import Any

import numpy as np

from env_client.panel.config import PanelConfig
from env_client.panel.robot import RobotModel
from env_client.panel.scene import Scene
from env_client.sidecar.runner import be_modest
from env_client.sidecar.types import EpisodeEnd, EpisodeStart, Mark, RunInfo, TickData

__all__ = ["Panel"]

# Over how many ticks the rate is taken.
_RATE_TICKS = 30


class Panel:
    """Has the page served. Raises `OSError` where the door's process cannot be started."""

    def __init__(self, config: PanelConfig, listening: socket.socket, commands: socket.socket) -> None:
        """`listening` is where browsers come in, `commands` where the door writes what they ask for
        (`commands.py`); both belong to the door from now on."""
        self._config = config
        self._watched = False
        self._run: RunInfo | None = None
        self._scene: Scene | None = None
        # Of the newest chunk, seconds.
        self._round_trip: float | None = None
        # When each of the newest ticks was, and how many it stands for: some are lost on the way here.
        self._ticks: deque[tuple[float, int]] = deque(maxlen=_RATE_TICKS)
        self._ready = threading.Event()
        self._sending = threading.Lock()
        self._connection, theirs = Pipe(duplex=True)
        fds = [theirs.fileno(), listening.fileno(), commands.fileno()]
        try:
            self._door = subprocess.Popen(
                [sys.executable, "-m", "env_client.panel.process", *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
            )
        finally:
            theirs.close()
            listening.close()
            commands.close()
        self._tell("config", config)
        threading.Thread(target=self._receive, name="panel", daemon=True).start()
        self._ready.wait(10.0)

    # ---------------------------------------------------------------------------------- the sidecar's thread

    def begin_run(self, run: RunInfo) -> None:
        self._run = run
        self._tell("forget", None)
        self._put("run", self._described(run))

    def begin_episode(self, start: EpisodeStart) -> None:
        pass

    def tick(self, tick: TickData) -> None:
        self._ticks.append((tick.time, 1 + tick.lost))
        measured = self._measured(tick)
        if tick.round_trip_s is not None:
            self._round_trip = tick.round_trip_s
        images = {camera: tick.jpeg(camera) for camera in tick.images} if self._watched else {}
        self._tell("tick", (self._row(tick, measured), self._status(tick), images))
        if tick.chunk is not None:
            # Row 0 belongs to the tick whose observation was sent.
            began = tick.time - (tick.round_trip_s or 0.0)
            self._put("chunk", {"time": round(began, 3), "rows": [_plain(row) for row in tick.chunk]})
        if self._scene is not None:
            if measured is not None:
                self._scene.draw(measured)
            if tick.chunk is not None:
                self._scene.draw_chunk(tick.chunk)

    def end_episode(self, end: EpisodeEnd) -> None:
        self._put("chunk", None)
        if self._scene is not None:
            self._scene.draw_chunk(None)

    def mark(self, mark: Mark) -> None:
        """Shown through the state, which names it."""

    def state(self, state: dict[str, Any]) -> None:
        self._put("state", state)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._tell("close", None)
        try:
            self._door.wait(5.0)
        except subprocess.TimeoutExpired:
            self._door.kill()
            self._door.wait()
        if self._scene is not None:
            self._scene.close()

    # ------------------------------------------------------------------------------------------ ticks as values

    def _described(self, run: RunInfo) -> dict[str, Any]:
        policy = run.policy or {}
        return {
            "id": run.run_id,
            "robot": run.robot,
            "names": [name.removesuffix(".pos") for name in run.action_names],
            "unit": run.unit,
            "cameras": list(run.cameras),
            "fps": run.fps,
            "server": run.server,
            "policy": policy.get("type", ""),
            "execution": run.execution,
        }

    def _measured(self, tick: TickData) -> np.ndarray | None:
        """(A,) the measured value of each action value."""
        index = None if self._run is None else self._run.state_index
        if tick.state is None or index is None or not len(index) or index.max() >= len(tick.state):
            return None
        return tick.state[index]

    def _row(self, tick: TickData, measured: np.ndarray | None) -> list[Any]:
        """[time, measured, commanded, predicted, a chunk begins, episode, run | move | paused | idle]."""
        begins = tick.origin is not None and tick.origin.boundary
        values = (_plain(measured), _plain(tick.sent), _plain(tick.requested))
        return [round(tick.time, 3), *values, begins, tick.episode, tick.phase]

    def _status(self, tick: TickData) -> dict[str, Any]:
        span = self._ticks[-1][0] - self._ticks[0][0]
        passed = sum(count for _, count in self._ticks) - self._ticks[0][1]
        return {
            "episode": tick.episode,
            "step": tick.tick,
            "phase": tick.phase,
            "rate": round(passed / span, 1) if span > 0 else 0.0,
            "starved": tick.counters.get("starved", 0),
            "chunks": tick.counters.get("chunks", 0),
            "round_trip_ms": None if self._round_trip is None else round(self._round_trip * 1e3),
            "connection": tick.connection,
            "refused": tick.refused,
            "held": tick.held,
            "error": tick.error,
            "prompt": tick.prompt,
        }

    # ---------------------------------------------------------------------------------------------- the 3D view

    def _open_scene(self) -> int | str:
        """viser's port, or why there is no 3D view. In a thread of its own; the door asks again only after a refusal."""
        be_modest()
        run = self._run
        if run is None:
            return "the run has not begun"
        try:
            model = RobotModel(run.action_names, run.unit, run.unit_per_rad, self._config.urdf)
        except ValueError as error:
            return str(error)
        self._scene = Scene(model)
        return self._scene.port

    def _show_scene(self) -> None:
        with contextlib.suppress(OSError):
            self._tell("scene", self._open_scene())

    # --------------------------------------------------------------------------------------- the door's process

    def _receive(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                # JSON: the door talks to browsers, so nothing that it says is unpickled.
                event, value = json.loads(self._connection.recv_bytes())
                if event == "ready":
                    self._ready.set()
                elif event == "watched":
                    self._watched = value
                elif event == "scene":
                    threading.Thread(target=self._show_scene, name="scene", daemon=True).start()
        self._ready.set()

    def _put(self, name: str, value: Any) -> None:
        self._tell("put", (name, value))

    def _tell(self, event: str, value: Any) -> None:
        data = pickle.dumps((event, value), protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.send_bytes(data)


def _plain(values: np.ndarray | None) -> list[float | None] | None:
    """Numbers with three decimals; what JSON cannot say is None."""
    if values is None:
        return None
    return [round(value, 3) if math.isfinite(value) else None for value in values.tolist()]
