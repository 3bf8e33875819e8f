"""What openpi's checkpoints do not say themselves: the settings of the training config that made them.

configs/openpi.yaml holds those that openpi publishes; another file of the same settings serves for a config of one's
own. Light: nothing heavy is imported.
Error policy: `PolicyError` that names the file and the setting, or the flag to give.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_client.wire import shown

from grasp_cube.policies.config_files import Fields, find_config, read_yaml
from grasp_cube.policies.embodiment import read_delta
from grasp_cube.policies.policy import PolicyError

__all__ = ["KINDS", "OpenpiConfig", "load_openpi_config"]

KINDS = ("pi0", "pi05", "tiny_pi0", "tiny_pi05")


@dataclass(frozen=True)
class OpenpiConfig:
    """One training config; None where it does not say."""

    name: str | None = None
    model: str | None = None
    embodiment: str | None = None
    asset_id: str | None = None
    horizon: int | None = None
    # Runs, as in `Embodiment.delta`.
    delta: tuple[int, ...] | None = None
    state_in_prompt: bool | None = None
    max_tokens: int | None = None
    prompt: str | None = None


def load_openpi_config(name: str | None, *, unknown_ok: bool = False) -> OpenpiConfig:
    """The config of that name, in configs/openpi.yaml or in a yaml file; without a name, one that says nothing.

    `unknown_ok` gives one that says nothing for an unknown name as well. Raises `PolicyError`.
    """
    if name is None:
        return OpenpiConfig()
    if name.endswith((".yaml", ".yml")):
        file = find_config("openpi", name)
        return _read(read_yaml(file), file.stem)
    file = find_config(".", "openpi")
    table = read_yaml(file).rest()
    if name not in table and unknown_ok:
        return OpenpiConfig(name)
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise PolicyError(
            f"the config {name!r} is not in {file}: {hint}it has {', '.join(map(str, table))}; a config of your own is a "
            "yaml file with the same settings (Pi0-FAST is another kind of model: it needs openpi installed, see docs/embodiments.md)"
        )
    values: Any = table[name]
    if not isinstance(values, dict):
        raise PolicyError(f"{name} in {file} is {shown(values)}; a map of settings was expected")
    return _read(Fields(file, values), name)


def _read(fields: Fields, name: str) -> OpenpiConfig:
    model = fields.take("model", str)
    if model is not None and model not in KINDS:
        raise PolicyError(
            f"model of {name} in {fields.file} is {shown(model, 40)}; one of {', '.join(KINDS)} was expected"
        )
    numbers = {key: fields.take(key, int) for key in ("horizon", "max_tokens")}
    for key, value in numbers.items():
        if value is not None and value < 1:
            raise PolicyError(f"{key} of {name} in {fields.file} is {value}; at least 1 was expected")
    embodiment = fields.take("embodiment", str)
    if embodiment is not None and embodiment.endswith((".yaml", ".yml")):
        # A file named in a file counts from there.
        embodiment = str(fields.file.parent / Path(embodiment).expanduser())
    config = OpenpiConfig(
        name=name,
        model=model,
        embodiment=embodiment,
        asset_id=fields.take("asset_id", str),
        delta=read_delta(fields.take("delta", list), fields.file),
        state_in_prompt=fields.take("state_in_prompt", bool),
        prompt=fields.take("prompt", str),
        **numbers,
    )
    fields.end()
    return config
