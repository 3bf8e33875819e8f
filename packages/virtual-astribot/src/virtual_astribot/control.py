"""Faults on demand: what a test does to a running stand-in."""

import socket
from collections.abc import Iterable
from typing import Any

from virtual_astribot.link import receive, send

__all__ = ["Control"]


class Control:
    """A connection to the robot that is no client of it."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port), 5.0)
        send(self._connection, {"hello": "control"})

    def take_rights(self) -> None:
        """Another program takes the control rights."""
        self._call("take_rights")

    def free_rights(self) -> None:
        """Whoever has the control rights gives them up."""
        self._call("free_rights")

    def give_back(self) -> None:
        """The newest client has the control rights again."""
        self._call("give_back")

    def silence(self, calls: Iterable[str] = ()) -> None:
        """These calls (position, desired, command, …) return None from now on."""
        self._call("silence", list(calls))

    def drop_cameras(self, names: Iterable[str] = ()) -> None:
        """These cameras send nothing from now on."""
        self._call("drop_cameras", list(names))

    def stall(self, seconds: float) -> None:
        """No call is answered for so long."""
        self._call("stall", seconds)

    def stop(self) -> None:
        """Somebody stops the robot: it refuses commands from now on."""
        self._call("stop")

    def position(self) -> dict[str, list[float]]:
        """Where the joints are, by part."""
        return dict(self._call("position"))

    def state(self) -> dict[str, bool]:
        """Whether it is stopped, and whether anybody has the rights."""
        return dict(self._call("state"))

    def heal(self) -> None:
        """No call is silent and no camera any more."""
        self.silence()
        self.drop_cameras()

    def close(self) -> None:
        self._connection.close()

    def _call(self, call: str, *arguments: Any) -> Any:
        send(self._connection, [call, arguments])
        reply = receive(self._connection)
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["result"]
