"""An older gRPC server, written from the description of its messages alone: `python old_grpc_server.py OPTIONS`.

Its messages are compiled from the description, not imported from us. It knows no chunk merging, no metadata and no
episodes; OPTIONS is JSON: `action_dim`, `horizon`, `loaded` (False: it waits for Configure), `fail` (the number of
requests that it answers with ERROR first). Prints `port N`, and one JSON line for each request.
"""

import json
import sys
import tempfile
import threading
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from grpc_client import ERROR, MODEL_NOT_LOADED, OK, SERVICE_METHODS, compile_messages


class Service:
    def __init__(self, messages: dict, options: dict) -> None:
        self.messages, self.options = messages, options
        self.loaded = options.get("loaded", True)
        self.model = "old_pi05"
        self.failures = options.get("fail", 0)
        self.lock = threading.Lock()

    def say(self, **entry: object) -> None:
        with self.lock:
            print(json.dumps(entry), flush=True)

    def status(self, message: str = "") -> object:
        return self.messages["ServiceStatus"](
            is_ready=self.loaded,
            model_name=self.model if self.loaded else "",
            action_horizon=self.options["horizon"] if self.loaded else 0,
            action_dim=self.options["action_dim"] if self.loaded else 0,
            message=message,
        )

    def chunk(self, request: object) -> np.ndarray:
        state = np.array(request.state, np.float32)  # type: ignore[attr-defined]
        images = [
            {
                "name": i.camera_name,
                "encoding": i.encoding,
                "bytes": len(i.data),
                "size": [i.height, i.width],
                "head": i.data[:2].hex(),
            }
            for i in request.images  # type: ignore[attr-defined]
        ]
        self.say(
            call="predict", state=len(state), images=images, prompt=request.prompt, episode=request.episode_id
        )  # type: ignore[attr-defined]
        target = np.tile(state[: self.options["action_dim"]], (self.options["horizon"], 1))
        target[:, 0] += np.linspace(0, 0.1, len(target))
        return target

    def refusal(self) -> tuple[int, str] | None:
        if not self.loaded:
            return MODEL_NOT_LOADED, "Model not loaded"
        if self.failures > 0:
            self.failures -= 1
            return ERROR, "CUDA error: an illegal memory access"
        return None

    def PredictChunk(self, request: object, _: object) -> object:
        refused = self.refusal()
        if refused:
            return self.messages["ActionChunk"](status=refused[0], error_message=refused[1])
        rows = self.chunk(request)
        steps = [self.messages["ActionStep"](values=row) for row in rows.tolist()]
        return self.messages["ActionChunk"](
            actions=steps, chunk_size=len(rows), action_dim=rows.shape[1], status=OK
        )

    def Predict(self, request: object, _: object) -> object:
        refused = self.refusal()
        if refused:
            return self.messages["Action"](status=refused[0], error_message=refused[1])
        return self.messages["Action"](values=self.chunk(request)[1].tolist(), status=OK, confidence=1.0)

    def Configure(self, request: object, _: object) -> object:
        fields = {
            name: getattr(request, name)
            for name in ("config_name", "checkpoint_dir", "default_prompt", "device")
        }
        self.say(call="configure", **fields)
        if not fields["checkpoint_dir"].startswith("/checkpoints"):
            return self.status("no such checkpoint")
        self.loaded = True
        return self.status("loaded")

    def GetStatus(self, _request: object, _: object) -> object:
        return self.status()

    def Reset(self, _request: object, _: object) -> object:
        self.say(call="reset")
        return self.status()


def main(options: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        messages = compile_messages(Path(folder))
    service = Service(messages, options)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(service, name), messages[request].FromString, messages[reply].SerializeToString
        )
        for name, (request, reply) in SERVICE_METHODS.items()
        if hasattr(service, name)
    }
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("openpi.OpenPiInferenceService", handlers),)
    )
    print("port", server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
