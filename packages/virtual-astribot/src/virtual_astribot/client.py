"""`Astribot`: the SDK's class, for a virtual robot in another process.

Signatures, defaults, blocking behaviour and return values are the SDK's, as far as they are publicly known. Where
the SDK logs and returns None (no control rights, stopped), so does this. `set_joints_position` returns None in every
case, as the SDK's does: whether a command was accepted shows in `get_desired_joints_position` only.

The robot is looked for at `$VIRTUAL_ASTRIBOT` (HOST:PORT).
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from virtual_astribot.body import CAMERAS, FREQ, PARTS
from virtual_astribot.link import receive, send

__all__ = ["Astribot"]

logger = logging.getLogger("astribot")

# How long the constructor waits for a robot, in seconds.
_ALIVE_S = 2.0

Names = list[str] | None
Values = Sequence[Sequence[float]]


class Astribot:
    """An Astribot S1. Raises `RuntimeError` when no robot answers, `ValueError` without ROBOT_TYPE=S1."""

    (
        chassis_name,
        torso_name,
        arm_left_name,
        effector_left_name,
        arm_right_name,
        effector_right_name,
        head_name,
    ) = (part.name for part in PARTS)
    whole_body_names: ClassVar[list[str]] = [part.name for part in PARTS]
    whole_body_dofs: ClassVar[list[int]] = [part.dof for part in PARTS]

    def __init__(
        self,
        freq: float = FREQ,
        ip: str | None = None,
        interface: str | None = None,
        high_control_rights: bool = False,
        node_name: str = "use_astribot",
    ) -> None:
        self._listening: list[socket.socket] = []
        if os.environ.get("ROBOT_TYPE") not in ("S0", "S1"):
            raise ValueError("Invalid robot type: set ROBOT_TYPE=S1")
        self.freq = freq
        self._lock = threading.Lock()
        self._images: dict[str, np.ndarray] = {}
        self._connection, first = self._open(high_control_rights)
        self.is_alive = True
        if not first["rights"]:
            # The SDK does ask on the keyboard here.
            answer = input(f"{node_name}: another program has the control rights. Take them? (y/n) ")
            if answer.strip().lower() != "y" or not self._call("claim", True):
                raise RuntimeError("no control rights")

    @staticmethod
    def _address() -> tuple[str, int]:
        host, _, port = os.environ.get("VIRTUAL_ASTRIBOT", "127.0.0.1:5600").rpartition(":")
        return host, int(port)

    def _open(self, high: bool) -> tuple[socket.socket, dict[str, Any]]:
        end = time.monotonic() + _ALIVE_S
        while True:
            try:
                connection = socket.create_connection(self._address(), _ALIVE_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(None)
                send(connection, {"hello": "client", "high": high})
                return connection, receive(connection)
            except OSError:
                if time.monotonic() >= end:
                    raise RuntimeError("No simulation or real robot is started.") from None
                time.sleep(0.1)

    def _call(self, call: str, *arguments: Any) -> Any:
        with self._lock:
            send(self._connection, [call, arguments])
            reply = receive(self._connection)
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["result"]

    def _commanded(self, result: Any, what: str) -> Any:
        if not result:
            logger.error("%s was refused: no control rights, stopped, or outside the limits", what)
        return result or None

    # -------------------------------------------------------------------------------------- information

    def get_control_rights_status(self) -> bool:
        return self._call("has_rights")

    def get_dof(self, names: Names = None) -> list[int]:
        dofs = dict(zip(self.whole_body_names, self.whole_body_dofs, strict=True))
        return [dofs[name] for name in self._names(names)]

    def get_joints_position_limit(self, names: Names = None) -> Any:
        limits = self._call("limits", self._names(names))
        return None if limits is None else tuple(limits)

    def get_joints_velocity_limit(self, names: Names = None) -> Any:
        return self._call("velocity_limit", self._names(names))

    def get_current_joints_position(self, names: Names = None) -> Any:
        return self._call("position", self._names(names))

    def get_desired_joints_position(self, names: Names = None) -> Any:
        return self._call("desired", self._names(names))

    def _names(self, names: Names) -> list[str]:
        return self.whole_body_names if names is None else list(names)

    # -------------------------------------------------------------------------------------------- motion

    def set_joints_position(
        self,
        names: list[str],
        position: Values,
        control_way: str = "filter",
        use_wbc: bool = False,
        add_default_torso: bool = True,
    ) -> None:
        names, values = self._with_torso(names, position, add_default_torso)
        self._commanded(
            self._call("command", "set_joints_position", names, values, control_way), "set_joints_position"
        )

    def move_joints_position(
        self,
        names: list[str],
        commands: Values,
        duration: float = 5.0,
        use_wbc: bool = False,
        add_default_torso: bool = True,
    ) -> str | None:
        return self.move_joints_waypoints(names, [commands], [duration], add_default_torso=add_default_torso)

    def move_joints_waypoints(
        self,
        names: list[str],
        waypoints: Sequence[Values],
        time_list: Sequence[float],
        use_wbc: bool = False,
        joy_controller: bool = False,
        add_default_torso: bool = True,
    ) -> str | None:
        points = [self._with_torso(names, point, add_default_torso) for point in waypoints]
        result = self._call("move", points[0][0], [values for _, values in points], list(time_list))
        return self._commanded(result, "move_joints_waypoints")

    def move_to_home(self, duration: float = -1.0, use_wbc: bool = False) -> str | None:
        return self._commanded(self._call("home", duration if duration > 0 else 5.0), "move_to_home")

    def open_effector(self, names: Names = None, duration: float = 1.0) -> str | None:
        return self._effectors(names, 0.0, duration)

    def close_effector(self, names: Names = None, duration: float = 1.0) -> str | None:
        return self._effectors(names, 100.0, duration)

    def _effectors(self, names: Names, value: float, duration: float) -> str | None:
        both = [self.effector_left_name, self.effector_right_name]
        names = both if names is None else list(names)
        if not set(names) <= set(both):
            raise ValueError("Invalid effector name.")
        return self.move_joints_position(names, [[value]] * len(names), duration, add_default_torso=False)

    def stop_robot(self) -> str | None:
        return self._call("stop")

    def restart_robot(self) -> str | None:
        return self._call("restart")

    def set_filter_parameters(self, filter_scale: float, gripper_filter_scale: float) -> None:
        self._call("set_filter", filter_scale, gripper_filter_scale)

    def _with_torso(self, names: list[str], values: Values, add: bool) -> tuple[list[str], list[list[float]]]:
        names, plain = list(names), [[float(value) for value in part] for part in values]
        if add and self.torso_name not in names:
            # The trap: arms alone move the torso to its home pose as well.
            torso = next(part for part in PARTS if part.name == self.torso_name)
            names.append(torso.name)
            plain.append(list(torso.home))
        return names, plain

    # ------------------------------------------------------------------------------------------- cameras

    def activate_camera(self, cameras_setting: dict[str, Any] | None = None) -> bool:
        return self._call("activate", True)

    def deactivate_camera(self) -> bool:
        return self._call("activate", False)

    def register_image_callback(
        self, camera_name: str, image_type: str, callback: Callable[..., Any], need_decode: bool
    ) -> bool:
        """`callback(topic_name, message, width, height, array)`; `array` is BGR when `need_decode`, else None."""
        camera = next((camera for camera in CAMERAS if camera.name == camera_name), None)
        if camera is None or image_type != "color":
            return False

        def deliver(message: SimpleNamespace) -> None:
            array = _decode(message.data) if need_decode else None
            callback(camera.topic, message, camera.width, camera.height, array)

        self._listen(camera_name, deliver)
        return True

    def get_images_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any], float]:
        """(colour images as BGR arrays, depth, infrared, time): the newest ones."""
        if not self._images:
            for camera in CAMERAS:
                self._images[camera.name] = np.zeros((0, 0, 3), np.uint8)

                def keep(
                    message: SimpleNamespace, name: str = camera.name, images: dict = self._images
                ) -> None:
                    images[name] = _decode(message.data)

                self._listen(camera.name, keep)
        newest = {name: image for name, image in self._images.items() if image.size}
        return newest, {}, {}, time.time()

    def _listen(self, camera: str, deliver: Callable[[SimpleNamespace], None]) -> None:
        connection = socket.create_connection(self._address(), _ALIVE_S)
        connection.settimeout(None)
        send(connection, {"hello": "pictures", "camera": camera})

        self._listening.append(connection)

        # The thread holds nothing of this object, which would otherwise live as long as the robot.
        def run() -> None:
            try:
                while True:
                    frame = receive(connection)
                    header = SimpleNamespace(stamp=frame["stamp"])
                    deliver(
                        SimpleNamespace(
                            header=header, format="bgr8; jpeg compressed bgr8", data=frame["data"]
                        )
                    )
            except OSError:
                pass  # the robot is gone, or this object

        threading.Thread(target=run, name=f"sdk-{camera}", daemon=True).start()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        for connection in self._listening:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if hasattr(self, "_connection"):
            self._connection.close()


def _decode(data: bytes) -> np.ndarray:
    import cv2

    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
