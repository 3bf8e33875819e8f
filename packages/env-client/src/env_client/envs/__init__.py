"""Robots, and what stands in for one: real arms through LeRobot, the humanoid, a replayed dataset."""
