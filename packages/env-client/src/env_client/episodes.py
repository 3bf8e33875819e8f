"""The episodes of a run, one after the other, steered by a person where there is one.

    [leader] -> [ready pose] -> episode -> table -> [judgement, Start] -> …

Life cycle: one `Episodes` per run, used by the thread that owns the robot, after the motors are on. An `EnvError` means that
the run cannot go on; whoever runs it applies the exit rule.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from env_client.client_config import ClientConfig
from env_client.console import Console
from env_client.control import ActionSource, ControlLoop, EpisodeResult
from env_client.envs.env import EnvError
from env_client.keys import HELP, Keys
from env_client.run_status import StatusThread
from env_client.sidecar.feed import SidecarFeed
from env_client.sidecar.types import EpisodeEnd, EpisodeStart
from env_client.steering import Steering
from env_client.summary import format_episode, plain_result

__all__ = ["Episodes"]


class Episodes:
    """`run` goes through them; `results` holds one entry for each that ended."""

    def __init__(
        self,
        config: ClientConfig,
        loop: ControlLoop,
        source: ActionSource,
        steering: Steering,
        console: Console,
        keys: Keys,
        *,
        ready: np.ndarray | None = None,
        leader: ControlLoop | None = None,
        wake: Callable[[], None] = lambda: None,
        feed: SidecarFeed | None = None,
    ) -> None:
        """`ready`: (A,) the pose before each episode. `leader`: the loop that a leader arm feeds. `wake` is called
        before each episode: motors that lost their power get it back. `feed`: whoever records and shows it all."""
        self.results: list[EpisodeResult] = []
        self._config, self._loop, self._source = config, loop, source
        self._steering, self._console = steering, console
        self._ready, self._leader, self._wake = ready, leader, wake
        self._feed = feed
        self._keys = keys

    def run(self) -> int:
        """Until all episodes are done or a person ended the run; the exit code. Raises `EnvError`."""
        steering = self._steering
        status = StatusThread(self._loop, self._source, self._console, self._config, give_up=self._give_up)
        if self._keys.there:
            self._console.say(HELP)
        try:
            while (number := steering.next_episode(lambda go: self._idle(status, go))) is not None:
                self._wake()
                if self._prepared(status, number) and steering.enter("running"):
                    self._episode(status, number)
        finally:
            status.close()
        return 1 if status.gave_up else 0

    def _idle(self, status: StatusThread, go: threading.Event) -> None:
        where = "the page or Enter" if self._keys.there else "the page"
        status.phase(f"the robot holds; waiting for Start ({where})")
        self._loop.watch(go)
        status.phase("")

    def _prepared(self, status: StatusThread, number: int) -> bool:
        """Whether everything before the episode went as wanted; False when a person stopped it."""
        steering = self._steering
        if self._leader is not None and steering.enter("teleoperation"):
            status.phase("teleoperation")
            self._teleoperate(number)
        if self._ready is None or not steering.enter("moving"):
            return True
        status.phase("to the ready pose")
        move = self._loop.move_to(self._ready, stop=steering.stop)
        if not move.reached and not steering.stop.is_set():
            raise EnvError(f"the ready pose was not reached: {self._loop.said(move)}")
        return move.reached

    def _episode(self, status: StatusThread, number: int) -> None:
        config, steering = self._config, self._steering
        status.episode(number + 1)
        seed, episode = self._seed(number), config.first_episode + number
        if self._feed is not None:
            self._feed.begin_episode(EpisodeStart(episode, time.time(), seed, steering.prompt))
        result = self._loop.run_episode(
            episode=episode,
            time_s=config.episode_time_s,
            max_steps=config.max_steps or None,
            stop=steering.stop,
            seed=seed,
        )
        status.phase("")
        if result.outcome == "stopped" and steering.outcome:
            result = replace(result, outcome=steering.outcome)
        self.results.append(result)
        if self._feed is not None:
            self._feed.end_episode(EpisodeEnd(episode, plain_result(result)))
        self._console.say(format_episode(result, number + 1, config.num_episodes))
        steering.finished(result.outcome)
        if result.outcome == "env lost":
            raise EnvError("the robot did not come back; see the messages above")

    def _seed(self, number: int) -> int | None:
        seed = getattr(self._config.env, "seed", None)
        return None if seed is None else int(seed) + number

    def _give_up(self, reason: str) -> None:
        self._console.say(f"run_env_client: {reason}")
        self._steering.end()

    def _teleoperate(self, number: int) -> None:
        """The leader moves the robot until Enter or Start is pressed, or for `--leader.time-s`."""
        assert self._leader is not None
        limit = self._config.leader.time_s
        if limit:
            self._console.say(f"The leader arm moves the robot for {limit:g} s.")
        else:
            self._console.say(f"The leader arm moves the robot; Enter starts episode {number + 1}.")
            if not self._keys.there:
                threading.Thread(target=self._await_enter, args=(number,), name="enter", daemon=True).start()
        self._leader.run_episode(
            episode=number, time_s=limit or None, stop=self._steering.stop, reset_env=False
        )

    def _await_enter(self, number: int) -> None:
        """Enter from where the keys are not read: a pipe."""
        sys.stdin.readline()
        self._steering.command({"name": "start", "episode": number})
