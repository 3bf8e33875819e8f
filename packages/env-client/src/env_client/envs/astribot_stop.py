"""Stopping an S1 whose control process is dead: the SDK in a process of its own, the control rights, `stop_robot`.

`stop` is what the supervisor calls. The SDK may ask on the keyboard, hang, or mute the process that imports it, so
that happens in a child with a time limit: `python -m env_client.envs.astribot_stop SDK_PATH`.
"""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["main", "stop"]


def stop(sdk_path: str | None, *, environment: dict[str, str] | None = None, limit_s: float = 20.0) -> str:
    """Stop the robot; what was reached, as a sentence. Raises `RuntimeError` with the reason when it was not.

    `environment`: variables by which the SDK finds the robot.
    """
    command = [sys.executable, "-m", "env_client.envs.astribot_stop", sdk_path or ""]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            env=os.environ | (environment or {}),
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the SDK did not stop the robot within {limit_s:g} s") from None
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        raise RuntimeError(said[-1] if said else f"the SDK ended with code {done.returncode}")
    return said[-1] if said else "the robot was stopped"


def main() -> None:
    """The child."""
    from env_client.envs.astribot_sdk import answered, construct, import_sdk
    from env_client.envs.env import EnvError

    try:
        # The dead process may still count as the one with the rights.
        sdk = construct(import_sdk(sys.argv[1] or None), freq=250.0, high_control_rights=True)
        answered(sdk.stop_robot(), "stop_robot")
    except EnvError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print("the robot was stopped and stands", flush=True)


if __name__ == "__main__":
    main()
