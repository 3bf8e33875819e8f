"""A client of the robots' gRPC stack, written from the description of its messages alone.

Its messages live in a descriptor pool of their own, so that nothing is shared with the server's stubs.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PROTO = """
syntax = "proto3";
package openpi;
message Observation { repeated float state = 1; repeated ImageData images = 2; string prompt = 3;
    double timestamp = 4; int32 episode_id = 5; int32 frame_index = 6; string extra_state = 7; }
message ImageData { string camera_name = 1; bytes data = 2; int32 width = 3; int32 height = 4; string encoding = 5; }
enum StatusCode { OK = 0; ERROR = 1; NOT_READY = 2; EPISODE_END = 3; MODEL_NOT_LOADED = 4; INVALID_INPUT = 5; }
message Action { repeated float values = 1; bool is_terminal = 2; float confidence = 3; StatusCode status = 4;
    string error_message = 5; int32 server_frame_index = 6; }
message ActionChunk { repeated ActionStep actions = 1; int32 chunk_size = 2; int32 action_dim = 3;
    bool is_terminal = 4; StatusCode status = 5; string error_message = 6; int32 server_frame_index = 7; }
message ActionStep { repeated float values = 1; }
message ControlCommand { CommandType type = 1; map<string, string> params = 2; }
enum CommandType { CMD_RESET = 0; CMD_SET_EPISODE = 1; CMD_SET_PROMPT = 2; }
message PolicyConfig { string config_name = 1; string checkpoint_dir = 2; string default_prompt = 3;
    string device = 4; }
message ServiceStatus { bool is_ready = 1; string model_name = 2; int32 current_episode = 3;
    int32 current_frame = 4; int32 action_horizon = 5; int32 action_dim = 6; string message = 7;
    string current_prompt = 8; string metadata_json = 9; }
message Empty {}
"""

OK, ERROR, NOT_READY, EPISODE_END, MODEL_NOT_LOADED, INVALID_INPUT = range(6)
CMD_RESET, CMD_SET_EPISODE, CMD_SET_PROMPT = range(3)
CAP = 100 * 1024 * 1024
# {method: (request, reply)} of those with one message each way.
SERVICE_METHODS = {
    "Configure": ("PolicyConfig", "ServiceStatus"),
    "Predict": ("Observation", "Action"),
    "PredictChunk": ("Observation", "ActionChunk"),
    "Control": ("ControlCommand", "ServiceStatus"),
    "GetStatus": ("Empty", "ServiceStatus"),
    "Reset": ("Empty", "ServiceStatus"),
}


def compile_messages(folder: Path) -> dict[str, Any]:
    """{name: message class}"""
    (folder / "openpi_inference.proto").write_text(PROTO)
    command = (sys.executable, "-m", "grpc_tools.protoc", "-I.", "--descriptor_set_out=set.pb")
    subprocess.run([*command, "openpi_inference.proto"], cwd=folder, check=True, timeout=60)
    files = descriptor_pb2.FileDescriptorSet.FromString((folder / "set.pb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(files.file[0])
    names = [message.name for message in files.file[0].message_type]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"openpi.{name}")) for name in names
    }


class Client:
    """One connection: a peer of its own."""

    def __init__(
        self,
        port: int,
        messages: dict[str, Any],
        *,
        cap: int = CAP,
        key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ):
        self.messages = messages
        self.metadata = [("authorization", key)] if key else None
        # Channels of one process share their connections unless they are told not to.
        options = [
            ("grpc.max_send_message_length", cap),
            ("grpc.max_receive_message_length", cap),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", 10000),
        ]
        address = f"127.0.0.1:{port}"
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def _method(self, kind: str, name: str, request: str, reply: str):
        return getattr(self.channel, kind)(
            f"/openpi.OpenPiInferenceService/{name}",
            self.messages[request].SerializeToString,
            self.messages[reply].FromString,
        )

    def _call(self, name: str, request: Any, reply: str, **options: Any):
        method = self._method("unary_unary", name, type(request).__name__, reply)
        return method(request, metadata=self.metadata, **({"timeout": 30} | options))

    def predict(self, observation: Any, **options: Any):
        return self._call("Predict", observation, "Action", **options)

    def predict_chunk(self, observation: Any, **options: Any):
        return self._call("PredictChunk", observation, "ActionChunk", **options)

    def stream(self, observations: Any):
        return self._method("stream_stream", "StreamPredict", "Observation", "Action")(
            observations, metadata=self.metadata, timeout=30
        )

    def configure(self, **fields: str):
        return self._call("Configure", self.messages["PolicyConfig"](**fields), "ServiceStatus")

    def control(self, kind: int, **params: str):
        command = self.messages["ControlCommand"](type=kind, params=params)
        return self._call("Control", command, "ServiceStatus")

    def status(self):
        return self._call("GetStatus", self.messages["Empty"](), "ServiceStatus")

    def reset(self):
        return self._call("Reset", self.messages["Empty"](), "ServiceStatus")
