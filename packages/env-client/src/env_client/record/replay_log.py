"""`replay_log SESSION`: send the observations of an inference log to a server again, and show where its answers differ.

Each chunk in the log names the observation that it answered; that observation (with the ticks before it, where the policy
looks back) is asked again. Pictures come from the log's JPEGs, so a policy that was sent raw pictures answers a
little differently even when nothing has changed. A torn log is replayed as far as it goes.

Exit codes: 0; 2 with one sentence; 130 after Ctrl-C, with what was compared until then.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from env_client.cli import CliError, fail, host_port
from env_client.envs.env import Observation
from env_client.policy_server import require_policy
from env_client.record.files import as_written, make_run_folder, read_json, read_lines, write_json
from env_client.record.inference_log import FORMAT
from env_client.replay import ChunkAsker, ReplayStopped
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import EncodedImage, InvalidInput, WireError, decode_image
from env_client.wire.images import image_size

__all__ = ["Compared", "LoggedRun", "main"]

PROG = "replay_log"
# Chunks that are named one by one.
_NAMED = 5


@dataclass(frozen=True)
class Compared:
    """One chunk, as it was logged and as it is answered now."""

    episode: int
    frame: int
    chunk_id: int
    # (T, A) each, in the robot's unit; T is the shorter one's length.
    logged: np.ndarray
    answered: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        return np.abs(self.answered - self.logged)


class LoggedRun:
    """An inference log. Raises `ValueError` and `OSError` with a sentence."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "metadata.json").is_file():
            raise ValueError(
                f"{folder} holds no metadata.json: a folder inference_logs/session_… was expected"
            )
        self.folder = folder
        self.metadata = read_json(folder / "metadata.json")
        if self.metadata.get("format") != FORMAT:
            raise ValueError(
                f"{folder} is of the format {self.metadata.get('format')!r}; {FORMAT!r} was expected"
            )
        self.lines = list(read_lines(folder / "inference_log.jsonl"))
        with as_written(folder):
            self._places = {
                (line["episode"], line["capture_time"]): index for index, line in enumerate(self.lines)
            }

    @property
    def torn(self) -> list[int]:
        """Episodes that did not end in order."""
        with as_written(self.folder):
            return [
                int(e["episode"])
                for e in self.metadata["episodes"]
                if str(e["ended"] or "torn").startswith("torn")
            ]

    def chunks(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The index of the line whose observation was asked with, and the chunk; chunks whose observation was lost are left
        out."""
        for line in self.lines:
            with as_written(self.folder):
                chunk = line.get("chunk") or None
                index = chunk and self._places.get((line["episode"], chunk["capture_time"]))
            if chunk is not None and index is not None:
                yield index, chunk

    def observation(self, index: int) -> Observation:
        """Raises `InvalidInput` where a picture is missing or damaged, and `ValueError`."""
        with as_written(self.folder):
            return self._observation(self.lines[index])

    def _observation(self, line: dict[str, Any]) -> Observation:
        if line["state"] is None or len(line["images"]) < len(self.metadata["cameras"]):
            raise InvalidInput(f"frame {line['frame']} was logged without all of its pictures")
        states, start = {}, 0
        for part, size in self.metadata["states"].items():
            states[part] = np.array(line["state"][start : start + size], np.float32)
            start += size
        images = {camera: self._picture(path) for camera, path in line["images"].items()}
        return Observation(images, states, line["prompt"], line["capture_time"])

    def history(self, index: int, length: int) -> tuple[Observation, ...]:
        """Of the ticks right before, oldest first, as far as there is no gap."""
        found: list[Observation] = []
        for back in range(1, length + 1):
            line, here = self.lines[index - back] if index >= back else None, self.lines[index]
            with as_written(self.folder):
                if line is None or (line["episode"], line["tick"]) != (here["episode"], here["tick"] - back):
                    break
            found.append(self.observation(index - back))
        return tuple(reversed(found))

    def _picture(self, path: str) -> np.ndarray:
        inside = (self.folder / path).resolve()
        if not inside.is_relative_to(self.folder.resolve()):
            raise InvalidInput(f"the picture {path!r:.200} lies outside of the log")
        try:
            data = inside.read_bytes()
        except OSError as error:
            raise InvalidInput(f"the picture {path} cannot be read ({error.strerror})") from error
        size = image_size("jpeg", data)
        if size is None:
            raise InvalidInput(f"the picture {path} is no JPEG ({len(data)} bytes)")
        return decode_image(EncodedImage("jpeg", data, (*size, 3)))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Send a log's observations to a server again, and show where its answers differ.",
    )
    parser.add_argument("session", type=Path, help="folder of an inference log (inference_logs/session_…)")
    parser.add_argument("--host", default="127.0.0.1", help="name or address of the policy server")
    parser.add_argument("--port", type=int, default=8000, help="port of the policy server")
    parser.add_argument("--server", help="HOST:PORT, in place of both")
    parser.add_argument("--api-key", help="key that the server asks for; default: GRASP_CUBE_API_KEY")
    parser.add_argument("--output-dir", type=Path, help="default: outputs/replay_log/DATE_TIME")
    parser.add_argument(
        "--connect-timeout-s", type=float, default=120.0, help="how long to wait for the server"
    )
    options = parser.parse_args(argv)
    try:
        if options.server:
            given = host_port(options.server)
            options.host, options.port = given["host"], int(given["port"])
        log = LoggedRun(options.session)
        with as_written(log.folder):
            code = _replay(log, options)
    except (CliError, OSError, ValueError, ConnectionLost, WireError, ReplayStopped) as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        fail(PROG, "interrupted", 130)
    raise SystemExit(code)


def _replay(log: LoggedRun, options: argparse.Namespace) -> int:
    from tqdm import tqdm

    chunks = list(log.chunks())
    if not chunks:
        raise ValueError(f"{log.folder} holds no chunk together with the observation that it answered")
    client = WebsocketClientPolicy(
        options.host,
        options.port,
        options.api_key or os.environ.get("GRASP_CUBE_API_KEY"),
        connect_timeout_s=options.connect_timeout_s,
        on_status=tqdm.write,
    )
    compared: list[Compared] = []
    left_out: list[str] = []
    code = 0
    try:
        require_policy(client)
        size = len(log.metadata["action_names"])
        asker = ChunkAsker(client, action_dim=size, say=tqdm.write)
        for index, chunk in tqdm(chunks, unit="chunk", file=sys.stderr, dynamic_ncols=True):
            line = log.lines[index]
            try:
                observation = log.observation(index)
                history = log.history(index, asker.history_ticks)
                asker.prompt = line["prompt"] or None
                answer = asker.ask(observation, history, line["episode"])
            except InvalidInput as error:
                left_out.append(str(error))
                continue
            logged = np.array(chunk["actions"], np.float32).reshape(-1, size)
            rows = min(len(logged), len(answer))
            compared.append(
                Compared(line["episode"], line["frame"], chunk["chunk_id"], logged[:rows], answer[:rows])
            )
    except KeyboardInterrupt:
        code = 130
    finally:
        client.close()
    if compared:
        _report(log, compared, left_out, client.url, options.output_dir)
    else:
        raise ValueError(f"nothing could be compared: {left_out[0] if left_out else 'interrupted'}")
    return code


def _report(
    log: LoggedRun, compared: list[Compared], left_out: list[str], server: str, output: Path | None
) -> None:
    names, unit = log.metadata["action_names"], log.metadata["unit"]
    summary = summarise(log, compared, left_out) | {"server": server}
    print(f"\n{format_table(summary, unit)}\n")
    if log.metadata.get("execution") == "rtc":
        print(
            "Note: this run guided the server by the last chunk (rtc); the answers here are without guidance."
        )
    folder = output or make_run_folder(
        Path("outputs/replay_log"), datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", summary)
    try:
        from env_client.record.plots import plot_actions

        starts = np.cumsum([0] + [len(item.logged) for item in compared])
        plot_actions(
            folder / "answers.png",
            np.concatenate([item.logged for item in compared]),
            np.concatenate([item.answered for item in compared]),
            boundaries=starts[:-1].tolist(),
            names=names,
            fps=log.metadata["fps"],
            unit=unit,
            title=f"{log.folder.name}: chunk after chunk",
            labels=("in the log", "answered now"),
        )
    except ImportError:
        print("No plot: matplotlib is not installed (pip install 'env-client[viz]')", file=sys.stderr)
    print(f"Summary and plot: {folder}", flush=True)


def summarise(log: LoggedRun, compared: list[Compared], left_out: list[str]) -> dict[str, Any]:
    """Plain values; differences in the robot's unit."""
    together = np.concatenate([item.difference for item in compared])
    worst = sorted(compared, key=lambda item: float(item.difference.max()), reverse=True)[:_NAMED]
    names = log.metadata["action_names"]
    return {
        "log": str(log.folder),
        "torn_episodes": log.torn,
        "chunks": len(compared),
        "left_out": len(left_out),
        "why_left_out": left_out[:1],
        "mean_difference": dict(zip(names, together.mean(axis=0).tolist(), strict=True)),
        "largest_difference": dict(zip(names, together.max(axis=0).tolist(), strict=True)),
        "worst_chunks": [
            {
                "episode": item.episode,
                "frame": item.frame,
                "chunk_id": item.chunk_id,
                "joint": names[int(item.difference.max(axis=0).argmax())],
                "largest_difference": float(item.difference.max()),
            }
            for item in worst
        ],
    }


def format_table(summary: dict[str, Any], unit: str) -> str:
    """The summary as people read it."""
    mean, largest = summary["mean_difference"], summary["largest_difference"]
    width = max(map(len, mean))
    lines = [f"{'':{width}}  mean difference   largest   ({unit})"]
    lines += [f"{name:{width}}  {mean[name]:>15.4f}   {largest[name]:>7.3f}" for name in mean]
    lines += ["", f"{summary['chunks']} chunks asked again; the largest differences:"]
    lines += [
        f"  episode {item['episode']}, frame {item['frame']:6d}   {item['largest_difference']:8.3f} at {item['joint']}"
        for item in summary["worst_chunks"]
    ]
    if summary["left_out"]:
        lines.append(f"{summary['left_out']} left out ({summary['why_left_out'][0]})")
    if summary["torn_episodes"]:
        lines.append(f"torn episodes: {', '.join(map(str, summary['torn_episodes']))}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
