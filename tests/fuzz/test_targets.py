"""Every fuzzing target over its seeds and over each input that fuzzing found, as plain tests: without atheris.

What fuzzing finds is kept in found/TARGET, named after what was wrong.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing.targets import TARGETS

FOUND = Path(__file__).parent / "found"
# Those that need no more than a millisecond for an input; the others parse YAML or write tables.
QUICK = ("wire", "frames", "images", "server", "grpc", "log")
KEPT = sorted(path for path in FOUND.glob("*/*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_read(name):
    """The target lets the real thing pass, so that it is the real thing that is fuzzed."""
    target = TARGETS[name]
    seeds = target.seeds()
    assert seeds
    assert max(map(len, seeds)) <= target.max_len
    function = target.load()
    for seed in seeds:
        function(seed)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_is_mended(path):
    """An error that the layer promises, or none."""
    TARGETS[path.parent.name].load()(path.read_bytes())


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_seeds_are_read_or_refused(name, data):
    """Bytes changed, cut out, doubled and cut off, in real inputs of every layer: an error that it promises, or none."""
    target = TARGETS[name]
    seed = bytearray(data.draw(st.sampled_from(target.seeds())))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(1, max(1, len(seed) - 1)))
        stop = at + data.draw(st.integers(0, 12))
        seed[at:stop] = data.draw(st.sampled_from((b"", seed[at:stop] * 2)) | st.binary(max_size=12))
    target.load()(bytes(seed[: target.max_len]))
