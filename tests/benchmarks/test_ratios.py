"""When a ratio counts as worse than its bound."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
from ratios import Curve, Part, Ratio, paired, worse  # noqa: E402


def ratio(pairs: list[float], name: str = "part.thing") -> Ratio:
    """On a machine whose pace wanders: only the pairs' ratios are given."""
    peer = [1.0 + number % 5 for number in range(len(pairs))]
    return Ratio(name, "a thing", "ms", [r * p for r, p in zip(pairs, peer, strict=True)], peer)


def test_within_the_bound_passes():
    assert worse([ratio([0.4, 0.5, 0.6] * 20)], {"part.thing": 0.5}) == []


def test_above_the_bound_by_more_than_the_noise_fails_and_says_what():
    (sentence,) = worse([ratio([0.59, 0.6, 0.61] * 20)], {"part.thing": 0.5})
    assert "part.thing: 0.60 of the peer" in sentence
    assert "at most 0.50" in sentence


def test_above_the_bound_by_less_than_the_noise_passes():
    """One block of pairs, in which the machine did something else, is the noise."""
    noisy = ratio([0.55] * 56 + [0.9] * 8)
    assert noisy.ratio == pytest.approx(0.55)
    assert noisy.noise == pytest.approx(0.35)
    assert worse([noisy], {"part.thing": 0.5}) == []
    assert worse([noisy], {"part.thing": 0.1}) != []


def test_a_single_pair_that_is_out_of_line_is_no_noise():
    """The median of its block does not see it."""
    assert ratio([0.6] * 40 + [9.0] + [0.6] * 39).noise == pytest.approx(0.0)


def test_a_ratio_without_a_bound_is_not_judged():
    assert worse([ratio([3.0] * 10)], {}) == []


def test_who_is_first_changes_from_pair_to_pair():
    calls: list[str] = []
    result = paired("p.x", "x", lambda: calls.append("a"), lambda: calls.append("b"), rounds=4, warm_up=1)
    assert "".join(calls) == "ab" + "abbaabba"
    assert len(result.ours) == len(result.peer) == 4


def test_figures_survive_their_file():
    part = Part("p", [ratio([0.5, 0.7])], [Curve("p.c", "c", "x", "y", [1.0], {"ours": [2.0]})], ["no GPU"])
    assert Part.from_plain(json.loads(json.dumps(part.plain()))) == part


def test_every_bound_is_a_ratio():
    """Of a name that says whose it is."""
    bounds = json.loads((FOLDER / "bounds.json").read_text())
    assert bounds
    for name, bound in bounds.items():
        assert (FOLDER / f"{name.partition('.')[0]}.py").is_file(), name
        assert 0 < bound < 3


def test_a_part_that_is_none_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "grasp_cube.bench", "--only", "weather"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no part weather; there are wire" in done.stdout
