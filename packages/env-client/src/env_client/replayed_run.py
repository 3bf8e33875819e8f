"""A replay that a person can watch and steer, as they would a robot's run: the panel of `run_fake_env_client`.

Life cycle: made before the server is waited for, so that the page is there at once; `follow` when it is known what is
replayed; `close` at the end. Without a panel only the terminal's keys are left of it. A panel that dies is said once,
and the replay goes on.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from env_client.control import Chunk, Origin, SourceStats, TickRecord
from env_client.envs.dataset import DatasetEnv
from env_client.keys import HELP, Keys
from env_client.panel.config import PanelConfig
from env_client.replay import ChunkAsker, ReplayedTick
from env_client.sidecar.config import SidecarConfig
from env_client.sidecar.describe import describe_run
from env_client.sidecar.feed import SidecarFeed
from env_client.sidecar.types import EpisodeEnd, EpisodeStart, Mark
from env_client.steering import Steering

__all__ = ["ReplayedRun"]


class ReplayedRun:
    """What is between the replay's loop and a person. All methods but the controls belong to the replay's thread."""

    def __init__(
        self,
        config: SidecarConfig,
        panel: PanelConfig,
        listening: socket.socket | None,
        say: Callable[[str], None],
    ) -> None:
        """`config` says what is recorded. `listening` is the panel's socket, which goes over to the panel's process;
        None: no panel."""
        self.prompt: str | None = None
        self.stats = SourceStats()
        self._say = say
        self._asker: ChunkAsker | None = None
        self._env: DatasetEnv | None = None
        self._held = threading.Event()
        self._feed: SidecarFeed | None = None
        self._steering: Steering | None = None
        self._keys: Keys | None = None
        self._chunk: Chunk | None = None
        if listening is not None:
            config = replace(config, panel=panel, panel_fd=listening.fileno())
        if config.wanted:
            self._feed = SidecarFeed(config, say=say, on_command=self._command)
        if listening is not None:
            listening.close()

    def follow(self, config: Any, env: DatasetEnv, asker: ChunkAsker, episodes: int) -> None:
        """The replay of so many episodes begins. `config` is the command's."""
        self._asker, self._env, self.prompt = asker, env, asker.prompt
        spec = asker.client.spec
        feed = self._feed
        self._steering = Steering(
            self,
            episodes=episodes,
            attended=config.attended,
            publish=(lambda state: None) if feed is None else feed.state,
            on_mark=self._mark,
            say=self._say,
        )
        self._steering.describe(asker.prompt or "", live_prompt=spec is not None and spec.wants_prompt)
        self._keys = Keys(self._command)
        if self._keys.there:
            self._say(HELP)
        if feed is not None:
            feed.follow(self)
            feed.begin_run(
                describe_run(
                    config, env.spec, spec, fps=env.spec.fps, server=f"{config.host}:{config.port}",
                    prompt=asker.prompt or "", execution="sync",
                )
            )  # fmt: skip

            feed.wait_ready()

    def _mark(self, episode: int, success: bool, note: str) -> None:
        if self._feed is not None:
            self._feed.mark(Mark(episode, success, note))

    # ------------------------------------------------------------------------------------------- the controls

    def pause(self) -> None:
        self._held.set()

    def resume(self) -> None:
        self._held.clear()

    def set_prompt(self, prompt: str) -> None:
        """From the next request on; an empty one leaves it to the recording."""
        if self._asker is not None:
            self._asker.prompt = self.prompt = prompt or None

    def _command(self, command: Any) -> None:
        if self._steering is not None:
            self._steering.command(command)

    # ------------------------------------------------------------------------------------------- the replay

    def next_episode(self) -> int | None:
        """The number of the episode that begins now; None when the run is over. Waits for a person who has stopped it."""
        assert self._steering is not None
        return self._steering.next_episode(_wait)

    def begin(self, number: int) -> None:
        """Episode `number` begins."""
        assert self._steering is not None
        self._chunk = None
        if self._feed is not None:
            self._feed.begin_episode(EpisodeStart(number, time.time(), None, self.prompt or ""))
        self._steering.enter("running")

    def turn(self) -> bool:
        """Whether the next tick comes; waits while the run is on hold."""
        assert self._steering is not None
        while self._held.is_set() and not self._steering.stop.wait(0.02):
            pass
        return not self._steering.stop.is_set()

    def tick(self, number: int, tick: ReplayedTick) -> None:
        """Tell the page of a tick: commanded is what was recorded, predicted is what the policy says."""
        if self._feed is None or self._asker is None:
            return
        boundary = tick.index == 0
        if boundary or self._chunk is None:
            self.stats.requests += 1
            self.stats.chunks += 1
            self._chunk = Chunk(
                tick.chunk, self.stats.chunks, number, 0, tick.observation.capture_time,
                self._asker.round_trips[-1] if self._asker.round_trips else 0.0,
            )  # fmt: skip
        origin = Origin(
            number, self._chunk.seq, 0.0, boundary, np.zeros(tick.chunk.shape[1]), self._chunk, tick.index
        )
        self._feed.push(
            TickRecord(
                number, tick.tick, "run", time.monotonic(), 0.0, tick.observation,
                requested=tick.action, sent=tick.recorded, origin=origin,
            )
        )  # fmt: skip

    def finished(self, number: int) -> None:
        """Episode `number` is over."""
        assert self._steering is not None
        outcome = self._steering.outcome or "done"
        if self._feed is not None:
            self._feed.end_episode(EpisodeEnd(number, {"outcome": outcome}))
        self._steering.finished(outcome)

    def close(self) -> None:
        if self._keys is not None:
            self._keys.close()
        if self._feed is not None:
            self._feed.close()


def _wait(go: threading.Event) -> None:
    go.wait()
