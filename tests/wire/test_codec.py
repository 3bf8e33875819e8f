"""Frames: what is read, what is refused, in both dialects."""

import contextlib
import subprocess
import sys

import msgpack
import msgpack_numpy
import numpy as np
import pytest
from env_client.wire import DEFAULT_LIMITS, Dialect, EncodedImage, InvalidInput, Limits, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = ["?", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", ">f4", ">i2"]

arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(max_size=70)
)
values = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=25,
)


def same(left, right) -> bool:
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.shape == right.shape
            and left.dtype.newbyteorder("=") == right.dtype
            and left.astype(right.dtype).tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return np.float64(left).tobytes() == np.float64(right).tobytes()
    return type(left) is type(right) and left == right


@settings(max_examples=300, deadline=None)
@given(values, st.sampled_from(list(Dialect)))
def test_what_is_packed_is_unpacked(value, dialect):
    """Every plain value and array survives the round trip in both dialects."""
    back, _ = unpack(pack(value, dialect))
    assert same(value, back)


@settings(max_examples=300, deadline=None)
@given(values)
def test_plain_msgpack_is_read_as_msgpack_reads_it(value):
    """Our decoder agrees with the msgpack package on every frame that the latter's encoder makes."""
    frame = msgpack.packb(value, default=lambda array: array.tolist(), use_bin_type=True)
    assert same(msgpack.unpackb(frame, strict_map_key=False), unpack(frame)[0])


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused_by_name_or_read(frame):
    """Any bytes give a value or an `InvalidInput`, nothing else."""
    with contextlib.suppress(InvalidInput):
        unpack(frame)


@settings(max_examples=300, deadline=None)
@given(values, st.data())
def test_damaged_frames_are_refused_by_name_or_read(value, data):
    """A valid frame with bytes changed or cut gives a value or an `InvalidInput`."""
    frame = bytearray(pack(value))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidInput):
        unpack(bytes(frame[: data.draw(st.integers(1, len(frame)))]))


def test_the_dialect_of_msgpack_numpy_is_read_from_its_own_encoder():
    """Frames of PyPI's msgpack-numpy, with arrays and scalars, are read, and the dialect is told."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    frame = msgpack.packb({"a": array, "s": np.float64(2.5)}, default=msgpack_numpy.encode)
    value, dialect = unpack(frame)
    assert dialect == Dialect.MSGPACK_NUMPY
    assert same(array, value["a"])
    assert value["s"] == 2.5
    back = msgpack.unpackb(pack({"a": array}, Dialect.MSGPACK_NUMPY), object_hook=msgpack_numpy.decode)
    assert same(array, back["a"])


def test_the_dialect_of_openpi_is_read_by_the_openpi_client_package():
    """openpi-client's own msgpack_numpy reads what we pack, and we read what it packs."""
    from openpi_client import msgpack_numpy as openpi

    array = np.arange(6, dtype=np.int16)
    assert same(array, openpi.unpackb(pack({"a": array}))["a"])
    value, dialect = unpack(openpi.Packer().pack({"a": array, "s": np.float32(1)}))
    assert dialect == Dialect.OPENPI
    assert same(array, value["a"])
    assert value["s"] == np.float32(1)


def test_an_array_is_a_view_into_the_frame():
    """Decoding an image copies nothing, and nobody can write into the frame through it."""
    frame = pack({"image": np.zeros((480, 640, 3), np.uint8)})
    image = unpack(frame)[0]["image"]
    assert np.shares_memory(image, np.frombuffer(frame, np.uint8))
    assert not image.flags.writeable


def marked(**fields) -> bytes:
    return msgpack.packb({b"__ndarray__": True} | {key.encode(): value for key, value in fields.items()})


REFUSED = {
    "object array": (marked(data=b"\0" * 8, dtype="|O", shape=[1]), "dtype '|O'"),
    "pickled object": (
        msgpack.packb({b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b"cos\nsystem\n"}),
        "kind 'O'",
    ),
    "structured array": (marked(data=b"", dtype="i4,i4", shape=[0]), "dtype 'i4,i4'"),
    "complex array": (marked(data=b"\0" * 8, dtype="<c8", shape=[1]), "dtype '<c8'"),
    "long double": (marked(data=b"\0" * 16, dtype="<f16", shape=[1]), "dtype '<f16'"),
    "time array": (marked(data=b"\0" * 8, dtype="<M8", shape=[1]), "dtype"),
    "negative shape": (marked(data=b"", dtype="<f4", shape=[-1]), "zero or more"),
    "float shape": (marked(data=b"", dtype="<f4", shape=[1.0]), "zero or more"),
    "bool shape": (marked(data=b"\0", dtype="|u1", shape=[True]), "zero or more"),
    "overflowing shape": (marked(data=b"", dtype="<f4", shape=[2**39, 2**39, 2**39]), "needs"),
    "surplus data": (marked(data=b"\0" * 9, dtype="<f4", shape=[2]), "needs 8 bytes, but 9 came"),
    "missing data": (marked(dtype="<f4", shape=[2]), "data is of type NoneType"),
    "text data": (marked(data="x", dtype="|u1", shape=[1]), "data is of type str"),
    "nine dimensions": (marked(data=b"\0", dtype="|u1", shape=[1] * 9), "at most 8 sizes"),
    "surplus bytes": (msgpack.packb({"a": 1}) + b"\0", "1 surplus bytes"),
    "nesting": (b"\x91" * 200 + b"\xc0", "nests deeper"),
    "map nesting": (b"\x81\xa1a" * 200 + b"\xc0", "nests deeper"),
    "huge list header": (b"\xdd\xff\xff\xff\xff", "declares 4294967295 entries"),
    "huge map header": (b"\xdf\xff\xff\xff\xff", "declares"),
    "huge bin header": (b"\xc6\xff\xff\xff\xff", "declares"),
    "many values": (b"\xdd\x00\x01\x00\x00" + b"\xc0" * 65536, "more than 20000 values"),
    "extension": (b"\xd4\x01\x00", "extension"),
    "unused byte": (b"\xc1", "extension or unused"),
    "empty": (b"", "ends after 0 bytes"),
    "cut": (b"\x82\xa1a", "declares 2 entries"),
    "not UTF-8": (b"\xa1\xff", "not UTF-8"),
    "key twice": (b"\x82\xa1a\x01\xa1a\x02", "comes twice"),
    "list as key": (b"\x81\x90\x01", "map key"),
    "image codec": (msgpack.packb({"__image__": "gif", "data": b"", "shape": [1, 1, 3]}), "'gif'"),
    "image shape": (msgpack.packb({"__image__": "png", "data": b"", "shape": [1, 0, 3]}), "height, width"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_frames_are_refused_by_name(name):
    """Each malformed frame is refused with a sentence that says what is wrong with it."""
    frame, sentence = REFUSED[name]
    with pytest.raises(InvalidInput) as caught:
        unpack(frame)
    assert sentence in caught.value.message


def test_a_frame_beyond_the_size_limit_is_refused():
    """The size is checked before anything is read."""
    with pytest.raises(InvalidInput, match="at most 10"):
        unpack(b"\0" * 11, Limits(max_bytes=10))
    assert DEFAULT_LIMITS.max_bytes >= 16 * 480 * 640 * 3


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array(["x"]), np.zeros(1, np.complex64), {1, 2}, object()]
)
def test_what_does_not_travel_is_not_packed(value):
    """The sender is told, rather than the receiver."""
    with pytest.raises(InvalidInput):
        pack({"value": value})


def test_an_encoded_image_travels_compressed():
    """It comes out as it went in, still compressed."""
    image = EncodedImage("jpeg", b"\xff\xd8xyz", (4, 5, 3))
    back = unpack(pack({"image": image}))[0]["image"]
    assert (back.codec, bytes(back.data), back.shape) == ("jpeg", b"\xff\xd8xyz", (4, 5, 3))


def test_the_wire_needs_numpy_and_msgpack_only():
    """Importing it loads no OpenCV, no websockets, no torch."""
    code = (
        "import sys, env_client.wire; "
        "print([m for m in ('cv2', 'websockets', 'torch', 'draccus', 'yaml') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
