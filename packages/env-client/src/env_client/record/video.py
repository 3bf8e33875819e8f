"""The videos of one episode, one file for each camera, written while it runs.

H.264 in MP4 fragments: a file that was torn opens up to its last fragment (a third of a second), one that was closed is an
ordinary MP4. All cameras hold the same ticks, so that frame k of one belongs to frame k of the others; a frame's time
is its tick's, so pictures that were left out shorten nothing. One thread encodes; PyAV is imported when it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from env_client.record.statistics import ImageStats
from env_client.sidecar.types import TickData, has_frames

__all__ = ["CODEC", "EpisodeVideos", "video_name"]

CODEC = {"name": "libx264", "preset": "superfast", "crf": "23"}
# Of every so many frames one is counted for the dataset's statistics.
_COUNTED = 5


def video_name(episode: int, camera: str) -> str:
    return f"episode_{episode:06d}_{camera}.mp4"


class EpisodeVideos:
    """`add` each tick, then `close`. Raises what PyAV raises: `av.error.FFmpegError` is an `OSError` for a full disk."""

    def __init__(
        self, folder: Path, episode: int, cameras: Sequence[str], fps: float, *, key_frames: int = 10
    ) -> None:
        """`key_frames`: one picture of so many stands alone; training, which reads at random, likes few between."""
        self.paths = {camera: folder / video_name(episode, camera) for camera in cameras}
        # Frames written, ticks whose pictures were missing, and {camera: (height, width)} in pixels.
        self.frames = 0
        self.missing = 0
        self.sizes: dict[str, tuple[int, int]] = {}
        self.stats = {camera: ImageStats() for camera in cameras}
        self._cameras, self._fps, self._key_frames = tuple(cameras), fps, key_frames
        self._files: dict[str, tuple[Any, Any]] = {}
        self._first: int | None = None

    def add(self, tick: TickData) -> int | None:
        """The frame's number; None when a camera's picture is missing or has changed its size."""
        if not has_frames(tick, self._cameras):
            self.missing += bool(self._cameras)
            return None
        images = {camera: _even(tick.rgb(camera)) for camera in self._cameras}
        sizes = {camera: image.shape[:2] for camera, image in images.items()}
        if not self._files:
            self._open(images)
        if sizes != self.sizes:
            self.missing += 1
            return None
        if self._first is None:
            self._first = tick.tick
        for camera, image in images.items():
            self._encode(camera, image, tick.tick - self._first)
            if self.frames % _COUNTED == 0:
                self.stats[camera].add(image)
        self.frames += 1
        return self.frames - 1

    def close(self) -> None:
        """Finish the files. Safe to call twice."""
        files, self._files = self._files, {}
        for container, stream in files.values():
            try:
                container.mux(stream.encode())
            finally:
                container.close()

    def _open(self, images: dict[str, np.ndarray]) -> None:
        import av

        rate = Fraction(self._fps).limit_denominator(1000)
        for camera, image in images.items():
            height, width = self.sizes[camera] = (image.shape[0], image.shape[1])
            container = av.open(
                str(self.paths[camera]),
                "w",
                options={"movflags": "hybrid_fragmented+frag_keyframe+empty_moov", "flush_packets": "1"},
            )
            stream = container.add_stream(
                CODEC["name"],
                rate=rate,
                options={"preset": CODEC["preset"], "crf": CODEC["crf"], "tune": "zerolatency", "bf": "0"},
            )
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.time_base = stream.codec_context.time_base = 1 / rate
            stream.codec_context.gop_size = self._key_frames
            stream.codec_context.thread_count = 1
            self._files[camera] = (container, stream)

    def _encode(self, camera: str, image: np.ndarray, number: int) -> None:
        import av

        container, stream = self._files[camera]
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = number, stream.codec_context.time_base
        container.mux(stream.encode(frame))


def _even(image: np.ndarray) -> np.ndarray:
    """Without the last row or column where there is an odd number: colour is stored for two by two pixels."""
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    return np.ascontiguousarray(image[:height, :width])
