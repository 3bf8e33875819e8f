"""Where a config file lies: as given, then in ./configs, then in the data of the installed packages."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from env_client.cli.errors import CliError

__all__ = ["find_config_file", "read_config_file"]


def find_config_file(name: str | os.PathLike[str], packages: Sequence[str] = ("env_client",)) -> Path:
    """The path of a config file named on the command line, such as `tasks/lift` or `my_robot.yaml`.

    Looked for as given, then under `./configs`, then under `configs` inside each of `packages` (wheels carry
    the defaults there); the ending `.yaml` may be left out. Raises `CliError` with the places searched.
    """
    roots = [Path(), Path("configs")]
    for package in packages:
        spec = find_spec(package)
        roots += [Path(place) / "configs" for place in (spec and spec.submodule_search_locations) or ()]
    given = Path(name).expanduser()
    tried = []
    for root in roots:
        for candidate in (root / given, root / given.with_name(given.name + ".yaml")):
            if candidate.is_file():
                return candidate
            tried.append(str(candidate))
        if given.is_absolute():
            break
    raise CliError(f"the config file {str(name)!r} was not found; looked for {', '.join(tried)}")


def read_config_file(path: Path) -> dict[str, Any]:
    """The map in a YAML file, its keys with underscores. Raises `CliError`."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"the config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise CliError(f"the config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise CliError(
            f"the config file {path} holds a {type(content).__name__}; a map of options was expected"
        )
    return _underscored(content)


def _underscored(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key).replace("-", "_"): _underscored(item) for key, item in value.items()}
    return value
