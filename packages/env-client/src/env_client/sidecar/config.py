"""What is recorded and shown of a run, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from env_client.panel.config import PanelConfig

__all__ = ["ALIASES", "LogConfig", "RecordConfig", "SidecarConfig"]

# The spellings of the first documents.
ALIASES = {
    "enable-logging": "log.enable",
    "no-enable-logging": "log.enable=false",
    "log-dir": "log.dir",
    "no-record": "record.enable=false",
}


@dataclass(frozen=True)
class LogConfig:
    """The inference log: each step and each picture, one folder for a run."""

    # Write the log.
    enable: bool = True
    # Folder that the run's own folder is made in.
    dir: Path = Path("inference_logs")


@dataclass(frozen=True)
class RecordConfig:
    """The evaluation record: videos, plots, figures and judgements, one folder for a run."""

    # Write the record.
    enable: bool = True
    # Folder that the run's own folder is made in.
    dir: Path = Path("outputs/eval_records")
    # A video of each camera and episode.
    videos: bool = True
    # A plot of the actions of each episode.
    plots: bool = True
    # Everything as rollout.rrd, for the Rerun viewer (needs the `record` extra).
    rrd: bool = True
    # Folder of a LeRobot v3.0 dataset that gets the episodes; a new one, or one that an earlier run has made.
    dataset_path: Path | None = None
    # Leave episodes that failed out of the dataset.
    skip_failed: bool = False

    def __post_init__(self) -> None:
        if self.dataset_path is not None and not (self.enable and self.videos):
            raise ValueError(
                "--record.dataset-path takes its pictures from the record's videos: leave both on"
            )


@dataclass(frozen=True)
class SidecarConfig:
    """What the sidecar process does."""

    log: LogConfig = field(default_factory=LogConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    # Open the live Rerun viewer.
    rerun: bool = False
    # The browser page, and the listening socket that its door uses; None: no page.
    panel: PanelConfig | None = None
    panel_fd: int | None = None
    # Where the page's process writes what a person asks for (`panel/commands.py`); set by `SidecarFeed`.
    command_fd: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.log.enable or self.record.enable or self.rerun or self.panel is not None
