"""Text of somebody else's on a terminal or in a log: one line, and nothing that a terminal obeys."""

import re

__all__ = ["one_line"]

# Control characters (C0, DEL, C1), line and paragraph separators, those that turn the direction of writing, and halves
# of a character, which nothing can write.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """The text with each such character written out, as in a string literal: `\\n`, `\\x1b`."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
