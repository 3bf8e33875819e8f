"""Whether a policy and an env fit together, before anything moves."""

from env_client.envs.env import EnvSpec
from env_client.wire import PolicySpec

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
            f"the policy works in the unit {policy.unit}, {name} in {env.unit}: the embodiment file of the server or "
            "--env.unit here says the wrong one, or the checkpoint is for another robot"
        )
    absent = [camera.name for camera in policy.cameras if camera.name not in env.cameras]
    if absent:
        found.append(
            f"the policy looks through {', '.join(absent)}, which {name} lacks; it has "
            f"{', '.join(env.cameras) or 'no camera'}"
        )
    for camera in policy.cameras:
        height, width = (sizes or {}).get(camera.name, (camera.height, camera.width))
        if camera.resize == "none" and (height, width) != (camera.height, camera.width):
            found.append(
                f"the policy takes {camera.name} as {camera.height}x{camera.width} and nothing else, {name} has "
                f"{height}x{width}: serve it with --policy.resize stretch, pad or crop"
            )
    parts = {part.name: part.size for part in env.states}
    for part in policy.states:
        if parts.get(part.name) != part.size:
            there = ", ".join(f"{key} ({size})" for key, size in parts.items()) or "no state"
            found.append(f"the policy reads the state {part.name} ({part.size} values); {name} has {there}")
    return found


def doubts(env: EnvSpec, policy: PolicySpec, name: str) -> list[str]:
    """Sentences on what looks odd but may be meant."""
    found = []
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


def _reordered(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    return ours != theirs and sorted(ours) == sorted(theirs)
