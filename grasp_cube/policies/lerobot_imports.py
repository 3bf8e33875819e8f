"""What a checkpoint needs of LeRobot, without what it does not: half of a server's start is imports.

`import lerobot.policies.act` runs the body of `lerobot.policies` first, which imports the configuration of each of twenty
families, and with them diffusers, datasets and pandas. Here that body waits until somebody asks the package for one of the
names that it defines; its modules are found as ever. Nothing changes but the time at which the body runs.
"""

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

__all__ = ["RENAMED_STEPS", "know_old_steps", "load_processors", "model_class", "new_processors"]

PACKAGE = "lerobot.policies"
# {a processor step's name in an older release: its name now}, from LeRobot 0.3 to 0.6.1; their settings are the same.
RENAMED_STEPS = {
    "delta_actions_processor": "relative_actions_processor",
    "rename_processor": "rename_observations_processor",
}
MODEL_CLASSES = {"act": "ACTPolicy", "diffusion": "DiffusionPolicy"}

_once = threading.RLock()


class _LazyPackage(ModuleType):
    """A package whose body runs when a name is asked for that no module of it has set."""

    def __getattr__(self, name: str) -> Any:
        # The import system looks for such names on every module.
        if name.startswith("__"):
            raise AttributeError(name)
        with _once:
            if type(self) is _LazyPackage:
                self.__class__ = ModuleType  # type: ignore[assignment]
                spec = self.__spec__
                assert spec is not None
                assert spec.loader is not None
                spec.loader.exec_module(self)
        return getattr(self, name)


def model_class(kind: str) -> Any:
    """LeRobot's class for an "act" or "diffusion" policy, whose configuration is registered then."""
    _let_the_package_wait()
    return getattr(importlib.import_module(f"{PACKAGE}.{kind}"), MODEL_CLASSES[kind])


def know_old_steps() -> None:
    """Let LeRobot find its processor steps under the names of older releases as well."""
    from lerobot.processor import ProcessorStepRegistry

    for before, now in RENAMED_STEPS.items():
        ProcessorStepRegistry._registry.setdefault(before, ProcessorStepRegistry.get(now))


def new_processors(config: Any, stats: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """The pre- and the postprocessor that LeRobot makes for a config and statistics {feature: {mean: array, …}}."""
    import torch

    tensors = {
        name: {stat: torch.from_numpy(value) for stat, value in values.items()}
        for name, values in stats.items()
    }
    module = importlib.import_module(f"{PACKAGE}.{config.type}.processor_{config.type}")
    return getattr(module, f"make_{config.type}_pre_post_processors")(config, dataset_stats=tensors)


def load_processors(
    config: Any, folder: str, files: tuple[str, str], overrides: tuple[dict, dict]
) -> tuple[Any, Any]:
    """The pre- and the postprocessor saved in `folder` under the names `files`, as LeRobot's factory loads them."""
    know_old_steps()
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor.converters import (
        batch_to_transition,
        policy_action_to_transition,
        transition_to_batch,
        transition_to_policy_action,
    )

    before = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename=files[0],
        overrides=overrides[0],
        to_transition=batch_to_transition,
        to_output=transition_to_batch,
    )
    after = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename=files[1],
        overrides=overrides[1],
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    if any("Relative" in type(step).__name__ for step in before.steps):
        # Steps of the two that must know each other: only the factory brings them together.
        from lerobot.policies.factory import make_pre_post_processors

        return make_pre_post_processors(
            config,
            pretrained_path=folder,
            preprocessor_overrides=overrides[0],
            postprocessor_overrides=overrides[1],
            preprocessor_config_filename=files[0],
            postprocessor_config_filename=files[1],
        )
    return before, after


def _let_the_package_wait() -> None:
    with _once:
        if PACKAGE in sys.modules:
            return
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None:
            raise ImportError(f"{PACKAGE} is not installed")
        package = _LazyPackage(PACKAGE)
        package.__spec__, package.__file__ = spec, spec.origin
        package.__loader__, package.__package__ = spec.loader, PACKAGE
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[PACKAGE] = package
        sys.modules["lerobot"].policies = package  # type: ignore[attr-defined]
