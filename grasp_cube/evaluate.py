"""`evaluate`: how often a checkpoint solves its task on the virtual SO-101, on seeds that it has not seen.

    serve_policy  <- wire ->  run_env_client  <- servo bus, cameras ->  virtual_so101

Three processes in real time, and LeRobot's own driver between them; `--in-process` runs the same policy in this
process and in lock step with the physics, and says whether the two rates differ by more than chance.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from env_client.cli import CliError, fail, parse

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.places import checkpoint_name
from grasp_cube.policies.policy import PolicyError

__all__ = ["EvaluateConfig", "main"]

PROG = "evaluate"
DESCRIPTION = "Run a checkpoint on the virtual SO-101 over the wire and report how often it solves its task."

FPS = 30.0
# Longest episodes, in seconds: about twice what the tasks themselves allow their scripted experts.
EPISODE_S = {"lift": 15.0, "sort": 70.0, "stack": 25.0}


@dataclass
class EvaluateConfig:
    """Which policy is measured, on which episodes."""

    # The checkpoint.
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    # What the virtual robot shows and the prompt asks for: lift, sort or stack.
    task: Literal["lift", "sort", "stack"] = "lift"
    # Number of episodes.
    episodes: int = 50
    # Seed of the first episode; the shipped datasets take theirs from 100000 on.
    seed: int = 1000
    # Longest episode, in seconds; default: 15 for lift, 25 for stack, 70 for sort.
    episode_time_s: float | None = None
    # How the client executes chunks.
    execution: Literal["sync", "async", "ensemble"] = "async"
    # How images travel.
    image_codec: Literal["raw", "jpeg", "png", "auto"] = "raw"
    # Also run the same seeds in this process, in lock step with the physics.
    in_process: bool = False
    # Leave the run over the wire out.
    wire: bool = True
    # Actions of each chunk that are executed in-process; default: all of them, as over the wire.
    chunk_steps: int | None = None
    # Folder of the report; default: outputs/evaluate/NAME_OF_THE_CHECKPOINT.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}; at least 1 was expected")
        if self.episode_time_s is not None and not self.episode_time_s > 0:
            raise ValueError(f"--episode-time-s is {self.episode_time_s}; a number above 0 was expected")
        if self.chunk_steps is not None and self.chunk_steps < 1:
            raise ValueError(f"--chunk-steps is {self.chunk_steps}; at least 1 was expected")
        if not (self.wire or self.in_process):
            raise ValueError("--no-wire leaves nothing to run without --in-process")

    @property
    def longest_s(self) -> float:
        """Longest episode, in seconds."""
        return EPISODE_S[self.task] if self.episode_time_s is None else self.episode_time_s


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(
        EvaluateConfig,
        argv,
        prog=PROG,
        description=DESCRIPTION,
        aliases={"device": "policy.device", "checkpoint": "policy.path"},
    )
    try:
        from virtual_so101.gl import PACKAGES, gl_backend
    except ImportError:
        fail(PROG, "the virtual robot is not installed: add the extra `evaluate`, grasp-cube[evaluate]")
    if gl_backend() is None:
        fail(PROG, PACKAGES)
    try:
        report = evaluate(config)
    except (CliError, PolicyError, RuntimeError, ValueError, OSError) as error:
        fail(PROG, str(error), 1)
    print(report)


def evaluate(config: EvaluateConfig) -> str:
    """Run, write `report.json`, `report.txt` and `report.png`, and return the table."""
    from grasp_cube.evaluation.episodes import format_table, summarize
    from grasp_cube.evaluation.picture import draw

    path = config.policy.path
    name = config.policy.name or (checkpoint_name(path, with_step=True) if path else config.task)
    folder = config.output_dir or Path("outputs/evaluate") / name
    folder.mkdir(parents=True, exist_ok=True)
    summaries: dict[str, dict[str, Any]] = {}
    if config.wire:
        summaries["over the wire"] = summarize(_over_the_wire(config, folder))
    if config.in_process:
        summaries["in-process"] = summarize(_in_process(config))
    seeds = f"seeds {config.seed} to {config.seed + config.episodes - 1}"
    title = f"{name}: {config.task}, {seeds}, {config.execution}"
    lines = [title, "", format_table(summaries)]
    report: dict[str, Any] = {"title": title, "runs": summaries}
    if len(summaries) == 2:
        report["p_value"] = _difference(summaries)
        lines += [
            "",
            f"A difference like this by chance alone (Fisher's exact test): p = {report['p_value']:.2f}",
        ]
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.txt").write_text("\n".join(lines) + "\n")
    draw(summaries, title, FPS, folder / "report.png")
    return "\n".join([*lines, "", f"{folder / 'report.png'} and report.json hold every episode."])


def _over_the_wire(config: EvaluateConfig, folder: Path) -> list[Any]:
    from tqdm import tqdm

    from grasp_cube.evaluation.over_the_wire import run_over_the_wire
    from grasp_cube.server_process import serving

    with (
        serving(_server_arguments(config), lambda line: print(f"[server] {line}", flush=True)) as port,
        tqdm(total=config.episodes, desc="over the wire", unit="episode") as bar,
    ):
        return run_over_the_wire(
            port,
            config.task,
            _seeds(config),
            folder,
            time_s=config.longest_s,
            arguments=["--execution", config.execution, "--image-codec", config.image_codec],
            on_episode=lambda done: bar.update(done - bar.n),
        )


def _in_process(config: EvaluateConfig) -> list[Any]:
    from tqdm import tqdm

    from grasp_cube.evaluation.in_process import run_in_process
    from grasp_cube.policies.load import load_policy

    policy = load_policy(config.policy, task=config.policy.task or config.task)
    try:
        steps = config.chunk_steps or policy.spec.horizon
        episodes = run_in_process(
            policy, config.task, _seeds(config), chunk_steps=steps, time_s=config.longest_s
        )
        return list(tqdm(episodes, total=config.episodes, desc="in-process", unit="episode"))
    finally:
        policy.close()


def _difference(summaries: dict[str, dict[str, Any]]) -> float:
    from scipy.stats import fisher_exact

    table = [[run["successes"], run["episodes"] - run["successes"]] for run in summaries.values()]
    return float(fisher_exact(table).pvalue)


def _seeds(config: EvaluateConfig) -> range:
    return range(config.seed, config.seed + config.episodes)


def _server_arguments(config: EvaluateConfig) -> list[str]:
    """The policy's options as `serve_policy` reads them; what is left at its default is left out."""
    default = PolicyConfig()
    arguments = ["--policy.task", config.policy.task or config.task]
    for name, value in vars(config.policy).items():
        if name != "task" and value != getattr(default, name):
            arguments += [f"--policy.{name}", str(value)]
    return arguments


if __name__ == "__main__":
    main()
