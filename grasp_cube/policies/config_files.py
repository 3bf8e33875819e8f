"""Where a name such as `lift` or `so101` becomes a yaml file, and its values are checked."""

from pathlib import Path
from typing import Any

from env_client.config_folders import config_folders
from env_client.text_files import load_json, load_yaml
from env_client.wire import shown

from grasp_cube.policies.places import unreadable
from grasp_cube.policies.policy import PolicyError

__all__ = ["Fields", "find_config", "read_json", "read_yaml"]


def find_config(kind: str, name: str) -> Path:
    """The yaml file of a task or embodiment (`kind` is the folder's name: tasks, embodiments).

    `name` is looked for as a file as given, then as ./configs/<kind>/<name>.yaml, then in the data of the installed
    package. Raises `PolicyError` with the names that exist.
    """
    given = Path(name).expanduser()
    if given.suffix in (".yaml", ".yml"):
        if given.is_file():
            return given.absolute()
        raise PolicyError(f"there is no {kind} file at {given.absolute()}")
    folders = [root / kind for root in config_folders()]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise PolicyError(
        f"{name!r} is not one of the {kind} in {folders[0]} ({', '.join(known) or 'none there'}): give one of these or a yaml file"
    )


def read_yaml(file: Path) -> "Fields":
    """The map in a yaml file. Raises `PolicyError`."""
    try:
        values = load_yaml(file)
    except (OSError, ValueError) as error:
        raise unreadable(file, f"{file} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise unreadable(file, f"{file} holds {type(values).__name__}; a map of settings was expected")
    return Fields(file, values)


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises `PolicyError`, and `FileNotFoundError` where there is none."""
    try:
        return load_json(file)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not file.is_symlink():
            raise
        raise unreadable(file, f"{file} is not readable JSON ({error}): copy the checkpoint again") from error


class Fields:
    """The settings of one yaml file, taken one by one; whatever is left over is a spelling mistake."""

    def __init__(self, file: Path, values: dict[str, Any]):
        self.file = file
        self._values = dict(values)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`, of the type `kind`; an absent or null one is `default`. Raises `PolicyError`."""
        value = self._values.pop(key, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
            raise PolicyError(f"{key} in {self.file} is {shown(value)}; {' or '.join(names)} was expected")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings; None when absent. Raises `PolicyError`."""
        value = self.take(key, list)
        if value is not None and not all(isinstance(item, str) for item in value):
            raise PolicyError(f"{key} in {self.file} is {shown(value)}; a list of names was expected")
        return None if value is None else tuple(value)

    def rest(self) -> dict[str, Any]:
        """Everything that was not taken, for a file whose keys are names of the user's."""
        rest, self._values = self._values, {}
        return rest

    def end(self) -> None:
        """Raises `PolicyError` when a setting was not taken."""
        if self._values:
            raise PolicyError(
                f"{self.file} has the unknown settings {', '.join(map(str, self._values)):.300}"
            )
