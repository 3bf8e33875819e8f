"""Where config files are looked for, on both sides of the wire."""

from pathlib import Path

__all__ = ["config_folders"]


def config_folders() -> tuple[Path, ...]:
    """First `./configs`, what the user edits, then the defaults that the package carries.

    In a checkout these are the same files: the package's folder is a link to the root's `configs`, and wheels hold
    what it points to.
    """
    return Path("configs"), (Path(__file__).parent / "configs").resolve()
