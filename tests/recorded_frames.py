"""What clients of this version send, and the frames in which they and the server said it.

`python tests/recorded_frames.py` asks a server each request below and keeps both frames in
`tests/wire/recorded/VERSION/`, where they stay as they are: every later version must read them, and answer them in
the same way. A version that changes what is written records a folder of its own; nothing is ever recorded twice.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgpack_numpy
import numpy as np
from env_client.wire import (
    Configure,
    Dialect,
    ErrorCode,
    Infer,
    Reset,
    RtcPrefix,
    SetPrompt,
    Status,
    WireError,
    encode_image,
    error_reply,
    pack,
    unpack,
)
from numpy_policy import write_checkpoint
from openpi_client import msgpack_numpy as openpi_numpy
from serving_parts import CAMERAS, serving
from websockets.sync.client import ClientConnection, connect

__all__ = ["ERRORS", "EXCHANGES", "RECORDED", "Exchange", "ask", "dialogue", "server"]

RECORDED = Path(__file__).parent / "wire" / "recorded"


@dataclass(frozen=True)
class Exchange:
    """One request."""

    # What a server reads.
    request: Any
    # What a client writes: the frame's content.
    message: dict[str, Any]
    # Content -> frame.
    packer: Callable[[Any], bytes]
    # Whether the server that is asked serves a policy; otherwise it waits for a client to name one.
    idle: bool = False


def observation(tick: int = 0) -> dict[str, Any]:
    """The same on every machine and with every version of NumPy."""
    image = (np.arange(24 * 32 * 3).reshape(24, 32, 3) * 5 + tick).astype(np.uint8)
    return {
        "images": {"front": image, "wrist": image[::-1].copy()},
        "states": {"arm": np.linspace(-50, 50, 6, dtype=np.float32) + np.float32(tick)},
        "task": "lift up the red cube",
    }


def _enveloped(dialect: Dialect) -> Exchange:
    request = Infer(
        obs=observation(1),
        history=(observation(0),),
        prompt="lift it",
        seq=41,
        episode=7,
        capture_time=12.5,
        deadline_ms=60_000.0,
    )
    return Exchange(request, request.to_wire(), lambda value: pack(value, dialect))


def _bare(packer: Callable[[Any], bytes]) -> Exchange:
    return Exchange(Infer(obs=observation(), bare=True), observation(), packer)


def _compressed(codec: Any) -> Exchange:
    obs = observation()
    # Smooth, so that a lossy codec stays close.
    ramp = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 96).reshape(24, 32, 3)
    obs["images"] = {name: encode_image(ramp, codec) for name in obs["images"]}
    request = Infer(obs=obs, seq=1)
    return Exchange(request, request.to_wire(), pack)


def _rtc() -> Exchange:
    prev = np.arange(24, dtype=np.float32).reshape(4, 6)
    request = Infer(obs=observation(), rtc=RtcPrefix(prev, 2, 8), seq=3, episode=0)
    return Exchange(request, request.to_wire(), pack)


def _plain(request: Any, message: dict[str, Any], *, idle: bool = False) -> Exchange:
    return Exchange(request, message, pack, idle)


CONFIGURE = Configure(path="quick", prompt="lift it", name="lift", seq=6)

EXCHANGES = {
    "infer-openpi": _enveloped(Dialect.OPENPI),
    "infer-msgpack-numpy": _enveloped(Dialect.MSGPACK_NUMPY),
    "infer-png": _compressed("png"),
    "infer-jpeg": _compressed("jpeg"),
    "infer-rtc": _rtc(),
    # As the packages of other clients write them.
    "bare-openpi": _bare(openpi_numpy.packb),
    "bare-msgpack-numpy": _bare(lambda value: msgpack_numpy.packb(value, use_bin_type=True)),
    "bare-reset": _plain(Reset(bare=True), {"reset": True}),
    "bare-invalid": _plain(Infer(obs={"images": {}}, bare=True), {"images": {}}),
    "reset": _plain(Reset(seq=2), {"op": "reset", "seq": 2}),
    "set-prompt": _plain(SetPrompt("sort", seq=4), {"op": "set_prompt", "seq": 4, "prompt": "sort"}),
    "status": _plain(Status(seq=5), {"op": "status", "seq": 5}),
    "infer-invalid": _plain(
        Infer(obs={"images": {}}, seq=8), {"op": "infer", "seq": 8, "obs": {"images": {}}}
    ),
    "infer-not-loaded": _plain(
        Infer(obs={"task": "lift"}, seq=9), {"op": "infer", "seq": 9, "obs": {"task": "lift"}}, idle=True
    ),
    "configure": _plain(CONFIGURE, CONFIGURE.to_wire(), idle=True),
}

# One reply for each code; some come only under load.
ERRORS = {
    code: error_reply(
        WireError(
            code, "what came, what was expected", retry_after_ms=250 if code == ErrorCode.OVERLOADED else None
        ),
        seq=10,
    )
    for code in ErrorCode
}


@contextlib.contextmanager
def server(folder: Path, *, idle: bool) -> Iterator[int]:
    """The port of a server of a policy that looks at two ticks; or of one that waits to be told what it serves."""
    quick = write_checkpoint(folder / "quick", cameras=CAMERAS, n_obs_steps=2)
    place = ("--policy.root", folder) if idle else ("--policy.path", quick)
    with serving(*place, cwd=folder) as (_, port):
        yield port


@contextlib.contextmanager
def dialogue(port: int) -> Iterator[tuple[ClientConnection, bytes | str]]:
    """A connection of plain frames, with the first one."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, open_timeout=60) as socket:
        yield socket, socket.recv(60)


def ask(socket: ClientConnection, frame: bytes) -> tuple[bytes | str, list[bytes | str]]:
    """The answer to a request, and what came before it: how far a load is."""
    socket.send(frame)
    progress: list[bytes | str] = []
    while True:
        answer = socket.recv(60)
        if isinstance(answer, str) or unpack(answer)[0].get("op") != "progress":
            return answer, progress
        progress.append(answer)


def record(folder: Path) -> None:
    """Write every frame. Raises `FileExistsError` when this version has been recorded."""
    folder.mkdir(parents=True)

    def keep(name: str, frame: bytes | str) -> None:
        if isinstance(frame, str):
            (folder / f"{name}.txt").write_text(frame, encoding="utf-8")
        else:
            (folder / f"{name}.msgpack").write_bytes(frame)

    for code, reply in ERRORS.items():
        keep(f"error-{code}.reply", pack(reply))
    for idle in (False, True):
        with tempfile.TemporaryDirectory() as place, server(Path(place), idle=idle) as port:
            for name, exchange in EXCHANGES.items():
                if exchange.idle == idle:
                    with dialogue(port) as (socket, metadata):
                        frame = exchange.packer(exchange.message)
                        answer, progress = ask(socket, frame)
                    keep(f"{name}.request", frame)
                    keep(f"{name}.reply", answer)
                    for told in progress[:1]:
                        keep(f"{name}.progress", told)
                    keep("metadata-idle" if idle else "metadata", metadata)


if __name__ == "__main__":
    target = RECORDED / version("env-client")
    try:
        record(target)
    except FileExistsError:
        sys.exit(
            f"{target} is there, and recorded frames stay as they are; raise the version to record new ones"
        )
    print(f"{target}: {sum(file.stat().st_size for file in target.iterdir()) / 1000:.0f} kB")
