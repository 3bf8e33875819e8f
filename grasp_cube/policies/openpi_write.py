"""An openpi checkpoint in LeRobot's form, on disk.

Error policy: `PolicyError`; what is wrong with names, shapes, statistics or the tokenizer is told before the weights are
written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from grasp_cube.policies.embodiment import NO_BASE, OWN_FILE, Embodiment
from grasp_cube.policies.lerobot_checkpoint import stay_offline
from grasp_cube.policies.lerobot_files import PREPROCESSOR, WEIGHTS
from grasp_cube.policies.openpi_checkpoint import OpenpiCheckpoint
from grasp_cube.policies.openpi_lerobot import lerobot_config, lerobot_processors
from grasp_cube.policies.pi_model import EMBEDDING, check_names, empty_pi
from grasp_cube.policies.tensor_file import write_tensors
from grasp_cube.policies.tokenizer import find_tokenizer, foreign_tokens, load_tokenizer

__all__ = ["embodiment_yaml", "write_lerobot"]

TOKENIZER = "tokenizer"


def write_lerobot(
    checkpoint: OpenpiCheckpoint,
    folder: Path,
    final: Path,
    tokenizer_path: str | None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write LeRobot's form into `folder`, an empty one that will be called `final`. Raises `PolicyError`.

    Everything but the weights is written first, and every tensor's name and shape compared, so that what is wrong is
    told before gigabytes are.
    """
    stay_offline()
    where = str(checkpoint.folder)
    config = lerobot_config(checkpoint)
    names = check_names(empty_pi(config).state_dict(), checkpoint.tensors, where)
    source = find_tokenizer(checkpoint.folder, tokenizer_path, report=report)
    vocabulary = checkpoint.tensors.shape(names[EMBEDDING])[0]
    tokenizer = load_tokenizer(source)
    foreign_tokens(tokenizer, vocabulary, source)
    # Not a copy of the folder: in the hub's cache the whole of PaliGemma may lie beside its tokenizer.
    tokenizer.save_pretrained(str(folder / TOKENIZER))
    for processor in lerobot_processors(checkpoint, config, folder / TOKENIZER):
        processor.save_pretrained(folder)
    _name_tokenizer(folder / PREPROCESSOR, final / TOKENIZER)
    config._save_pretrained(folder)
    (folder / OWN_FILE).write_text(
        embodiment_yaml(checkpoint.embodiment, f"Of the openpi checkpoint {checkpoint.folder.name}."),
        encoding="utf-8",
    )
    # LeRobot's own files hold the word embedding under the name of the head as well, and loading strictly asks for both.
    places = {inner: at for at, inner in enumerate(checkpoint.tensors.keys())}
    ordered = dict(sorted(names.items(), key=lambda pair: places[pair[1]]))
    said = [0]

    def progress(done: int, of: int) -> None:
        tenth = done * 10 // of
        if tenth > said[0] and of > 1e9:
            said[0] = tenth
            report(f"weights: {tenth * 10} % of {of / 1e9:.1f} GB")

    size = write_tensors(folder / WEIGHTS, checkpoint.tensors, ordered, progress)
    report(f"weights: {len(ordered)} tensors, {size / 1e9:.2f} GB, none missing and none left over")


def _name_tokenizer(file: Path, tokenizer: Path) -> None:
    """LeRobot looks for the tokenizer where its file says; our server looks beside it."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for step in values["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = str(tokenizer)
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")


def embodiment_yaml(embodiment: Embodiment, source: str) -> str:
    """The embodiment as the text of a file that stands by itself; `source` says where it came from."""
    settings: dict[str, Any] = {"name": embodiment.name, "base": NO_BASE}
    if embodiment.unit is not None:
        settings["unit"] = embodiment.unit
    if embodiment.fps is not None:
        settings["fps"] = embodiment.fps
    settings["action_names"] = list(embodiment.action_names)
    keys = dict(embodiment.state_keys)
    settings["states"] = [
        {"name": part.name, "size": part.size}
        | ({"keys": list(keys[part.name])} if part.name in keys else {})
        for part in embodiment.states
    ]
    settings["resize"] = embodiment.resize
    settings["image_forms"] = list(embodiment.image_forms)
    settings["cameras"] = {
        camera.name: {
            key: value
            for key, value in (
                ("feature", camera.feature),
                ("resize", camera.resize),
                ("slot", camera.slot),
                ("keys", list(camera.keys)),
                ("optional", camera.optional),
            )
            if value
        }
        for camera in embodiment.cameras
    }
    settings["convert"] = [part.as_setting() for part in embodiment.convert.parts]
    settings["clean_prompt"] = embodiment.clean_prompt
    if embodiment.prompt is not None:
        settings["prompt"] = embodiment.prompt
    return f"# {source}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
