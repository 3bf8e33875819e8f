"""A run for the Rerun viewer: `rollout.rrd`, and the live viewer with `--rerun`.

    cameras/<camera>          JPEGs
    joints/<joint>            measured, sent, the policy's; joints/<joint>/chunk: every row of every chunk, as dots
    timings, round_trip       milliseconds
    log                       episodes, judgements, refusals

The whole run is one recording on the timeline `run` (seconds); `tick` counts within an episode.

Life cycle: a consumer of the sidecar, in a thread of its own, because the SDK makes its caller wait under pressure; the file
has no footer, so that memory stays flat and a torn one opens. The live viewer is the SDK's own program on loopback, and is
ended with the run. The blueprint is sent when everything is connected, which is when the SDK takes it reliably.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from env_client.record.files import RunFolder
from env_client.record.steps import RECORDED, measured
from env_client.sidecar.types import EpisodeEnd, EpisodeStart, Mark, RunInfo, TickData

__all__ = ["FILE", "RerunRecord"]

FILE = "rollout.rrd"
_SERIES = ("measured", "sent", "policy")
_COLORS = ([59, 59, 59], [31, 119, 180], [209, 73, 91])
_CHUNK_COLOR = [209, 73, 91, 110]
_TIMINGS = ("late", "read", "think", "send")


class RerunRecord:
    """`folder`: where the file goes, None for no file. `live`: open the viewer."""

    def __init__(
        self, folder: RunFolder | None, *, live: bool, say: Callable[[str], None] = lambda line: None
    ) -> None:
        # That the file has no footer is meant, and told nobody.
        os.environ.setdefault("RUST_LOG", "error")
        import rerun as rr

        self._rr: Any = rr
        self._folder, self._say = folder, say
        self._viewer = _Viewer(say) if live else None
        self._stream: Any = None
        self._run: RunInfo | None = None
        self._names: list[str] = []
        self._running = False

    def begin_run(self, run: RunInfo) -> None:
        rr = self._rr
        self._run = run
        self._names = [name.removesuffix(".pos") for name in run.action_names]
        self._stream = rr.RecordingStream("grasp-cube", recording_id=run.run_id)
        sinks = []
        if self._folder is not None:
            path = str(self._folder.make(run.run_id) / FILE)
            sinks.append(rr.FileSink(path, write_footer=False))
        if self._viewer is not None:
            sinks.append(rr.GrpcSink(self._viewer.address))
        self._stream.set_sinks(*sinks)
        for name in self._names:
            self._stream.log(
                f"joints/{name}",
                rr.SeriesLines(names=list(_SERIES), colors=list(_COLORS), widths=[2.0, 1.0, 1.0]),
                static=True,
            )
            self._stream.log(
                f"joints/{name}/chunk",
                rr.SeriesPoints(names="chunk", colors=_CHUNK_COLOR, markers="circle", marker_sizes=1.0),
                static=True,
            )
        self._stream.log("timings", rr.SeriesLines(names=[f"{n} ms" for n in _TIMINGS]), static=True)
        self._stream.log("round_trip", rr.SeriesPoints(names="round trip ms", markers="diamond"), static=True)
        self._stream.send_blueprint(self._blueprint(run))

    def begin_episode(self, start: EpisodeStart) -> None:
        self._running = True
        self._note(start.unix, f"episode {start.episode} begins: {start.prompt}")

    def tick(self, tick: TickData) -> None:
        run, stream, rr = self._run, self._stream, self._rr
        if not self._running or tick.phase not in RECORDED or run is None:
            return
        stream.set_time("run", duration=tick.unix - run.started)
        stream.set_time("tick", sequence=tick.tick)
        for camera in tick.images:
            stream.log(
                f"cameras/{camera}", rr.EncodedImage(contents=tick.jpeg(camera), media_type="image/jpeg")
            )
        gap = np.full(len(self._names), np.nan)
        lines = [gap if line is None else line for line in (measured(run, tick), tick.sent, tick.requested)]
        for index, name in enumerate(self._names):
            stream.log(f"joints/{name}", rr.Scalars([float(line[index]) for line in lines]))
        seconds = (tick.late_s, tick.read_s, tick.think_s, tick.send_s)
        stream.log("timings", rr.Scalars([1e3 * value for value in seconds]))
        if tick.round_trip_s is not None:
            stream.log("round_trip", rr.Scalars(1e3 * tick.round_trip_s))
        if tick.chunk is not None:
            self._log_chunk(run, tick, tick.chunk)
        if tick.refused or tick.error:
            stream.log("log", rr.TextLog(tick.error or tick.refused, level=rr.TextLogLevel.WARN))

    def end_episode(self, end: EpisodeEnd) -> None:
        self._running = False
        outcome, success = end.result.get("outcome"), end.result.get("success")
        self._note(None, f"episode {end.episode} ended: {outcome}, success {success}")

    def mark(self, mark: Mark) -> None:
        said = {True: "success", False: "failure", None: "no judgement"}[mark.success]
        self._note(None, f"episode {mark.episode}: {said}. {mark.note}")

    def state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        if self._stream is not None:
            self._stream.disconnect()
        if self._viewer is not None:
            self._viewer.close()

    # ------------------------------------------------------------------------------------------ the parts

    def _note(self, unix: float | None, text: str) -> None:
        if unix is not None and self._run is not None:
            self._stream.set_time("run", duration=unix - self._run.started)
        self._stream.log("log", self._rr.TextLog(text))

    def _log_chunk(self, run: RunInfo, tick: TickData, chunk: np.ndarray) -> None:
        """Each row at the time that it was meant for, which lies ahead."""
        captured = tick.time if tick.chunk_capture_time is None else tick.chunk_capture_time
        begin = tick.unix - run.started - (tick.time - captured)
        times = self._rr.TimeColumn("run", duration=begin + np.arange(len(chunk)) / run.fps)
        for index, name in enumerate(self._names):
            columns = self._rr.Scalars.columns(scalars=chunk[:, index].astype(np.float64))
            self._stream.send_columns(f"joints/{name}/chunk", [times], columns)

    def _blueprint(self, run: RunInfo) -> Any:
        import rerun.blueprint as rrb

        cameras = [rrb.Spatial2DView(origin=f"cameras/{name}", name=name) for name in run.cameras]
        joints = [rrb.TimeSeriesView(origin=f"joints/{name}", name=name) for name in self._names]
        times = [
            rrb.TimeSeriesView(contents=["timings", "round_trip"], name="timings (ms)"),
            rrb.TextLogView(origin="log", name="log"),
        ]
        left = rrb.Vertical(*cameras, *times)
        return rrb.Blueprint(
            rrb.Horizontal(left, rrb.Grid(*joints, grid_columns=2), column_shares=[2, 3]),
            rrb.TimePanel(state="collapsed", timeline="run"),
            collapse_panels=True,
        )


class _Viewer:
    """The SDK's viewer: a window where there is a display, a page otherwise."""

    def __init__(self, say: Callable[[str], None]) -> None:
        import rerun_cli

        port, page = _free_port(), _free_port()
        self.address = f"rerun+http://127.0.0.1:{port}/proxy"
        program = Path(rerun_cli.__file__).parent / "rerun"
        command = [str(program), "--bind", "127.0.0.1", "--port", str(port), "--memory-limit", "1GB"]
        has_display = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
        if has_display:
            command += ["--expect-data-soon"]
        else:
            command += ["--serve-web", "--web-viewer-port", str(page), "--server-memory-limit", "1GB"]
            say(f"Rerun: http://127.0.0.1:{page}/?url={self.address.replace('+', '%2B')}")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        # It starts processes of its own: the whole group is ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
