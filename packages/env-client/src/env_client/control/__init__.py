"""The control loop: the clock, where actions come from, and what may reach a motor. Knows no robot and no model.

loop.py      the clock: ControlLoop.run_episode, move_to, pause, taps
chunks.py    make_source: sync, async, ensemble, rtc
safety.py    SafetyFilter: one fixed order, the velocity limit last

network.py   the thread that talks to the server
source.py    what all sources share; execution.py the four of them; plan.py how chunks are merged
clock.py     deadlines and jitter; motion.py smooth paths; records.py what others get to see
"""

from env_client.control.chunks import (
    EXECUTIONS,
    ActionSource,
    Chunk,
    Execution,
    Origin,
    SourceOptions,
    SourceStats,
    make_source,
)
from env_client.control.clock import Clock, MonotonicClock, Timing
from env_client.control.link import LoopConfig, measured_pose
from env_client.control.loop import ControlLoop
from env_client.control.records import EpisodeResult, MoveResult, Observer, RecordSink, Tap, TickRecord
from env_client.control.safety import SafetyConfig, SafetyFilter, Verdict

__all__ = [
    "EXECUTIONS",
    "ActionSource",
    "Chunk",
    "Clock",
    "ControlLoop",
    "EpisodeResult",
    "Execution",
    "LoopConfig",
    "MonotonicClock",
    "MoveResult",
    "Observer",
    "Origin",
    "RecordSink",
    "SafetyConfig",
    "SafetyFilter",
    "SourceOptions",
    "SourceStats",
    "Tap",
    "TickRecord",
    "Timing",
    "Verdict",
    "make_source",
    "measured_pose",
]
