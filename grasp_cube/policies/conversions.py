"""Between a robot's convention for a joint or gripper and the one that a checkpoint learned.

A robot says its gripper 0..100, a checkpoint learned 0..1; a joint turns the other way. An embodiment lists such
differences under `convert`; nothing here knows a robot's name but the curves, which are geometry.
Error policy: what a file says wrongly is a `PolicyError` when it is read; afterwards nothing raises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from env_client.wire import shown

from grasp_cube.policies.policy import PolicyError

__all__ = ["CURVES", "NO_CONVERSIONS", "Conversion", "Conversions", "Curve", "read_conversion"]

Values = np.ndarray


@dataclass(frozen=True)
class Curve:
    """A conversion that is no straight line; each function maps values elementwise."""

    # A state, from the robot's convention to the checkpoint's.
    state: Callable[[Values], Values]
    # An action, from the checkpoint's convention to the robot's.
    action: Callable[[Values], Values]
    # The inverse of `action`: what was sent to the robot, as the checkpoint would say it.
    action_back: Callable[[Values], Values]


def _aloha_gripper_state(opening: Values) -> Values:
    """ALOHA's opening (0 closed, 1 open, linear in the finger's travel) -> the share of the motor's turn, in which Pi0
    was pretrained.

    The finger runs 0.01844 to 0.05800 m; a horn of 0.022 m moves it by an arm of 0.036 m (Interbotix), so the law of
    cosines gives the angle; Pi0's range is 0.5476 to 1.6296 rad, encoder counts 2405 to 3110 of 4096.
    """
    finger = 0.01844 + opening * (0.05800 - 0.01844)
    sine = (0.022**2 + finger**2 - 0.036**2) / (2 * 0.022 * finger)
    return (np.arcsin(np.clip(sine, -1, 1)) - 0.5476) / (1.6296 - 0.5476)


def _aloha_gripper_action(angle: Values) -> Values:
    """Pi0's gripper action, an angle in rad above 0.5476 -> ALOHA's command, the share of -0.6213 to 1.4910 rad."""
    return (angle + 0.5476 + 0.6213) / (1.4910 + 0.6213)


def _aloha_gripper_action_back(command: Values) -> Values:
    return command * (1.4910 + 0.6213) - 0.6213 - 0.5476


# Named in an embodiment as `curve`.
CURVES = {"aloha_gripper": Curve(_aloha_gripper_state, _aloha_gripper_action, _aloha_gripper_action_back)}


@dataclass(frozen=True)
class Conversion:
    """The same change of convention for some of the values of a state, an action or both."""

    # Indices into the whole state or action.
    values: tuple[int, ...]
    curve: Curve
    of_state: bool = True
    of_action: bool = True
    # How a file says the curve: {"scale": -1} or {"curve": "aloha_gripper"}.
    said: tuple[tuple[str, Any], ...] = ()

    def as_setting(self) -> dict[str, Any]:
        """The entry of `convert` that this was read from."""
        of = "both" if self.of_state and self.of_action else "state" if self.of_state else "action"
        return {"values": list(self.values), **dict(self.said), **({} if of == "both" else {"of": of})}


class Conversions:
    """All of an embodiment's conversions. Immutable; what is passed in is never changed."""

    def __init__(self, parts: Sequence[Conversion] = ()):
        self.parts = tuple(parts)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conversions) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def state(self, state: Values) -> Values:
        """A state (..., n) of the robot, as the checkpoint learned it."""
        return self._apply(state, [(p.values, p.curve.state) for p in self.parts if p.of_state])

    def actions(self, actions: Values) -> Values:
        """Actions (..., n) of the checkpoint, as the robot takes them."""
        return self._apply(actions, [(p.values, p.curve.action) for p in self.parts if p.of_action])

    def actions_back(self, actions: Values) -> Values:
        """Actions (..., n) as the robot takes them, back in the checkpoint's convention."""
        return self._apply(actions, [(p.values, p.curve.action_back) for p in self.parts if p.of_action])

    def check(self, state_size: int, action_dim: int, where: str) -> None:
        """Raises `PolicyError` when an index lies outside the checkpoint's state or action."""
        for part in self.parts:
            for name, size, used in (
                ("state", state_size, part.of_state),
                ("action", action_dim, part.of_action),
            ):
                if used and max(part.values) >= size:
                    raise PolicyError(
                        f"convert in {where} names the value {max(part.values)} of the {name}, which has {size}, "
                        "numbered from 0"
                    )

    @staticmethod
    def _apply(values: Values, steps: list[tuple[tuple[int, ...], Callable[[Values], Values]]]) -> Values:
        if not steps:
            return values
        result = np.array(values, np.float64)
        for indices, function in steps:
            picked = list(indices)
            result[..., picked] = function(result[..., picked])
        return result.astype(values.dtype)


NO_CONVERSIONS = Conversions()


def read_conversion(value: Any, file: Path) -> Conversion:
    """One entry of `convert` in an embodiment file. Raises `PolicyError`.

    {values: [1, 2], scale: -1, offset: 0} means: checkpoint = scale * robot + offset. {values: [6], curve: NAME} is one
    of `CURVES`. `of: state` or `of: action` limits it to one of the two.
    """
    example = (
        "{values: [1, 2], scale: -1}, {values: [6], scale: 0.01, offset: 0} or {values: [6], curve: aloha_gripper}, each "
        "with `of: state` or `of: action` where it holds for one of them only"
    )
    wrong = PolicyError(f"an entry of convert in {file} is {shown(value, 80)}; {example} was expected")
    if not isinstance(value, dict) or not set(value) <= {"values", "scale", "offset", "curve", "of"}:
        raise wrong
    values, of = value.get("values"), value.get("of", "both")
    if not isinstance(values, list) or not values or not all(type(i) is int and i >= 0 for i in values):
        raise wrong
    if of not in ("state", "action", "both"):
        raise wrong
    if "curve" in value:
        if "scale" in value or "offset" in value:
            raise wrong
        curve = CURVES.get(value["curve"]) if isinstance(value["curve"], str) else None
        if curve is None:
            raise PolicyError(
                f"the curve {value['curve']!r:.40} in {file} is unknown: one of {', '.join(CURVES)} was expected"
            )
    else:
        scale, offset = value.get("scale", 1), value.get("offset", 0)
        if any(type(n) not in (int, float) or not np.isfinite(n) for n in (scale, offset)) or scale == 0:
            raise wrong
        curve = _line(float(scale), float(offset))
    said = tuple((key, value[key]) for key in ("scale", "offset", "curve") if key in value)
    return Conversion(tuple(values), curve, of != "action", of != "state", said)


def _line(scale: float, offset: float) -> Curve:
    def forward(robot: Values) -> Values:
        return scale * robot + offset

    def back(checkpoint: Values) -> Values:
        return (checkpoint - offset) / scale

    return Curve(state=forward, action=back, action_back=forward)
