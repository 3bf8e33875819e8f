"""A gRPC gateway in a process of its own: `python gateway_process.py OPTIONS`, where OPTIONS is JSON.

checkpoint (None: idle), configurable, and the gateway's own keyword arguments. Prints `port N` when it listens, the log,
and `stopped in N s` at the end.
"""

import asyncio
import json
import logging
import signal
import sys
import time

from grasp_cube.gateways.grpc import GrpcGateway
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import Policy
from grasp_cube.serving.scheduler import Scheduler


async def main(options: dict) -> None:
    checkpoint, configurable = options.pop("checkpoint", None), options.pop("configurable", False)
    scheduler = Scheduler()
    scheduler.start()
    policy: list[Policy | None] = [load_policy(checkpoint) if checkpoint else None]

    async def configure(config: dict[str, str]) -> str:
        policy[0] = await scheduler.run(lambda: load_policy(config["checkpoint_dir"], device="cpu"))
        return f"serving {policy[0].metadata['name']}"

    gateway = GrpcGateway(
        lambda: policy[0], scheduler, configure=configure if configurable else None, port=0, **options
    )
    await gateway.start()
    print("port", gateway.port, flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    started = time.monotonic()
    await gateway.stop()
    print(f"stopped in {time.monotonic() - started:.2f} s", flush=True)
    await asyncio.to_thread(scheduler.close, 5)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main(json.loads(sys.argv[1])))
