"""The process beside the control loop: it records and draws, so that the loop need not.

types.py     what flows: a run, its episodes, its ticks, a person's judgement and commands
ring.py      shared memory for pictures; feed.py: control's end; process.py: the process itself
runner.py    a thread and a bounded queue for each consumer
config.py    what is to be recorded and shown
"""
