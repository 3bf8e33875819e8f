"""A gRPC gateway in a process of its own: `python gateway_process.py OPTIONS`, where OPTIONS is JSON.

checkpoint (None: idle), root (where clients' checkpoints lie), api_key, and the gateway's own keyword arguments. Prints
`port N` when it listens, the log, and `stopped in N s` at the end.
"""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from grasp_cube.gateways.grpc import GrpcGateway
from grasp_cube.policies.config import PolicyConfig
from grasp_cube.serving.access import Access
from grasp_cube.serving.configure import Policies
from grasp_cube.serving.loading import Loader
from grasp_cube.serving.logs import set_up
from grasp_cube.serving.scheduler import Scheduler
from grasp_cube.serving.service import PolicyService


async def main(options: dict) -> None:
    checkpoint, root, key = (options.pop(name, None) for name in ("checkpoint", "root", "api_key"))
    scheduler = Scheduler()
    scheduler.start()
    policies = Policies(Loader(scheduler), root=Path(root) if root else None)
    if checkpoint:
        policies.add(PolicyConfig(checkpoint))
        await policies.load_first(lambda progress: None)
    gateway = GrpcGateway(PolicyService(policies, scheduler, access=Access(key)), port=0, **options)
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
    set_up()
    asyncio.run(main(json.loads(sys.argv[1])))
