"""Files that are good at every moment: JSON that is replaced as a whole, and JSON lines that only grow.

A line is one `write` of the kernel's, so that it outlives the process from then on (a power cut is another matter: nothing
is synced). A process that is killed within one leaves a torn last line, which the reader leaves out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from env_client.text_files import load_json

__all__ = [
    "JsonLines",
    "RunFolder",
    "as_written",
    "make_run_folder",
    "plain",
    "read_json",
    "read_lines",
    "write_json",
]


def plain(value: Any) -> Any:
    """Plain values of JSON; NaN and infinity become null, which JSON has no other word for."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Replace the file as a whole: a reader finds the old one or the new one. Raises `OSError`."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A map. Raises `OSError`, or `ValueError` when the file holds something else."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; a map was expected")
    return value


@contextlib.contextmanager
def as_written(what: Path) -> Iterator[None]:
    """Around the use of what was read: a value that is missing or of another kind is a `ValueError` that names the file."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{what} is damaged, or of another version ({type(error).__name__}: {error})"
        ) from error


class JsonLines:
    """Appends one line per value, each at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, value: dict[str, Any]) -> None:
        """Raises `OSError`, such as a full disk; what it left of the line is taken back."""
        line = json.dumps(plain(value), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        begin, left = self._file.tell(), memoryview(line)
        try:
            # What does not fit is written in part first; only the next attempt says why.
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), begin)
            raise

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `JsonLines`, without a torn one at the end. Raises `OSError`, and `ValueError` with the line's
    number where one in the middle is damaged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"line {number} of {path} is damaged ({error})") from error
            if line.endswith(b"\n") and isinstance(value, dict):
                yield value


class RunFolder:
    """The folder of a run that several consumers write into; the first who asks makes it."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._path: Path | None = None
        self._lock = threading.Lock()

    def make(self, name: str) -> Path:
        """Raises `OSError`."""
        with self._lock:
            if self._path is None:
                self._path = make_run_folder(self._parent, name)
            return self._path


def make_run_folder(parent: Path, name: str) -> Path:
    """A new folder of that name; where there is one, NAME_2 and so on. Raises `OSError`."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(17, "every name is taken", str(parent / name))
