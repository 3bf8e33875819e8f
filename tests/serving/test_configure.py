"""An idle server, a server that is configured, swapped and asked for several policies: over real sockets."""

import concurrent.futures
import os
import pickle
import sys
import threading

import numpy as np
import pytest
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import InvalidInput, RemoteError, pack, unpack
from numpy_policy import Options, expected_chunk, write_checkpoint
from processes import ROOT, Running
from serving_parts import CAMERAS, add_weights, client, get, make_observation, serving
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

OBS = make_observation(1)


def chunk_of(**options) -> np.ndarray:
    return expected_chunk(Options(cameras=CAMERAS, **options), OBS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints that differ in the length of their chunks."""
    folder = tmp_path_factory.mktemp("root")
    for name, options in {
        "one": {"horizon": 4},
        "two": {"horizon": 5},
        "slow": {"horizon": 6, "load_s": 1.5},
        "broken": {"behaviour": "telepathy"},
        "fails": {"behaviour": "fail_warm_up"},
    }.items():
        write_checkpoint(folder / name, cameras=CAMERAS, **options)
    return folder


@pytest.fixture
def idle(root):
    """A server without a policy."""
    with serving("--policy.root", root) as (server, port):
        yield server, port
        assert "Traceback" not in server.output, server.output


def code_of(call, *arguments, **options) -> tuple[str, str]:
    """Code and message of the error that a call must end with."""
    with pytest.raises(RemoteError) as caught:
        call(*arguments, **options)
    return caught.value.code, caught.value.message


def test_an_idle_server_says_so_and_is_configured(idle):
    """Alive and not ready; its metadata names no policy; MODEL_NOT_LOADED; progress, then the policy serves."""
    server, port = idle
    assert "waiting for a client to configure one" in server.output
    assert get(port, "/healthz") == (200, b"OK\n")
    assert get(port, "/readyz") == (503, b"no policy is loaded\n")
    with client(port) as policy:
        assert policy.idle
        assert policy.spec is None
        assert code_of(policy.infer, OBS)[0] == "MODEL_NOT_LOADED"
        progress = []
        spec = policy.configure(path="one", prompt="stack", on_progress=progress.append)
        assert (spec.horizon, spec.default_prompt) == (4, "stack")
        assert (policy.spec, policy.idle) == (spec, False)
        assert progress[0].stage == "checking"
        assert {"loading", "loaded", "warming_up"} < {step.stage for step in progress}
        assert progress[-1].stage == "ready"
        assert np.array_equal(policy.infer(OBS)["actions"], chunk_of(horizon=4))
        assert policy.status()["policy"]["horizon"] == 4
        assert get(port, "/readyz") == (200, b"OK\n")
        with client(port) as later:
            assert later.identity == policy.identity
            assert np.array_equal(later.infer(OBS)["actions"], chunk_of(horizon=4))


def test_a_session_that_was_told_of_no_policy_is_not_moved_by_one(idle):
    """It has to connect again: what it was told when it connected stays true."""
    _, port = idle
    with client(port) as early, client(port) as other:
        other.configure(path="one")
        code, message = code_of(early.infer, OBS)
        assert code == "MODEL_NOT_LOADED"
        assert "connect again" in message


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("broken", "MODEL_NOT_LOADED", "telepathy"),
        ("fails", "MODEL_NOT_LOADED", "first inference failed"),
        ("missing", "INVALID_INPUT", "no checkpoint at"),
    ],
)
def test_a_failed_load_leaves_the_old_policy_serving(root, path, code, said):
    """The reason is told, without a traceback; the same session goes on as before."""
    with serving("--policy.root", root, "--policy.path", root / "one") as (_, port), client(port) as policy:
        before = policy.identity
        for _ in range(2):
            came, message = code_of(policy.configure, path=path)
            assert came == code
            assert said in message
            assert "Traceback" not in message
        assert policy.identity == before
        assert np.array_equal(policy.infer(OBS)["actions"], chunk_of(horizon=4))
        assert get(port, "/readyz")[0] == 200


def test_the_old_policy_serves_during_a_load_and_nobody_gets_two(root):
    """Requests during the load of another policy are answered by the old one, also the configuring client's own; after
    the swap the one that asked is served by the new one and the other one goes on with what it was told."""
    with (
        serving("--policy.root", root, "--policy.path", root / "one") as (server, port),
        client(port) as asking,
        client(port) as watching,
        client(port) as other,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        load = pool.submit(asking.configure, path="slow")
        answered = 0
        while not load.done():
            loading = watching.status()["loading"]
            assert np.array_equal(other.infer(OBS)["actions"], chunk_of(horizon=4))
            answered += loading
        assert load.result().horizon == 6
        assert answered > 1
        assert np.array_equal(asking.infer(OBS)["actions"], chunk_of(horizon=6))
        for _ in range(3):
            assert np.array_equal(other.infer(OBS)["actions"], chunk_of(horizon=4))
        policies = watching.status()["policies"]
        assert {(p["name"], p["at"], p["sessions"]) for p in policies} == {("slow", "/", 1), ("one", None, 2)}
        other.close()
        watching.close()
        # The old policy leaves with the last session that was told of it.
        server.wait_for("one leaves the memory", 20)
        assert [p["name"] for p in asking.status()["policies"]] == ["slow"]


def test_requests_in_flight_during_a_swap_are_not_answered_by_the_wrong_one(root):
    """Of a session's own requests every answer before `configure`'s is the old policy's, every later one the new one's."""
    with serving("--policy.root", root, "--policy.path", root / "one") as (_, port):
        socket = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
        with socket:
            socket.recv()
            socket.send(pack({"op": "configure", "seq": 0, "path": "two"}))
            answers = []
            for seq in range(1, 200):
                socket.send(pack({"op": "infer", "seq": seq, "obs": OBS}))
                answers.append(unpack(socket.recv())[0])
                if answers[-1]["op"] == "configure":
                    break
            while answers[-1].get("seq") != seq or answers[-1]["op"] == "progress":
                answers.append(unpack(socket.recv())[0])
    swap = next(i for i, answer in enumerate(answers) if answer["op"] == "configure")
    horizons = [(i > swap, len(a["actions"])) for i, a in enumerate(answers) if a["op"] == "infer"]
    assert set(horizons) <= {(False, 4), (True, 5)}
    assert horizons[-1] == (True, 5)


def test_a_client_that_leaves_during_a_load_leaves_no_half_of_it(root):
    """The load goes on, and who comes later is served by it."""
    with serving("--policy.root", root) as (server, port):
        policy = client(port)

        def ask() -> None:
            with pytest.raises(ConnectionLost):
                policy.configure(path="slow")

        thread = threading.Thread(target=ask)
        thread.start()
        server_loads = client(port)
        while not server_loads.status()["loading"]:
            pass
        policy.close()
        thread.join(20)
        server.wait_for("slow is served", 20)
        with client(port) as later:
            assert np.array_equal(later.infer(OBS)["actions"], chunk_of(horizon=6))
        server_loads.close()


def test_configuring_what_is_there_is_quick(root):
    """Robots configure whenever they start: the same checkpoint is not read again, and everybody keeps it."""
    with serving("--policy.root", root) as (_, port), client(port) as one, client(port) as two:
        one.configure(path="one")
        stages = []
        two.configure(path=str(root / "one"), on_progress=lambda progress: stages.append(progress.stage))
        assert "loaded" not in stages
        assert one.identity == two.identity
        assert [p["sessions"] for p in one.status()["policies"]] == [2]


def test_what_a_client_must_not_name(root, tmp_path, idle):
    """Everything outside the root, by whatever way, and every pickle; one sentence each."""
    _, port = idle
    outside = write_checkpoint(tmp_path / "outside", cameras=CAMERAS)
    (root / "link").unlink(missing_ok=True)
    (root / "link").symlink_to(outside)
    inside = write_checkpoint(root / "holds_link", cameras=CAMERAS)
    (inside / "more.json").unlink(missing_ok=True)
    (inside / "more.json").symlink_to(outside / "config.json")
    bad = write_checkpoint(root / "pickled", cameras=CAMERAS)
    (bad / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": 1}))
    disguised = write_checkpoint(root / "disguised", cameras=CAMERAS)
    (disguised / "model.safetensors").write_bytes(pickle.dumps({"weights": list(range(100))}))
    (root / "policy.pt").write_bytes(pickle.dumps({"weights": 1}))
    wishes = {
        "../outside": "'..'",
        "one/../../outside": "'..'",
        str(outside): "outside the server's root",
        "/etc": "outside the server's root",
        "/no/such/folder": "outside the server's root",
        "link": "outside the server's root",
        "holds_link": "link out of the server's root",
        "pickled": "pytorch_model.bin, a pickle",
        "disguised": "no safetensors",
        "policy.pt": "is a pickle",
        "one/config.json": "is a file",
        "one\0": "text",
        "x" * 5000: "text",
    }
    with client(port) as policy:
        for path, said in wishes.items():
            code, message = code_of(policy.configure, path=path)
            assert (code, said in message) == ("INVALID_INPUT", True), (path, message)
        for options, said in (
            ({}, "path"),
            ({"name": "nobody"}, "nobody"),
            ({"name": "one", "device": "cpu"}, "without a path"),
            ({"path": "one", "name": "../x"}, "letters"),
            ({"path": "one", "type": "telepathy"}, "telepathy"),
        ):
            assert said in code_of(policy.configure, **options)[1], options


def test_who_may_configure(root):
    """Without a key only a client on the machine itself: not one behind a proxy, not a web page."""

    def answer(headers: dict[str, str]) -> dict:
        with connect(f"ws://127.0.0.1:{port}", compression=None, additional_headers=headers) as socket:
            socket.recv()
            socket.send(pack({"op": "configure", "seq": 1, "path": "one"}))
            while (reply := unpack(socket.recv())[0])["op"] == "progress":
                pass
            return reply

    with serving("--policy.root", root) as (_, port):
        reply = answer({"X-Forwarded-For": "10.0.0.1"})
        assert (reply["op"], reply["code"]) == ("error", "UNAUTHENTICATED")
        assert "--api-key" in reply["message"]
        with pytest.raises(InvalidStatus, match="403"):
            answer({"Origin": "http://evil.example"})
        assert answer({})["op"] == "configure"
    with serving("--policy.root", root, "--api-key", "sesame") as (_, port):
        assert answer({"X-Forwarded-For": "10.0.0.1", "Authorization": "Bearer sesame"})["op"] == "configure"


def test_a_server_of_one_checkpoint_stays_that_way(root):
    """Without --policy.root it cannot be configured, but for what it serves already."""
    with serving("--policy.path", root / "one") as (_, port), client(port) as policy:
        assert "cannot be configured" in code_of(policy.configure, path=str(root / "two"))[1]
        assert policy.configure(path=str(root / "one")).horizon == 4


def test_policies_by_name(root):
    """The URL's path chooses; `/` is the first; an unknown name is told which there are; a session may change."""
    with serving("--policy.path", f"lift={root / 'one'}", "--policy.path", f"sort={root / 'two'}") as (
        server,
        port,
    ):
        assert f"ws://127.0.0.1:{port}/lift, ws://127.0.0.1:{port}/sort" in server.output
        with client(port) as first, client(port, path="sort") as sort, client(port, path="/lift") as lift:
            assert first.identity == lift.identity != sort.identity
            assert np.array_equal(lift.infer(OBS)["actions"], chunk_of(horizon=4))
            assert np.array_equal(sort.infer(OBS)["actions"], chunk_of(horizon=5))
            assert first.configure(name="sort").horizon == 5
            assert np.array_equal(first.infer(OBS)["actions"], chunk_of(horizon=5))
            assert first.url.endswith("/sort")
        with pytest.raises(RemoteError, match="lift, sort are served"):
            client(port, path="stack")
        assert get(port, "/stack")[0] == 426


def test_a_name_may_be_given_by_the_client(root):
    """Two policies beside each other on a server that had none; their clients reconnect to their own."""
    with serving("--policy.root", root) as (_, port), client(port) as one, client(port) as two:
        one.configure(path="one", name="lift")
        two.configure(path="two", name="sort")
        assert np.array_equal(one.infer(OBS)["actions"], chunk_of(horizon=4))
        assert np.array_equal(two.infer(OBS)["actions"], chunk_of(horizon=5))
        with client(port, path="sort") as again:
            assert again.identity == two.identity


def test_beyond_the_budget_the_least_recently_used_leaves(tmp_path):
    """Three policies, room for two: the third is loaded when it is asked for, and so is the one that left for it; each
    session is served by its own all the time."""
    names = ("a", "b", "c")
    for number, name in enumerate(names):
        add_weights(write_checkpoint(tmp_path / name, cameras=CAMERAS, horizon=4 + number), 40)
    flags = [flag for name in names for flag in ("--policy.path", f"{name}={tmp_path / name}")]
    with serving(*flags, "--memory-budget-gb", "0.1") as (server, port):
        server.wait_for("c is loaded when a client asks for it")

        def in_memory() -> set[str]:
            with client(port, path="a") as policy:
                return {p["name"] for p in policy.status()["policies"] if p["in_memory"]}

        assert in_memory() == {"a", "b"}
        with client(port, path="a") as a, client(port, path="b") as b:
            assert len(a.infer(OBS)["actions"]) == 4
            with client(port, path="c") as c:
                assert in_memory() == {"a", "c"}
                assert [len(policy.infer(OBS)["actions"]) for policy in (c, b, a, c)] == [6, 5, 4, 6]
                assert in_memory() == {"a", "c"}
        assert "b leaves the memory" in server.output


def test_what_is_too_large_for_the_budget_is_said_at_the_start(tmp_path):
    """And to a client that wishes it, while what serves goes on serving."""
    add_weights(write_checkpoint(tmp_path / "large", cameras=CAMERAS), 40)
    write_checkpoint(tmp_path / "small", cameras=CAMERAS)
    command = (sys.executable, "-m", "grasp_cube.serve_policy", "--port", "0", "--memory-budget-gb", "0.03")
    server = Running((*command, "--policy.path", tmp_path / "large"))
    server.wait_for("large takes about 0.04 GB and --memory-budget-gb is 0.03")
    assert server.process.wait(20) == 2
    flags = ("--policy.path", tmp_path / "small", "--policy.root", tmp_path, "--memory-budget-gb", "0.03")
    with serving(*flags) as (_, port), client(port) as policy:
        assert "--memory-budget-gb is 0.03" in code_of(policy.configure, path="large")[1]
        assert policy.infer(OBS)["actions"].shape == (16, 6)


def test_a_checkpoint_that_changes_on_disk_is_another_policy(tmp_path):
    """A session that was told of the old one is refused; a new one gets the new one."""
    for name, horizon in (("a", 4), ("b", 5)):
        add_weights(write_checkpoint(tmp_path / name, cameras=CAMERAS, horizon=horizon), 40)
    flags = ("--policy.path", f"a={tmp_path / 'a'}", "--policy.path", f"b={tmp_path / 'b'}")
    with serving(*flags, "--memory-budget-gb", "0.05") as (_, port), client(port, path="a") as policy:
        with client(port, path="b") as other:
            other.infer(OBS)
        write_checkpoint(tmp_path / "a", cameras=CAMERAS, horizon=7)
        code, message = code_of(policy.infer, OBS)
        assert code == "MODEL_NOT_LOADED"
        assert "changed" in message
        with client(port, path="a") as again:
            assert len(again.infer(OBS)["actions"]) == 7
            assert again.identity != policy.identity


def test_two_checkpoints_of_one_shape_are_told_apart(tmp_path):
    """After a restart with another checkpoint of the same spec the client is not silently served by it."""
    write_checkpoint(tmp_path / "a" / "model", cameras=CAMERAS, default_prompt=None)
    add_weights(write_checkpoint(tmp_path / "b" / "model", cameras=CAMERAS, default_prompt=None), 0.1)
    from env_client.policy_server import SamePolicy

    with serving("--policy.path", tmp_path / "a" / "model") as (server, port):
        policy = client(port)
        checked = SamePolicy(policy)
        checked.infer(OBS)
        server.end()
    arguments = ("--host", "127.0.0.1", "--port", str(port), "--policy.path", str(tmp_path / "b" / "model"))
    server = Running((sys.executable, "-m", "grasp_cube.serve_policy", *arguments), cwd=ROOT)
    try:
        server.wait_for("Waiting for client")
        with pytest.raises(ConnectionLost, match="another policy"):
            checked.infer(OBS)
        with pytest.raises(InvalidInput, match="another policy"):
            checked.infer(OBS)
    finally:
        policy.close()
        server.process.kill()
        server.process.wait(10)


def test_a_plain_client_learns_in_its_own_way_that_there_is_no_policy(idle):
    """A bare observation to an idle server is answered by a text frame, which such clients raise."""
    _, port = idle
    with connect(f"ws://127.0.0.1:{port}", compression=None) as socket:
        assert unpack(socket.recv())[0]["policy"] is None
        socket.send(pack(OBS))
        assert socket.recv().startswith("MODEL_NOT_LOADED: no policy is loaded")


def test_a_root_that_is_none_is_one_line(tmp_path):
    """Before anything is loaded."""
    server = Running((sys.executable, "-m", "grasp_cube.serve_policy", "--policy.root", str(tmp_path / "x")))
    server.wait_for("--policy.root .*x is no folder")
    assert server.process.wait(20) == 2
    assert len(server.lines) == 1


def test_the_root_of_an_idle_server_is_its_folder(root):
    """Where nothing else is said."""
    with serving(cwd=root, PYTHONPATH=os.pathsep.join(sys.path)) as (_, port), client(port) as policy:
        assert isinstance(policy, WebsocketClientPolicy)
        assert policy.configure(path="two").horizon == 5
