"""A plain openpi-style policy server, the peer that ours is measured and tested against.

What such servers have in common: the metadata first, then one request map and one reply map in lock step, with
the inference on the event loop. Written from the description of the wire; arrays by the openpi-client package.

    python benchmarks/plain_server.py --port 8001 --delay-s 0 --horizon 16
    python benchmarks/plain_server.py --checkpoint checkpoints/lift_act        # a real model, one request at a time
"""

import argparse
import asyncio
import http
import time

import numpy as np
from openpi_client import msgpack_numpy
from websockets.asyncio.server import ServerConnection, serve


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one and prints it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--delay-s", type=float, default=0.0, help="how long one inference blocks the event loop"
    )
    parser.add_argument(
        "--first-delay-s", type=float, help="the same for the first inference of all; default: no other"
    )
    parser.add_argument("--horizon", type=int, default=16)
    parser.add_argument("--checkpoint", help="a checkpoint that answers, in place of the present state")
    options = parser.parse_args()
    policy = None
    if options.checkpoint:
        from grasp_cube.policies.load import load_policy

        policy = load_policy(options.checkpoint)
        policy.warm_up()
    packer = msgpack_numpy.Packer()
    first = True

    async def handle(connection: ServerConnection) -> None:
        nonlocal first
        await connection.send(packer.pack({"server": "plain"}))
        async for frame in connection:
            obs = msgpack_numpy.unpackb(frame)
            started = time.perf_counter()
            time.sleep(
                options.delay_s if options.first_delay_s is None or not first else options.first_delay_s
            )
            first = False
            if policy is not None:
                actions = policy.get_actions(obs)
            else:
                actions = np.tile(np.asarray(obs["states"]["arm"], np.float32), (options.horizon, 1))
            timing = {"infer_ms": (time.perf_counter() - started) * 1e3}
            await connection.send(packer.pack({"actions": actions, "server_timing": timing}))

    def health(connection: ServerConnection, request):
        return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    async with serve(
        handle, options.host, options.port, compression=None, max_size=None, process_request=health
    ) as server:
        print(f"listening at ws://{options.host}:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
