"""The fixtures of the Astribot's tests."""

from astribot_parts import hardware, make_env, make_run, make_server, robot, started_robot

__all__ = ["hardware", "make_env", "make_run", "make_server", "robot", "started_robot"]
