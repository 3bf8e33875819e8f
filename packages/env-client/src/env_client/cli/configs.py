"""A config file named on the command line: as given, then in ./configs, then in the data of the installed package."""

import os
from pathlib import Path
from typing import Any

from env_client.cli.errors import CliError
from env_client.config_folders import config_folders
from env_client.text_files import load_yaml

__all__ = ["find_config_file", "read_config_file"]


def find_config_file(name: str | os.PathLike[str]) -> Path:
    """The path of a config file named on the command line, such as `tasks/lift` or `my_robot.yaml`.

    Looked for as given, then in the `config_folders`; the ending `.yaml` may be left out. Raises `CliError` with the
    places searched.
    """
    given = Path(name).expanduser()
    tried = []
    for root in (Path(), *config_folders()):
        for candidate in (root / given, root / given.with_name(given.name + ".yaml")):
            if candidate.is_file():
                return candidate
            tried.append(str(candidate))
        if given.is_absolute():
            break
    raise CliError(f"the config file {str(name)!r} was not found; looked for {', '.join(tried)}")


def read_config_file(path: Path) -> dict[str, Any]:
    """The map in a YAML file, its keys with underscores. Raises `CliError`."""
    try:
        content = load_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"the config file {path} cannot be read: {error}") from error
    except ValueError as error:
        raise CliError(f"the config file {path} is not YAML: {error}") from error
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
