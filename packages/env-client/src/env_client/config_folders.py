"""Where config files are looked for, on both sides of the wire."""

from pathlib import Path

__all__ = ["config_folders"]


def config_folders() -> tuple[Path, ...]:
    """First `./configs`, what the user edits, then the defaults: those that the package carries, in a checkout its own."""
    carried = Path(__file__).parent / "configs"
    return Path("configs"), carried if carried.is_dir() else Path(__file__).parents[4] / "configs"
