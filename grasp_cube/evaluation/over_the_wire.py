"""The chain as three processes: serve_policy, the virtual SO-101, and run_env_client with LeRobot's own driver.

What happened is read from what the client writes for everybody: its summary and its inference log.
Error policy: a client that does not do its part is a `RuntimeError` with the last thing that it said.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from grasp_cube.evaluation.episodes import Episode
from grasp_cube.evaluation.inference_log import read_motion
from grasp_cube.server_process import environment

__all__ = ["run_over_the_wire"]

# How often the client's output is looked at, in seconds.
_LOOK_S = 0.5


def run_over_the_wire(
    port: int,
    task: str,
    seeds: Sequence[int],
    folder: Path,
    *,
    time_s: float,
    arguments: Sequence[str],
    on_episode: Callable[[int], None],
) -> list[Episode]:
    """The episodes of consecutive seeds, each of at most `time_s` seconds of real time.

    `arguments` are further ones of `run_env_client`; what the client writes stays in `folder`. `on_episode` is
    called with the number of episodes done.
    """
    log, summary, output = folder / "inference_logs", folder / "client.json", folder / "client.txt"
    command = [sys.executable, "-m", "env_client.run_env_client", "--task", task, "--env.type", "virtual"]
    command += ["--env.seed", str(seeds[0]), "--env.end-on-success", "--num-episodes", str(len(seeds))]
    command += ["--port", str(port), "--episode-time-s", str(time_s), "--on-exit", "relax", "--no-panel"]
    command += ["--summary-path", str(summary), "--log-dir", str(log), *arguments]
    # A summary of an earlier run would be taken for this one's.
    summary.unlink(missing_ok=True)
    with output.open("w") as stream:
        # Without a terminal: a key that is pressed there must not hold the run.
        client = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        while client.poll() is None:
            time.sleep(_LOOK_S)
            on_episode(len(re.findall(r"^Episode \d+ of", output.read_text(errors="replace"), re.MULTILINE)))
    finally:
        if client.poll() is None:
            client.send_signal(signal.SIGINT)
            client.wait()
    results = json.loads(summary.read_text())["episodes"] if summary.is_file() else []
    if client.returncode != 0 or len(results) != len(seeds):
        said = output.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(
            f"the client ended with exit code {client.returncode} after {len(results)} of {len(seeds)} episodes: "
            f"{said[-1] if said else 'it said nothing'} (see {output})"
        )
    motion = read_motion(log)
    return [
        Episode(
            seed=seed,
            success=bool(result["success"]),
            steps=result["steps"],
            starved=result["starved"],
            **motion.get(result["episode"], {}),
        )
        for seed, result in zip(seeds, results, strict=True)
    ]
