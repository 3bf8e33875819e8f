"""What a policy takes and gives, as it is told to every client in the metadata frame."""

from dataclasses import asdict, dataclass
from typing import Any

from env_client.wire.errors import InvalidInput, shown
from env_client.wire.images import Resize
from env_client.wire.unit import UnitSource

__all__ = ["CameraSpec", "PolicySpec", "StateSpec"]


@dataclass(frozen=True)
class CameraSpec:
    """One image that the policy takes."""

    # The name under `images` in an observation.
    name: str
    # The size in pixels that the policy was trained on.
    height: int
    width: int
    # How another size is brought to it: none | stretch | pad | crop | openpi.
    resize: Resize = "none"
    # Whether the policy also answers an observation without it.
    optional: bool = False


@dataclass(frozen=True)
class StateSpec:
    """One part of the robot's state that the policy takes."""

    # The name under `states` in an observation, such as arm, left_arm.
    name: str
    # Number of values.
    size: int


@dataclass(frozen=True)
class PolicySpec:
    """What a policy takes and gives. Immutable; the same plain values travel in the metadata."""

    # act | diffusion | pi0 | pi05 | openpi | the name that a plug-in registered.
    type: str
    # Values in one action.
    action_dim: int
    # Actions in one chunk.
    horizon: int
    # One name for each value of an action, in order.
    action_names: tuple[str, ...] = ()
    # Unit of states and actions: normalized (-100..100, gripper 0..100), degrees, rad, ...
    unit: str = "normalized"
    # How the unit is known: declared | inferred | assumed; None: the server does not say.
    unit_source: UnitSource | None = None
    cameras: tuple[CameraSpec, ...] = ()
    states: tuple[StateSpec, ...] = ()
    # Consecutive control ticks that one inference looks at, the current one included.
    n_obs_steps: int = 1
    # The control rate of the training data in Hz; None when the checkpoint does not say.
    fps: float | None = None
    # Whether the policy reads a prompt; without one it refuses.
    wants_prompt: bool = False
    # Whether requests may carry the unexecuted rest of the last chunk (real-time chunking).
    supports_rtc: bool = False
    # What is used when a request names no prompt.
    default_prompt: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """Plain values, as they stand under `policy` in the metadata."""
        plain = asdict(self)
        plain["action_names"] = list(self.action_names)
        plain["cameras"] = [
            {key: value for key, value in asdict(camera).items() if key != "optional" or value}
            for camera in self.cameras
        ]
        plain["states"] = [asdict(state) for state in self.states]
        return plain

    @classmethod
    def from_wire(cls, plain: Any) -> "PolicySpec":
        """The spec in a metadata frame; unknown fields of a newer server are ignored.

        Raises `InvalidInput` when a field that a client relies on is missing or of another type.
        """
        try:
            known = {key: plain[key] for key in cls.__dataclass_fields__ if key in plain}
            known["action_names"] = tuple(str(name) for name in plain.get("action_names", ()))
            known["cameras"] = tuple(
                CameraSpec(
                    str(c["name"]),
                    int(c["height"]),
                    int(c["width"]),
                    c.get("resize", "none"),
                    bool(c.get("optional", False)),
                )
                for c in plain.get("cameras", ())
            )
            known["states"] = tuple(
                StateSpec(str(s["name"]), int(s["size"])) for s in plain.get("states", ())
            )
            for key in ("action_dim", "horizon", "n_obs_steps"):
                if key in known:
                    known[key] = int(known[key])
            return cls(**known)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InvalidInput(
                f"the server's metadata describes its policy as {shown(plain, 120)}; a map with type, action_dim and "
                f"horizon was expected ({type(error).__name__}: {error})"
            ) from error
