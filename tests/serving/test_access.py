"""Keys, TLS and caps: who is let in, and how much one may ask."""

import http.client
import json
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from certificates import make_certificate
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import RemoteError, WireError, pack, unpack
from numpy_policy import Options, expected_chunk
from serving_parts import CAMERAS, UPGRADE, client, get, make_observation, serving
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from grasp_cube.policies.policy import PolicyError
from grasp_cube.serving import access as access_module
from grasp_cube.serving.access import KEY_VARIABLE, Access, TlsConfig, is_loopback, read_key
from grasp_cube.serving.limits import RateLimit

OBS = make_observation()


def status(port: int, headers: dict[str, str]) -> int:
    return get(port, "/", headers=UPGRADE | headers)[0]


@pytest.mark.parametrize("way", ["flag", "file", "environment"])
def test_the_key_is_asked_for_before_the_upgrade(checkpoint, tmp_path, way):
    """No key, a wrong one, one in the wrong header or under another scheme: 401. Both schemes of the right one pass,
    wherever the server has it from; /healthz and /readyz need none."""
    (tmp_path / "key").write_text("sesame\n")
    flags = {
        "flag": ("--api_key", "sesame"),
        "file": ("--api-key-file", tmp_path / "key"),
        "environment": (),
    }[way]
    env = {KEY_VARIABLE: "sesame"} if way == "environment" else {}
    with serving("--policy.path", checkpoint, *flags, **env) as (server, port):
        wrong = (
            {},
            {"Authorization": "Api-Key wrong"},
            {"Authorization": "Api-Key "},
            {"Authorization": "sesame"},
            {"Authorization": "Basic sesame"},
            {"X-Api-Key": "sesame"},
            {"Authorization": "Api-Key sesame\u00e9"},
        )
        assert [status(port, headers) for headers in wrong] == [401] * len(wrong)
        for scheme in ("Api-Key", "Bearer", "bearer"):
            assert status(port, {"Authorization": f"{scheme} sesame"}) == 101
        assert get(port, "/healthz")[0] == get(port, "/readyz")[0] == 200
        assert [get(port, path)[0] for path in ("/metrics", "/status")] == [200, 200]
        afar = {"X-Forwarded-For": "10.0.0.1"}
        assert [get(port, path, headers=afar)[0] for path in ("/metrics", "/status")] == [401, 401]
        key = afar | {"Authorization": "Bearer sesame"}
        assert [get(port, path, headers=key)[0] for path in ("/metrics", "/status")] == [200, 200]
        with client(port, api_key="sesame") as policy:
            assert policy.infer(OBS)["actions"].shape == (16, 6)
        with pytest.raises(RemoteError, match="refused the key"):
            client(port)
        assert "sesame" not in server.output


def test_a_key_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch):
    """Two of them, an empty one, one that no header can carry, a file that is not there."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for key, file in (
        ("a", empty),
        (None, empty),
        ("", None),
        ("a b", None),
        ("é", None),
        (None, tmp_path / "x"),
    ):
        with pytest.raises(PolicyError, match="--api-key"):
            read_key(key, file)
    assert read_key(None, None) is None
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert read_key(None, None) is None


def test_the_key_is_compared_in_constant_time(monkeypatch):
    """Each time, also where there is nothing to compare."""
    seen = []
    monkeypatch.setattr(
        access_module.hmac, "compare_digest", lambda *pair: seen.append(pair) or pair[0] == pair[1]
    )
    access = Access("sesame")
    for given, passes in (
        (["Api-Key sesame"], True), (["Bearer sesame"], True), (["Basic sesame"], False), ([], False),
        (["Api-Key sesam"], False), (["Api-Key sesame"] * 2, False), (["Api-Key \udcff"], False), (["sesame"], False),
    ):  # fmt: skip
        seen.clear()
        assert access.lets_in(given) is passes
        assert len(seen) == 1


def test_who_is_local():
    """Loopback addresses, without a header of a proxy or of a web page."""
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "localhost", "", None)))
    assert not is_loopback("127.0.0.1", {"origin": "http://localhost"})
    assert not is_loopback("127.0.0.1", {"host": "evil.example"})
    assert is_loopback("127.0.0.1", {"host": "localhost:8000"})
    assert not Access().may_configure(local=False)
    assert Access("key").may_configure(local=False)


def test_listening_for_everybody_without_a_key_is_warned_of(checkpoint):
    """And not on loopback."""
    with serving("--policy.path", checkpoint, address="0.0.0.0") as (server, _):
        assert "! no --api_key" in server.output
    with serving("--policy.path", checkpoint) as (server, _):
        assert "! no" not in server.output


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_tls(checkpoint, certificate, monkeypatch):
    """wss:// end to end, large frames and bad ones included; a client that does not trust the certificate, or that speaks
    plainly, gets nothing."""
    cert, key = certificate
    with serving("--policy.path", checkpoint, "--tls.cert", cert, "--tls.key", key) as (server, port):
        assert f"wss://127.0.0.1:{port}" in server.output
        with pytest.raises(ConnectionLost, match="certificate"):
            WebsocketClientPolicy(
                f"wss://127.0.0.1:{port}", connect_timeout_s=0.1, on_status=lambda sentence: None
            )
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        with WebsocketClientPolicy(f"wss://127.0.0.1:{port}") as policy:
            for seed in range(3):
                obs = make_observation(seed)
                chunk = policy.infer(obs)["actions"]
                assert np.array_equal(chunk, expected_chunk(Options(cameras=CAMERAS), obs))
            large = make_observation() | {"more": np.zeros(20_000_000, np.uint8)}
            assert policy.infer(large)["actions"].shape == (16, 6)
            with pytest.raises(RemoteError, match="are missing"):
                policy.infer({"images": {}})
        context = ssl.create_default_context(cafile=str(cert))
        secure = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
        secure.request("GET", "/healthz")
        assert secure.getresponse().read() == b"OK\n"
        secure.close()
        with pytest.raises((OSError, http.client.HTTPException)):
            get(port, "/healthz", timeout=5)
        old = ssl.create_default_context(cafile=str(cert))
        # What this client's own library would refuse by itself is let through, so that it is the server that refuses.
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version, old.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", port), 10) as sock:
            old.wrap_socket(sock, server_hostname="127.0.0.1")
        # A close is answered with a close, and a broken frame with its code.
        with connect(f"wss://127.0.0.1:{port}", compression=None, ssl=context) as plain:
            plain.recv()
            plain.close()
            assert plain.close_code == 1000
        with connect(f"wss://127.0.0.1:{port}", compression=None, ssl=context, max_size=None) as broken:
            broken.recv()
            broken.socket.send(b"\xff\xff\xff\xff\xff\xff")
            with pytest.raises(ConnectionClosed, match="1002"):
                broken.recv(timeout=10)
        assert server.end() == 0
        assert "Traceback" not in server.output


def test_the_settings_of_tls(certificate):
    """1.2 is the oldest version, and every cipher has forward secrecy and authenticates what it encrypts."""
    context = TlsConfig(*certificate).context()
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_NONE
    ciphers = context.get_ciphers()
    assert ciphers
    assert not [
        c["name"] for c in ciphers if c["strength_bits"] < 128 or "RC4" in c["name"] or "NULL" in c["name"]
    ]
    assert not [c["name"] for c in ciphers if c["protocol"] == "TLSv1.2" and "Kx=RSA " in c["description"]]


def test_a_certificate_that_cannot_be_used_is_one_line(checkpoint, certificate, tmp_path):
    """Half of it, or no certificate at all."""
    (tmp_path / "junk").write_text("junk")
    for flags in (
        ("--tls.cert", certificate[0]),
        ("--tls.cert", tmp_path / "junk", "--tls.key", certificate[1]),
        ("--tls.cert", tmp_path / "none", "--tls.key", certificate[1]),
    ):
        command = (
            sys.executable,
            "-m",
            "grasp_cube.serve_policy",
            "--port",
            "0",
            "--policy.path",
            checkpoint,
        )
        done = subprocess.run([*map(str, (*command, *flags))], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "--tls.cert" in done.stderr


def test_caps_on_connections_sessions_and_messages(checkpoint):
    """More clients than allowed are told so by HTTP, more connections are cut, larger messages are refused by name; those
    who were there first notice nothing, and when one leaves there is room."""
    flags = ("--limits.max-sessions", "2", "--limits.max-connections", "4", "--limits.max-message-mb", "0.01")
    with serving("--policy.path", checkpoint, *flags) as (_, port), client(port) as first:
        second = client(port)
        assert status(port, {}) == 503
        with pytest.raises(ConnectionLost, match="2 clients are connected already"):
            client(port, connect_timeout_s=0.1)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        with pytest.raises((OSError, http.client.HTTPException)):
            get(port, "/healthz", timeout=5)
        for each in idle:
            each.close()
        with pytest.raises(RemoteError, match="at most"):
            first.infer(OBS | {"more": np.zeros(20_000, np.uint8)})
        assert first.infer(OBS)["actions"].shape == (16, 6)
        second.close()
        with client(port) as third:
            assert third.infer(OBS)["actions"].shape == (16, 6)


def test_a_cap_on_the_rate(checkpoint):
    """A client beyond it is answered OVERLOADED with a time to come back, after which it is served; others are all the
    time."""
    with (
        serving("--policy.path", checkpoint, "--limits.max-rate", "20") as (_, port),
        connect(f"ws://127.0.0.1:{port}", compression=None) as flood,
        client(port) as calm,
    ):
        flood.recv()
        for seq in range(200):
            flood.send(pack({"op": "status", "seq": seq}))
        answers = [unpack(flood.recv())[0] for _ in range(200)]
        refused = [answer for answer in answers if answer["op"] == "error"]
        assert {answer["code"] for answer in refused} == {"OVERLOADED"}
        assert all(answer["retry_after_ms"] > 0 for answer in refused)
        assert 20 <= len(answers) - len(refused) < 100
        assert calm.infer(OBS)["actions"].shape == (16, 6)


def test_the_allowance_of_a_rate():
    """A second's worth at once, then one at a time; by a clock of the test's own."""
    now = 0.0
    limit = RateLimit(2.0, clock=lambda: now)
    limit.take()
    limit.take()
    with pytest.raises(WireError) as caught:
        limit.take()
    assert caught.value.retry_after_ms == 501
    now = 0.5
    limit.take()
    with pytest.raises(WireError):
        limit.take()
    now = 100.0
    limit.take()
    limit.take()
    with pytest.raises(WireError):
        limit.take()
    RateLimit(0.0).take()


def test_what_operators_see(checkpoint):
    """/status as JSON, /metrics with every client counted, and a log of one JSON object for each connection."""
    with serving("--policy.path", checkpoint, "--log-format", "json") as (server, port):
        with client(port) as policy:
            for _ in range(5):
                policy.infer(OBS)
            with pytest.raises(RemoteError):
                policy.infer({"images": {}})
            seen = json.loads(get(port, "/status")[1])
            assert (seen["ready"], seen["sessions"], seen["loading"]) == (True, 1, False)
            assert [(p["name"], p["in_memory"], p["at"]) for p in seen["policies"]] == [("quick", True, "/")]
            [one] = seen["clients"]
            assert (one["requests"], one["chunks"], one["errors"]) == (6, 5, 1)
            page = get(port, "/metrics")[1].decode()
            assert "grasp_cube_sessions 1.0" in page
            assert "grasp_cube_policies 1.0" in page
            [memory] = [
                line for line in page.splitlines() if line.startswith("grasp_cube_device_memory_bytes ")
            ]
            assert float(memory.split()[1]) > 1e6
        server.wait_for('"session": 1')
        lines = [json.loads(line) for line in server.lines if line.startswith("{")]
        about = [line for line in lines if line.get("session") == 1]
        assert len(about) == 1
        assert about[0]["peer"].startswith("127.0.0.1:")
        assert about[0]["policy"] == "quick"
        assert about[0]["message"].endswith("6 requests, 5 chunks, 1 errors")


def test_a_line_for_each_request_where_that_is_asked_for(checkpoint):
    """With its session and seq."""
    with serving("--policy.path", checkpoint, "--verbose") as (server, port), client(port) as policy:
        policy.infer(OBS, seq=41)
        server.wait_for("DEBUG chunk session=1 seq=41")
        with pytest.raises(RemoteError):
            policy.infer({"images": {}}, seq=42)
        server.wait_for("session=1 seq=42 code=INVALID_INPUT")
