"""The documents keep up with the code: what they quote is said, what they name exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from env_client.check_robot import CheckConfig
from env_client.cli.options import options_of
from env_client.client_config import ALIASES, ClientConfig
from env_client.run_fake_env_client import FakeClientConfig
from processes import ROOT

from grasp_cube import serve_policy

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
FAQ = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
# Between the variable parts of a message, shorter pieces than this say nothing.
SHORTEST = 8


def quoted() -> list[str]:
    """The messages in the symptoms, which stand in bold."""
    symptoms = re.findall(r"^\*\*(.+?)\*\*", FAQ, re.MULTILINE)
    return [message for line in symptoms for message in re.findall(r"`([^`]+)`", line)]


def said() -> str:
    """The text of our sources, with messages that span several lines of code joined."""
    folders = (ROOT / "grasp_cube", ROOT / "packages" / "env-client" / "src")
    text = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def test_the_faq_quotes_what_our_commands_say():
    """Each part of a quoted message between its variable ones stands in the code."""
    source = said()
    parts = [part.strip() for message in quoted() for part in message.split("…")]
    parts = [part for part in parts if len(part) >= SHORTEST]
    assert len(parts) >= 12
    assert [part for part in parts if part not in source] == []


def flags() -> Iterator[str]:
    """Every flag of our commands."""
    for config in (serve_policy.ServeConfig, ClientConfig, CheckConfig, FakeClientConfig):
        for option in options_of(config):
            yield option.flag
    yield from (f"--{alias.replace('_', '-')}" for alias in serve_policy.ALIASES | ALIASES)


def test_the_faq_names_flags_that_exist():
    """What a reader types is understood."""
    named = set(re.findall(r"`(--[a-z][a-z.-]*)", FAQ)) | set(re.findall(r" (--[a-z][a-z.-]*)", FAQ))
    # Of other programs.
    named -= {"--gpus"}
    assert len(named) > 15
    assert sorted(named - set(flags())) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    """Every relative link of a document, and every file of the repository that it names with its folder."""
    text = document.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:configs|examples|packages|benchmarks|grasp_cube)/[\w/.-]+)`", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []
