"""msgpack with NumPy arrays: plain values, arrays and still-encoded images -> frames (`decoder.py`: the way back).

Life cycle: the functions are pure. `pack` refuses what the other side could not read.

Two array dialects are written and read, and `unpack` says which one came so that the reply can use the same:

    openpi          {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}, scalars `__npgeneric__`
    msgpack-numpy   {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [..], b"data": bytes}

Object arrays are refused in both: in the first they are raw pointers, in the second a pickle.
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import msgpack
import numpy as np

from env_client.wire.errors import InvalidInput

__all__ = [
    "DEFAULT_LIMITS",
    "Dialect",
    "EncodedImage",
    "Frame",
    "LaterImage",
    "Limits",
    "pack",
    "pack_frame",
    "pack_parts",
]

# Data from this size on, in bytes, is not copied by `pack_parts`; a copy of less is cheaper than a part.
PART_BYTES = 4096
# Stands for such data until the rest is packed. Random, and never sent, so that nothing a peer makes up equals it.
_PLACEHOLDER = os.urandom(16)


class Dialect(StrEnum):
    """How arrays are marked."""

    OPENPI = "openpi"
    MSGPACK_NUMPY = "msgpack-numpy"


@dataclass(frozen=True)
class Limits:
    """Caps that a frame must respect."""

    # Whole frame, in bytes: 16 raw 480x640x3 images and some room.
    max_bytes: int = 32 * 1024 * 1024
    # Containers inside containers; an observation with history needs 5.
    max_depth: int = 16
    # Values of every kind, keys included; an observation has about 50.
    max_nodes: int = 20_000
    # Dimensions of one array.
    max_ndim: int = 8


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class EncodedImage:
    """An image that is still compressed: `{"__image__": codec, "data": bin, "shape": [H, W, 3]}`."""

    codec: str
    data: bytes | memoryview
    # (height, width, 3) after decoding, RGB uint8.
    shape: tuple[int, int, int]


@dataclass
class LaterImage:
    """An `EncodedImage` whose data is made when it is asked for, once: while what lies before it in its frame is sent."""

    codec: str
    shape: tuple[int, int, int]
    compress: Callable[[], bytes]

    @cached_property
    def data(self) -> bytes:
        return self.compress()


class Frame:
    """A packed frame: what it says, and the data of its large arrays and images, which stay where they are."""

    def __init__(self, skeleton: bytes, large: list[memoryview | LaterImage]):
        self._skeleton, self._large = skeleton, large

    def fragments(self) -> Iterator[tuple[list[bytes | memoryview], bool]]:
        """The frame's pieces in turn, up to where one is still to be made; and whether these are the last."""
        parts: list[bytes | memoryview] = []
        at, waiting = 0, sum(isinstance(data, LaterImage) for data in self._large)
        for data in self._large:
            # The placeholder was packed with a two-byte header of its own.
            found = self._skeleton.index(_PLACEHOLDER, at)
            content = memoryview(data.data) if isinstance(data, LaterImage) else data
            parts += [self._skeleton[at : found - 2] + _bin_header(len(content)), content]
            at = found + len(_PLACEHOLDER)
            if isinstance(data, LaterImage):
                waiting -= 1
                if waiting:
                    yield parts, False
                    parts = []
        yield [*parts, self._skeleton[at:]], True


def pack(value: Any, dialect: Dialect | str = Dialect.OPENPI) -> bytes:
    """One frame of plain values, NumPy arrays, NumPy scalars and `EncodedImage`s.

    Raises `InvalidInput` for a value that has no place on the wire (an object array, a tensor, a set).
    """
    default = _pack_openpi if dialect == Dialect.OPENPI else _pack_msgpack_numpy
    try:
        return msgpack.packb(value, default=default, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"this cannot be packed for the wire: {error}") from error


def pack_parts(value: Any, dialect: Dialect | str = Dialect.OPENPI) -> list[bytes | memoryview]:
    """The same frame as `pack` in pieces, with the data of large arrays and images as views, not as copies.

    The values must not change until the pieces are sent.
    """
    return [part for parts, _ in pack_frame(value, dialect).fragments() for part in parts]


def pack_frame(value: Any, dialect: Dialect | str = Dialect.OPENPI) -> Frame:
    """The same frame as `pack`, to be sent piece by piece; it may hold `LaterImage`s.

    The values must not change until it is sent. Raises `InvalidInput` as `pack` does.
    """
    large: list[memoryview | LaterImage] = []
    plain = _pack_openpi if dialect == Dialect.OPENPI else _pack_msgpack_numpy

    def default(value: Any) -> dict:
        if isinstance(value, LaterImage):
            large.append(value)
            value = EncodedImage(value.codec, _PLACEHOLDER, value.shape)
        fields = plain(value)
        key = "data" if "data" in fields else b"data"
        data = fields[key]
        if isinstance(data, memoryview | bytes) and len(data) >= PART_BYTES:
            large.append(memoryview(data))
            fields[key] = _PLACEHOLDER
        return fields

    try:
        skeleton = msgpack.packb(value, default=default, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"this cannot be packed for the wire: {error}") from error
    return Frame(skeleton, large)


def _bin_header(length: int) -> bytes:
    if length < 65536:
        return struct.pack(">BH", 0xC5, length)
    if length < 2**32:
        return struct.pack(">BI", 0xC6, length)
    raise InvalidInput(f"an array of {length} bytes; less than 4 GB fit into one msgpack value")


def _array_bytes(array: np.ndarray) -> memoryview | bytes:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"an array of dtype {array.dtype}; bool, int, uint and float arrays travel")
    if array.size == 0 or array.ndim == 0:
        return array.tobytes()
    # msgpack copies from the view straight into its buffer; tobytes() would be a second copy of each image.
    return memoryview(np.ascontiguousarray(array)).cast("B")


def _pack_openpi(value: Any) -> dict:
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": _array_bytes(value),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        _array_bytes(np.asarray(value))
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return _pack_other(value)


def _pack_msgpack_numpy(value: Any) -> dict:
    if isinstance(value, np.ndarray):
        return {
            b"nd": True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": value.shape,
            b"data": _array_bytes(value),
        }
    if isinstance(value, np.generic):
        array = np.asarray(value)
        return {b"nd": False, b"type": array.dtype.str, b"data": _array_bytes(array)}
    return _pack_other(value)


def _pack_other(value: Any) -> dict:
    if isinstance(value, EncodedImage):
        return {"__image__": value.codec, "data": value.data, "shape": value.shape}
    raise TypeError(f"a value of type {type(value).__name__}")
