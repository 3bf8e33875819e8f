"""`convert_checkpoint --from openpi DIR --to lerobot OUT`: an openpi checkpoint as a LeRobot checkpoint.

OUT holds config.json, model.safetensors, both processors with their statistics, embodiment.yaml and the tokenizer:
what `serve_policy --policy.path OUT` and LeRobot itself load. DIR is openpi's PyTorch layout, or JAX parameters (with
the extra `jax`); adapters of a LoRA run are merged. Tensors pass through one by one, so the memory of one layer is
enough.
Life cycle: everything is checked before the first byte is written; OUT appears under its name when it is complete.
Error policy: one sentence on stderr and exit code 2.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from env_client.cli import fail, parse

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.policy import PolicyError

__all__ = ["ConvertConfig", "convert", "main"]

PROG = "convert_checkpoint"
DESCRIPTION = """Write an openpi checkpoint (Pi0, Pi0.5) in LeRobot's form:
    convert_checkpoint --from openpi DIR --to lerobot OUT --config-name pi05_libero"""
# `--from openpi DIR` is `--from-openpi DIR`; there is one form on each side.
FORMS = {"--from": "openpi", "--to": "lerobot"}


@dataclass(frozen=True)
class ConvertConfig:
    """What is converted, and where to."""

    # Folder of the openpi checkpoint: it holds model.safetensors or params/, and assets/.
    from_openpi: str
    # Folder of the new LeRobot checkpoint; it must not exist yet.
    to_lerobot: str
    # Training config that made the checkpoint: a name in configs/openpi.yaml, or a yaml file.
    config_name: str | None = None
    # An embodiment in configs/embodiments, or a yaml file; default: the config's.
    embodiment: str | None = None
    # Folder under assets/ whose normalisation stats are used; default: the config's, or the only one.
    asset_id: str | None = None
    # Folder of PaliGemma's tokenizer; default: the one inside the checkpoint, else the local hub cache.
    tokenizer_path: str | None = None
    # Prompt that is used when a request names none; default: the config's.
    prompt: str | None = None


def convert(config: ConvertConfig, report: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the new checkpoint. `report` gets a line for each step. Raises `PolicyError`."""
    source, out = Path(config.from_openpi).expanduser(), Path(config.to_lerobot).expanduser()
    if not source.is_dir():
        raise PolicyError(f"there is no folder {source.absolute()}: an openpi checkpoint was expected")
    if out.exists():
        raise PolicyError(f"{out} exists already: remove it, or name another folder behind --to lerobot")
    from grasp_cube.policies.openpi_checkpoint import read_openpi

    checkpoint = read_openpi(
        PolicyConfig(
            path=str(source.absolute()),
            type="openpi",
            config_name=config.config_name,
            embodiment=config.embodiment,
            asset_id=config.asset_id,
            prompt=config.prompt,
        )
    )
    report(
        f"{source}: {checkpoint.type}, asset id {checkpoint.asset_id}, chunks of {checkpoint.horizon} actions"
    )
    from grasp_cube.policies.openpi_write import write_lerobot

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_lerobot(checkpoint, unfinished, out.absolute(), config.tokenizer_path, report)
        unfinished.chmod(0o755)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = _spelled_out(list(sys.argv[1:] if argv is None else argv))
    config = parse(ConvertConfig, arguments, prog=PROG, description=DESCRIPTION)
    try:
        out = convert(config, lambda line: print(f"✓ {line}", flush=True))
    except PolicyError as error:
        fail(PROG, str(error))
    print(f"Serve it with: serve_policy --policy.path {out}")


def _spelled_out(arguments: list[str]) -> list[str]:
    """`--from openpi DIR` as the flag `--from-openpi DIR`."""
    spelled: list[str] = []
    while arguments:
        token = arguments.pop(0)
        form = FORMS.get(token)
        if form is not None:
            came = arguments.pop(0) if arguments else None
            if came != form:
                fail(PROG, f"{token} {came or ''} was given; `{token} {form} FOLDER` was expected")
            token = f"{token}-{form}"
        spelled.append(token)
    return spelled


if __name__ == "__main__":
    main()
