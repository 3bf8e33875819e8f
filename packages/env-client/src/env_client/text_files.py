"""YAML and JSON of anybody's, read so that nothing but `OSError` and `ValueError` comes of it.

Both libraries raise more than their own errors on crafted files: recursion beyond the interpreter's limit, an empty
`!!int`, a date that does not exist. Nothing here makes objects other than plain values.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["is_file_name", "load_json", "load_yaml"]

# YAML is parsed a megabyte a second; what people write has a few kilobytes.
MAX_YAML_BYTES = 1024 * 1024
# Lists and maps in brackets: the parser's time grows with the square of those that are open.
MAX_BRACKETS = 2000
MAX_JSON_BYTES = 256 * 1024 * 1024


def is_file_name(name: str) -> bool:
    """Whether a name of anybody's may be part of a path: it leads nowhere else, and nothing that shows it obeys it."""
    return re.fullmatch(r"[^/\\\x00-\x1f\x7f-\x9f]{1,100}", name) is not None and not name.startswith(".")


def load_yaml(path: Path) -> Any:
    """The value in a YAML (or JSON) file. Raises `OSError`, and `ValueError` with one line that says what is wrong."""
    import yaml

    def parse(text: str) -> Any:
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ValueError(f"more than {MAX_BRACKETS} lists and maps in brackets")
        return yaml.safe_load(text)

    return _load(path, parse, MAX_YAML_BYTES)


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises as `load_yaml`."""
    return _load(path, json.loads, MAX_JSON_BYTES)


def _load(path: Path, parse: Callable[[str], Any], limit: int) -> Any:
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{size} bytes, at most {limit} are read")
    text = path.read_text(encoding="utf-8")
    try:
        return parse(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except MemoryError:
        raise
    except Exception as error:
        # The libraries' errors span lines, and quote what they did not expect.
        raise ValueError(" ".join(f"{error or type(error).__name__}".split())[:300]) from error
