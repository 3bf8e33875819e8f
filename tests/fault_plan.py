"""What a seed means in the fault matrix: who is hit, how, when, and how the run is set up."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["FAULTS", "REAL", "RUNS", "FaultPlan", "plan_of"]

# Who and how. `stop` is SIGSTOP and, after a while, SIGCONT; `kill` is SIGKILL (server and robot are started again, as
# somebody would). The network's are a proxy's between client and server, the disk's a limit on the recorder's files.
FAULTS = (
    ("server", "kill"),
    ("server", "stop"),
    ("control", "kill"),
    ("control", "stop"),
    ("supervisor", "kill"),
    ("supervisor", "stop"),
    ("sidecar", "kill"),
    ("sidecar", "stop"),
    ("robot", "kill"),
    ("robot", "stop"),
    ("browser", "kill"),
    ("browser", "stop"),
    ("network", "cut"),
    ("network", "silence"),
    ("network", "delay"),
    ("network", "loss"),
    ("network", "duplicate"),
    ("disk", "full"),
    ("clock", "jump"),
)
RUNS = 200
# The last of them serve real checkpoints, a few each.
REAL = {
    seed: (policy, fault)
    for seed, (policy, fault) in enumerate(
        (
            (policy, fault)
            for policy in ("act", "diffusion", "pi05")
            for fault in (("server", "kill"), ("server", "stop"), ("control", "kill"))
        ),
        start=RUNS - 9,
    )
}
# Where a fault at the start or the end of a run makes sense.
_EVERYWHERE = ("server", "control", "supervisor", "sidecar", "robot")


@dataclass(frozen=True)
class FaultPlan:
    """One run. Seconds."""

    seed: int
    victim: str
    how: str
    # start: `at` after the client was started | run: `at` after its first motion | end: `at` after SIGTERM
    phase: str
    at: float
    # How long the victim stays away, stopped or disturbed.
    lasts: float
    on_exit: str
    execution: str
    policy: str = "numpy"
    # What the wall clock jumps by.
    jump: float = 0.0

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.victim} {self.how}, {self.phase} + {self.at:.2f} s, for {self.lasts:.2f} s"


def plan_of(seed: int) -> FaultPlan:
    """The same run for the same seed; consecutive seeds go through `FAULTS`."""
    draw = random.Random(seed)
    policy, (victim, how) = REAL.get(seed, ("numpy", FAULTS[seed % len(FAULTS)]))
    phases = (
        ("run", "run", "run", "start", "end") if victim in _EVERYWHERE and policy == "numpy" else ("run",)
    )
    phase = draw.choice(phases)
    return FaultPlan(
        seed=seed,
        victim=victim,
        how=how,
        phase=phase,
        at=draw.uniform(0.0, {"start": 4.0, "run": 1.0, "end": 0.3}[phase]),
        # Some stops of control are outlived, some are longer than the supervisor's patience (`fault_world.HANG_S`).
        lasts=draw.choice((draw.uniform(0.05, 1.0), draw.uniform(1.0, 2.5), draw.uniform(6.0, 7.0)))
        if (victim, how) == ("control", "stop")
        else draw.uniform(0.1, 1.5),
        on_exit=draw.choice(("hold", "relax", "rest-pose")),
        execution=draw.choice(("sync", "async", "async", "ensemble")),
        policy=policy,
        jump=draw.choice((-1, 1)) * 10 ** draw.uniform(0, 7),
    )
