"""The mark of tests that drive Chromium: skipped where there is none, unless that is forbidden as in CI."""

import os
from pathlib import Path

import pytest

__all__ = ["ARGUMENTS", "CHROMIUM", "needs_browser"]

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_browser = pytest.mark.skipif(
    not CHROMIUM.exists() and os.environ.get("GRASP_CUBE_REQUIRE_BROWSER") != "1",
    reason="/usr/bin/chromium is not there (Debian: apt-get install chromium)",
)
