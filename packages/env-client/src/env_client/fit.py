"""Whether a policy and an env fit together, before anything moves."""

from collections.abc import Sequence
from difflib import SequenceMatcher

from env_client.envs.env import EnvSpec
from env_client.wire import PolicySpec

# Words in the name of a camera that moves with the arm.
_VIEWS = ("wrist", "hand", "gripper")

__all__ = ["doubts", "misfits"]


def misfits(
    env: EnvSpec, policy: PolicySpec, name: str, sizes: dict[str, tuple[int, int]] | None = None
) -> list[str]:
    """Sentences on why this policy must not drive this env; empty when it may. `name` says which env it is,
    `sizes` {camera: (height, width)} of its images where they are known before the first one."""
    found = []
    if policy.action_dim != env.action_dim:
        found.append(
            f"the policy gives actions of {policy.action_dim} values, {name} has {env.action_dim} "
            f"({', '.join(env.action_names)}): serve the checkpoint of this task and robot"
        )
    elif _reordered(env.action_names, policy.action_names):
        found.append(
            f"the policy orders its actions {', '.join(policy.action_names)}; {name} orders them "
            f"{', '.join(env.action_names)}: the embodiment file of the server must name the order of training"
        )
    if policy.unit != env.unit:
        found.append(
            f"the policy works in the unit {policy.unit}, {name} in {env.unit}: start the server with --policy.unit "
            f"{env.unit} if the policy was trained in it"
            + (
                f", or give --env.unit {policy.unit} if the dataset was recorded in it"
                if env.type == "dataset"
                else ""
            )
            + "; otherwise the checkpoint is for another robot"
        )
    present = [camera.name for camera in policy.cameras if camera.name in env.cameras]
    absent = [c.name for c in policy.cameras if c.name not in env.cameras and (not c.optional or not present)]
    if absent:
        spare = [camera for camera in env.cameras if camera not in present]
        pairs = ",".join(f"{ours}={theirs}" for theirs, ours in likely_names(absent, spare))
        cure = f"name the camera in the camera file (--env.camera-config-path) so ({pairs})"
        if env.type == "dataset":
            cure = f"add --env.cameras {pairs}"
        elif env.type == "astribot":
            cure = f"map it in the server's embodiment ({pairs})"
        found.append(
            f"the policy looks through {', '.join(absent)}, which {name} lacks; it has "
            f"{', '.join(env.cameras) or 'no camera'}"
            + (f": {cure}, if they are the same views" if pairs else "")
        )
    for camera in policy.cameras:
        height, width = (sizes or {}).get(camera.name, (camera.height, camera.width))
        if camera.resize == "none" and (height, width) != (camera.height, camera.width):
            found.append(
                f"the policy takes the camera {camera.name} as {camera.width}x{camera.height} (width x height) and nothing else, "
                f"{name} has {width}x{height}: serve it with --policy.resize stretch, pad or crop"
            )
    parts = {part.name: part.size for part in env.states}
    for part in policy.states:
        if parts.get(part.name) != part.size:
            there = ", ".join(f"{key} ({size})" for key, size in parts.items()) or "no state"
            sizes_match = sum(parts.values()) == sum(other.size for other in policy.states)
            wanted = ",".join(f"{other.name}={other.size}" for other in policy.states)
            cure = f": add --env.states {wanted}" if sizes_match and env.type == "dataset" else ""
            found.append(
                f"the policy reads the state {part.name} ({part.size} values); {name} has {there}{cure}"
            )
    return found


def doubts(env: EnvSpec, policy: PolicySpec, name: str) -> list[str]:
    """Sentences on what looks odd but may be meant."""
    found = [
        f"the policy runs without its optional camera {camera.name}, which {name} lacks"
        for camera in policy.cameras
        if camera.optional and camera.name not in env.cameras
    ]
    if policy.fps is not None and abs(policy.fps - env.fps) > 0.01 * env.fps:
        found.append(
            f"the policy was trained at {policy.fps:g} Hz, {name} runs at {env.fps:g} Hz: its motion is played at another speed"
        )
    if policy.action_names and len(policy.action_names) == env.action_dim:
        strangers = set(policy.action_names) ^ set(env.action_names)
        if strangers:
            found.append(
                f"the policy names its actions {', '.join(policy.action_names)}, {name} {', '.join(env.action_names)}: "
                "they are matched by their order"
            )
    return found


def likely_names(theirs: Sequence[str], ours: Sequence[str]) -> list[tuple[str, str]]:
    """(policy's camera, robot's camera) that most probably are the same view: by likeness of the names, then by order."""

    def likeness(policy: str, robot: str) -> float:
        kinds = [{word for word in _VIEWS if word in name.lower()} for name in (policy, robot)]
        sides = [{side for side in ("left", "right") if side in name.lower()} for name in (policy, robot)]
        wrist = bool(kinds[0]) == bool(kinds[1])
        return wrist + (sides[0] == sides[1]) + SequenceMatcher(None, policy, robot).ratio()

    pairs, free = [], list(ours)
    for name in theirs:
        if free:
            best = max(free, key=lambda other: likeness(name, other))
            free.remove(best)
            pairs.append((name, best))
    return pairs


def _reordered(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    return ours != theirs and sorted(ours) == sorted(theirs)
