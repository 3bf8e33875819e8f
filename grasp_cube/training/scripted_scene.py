"""Pictures of the scripted arm: boxes, a table and their shadows, through a pinhole camera, with OpenCV."""

from dataclasses import dataclass, field
from typing import Final

import cv2
import numpy as np

from grasp_cube.training.scripted_motion import CUBE_SIZE, GripperPose, arm_points, gripper_pose, jaw_angle

__all__ = ["Camera", "Looks", "draw_scene", "front_camera", "wrist_camera"]

# Focal length over image width: 570 pixels at 640, as real SO-101 recordings have.
_FOCAL: Final = 570 / 640
_NEAR: Final = 0.01
_LIGHT: Final = np.array([-0.35, -0.30, 0.89])
_WHITE: Final = (228, 226, 220)
_ORANGE: Final = (238, 150, 40)
_DARK: Final = (52, 54, 60)


@dataclass(frozen=True)
class Looks:
    """The colours of one episode (RGB): they differ a little from episode to episode."""

    cube: tuple[float, float, float] = (205, 35, 30)
    table: tuple[float, float, float] = (186, 160, 128)
    wall: tuple[float, float, float] = (176, 184, 190)
    brightness: float = 1.0

    @staticmethod
    def random(rng: np.random.Generator) -> "Looks":
        """Colours near the usual ones."""

        def near(colour: tuple[float, float, float], spread: float) -> tuple[float, float, float]:
            r, g, b = np.clip(np.array(colour) + rng.uniform(-spread, spread, 3), 0, 255)
            return float(r), float(g), float(b)

        base = Looks()
        return Looks(
            near(base.cube, 12), near(base.table, 8), near(base.wall, 8), float(rng.uniform(0.93, 1.07))
        )


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: `position` (3,) and `rotation` (3, 3), whose rows are right, down and forward."""

    position: np.ndarray
    rotation: np.ndarray
    height: int
    width: int

    def see(self, points: np.ndarray) -> np.ndarray:
        """World points (n, 3) in the camera's frame: right, down, forward, in metres."""
        return (points - self.position) @ self.rotation.T

    def pixels(self, seen: np.ndarray) -> np.ndarray:
        """Pixel coordinates (n, 2) of points (n, 3) in the camera's frame, all in front of it."""
        focal = _FOCAL * self.width
        return seen[:, :2] / seen[:, 2:] * focal + [self.width / 2, self.height / 2]


def front_camera(height: int, width: int) -> Camera:
    """The camera on a stand before the robot, looking back at it and at the table between."""
    return _look(np.array([0.56, -0.24, 0.36]), np.array([0.16, 0.01, 0.10]), [0, 0, 1], height, width)


def wrist_camera(gripper: GripperPose, height: int, width: int) -> Camera:
    """The camera beside the hand, looking along the jaws to the tip: they open to the picture's left and right."""
    forward, side, opening = gripper.rotation.T
    position = gripper.tip - 0.125 * forward - 0.065 * side + 0.010 * opening
    return _look(position, gripper.tip + 0.02 * forward + 0.012 * opening, -side, height, width)


def draw_scene(camera: Camera, state: np.ndarray, cube: np.ndarray, looks: Looks) -> np.ndarray:
    """The (H, W, 3) uint8 RGB picture of a normalised (6,) state and a cube's (4, 4) pose."""
    picture = _Picture(camera, looks)
    boxes = [*_arm_boxes(state), _Box(cube[:3, 3], cube[:3, :3], np.full(3, CUBE_SIZE / 2), looks.cube)]
    picture.table()
    picture.shadows(boxes)
    picture.boxes(boxes)
    return picture.image


def _look(position: np.ndarray, target: np.ndarray, up: object, height: int, width: int) -> Camera:
    forward = target - position
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, np.asarray(up, float))
    right /= np.linalg.norm(right)
    return Camera(position, np.stack([right, np.cross(forward, right), forward]), height, width)


# The six faces of a box: the axis of the outward normal, its sign, and the corners in order around the face.
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
_FACES = [
    (0, -1, [0, 1, 3, 2]),
    (0, 1, [4, 6, 7, 5]),
    (1, -1, [0, 4, 5, 1]),
    (1, 1, [2, 3, 7, 6]),
    (2, -1, [0, 2, 6, 4]),
    (2, 1, [1, 5, 7, 3]),
]


@dataclass(frozen=True)
class _Box:
    """A box: centre (3,), rotation (3, 3) with its axes as columns, half sizes (3,), RGB colour."""

    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray
    colour: tuple[float, float, float]
    corners: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "corners", self.centre + (_CORNERS * self.half) @ self.rotation.T)


def _arm_boxes(state: np.ndarray) -> list[_Box]:
    shoulder, elbow, wrist, hand, tip = arm_points(state)
    gripper = gripper_pose(state)
    forward, side, opening = gripper.rotation.T
    pan_side = np.cross([0.0, 0.0, 1.0], _unit((wrist - elbow) * [1, 1, 0] + (hand - wrist) * [1, 1, 0]))
    angle = jaw_angle(float(state[5]))
    swung = np.cos(angle) * forward + np.sin(angle) * opening
    hinge = tip - 0.085 * forward - 0.006 * opening
    return [
        _Box(np.array([0.02, 0, 0.03]), np.eye(3), np.array([0.055, 0.042, 0.03]), _WHITE),
        _Box(np.array([0.039, 0, 0.082]), np.eye(3), np.array([0.028, 0.028, 0.024]), _DARK),
        _link(shoulder - np.array([0, 0, 0.012]), elbow, pan_side, 0.021, _WHITE),
        _link(elbow, wrist, pan_side, 0.018, _ORANGE),
        _cap(elbow, pan_side, 0.023),
        _cap(shoulder, pan_side, 0.026),
        _link(wrist, hand, pan_side, 0.019, _WHITE),
        _cap(wrist, pan_side, 0.021),
        _link(hand, tip - 0.075 * forward, side, 0.024, _DARK),
        _link(
            tip - 0.085 * forward - 0.018 * opening,
            tip + 0.008 * forward - 0.0215 * opening,
            side,
            0.007,
            _WHITE,
        ),
        _link(hinge, hinge + 0.088 * swung, side, 0.007, _ORANGE),
    ]


def _link(start: np.ndarray, end: np.ndarray, side: np.ndarray, half: float, colour: tuple) -> _Box:
    along = end - start
    length = float(np.linalg.norm(along))
    x = along / length
    z = _unit(np.cross(x, side))
    rotation = np.stack([x, np.cross(z, x), z], axis=1)
    return _Box((start + end) / 2, rotation, np.array([length / 2, half, half * 0.8]), colour)


def _cap(centre: np.ndarray, side: np.ndarray, half: float) -> _Box:
    x = _unit(np.cross(side, [0.3, 0.2, 1.0]))
    return _Box(centre, np.stack([x, side, np.cross(x, side)], axis=1), np.full(3, half), _DARK)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


class _Picture:
    """Paints from far to near onto one image."""

    def __init__(self, camera: Camera, looks: Looks) -> None:
        self._camera = camera
        self._looks = looks
        shade = np.linspace(1.06, 0.90, camera.height)[:, None, None]
        wall = np.clip(np.array(looks.wall) * shade * looks.brightness, 0, 255)
        self.image = np.repeat(wall, camera.width, axis=1).astype(np.uint8)

    def table(self) -> None:
        """Planks from behind the robot to the camera, with darker joints between them."""
        for plank in range(9):
            y0 = -0.72 + 0.16 * plank
            tone = 1.0 + 0.035 * ((plank * 5) % 3 - 1)
            colour = tuple(c * tone for c in self._looks.table)
            self._fill(_rectangle(-0.45, 0.95, y0, y0 + 0.157), colour)
            self._fill(_rectangle(-0.45, 0.95, y0 + 0.157, y0 + 0.16), tuple(c * 0.72 for c in colour))

    def shadows(self, boxes: list[_Box]) -> None:
        """What the light casts on the table, painted once however often it overlaps."""
        mask = np.zeros(self.image.shape[:2], np.uint8)
        for box in boxes:
            ground = box.corners - box.corners[:, 2:] / _LIGHT[2] * _LIGHT
            hull = cv2.convexHull(ground[:, :2].astype(np.float32))[:, 0]
            outline = self._outline(np.column_stack([hull, np.zeros(len(hull))]))
            if outline is not None:
                cv2.fillConvexPoly(mask, outline, 255, cv2.LINE_AA, 4)
        x, y, w, h = cv2.boundingRect(mask)
        area = self.image[y : y + h, x : x + w]
        area[:] = area * (1.0 - 0.35 / 255.0 * mask[y : y + h, x : x + w, None].astype(np.float32))

    def boxes(self, boxes: list[_Box]) -> None:
        """The boxes' visible faces, the farthest box first."""
        eye = self._camera.position
        for box in sorted(boxes, key=lambda box: -float(np.linalg.norm(box.centre - eye))):
            for axis, sign, order in _FACES:
                normal = sign * box.rotation[:, axis]
                face = box.corners[order]
                if normal @ (face.mean(axis=0) - eye) < 0:
                    light = 0.62 + 0.38 * max(0.0, float(normal @ _LIGHT))
                    self._fill(face, tuple(c * light for c in box.colour))

    def _fill(self, points: np.ndarray, colour: tuple) -> None:
        outline = self._outline(points)
        if outline is not None:
            tone = tuple(float(np.clip(c * self._looks.brightness, 0, 255)) for c in colour)
            cv2.fillConvexPoly(self.image, outline, tone, cv2.LINE_AA, 4)

    def _outline(self, points: np.ndarray) -> np.ndarray | None:
        """A convex polygon's pixels in OpenCV's fixed point (1/16), cut at the near plane; None if behind."""
        seen = self._camera.see(points)
        kept = []
        for a, b in zip(seen, np.roll(seen, -1, axis=0), strict=True):
            if a[2] >= _NEAR:
                kept.append(a)
            if (a[2] >= _NEAR) != (b[2] >= _NEAR):
                kept.append(a + (b - a) * (_NEAR - a[2]) / (b[2] - a[2]))
        if len(kept) < 3:
            return None
        pixels = self._camera.pixels(np.array(kept))
        return np.round(np.clip(pixels, -20000, 20000) * 16).astype(np.int32)


def _rectangle(x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0, 0], [x1, y0, 0], [x1, y1, 0], [x0, y1, 0]], float)
