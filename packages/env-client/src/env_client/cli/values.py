"""Text from the command line, or a plain value from a file, as the value of a field's type."""

import math
import types
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from env_client.cli.errors import CliError

__all__ = ["TRUTHS", "convert", "describe", "is_dict", "is_list", "is_optional", "without_none"]

# What people write for a boolean.
TRUTHS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def without_none(kind: Any) -> Any:
    """`X` of `X | None`; a union of several types stays a union."""
    if _is_union(kind):
        members = [member for member in get_args(kind) if member is not type(None)]
        return members[0] if len(members) == 1 else Union[tuple(members)]  # noqa: UP007
    return kind


def is_optional(kind: Any) -> bool:
    return _is_union(kind) and type(None) in get_args(kind)


def is_list(kind: Any) -> bool:
    """Whether a repeated flag collects into this type."""
    kind = without_none(kind)
    return (get_origin(kind) or kind) in (list, tuple, set, frozenset, Sequence)


def is_dict(kind: Any) -> bool:
    kind = without_none(kind)
    return (get_origin(kind) or kind) is dict


def describe(kind: Any) -> str:
    """What is expected, in words: "a whole number", "one of sync, async"."""
    if is_optional(kind):
        return describe(without_none(kind)) + " or none"
    if _is_union(kind):
        return " or ".join(describe(member) for member in get_args(kind))
    if is_list(kind):
        return f"a comma-separated list, each item {describe(_item_type(kind))}"
    if is_dict(kind):
        return "a map such as {key: value}"
    choices = _choices(kind)
    if choices is not None:
        return "one of " + ", ".join(map(str, choices))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def convert(kind: Any, value: Any, flag: str) -> Any:
    """`value` (text from the command line or a plain value from YAML) as `kind`.

    Raises `CliError` that names the flag, what came and what was expected.
    """
    try:
        return _convert(kind, value)
    except CliError:
        raise
    except Exception as error:  # whatever a custom decoder raises must not reach the user as a traceback
        shown = str(value) if isinstance(value, str) else repr(value)
        raise CliError(f"{flag} is {shown!r:.120}; {describe(kind)} was expected") from error


def _convert(kind: Any, value: Any) -> Any:
    if is_optional(kind):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(without_none(kind), value)
    if _is_union(kind):
        return _convert_union(kind, value)
    if is_list(kind):
        return _convert_list(kind, value)
    if is_dict(kind):
        return _convert_dict(kind, value)
    choices = _choices(kind)
    if choices is not None:
        return _convert_choice(kind, choices, value)
    plain = _PLAIN.get(kind)
    return plain(value) if plain is not None else _decode(kind, value)


def _decode(kind: Any, value: Any) -> Any:
    """Everything else is draccus' to decode: dataclasses inside maps, registered types, Any."""
    from draccus.parsers.decoding import get_decoding_fn

    return get_decoding_fn(kind)(_from_yaml(value) if isinstance(value, str) else value, ())


def _from_yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return TRUTHS[value.lower()]


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(value)
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or math.isnan(float(value)):
        raise ValueError(value)
    return float(value)


def _str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(value)
    return str(value)


def _path(value: Any) -> Path:
    return Path(_str(value)).expanduser()


_PLAIN = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}


def _convert_union(kind: Any, value: Any) -> Any:
    # Text fits everything, so it comes last.
    for member in sorted(get_args(kind), key=lambda member: member is str):
        try:
            return _convert(member, value)
        except Exception:  # what fits no choice is told below  # nosec B112
            continue
    raise ValueError(value)


def _convert_list(kind: Any, value: Any) -> Any:
    if isinstance(value, str):
        value = (
            _from_yaml(value)
            if value.startswith("[")
            else [part.strip() for part in value.split(",") if part.strip()]
        )
    elif isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    base = without_none(kind)
    arguments = get_args(base)
    if get_origin(base) is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise ValueError(value)
        return tuple(_convert(item, part) for item, part in zip(arguments, value, strict=True))
    items = [_convert(_item_type(kind), part) for part in value]
    origin = get_origin(base) or base
    return items if origin in (list, Sequence) else origin(items)


def _convert_dict(kind: Any, value: Any) -> dict:
    if isinstance(value, str):
        if "=" in value and not value.startswith("{"):
            value = {k.strip(): _from_yaml(v) for k, v in (part.split("=", 1) for part in value.split(","))}
        else:
            value = _from_yaml(value)
    if not isinstance(value, dict):
        raise ValueError(value)
    arguments = get_args(without_none(kind)) or (str, Any)
    return {_convert(arguments[0], key): _convert(arguments[1], item) for key, item in value.items()}


def _convert_choice(kind: Any, choices: Sequence[Any], value: Any) -> Any:
    is_enum = isinstance(kind, type)
    for choice in choices:
        if value == choice or str(value) == str(choice):
            return kind(choice) if is_enum else choice
    raise ValueError(value)


def _choices(kind: Any) -> list[Any] | None:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return None


def _item_type(kind: Any) -> Any:
    arguments = get_args(without_none(kind))
    return arguments[0] if arguments else str


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)
