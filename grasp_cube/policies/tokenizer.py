"""The tokenizer of a policy that reads a prompt: found on this machine, never fetched, and checked against the model.

Error policy: `PolicyError` that says where a tokenizer was looked for and where to put one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from grasp_cube.policies.config_files import read_json
from grasp_cube.policies.places import unreadable
from grasp_cube.policies.policy import PolicyError

__all__ = ["PALIGEMMA", "find_tokenizer", "foreign_tokens", "load_tokenizer", "tokenizer_name"]

# The tokenizer that Pi0 and Pi0.5 were trained with, as the hub calls it.
PALIGEMMA = "google/paligemma-3b-pt-224"
# Any of these makes a folder a tokenizer's.
_FILES = ("tokenizer.json", "tokenizer.model")


def find_tokenizer(
    folder: Path,
    given: str | None = None,
    hub_name: str = PALIGEMMA,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """The tokenizer's folder: `folder`/tokenizer, else `given` (--policy.tokenizer_path), else the local hub cache.

    `report` is told which one it is, and when `given` was not needed. Raises `PolicyError` when there is none.
    """
    own = folder / "tokenizer"
    if own.is_dir():
        if not _is_tokenizer(own):
            raise PolicyError(f"{own} holds no {' or '.join(_FILES)}: copy the whole checkpoint folder")
        ignored = "" if given is None else f"; --policy.tokenizer_path {given} is for checkpoints without one"
        report(f"tokenizer: the checkpoint's own{ignored}")
        return own
    if given is not None:
        path = Path(given).expanduser().absolute()
        if path.is_file() and path.name in _FILES:
            path = path.parent
        if not path.is_dir() or not _is_tokenizer(path):
            raise PolicyError(
                f"--policy.tokenizer_path {given} is no tokenizer: a folder that holds {' or '.join(_FILES)} was expected"
            )
        report(f"tokenizer: {path}")
        return path
    cached = _cached(hub_name)
    if cached is not None:
        report(f"tokenizer: {hub_name} from this machine's hub cache")
        return cached
    raise PolicyError(
        f"this policy reads a prompt and its tokenizer is not on this machine: put the files of {hub_name} "
        f"(tokenizer.json, tokenizer_config.json) into {own}, or name their folder with --policy.tokenizer_path; nothing is "
        "ever downloaded here"
    )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a folder. Raises `PolicyError` when its files are damaged."""
    from transformers import AutoTokenizer

    try:
        # B615 is about fetching; this is a folder.
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
            str(path), local_files_only=True, trust_remote_code=False
        )
        tokenizer("a prompt")
    except Exception as error:
        reason = " ".join(str(error).split())
        otherwise = f"the tokenizer in {path} cannot be read ({type(error).__name__}: {reason:.200}): copy its files again"
        causes = [unreadable(file, otherwise) for file in sorted(path.glob("*token*"))]
        raise next((c for c in causes if str(c) != otherwise), PolicyError(otherwise)) from error
    if tokenizer.pad_token_id is None:
        raise PolicyError(
            f"the tokenizer in {path} has no padding token, so prompts cannot be brought to one length: "
            f"the tokenizer of {PALIGEMMA} was expected"
        )
    return tokenizer


def foreign_tokens(tokenizer: Any, vocabulary: int, path: Path) -> tuple[str, ...]:
    """The texts that the tokenizer gives an id which a model of `vocabulary` ids does not know.

    PaliGemma's own tokenizer has a few (its marks for images), which no prompt should hold. Raises `PolicyError` when
    ordinary text could give such an id: then it belongs to another model.
    """
    added = set(tokenizer.get_added_vocab())
    beyond = {text: number for text, number in tokenizer.get_vocab().items() if number >= vocabulary}
    always = [
        getattr(tokenizer, f"{name}_token")
        for name in ("bos", "eos", "pad", "unk")
        if getattr(tokenizer, f"{name}_token_id") is not None
    ]
    wrong = [text for text in beyond if text not in added or text in always]
    if wrong:
        raise PolicyError(
            f"the tokenizer in {path} has ids up to {max(beyond.values())}, but the model knows {vocabulary}: it belongs to "
            "another model, so put the right one there"
        )
    return tuple(sorted(beyond))


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _cached(name: str) -> Path | None:
    """The folder of a tokenizer that the hub's cache on this machine holds."""
    from huggingface_hub import try_to_load_from_cache

    for file in _FILES:
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str) and (Path(found).parent / "tokenizer_config.json").is_file():
            return Path(found).parent
    return None


def tokenizer_name(preprocessor: Path) -> str:
    """The hub's name of the tokenizer that a LeRobot preprocessor was saved with."""
    for step in read_json(preprocessor).get("steps", []):
        if step.get("registry_name") == "tokenizer_processor":
            name = (step.get("config") or {}).get("tokenizer_name")
            # A path of the machine that trained it means nothing here.
            if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")):
                return name
    return PALIGEMMA
