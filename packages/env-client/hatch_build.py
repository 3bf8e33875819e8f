"""Build hook: what is built carries the checkout's `configs`. A link in the package would do, where links survive a download."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Configs(BuildHookInterface):
    """A source archive has them in their place already."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root)
        configs = package.parents[1] / "configs"
        if version == "editable" or (package / "PKG-INFO").exists() or not configs.is_dir():
            return
        inside = "env_client/configs" if self.target_name == "wheel" else "src/env_client/configs"
        build_data["force_include"][str(configs)] = inside
