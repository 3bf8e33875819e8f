"""The mark of tests that render: skipped where nothing draws off-screen, unless that is forbidden as in CI."""

import os

import pytest
from virtual_so101.gl import PACKAGES, gl_backend

__all__ = ["needs_gl"]

needs_gl = pytest.mark.skipif(
    gl_backend() is None and os.environ.get("GRASP_CUBE_REQUIRE_GL") != "1", reason=PACKAGES
)
