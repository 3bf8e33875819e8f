"""The physical world of the virtual SO-101: arms, cubes, cameras, time.

Life cycle: `World(task)` builds the scene and resets it to `seed`; `step` advances simulated time and nothing
else does. The same seed and the same calls give bit-identical states. One thread steps and commands, one
thread (the same or another) renders: `render` copies the state under the lock and draws without it. The OpenGL
context belongs to the thread that rendered first.

Angles are rad with zero at the middle of each joint's range, in the order of `calibration.JOINTS`.
"""

from __future__ import annotations

import math
import threading

import mujoco
import numpy as np

from virtual_so101.calibration import JOINTS, ArmCalibration
from virtual_so101.looks import Looks
from virtual_so101.rendering import SceneRenderer
from virtual_so101.scene import CUBE_EDGE, STALL_TORQUE, TIMESTEP, build
from virtual_so101.tasks import Task, get_task

__all__ = ["MAX_SPEED", "World"]

# An STS3215 at 12 V turns 45 rpm without load, rad/s, and takes about a tenth of a second to get there, rad/s².
MAX_SPEED, _MAX_ACCELERATION = 4.7, 45.0
# Time constant with which the servo's own loop closes in on a goal, seconds.
_LAG = 0.05
# The arm sags into its servos before the clock starts, seconds.
_SETTLE = 0.2


class World:
    """One table with one or two arms, stepped by its owner.

    Attributes:
        task: what is to be done, with its scene and success test.
        n_arms: 1 or 2; arm 0 is the left or only one, 1 the right one.
        camera_names: ("front", "wrist") or ("front", "left_wrist", "right_wrist").
        joint_lower, joint_upper: (6,) mechanical limits, rad, the same for every arm.
        calibrations: each arm's, as LeRobot's driver has it.
        seed: the seed of the running episode.
    """

    def __init__(
        self,
        task: str = "lift",
        arms: int | None = None,
        *,
        seed: int = 0,
        randomize: bool = True,
        shrink: int = 1,
    ) -> None:
        self.task: Task = get_task(task, arms)
        self.n_arms = self.task.arms
        self.camera_names = self.task.camera_names
        self.model = build(self.task.layout)
        self.data = mujoco.MjData(self.model)
        self.timestep = TIMESTEP
        self.randomize = randomize
        self._lock = threading.RLock()
        self._looks = Looks.of(self.model, self.task.layout)
        self._renderer = SceneRenderer(self.model, shrink=shrink)
        self._index_joints()
        # Goal of each servo and the moving set-point behind it, model angles, (n_arms * 6,).
        self._goal = np.zeros(6 * self.n_arms)
        self._setpoint = np.zeros(6 * self.n_arms)
        self._speed = np.zeros(6 * self.n_arms)
        self._torque = np.ones(6 * self.n_arms, dtype=bool)
        self._owed = 0.0
        self._steps = 0
        self._held_steps = 0
        self._succeeded = False
        self.seed = seed
        self.reset(seed)

    def _index_joints(self) -> None:
        model = self.model
        names = [prefix + joint for prefix in self.task.layout.prefixes for joint in JOINTS]
        joints = np.array([model.joint(name).id for name in names])
        self._qpos, self._dof = model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self._actuators = np.array([model.actuator(name).id for name in names])
        self._lower, self._upper = model.jnt_range[joints].T.copy()
        self._middle = (self._lower + self._upper) / 2.0
        self.joint_lower = (self._lower - self._middle)[:6]
        self.joint_upper = (self._upper - self._middle)[:6]
        self.calibrations = tuple(
            ArmCalibration.of_limits(self.joint_lower, self.joint_upper, arm) for arm in range(self.n_arms)
        )
        self._gain = model.actuator_gainprm[self._actuators].copy()
        self._bias = model.actuator_biasprm[self._actuators].copy()
        self._cubes = {cube.name: model.body(cube.name).id for cube in self.task.layout.cubes}
        self._cube_joints = {name: int(model.body_jntadr[body]) for name, body in self._cubes.items()}
        roots = {model.body(prefix + "base").id for prefix in self.task.layout.prefixes}
        self._arm_geoms = np.isin(model.body_rootid[model.geom_bodyid], list(roots))

    # Time

    @property
    def time(self) -> float:
        """Simulated seconds since the reset."""
        return self._steps * TIMESTEP

    def reset(self, seed: int | None = None) -> None:
        """Start the episode of a seed; without one, that of the next seed after the current."""
        with self._lock:
            self.seed = self.seed + 1 if seed is None else int(seed)
            # Two streams: what is drawn about the look never moves a cube.
            where, look = (np.random.default_rng(s) for s in np.random.SeedSequence(self.seed).spawn(2))
            mujoco.mj_resetData(self.model, self.data)
            self._looks.apply(self.model, look if self.randomize else None)
            for name, (x, y, yaw) in self.task.place(where).items():
                address = self.model.jnt_qposadr[self._cube_joints[name]]
                quat = [math.cos(yaw / 2.0), 0.0, 0.0, math.sin(yaw / 2.0)]
                self.data.qpos[address : address + 7] = [x, y, CUBE_EDGE / 2.0, *quat]
            start = np.concatenate(self.task.start_poses) + self._middle
            self.data.qpos[self._qpos] = start
            self._goal[:] = self._setpoint[:] = start
            self._speed[:] = 0.0
            for arm in range(self.n_arms):
                self.set_torque(arm, np.ones(6, dtype=bool))
            mujoco.mj_forward(self.model, self.data)
            for _ in range(round(_SETTLE / TIMESTEP)):
                self._substep()
            self._owed = 0.0
            self._steps = self._held_steps = 0
            self._succeeded = False

    def step(self, dt: float) -> None:
        """Advance by `dt` seconds; what does not fill a whole time step is owed to the next call."""
        with self._lock:
            self._owed += dt
            count = math.floor(self._owed / TIMESTEP + 1e-6)
            self._owed -= count * TIMESTEP
            for _ in range(count):
                self._substep()
                self._steps += 1
                # Ten times a tick of the robot is far finer than any success test needs: test every fifth.
                if self._steps % 5 == 0:
                    self._judge()

    def _substep(self) -> None:
        # A servo closes in on its goal exponentially, within its speed and its acceleration.
        wanted = np.clip((self._goal - self._setpoint) / _LAG, -MAX_SPEED, MAX_SPEED)
        change = _MAX_ACCELERATION * TIMESTEP
        self._speed += np.clip(wanted - self._speed, -change, change)
        self._setpoint += self._speed * TIMESTEP
        if not self._torque.all():
            limp = ~self._torque
            self._setpoint[limp], self._speed[limp] = self.data.qpos[self._qpos[limp]], 0.0
        self.data.ctrl[self._actuators] = self._setpoint
        mujoco.mj_step(self.model, self.data)

    def _judge(self) -> None:
        self._held_steps = self._held_steps + 5 if self.task.condition(self) else 0
        if self._held_steps * TIMESTEP >= self.task.hold - 1e-9:
            self._succeeded = True

    def success(self) -> bool:
        """Whether the task's condition has held for long enough at some time of this episode."""
        with self._lock:
            return self._succeeded

    # Servos

    def _slice(self, arm: int) -> slice:
        if not 0 <= arm < self.n_arms:
            raise IndexError(f"There is no arm {arm}: this world has {self.n_arms}, counted from 0.")
        return slice(6 * arm, 6 * arm + 6)

    def set_goal(self, arm: int, positions: np.ndarray) -> None:
        """Give one arm's servos new goals, (6,) rad; cut to the joint limits.

        Raises:
            ValueError: when the goals are not six finite numbers.
        """
        values = np.asarray(positions, dtype=float)
        if values.shape != (6,) or not np.all(np.isfinite(values)):
            raise ValueError(f"A goal is six finite angles in rad; got {values!r}.")
        part = self._slice(arm)
        with self._lock:
            self._goal[part] = np.clip(values + self._middle[part], self._lower[part], self._upper[part])

    def goal(self, arm: int) -> np.ndarray:
        """(6,) rad, the goals that one arm's servos have."""
        part = self._slice(arm)
        with self._lock:
            return self._goal[part] - self._middle[part]

    def set_torque(self, arm: int, enabled: np.ndarray) -> None:
        """Switch the torque of one arm's servos, (6,) bool; a servo switched on holds where it is."""
        part = self._slice(arm)
        with self._lock:
            wanted = np.asarray(enabled, dtype=bool)
            risen = wanted & ~self._torque[part]
            self._torque[part] = wanted
            here = self.data.qpos[self._qpos[part]]
            self._goal[part] = np.where(risen, here, self._goal[part])
            self._setpoint[part] = np.where(risen, here, self._setpoint[part])
            ids = self._actuators[part]
            self.model.actuator_gainprm[ids] = self._gain[part] * wanted[:, None]
            self.model.actuator_biasprm[ids] = self._bias[part] * wanted[:, None]

    def positions(self, arm: int) -> np.ndarray:
        """(6,) joint angles, rad."""
        part = self._slice(arm)
        with self._lock:
            return self.data.qpos[self._qpos[part]] - self._middle[part]

    def velocities(self, arm: int) -> np.ndarray:
        """(6,) joint speeds, rad/s."""
        with self._lock:
            return self.data.qvel[self._dof[self._slice(arm)]].copy()

    def loads(self, arm: int) -> np.ndarray:
        """(6,) torque of each servo as a fraction of its stall torque, -1..1."""
        with self._lock:
            force = self.data.actuator_force[self._actuators[self._slice(arm)]]
            return np.clip(force / STALL_TORQUE, -1.0, 1.0)

    # Cubes

    def cube_position(self, name: str) -> np.ndarray:
        """(3,) centre of a cube, metres."""
        with self._lock:
            return self.data.xpos[self._cubes[name]].copy()

    def cube_rotation(self, name: str) -> np.ndarray:
        """(3, 3) orientation of a cube."""
        with self._lock:
            return self.data.xmat[self._cubes[name]].reshape(3, 3).copy()

    def cube_speed(self, name: str) -> float:
        """Speed of a cube's centre, m/s."""
        with self._lock:
            address = self.model.jnt_dofadr[self._cube_joints[name]]
            return float(np.linalg.norm(self.data.qvel[address : address + 3]))

    def held(self, name: str) -> bool:
        """Whether any part of an arm touches the cube."""
        with self._lock:
            bodies = self.model.geom_bodyid[self.data.contact.geom]
            mine = (bodies == self._cubes[name]).any(axis=1)
            return bool((mine & self._arm_geoms[self.data.contact.geom].any(axis=1)).any())

    # Cameras

    def render(self, camera: str) -> np.ndarray:
        """What a camera sees now: (480, 640, 3) uint8 RGB, or as much smaller as the world was asked to draw.

        Raises:
            ValueError: when there is no such camera.
            RenderingUnavailableError: when the machine has no OpenGL to draw with.
        """
        if camera not in self.camera_names:
            raise ValueError(f"There is no camera {camera!r}; this world has {', '.join(self.camera_names)}.")
        name = camera if camera == "front" else camera.replace("wrist", "") + "wrist"
        if self.n_arms == 1 and camera == "wrist":
            name = self.task.layout.prefixes[0] + "wrist"
        return self._renderer.render(self.data, name, self._lock)

    def close(self) -> None:
        """Free the OpenGL context; call it from the thread that renders."""
        self._renderer.close()
