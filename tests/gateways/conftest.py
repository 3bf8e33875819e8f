"""What the tests of the gateway share."""

import pytest
from grpc_client import compile_messages
from grpc_parts import Robot


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    return compile_messages(tmp_path_factory.mktemp("proto"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def robot(messages):
    return Robot(messages, 0)
