"""Round trips over a link of 100 Mbit/s: JPEG, images at the policy's own size, and the choice left to the client.

    uv run python benchmarks/link.py [--quick] [--json FILE]

The peer sends two raw 480x640 images, as openpi's client does. Ours sends them as JPEG of quality 90; or brings them to
the policy's 224x224 on the robot, as `run_env_client` always does, which loses nothing that the policy would have seen;
or runs with `--image-codec auto`, measured after its first trials.

The servers run in a network namespace of their own, behind a token bucket at both ends of the link (root, `ip` and `tc`);
where that is refused, the bytes go through threads that pass them on at that pace.
"""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from env_client.control.network import encode_observation
from env_client.envs.env import Observation
from env_client.wire import CameraSpec, PolicySpec, decode_image, encode_image
from ratios import Part, main, paired
from wire import observation, pair

MBIT = 100
# What the bucket holds: the link is steady, not bursty.
BURST = 16 * 1024
HERE, THERE = "10.77.41.1", "10.77.41.2"
# The requests after which the client has made up its mind.
SETTLE = 8


def run(quick: bool) -> Part:
    part, rounds = Part("link"), 9 if quick else 60
    with contextlib.ExitStack() as stack:
        try:
            prefix, host = stack.enter_context(namespace()), THERE
        except (OSError, subprocess.CalledProcessError) as error:
            part.skipped.append(
                f"a link between network namespaces ({error}): bytes were paced by threads instead"
            )
            prefix, host = [], "127.0.0.1"
        measure(part, rounds, prefix, host)
    return part


def measure(part: Part, rounds: int, prefix: Sequence[str], host: str) -> None:
    """Fills in the three rows."""
    obs = observation(480, 640)
    seen = Observation(obs["images"], obs["states"], obs["task"], 0.0)
    small = PolicySpec(
        type="numpy",
        action_dim=6,
        horizon=16,
        cameras=tuple(CameraSpec(name, 224, 224, "pad") for name in obs["images"]),
    )
    plain = None if prefix else paced
    jpeg = [encode_image(image, "jpeg", 90) for image in obs["images"].values()]
    error = [
        np.abs(decode_image(packed).astype(int) - image).mean()
        for packed, image in zip(jpeg, obs["images"].values(), strict=True)
    ]
    cases: tuple[tuple[str, str, str, Callable[[], dict], int, dict], ...] = (
        (
            "jpeg90",
            "two 480x640 images as JPEG of quality 90",
            "jpeg",
            lambda: obs,
            480,
            {
                "mean error of the image, of 255": float(np.mean(error)),
                "kB of the two images": sum(len(packed.data) for packed in jpeg) / 1e3,
            },
        ),
        (
            "resized",
            "two images brought to the policy's 224x224, raw",
            "raw",
            lambda: encode_observation(seen, small),
            224,
            {},
        ),
        ("auto", "two 480x640 images, --image-codec auto", "auto", lambda: obs, 480, {}),
    )
    for name, what, codec, make, size, facts in cases:
        with pair(size, 640 if size == 480 else size, codec, prefix, host, through=plain) as (client, peer):
            for _ in range(SETTLE if codec == "auto" else 0):
                client.infer(make())
            ratio = paired(
                f"link.{name}_100_mbit",
                f"round trip of {what}, the peer's two raw 480x640, {MBIT} Mbit/s",
                lambda c=client, m=make: c.infer(m()),
                lambda p=peer: p.infer(obs),
                rounds=rounds,
                warm_up=1,
                facts=facts,
            )
        part.ratios.append(ratio)


@contextlib.contextmanager
def namespace() -> Iterator[list[str]]:
    """A network namespace behind a link of `MBIT`; what to put before a command that is to run in it."""
    name = f"bench-{os.getpid()}"
    near, far = f"n{os.getpid()}", f"f{os.getpid()}"
    shape = f"root tbf rate {MBIT}mbit burst {BURST} latency 100ms"

    def ip(command: str) -> None:
        subprocess.run(command.split(), check=True, capture_output=True, text=True)

    ip(f"ip netns add {name}")
    try:
        ip(f"ip link add {near} type veth peer name {far} netns {name}")
        for inside, device, address in (("", near, HERE), (f"ip netns exec {name} ", far, THERE)):
            ip(f"{inside}ip addr add {address}/24 dev {device}")
            ip(f"{inside}ip link set {device} up")
            ip(f"{inside}tc qdisc add dev {device} {shape}")
        ip(f"ip netns exec {name} ip link set lo up")
        yield ["ip", "netns", "exec", name]
    finally:
        # The link goes with its end.
        subprocess.run(["ip", "link", "del", near], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def paced(port: int) -> Iterator[int]:
    """A port of loopback that leads to `port` at `MBIT` in each direction."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = listener.accept()[0]
                    server = socket.create_connection(("127.0.0.1", port))
                    for one, other in ((client, server), (server, client)):
                        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        threading.Thread(target=pass_on, args=(one, other), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


def pass_on(source: socket.socket, target: socket.socket) -> None:
    """Bytes at the pace of the link until the source ends."""
    free_at = time.monotonic()
    with contextlib.suppress(OSError):
        while data := source.recv(BURST):
            free_at = max(free_at, time.monotonic()) + len(data) * 8 / (MBIT * 1e6)
            time.sleep(max(0.0, free_at - time.monotonic()))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main(run, __doc__)
