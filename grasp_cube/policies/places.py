"""Where a checkpoint lies, what it is called, and why its files cannot be read.

Error policy: `PolicyError`, one sentence with the true cause and the command that cures it. Nothing is ever fetched.
"""

import os
import re
from pathlib import Path

from grasp_cube.policies.policy import PolicyError

__all__ = ["access_problem", "checkpoint_name", "hub_snapshot", "other_form", "remote_hint", "unreadable"]

# Folders that training makes inside a run; an openpi or LeRobot step is a number.
_INSIDE_A_RUN = {"pretrained_model", "checkpoints", "last", "snapshots"}
_HUB_ID = re.compile(
    r"(?:(?:https?://)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)?([\w-][\w.-]*/[\w-][\w.-]*)(?:/tree/[^/]+|@[^/]+)?/?"
)
_LFS = b"version https://git-lfs.github.com/spec/"


def checkpoint_name(folder: Path | str, *, with_step: bool = False) -> str:
    """The run's name of a checkpoint folder: RUN for RUN/checkpoints/050000/pretrained_model, `name` for
    models--org--name/snapshots/HASH of the hub's cache; `with_step`: RUN-050000, where the path has a step."""
    absolute = Path(os.path.abspath(folder))
    for path in (absolute, Path(os.path.realpath(absolute))):
        step = ""
        for part in (path, *path.parents):
            if part.parent.name == "snapshots" and part.parent.parent.name.startswith("models--"):
                return part.parent.parent.name.rpartition("--")[2]
            inside = part.name in _INSIDE_A_RUN or part.name.isdecimal()
            if part.name and not inside:
                return f"{part.name}-{step}" if with_step and step else part.name
            if part.name.isdecimal() or part.name == "last":
                step = step or part.name
    return absolute.name or "policy"


def hub_snapshot(path: str) -> Path | None:
    """The folder of a hub id or hub URL in the local cache (HF_HUB_CACHE, HF_HOME); None: it is not there."""
    found = _HUB_ID.fullmatch(path)
    if found is None:
        return None
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / f"models--{found[1].replace('/', '--')}"
    try:
        commit = (place / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = place / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def remote_hint(path: str) -> str | None:
    """How a checkpoint is brought here from a URL or the Hugging Face hub; None: it is of neither."""
    name = path.rstrip("/").rpartition("/")[2]
    copies = {"gs://": "gcloud storage cp -r", "s3://": "aws s3 cp --recursive"}
    for scheme, command in copies.items():
        if path.startswith(scheme):
            return f"bring it here with `{command} {path} checkpoints/{name}` and name that folder"
    found = _HUB_ID.fullmatch(path)
    if found is not None and found[1].partition("/")[0] not in ("checkpoints", "outputs", "datasets"):
        name = found[1].partition("/")[2]
        return (
            f"a model of the Hugging Face hub is brought here with `hf download {found[1]} --local-dir checkpoints/{name}`, "
            f"and then named as checkpoints/{name}"
        )
    if "://" in path:
        return "download the whole checkpoint folder first and name the folder"
    return None


def access_problem(path: Path) -> str | None:
    """The first folder on the way, or the file itself, that this user may not use, as a sentence; None: none."""
    for part in (*reversed(path.parents), path):
        try:
            details = part.stat()
        except OSError:
            return None
        read = os.R_OK if part == path else 0
        if not os.access(part, (os.X_OK if part.is_dir() else 0) | read, effective_ids=True):
            change = f"-R a+rX {part}" if part == path else f"a+x {part}"
            return (
                f"{part} may not be read by this user (user id {os.geteuid()}; it belongs to {details.st_uid}, mode "
                f"{details.st_mode & 0o7777:04o}): run `sudo chmod {change}`, or start the server as its owner"
            )
    return None


def unreadable(file: Path, otherwise: str) -> PolicyError:
    """The true cause why a file could not be read; `otherwise`: the sentence where its content is at fault."""
    try:
        if file.is_symlink() and not file.exists():
            return PolicyError(
                f"{file} is a link to {os.readlink(file)}, which is not there: copy the checkpoint with what its links "
                "point to (`cp -rL`), or download it again"
            )
        if file.is_dir():
            return PolicyError(f"{file} is a folder; a file was expected: copy the checkpoint again")
        with file.open("rb") as stream:
            head = stream.read(200)
    except PermissionError:
        return PolicyError(
            access_problem(file) or f"{file} may not be read by this user: change its permissions"
        )
    except OSError as error:
        return PolicyError(
            f"{file} cannot be read ({error.strerror or error}): the disk or the network folder failed, so look there "
            "first, and copy the checkpoint to a local disk"
        )
    if head.startswith(_LFS):
        return PolicyError(
            f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull` in {file.parent}"
        )
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return PolicyError(f"{file} is a web page and not the file itself: download it with `hf download`")
    return PolicyError(otherwise)


def other_form(folder: Path) -> str | None:
    """What a folder without model.safetensors holds instead, and its cure; None: nothing known."""
    if (folder / "adapter_config.json").exists() or (folder / "adapter_model.safetensors").exists():
        return (
            f"{folder} holds a LoRA adapter (adapter_model.safetensors), not a whole policy: merge it into the policy that "
            "it was trained on, in Python with peft: `PeftModel.from_pretrained(base_policy, FOLDER).merge_and_unload()"
            ".save_pretrained(MERGED)`, copy FOLDER's policy_*processor files to MERGED, and serve MERGED"
        )
    if any(folder.glob("*.safetensors.index.json")):
        return (
            f"{folder} holds its weights in several files (model.safetensors.index.json); one model.safetensors was "
            "expected: load them with safetensors, one after the other, and save them as one file"
        )
    if any(folder.glob("*.onnx")):
        return f"{folder} holds an ONNX export, which is not served: name the checkpoint that it was exported from"
    return None
