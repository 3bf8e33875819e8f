"""For all tests: torch's threads sleep instead of spinning, as under `serve_policy`; set before torch is imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
