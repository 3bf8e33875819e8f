"""What a config dataclass offers on the command line, as a flat list of options.

A nested dataclass becomes a group (`--policy.path`). A nested choice type (a `draccus.ChoiceRegistry`) becomes
`--env.type` and the options of every registered choice.
"""

import dataclasses
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints

from env_client.cli.values import without_none

__all__ = [
    "Option",
    "choice_names",
    "comments_of",
    "default_choice",
    "field_default",
    "is_choice",
    "is_group",
    "options_of",
]


@dataclass(frozen=True)
class Option:
    """One flag."""

    # Dotted path of the field, such as env.dataset_path.
    path: str
    # The annotated type.
    kind: Any
    # The default value; dataclasses.MISSING when the flag must be given.
    default: Any
    # The comment above the field.
    help: str
    # The group in the help: "" for the top level, "env", "env.type dataset", "env.type so101: env.robot".
    group: str
    # The names between which a choice type's `.type` selects; empty for any other option.
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.path.replace("_", "-")


def options_of(
    config_class: type, prefix: str = "", default: Any = None, group: str = ""
) -> Iterator[Option]:
    """All options of a config class, in the order of its fields, top level first."""
    hints, comments = get_type_hints(config_class), comments_of(config_class)
    nested = []
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        kind, path = hints[field.name], prefix + field.name
        value = getattr(default, field.name) if default is not None else field_default(field)
        if is_group(kind):
            nested.append((path, without_none(kind), value, comments.get(field.name, "")))
        else:
            yield Option(path, kind, value, comments.get(field.name, ""), group)
    for path, kind, value, text in nested:
        instance = value if dataclasses.is_dataclass(value) else None
        if not is_choice(kind):
            under, _, _ = group.partition(": ")
            yield from options_of(kind, path + ".", instance, f"{under}: {path}" if " " in under else path)
            continue
        chosen = default_choice(kind, value)
        names = choice_names(kind)
        yield Option(path + ".type", str, MISSING if chosen is None else chosen, text, path, names)
        for name in names:
            choice = kind.get_choice_class(name)
            start = instance if type(instance) is choice else None
            yield from options_of(choice, path + ".", start, f"{path}.type {name}")


def is_group(kind: Any) -> bool:
    """Whether a field of this type is a group of options and not one value."""
    kind = without_none(kind)
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or is_choice(kind))


def is_choice(kind: Any) -> bool:
    """Whether `kind` is the base of a choice registry; one of its registered choices is an ordinary group."""
    if not (isinstance(kind, type) and hasattr(kind, "get_known_choices")):
        return False
    return kind not in kind.get_known_choices().values()


def choice_names(kind: Any) -> tuple[str, ...]:
    return tuple(kind.get_known_choices())


def default_choice(kind: Any, value: Any) -> str | None:
    """The choice that is meant when no type is given: that of the default value, else the registry's."""
    if value is not MISSING and value is not None:
        return kind.get_choice_name(type(value))
    return kind.default_choice_name()


def field_default(field: dataclasses.Field) -> Any:
    if field.default is not MISSING:
        return field.default
    if field.default_factory is not MISSING:
        return field.default_factory()
    return MISSING


def comments_of(config_class: type) -> dict[str, str]:
    """{field: the comment directly above it, or behind it on its line}; also of inherited fields."""
    result: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue  # made in an interactive session: no source, no help text
        result |= _comments_in(source)
    return result


def _comments_in(source: str) -> dict[str, str]:
    lines = inspect.cleandoc("\n" + source).splitlines()
    above: list[str] = []
    result = {}
    for line in lines:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith("#"):
            above.append(stripped.lstrip("# "))
            continue
        name = stripped.split(":", 1)[0].strip()
        if indent == 4 and ":" in stripped and name.isidentifier():
            result[name] = " ".join(above) or _trailing_comment(stripped)
        above = []
    return result


def _trailing_comment(line: str) -> str:
    try:
        for token in tokenize.generate_tokens(io.StringIO(line).readline):
            if token.type == tokenize.COMMENT:
                return token.string.lstrip("# ")
    except tokenize.TokenError:
        pass  # a definition over several lines
    return ""
