"""README.md and README.zh-CN.md stay in step: headings, commands, names, links, figures and table rows, in one order.

Both are taken apart into units that do not depend on the language, and compared as `diff` compares lines. A sentence
that is worded anew without a name, a link or a figure in it is not seen here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from processes import ROOT

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"


@dataclass(frozen=True)
class Unit:
    """A heading, a paragraph, a list item, a table row or a line of code."""

    kind: str
    # What a translation keeps: code, link targets, figures.
    marks: frozenset[str]
    line: int

    @property
    def compared(self) -> tuple[str, frozenset[str]]:
        return self.kind, self.marks


def _marks(inlines: list[Token]) -> frozenset[str]:
    found: set[str] = set()
    for token in (child for inline in inlines for child in inline.children or []):
        if token.type == "code_inline":
            found.add(f"`{token.content}`")
        elif token.type == "link_open":
            found.add(f"<{token.attrs['href']}>")
        elif token.type == "text":
            found.update(re.findall(r"\d+(?:[.,:]\d+)*", token.content))
    return frozenset(found)


def _code(token: Token) -> Iterator[Unit]:
    assert token.map is not None
    start = token.map[0] + 1
    yield Unit("code block", frozenset(), start)
    lines = token.content.splitlines()
    # The map of the folders comments on them in a second column.
    comment = r"(?<=\S) {2,}.*" if re.match(r"\S+/ {2,}", lines[0]) else r"(?:^|\s)#.*"
    for number, line in enumerate(lines, start + token.type.startswith("fence")):
        if code := re.sub(comment, "", line).rstrip():
            yield Unit("line of code", frozenset({code}), number)


def units(text: str) -> list[Unit]:
    """A document's units in order; its first line, the link to the other language, is not among them."""
    tokens = MarkdownIt("commonmark").enable("table").parse("\n" + text.partition("\n")[2])
    found: list[Unit] = []
    items = 0
    for at, token in enumerate(tokens):
        if token.type in ("code_block", "fence"):
            found += _code(token)
            continue
        items += {"list_item_open": 1, "list_item_close": -1}.get(token.type, 0)
        if token.type == "heading_open":
            kind = f"heading {token.markup}"
        elif token.type == "paragraph_open":
            kind = "list item" if items else "paragraph"
        elif token.type == "tr_open":
            kind = "table row"
        else:
            continue
        assert token.map is not None
        end = next(
            i for i in range(at, len(tokens)) if tokens[i].type == token.type.replace("_open", "_close")
        )
        inlines = [inner for inner in tokens[at:end] if inner.type == "inline"]
        found.append(Unit(kind, _marks(inlines), token.map[0] + 1))
    return found


def differences(english: str, chinese: str) -> list[str]:
    """What one README has and the other lacks, a line for each unit; empty when they are in step."""
    ours, theirs = units(english), units(chinese)
    matcher = SequenceMatcher(None, [u.compared for u in ours], [u.compared for u in theirs], autojunk=False)
    said: list[str] = []
    for _, i, i_end, j, j_end in (op for op in matcher.get_opcodes() if op[0] != "equal"):
        left, right = ours[i:i_end], theirs[j:j_end]
        if [u.kind for u in left] == [u.kind for u in right]:
            said += [_difference(a, b) for a, b in zip(left, right, strict=True)]
            continue
        for unit in left:
            said.append(_alone(unit, ENGLISH, CHINESE, theirs[j].line if j < len(theirs) else None))
        for unit in right:
            said.append(_alone(unit, CHINESE, ENGLISH, ours[i].line if i < len(ours) else None))
    return said


def _difference(a: Unit, b: Unit) -> str:
    only = [
        f"only in {name}: {', '.join(sorted(marks))}"
        for name, marks in ((ENGLISH, a.marks - b.marks), (CHINESE, b.marks - a.marks))
        if marks
    ]
    return f"{a.kind}, {ENGLISH}:{a.line} and {CHINESE}:{b.line}: {'; '.join(only)}"


def _alone(unit: Unit, name: str, other: str, before: int | None) -> str:
    place = "at the end" if before is None else f"before line {before}"
    marks = f" with {', '.join(sorted(unit.marks))}" if unit.marks else ""
    return f"{unit.kind}, {name}:{unit.line}{marks}: {other} has none {place}"


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_both_readmes_are_in_step() -> None:
    found = differences(_read(ENGLISH), _read(CHINESE))
    assert not found, "the READMEs differ:\n" + "\n".join(found)


@pytest.mark.parametrize(("name", "other"), [(ENGLISH, CHINESE), (CHINESE, ENGLISH)])
def test_the_first_line_links_to_the_other_language(name: str, other: str) -> None:
    first = _read(name).partition("\n")[0]
    assert first.endswith(f"]({other})"), (
        f"the first line of {name} is {first!r}, a link to {other} was expected"
    )


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_emphasis_is_rendered(name: str) -> None:
    """`**` between a Chinese full stop and a letter is no emphasis to CommonMark: the asterisks would be seen."""
    inlines = (
        token for token in MarkdownIt("commonmark").enable("table").parse(_read(name)) if token.children
    )
    seen = [child.content for token in inlines for child in token.children or [] if child.type == "text"]
    assert not [text for text in seen if "**" in text]


DOCUMENT = """[other](other.md)

# Name

Runs at 4.8 GB with `--flag`, see <http://localhost:9000>.

    uv run demo --keep      # a comment

- One item.

| what | do |
|---|---|
| a | `b \\| c` |
| d | no code |

    folder/          what is in it
      file.py          a command

## Last
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## Last", "### Last", ["heading ###, README.md:19", "heading ##, README.zh-CN.md:19"]),
        (
            "## Last\n",
            "## Last\n\n## New\n",
            ["heading ##, README.md:21: README.zh-CN.md has none at the end"],
        ),
        (
            "# Name\n",
            "# Name\n\nA new paragraph.\n",
            ["paragraph, README.md:5: README.zh-CN.md has none before line 5"],
        ),
        (
            "- One item.\n",
            "- One item.\n- A `second`.\n",
            ["list item, README.md:10 with `second`: README.zh-CN.md has none before line 11"],
        ),
        (
            "4.8 GB",
            "4.9 GB",
            ["paragraph, README.md:5 and README.zh-CN.md:5: only in README.md: 4.9; only in"],
        ),
        ("`--flag`", "`--other`", ["only in README.md: `--other`; only in README.zh-CN.md: `--flag`"]),
        (":9000>", ":9001>", ["only in README.md: 9001, <http://localhost:9001>"]),
        (
            "demo --keep",
            "demo",
            ["line of code, README.md:7 and README.zh-CN.md:7: only in README.md: uv run demo;"],
        ),
        (
            "a comment\n",
            "a comment\n    ls\n",
            ["line of code, README.md:8 with ls: README.zh-CN.md has none"],
        ),
        ("| d | no code |\n", "", ["table row, README.zh-CN.md:14: README.md has none before line 15"]),
        (
            "`b \\| c`",
            "b",
            ["table row, README.md:13 and README.zh-CN.md:13: only in README.zh-CN.md: `b | c`"],
        ),
        ("  file.py ", "  other.py ", ["only in README.md:   other.py; only in README.zh-CN.md:   file.py"]),
    ],
)
def test_a_change_that_is_not_carried_over_is_named(old: str, new: str, said: list[str]) -> None:
    changed = DOCUMENT.replace(old, new)
    assert changed != DOCUMENT
    found = differences(changed, DOCUMENT)
    assert len(found) == len(said)
    for line, expected in zip(found, said, strict=True):
        assert expected in line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# 注释"),
        ("what is in it", "里面是什么"),
        ("One item", "一项"),
        ("[other](other.md)", "[b](b)"),
    ],
)
def test_what_a_translation_changes_is_no_difference(old: str, new: str) -> None:
    assert differences(DOCUMENT.replace(old, new), DOCUMENT) == []


def test_a_paragraph_added_to_the_readme_is_named() -> None:
    """The README's own text, doctored before its middle heading."""
    english = _read(ENGLISH)
    headings = [m.start() for m in re.finditer(r"^#+ ", english, re.MULTILINE)]
    middle = headings[len(headings) // 2]
    changed = f"{english[:middle]}New: `--new-flag`.\n\n{english[middle:]}"
    line = english[:middle].count("\n") + 1
    named = f"paragraph, {ENGLISH}:{line} with `--new-flag`: {CHINESE} has none before line"
    assert [said for said in differences(changed, _read(CHINESE)) if said.startswith(named)]
