"""One batch: `python -m fuzzing.worker TARGET CORPUS LIBFUZZER_FLAGS`, which ends as libFuzzer ends.

Limits, for each execution: a second of CPU time (so that a busy machine finds nothing of its own), and `GROWTH_MB` of
memory that were not needed before; a minute of any time ends even what hangs in native code.
"""

import resource
import sys
import time
from collections.abc import Callable

import atheris

from fuzzing.targets import TARGETS

__all__ = ["LimitExceeded", "limited"]

CPU_S = 1.0
# The largest input is a hundred kilobytes; whatever it asks for, answering it costs no more than this.
GROWTH_MB = 200
HANG_S = 60
RSS_MB = 3000


class LimitExceeded(Exception):
    """An input took too long, or too much memory."""


def limited(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The target with its limits."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(data: bytes) -> None:
        nonlocal peak
        started = time.thread_time()
        target(data)
        took = time.thread_time() - started
        if took > CPU_S:
            raise LimitExceeded(f"{took:.1f} s for an input of {len(data)} bytes")
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now > peak + GROWTH_MB * 1024:
            raise LimitExceeded(f"{(now - peak) // 1024} MB for an input of {len(data)} bytes")
        peak = now

    return run


def main() -> None:
    name, corpus, *flags = sys.argv[1:]
    target = TARGETS[name]
    with atheris.instrument_imports(include=list(target.instrumented)):
        function = target.load()
    for seed in target.seeds():
        # What is imported and made on the way the first time is no input's doing.
        function(seed)
    settings = [
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={RSS_MB}",
        f"-max_len={target.max_len}",
        "-print_final_stats=1",
        # Inputs grow only when the short ones bring nothing new.
        "-len_control=20",
    ]
    atheris.Setup([sys.argv[0], *settings, *flags, corpus], limited(function))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
