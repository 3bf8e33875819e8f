"""`run_fake_env_client`: replay a recorded dataset against a policy server, and say how well the policy follows.

    run_fake_env_client --env.dataset-path datasets/lift

Life cycle: the dataset is opened first, then the server is waited for, what does not fit is refused, then the
episodes are replayed one after the other. At the end, and also after Ctrl-C or a server that is gone for good,
there is a table, `summary.json` and a plot of each episode.
Exit codes: 0; 2 with one sentence on stderr; 130 after Ctrl-C.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from env_client.cli import fail, host_port, parse
from env_client.envs.config import EnvConfig
from env_client.envs.dataset import DatasetEnv, DatasetEnvConfig
from env_client.envs.env import EnvError
from env_client.panel.config import ALIASES as PANEL_ALIASES
from env_client.panel.config import PanelConfig, PanelError, open_panel
from env_client.policy_server import require_policy
from env_client.replay import (
    ChunkAsker,
    EpisodeRecord,
    Pace,
    ReplayedTick,
    ReplayStopped,
    replay_episode,
)
from env_client.replayed_run import ReplayedRun
from env_client.sidecar.config import ALIASES as SIDECAR_ALIASES
from env_client.sidecar.config import LogConfig, RecordConfig, SidecarConfig
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import WireError

__all__ = ["FakeClientConfig", "main"]

PROG = "run_fake_env_client"
DESCRIPTION = (
    "Replay a recorded LeRobot dataset against a policy server, without a robot, and compare what the policy "
    "predicts with what was recorded."
)
ALIASES: dict[str, Any] = (
    {
        "dataset-path": "env.dataset_path",
        "episodes": "env.episodes",
        "prompt": "task",
        "server": host_port,
    }
    | PANEL_ALIASES
    | SIDECAR_ALIASES
)


@dataclass(frozen=True)
class FakeClientConfig:
    """Everything that `run_fake_env_client` can be told."""

    # What is replayed.
    env: EnvConfig = field(default_factory=DatasetEnvConfig)
    # Name or address of the server.
    host: str = "127.0.0.1"
    # Port of the server.
    port: int = 8000
    # Key that the server asks for; default: the environment variable GRASP_CUBE_API_KEY.
    api_key: str | None = None
    # Replay only so many of the episodes.
    num_episodes: int | None = None
    # The prompt, in place of the one that was recorded.
    task: str | None = None
    # As fast as the server answers, instead of at the dataset's rate.
    fast: bool = False
    # Folder for plots and summary; default: outputs/fake_env_client/DATE_TIME.
    output_dir: Path | None = None
    # A person begins each episode (in the page, or with Enter); the run ends when they end it.
    attended: bool = False
    # The browser page.
    panel: PanelConfig = field(default_factory=PanelConfig)
    # Every tick with its pictures, to look at and to send to a server again (replay_log).
    log: LogConfig = field(default_factory=LogConfig)
    # Videos, plots, figures and judgements of each episode (report makes a page of them).
    record: RecordConfig = field(default_factory=lambda: RecordConfig(enable=False))
    # Open the live Rerun viewer.
    rerun: bool = False
    # Draw a plot of each episode.
    plots: bool = True
    # How long to wait for a server that is not there, in seconds.
    connect_timeout_s: float = 120.0
    # How long one inference may take, in seconds (the first of a connection three minutes).
    timeout_s: float = 30.0
    # How images travel, where the server can read it.
    image_codec: Literal["raw", "jpeg", "png", "auto"] = "raw"

    def __post_init__(self) -> None:
        if self.num_episodes is not None and self.num_episodes < 1:
            raise ValueError(f"--num-episodes is {self.num_episodes}; at least 1 was expected")
        if self.connect_timeout_s < 0 or self.timeout_s <= 0:
            raise ValueError("--connect-timeout-s and --timeout-s are seconds; numbers above 0 were expected")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(FakeClientConfig, argv, prog=PROG, description=DESCRIPTION, aliases=ALIASES)
    try:
        code = _run(config)
    except (PanelError, EnvError, ConnectionLost, WireError, ReplayStopped) as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        fail(PROG, "interrupted", 130)
    raise SystemExit(code)


def _run(config: FakeClientConfig) -> int:
    if not isinstance(config.env, DatasetEnvConfig):
        raise EnvError(
            "this command replays datasets only (--env.type dataset); robots are run by run_env_client"
        )
    env = DatasetEnv(config.env)
    chosen = env.episodes[: config.num_episodes]
    ticks = [env.files.episode(index).length for index in chosen]
    print(
        f"Dataset {config.env.dataset_path}: {len(chosen)} of {len(env.files.episodes)} episodes, {sum(ticks)} ticks "
        f"at {env.spec.fps:g} Hz, {env.spec.action_dim} values in an action, cameras {', '.join(env.spec.cameras) or 'none'}",
        flush=True,
    )
    with ExitStack() as stack:
        stack.callback(env.close)
        records = SidecarConfig(log=config.log, record=config.record, rerun=config.rerun)
        run = stack.enter_context(closing(ReplayedRun(records, *open_panel(config.panel, _say), _say)))
        client = WebsocketClientPolicy(
            config.host,
            config.port,
            config.api_key or os.environ.get("GRASP_CUBE_API_KEY"),
            connect_timeout_s=config.connect_timeout_s,
            timeout_s=config.timeout_s,
            on_status=_say,
            image_codec=config.image_codec,
        )
        stack.callback(client.close)
        require_policy(client)
        print(f"Connected! {_describe(client)}", flush=True)
        _refuse_misfits(env, client, config.env)
        return _replay(config, run, env, client, chosen, ticks)


def _replay(
    config: FakeClientConfig,
    run: ReplayedRun,
    env: DatasetEnv,
    client: WebsocketClientPolicy,
    chosen: Sequence[int],
    ticks: list[int],
) -> int:
    from tqdm import tqdm

    folder = _make_folder(config.output_dir)
    asker = ChunkAsker(client, action_dim=env.spec.action_dim, prompt=config.task, say=_say)
    run.follow(config, env, asker, len(chosen))
    records: list[EpisodeRecord] = []
    pace = Pace(None if config.fast else env.spec.fps)
    trouble, code = "", 0
    asked = threading.Event()

    def interrupt(*_: object) -> None:
        # An exception is lost where it comes up in Python that C code calls (decoders do): the next tick looks at the flag.
        asked.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    bar = tqdm(total=sum(ticks), unit="tick", dynamic_ncols=True, file=sys.stderr)
    try:
        with bar:
            while (number := run.next_episode()) is not None:
                first = env.reset()
                bar.set_description(f"episode {env.episode} ({number + 1} of {len(chosen)})")
                if not records:
                    asker.encode(
                        first
                    )  # a size that no rule of the policy fits is refused before the first tick
                records.append(EpisodeRecord.of(env))
                run.begin(number)
                replay_episode(
                    env, asker, records[-1], first, pace, partial(_tick, run, number, bar, asked), run.turn
                )
                run.finished(number)
    except KeyboardInterrupt:
        trouble, code = "interrupted; what was replayed until then follows", 130
    except (EnvError, WireError, ReplayStopped) as error:
        trouble, code = str(error), 2
    # A second Ctrl-C must not cost the results.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if trouble:
            print(f"{PROG}: {trouble}", file=sys.stderr, flush=True)
        records = [record for record in records if record.ticks]
        if records:
            _report(config, env, asker, records, folder, trouble)
        else:
            _remove_if_empty(folder)
    finally:
        signal.signal(signal.SIGINT, before)
    return code


def _tick(run: ReplayedRun, number: int, bar: Any, asked: threading.Event, tick: ReplayedTick) -> None:
    if asked.is_set():
        raise KeyboardInterrupt
    bar.update()
    run.tick(number, tick)


def _report(
    config: FakeClientConfig,
    env: DatasetEnv,
    asker: ChunkAsker,
    records: list[EpisodeRecord],
    folder: Path,
    trouble: str,
) -> None:
    from env_client.record.replay_report import format_table, summarise, write_summary

    assert isinstance(config.env, DatasetEnvConfig)
    spec = asker.client.spec
    summary = {
        "dataset": str(config.env.dataset_path),
        "server": asker.client.url,
        "policy": spec.to_wire() if spec is not None else None,
        "unit": env.spec.unit,
        "fps": env.spec.fps,
        "paced": not config.fast,
        "stopped": trouble or None,
    } | summarise(records, asker, env.spec.action_names)
    print(f"\n{format_table(summary, env.spec.unit)}\n")
    write_summary(folder / "summary.json", summary)
    if config.plots:
        _plot(env, records, folder)
    print(f"Summary{' and plots' if config.plots else ''}: {folder}", flush=True)


def _plot(env: DatasetEnv, records: list[EpisodeRecord], folder: Path) -> None:
    from env_client.record.plots import plot_actions

    for record in records:
        try:
            plot_actions(
                folder / f"episode_{record.episode}_actions.png",
                record.recorded,
                record.predicted,
                boundaries=record.boundaries,
                names=env.spec.action_names,
                fps=env.spec.fps,
                unit=env.spec.unit,
                title=f"{env.files.root.name}, episode {record.episode}",
            )
        except ImportError:
            print("No plots: matplotlib is not installed (pip install 'env-client[viz]')", file=sys.stderr)
            return


def _refuse_misfits(env: DatasetEnv, client: WebsocketClientPolicy, config: DatasetEnvConfig) -> None:
    from env_client.fit import doubts, misfits

    if client.spec is None:
        return  # a plain openpi server does not say what it takes
    name = f"the dataset {config.dataset_path}"
    policy = client.spec
    if policy.unit_source == "assumed":
        policy = replace(policy, unit=env.known_unit or policy.unit)
        print(
            f"Note: that the policy works in {policy.unit} is assumed (serve it with --policy.unit).",
            flush=True,
        )
    env.take_unit(policy.unit)
    found = misfits(env.spec, policy, name, env.camera_sizes)
    if found:
        raise EnvError("; ".join(found))
    for sentence in doubts(env.spec, policy, name):
        print(f"Note: {sentence}.", flush=True)


def _describe(client: WebsocketClientPolicy) -> str:
    spec = client.spec
    if spec is None:
        return f"A plain openpi server at {client.url}, which does not describe its policy"
    cameras = (
        ", ".join(f"{camera.name} {camera.height}x{camera.width}" for camera in spec.cameras) or "no camera"
    )
    return (
        f"{client.url} serves {spec.type}: {spec.horizon} actions of {spec.action_dim} values ({spec.unit}) "
        f"from {cameras}"
    )


def _make_folder(given: Path | None) -> Path:
    folder = given or Path("outputs") / "fake_env_client" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvError(
            f"the folder {folder} cannot be made ({error.strerror}): give another --output-dir"
        ) from error
    return folder


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _say(sentence: str) -> None:
    """A line on stdout that does not tear the progress bar."""
    from tqdm import tqdm

    tqdm.write(sentence, file=sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
