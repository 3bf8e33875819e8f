"""The wire's promise: what any released version wrote is still read, and still answered in the same way."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from env_client.answers import read_answer, read_metadata
from env_client.wire import (
    PROTOCOL,
    EncodedImage,
    ErrorCode,
    Infer,
    Progress,
    RemoteError,
    decode_image,
    pack,
    read_request,
    unpack,
)
from recorded_frames import ERRORS, EXCHANGES, RECORDED, ask, dialogue, server

VERSIONS = sorted(folder.name for folder in RECORDED.iterdir())
# What differs from one answer to the next, and sentences, which are for people.
VARIES = {"server_timing", "policy_timing", "chunk_id", "message", "uptime_s"}
# These tell about the server, in words and numbers that may change; only that they are there is promised.
DESCRIPTIONS = {"policies", "metadata", "queue", "policy_id", "session"}


def recorded(version: str, name: str) -> bytes | str:
    file = RECORDED / version / f"{name}.msgpack"
    return file.read_bytes() if file.exists() else file.with_suffix(".txt").read_text(encoding="utf-8")


def assert_same(came: Any, expected: Any, where: str) -> None:
    """Equal down to dtypes; images that are compressed without loss by their pixels, others nearly so."""
    if is_dataclass(expected) and not isinstance(expected, EncodedImage):
        assert type(came) is type(expected), where
        for field in fields(expected):
            assert_same(getattr(came, field.name), getattr(expected, field.name), f"{where}.{field.name}")
    elif isinstance(expected, EncodedImage):
        assert isinstance(came, EncodedImage), where
        assert (came.codec, tuple(came.shape)) == (expected.codec, tuple(expected.shape)), where
        difference = decode_image(came).astype(int) - decode_image(expected).astype(int)
        assert abs(difference).max() <= (0 if expected.codec == "png" else 8), where
    elif isinstance(expected, np.ndarray):
        assert isinstance(came, np.ndarray), where
        assert came.dtype == expected.dtype, where
        np.testing.assert_array_equal(came, expected, where)
    elif isinstance(expected, dict):
        assert came.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(came[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(came) == len(expected), where
        for index, (left, right) in enumerate(zip(came, expected, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    else:
        assert came == expected, where


def assert_answers_alike(came: dict[str, Any], before: dict[str, Any]) -> None:
    """Everything that was answered before is answered now; new keys may have come."""
    assert before.keys() <= came.keys()
    for key in before.keys() - VARIES - DESCRIPTIONS:
        if isinstance(before[key], dict):
            assert before[key].keys() <= came[key].keys(), key
            assert_same({name: came[key][name] for name in before[key]}, before[key], key)
        else:
            assert_same(came[key], before[key], key)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", EXCHANGES)
def test_a_request_means_what_it_meant(version, name):
    message, _ = unpack(recorded(version, f"{name}.request"))
    assert_same(read_request(message), EXCHANGES[name].request, name)


@pytest.mark.parametrize("name", EXCHANGES)
def test_clients_of_this_version_write_what_the_newest_recording_holds(name):
    """A change of what is written wants a recording of its own, under a version of its own."""
    exchange = EXCHANGES[name]
    now, _ = unpack(exchange.packer(exchange.message))
    assert_same(now, unpack(recorded(VERSIONS[-1], f"{name}.request"))[0], name)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_reads_what_servers_answered(version):
    """The metadata, chunks in both dialects, how far a load is, and every error with its code."""
    metadata, spec = read_metadata(recorded(version, "metadata"), "recorded")
    assert metadata["protocol"] == PROTOCOL
    assert spec is not None
    assert (spec.action_dim, spec.horizon, spec.n_obs_steps, spec.unit) == (6, 16, 2, "normalized")
    assert [(camera.name, camera.height, camera.width) for camera in spec.cameras] == [
        ("front", 24, 32),
        ("wrist", 24, 32),
    ]
    assert [(part.name, part.size) for part in spec.states] == [("arm", 6)]
    assert read_metadata(recorded(version, "metadata-idle"), "recorded")[1] is None
    for name, exchange in EXCHANGES.items():
        if isinstance(exchange.request, Infer) and not name.endswith(("invalid", "not-loaded")):
            reply = read_answer(recorded(version, f"{name}.reply"), "recorded")
            for key in ("actions", "action"):
                assert (reply[key].shape, reply[key].dtype) == ((16, 6), np.dtype("f4"))
            assert reply["server_timing"].keys() >= {"queue_ms", "infer_ms", "batch_size"}
            if not exchange.request.bare:
                echoed = tuple(reply[key] for key in ("seq", "episode", "capture_time"))
                sent = exchange.request
                assert echoed == (sent.seq, sent.episode, sent.capture_time)
    for name, code in (("infer-not-loaded", "MODEL_NOT_LOADED"), ("bare-invalid", "INVALID_INPUT")):
        with pytest.raises(RemoteError) as raised:
            read_answer(recorded(version, f"{name}.reply"), "recorded")
        assert raised.value.code == code
    told, _ = unpack(recorded(version, "configure.progress"))
    assert Progress.from_wire(told) == Progress("checking", "looking at quick", seq=6)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("code", ErrorCode)
def test_a_client_reads_every_error(version, code):
    frame = recorded(version, f"error-{code}.reply")
    with pytest.raises(RemoteError) as raised:
        read_answer(frame, "recorded")
    error = raised.value
    assert (error.code, error.message) == (code, "what came, what was expected")
    assert error.retry_after_ms == (250 if code == ErrorCode.OVERLOADED else None)
    assert pack(ERRORS[code]) == frame


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("idle", [False, True], ids=["serving", "idle"])
def test_a_server_answers_recorded_requests_as_it_did(version, idle, tmp_path: Path):
    """The recorded bytes go to a server of today; its answers hold all that the recorded ones held."""
    with server(tmp_path, idle=idle) as port:
        for name, exchange in EXCHANGES.items():
            if exchange.idle != idle:
                continue
            # Each on a connection of its own: a prompt would stay.
            with dialogue(port) as (socket, metadata):
                before = unpack(recorded(version, "metadata-idle" if idle else "metadata"))[0]
                if exchange.message.get("op") != "configure":
                    assert_answers_alike(unpack(metadata)[0], before)
                answer, _ = ask(socket, recorded(version, f"{name}.request"))
            expected = recorded(version, f"{name}.reply")
            assert type(answer) is type(expected), name
            if isinstance(answer, str) or isinstance(expected, str):
                assert answer.partition(": ")[0] == expected.partition(": ")[0], name
                continue
            came, dialect = unpack(answer)
            before, dialect_before = unpack(expected)
            assert dialect == dialect_before, name
            if name == "infer-jpeg":
                # Decoders of JPEG differ by a step of grey, and this policy's answer depends on every pixel.
                before["actions"] = came["actions"] = before["action"] = came["action"] = None
            assert_answers_alike(came, before)
