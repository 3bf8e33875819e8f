"""Frames -> plain values, arrays and still-encoded images (`codec.py`: the way there).

Life cycle: `unpack` is pure. It refuses, with `InvalidInput`, anything that is not well-formed, before it allocates
memory for it.

The decoder is our own because of three things that `msgpack.unpackb` cannot do: an array is a view into the
received frame (no copy), depth and node count are checked before anything is allocated for them, and a
declared length is compared with the bytes that are really there.
"""

import functools
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from env_client.wire.codec import DEFAULT_LIMITS, Dialect, EncodedImage, Limits
from env_client.wire.errors import InvalidInput, shown

__all__ = ["unpack"]


def unpack(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> tuple[Any, Dialect | None]:
    """The value in one frame, and the dialect of its arrays (None when it holds none).

    Arrays are read-only views into `data`; bin values outside arrays are `bytes`.
    Raises `InvalidInput` when the frame is malformed, too large, too deep, or holds a refused dtype.
    """
    if len(data) > limits.max_bytes:
        raise InvalidInput(
            f"the frame has {len(data)} bytes, at most {limits.max_bytes} are read: send images as JPEG or smaller"
        )
    decoder = _Decoder(data, limits)
    value = decoder.value(0)
    if decoder.at != decoder.end:
        raise InvalidInput(
            f"the frame holds {decoder.end - decoder.at} surplus bytes after its msgpack value; one value was expected"
        )
    return _settled(value), decoder.dialect


class _Decoder:
    """A cursor over one frame."""

    __slots__ = ("at", "dialect", "end", "limits", "nodes", "view")

    def __init__(self, data: bytes | memoryview, limits: Limits):
        self.view = memoryview(data)
        self.at = 0
        self.end = len(self.view)
        self.limits = limits
        self.nodes = 0
        self.dialect: Dialect | None = None

    def value(self, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > self.limits.max_nodes:
            raise InvalidInput(
                f"the frame holds more than {self.limits.max_nodes} values; send numbers as arrays, not as lists"
            )
        # Spelled out, most frequent first: this is where an observation's fifty values cost their time.
        at = self.at
        if at >= self.end:
            raise InvalidInput(f"the frame ends after {self.end} bytes in the middle of a value")
        code = self.view[at]
        self.at = at + 1
        if 0xA0 <= code < 0xC0:
            stop = at + 1 + (code & 0x1F)
            if stop > self.end:
                return self.string(code & 0x1F)
            self.at = stop
            try:
                return str(self.view[at + 1 : stop], "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidInput(f"a string at byte {at + 1} is not UTF-8: {error.reason}") from error
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 256
        if code < 0x90:
            if code == 0x84 and self.view[at + 1 : at + 1 + len(_ARRAY_START)] == _ARRAY_START:
                return self.openpi_array(depth)
            return self.map(code & 0x0F, depth)
        if code < 0xA0:
            return self.array(code & 0x0F, depth)
        reader = _READERS[code - 0xC0]
        if reader is None:
            raise InvalidInput(
                f"byte 0x{code:02x} at {self.at - 1} is a msgpack extension or unused; plain msgpack values were expected"
            )
        return reader(self, depth)

    def take(self, count: int) -> memoryview:
        at, stop = self.at, self.at + count
        if stop > self.end:
            raise InvalidInput(
                f"a value at byte {at} declares {count} bytes, but the frame has only {self.end - at} left"
            )
        self.at = stop
        return self.view[at:stop]

    def openpi_array(self, depth: int) -> Any:
        """An array in the order in which every openpi encoder writes it; other orders go the general way."""
        start, nodes = self.at, self.nodes
        if depth < self.limits.max_depth:
            self.at = start + len(_ARRAY_START)
            self.nodes = nodes + 3
            data = self.value(depth + 1)
            if self.view[self.at : self.at + len(_DTYPE_KEY)] == _DTYPE_KEY:
                self.at += len(_DTYPE_KEY)
                dtype = self.value(depth + 1)
                if self.view[self.at : self.at + len(_SHAPE_KEY)] == _SHAPE_KEY:
                    self.at += len(_SHAPE_KEY)
                    self.nodes += 2
                    fields = {"data": data, "dtype": dtype, "shape": self.value(depth + 1)}
                    self.dialect = self.dialect or Dialect.OPENPI
                    return self.ndarray(fields, "dtype", with_shape=True)
        self.at, self.nodes = start, nodes
        return self.map(4, depth)

    def number(self, form: struct.Struct) -> Any:
        at, stop = self.at, self.at + form.size
        if stop > self.end:
            self.take(form.size)
        self.at = stop
        return form.unpack_from(self.view, at)[0]

    def string(self, count: int) -> str:
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"a string at byte {self.at - count} is not UTF-8: {error.reason}") from error

    def open_container(self, count: int, depth: int, bytes_each: int) -> None:
        if depth >= self.limits.max_depth:
            raise InvalidInput(f"the frame nests deeper than {self.limits.max_depth} containers")
        if count * bytes_each > self.end - self.at:
            raise InvalidInput(
                f"a container at byte {self.at} declares {count} entries, but the frame has only "
                f"{self.end - self.at} bytes left"
            )

    def array(self, count: int, depth: int) -> list:
        self.open_container(count, depth, 1)
        value, inner = self.value, depth + 1
        return [_settled(value(inner)) for _ in range(count)]

    def map(self, count: int, depth: int) -> Any:
        self.open_container(count, depth, 2)
        result: dict[Any, Any] = {}
        value, inner = self.value, depth + 1
        for _ in range(count):
            key = value(inner)
            if type(key) is not str:
                if isinstance(key, memoryview):
                    key = bytes(key)
                if not isinstance(key, str | bytes | int):
                    raise InvalidInput(f"a map key of type {type(key).__name__}; strings were expected")
            if key in result:
                raise InvalidInput(f"the map key {shown(key)} comes twice")
            result[key] = value(inner)
        return self.special(result)

    def special(self, value: dict) -> Any:
        """A map as it is, or the array, scalar or image that it marks."""
        if b"__ndarray__" in value or "__ndarray__" in value:
            self.dialect = self.dialect or Dialect.OPENPI
            return self.ndarray(_texts(value), "dtype", with_shape=True)
        if b"__npgeneric__" in value or "__npgeneric__" in value:
            self.dialect = self.dialect or Dialect.OPENPI
            return self.scalar(_texts(value))
        if b"nd" in value and (b"type" in value or b"kind" in value):
            self.dialect = self.dialect or Dialect.MSGPACK_NUMPY
            fields = _texts(value)
            if _text(fields.get("kind", "")) not in ("", "None"):
                raise InvalidInput(
                    f"a msgpack-numpy array of kind {_text(fields['kind'])!r} (pickled objects and structured "
                    "arrays are never read); bool, int, uint and float arrays were expected"
                )
            with_shape = fields["nd"] is True
            array = self.ndarray(fields, "type", with_shape=with_shape)
            return array if with_shape else array[()]
        if b"complex" in value:
            raise InvalidInput("a complex number; bool, int, uint and float values were expected")
        if "__image__" in value:
            return _encoded_image(value)
        for key, item in value.items():
            if isinstance(item, memoryview):
                value[key] = bytes(item)
        return value

    def scalar(self, fields: dict[str, Any]) -> Any:
        """openpi sends a scalar's plain value; its bytes, which some peers send, are read as well."""
        data, dtype = fields.get("data"), _dtype(fields.get("dtype"))
        if isinstance(data, memoryview):
            return self.ndarray(fields, "dtype", with_shape=False)[()]
        try:
            if not isinstance(data, bool | int | float):
                raise TypeError("not a number")
            with np.errstate(over="ignore"):
                return dtype.newbyteorder("=").type(data)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(f"a scalar of dtype {dtype} holds {shown(data)}: {error}") from error

    def ndarray(self, fields: dict[str, Any], dtype_key: str, *, with_shape: bool) -> np.ndarray:
        data = fields.get("data")
        if not isinstance(data, memoryview):
            raise InvalidInput(
                f"an array's data is of type {type(data).__name__}; bytes (msgpack bin) were expected"
            )
        dtype = _dtype(fields.get(dtype_key))
        shape = _shape(fields.get("shape"), self.limits.max_ndim) if with_shape else ()
        expected = math.prod(shape) * dtype.itemsize
        if expected != len(data):
            raise InvalidInput(
                f"an array of shape {list(shape)} and dtype {dtype} needs {expected} bytes, but {len(data)} came"
            )
        array = np.frombuffer(data, dtype).reshape(shape)
        return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _settled(value: Any) -> Any:
    """Bytes outside arrays and images leave the frame: callers may hash and keep them."""
    return bytes(value) if isinstance(value, memoryview) else value


def _texts(value: dict) -> dict[str, Any]:
    return {_text(key): item for key, item in value.items()}


def _text(value: Any) -> str:
    if isinstance(value, bytes | memoryview):
        return bytes(value[:64]).decode("utf-8", "replace")
    return str(value)[:64]


def _dtype(value: Any) -> np.dtype:
    return _named_dtype(_text(value))


@functools.lru_cache(64)
def _named_dtype(text: str) -> np.dtype:
    # Parsed by hand: np.dtype() accepts structured and object descriptions, and even runs a comma parser.
    kind, size = text.lstrip("<>|=")[:1], text.lstrip("<>|=")[1:]
    if kind not in ("b", "i", "u", "f") or size not in ("1", "2", "4", "8"):
        raise InvalidInput(
            f"an array of dtype {text!r}; bool, int, uint and float of 1 to 8 bytes were expected"
        )
    try:
        return np.dtype(text)
    except TypeError as error:
        raise InvalidInput(f"an array of dtype {text!r}: {error}") from error


def _shape(value: Any, max_ndim: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > max_ndim:
        raise InvalidInput(
            f"an array's shape is {shown(value, 80)}; a list of at most {max_ndim} sizes was expected"
        )
    for size in value:
        if type(size) is not int or not 0 <= size < 2**40:
            raise InvalidInput(f"an array's shape is {shown(value, 80)}; sizes of zero or more were expected")
    return tuple(value)


def _encoded_image(value: dict) -> EncodedImage:
    codec, data = value.get("__image__"), value.get("data")
    if codec not in ("jpeg", "png"):
        raise InvalidInput(f"an image encoded as {shown(codec, 40)}; 'jpeg' and 'png' are read")
    if not isinstance(data, memoryview):
        raise InvalidInput(
            f"an image's data is of type {type(data).__name__}; bytes (msgpack bin) were expected"
        )
    shape = _shape(value.get("shape"), 3)
    if len(shape) != 3 or shape[2] != 3 or not all(shape):
        raise InvalidInput(f"an image's shape is {list(shape)}; [height, width, 3] was expected")
    return EncodedImage(codec, data, (shape[0], shape[1], 3))


_U8, _U16, _U32, _U64 = (struct.Struct(">" + code) for code in "BHIQ")
_I8, _I16, _I32, _I64 = (struct.Struct(">" + code) for code in "bhiq")
_F32, _F64 = struct.Struct(">f"), struct.Struct(">d")

_Reader = Callable[[_Decoder, int], Any]


def _number_reader(form: struct.Struct) -> _Reader:
    return lambda decoder, depth: decoder.number(form)


def _bin_reader(form: struct.Struct) -> _Reader:
    return lambda decoder, depth: decoder.take(decoder.number(form))


def _string_reader(form: struct.Struct) -> _Reader:
    return lambda decoder, depth: decoder.string(decoder.number(form))


def _array_reader(form: struct.Struct) -> _Reader:
    return lambda decoder, depth: decoder.array(decoder.number(form), depth)


def _map_reader(form: struct.Struct) -> _Reader:
    return lambda decoder, depth: decoder.map(decoder.number(form), depth)


# What follows the type byte of an array's map, and the two keys after its data, as openpi's encoders write them.
_ARRAY_START = b"\xc4\x0b__ndarray__\xc3\xc4\x04data"
_DTYPE_KEY, _SHAPE_KEY = b"\xc4\x05dtype", b"\xc4\x05shape"

# By type byte, from 0xc0 to 0xdf; None marks the unused byte and the extension types.
_READERS: list[_Reader | None] = [
    lambda decoder, depth: None,
    None,
    lambda decoder, depth: False,
    lambda decoder, depth: True,
    *(_bin_reader(form) for form in (_U8, _U16, _U32)),
    *(None for _ in range(3)),
    *(_number_reader(form) for form in (_F32, _F64, _U8, _U16, _U32, _U64, _I8, _I16, _I32, _I64)),
    *(None for _ in range(5)),
    *(_string_reader(form) for form in (_U8, _U16, _U32)),
    *(_array_reader(form) for form in (_U16, _U32)),
    *(_map_reader(form) for form in (_U16, _U32)),
]
