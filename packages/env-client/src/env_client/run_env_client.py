"""`run_env_client`: drive a robot with a policy server, watched by a supervisor.

    run_env_client --task lift --env.robot.port /dev/ttyACM0

This process is the supervisor: it reads the command line, starts a virtual robot where one was asked for, and
runs `env_client.rollout` as its child, which owns the robot. When the child hangs or dies, this process stops the
robot itself (`control/supervisor.py`). Exit codes: 0; 1 when a run broke off; 2 with one sentence when it could
not start; 130 and 143 after Ctrl-C and SIGTERM.
"""

import contextlib
import os
import pickle
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace

from env_client.cli import CliError, fail, parse
from env_client.client_config import ALIASES, ClientConfig, find_task, with_env_type
from env_client.control.supervisor import Supervisor
from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.env import EnvError
from env_client.envs.plug_ins import register_robots
from env_client.envs.robots import VirtualConfig
from env_client.keys import kept_terminal
from env_client.panel.config import PanelError, open_panel

__all__ = ["main"]

PROG = "run_env_client"
DESCRIPTION = (
    "Drive a robot with a policy server at a steady rate. Nothing unsafe reaches a motor; Ctrl-C ends the run in the "
    "state that --on-exit names."
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    register_robots(lambda sentence: print(f"{PROG}: {sentence}", file=sys.stderr))
    try:
        arguments = with_env_type(arguments)
        config = parse(ClientConfig, arguments, prog=PROG, description=DESCRIPTION, aliases=ALIASES)
        find_task(config.task)
    except CliError as error:
        fail(PROG, str(error))
    try:
        code = run(config)
    except (EnvError, PanelError) as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        fail(PROG, "interrupted before the robot was touched", 130)
    raise SystemExit(code)


def run(config: ClientConfig) -> int:
    """The whole run; its exit code. Raises `EnvError` when a virtual robot does not start, `PanelError` when the
    panel's address is taken."""
    panel, listening = open_panel(config.panel, lambda line: print(line, flush=True))
    config = replace(config, panel=panel)
    with contextlib.ExitStack() as stack:
        if listening is not None:
            stack.callback(listening.close)
        stack.enter_context(kept_terminal())
        return _with_robot(config, listening)


def _with_robot(config: ClientConfig, listening: socket.socket | None) -> int:
    if isinstance(config.env, AstribotConfig):
        return _with_astribot(config, config.env, listening)
    if not isinstance(config.env, VirtualConfig) or config.env.control_port is not None:
        return _supervise(config, listening)
    from env_client.envs.virtual import SCENES, VirtualRobot

    task = find_task(config.task)
    scene = config.env.scene or (task.name if task.name in SCENES else "lift")
    print(f"Starting a virtual SO-101 ({scene}) …", flush=True)
    robot = VirtualRobot(config.env, scene=scene)
    try:
        return _supervise(replace(config, env=robot.config), listening)
    finally:
        robot.close()


def _with_astribot(config: ClientConfig, env: AstribotConfig, listening: socket.socket | None) -> int:
    if not env.astribot.virtual or env.astribot.virtual_address is not None:
        return _supervise(config, listening)
    from env_client.envs.astribot_make import VirtualAstribot

    print("Starting a virtual Astribot S1 (a stand-in, not the vendor's) …", flush=True)
    robot = VirtualAstribot(env)
    try:
        return _supervise(replace(config, env=robot.config), listening)
    finally:
        robot.close()


def _supervise(config: ClientConfig, listening: socket.socket | None) -> int:
    read, write = os.pipe()
    # Handed on: a page that is opened when its server is gone must be told so, not be kept waiting.
    panel = -1 if listening is None else listening.detach()
    # A config is some kilobytes, a pipe holds 64: this never waits.
    with os.fdopen(write, "wb") as stream:
        pickle.dump(config, stream)
    supervisor = Supervisor(
        [sys.executable, "-m", "env_client.rollout", str(read), str(panel)],
        hang_timeout_s=config.hang_timeout_s,
        stop_timeout_s=config.stop_timeout_s,
        pass_fds=(read,) if panel < 0 else (read, panel),
        started=lambda: None if panel < 0 else os.close(panel),
    )
    try:
        return supervisor.run()
    finally:
        os.close(read)


if __name__ == "__main__":
    main()
