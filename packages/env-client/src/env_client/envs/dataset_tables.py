"""The tables (parquet) and videos of a recorded dataset, read with pyarrow and PyAV.

Error policy: what is missing, cut off, damaged, or declares more than a recording holds is an `EnvError` that names the file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from env_client.envs.env import EnvError

__all__ = ["open_parquet", "read_table", "video_frames"]

INSTALL = "reading datasets needs pyarrow and PyAV: pip install 'env-client[dataset]'"
# More rows than any file of a recording has; a few bytes could declare billions.
MAX_ROWS = 20_000_000


def video_frames(path: Path, times: np.ndarray, tolerance_s: float) -> Iterator[np.ndarray]:
    """The frame nearest to each of the ascending `times` (seconds in the file), as (H, W, 3) uint8 RGB."""
    try:
        import av
    except ImportError as error:
        raise EnvError(INSTALL) from error
    check_there(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            container.seek(max(0, round(times[0] / stream.time_base) - 1), backward=True, stream=stream)
            frames = (frame for frame in container.decode(stream) if frame.pts is not None)
            now: Any = next(frames, None)
            after: Any = next(frames, None)
            for time in times:
                while after is not None and abs(after.time - time) <= abs(now.time - time):
                    now, after = after, next(frames, None)
                if now is None or abs(now.time - time) > tolerance_s:
                    last = "nothing" if now is None else f"{now.time:.3f} s"
                    raise EnvError(
                        f"{path} has no frame at {time:.3f} s (nearest: {last}): the video is cut off"
                    )
                yield now.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise EnvError(f"{path} cannot be decoded ({error}): the video is cut off or damaged") from error


def check_there(path: Path) -> None:
    if not path.is_file():
        raise EnvError(f"{path} is missing: the copy of the dataset is incomplete")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise EnvError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")


def open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvError(INSTALL) from error
    check_there(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise EnvError(f"{path} cannot be read ({error}): the file is cut off or damaged") from error
    if file.metadata.num_rows > MAX_ROWS:
        raise EnvError(f"{path} declares {file.metadata.num_rows} rows; at most {MAX_ROWS} are read")
    return file


def read_table(path: Path, columns: list[str] | None = None, filters: Any = None) -> Any:
    file = open_parquet(path)
    import pyarrow
    import pyarrow.parquet

    missing = [name for name in columns or () if name not in file.schema_arrow.names]
    if missing:
        raise EnvError(f"{path} lacks the column {', '.join(missing)}; info.json promises it")
    try:
        return pyarrow.parquet.read_table(path, columns=columns, filters=filters)
    except (pyarrow.ArrowException, OSError) as error:
        raise EnvError(f"{path} cannot be read ({error}): the file is cut off or damaged") from error
