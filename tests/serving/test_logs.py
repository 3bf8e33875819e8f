"""What a client writes into the log stays on its line."""

import json
import logging

import pytest
from env_client.one_line import one_line
from env_client.wire import RemoteError
from processes import policy_server
from serving_parts import UPGRADE, client, get, make_observation

from grasp_cube.serving.logs import _Json, _Text

FORGED = "x\n2026-01-01 00:00:00,000 INFO all is well\x1b[2J\r\u2028\x85\u202e"


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("grasp_cube", logging.WARNING, "f.py", 1, "%s", (message,), info)


def test_a_line_is_one_line():
    """As text and as JSON, fields included."""
    forged = record(FORGED)
    forged.peer = FORGED
    text = _Text("%(levelname)s %(message)s").format(forged)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert "\\n2026-01-01" in text
    line = _Json().format(forged)
    assert len(line.splitlines()) == 1
    assert line.isascii()
    assert json.loads(line)["message"] == FORGED


def test_a_traceback_looks_like_no_line_of_the_log():
    """Although an exception says what a client sent."""
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        text = _Text("%(levelname)s %(message)s").format(record("it failed", error))
    first, *rest = text.splitlines()
    assert first == "WARNING it failed"
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


def test_characters_are_written_out():
    """Other languages stay as they are."""
    assert one_line("a\nb\x1b[0m\ud800") == "a\\nb\\x1b[0m\\ud800"
    assert one_line("Würfel 赤い立方体 🤖") == "Würfel 赤い立方体 🤖"


def test_a_client_cannot_forge_a_line(checkpoint):
    """By a prompt, a camera's name, an op, a path or a header, with every request logged."""
    with policy_server(checkpoint, "--verbose") as (server, port):
        with client(port) as policy:
            for bad in (
                {"images": {FORGED: 1}},
                {FORGED: 1},
                make_observation(task=FORGED) | {"states": FORGED},
            ):
                with pytest.raises(RemoteError):
                    policy.infer(bad)
            with pytest.raises(RemoteError):
                policy.configure(path=FORGED)
        forged = FORGED.encode().decode("latin-1").replace("\r", "").replace("\n", "")
        get(port, "/%0a2026-01-01%20INFO%20all%20is%20well", headers=UPGRADE | {"User-Agent": forged[:3]})
        server.wait_for("errors session=1")
        assert not [line for line in server.lines if line.startswith("2026-01-01")]
        assert all(line.isprintable() for line in server.lines), server.output
