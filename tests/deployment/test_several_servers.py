"""Several servers behind one address, as examples/deployment describes them: robots go on when a server ends or dies."""

import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from processes import ROOT, Running, policy_server, running
from robots import Robot, all_go_on, checkpoint, robots, wait_until
from serving_parts import get

from grasp_cube.fleet.front import find_haproxy
from grasp_cube.policies.policy import PolicyError

EXAMPLES = ROOT / "examples" / "deployment"
try:
    HAPROXY, WHY = find_haproxy(None), ""
except PolicyError as missing:
    HAPROXY, WHY = None, str(missing)
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason=WHY)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def haproxy(folder: Path, ports: list[int]) -> Iterator[int]:
    """HAProxy with examples/deployment/haproxy.cfg, in which only the addresses are others; its port."""
    text = (EXAMPLES / "haproxy.cfg").read_text()
    for number, port in enumerate(ports, 1):
        text, count = re.subn(rf"(server replica-{number}) \S+", rf"\1 127.0.0.1:{port}", text)
        assert count == 1
    with_port = folder / "haproxy.cfg"
    # Handed over bound, so that nobody can take the port in between.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        text, count = re.subn(r"(?m)^    bind :8000$", f"    bind fd@{listening.fileno()}", text)
        assert count == 1
        with_port.write_text(text)
        assert HAPROXY is not None
        front = subprocess.Popen(
            [HAPROXY, "-db", "-f", str(with_port)], pass_fds=(listening.fileno(),), stderr=subprocess.DEVNULL
        )
        try:
            port = listening.getsockname()[1]
            wait_until(lambda: front.poll() is None and get(port, "/readyz")[0] == 200, "HAProxy's start")
            yield port
        finally:
            front.terminate()
            front.wait(20)


@needs_haproxy
def test_no_robot_loses_its_episode_when_a_server_dies_and_another_is_drained(tmp_path: Path) -> None:
    """3 servers, 12 robots: at most one chunk of each is asked for again, and nothing is waited for beyond what
    docs/safety.md says. A server that comes back is used again."""
    wave = checkpoint(tmp_path / "wave")
    with ExitStack() as stack:
        servers = [stack.enter_context(policy_server(wave)) for _ in range(3)]
        port = stack.enter_context(haproxy(tmp_path, [port for _, port in servers]))
        working = stack.enter_context(robots(12, f"ws://127.0.0.1:{port}"))
        (killed, _), (drained, drained_port), _ = servers
        killed.end(signal.SIGKILL)
        all_go_on(working, 30)
        lost = [robot.failed for robot in working]
        assert drained.end() == 0
        all_go_on(working, 60)
        # Who was sent on by the server itself noticed nothing.
        assert [robot.failed for robot in working] == lost
        assert max(lost) <= 1
        assert all(robot.starved_beyond <= 0 for robot in working)
        command = [*drained.process.args][:-2]  # type: ignore[misc]
        with running(*command, "--port", str(drained_port)) as again:
            again.wait_for("Waiting for client connections")
            wait_until(lambda: get(port, "/readyz")[0] == 200)
            stack.enter_context(robots(1, f"ws://127.0.0.1:{port}"))
            for robot in working:
                robot.end()
    assert [[result.outcome for result in robot.results] for robot in working] == [["stopped"]] * 12


class Pod:
    """The container of examples/deployment/kubernetes.yaml as a process: its entry point, variables and arguments."""

    def __init__(self, container: dict, volume: Path, stack: ExitStack):
        self.container = container
        (mount,) = [mount["mountPath"] for mount in container["volumeMounts"]]
        told = {item["name"]: item.get("value", "") for item in container["env"]}
        # What a pod has of its own: its address, its volume and its GPU.
        told |= {
            "HOST": "127.0.0.1",
            "DEVICE": "cpu",
            "MODEL_PATH": told["MODEL_PATH"].replace(mount, str(volume)),
        }
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
        told["PORT"] = str(self.port)
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        self.process: Running = stack.enter_context(
            running(ROOT / "docker_entrypoint.sh", *container["args"], env=told | {"PATH": path})
        )
        self.process.wait_for("Waiting for client connections")

    def probe(self, name: str) -> int:
        return get(self.port, self.container[name]["httpGet"]["path"])[0]

    def end(self) -> None:
        """As a kubelet does it: the hook, then SIGTERM to the first process."""
        hook = self.container["lifecycle"]["preStop"]["exec"]["command"]
        subprocess.run(hook, check=True, timeout=60)
        self.process.process.send_signal(signal.SIGTERM)


def documents() -> dict[str, dict]:
    found = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in found}


def test_the_manifest_holds_together() -> None:
    """Names, labels and ports of its parts are the same; there is time for the hook and the drain."""
    parts = documents()
    deployment = parts["Deployment"]["spec"]
    pod = deployment["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert parts["Service"]["spec"]["selector"] == labels
    assert parts["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = parts["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", parts["Deployment"]["metadata"]["name"])
    (port,) = container["ports"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["PORT"] == str(port["containerPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    assert parts["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    hook = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(container["args"][container["args"].index("--drain-s") + 1])
    assert hook + drain + 10 < pod["spec"]["terminationGracePeriodSeconds"]


def test_the_manifest_updates_a_checkpoint_without_losing_an_episode(tmp_path: Path) -> None:
    """Its very command, variables, probes and hook: a new pod is ready, the old one is ended, and the robot finishes its
    episode on the old checkpoint before the next one begins on the new."""
    (container,) = documents()["Deployment"]["spec"]["template"]["spec"]["containers"]
    with ExitStack() as stack:
        old_volume, new_volume = tmp_path / "old", tmp_path / "new"
        checkpoint(old_volume / "lift")
        checkpoint(new_volume / "lift", amplitude=4.0)
        old = Pod(container, old_volume, stack)
        new = Pod(container, new_volume, stack)
        assert [old.probe(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")] == [200] * 3
        service = stack.enter_context(_service())
        service.to = old.port
        robot = Robot(f"ws://127.0.0.1:{service.port}", episode_s=2.0)
        stack.callback(robot.end)
        all_go_on([robot], 20)
        # Ready pods are what a Service knows.
        assert new.probe("readinessProbe") == 200
        service.to = new.port
        old.end()
        wait_until(lambda: old.process.process.poll() == 0, "the old pod's end")
        episodes = len(robot.results)
        wait_until(lambda: len(robot.results) >= episodes + 2, "two more episodes")
        robot.end()
        assert robot.failed == 0
        assert all(len(served) == 1 for served in robot.policies.values())
        assert len(set.union(*robot.policies.values())) == 2
        assert {result.outcome for result in robot.results[:-1]} == {"time"}


class _Service:
    """What a Service does on loopback: connections go to `to`, and those that are open stay where they are."""

    port: int
    to: int


@contextmanager
def _service() -> Iterator[_Service]:
    service = _Service()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        service.port = listening.getsockname()[1]

        def pump(source: socket.socket, sink: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)
            except OSError:
                sink.close()

        def accept() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                    server = socket.create_connection(("127.0.0.1", service.to))
                except OSError:
                    return
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield service


@needs_haproxy
def test_the_haproxy_example_is_valid_for_haproxy() -> None:
    """As it is, with its own addresses."""
    checked = subprocess.run(
        [HAPROXY, "-c", "-f", EXAMPLES / "haproxy.cfg"], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, shlex.join(checked.args) + checked.stderr
