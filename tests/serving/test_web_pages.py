"""A web page in the browser of somebody who may reach the server: what it gets where there is no key."""

import json
import socket

import pytest
from env_client.wire import pack, unpack
from serving_parts import UPGRADE, client, get, make_observation, serving
from websockets.sync.client import connect

from grasp_cube.serving.access import Access


def shaken(port: int, **headers: str) -> int:
    """The status of a WebSocket handshake; 101 is not waited for."""
    return get(port, "/", headers=UPGRADE | headers)[0]


def test_a_page_of_another_site_may_not_connect(checkpoint):
    """By its origin, and by a name of its own that it points here (DNS rebinding); a page of this machine may, one that was
    named may, and robots send no origin."""
    with serving("--policy.path", checkpoint, "--allow-origin", "https://lab.example") as (server, port):
        here = f"127.0.0.1:{port}"
        for origin, host in (
            ("http://evil.example", here),
            ("null", here),
            ("http://[", here),
            ("http://evil.example", "evil.example"),
            (f"http://127.0.0.1.evil.example:{port}", here),
            ("https://lab.example.evil.example", here),
        ):
            assert shaken(port, Origin=origin, Host=host) == 403, (origin, host)
        for origin in ("https://lab.example", "http://127.0.0.1:3000", f"http://{here}"):
            assert shaken(port, Origin=origin) == 101, origin
        with client(port) as robot:
            assert robot.infer(make_observation())["actions"].shape == (16, 6)
        assert "Traceback" not in server.output


def test_what_operators_see_is_not_for_a_name_that_was_pointed_here(checkpoint):
    """A page behind it sends no origin with a GET, and comes from this machine's own address."""
    with serving("--policy.path", checkpoint, "--api-key", "sesame") as (_, port):
        for path in ("/status", "/metrics"):
            assert get(port, path)[0] == 200
            assert get(port, path, headers={"Host": "evil.example"})[0] == 401


def test_a_client_behind_a_name_that_was_pointed_here_may_not_configure(checkpoint, tmp_path):
    """It is not of this machine, whatever its address says."""
    with serving("--policy.root", checkpoint.parent, cwd=tmp_path) as (_, port):
        for host, code in (("evil.example", "UNAUTHENTICATED"), (f"localhost:{port}", None)):
            sock = socket.create_connection(("127.0.0.1", port), 10)
            with connect(f"ws://{host}/", sock=sock, compression=None, max_size=None) as asked:
                asked.recv()
                asked.send(pack({"op": "configure", "path": str(checkpoint), "seq": 1}))
                answers = [unpack(asked.recv())[0]]
                while answers[-1]["op"] == "progress":
                    answers.append(unpack(asked.recv())[0])
                assert answers[-1].get("code") == code


@pytest.mark.parametrize(
    ("origins", "host", "may"),
    [
        ([], "evil.example", True),
        (["http://localhost:3000"], "localhost:8000", True),
        (["http://[::1]:3000"], "[::1]:8000", True),
        (["http://10.0.0.7"], "10.0.0.7:8000", True),
        (["http://10.0.0.7"], "10.0.0.8:8000", False),
        (["http://a.example"], "a.example:8000", False),
        (["http://localhost", "http://localhost"], "localhost", False),
        (["file://"], "localhost:8000", False),
        ([""], "", False),
    ],
)
def test_which_origins_may_connect(origins, host, may):
    """Those of the address itself; where there is a key, it alone decides, since no page can send it."""
    assert Access().lets_page(origins, host) is may
    assert Access("key").lets_page(origins, host)


def test_repeated_headers_are_no_error_of_the_server(checkpoint):
    """Two of what should be one."""
    with serving("--policy.path", checkpoint) as (server, port):
        for twice in (
            "Upgrade: websocket",
            "Host: localhost",
            "Origin: http://localhost",
            "Connection: Upgrade",
        ):
            lines = [f"{key}: {value}" for key, value in (UPGRADE | {"Host": "localhost"}).items()]
            head = "\r\n".join(["GET / HTTP/1.1", *lines, twice, twice]) + "\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port), 10) as sock:
                sock.sendall(head.encode())
                assert b" 500 " not in sock.recv(4096)
        assert json.loads(get(port, "/status")[1])["ready"]
        assert "Traceback" not in server.output
