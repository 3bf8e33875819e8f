"""The gRPC gateway's messages: bytes as a peer sends them, up to what a policy would read."""

import numpy as np
from env_client.openpi_grpc import openpi_inference_pb2 as pb2
from env_client.wire import CameraSpec, InvalidInput, PolicySpec, StateSpec, encode_image

from fuzzing.wire import MAX_PIXELS, READERS, refusal
from grasp_cube.gateways.grpc_access import Unreadable, is_local, reader
from grasp_cube.gateways.grpc_observation import read_observation
from grasp_cube.gateways.grpc_session import PeerSession, obey
from grasp_cube.policies.policy import PolicyRequest

__all__ = ["message", "seeds_of"]

CAMERAS = tuple(CameraSpec(name, 24, 32) for name in ("head", "left_wrist"))
SPEC = PolicySpec("act", 16, 4, cameras=CAMERAS, states=(StateSpec("arms", 16),))
KINDS = (pb2.Observation, pb2.ControlCommand, pb2.PolicyConfig)


def message(data: bytes) -> None:
    """The first byte says which message the rest is taken for."""
    if not data or data[0] >= len(KINDS):
        return
    kind = KINDS[data[0]]
    read = reader(kind)(data[1:])
    if isinstance(read, Unreadable):
        return
    try:
        if kind is pb2.Observation:
            # Large pictures are another target's.
            if all(image.height * image.width <= MAX_PIXELS for image in read.images):
                READERS[0].check(PolicyRequest(read_observation(read, SPEC)))
        elif kind is pb2.ControlCommand:
            session = PeerSession("ipv4:127.0.0.1:1")
            said = obey(session, read)
            pb2.ServiceStatus(message=said, current_prompt=session.prompt or "").SerializeToString()
        else:
            is_local(f"ipv4:{read.checkpoint_dir}", (("via", read.config_name),))
    except InvalidInput as error:
        refusal(error)
        pb2.Action(error_message=error.message).SerializeToString()


def seeds_of(name: str) -> list[bytes]:
    grey = np.full((24, 32, 3), 90, np.uint8)
    pictures = {
        "rgb8": grey.tobytes(),
        "jpeg": encode_image(grey, "jpeg").data,
        "png": encode_image(grey, "png").data,
    }  # type: ignore[union-attr]
    seeds = []
    for encoding, pixels in pictures.items():
        images = [
            pb2.ImageData(camera_name=camera, data=bytes(pixels), width=32, height=24, encoding=encoding)
            for camera in ("head_rgbd", "left_wrist")
        ]
        made = pb2.Observation(state=[0.5] * 16, images=images, prompt="lift", episode_id=3, frame_index=7)
        seeds.append(b"\0" + made.SerializeToString())
    for type_, params in (
        (pb2.CMD_RESET, {}),
        (pb2.CMD_SET_EPISODE, {"episode": "12"}),
        (pb2.CMD_SET_PROMPT, {"prompt": "lift"}),
    ):
        seeds.append(b"\1" + pb2.ControlCommand(type=type_, params=params).SerializeToString())
    config = pb2.PolicyConfig(
        checkpoint_dir="/runs/lift", config_name="pi0", default_prompt="lift", device="cpu"
    )
    return [*seeds, b"\2" + config.SerializeToString()]
