"""The panel as a consumer of the sidecar: ticks become pictures, rows and a status line; a person's clicks become commands.

Life cycle: one `Panel` for a run, on a socket that was opened before the run began; `close` ends its thread and viser.
The methods of a consumer are called by one thread, the sidecar's; the web server has a thread and an event loop of its
own. With no browser open a tick costs a row in a list; viser starts with the first browser.

Error policy: nothing that a browser sends raises here, and nothing here reaches the control process but commands, which
that checks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import numpy as np
from aiohttp import web

from env_client.panel.config import PanelConfig
from env_client.panel.door import make_app
from env_client.panel.live import Live
from env_client.panel.robot import RobotModel
from env_client.panel.scene import Scene
from env_client.sidecar.runner import be_modest
from env_client.sidecar.types import Command, EpisodeEnd, EpisodeStart, Mark, RunInfo, TickData

__all__ = ["Panel"]

logger = logging.getLogger(__name__)

_COMMANDS = frozenset(get_args(get_type_hints(Command)["name"]))
# Over how many ticks the rate is taken.
_RATE_TICKS = 30


class Panel:
    """Serves the page. `command` gets what a person asks for, from the web server's thread; it must return at once."""

    def __init__(
        self, config: PanelConfig, listening: socket.socket, command: Callable[[Command], object]
    ) -> None:
        self._config, self._listening, self._command = config, listening, command
        self._live = Live(self._receive)
        self._run: RunInfo | None = None
        self._scene: Scene | None = None
        self._scene_lock = threading.Lock()
        # Of the newest chunk, seconds.
        self._round_trip: float | None = None
        # When each of the newest ticks was, and how many it stands for: some are lost on the way here.
        self._ticks: deque[tuple[float, int]] = deque(maxlen=_RATE_TICKS)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._ended: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._serve, name="panel", daemon=True)
        self._thread.start()
        self._ready.wait(10.0)

    # ---------------------------------------------------------------------------------- the sidecar's thread

    def begin_run(self, run: RunInfo) -> None:
        self._run = run
        self._call(self._live.forget)
        self._put("run", self._described(run))

    def begin_episode(self, start: EpisodeStart) -> None:
        pass

    def tick(self, tick: TickData) -> None:
        self._ticks.append((tick.time, 1 + tick.lost))
        measured = self._measured(tick)
        if tick.round_trip_s is not None:
            self._round_trip = tick.round_trip_s
        images = {camera: tick.jpeg(camera) for camera in tick.images} if self._live.watched else {}
        self._call(self._live.put_tick, self._row(tick, measured), self._status(tick), images)
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
        ended = self._ended
        if ended is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(ended.set)
        self._thread.join(5.0)
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
        """viser's port, or why there is no 3D view. Called in a thread of its own, by the first browser."""
        be_modest()
        with self._scene_lock:
            if self._run is None:
                return "the run has not begun"
            if self._scene is None:
                try:
                    run = self._run
                    model = RobotModel(run.action_names, run.unit, run.unit_per_rad, self._config.urdf)
                except ValueError as error:
                    return str(error)
                self._scene = Scene(model)
            return self._scene.port

    # --------------------------------------------------------------------------------------- the web server

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._until_closed())
        except Exception:
            logger.exception("the panel's web server ended; the run goes on without it")
        finally:
            self._ready.set()
            self._loop.close()

    async def _until_closed(self) -> None:
        self._ended = asyncio.Event()
        app = make_app(self._config, self._live, lambda: asyncio.to_thread(self._open_scene))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, self._listening, shutdown_timeout=1.0).start()
            self._ready.set()
            await self._ended.wait()
            await self._live.close()
        finally:
            await runner.cleanup()

    def _receive(self, message: dict[str, Any]) -> None:
        """A browser's command, cut down to what is expected."""
        name = message.get("name")
        if name not in _COMMANDS:
            return
        kinds = {"note": str, "prompt": str, "episode": int}
        told = {key: message[key] for key, kind in kinds.items() if isinstance(message.get(key), kind)}
        self._command(Command(name=name, **told))  # type: ignore[typeddict-item]

    def _put(self, name: str, value: Any) -> None:
        self._call(self._live.put, name, value)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the web server has ended
            self._loop.call_soon_threadsafe(function, *arguments)


def _plain(values: np.ndarray | None) -> list[float | None] | None:
    """Numbers with three decimals; what JSON cannot say is None."""
    if values is None:
        return None
    return [round(value, 3) if math.isfinite(value) else None for value in values.tolist()]
