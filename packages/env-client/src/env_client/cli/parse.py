"""Flags -> a config dataclass.

    scan    tokens -> {field path: [texts]}, by the options that the config class offers
    merge   over the values of `--config-path`
    build   -> instances, depth first; a group that is not mentioned keeps its default

Everything that a user can do wrong ends as one sentence on stderr and exit code 2.
"""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, NoReturn, get_type_hints

from env_client.cli.configs import find_config_file, read_config_file
from env_client.cli.errors import CliError
from env_client.cli.options import (
    Option,
    choice_names,
    comments_of,
    default_choice,
    field_default,
    is_choice,
    is_group,
    options_of,
)
from env_client.cli.values import TRUTHS, convert, is_dict, is_list, is_optional, without_none

__all__ = ["Alias", "CliError", "fail", "host_port", "parse"]

# A field path, `path=value` for a flag that takes none, or a function from the text to {field path: text}.
Alias = str | Callable[[str], dict[str, str]]


def parse[T](
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
    aliases: dict[str, Any] | None = None,
) -> T:
    """The config that a command line describes.

    `--env.dataset-path X` sets `config.env.dataset_path`; a bare `--dry-run` and `--no-dry-run` set a boolean;
    `--episodes 0,3`, `--episodes 0 3` and `--episodes 0 --episodes 3` fill a list; `--config-path FILE` gives
    values that flags override. `aliases` maps another spelling to a field path, to `path=value` (a flag without
    a value), or to a function from the text to `{field path: text}`.

    `--help` prints and exits with 0; a wrong command line prints one sentence to stderr and exits with 2. So does
    a `ValueError` raised by a config's `__post_init__`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = {_plain(alias): target for alias, target in (aliases or {}).items()}
    options = list(options_of(config_class))
    if "-h" in arguments or "--help" in arguments:
        from env_client.cli.help import format_help

        chosen = _chosen(arguments, options)
        print(format_help(prog, description, options, known, comments_of(config_class), chosen), end="")
        raise SystemExit(0)
    try:
        given = _Scanner(options, known).scan(arguments)
        values: dict[str, Any] = {}
        source = ""
        if given.config_path is not None:
            path = find_config_file(given.config_path)
            values, source = read_config_file(path), f"{path}: "
        for name, texts in given.texts.items():
            _put(values, name, texts)
        return _build(config_class, values, "", None, source)
    except CliError as error:
        fail(prog, str(error))


def _chosen(arguments: Sequence[str], options: Sequence[Option]) -> dict[str, str]:
    """The choices that a command line with --help names: {"env.type": "so101"}."""
    chosen = {}
    for option in (option for option in options if option.choices):
        for token, following in zip(arguments, [*arguments[1:], ""], strict=True):
            flag, equals, text = token.partition("=")
            name = text if equals else following
            if _is_flag(token) and _plain(flag) == option.path and name in option.choices:
                chosen[option.path] = name
    return chosen


def fail(prog: str, message: str, code: int = 2) -> NoReturn:
    """One sentence on stderr, then the end."""
    print(f"{prog}: {message}", file=sys.stderr)
    raise SystemExit(code)


def host_port(text: str) -> dict[str, str]:
    """HOST:PORT of the server, in place of --host and --port; grpc://HOST:PORT names one of an older kind."""
    text = text.removeprefix("ws://").rstrip("/")
    if text.startswith("grpc://"):
        found = host_port(text.removeprefix("grpc://"))
        return found | {"host": f"grpc://{found['host']}"}
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or (":" in host and not host.startswith("[")):
        raise CliError(f"--server is {text!r}; HOST:PORT was expected, such as 192.168.1.20:8000")
    return {"host": host.strip("[]") or "127.0.0.1", "port": port}


# ------------------------------------------------------------------------------------------------- scan


@dataclass
class _Given:
    """What the command line said."""

    # {field path: texts from the command line, with the flag as it was typed}
    texts: dict[str, "_Texts"] = field(default_factory=dict)
    config_path: str | None = None


@dataclass
class _Texts:
    """The texts of one flag."""

    flag: str
    values: list[str]


class _Scanner:
    """Tokens -> field paths and texts."""

    def __init__(self, options: Sequence[Option], aliases: dict[str, Alias]):
        self.options: dict[str, Option] = {}
        for option in options:
            self.options.setdefault(option.path, option)
        self.aliases = aliases

    def scan(self, arguments: Sequence[str]) -> _Given:
        given = _Given()
        rest = list(arguments)
        while rest:
            token = rest.pop(0)
            if not _is_flag(token):
                raise CliError(
                    f"{token!r} stands alone; a flag such as --{_example(self.options)} was expected"
                )
            flag, equals, text = token.partition("=")
            name, inline = _plain(flag), text if equals else None
            if name == "config_path" and name not in self.options:
                given.config_path = _value(flag, inline, rest)
                continue
            target = self.aliases.get(name, name) if name not in self.options else name
            if callable(target):
                for path, value in target(_value(flag, inline, rest)).items():
                    self._add(given, path, flag, [value], many=False)
                continue
            path, fixed, constant = target.partition("=")
            if fixed:
                if inline is not None:
                    raise CliError(f"{flag} takes no value; {inline!r} came")
                self._add(given, path, flag, [constant], many=False)
                continue
            self._flag(given, path, flag, inline, rest)
        return given

    def _flag(self, given: _Given, path: str, flag: str, inline: str | None, rest: list[str]) -> None:
        option = self.options.get(path)
        if option is None:
            inner = self._inside_a_map(path)
            if inner is not None:
                self._add(given, inner, flag, [_value(flag, inline, rest)], many=False)
                return
            negated = self._negated(path)
            if negated is None:
                raise CliError(self._unknown(flag, path))
            if inline is not None:
                raise CliError(f"{flag} takes no value; {inline!r} came")
            self._add(given, negated, flag, ["false"], many=False)
            return
        if without_none(option.kind) is bool:
            if inline is None and rest and rest[0].lower() in TRUTHS:
                inline = rest.pop(0)
            self._add(given, path, flag, ["true" if inline is None else inline], many=False)
            return
        many = is_list(option.kind)
        texts = [_value(flag, inline, rest)]
        while many and inline is None and rest and not _is_flag(rest[0]):
            texts.append(rest.pop(0))
        self._add(given, path, flag, texts, many=many)

    def _add(self, given: _Given, path: str, flag: str, texts: list[str], *, many: bool) -> None:
        if many and path in given.texts:
            given.texts[path].values.extend(texts)
        else:
            given.texts[path] = _Texts(flag, texts)

    def _negated(self, path: str) -> str | None:
        """The boolean field that `--no-x`, `--group.no-x` or `--no-group.x` turns off."""
        head, dot, last = path.rpartition(".")
        for candidate in (path.removeprefix("no_"), head + dot + last.removeprefix("no_")):
            option = self.options.get(candidate)
            if candidate != path and option is not None and without_none(option.kind) is bool:
                return candidate
        return None

    def _inside_a_map(self, path: str) -> str | None:
        """`cameras.front.width` where `cameras` is a field that holds a map."""
        parts = path.split(".")
        heads = (self.options.get(".".join(parts[:count])) for count in range(len(parts) - 1, 0, -1))
        return path if any(option is not None and is_dict(option.kind) for option in heads) else None

    def _unknown(self, flag: str, path: str) -> str:
        inside = [name for name in self.options if name.startswith(path + ".")]
        if inside:
            return f"{flag} is a group of options; name one of them, such as {self.options[inside[0]].flag}"
        flags = {option.path: option.flag for option in self.options.values()}
        flags |= {alias: "--" + alias.replace("_", "-") for alias in self.aliases}
        flags["config_path"], flags["help"] = "--config-path", "--help"
        last = path.rpartition(".")[2]
        ends = [name for name in flags if name.rpartition(".")[2] == last]
        close = ends or difflib.get_close_matches(path, flags, 1, 0.6)
        if not close:
            tails = {name.rpartition(".")[2]: name for name in flags}
            close = [tails[tail] for tail in difflib.get_close_matches(last, tails, 1, 0.7)]
        hint = f"did you mean {flags[close[0]]}?" if close else "--help lists the flags"
        return f"unknown flag {flag}; {hint}"


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _is_flag(token: str) -> bool:
    # -0.5 is a value; "-x" is a flag that does not exist.
    return token.startswith("-") and len(token) > 1 and not (token[1].isdigit() or token[1] == ".")


def _value(flag: str, inline: str | None, rest: list[str]) -> str:
    if inline is not None:
        return inline
    if not rest or _is_flag(rest[0]):
        came = f"{rest[0]} came next" if rest else "the line ends there"
        raise CliError(f"{flag} needs a value, but {came}; write {flag} VALUE or {flag}=VALUE")
    return rest.pop(0)


def _example(options: dict[str, Option]) -> str:
    return next(iter(options.values())).flag[2:] if options else "help"


# ------------------------------------------------------------------------------------------------ build


def _put(values: dict[str, Any], path: str, texts: _Texts) -> None:
    """Texts laid over the values of the file, at a dotted path."""
    *heads, last = path.split(".")
    for head in heads:
        inner = values.get(head)
        if not isinstance(inner, dict):
            inner = values[head] = {}
        values = inner
    values[last] = texts


def _build(config_class: Any, values: dict[str, Any], prefix: str, default: Any, source: str) -> Any:
    """An instance of `config_class` from nested values; what is not mentioned comes from `default`."""
    hints, rest, arguments = get_type_hints(config_class), dict(values), {}
    for item in dataclasses.fields(config_class):
        if not item.init:
            continue
        kind, path = hints[item.name], prefix + item.name
        start = getattr(default, item.name) if default is not None else field_default(item)
        if item.name in rest:
            value = rest.pop(item.name)
            arguments[item.name] = (
                _group(kind, value, path, start, source)
                if is_group(kind)
                else _leaf(kind, value, path, source)
            )
        elif start is not MISSING:
            arguments[item.name] = start
        elif is_group(kind):
            arguments[item.name] = _group(kind, {}, path, start, source)
        else:
            text = comments_of(config_class).get(item.name, "")
            raise CliError(f"{_flag_of(path)} is needed{': ' + text if text else ''}")
    if rest:
        raise CliError(_unfit(config_class, next(iter(rest.items())), prefix, source))
    try:
        return config_class(**arguments)
    except CliError:
        raise
    except ValueError as error:
        raise CliError(str(error)) from error


def _group(kind: Any, value: Any, path: str, start: Any, source: str) -> Any:
    if is_optional(kind) and (
        value is None or (isinstance(value, _Texts) and value.values[-1].lower() == "none")
    ):
        return None
    if not isinstance(value, dict):
        raise CliError(f"{source}{path} is {value!r:.60}; a map of options was expected")
    kind = without_none(kind)
    if is_choice(kind):
        value = dict(value)
        named = value.pop("type", None)
        name = default_choice(kind, start) if named is None else _leaf(str, named, path + ".type", source)
        names = choice_names(kind)
        if name not in names:
            came = "is needed" if name is None else f"is {name!r}"
            raise CliError(f"{_flag_of(path + '.type')} {came}; one of {', '.join(names)} was expected")
        kind = kind.get_choice_class(name)
    return _build(kind, value, path + ".", start if type(start) is kind else None, source)


def _leaf(kind: Any, value: Any, path: str, source: str) -> Any:
    if isinstance(value, _Texts):
        texts = value.values
        joined = texts[-1] if len(texts) == 1 or not is_list(kind) else ",".join(texts)
        return convert(kind, joined, value.flag)
    if isinstance(value, dict):
        value = _plain_values(value)
    return convert(kind, value, f"{source}{path}")


def _plain_values(value: Any) -> Any:
    """Texts given for keys inside a map, read as YAML: the map's own types come later."""
    if isinstance(value, dict):
        return {key: _plain_values(item) for key, item in value.items()}
    if isinstance(value, _Texts):
        import yaml

        return yaml.safe_load(value.values[-1])
    return value


def _unfit(config_class: type, entry: tuple[str, Any], prefix: str, source: str) -> str:
    name, value = entry
    shown = value.flag if isinstance(value, _Texts) else f"{source}{prefix}{name}"
    parents = [base for base in config_class.__mro__ if hasattr(base, "get_known_choices")]
    for base in parents:
        registry: Any = base
        others = registry.get_known_choices()
        mine = [key for key, choice in others.items() if choice is config_class]
        owners = [
            key
            for key, choice in others.items()
            if dataclasses.is_dataclass(choice) and name in {item.name for item in dataclasses.fields(choice)}
        ]
        if mine and owners:
            flag = _flag_of(prefix + "type")
            return f"{shown} belongs to {flag} {' or '.join(owners)}, but the type here is {mine[0]}; add {flag} {owners[0]}"
    fields = [item.name for item in dataclasses.fields(config_class)]
    close = difflib.get_close_matches(name, fields, 1, 0.6)
    return f"{shown} is unknown; " + (
        f"did you mean {_flag_of(prefix + close[0]) if isinstance(value, _Texts) else prefix + close[0]}?"
        if close
        else f"one of {', '.join(fields)} was expected"
    )


def _flag_of(path: str) -> str:
    return "--" + path.replace("_", "-")
