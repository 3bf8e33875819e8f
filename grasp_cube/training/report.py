"""What a finished run says about itself: on the terminal, in `training.json` and in the checkpoint's README."""

import json
from pathlib import Path
from typing import Any

__all__ = ["command_line", "summary", "write_report"]

# The command that makes the checkpoint again does not depend on how far one run of it had come.
_NOT_REPEATED = {"resume", "save_every", "threads"}


def summary(out: Path, report: dict[str, Any]) -> str:
    """The run in a few lines."""
    steps, size = report["config"]["steps"], (out / "model.safetensors").stat().st_size / 1e6
    lines = [f"{out}: {steps} steps, loss {report['loss']:.4f}, weights {size:.1f} MB"]
    if "error" in report:
        held_out = report["config"]["eval_dataset"]
        lines.append(f"mean absolute error on {held_out}, in units of the recording:")
        lines += [f"  {name:20s} {value:7.2f}" for name, value in _error_rows(report)]
        drift = report["error"]["half_precision"]
        lines.append(f"half precision changed an action by at most {drift:.4f}")
    return "\n".join(lines)


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Writes `training.json`, and a README.md with the same facts as sentences."""
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    config = report["config"]
    size = (out / "model.safetensors").stat().st_size / 1e6
    begun = f"the weights of `{config['start_from']}`" if config["start_from"] else "random weights"
    text = [
        f"# {out.name}",
        "",
        f"A small {config['type']} checkpoint for LeRobot 0.6.1, trained from {begun} for "
        f"{config['steps']} steps of {config['batch_size']} samples on the {report['frames']} frames "
        f"({report['episodes']} episodes) of `{config['dataset']}`. Images are {config['image_size']} "
        f"({config['resize']}), states and actions in the unit `{config['unit'] or 'that the dataset has'}`. "
        f"The weights are stored in half precision ({size:.1f} MB); loading makes them float32.",
        "",
        "Made by",
        "",
        f"    {command_line(config)}",
        "",
        f"The mean loss of the last 100 steps was {report['loss']:.4f} (normalised):",
        "",
        "![The loss of every step](loss.png)",
    ]
    if "error" in report:
        text += [
            "",
            f"Replayed against the held-out episodes of `{config['eval_dataset']}`, one chunk after the other: the "
            "policy sees the recorded observation at the start of each chunk, and every action is compared with "
            "the one recorded for its tick. Mean absolute error, in units of the recording:",
            "",
            "| joint | error |",
            "|---|---|",
            *(f"| {name} | {value:.2f} |" for name, value in _error_rows(report)),
            "",
            f"Half precision changed an action by at most {report['error']['half_precision']:.4f}.",
        ]
    (out / "README.md").write_text("\n".join(text) + "\n")


def command_line(config: dict[str, Any]) -> str:
    """The command that makes the checkpoint again, with the options that are not the defaults."""
    from grasp_cube.training.train import TrainConfig

    usual = vars(TrainConfig(dataset="", out=""))
    words = ["uv run train_checkpoint"]
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        if name in _NOT_REPEATED or (value == usual[name] and name != "steps"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words.append(f"{flag} {value!r}" if " " in str(value) else f"{flag} {value}")
    return " ".join(words)


def _error_rows(report: dict[str, Any]) -> list[tuple[str, float]]:
    error = report["error"]
    return [
        *error["joints"].items(),
        ("all", error["all"]),
        ("holding the pose instead", error["holding_still"]),
    ]
