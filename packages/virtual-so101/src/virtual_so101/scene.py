"""The MuJoCo scene: one or two SO-101 arms at a table, cubes, mats, lamps and cameras.

The arm is the model that ``so101-nexus`` carries, composed at run time: its links, masses and joint limits as
they are, its printed parts drawn with few triangles (`meshes`), its jaws given flat rubber pads, its
servos slowed down to what an STS3215 with LeRobot's gains does. Collision shapes are primitives only.

World frame: x forward (away from the arm), y to the left, z up, metres; the table top is z = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np

from virtual_so101.calibration import JOINTS
from virtual_so101.meshes import model_path, simplified_mesh

__all__ = [
    "ARM_PREFIXES",
    "CUBE_EDGE",
    "HEIGHT",
    "STALL_TORQUE",
    "TIMESTEP",
    "WIDTH",
    "Cube",
    "Layout",
    "Mat",
    "build",
    "look_at",
]

WIDTH, HEIGHT = 640, 480
# Seconds; a thirtieth of a second is a whole number of steps.
TIMESTEP = 1.0 / 600.0
# Edge of a cube, metres.
CUBE_EDGE = 0.03
# Wood of 0.7 g/cm³, kg.
_CUBE_MASS = 0.019
# N m at 12 V (the model's force range).
STALL_TORQUE = 2.94
# LeRobot halves the gripper's torque limit; with the jaw's lever that is still 15 N.
_GRIPPER_TORQUE = 1.2
# Position gain (N m/rad) and velocity gain (N m s/rad): about 25 ms of lag, 0.2 degrees of droop under gravity.
_KP, _KV = 200.0, 4.0
# Vertical angle of view of the wrist camera, degrees: the small wide modules that people mount there.
_WRIST_FOVY = 60.0
# Grid of the vertex clustering, metres.
_MESH_CELL = 0.003
ARM_PREFIXES = {1: ("arm_",), 2: ("left_", "right_")}
# MuJoCo bit masks: the table and cubes collide with everything, arms with the table, the cubes and each other.
_WORLD_BIT, _ARM_BITS = 1, (2, 4)
# The model's jaw primitives that stay beside our pads: the palm and the moving jaw's root.
_KEPT_JAW_SHAPES = ("fixed_jaw_box1", "fixed_jaw_box2", "moving_jaw_box1")


@dataclass(frozen=True)
class Cube:
    """One cube: the name of its body and its colour (red, green, blue in 0..1)."""

    name: str
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Mat:
    """A coloured sheet on the table, drawn and without contacts: centre (x, y) and half edges, metres."""

    name: str
    center: tuple[float, float]
    half: tuple[float, float]
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """What stands where: everything about a scene that the seed does not change."""

    # Position (x, y) in metres and yaw in rad of each arm's base; one or two.
    bases: tuple[tuple[float, float, float], ...]
    cubes: tuple[Cube, ...]
    mats: tuple[Mat, ...] = ()
    # Front camera: where it stands and what it looks at, metres.
    front_eye: tuple[float, float, float] = (0.53, 0.0, 0.38)
    front_target: tuple[float, float, float] = (0.14, 0.0, 0.07)
    # Vertical angle of view, degrees: 570 pixels of focal length at 480 rows.
    front_fovy: float = math.degrees(2.0 * math.atan(240.0 / 570.0))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of each arm's parts begin with."""
        return ARM_PREFIXES[len(self.bases)]


def build(layout: Layout) -> mujoco.MjModel:
    """Compose and compile the scene of a layout."""
    spec = mujoco.MjSpec()
    spec.modelname = "virtual_so101"
    _set_options(spec)
    visual = spec.visual
    visual.global_.offwidth, visual.global_.offheight = WIDTH, HEIGHT
    visual.quality.offsamples = 0
    visual.map.znear, visual.map.zfar = 0.01, 20.0
    visual.headlight.active = 1
    spec.stat.extent = 1.0
    spec.stat.center = [0.2, 0.0, 0.1]
    _add_room(spec, layout)
    for index, (prefix, (x, y, yaw)) in enumerate(zip(layout.prefixes, layout.bases, strict=True)):
        arm = _arm_spec(_ARM_BITS[index], wrist_camera="wrist")
        quat = [math.cos(yaw / 2.0), 0.0, 0.0, math.sin(yaw / 2.0)]
        frame = spec.worldbody.add_frame(pos=[x, y, 0.0], quat=quat)
        spec.attach(arm, frame=frame, prefix=prefix)
    for cube in layout.cubes:
        _add_cube(spec, cube)
    return spec.compile()


def look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Orientation (w, x, y, z) of a MuJoCo camera at `eye` that looks at `target`, its image upright."""
    back = np.asarray(eye, dtype=float) - np.asarray(target, dtype=float)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    matrix = np.stack([right, np.cross(back, right), back], axis=1)
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, matrix.reshape(-1))
    return quat


def _set_options(spec: mujoco.MjSpec) -> None:
    option = spec.option
    option.timestep = TIMESTEP
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    option.impratio = 10.0
    option.iterations, option.ls_iterations = 30, 20
    # Pads push with several contacts on one face; the second pass takes the slow slip out of a grasp.
    option.noslip_iterations = 3


def _add_room(spec: mujoco.MjSpec, layout: Layout) -> None:
    texture = mujoco.mjtTexture
    spec.add_texture(
        name="sky",
        type=texture.mjTEXTURE_SKYBOX,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=[0.82, 0.84, 0.86],
        rgb2=[0.55, 0.58, 0.62],
        width=64,
        height=384,
    )
    world = spec.worldbody
    world.add_light(
        name="lamp",
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        pos=[0.3, 0.3, 1.5],
        dir=[-0.2, -0.25, -1.0],
        castshadow=False,
    )
    world.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=[0.15, 0.0, -0.02],
        size=[0.55, 0.7, 0.02],
        rgba=[0.70, 0.66, 0.60, 1.0],
        contype=_WORLD_BIT,
        conaffinity=_WORLD_BIT | sum(_ARM_BITS),
        friction=[0.8, 0.005, 0.0002],
        condim=4,
    )
    for mat in layout.mats:
        world.add_geom(
            name=mat.name,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[*mat.center, 0.0004],
            size=[*mat.half, 0.0004],
            rgba=[*mat.rgb, 1.0],
            contype=0,
            conaffinity=0,
        )
    eye, target = np.array(layout.front_eye), np.array(layout.front_target)
    world.add_camera(name="front", pos=eye, quat=look_at(eye, target), fovy=layout.front_fovy)


def _add_cube(spec: mujoco.MjSpec, cube: Cube) -> None:
    body = spec.worldbody.add_body(name=cube.name, pos=[0.2, 0.0, CUBE_EDGE / 2.0])
    body.add_freejoint()
    body.add_geom(
        name=cube.name,
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[CUBE_EDGE / 2.0] * 3,
        mass=_CUBE_MASS,
        rgba=[*cube.rgb, 1.0],
        contype=_WORLD_BIT,
        conaffinity=_WORLD_BIT | sum(_ARM_BITS),
        friction=[0.9, 0.01, 0.0005],
        condim=4,
    )


def _arm_spec(bit: int, wrist_camera: str) -> mujoco.MjSpec:
    """One arm, ready to be attached: light meshes, primitive contacts, slowed servos."""
    path = model_path()
    arm = mujoco.MjSpec.from_file(str(path))
    _set_options(arm)
    for key in list(arm.keys):
        arm.delete(key)
    drawn = set()
    for geom in list(arm.geoms):
        if geom.type == mujoco.mjtGeom.mjGEOM_MESH:
            if "collision" in geom.classname.name:
                arm.delete(geom)
                continue
            drawn.add(geom.meshname)
            geom.contype = geom.conaffinity = 0
            geom.group = 2
        elif geom.name.startswith(("fixed_jaw_", "moving_jaw_")) and geom.name not in _KEPT_JAW_SHAPES:
            arm.delete(geom)
        else:
            geom.contype, geom.conaffinity, geom.group = bit, _WORLD_BIT | (sum(_ARM_BITS) - bit), 3
    for mesh in list(arm.meshes):
        file = path.parent / "assets" / mesh.file
        if (mesh.name or file.stem) not in drawn:
            arm.delete(mesh)
            continue
        vertices, faces = simplified_mesh(file, _MESH_CELL)
        mesh.name = mesh.name or file.stem
        mesh.file = ""
        mesh.uservert, mesh.userface = vertices.reshape(-1), faces.reshape(-1)
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
    _add_pads(arm, bit)
    for camera in list(arm.cameras):
        camera.name = wrist_camera
        camera.fovy = _WRIST_FOVY
    for actuator in arm.actuators:
        torque = _GRIPPER_TORQUE if actuator.name == "gripper" else STALL_TORQUE
        actuator.set_to_position(kp=_KP, kv=_KV)
        actuator.forcerange = [-torque, torque]
    if tuple(actuator.name for actuator in arm.actuators) != JOINTS:
        raise ValueError(f"the model of so101-nexus has other actuators than {JOINTS}")
    return arm


def _add_pads(arm: mujoco.MjSpec, bit: int) -> None:
    """Flat rubber pads inside both jaws: four-cornered contact that holds a cube without turning it.

    The printed jaws leave 30 mm between them at a gripper angle of 0.175 rad above the model's zero; the
    moving pad is mounted so that both pads are parallel there.
    """
    tilt = [math.cos(0.0875), 0.0, 0.0, -math.sin(0.0875)]
    pads = (
        ("gripper", "fixed_pad", [-0.0105, 0.0, -0.0885], [0.0025, 0.009, 0.0150], [1.0, 0.0, 0.0, 0.0]),
        ("moving_jaw_so101_v1", "moving_pad", [-0.0071, -0.0649, 0.0188], [0.0025, 0.0150, 0.009], tilt),
    )
    for body, name, pos, size, quat in pads:
        arm.body(body).add_geom(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=pos,
            size=size,
            quat=quat,
            mass=0.0,
            contype=bit,
            conaffinity=_WORLD_BIT | (sum(_ARM_BITS) - bit),
            friction=[1.5, 0.02, 0.001],
            condim=4,
            priority=1,
            solref=[0.01, 1.0],
            solimp=[0.9, 0.98, 0.002, 0.5, 2.0],
            group=3,
        )
