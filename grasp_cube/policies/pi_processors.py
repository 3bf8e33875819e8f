"""LeRobot's pre- and postprocessor of Pi0 and Pi0.5 around a tokenizer that lies on this machine.

LeRobot's own factory asks the hub for PaliGemma's tokenizer; the steps here are the same, in openpi's order: relative
actions, normalisation, prompt.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["pi_processors"]


def pi_processors(
    config: Any, stats: Mapping[str, Mapping[str, Any]], tokenizer_name: str, *, state_in_prompt: bool
) -> tuple[Any, Any]:
    """(preprocessor, postprocessor) of a PI0Config or PI05Config.

    `stats` {feature: {mean, std, q01, q99: tensor}}; `tokenizer_name` is the tokenizer's folder; `state_in_prompt` is
    Pi0.5's way: the normalised state is part of the text.
    """
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
    from lerobot.processor import (
        AbsoluteActionsProcessorStep,
        RelativeActionsProcessorStep,
        TokenizerProcessorStep,
        make_default_policy_processor_steps,
        make_policy_processor_pipelines,
    )

    steps = make_default_policy_processor_steps(config, stats)
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    text = (
        Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim)
        if state_in_prompt
        else Pi0NewLineProcessor()
    )
    tokens = TokenizerProcessorStep(
        tokenizer_name=tokenizer_name,
        max_length=config.tokenizer_max_length,
        padding_side="right",
        padding="max_length",
    )
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            relative,
            steps.normalize,
            text,
            tokens,
            steps.to_device,
        ],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative),
            steps.to_cpu,
        ],
    )
