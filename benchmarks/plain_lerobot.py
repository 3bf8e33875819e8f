"""A plain script that serves a LeRobot checkpoint, the peer that the start of ours is measured against.

    python benchmarks/plain_lerobot.py --checkpoint checkpoints/lift_act

LeRobot's own factories, one inference to warm up, then openpi's wire in lock step: what one writes in an afternoon.
"""

import argparse
import asyncio

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from openpi_client import msgpack_numpy
from websockets.asyncio.server import ServerConnection, serve


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    folder = parser.parse_args().checkpoint
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    config.pretrained_backbone_weights = None
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    policy.eval()
    overrides = {"device_processor": {"device": "cpu"}}
    before, after = make_pre_post_processors(config, pretrained_path=folder, preprocessor_overrides=overrides)

    def infer(obs: dict[str, np.ndarray]) -> np.ndarray:
        batch = {name: torch.from_numpy(np.array(value)) for name, value in obs.items()}
        with torch.inference_mode():
            return after(policy.predict_action_chunk(before(batch))).numpy()

    infer({name: np.zeros(feature.shape, np.float32) for name, feature in config.input_features.items()})
    packer = msgpack_numpy.Packer()

    async def handle(connection: ServerConnection) -> None:
        await connection.send(packer.pack({"server": "plain"}))
        async for frame in connection:
            await connection.send(packer.pack({"actions": infer(msgpack_numpy.unpackb(frame))}))

    async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(f"listening at ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
