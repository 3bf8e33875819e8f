from collections.abc import Iterable as _Iterable
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper

DESCRIPTOR: _descriptor.FileDescriptor

class StatusCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OK: _ClassVar[StatusCode]
    ERROR: _ClassVar[StatusCode]
    NOT_READY: _ClassVar[StatusCode]
    EPISODE_END: _ClassVar[StatusCode]
    MODEL_NOT_LOADED: _ClassVar[StatusCode]
    INVALID_INPUT: _ClassVar[StatusCode]

class CommandType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CMD_RESET: _ClassVar[CommandType]
    CMD_SET_EPISODE: _ClassVar[CommandType]
    CMD_SET_PROMPT: _ClassVar[CommandType]

OK: StatusCode
ERROR: StatusCode
NOT_READY: StatusCode
EPISODE_END: StatusCode
MODEL_NOT_LOADED: StatusCode
INVALID_INPUT: StatusCode
CMD_RESET: CommandType
CMD_SET_EPISODE: CommandType
CMD_SET_PROMPT: CommandType

class ImageData(_message.Message):
    __slots__ = ("camera_name", "data", "encoding", "height", "width")
    CAMERA_NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    camera_name: str
    data: bytes
    width: int
    height: int
    encoding: str
    def __init__(
        self,
        camera_name: str | None = ...,
        data: bytes | None = ...,
        width: int | None = ...,
        height: int | None = ...,
        encoding: str | None = ...,
    ) -> None: ...

class Observation(_message.Message):
    __slots__ = ("episode_id", "extra_state", "frame_index", "images", "prompt", "state", "timestamp")
    STATE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    EXTRA_STATE_FIELD_NUMBER: _ClassVar[int]
    state: _containers.RepeatedScalarFieldContainer[float]
    images: _containers.RepeatedCompositeFieldContainer[ImageData]
    prompt: str
    timestamp: float
    episode_id: int
    frame_index: int
    extra_state: str
    def __init__(
        self,
        state: _Iterable[float] | None = ...,
        images: _Iterable[ImageData | _Mapping] | None = ...,
        prompt: str | None = ...,
        timestamp: float | None = ...,
        episode_id: int | None = ...,
        frame_index: int | None = ...,
        extra_state: str | None = ...,
    ) -> None: ...

class Action(_message.Message):
    __slots__ = ("confidence", "error_message", "is_terminal", "server_frame_index", "status", "values")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    IS_TERMINAL_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SERVER_FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    is_terminal: bool
    confidence: float
    status: StatusCode
    error_message: str
    server_frame_index: int
    def __init__(
        self,
        values: _Iterable[float] | None = ...,
        is_terminal: bool | None = ...,
        confidence: float | None = ...,
        status: StatusCode | str | None = ...,
        error_message: str | None = ...,
        server_frame_index: int | None = ...,
    ) -> None: ...

class ActionStep(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Iterable[float] | None = ...) -> None: ...

class ActionChunk(_message.Message):
    __slots__ = (
        "action_dim",
        "actions",
        "chunk_size",
        "error_message",
        "is_terminal",
        "server_frame_index",
        "status",
    )
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ACTION_DIM_FIELD_NUMBER: _ClassVar[int]
    IS_TERMINAL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SERVER_FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.RepeatedCompositeFieldContainer[ActionStep]
    chunk_size: int
    action_dim: int
    is_terminal: bool
    status: StatusCode
    error_message: str
    server_frame_index: int
    def __init__(
        self,
        actions: _Iterable[ActionStep | _Mapping] | None = ...,
        chunk_size: int | None = ...,
        action_dim: int | None = ...,
        is_terminal: bool | None = ...,
        status: StatusCode | str | None = ...,
        error_message: str | None = ...,
        server_frame_index: int | None = ...,
    ) -> None: ...

class ControlCommand(_message.Message):
    __slots__ = ("params", "type")
    class ParamsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: str | None = ..., value: str | None = ...) -> None: ...

    TYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    type: CommandType
    params: _containers.ScalarMap[str, str]
    def __init__(
        self, type: CommandType | str | None = ..., params: _Mapping[str, str] | None = ...
    ) -> None: ...

class PolicyConfig(_message.Message):
    __slots__ = ("checkpoint_dir", "config_name", "default_prompt", "device")
    CONFIG_NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIR_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROMPT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    config_name: str
    checkpoint_dir: str
    default_prompt: str
    device: str
    def __init__(
        self,
        config_name: str | None = ...,
        checkpoint_dir: str | None = ...,
        default_prompt: str | None = ...,
        device: str | None = ...,
    ) -> None: ...

class ServiceStatus(_message.Message):
    __slots__ = (
        "action_dim",
        "action_horizon",
        "current_episode",
        "current_frame",
        "current_prompt",
        "is_ready",
        "message",
        "metadata_json",
        "model_name",
    )
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    CURRENT_EPISODE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FRAME_FIELD_NUMBER: _ClassVar[int]
    ACTION_HORIZON_FIELD_NUMBER: _ClassVar[int]
    ACTION_DIM_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_PROMPT_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    is_ready: bool
    model_name: str
    current_episode: int
    current_frame: int
    action_horizon: int
    action_dim: int
    message: str
    current_prompt: str
    metadata_json: str
    def __init__(
        self,
        is_ready: bool | None = ...,
        model_name: str | None = ...,
        current_episode: int | None = ...,
        current_frame: int | None = ...,
        action_horizon: int | None = ...,
        action_dim: int | None = ...,
        message: str | None = ...,
        current_prompt: str | None = ...,
        metadata_json: str | None = ...,
    ) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
