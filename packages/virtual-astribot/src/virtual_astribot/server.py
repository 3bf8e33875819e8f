"""The robot as a process: one thread for each connection, which is a client's calls or its pictures.

Life cycle: `RobotServer(robot).start()`, `close()`. The first message of a connection says what it is:
{"hello": "client", "high": bool}, {"hello": "pictures", "camera": name} or {"hello": "control"}. A client's rights end
with its connection. Error policy: a call that raises is answered with the error and the connection goes on.
"""

import itertools
import socket
import socketserver
import threading
import time
from typing import Any

from virtual_astribot.body import CAMERAS, PARTS
from virtual_astribot.cameras import FPS, film
from virtual_astribot.link import receive, send
from virtual_astribot.robot import Robot

__all__ = ["RobotServer"]

# A robot that answered nobody for longer would not be a stall but a broken one, in seconds.
_LOOK = 0.005


class RobotServer:
    """Serves one robot on this machine; `port` is known at once."""

    def __init__(self, robot: Robot, port: int = 0) -> None:
        self.robot = robot
        self.active = False
        self._numbers = itertools.count(1)
        self._last_client = 0
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer._handle(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, name="virtual-astribot", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            hello = receive(connection)
            match hello["hello"]:
                case "client":
                    self._client(connection, bool(hello["high"]))
                case "pictures":
                    self._pictures(connection, hello["camera"])
                case "control":
                    self._answer(connection, self._control)
        except (ConnectionError, OSError):
            pass  # clients come and go

    def _client(self, connection: socket.socket, high: bool) -> None:
        number = self._last_client = next(self._numbers)
        send(connection, {"rights": self.robot.claim(number, high)})
        try:
            self._answer(connection, lambda call, arguments: self._call(number, call, arguments))
        finally:
            self.robot.release(number)

    def _answer(self, connection: socket.socket, act: Any) -> None:
        while True:
            call, arguments = receive(connection)
            try:
                reply = {"result": act(call, arguments)}
            except (ValueError, TypeError, KeyError) as error:
                reply = {"error": str(error)}
            send(connection, reply)

    def _call(self, number: int, call: str, arguments: list[Any]) -> Any:
        robot = self.robot
        while time.monotonic() < robot.stalled_until:
            time.sleep(_LOOK)
        if call in robot.silent_calls:
            return None
        match call:
            case "position" | "desired" | "velocity_limit":
                return robot.read(call, *arguments)
            case "limits":
                return robot.limits(*arguments)
            case "has_rights":
                return robot.holder == number
            case "claim":
                return robot.claim(number, *arguments)
            case "command":
                return robot.command(number, *arguments)
            case "move":
                return robot.move(number, *arguments)
            case "home":
                return robot.move(
                    number, [p.name for p in PARTS[1:]], [[p.home for p in PARTS[1:]]], arguments
                )
            case "stop":
                return robot.stop(number)
            case "restart":
                return robot.restart(number)
            case "set_filter":
                return robot.set_filter(number, *arguments)
            case "activate":
                self.active = bool(arguments[0])
                return True
        raise ValueError(f"no call {call!r}")

    def _control(self, call: str, arguments: list[Any]) -> Any:
        """The switches of `virtual_astribot.control.Control`."""
        robot = self.robot
        match call:
            case "take_rights":
                return robot.claim(next(self._numbers), True)
            case "free_rights":
                robot.holder = None
            case "give_back":
                robot.holder = self._last_client
            case "silence":
                robot.silent_calls = set(arguments[0])
            case "drop_cameras":
                robot.silent_cameras = set(arguments[0])
            case "stall":
                robot.stalled_until = time.monotonic() + arguments[0]
            case "stop":
                robot.stopped = True
            case "position":
                return dict(
                    zip((p.name for p in PARTS), robot.read("position", [p.name for p in PARTS]), strict=True)
                )
            case "state":
                return {"stopped": robot.stopped, "held": robot.holder is not None}
            case _:
                raise ValueError(f"no switch {call!r}")
        return None

    def _pictures(self, connection: socket.socket, camera: str) -> None:
        frames = film(next(each for each in CAMERAS if each.name == camera))
        begun, number = time.monotonic(), 0
        while True:
            number += 1
            time.sleep(max(0.0, begun + number / FPS - time.monotonic()))
            if self.active and camera not in self.robot.silent_cameras:
                send(connection, {"stamp": time.time(), "data": frames[number % len(frames)]})
