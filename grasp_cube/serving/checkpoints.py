"""A checkpoint's folder as the server sees it: may a client name it, how large is it, is it still the same.

Error policy: `InvalidInput` for a path that a client must not name, `PolicyError` for a folder that is none. Both are
sentences that may travel: they name what the client named, never what lies outside the root.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from env_client.wire import InvalidInput

from grasp_cube.policies.places import remote_hint
from grasp_cube.policies.policy import PolicyError

__all__ = ["allowed_folder", "fingerprint", "size_on_disk"]

# Formats that run code when they are read.
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
WEIGHTS = ".safetensors"
# Folders of weights in another format (openpi's JAX checkpoints).
OTHER_WEIGHTS = ("params",)
# Of each file so much is looked at, from its beginning and from its end, to tell two checkpoints apart.
GLANCE = 64 * 1024
# More files than any checkpoint has; a folder with more is something else.
MAX_FILES = 20_000


def allowed_folder(path: str, root: Path) -> Path:
    """The real folder that a client's `path` names: below `root`, without a pickle. Raises `InvalidInput`."""
    given = Path(path)
    if ".." in given.parts:
        raise InvalidInput(
            f"the path {path!r:.200} holds '..'; a folder below the server's root was expected"
        )
    root = root.resolve()
    try:
        folder = (given if given.is_absolute() else root / given).resolve(strict=True)
        outside = not folder.is_relative_to(root)
    except (OSError, RuntimeError):
        # A loop of links raises as well. Whether something is there outside the root is nobody's business.
        named = given if given.is_absolute() else root / given
        outside = not Path(os.path.abspath(named)).is_relative_to(root)
        if not outside:
            if "://" in path and (remote := remote_hint(path)) is not None:
                raise InvalidInput(f"{path!r:.200} is not on the server: {remote:.400}") from None
            raise InvalidInput(
                f"there is no checkpoint at {path!r:.200} on the server: a folder below its root was expected"
            ) from None
    if outside:
        raise InvalidInput(
            f"the path {path!r:.200} lies outside the server's root: move the checkpoint there, or start the server "
            "with --policy.root"
        )
    if folder.suffix in PICKLES:
        raise InvalidInput(
            f"{path!r:.200} is a pickle, which runs code when it is read: safetensors were expected"
        )
    if not folder.is_dir():
        raise InvalidInput(f"{path!r:.200} is a file; the folder that holds config.json was expected")
    _check_files(folder, root, path)
    return folder


def _check_files(folder: Path, root: Path, path: str) -> None:
    pickles = []
    for file in _files(folder):
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise InvalidInput(f"{file.name} in {path!r:.200} is a link out of the server's root")
        if file.suffix in PICKLES:
            pickles.append(file.name)
        if file.suffix == WEIGHTS and not _is_safetensors(file):
            raise InvalidInput(f"{file.name} in {path!r:.200} is no safetensors file, whatever its name says")
    has_weights = any(folder.rglob(f"*{WEIGHTS}")) or any((folder / name).is_dir() for name in OTHER_WEIGHTS)
    if pickles and not has_weights:
        raise InvalidInput(
            f"{path!r:.200} holds {pickles[0]}, a pickle, which runs code when it is read: safetensors were expected"
        )


def _is_safetensors(file: Path) -> bool:
    """Whether a file begins as one: the length of a JSON header, and the header."""
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
        return (
            len(head) == 9
            and head[8:] == b"{"
            and int.from_bytes(head[:8], "little") <= file.stat().st_size - 8
        )
    except OSError:
        return False


def _files(folder: Path) -> Iterator[Path]:
    """Every file below the folder, links to folders not followed."""
    count = 0
    for at, folders, names in os.walk(folder):
        folders.sort()
        # os.walk lists links to folders among the folders, and does not enter them.
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        for name in sorted([*names, *links]):
            count += 1
            if count > MAX_FILES:
                raise PolicyError(
                    f"{folder} holds more than {MAX_FILES} files: is this the checkpoint's own folder?"
                )
            yield Path(at) / name


def size_on_disk(folder: Path) -> int:
    """Bytes of the weights, which is about what they take in memory; of everything, where none are known."""
    files = [file for file in _files(folder) if file.is_file()]
    weights = [file for file in files if file.suffix == WEIGHTS]
    for name in OTHER_WEIGHTS:
        weights += [file for file in files if (folder / name) in file.parents]
    return sum(file.stat().st_size for file in weights or files)


def fingerprint(folder: Path) -> str:
    """What tells this checkpoint from others: equal copies on two machines have equal ones. 16 hex digits."""
    digest = hashlib.sha256()
    for file in _files(folder):
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
        # Whoever needs a file that cannot be read says so when it is loaded.
        with contextlib.suppress(OSError), file.open("rb") as stream:
            digest.update(stream.read(GLANCE))
            stream.seek(max(GLANCE, size - GLANCE))
            digest.update(stream.read(GLANCE))
    return digest.hexdigest()[:16]
