"""The SDK: found, imported, constructed and called so that it can neither block, nor mute, nor lie by silence."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from astribot_parts import PYTHON, MakeEnv, Robot
from env_client.envs.astribot_sdk import Obedience, SdkThread, answered, construct, import_sdk
from env_client.envs.env import EnvError
from virtual_astribot import Astribot

IMPORT = "import os\nfrom env_client.envs.astribot_sdk import import_sdk\ncls = import_sdk({path!r})\nprint('heard', cls.__name__, os.environ['ROBOT_TYPE'], flush=True)"
VENDOR = Path(sys.modules["virtual_astribot"].__file__ or "").parent / "vendor"


def imported(folder: Path | None, code: str = IMPORT) -> subprocess.CompletedProcess[str]:
    path = None if folder is None else str(folder)
    return subprocess.run(
        [PYTHON, "-c", code.format(path=path)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    "module",
    [
        "core.astribot_api.astribot_client",
        "astribot_sdk.core.astribot_api.astribot_client",
        "core.sdk_client.astribot_client",
    ],
)
def test_the_sdk_is_found_under_each_of_its_names(tmp_path: Path, module: str) -> None:
    """By its folder; and the process can still be heard afterwards, although the import mutes it."""
    file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    file.write_text((VENDOR / "core" / "astribot_api" / "astribot_client.py").read_text())
    assert imported(tmp_path).stdout == "heard Astribot S1\n"


def test_the_stand_in_really_mutes() -> None:
    """Otherwise the test above would prove nothing."""
    code = "import sys; sys.path.insert(0, {path!r})\nimport core.astribot_api.astribot_client\nprint('heard', flush=True)"
    assert imported(VENDOR, code).stdout == ""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "was not found (looked for core.astribot_api.astribot_client"),
        ("import a_library_that_is_missing", "No module named 'a_library_that_is_missing'"),
        ("raise OSError('libfoo.so')", "cannot be imported (OSError: libfoo.so)"),
    ],
)
def test_a_missing_or_broken_sdk_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        file = tmp_path / "core" / "astribot_api" / "astribot_client.py"
        file.parent.mkdir(parents=True)
        file.write_text(content)
    done = imported(tmp_path)
    assert "EnvError" in done.stderr.splitlines()[-1]
    assert sentence in done.stderr.splitlines()[-1]


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="which is no folder"):
        import_sdk(str(tmp_path / "nowhere"))


def test_rights_elsewhere_never_wait_for_a_keyboard(robot: Robot, make_env: MakeEnv) -> None:
    """The SDK asks with input(); here that is an error at once, and the other program keeps its rights."""
    robot.control.take_rights()
    with pytest.raises(EnvError, match="another program has the control rights"):
        make_env()
    assert not robot.commands


def test_rights_can_be_taken_on_purpose(robot: Robot, make_env: MakeEnv) -> None:
    robot.control.take_rights()
    env = make_env(high_control_rights=True)
    env.reset()


def test_a_constructor_that_hangs_is_given_up() -> None:
    """Also where it does not ask at all."""
    sdk, release = SdkThread(), threading.Event()
    with pytest.raises(EnvError, match=r"the SDK did not answer within 0.2 s"):
        sdk.open(lambda: release.wait(30), 0.2)
    with pytest.raises(EnvError, match="does not answer since"):
        sdk.call(lambda _: None, 0.2)
    release.set()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            sdk.call(lambda _: None, 5)
        except EnvError:
            time.sleep(0.02)
        else:
            break
    assert sdk.call(lambda _: 7, 5) == 7
    sdk.close()


def test_no_robot_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK raises after two seconds."""
    monkeypatch.setenv("VIRTUAL_ASTRIBOT", "127.0.0.1:1")
    monkeypatch.setenv("ROBOT_TYPE", "S1")
    with pytest.raises(EnvError, match=r"the robot was not found .RuntimeError: No simulation or real robot"):
        construct(Astribot, freq=250.0, high_control_rights=False)


def test_all_calls_come_from_one_thread() -> None:
    """Calls from two threads and the executor's cycles meet the SDK's object in one."""
    seen: set[int] = set()
    sdk = SdkThread(cycle_hz=250)
    sdk.open(lambda: SimpleNamespace(touch=lambda: seen.add(threading.get_ident())), 5)
    cycles = threading.Event()

    def cycle(handle: SimpleNamespace) -> None:
        handle.touch()
        cycles.set()

    sdk.cycle = cycle
    others = [threading.Thread(target=lambda: sdk.call(lambda h: h.touch(), 5)) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert cycles.wait(10)
    sdk.close()
    assert len(seen) == 1


def test_a_failing_cycle_is_an_error_of_the_next_call() -> None:
    """And it is not called again."""
    sdk, count = SdkThread(cycle_hz=250), []

    def cycle(_: object) -> None:
        count.append(1)
        raise EnvError("another program has taken the control rights")

    sdk.open(object, 5)
    sdk.cycle = cycle
    deadline = time.monotonic() + 10
    while sdk.cycle is not None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(EnvError, match="taken the control rights"):
        sdk.call(lambda _: None, 5)
    sdk.call(lambda _: None, 5)
    assert len(count) == 1
    sdk.close()


def test_none_is_an_error() -> None:
    assert answered([1], "reading") == [1]
    with pytest.raises(EnvError, match="reading returned None"):
        answered(None, "reading")


def test_a_robot_that_was_stopped_is_noticed_by_its_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A goal that does not follow for half a second; a filter that is only slow is none."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    joints = np.array([True, True, False])
    deaf, slow = Obedience(), Obedience()
    sent = np.array([1.0, 0.0, 50.0])
    for tick in range(60):
        now[0] += 1 / 30
        slow.check(np.array([tick / 100, 0.0, 0.0]), sent, joints)
        if tick < 15:
            deaf.check(np.zeros(3), sent, joints)
    with pytest.raises(EnvError, match=r"its goal stays 1.00 rad away"):
        deaf.check(np.zeros(3), sent, joints)
    # What the gripper does not reach is what it holds.
    gripper = Obedience()
    for _ in range(60):
        now[0] += 1 / 30
        gripper.check(np.array([1.0, 0.0, 0.0]), sent, joints)
