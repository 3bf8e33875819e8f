"""Everything that `run_env_client` can be told, and what a task fills in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from env_client.cli import CliError, find_config_file, host_port
from env_client.control import LoopConfig, SafetyConfig, SourceOptions
from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.config import EnvConfig
from env_client.envs.robots import SO101Config
from env_client.panel.config import ALIASES as PANEL_ALIASES
from env_client.panel.config import PanelConfig
from env_client.sidecar.config import ALIASES as SIDECAR_ALIASES
from env_client.sidecar.config import LogConfig, RecordConfig
from env_client.text_files import load_yaml

__all__ = ["ALIASES", "ClientConfig", "LeaderConfig", "Task", "find_task", "with_env_type"]

# What the first documents write, and short names of flags that are used often.
ALIASES: dict[str, Any] = (
    {
        "server": host_port,
        "control-freq": "fps",
        "camera-config-path": "env.camera_config_path",
        "dry-run": "loop.dry_run",
        "max-velocity": "safety.max_velocity",
        "max-velocity-per-frame": "safety.max_velocity_per_frame",
        "gripper-max-velocity": "safety.gripper_max_velocity",
        "binarize-gripper": "safety.binarize_gripper",
        "smooth": "safety.smooth",
        "hold": "safety.hold",
        "blend-s": "chunks.blend_s",
        "use-degrees": "env.use_degrees",
        "config": "config_name",
        "max-frames": "max_steps",
        "episode": "first_episode",
        "n-action-steps": "chunks.n_action_steps",
        "enable-camera": "env.enable_camera",
        "no-enable-camera": "env.enable_camera=false",
        "execute-chassis": "env.execute_chassis",
        "no-head": "env.head=false",
        "no-torso": "env.torso=false",
        "control-way": "env.control_way",
        "env.virtual": "env.astribot.virtual",
    }
    | PANEL_ALIASES
    | SIDECAR_ALIASES
)


@dataclass(frozen=True)
class LeaderConfig:
    """A leader arm that moves the robot by hand before each episode (LeRobot's SO101Leader)."""

    # Serial port of the leader arm; default: there is none.
    port: str | None = None
    # Serial ports of two leader arms.
    left_port: str | None = None
    right_port: str | None = None
    # The name under which it was calibrated; two arms: NAME_left and NAME_right.
    id: str = "leader"
    # Folder of its calibration; default: LeRobot's own.
    calibration_dir: str | None = None
    # Teleoperate for so many seconds before each episode; 0: until Enter is pressed.
    time_s: float = 0.0

    def __post_init__(self) -> None:
        if self.port and (self.left_port or self.right_port):
            raise ValueError(
                "--leader.port is for one arm, --leader.left-port and --leader.right-port are for two"
            )
        if bool(self.left_port) != bool(self.right_port):
            raise ValueError("two leader arms need both --leader.left-port and --leader.right-port")
        if self.time_s < 0:
            raise ValueError(f"--leader.time-s is {self.time_s:g}; 0 or more seconds were expected")

    @property
    def ports(self) -> tuple[str, ...]:
        """The leader arms' ports, left first; empty without one."""
        return (self.port,) if self.port else tuple(p for p in (self.left_port, self.right_port) if p)


@dataclass(frozen=True)
class ClientConfig:
    """Everything that `run_env_client` can be told."""

    # A task in configs/tasks (lift, sort, stack, or a yaml file): robot, cameras and prompt; or a prompt in words.
    task: str | None = None
    # The prompt, in place of the task's.
    prompt: str | None = None
    # The robot.
    env: EnvConfig = field(default_factory=SO101Config)
    # Name or address of the policy server; grpc://HOST for an older one.
    host: str = "127.0.0.1"
    # Port of the policy server.
    port: int = 8000
    # Key that the server asks for; default: the environment variable GRASP_CUBE_API_KEY.
    api_key: str | None = None
    # How long to wait for a server that is not there at the start, in seconds; 0: for ever.
    connect_timeout_s: float = 0.0
    # How long one inference may take, in seconds (the first of a connection three minutes).
    timeout_s: float = 30.0
    # End the run when no chunk came for so long, in seconds; 0: hold and keep asking.
    server_patience_s: float = 0.0
    # How images travel, where the server can read it; auto: as JPEG where the link is slow (over gRPC: raw).
    image_codec: Literal["raw", "jpeg", "png", "auto"] = "raw"
    # Folder of a checkpoint on the server, which the server is to load first.
    checkpoint: str | None = None
    # Name of its training configuration, for checkpoints that need one.
    config_name: str | None = None
    # Device that the server loads it on: cpu, cuda, cuda:N or mps; default: the server's own.
    device: str | None = None
    # Unit of the policy, where the server does not say it or only assumes it: normalized, degrees or rad.
    policy_unit: str | None = None
    # How chunks are executed: sync asks when one is used up, async asks ahead, ensemble averages, rtc lets the server continue the motion.
    execution: Literal["sync", "async", "ensemble", "rtc"] = "async"
    # Execute chunks of actions; without, every action is asked for (--execution sync, one action of each chunk).
    use_chunk: bool = True
    # How often the robot is read and commanded, in Hz; default: what the policy was trained with, else 30.
    fps: float | None = None
    # Number of episodes.
    num_episodes: int = 1
    # A person begins each episode and judges it afterwards (in the page, or with Enter, y and n); the run ends when they end it.
    attended: bool = False
    # Length of an episode, in seconds.
    episode_time_s: float = 60.0
    # End an episode after so many commands of the policy; 0: none.
    max_steps: int = 0
    # Number of the first episode; those after it count on.
    first_episode: int = 0
    # Go to the robot's ready pose before each episode; default: an Astribot does.
    move_to_ready: bool | None = None
    # What the robot does at the end, however it comes: hold its pose, relax (torque off), or go to its rest pose and then relax.
    on_exit: Literal["hold", "relax", "rest-pose"] = "hold"
    # Speed of the way to the rest pose, in rad/s.
    rest_velocity: float = 0.5
    # The supervisor stops the robot when the control process gives no sign of life for so long, in seconds.
    hang_timeout_s: float = 0.5
    # How long a clean stop may take before the supervisor does it, in seconds.
    stop_timeout_s: float = 30.0
    # JSON file that gets the result of each episode.
    summary_path: Path | None = None
    # The browser page.
    panel: PanelConfig = field(default_factory=PanelConfig)
    # Every step with its pictures, to look at and to send to a server again (replay_log).
    log: LogConfig = field(default_factory=LogConfig)
    # Videos, plots, figures and judgements of each episode (report makes a page of them).
    record: RecordConfig = field(default_factory=RecordConfig)
    # Open the live Rerun viewer.
    rerun: bool = False
    # A leader arm for teleoperation before each episode.
    leader: LeaderConfig = field(default_factory=LeaderConfig)
    # How chunks are asked for and merged.
    chunks: SourceOptions = field(default_factory=SourceOptions)
    # What may reach a motor.
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    # What the control loop tolerates.
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.num_episodes < 1:
            raise ValueError(f"--num-episodes is {self.num_episodes}; at least 1 was expected")
        above_zero = ("episode_time_s", "timeout_s", "rest_velocity", "hang_timeout_s", "stop_timeout_s")
        for name in above_zero:
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; a number above 0 was expected"
                )
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"--fps is {self.fps}; a rate above 0 Hz was expected")
        if min(self.connect_timeout_s, self.server_patience_s, self.max_steps, self.first_episode) < 0:
            raise ValueError(
                "--connect-timeout-s, --server-patience-s, --max-steps and --episode are 0 or above"
            )

    @property
    def goes_to_ready(self) -> bool:
        """Whether each episode begins in the ready pose."""
        is_default = self.move_to_ready is None
        return isinstance(self.env, AstribotConfig) if is_default else bool(self.move_to_ready)

    @property
    def chunking(self) -> tuple[str, SourceOptions]:
        """How chunks are executed, and the options of that."""
        if self.use_chunk:
            return self.execution, self.chunks
        return "sync", replace(self.chunks, n_action_steps=1)


@dataclass(frozen=True)
class Task:
    """What a task file says to a client."""

    prompt: str = ""
    # Name of the file; empty for a prompt in words.
    name: str = ""
    # --env.type that the task is meant for.
    robot: str | None = None
    cameras: tuple[str, ...] = ()
    action_dim: int | None = None


def find_task(text: str | None) -> Task:
    """The task file of that name, or a prompt in words. Raises `CliError` for a name without a file."""
    if not text:
        return Task()
    if " " in text.strip():
        return Task(prompt=text.strip())
    file = find_config_file(f"tasks/{text}" if Path(text).suffix == "" else text)
    try:
        content = load_yaml(file)
        prompt = content["prompt"]
        if not isinstance(prompt, str):
            raise TypeError("its prompt is no text")
        return Task(
            prompt=prompt,
            name=file.stem,
            robot=content.get("robot"),
            cameras=tuple(content.get("cameras") or ()),
            action_dim=content.get("action_dim"),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CliError(
            f"the task file {file} cannot be used: {error!r}; it needs at least a prompt"
        ) from error


def with_env_type(arguments: Sequence[str]) -> list[str]:
    """The command line with the task's robot as `--env.type`, where neither it nor a config file names one."""
    plain = [argument.replace("_", "-") for argument in arguments]
    if any(a.split("=")[0] in ("--env.type", "--config-path", "-h", "--help") for a in plain):
        return list(arguments)
    task = None
    for position, argument in enumerate(plain):
        if argument.startswith("--task="):
            task = arguments[position].partition("=")[2]
        elif argument == "--task" and position + 1 < len(arguments):
            task = arguments[position + 1]
    robot = find_task(task).robot
    return ["--env.type", robot, *arguments] if robot else list(arguments)
