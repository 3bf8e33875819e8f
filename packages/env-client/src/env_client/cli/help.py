"""The text of `--help`, from the comments above the fields."""

import dataclasses
import shutil
import textwrap
from collections.abc import Callable, Sequence
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from env_client.cli.options import Option
from env_client.cli.values import is_dict, is_list, without_none

__all__ = ["format_help"]

# Column at which the explanations begin.
_INDENT = 34


def format_help(
    prog: str,
    description: str,
    options: Sequence[Option],
    aliases: dict[str, str | Callable[[str], dict[str, str]]],
    groups: dict[str, str],
    chosen: dict[str, str] | None = None,
) -> str:
    """The help of a command. `groups` holds the comment of each group's field, `chosen` the choices that the
    command line names, {"env.type": "so101"}: the options of the others are left out."""
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 120))
    spelled: dict[str, list[str]] = {}
    for alias, target in aliases.items():
        if isinstance(target, str):
            spelled.setdefault(target.split("=")[0], []).append(alias)
    lines = [f"usage: {prog} [--flag VALUE ...]", ""]
    if description:
        lines += [*textwrap.wrap(description, width), ""]
    shown = [option for option in options if not _is_of_another_choice(option.group, chosen or {})]
    for group, members in groupby(shown, key=lambda option: option.group):
        title = "options" if not group else group if " " not in group else f"with --{group}"
        text = groups.get(group, "")
        lines.append(f"{title}:{' ' + text if text else ''}")
        for option in members:
            lines += _entry(_spelling(option), _explanation(option, spelled.get(option.path, [])), width)
        lines.append("")
    lines.append("other:")
    for alias, target in aliases.items():
        if callable(target):
            first = (target.__doc__ or "").strip().splitlines()[:1]
            lines += _entry(f"--{_dashed(alias)} VALUE", " ".join(first), width)
    lines += _entry("--config-path FILE", "YAML file with these options; flags win over it.", width)
    lines += _entry("-h, --help", "Show this.", width)
    return "\n".join(lines) + "\n"


def _is_of_another_choice(group: str, chosen: dict[str, str]) -> bool:
    path, _, name = group.partition(":")[0].partition(" ")
    return bool(name) and path in chosen and chosen[path] != name


def _entry(left: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, width - _INDENT) or [""]
    left = "  " + left
    if len(left) > _INDENT - 2:
        return [left, *(" " * _INDENT + line for line in wrapped)]
    return [left.ljust(_INDENT) + wrapped[0], *(" " * _INDENT + line for line in wrapped[1:])]


def _spelling(option: Option) -> str:
    if option.choices:
        return f"{option.flag} {{{','.join(option.choices)}}}"
    if without_none(option.kind) is bool:
        # The one that changes the default is the one to show.
        head, _, last = option.flag[2:].rpartition(".")
        return f"--{head}{'.' if head else ''}no-{last}" if option.default is True else option.flag
    return f"{option.flag} {_metavar(option.kind)}"


def _explanation(option: Option, aliases: Sequence[str]) -> str:
    parts = [option.help] if option.help else []
    if option.default is dataclasses.MISSING:
        parts.append("(needed)")
    elif without_none(option.kind) is bool and isinstance(option.default, bool):
        parts.append(f"(default: {'on' if option.default else 'off'})")
    elif option.default not in (None, "", [], (), {}):
        parts.append(f"(default: {_shown(option.default)})")
    if aliases:
        parts.append(f"(also {', '.join('--' + _dashed(alias) for alias in aliases)})")
    return " ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def _metavar(kind: Any) -> str:
    kind = without_none(kind)
    if is_list(kind):
        item = _metavar((get_args(kind) or (str,))[0])
        return f"{item},{item}"
    if is_dict(kind):
        return "MAP"
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "{" + ",".join(str(member.value) for member in kind) + "}"
    return {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(kind, "VALUE")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
