"""Pi0 and Pi0.5 in a size that loads and answers in a moment, for tests, demonstrations and dry runs.

LeRobot fixes the sizes of its towers in code, so a small one is a config and a policy of its own: they build smaller
towers, and every line that computes, trains, loads or saves is LeRobot's. `type` in the checkpoint's config.json is
tiny_pi0 or tiny_pi05. `grasp_cube.tiny_checkpoint` makes such a checkpoint.
Importing this module imports LeRobot and registers the two types with it.
"""

from dataclasses import dataclass
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn
from transformers.models.auto import CONFIG_MAPPING

__all__ = [
    "TINY_POLICIES",
    "VOCABULARY",
    "TinyPI0Config",
    "TinyPI0Policy",
    "TinyPI05Config",
    "TinyPI05Policy",
]

# Token ids.
VOCABULARY = 512

_WIDTH = 64
# LeRobot's training path counts on 8 heads.
_GEMMA = {
    "hidden_size": _WIDTH,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "hidden_activation": "gelu_pytorch_tanh",
    "dtype": "float32",
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "patch_size": 28,
    "projection_dim": _WIDTH,
    "projector_hidden_act": "gelu_fast",
    "dtype": "float32",
}


@PreTrainedConfig.register_subclass("tiny_pi0")
@dataclass
class TinyPI0Config(PI0Config):
    """Pi0's config; the variants of its towers have no meaning."""


@PreTrainedConfig.register_subclass("tiny_pi05")
@dataclass
class TinyPI05Config(PI05Config):
    """Pi0.5's config; the variants of its towers have no meaning."""


class _TinyTowers:
    """The constructor of LeRobot's two towers, with the sizes above."""

    def __init__(self, *, adaptive_norms: bool, precision: Any, image_size: int):
        nn.Module.__init__(self)
        self.freeze_vision_encoder = self.train_expert_only = False
        language = CONFIG_MAPPING["paligemma"]()
        language._vocab_size = language.image_token_index = VOCABULARY
        language.text_config.update(_GEMMA | {"use_adarms": False, "adarms_cond_dim": None})
        language.vision_config.update(_VISION | {"image_size": image_size})
        width = _WIDTH if adaptive_norms else None
        expert = CONFIG_MAPPING["gemma"](**_GEMMA, use_adarms=adaptive_norms, adarms_cond_dim=width)
        self.paligemma = modeling_pi0.PaliGemmaForConditionalGenerationWithPiGemma(config=language)
        self.gemma_expert = modeling_pi0.PiGemmaForCausalLM(config=expert)
        self.gemma_expert.model.embed_tokens = None
        self.to_bfloat16_for_selected_params(precision)  # type: ignore[attr-defined]
        self._set_requires_grad()  # type: ignore[attr-defined]


class _TinyPI0Towers(_TinyTowers, modeling_pi0.PaliGemmaWithExpertModel):
    pass


class _TinyPI05Towers(_TinyTowers, modeling_pi05.PaliGemmaWithExpertModel):
    pass


class _TinyPI0Model(modeling_pi0.PI0Pytorch):
    def __init__(self, config: TinyPI0Config, rtc_processor: Any = None):
        nn.Module.__init__(self)
        self.config, self.rtc_processor = config, rtc_processor
        self.paligemma_with_expert = _TinyPI0Towers(
            adaptive_norms=False, precision=config.dtype, image_size=config.image_resolution[0]
        )
        self.action_in_proj = nn.Linear(config.max_action_dim, _WIDTH)
        self.action_out_proj = nn.Linear(_WIDTH, config.max_action_dim)
        self.state_proj = nn.Linear(config.max_state_dim, _WIDTH)
        self.action_time_mlp_in = nn.Linear(2 * _WIDTH, _WIDTH)
        self.action_time_mlp_out = nn.Linear(_WIDTH, _WIDTH)
        self.gradient_checkpointing_enabled = False


class _TinyPI05Model(modeling_pi05.PI05Pytorch):
    def __init__(self, config: TinyPI05Config, rtc_processor: Any = None):
        nn.Module.__init__(self)
        self.config, self.rtc_processor = config, rtc_processor
        self.paligemma_with_expert = _TinyPI05Towers(
            adaptive_norms=True, precision=config.dtype, image_size=config.image_resolution[0]
        )
        self.action_in_proj = nn.Linear(config.max_action_dim, _WIDTH)
        self.action_out_proj = nn.Linear(_WIDTH, config.max_action_dim)
        self.time_mlp_in = nn.Linear(_WIDTH, _WIDTH)
        self.time_mlp_out = nn.Linear(_WIDTH, _WIDTH)
        self.gradient_checkpointing_enabled = False


class TinyPI0Policy(modeling_pi0.PI0Policy):
    """LeRobot's PI0Policy around small towers."""

    config_class = TinyPI0Config
    name = "tiny_pi0"

    def __init__(self, config: TinyPI0Config, **_: Any):
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.init_rtc_processor()
        self.model = _TinyPI0Model(config, self.rtc_processor)
        self.model.to(config.device)
        self.reset()


class TinyPI05Policy(modeling_pi05.PI05Policy):
    """LeRobot's PI05Policy around small towers."""

    config_class = TinyPI05Config
    name = "tiny_pi05"

    def __init__(self, config: TinyPI05Config, **_: Any):
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.init_rtc_processor()
        self.model = _TinyPI05Model(config, self.rtc_processor)
        self.model.to(config.device)
        self.reset()


TINY_POLICIES: dict[Any, Any] = {TinyPI0Config: TinyPI0Policy, TinyPI05Config: TinyPI05Policy}
