"""The sidecar process: `python -m env_client.sidecar.process CONNECTION RING`, started by `SidecarFeed` only.

Life cycle: it ends when control closes the run or is gone (SIGKILL included: the socket reaches its end), after every
consumer has finished its files. What records and draws runs at a lower priority, so that control keeps its cores. A person's
Stop does not pass through here: the page has a process of its own (`panel/process.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from env_client.record.files import RunFolder
from env_client.sidecar.config import SidecarConfig
from env_client.sidecar.ring import Ring
from env_client.sidecar.runner import Runner
from env_client.sidecar.types import Consumer, TickData
from env_client.wire import EncodedImage

__all__ = ["Sidecar", "main"]

# Between two signs of life, and for all consumers to finish their files, seconds.
_BEAT, _FINISH = 1.0, 50.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The thread that takes pictures out of the ring waits this long for one that computes in Python.
    sys.setswitchinterval(1e-3)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sidecar = Sidecar(Connection(int(sys.argv[1])), Ring(int(sys.argv[2])))
    signal.signal(signal.SIGTERM, lambda number, frame: sidecar.end())
    sidecar.run()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    # Not sys.exit: libraries' threads must not keep a process whose files are finished.
    os._exit(0)


class Sidecar:
    """Takes what control sends and hands it to the consumers."""

    def __init__(self, connection: Connection, ring: Ring) -> None:
        self._connection, self._ring = connection, ring
        self._sending = threading.Lock()
        self._ended = False

    def end(self) -> None:
        self._ended = True

    def run(self) -> None:
        """Until control says so, or is gone."""
        # From our parent process, through a pipe that nobody else has.
        event, config = pickle.loads(self._connection.recv_bytes())  # nosec B301
        assert event == "config"
        runners = list(_make_runners(config, self.say))
        self._tell("ready", None)
        # Control may be gone: what it told us until then is to be kept.
        with contextlib.suppress(OSError, EOFError):
            self._serve(runners)
        for runner in runners:
            runner.close()
        end = time.monotonic() + _FINISH
        for runner in runners:
            if not runner.join(max(0.0, end - time.monotonic())):
                self.say(f"{runner.name} could not be finished in {_FINISH:g} s.")

    def say(self, line: str) -> None:
        """A line for the user. May be called from any thread."""
        self._tell("say", line)

    def _serve(self, runners: list[Runner]) -> None:
        told = time.monotonic()
        while not self._ended:
            if self._connection.poll(_BEAT / 2):
                event, value = pickle.loads(self._connection.recv_bytes())  # nosec B301
                if event == "close":
                    return
                if isinstance(value, TickData):
                    value = self._with_images(value)
                for runner in runners:
                    runner.put(event, value)
            if time.monotonic() - told > _BEAT:
                told = time.monotonic()
                self._tell("beat", None)

    def _with_images(self, tick: TickData) -> TickData:
        images: dict[str, Any] = {}
        for name, place in tick.images.items():
            image = place if isinstance(place, EncodedImage) else self._ring.read(*place)
            if image is not None:
                images[name] = image
        return replace(tick, images=images, dropped=tick.dropped + len(tick.images) - len(images))

    def _tell(self, kind: str, value: Any) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(pickle.dumps((kind, value)))


def _make_runners(config: SidecarConfig, say: Callable[[str], None]) -> Iterator[Runner]:
    """What the config asks for; what cannot begin is said and left out."""
    for name, make, latest in _makers(config, say):
        try:
            yield Runner(name, make(), say, latest=latest)
        except ImportError as error:
            say(f"{name} is not there: {error} (pip install 'env-client[record]')")
        except Exception as error:
            say(f"{name} is not there: {error}")


def _makers(
    config: SidecarConfig, say: Callable[[str], None]
) -> Iterator[tuple[str, Callable[[], Consumer], bool]]:
    """(name, how it is made, whether it only shows) of each consumer."""
    if config.panel is not None and config.panel_fd is not None and config.command_fd is not None:
        from env_client.panel.panel import Panel

        listening, commands = (socket.socket(fileno=fd) for fd in (config.panel_fd, config.command_fd))
        yield "The panel", partial(Panel, config.panel, listening, commands), True
    if config.log.enable:
        from env_client.record.inference_log import InferenceLog

        yield "The inference log", partial(InferenceLog, config.log.dir, say), False
    folder = RunFolder(config.record.dir)
    if config.record.enable:
        from env_client.record.evaluation import EvaluationRecord

        yield "The evaluation record", partial(EvaluationRecord, config.record, folder, say), False
    has_file = config.record.enable and config.record.rrd
    if config.rerun or has_file:
        from env_client.record.rerun_record import RerunRecord

        make = partial(RerunRecord, folder if has_file else None, live=config.rerun, say=say)
        yield "The Rerun record", make, False


if __name__ == "__main__":
    main()
