"""The command line as people type it."""

import subprocess
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import draccus
import pytest
from env_client.cli import CliError, find_config_file, host_port, parse


class Strategy(StrEnum):
    SYNC = "sync"
    ASYNC = "async"


class EnvConfig(draccus.ChoiceRegistry):
    """What stands at the other end."""


@EnvConfig.register_subclass("dataset")
@dataclass(frozen=True)
class DatasetConfig(EnvConfig):
    # The folder of the recording.
    dataset_path: Path = Path("datasets/lift")
    # Frames in each second.
    fps: float = 30.0


@EnvConfig.register_subclass("so101")
@dataclass(frozen=True)
class So101Config(EnvConfig):
    # The serial port.
    port: str = "/dev/ttyACM0"
    # The camera drivers, by name.
    cameras: dict[str, Any] = field(default_factory=dict)
    # Whether the gripper may move.
    use_gripper: bool = True


@dataclass(frozen=True)
class RtcConfig:
    # Actions that are frozen.
    delay: int = 4


@dataclass(frozen=True)
class PolicyConfig:
    # Where the checkpoint lies.
    # It may be given more than once.
    path: tuple[Path, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"  # The arithmetic.
    # Real-time chunking.
    rtc: RtcConfig | None = None


@dataclass(frozen=True)
class Config:
    # The robot, or what stands in for one.
    env: EnvConfig = field(default_factory=lambda: DatasetConfig(fps=25.0))
    # The model.
    policy: PolicyConfig = PolicyConfig()
    # Address of the server.
    host: str = "127.0.0.1"
    # Port of the server.
    port: int = 8000
    # Rate of the control loop in Hz.
    control_rate: float | None = None
    # Episodes to replay.
    episodes: list[int] = field(default_factory=list)
    # Print what would happen.
    dry_run: bool = False
    # Whether the head moves.
    head: bool = True
    # How chunks are used.
    strategy: Strategy = Strategy.SYNC
    # What to say to the policy.
    prompt: str | None = None
    # Two numbers.
    size: tuple[int, int] = (480, 640)
    # A number or a word.
    limit: int | str = 3

    def __post_init__(self):
        if self.port > 65535:
            raise ValueError(f"--port is {self.port}; at most 65535 was expected")


ALIASES = {
    "--fps": "control_rate",
    "control-freq": "control_rate",
    "server": host_port,
    "async": "strategy=async",
}


def read(*argv: str) -> Config:
    return parse(Config, argv, prog="tool", description="A tool for tests.", aliases=ALIASES)


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        read(*argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("tool: ")
    return captured.err


def test_defaults():
    """An empty command line gives the defaults, those of a nested default instance too."""
    config = read()
    assert config == Config()
    assert config.env == DatasetConfig(fps=25.0)


@pytest.mark.parametrize("flag", ["--env.dataset-path", "--env.dataset_path"])
@pytest.mark.parametrize("equals", [True, False])
def test_dashes_and_equals(flag, equals):
    """Dashed and underscored names, `--flag value` and `--flag=value`, are the same."""
    argv = [f"{flag}=x/y"] if equals else [flag, "x/y"]
    config = read(*argv)
    assert config.env == DatasetConfig(dataset_path=Path("x/y"), fps=25.0)


@pytest.mark.parametrize(
    ("argv", "dry_run", "head"),
    [
        (["--dry-run"], True, True),
        (["--dry_run", "--no-head"], True, False),
        (["--dry-run=false", "--head", "false"], False, False),
        (["--no-dry-run", "--head"], False, True),
        (["--dry-run", "true", "--host", "h"], True, True),
    ],
)
def test_booleans(argv, dry_run, head):
    """A boolean is bare, negated with --no-, or given a value."""
    config = read(*argv)
    assert (config.dry_run, config.head) == (dry_run, head)


@pytest.mark.parametrize("flag", ["--env.no-use-gripper", "--no-env.use_gripper"])
def test_nested_negation(flag):
    """A boolean inside a group is negated at either place."""
    config = read("--env.type", "so101", flag)
    assert config.env == So101Config(use_gripper=False)


@pytest.mark.parametrize(
    "argv", ["--episodes 0,3", "--episodes 0 3", "--episodes=0 --episodes 3", "--episodes [0,3]"]
)
def test_lists(argv):
    """Comma lists, several values, repeated flags and YAML lists fill the same list."""
    assert read(*argv.split()).episodes == [0, 3]


def test_repeated_flag_collects_in_a_tuple_and_replaces_elsewhere():
    """A list field collects its repetitions, any other takes the last."""
    config = read("--policy.path", "a", "--policy.path=b", "--host", "x", "--host", "y")
    assert config.policy.path == (Path("a"), Path("b"))
    assert config.host == "y"


def test_choice_type():
    """The type selects the choice; without one it is that of the default."""
    config = read("--env.port", "/dev/a", "--env.type", "so101")
    assert config.env == So101Config(port="/dev/a")
    assert isinstance(read("--env.fps", "10").env, DatasetConfig)


def test_map_keys_on_the_command_line():
    """Keys inside a map field are reached by dots, or the map is given whole."""
    dotted = read("--env.type=so101", "--env.cameras.front.index", "2", "--env.cameras.front.kind", "usb")
    whole = read("--env.type=so101", "--env.cameras={front: {index: 2, kind: usb}}")
    assert dotted == whole
    assert whole.env == So101Config(cameras={"front": {"index": 2, "kind": "usb"}})
    assert read("--env.type=so101", "--env.cameras", "front=0,wrist=2").env == So101Config(
        cameras={"front": 0, "wrist": 2}
    )


def test_optional_group():
    """An option of an optional group makes the group; `none` leaves it out."""
    assert read().policy.rtc is None
    assert read("--policy.rtc.delay", "6").policy.rtc == RtcConfig(6)


def test_values_keep_their_type():
    """Text stays text, negative numbers are values, enums and literals are checked."""
    config = read("--prompt", "007", "--fps", "-0.5", "--strategy", "async", "--policy.dtype", "bfloat16")
    assert (config.prompt, config.control_rate, config.strategy) == ("007", -0.5, Strategy.ASYNC)
    assert config.policy.dtype == "bfloat16"
    assert read("--size", "2,3").size == (2, 3)
    assert (read("--limit", "7").limit, read("--limit", "all").limit) == (7, "all")
    assert read("--prompt", "none").prompt is None
    assert read("--prompt=--odd").prompt == "--odd"


def test_aliases():
    """An alias is a field, a field with its value, or a function."""
    assert read("--control-freq", "20").control_rate == 20.0
    assert read("--async").strategy is Strategy.ASYNC
    config = read("--server", "robot.local:9001")
    assert (config.host, config.port) == ("robot.local", 9001)


def test_host_port():
    """HOST:PORT with and without a scheme, a host, and IPv6."""
    assert host_port("ws://a:1/") == {"host": "a", "port": "1"}
    assert host_port(":8000") == {"host": "127.0.0.1", "port": "8000"}
    assert host_port("[::1]:80") == {"host": "::1", "port": "80"}
    with pytest.raises(CliError, match="HOST:PORT"):
        host_port("robot")


def test_config_file(tmp_path, monkeypatch):
    """A file is found as given or in ./configs, with or without .yaml; flags win over it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text(
        "port: 9000\nepisodes: [1, 2]\nenv:\n  type: so101\n  cameras: {front: {index: 1}}\npolicy: {path: a}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = read("--config-path", "mine", "--episodes", "5", "--env.cameras.front.width", "640")
    assert (config.port, config.episodes, config.policy.path) == (9000, [5], (Path("a"),))
    assert config.env == So101Config(cameras={"front": {"index": 1, "width": 640}})
    assert read("--config-path=configs/mine.yaml").port == 9000
    assert find_config_file("mine.yaml") == Path("configs/mine.yaml")


def test_config_file_errors(tmp_path, monkeypatch, capsys):
    """A missing, broken or unfitting file is one sentence that names it."""
    monkeypatch.chdir(tmp_path)
    assert "looked for" in refused(capsys, "--config-path", "nothing")
    for text, word in [
        ("a: [", "is not YAML"),
        ("- 1", "a map of options"),
        ("prt: 1", "did you mean port?"),
        ("port: many", "a whole number"),
        ("port: true", "a whole number"),
        ("host: [1]", "text was expected"),
        ("env: 3", "a map of options"),
        ("env: {type: so101, fps: 3}", "belongs to --env.type dataset"),
    ]:
        (tmp_path / "bad.yaml").write_text(text)
        message = refused(capsys, "--config-path", "bad.yaml")
        assert word in message
        assert "bad.yaml" in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prt", "1"], ["--prt", "did you mean --port?"]),
        (["--dataset-path", "x"], ["did you mean --env.dataset-path?"]),
        (["--datset-path", "x"], ["did you mean --env.dataset-path?"]),
        (["--zzzzzz"], ["unknown flag --zzzzzz", "--help"]),
        (["--env", "x"], ["a group of options", "--env.type"]),
        (["--port", "many"], ["--port", "'many'", "a whole number"]),
        (["--port", "1.5"], ["'1.5'", "a whole number"]),
        (["--fps", "fast"], ["--fps", "'fast'", "a number"]),
        (["--fps", "nan"], ["a number"]),
        (["--episodes", "0,x"], ["--episodes", "'0,x'", "a whole number"]),
        (["--size", "1,2,3"], ["--size", "'1,2,3'"]),
        (["--head", "maybe"], ["maybe"]),
        (["--head=maybe"], ["true or false"]),
        (["--strategy", "slow"], ["sync, async"]),
        (["--policy.dtype", "int4"], ["float32, bfloat16"]),
        (["--env.type", "robot"], ["--env.type", "'robot'", "dataset, so101"]),
        (["--env.port", "x"], ["--env.port belongs to --env.type so101", "dataset"]),
        (["--host"], ["--host needs a value"]),
        (["--host", "--port", "1"], ["--host needs a value", "--port"]),
        (["stray"], ["'stray'", "a flag"]),
        (["--no-host"], ["unknown flag --no-host"]),
        (["--no-head=true"], ["takes no value"]),
        (["--async=3"], ["takes no value"]),
        (["--server", "x"], ["HOST:PORT"]),
        (["--port", "70000"], ["at most 65535"]),
    ],
)
def test_errors_are_one_sentence(argv, words, capsys):
    """What the user got wrong is named, with what was expected, and the exit code is 2."""
    message = refused(capsys, *argv)
    for word in words:
        assert word in message


def test_needed_field(capsys):
    """A field without a default is asked for, with its comment."""

    @dataclass
    class Needs:
        # The robot's serial number.
        serial: str

    with pytest.raises(SystemExit):
        parse(Needs, [], prog="tool")
    assert capsys.readouterr().err == "tool: --serial is needed: The robot's serial number.\n"


def test_help(capsys):
    """The help shows each field's comment, default and other spellings, by group and choice."""
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for line in [
        "A tool for tests.",
        "Address of the server. (default: 127.0.0.1)",
        "--episodes INT,INT",
        "(also --fps, --control-freq)",
        "--no-head",
        "--env.type {dataset,so101}",
        "with --env.type so101:",
        "Where the checkpoint lies. It may be given more than once.",
        "--policy.dtype {float32,bfloat16}",
        "The arithmetic. (default: float32)",
        "--server VALUE",
        "HOST:PORT of the server",
        "--config-path FILE",
    ]:
        assert line in text
    assert "(default: 25.0)" in text  # of the default instance, not of its class


def test_help_of_one_choice(capsys):
    """With the type given, the help leaves the options of the other types out."""
    for argv in (["--help", "--env.type", "so101"], ["--env.type=so101", "-h"]):
        with pytest.raises(SystemExit):
            read(*argv)
        text = capsys.readouterr().out
        assert "--env.port" in text
        assert "--env.dataset-path" not in text
        assert "--policy.dtype" in text


def test_import_is_light():
    """Importing the command line brings neither torch nor OpenCV: what makes a command start in a fifth of a second."""
    code = (
        "import sys, env_client.cli; bad = {'torch', 'cv2', 'lerobot', 'pyarrow', 'matplotlib'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
