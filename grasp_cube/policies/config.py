"""What the command line may say about a policy (`--policy.*`). Light: importing it loads no torch."""

from dataclasses import dataclass

__all__ = ["DTYPES", "NOISE_SCHEDULERS", "OPTIMIZE", "RTC_MODES", "PolicyConfig"]

NOISE_SCHEDULERS = ("DDPM", "DDIM")
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZE = ("auto", "none")
RTC_MODES = ("guided", "prefix")


@dataclass(frozen=True)
class PolicyConfig:
    """Which checkpoint is served, and what is changed about it. None leaves a value to the checkpoint."""

    # Folder of the checkpoint, the one that holds config.json; default: the task's own checkpoint.
    path: str | None = None
    # A task in configs/tasks (lift, sort, stack, or a yaml file): prompt, embodiment and the expected action dimension.
    task: str | None = None
    # Policy family; default: the type in the checkpoint's config.json.
    type: str | None = None
    # Name of the training configuration, for checkpoints that need one (openpi's, such as pi05_droid).
    config_name: str | None = None
    # Folder under an openpi checkpoint's assets/ whose normalisation stats are used; default: the config's, or the only one.
    asset_id: str | None = None
    # Name under which clients see this policy; default: the run's name in the folder's path.
    name: str | None = None
    # cpu, cuda, cuda:N or mps; default: cuda where there is one, else mps, else cpu.
    device: str | None = None
    # Arithmetic of the weights: float32, bfloat16 or float16 (not Pi); default: the checkpoint's, float32 for ACT and Diffusion.
    dtype: str | None = None
    # An embodiment in configs/embodiments (so101, bi_so101, or a yaml file); default: the checkpoint's, the task's, or by state size.
    embodiment: str | None = None
    # Unit of states and actions (normalized, degrees, rad); default: the embodiment's.
    unit: str | None = None
    # How a camera image of another size is fitted: none, stretch, pad, crop or openpi; default: the embodiment's rule.
    resize: str | None = None
    # Prompt that is used when a request names none; default: the task's.
    prompt: str | None = None
    # Denoising steps of one inference (Diffusion, Pi0, Pi0.5).
    num_inference_steps: int | None = None
    # Actions in one chunk; at most what the checkpoint predicts.
    n_action_steps: int | None = None
    # Noise scheduler of a Diffusion checkpoint: DDPM or DDIM.
    noise_scheduler: str | None = None
    # Seed of each request's noise, so that equal requests get equal answers; default: fresh noise for each.
    noise_seed: int | None = None
    # Speed-ups: auto keeps answers within the tolerance in docs/speed.md, none is LeRobot's own arithmetic.
    optimize: str = "auto"
    # Folder of the tokenizer, for a checkpoint of a policy that reads a prompt and has none of its own (FOLDER/tokenizer).
    tokenizer_path: str | None = None
    # How Pi0 and Pi0.5 continue their last chunk (real-time chunking): guided pulls softly, as LeRobot does; prefix holds the actions on their way exactly.
    rtc: str | None = None
