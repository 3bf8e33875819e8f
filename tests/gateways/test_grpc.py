"""The gRPC gateway over real sockets: the server is a process, the client knows the messages' description only."""

import concurrent.futures
import json
import sys
import threading
import time

import cv2
import grpc
import numpy as np
import pytest
from grpc_client import (
    CMD_RESET,
    CMD_SET_EPISODE,
    CMD_SET_PROMPT,
    INVALID_INPUT,
    MODEL_NOT_LOADED,
    OK,
    Client,
)
from grpc_parts import FIELDS, Robot, grpc_gateway, refused
from numpy_policy import write_checkpoint
from processes import running


@pytest.fixture(scope="module")
def port(folder):
    """Serves a quick policy, shared by the module's tests; no traceback may have been logged at its end."""
    checkpoint = write_checkpoint(folder / "quick", default_prompt="tidy up", **FIELDS)
    with grpc_gateway(checkpoint) as (process, number):
        yield number
        assert "Traceback" not in process.output, process.output


@pytest.fixture
def client(port, messages):
    with Client(port, messages) as made:
        yield made


def test_an_episode(client, messages):
    """Status, reset, then ticks with Predict: each chunk is used up before the next inference."""
    status = client.status()
    assert status.is_ready
    assert (status.model_name, status.action_horizon, status.action_dim) == ("quick", 4, 16)
    assert status.current_prompt == "tidy up"
    assert json.loads(status.metadata_json)["policy"]["cameras"][0]["name"] == "head"
    client.reset()
    for tick in range(10):
        robot = Robot(messages, tick)
        if tick % 4 == 0:
            chunk = robot.chunk()
        action = client.predict(robot.observation(episode_id=3, frame_index=tick))
        assert action.status == OK, action.error_message
        assert np.array_equal(np.float32(action.values), chunk[tick % 4])
        assert action.server_frame_index == tick + 1
        assert not action.is_terminal
    assert (client.status().current_episode, client.status().current_frame) == (3, 10)


def test_a_whole_chunk(client, messages):
    """Each PredictChunk is an inference, and ends what Predict still held."""
    first, second = Robot(messages, 1), Robot(messages, 2)
    client.predict(first.observation())
    reply = client.predict_chunk(second.observation())
    assert (reply.status, reply.chunk_size, reply.action_dim) == (OK, 4, 16)
    assert np.array_equal([step.values for step in reply.actions], second.chunk())
    assert np.array_equal(np.float32(client.predict(second.observation()).values), second.chunk()[0])


def test_a_stream_answers_each_observation_in_order(client, robot):
    """Also the damaged one, after which it goes on."""
    observations = [robot.observation(frame_index=i) for i in range(3)]
    observations.insert(1, robot.observation(frame_index=1, episode_id=1, state=[1.0]))
    answers = list(client.stream(iter(observations)))
    assert [answer.status for answer in answers] == [OK, INVALID_INPUT, OK, OK]
    assert [answer.server_frame_index for answer in answers] == [1, 0, 1, 2]


def test_what_begins_a_new_chunk(client, messages):
    """Another episode, another prompt, a frame number that falls, Reset and each command."""
    robot = Robot(messages, 3)

    def first(**fields) -> bool:
        values = np.float32(client.predict(robot.observation(**fields)).values)
        return any(np.array_equal(values, robot.chunk(p)[0]) for p in ("tidy up", "wipe", "sort"))

    assert first(frame_index=5)
    assert not first(frame_index=6)
    assert first(frame_index=6, episode_id=1)
    assert first(frame_index=6, episode_id=1, prompt="wipe")
    assert first(frame_index=0, episode_id=1, prompt="wipe")
    client.reset()
    assert first(frame_index=1, episode_id=1, prompt="wipe")
    client.control(CMD_RESET)
    assert first(frame_index=2, episode_id=1, prompt="wipe")
    assert client.control(CMD_SET_EPISODE, episode="7").current_episode == 7
    assert first(frame_index=3, episode_id=7, prompt="wipe")
    assert client.control(CMD_SET_PROMPT, prompt="sort").current_prompt == "sort"
    assert first(frame_index=4, episode_id=7)
    assert not first(frame_index=5, episode_id=7)


def test_a_chunk_is_not_continued_after_a_pause(client, robot):
    """The robot may stand elsewhere by now."""
    client.predict(robot.observation())
    time.sleep(2.2)
    assert np.array_equal(np.float32(client.predict(robot.observation()).values), robot.chunk()[0])


def test_compressed_images(client, robot):
    """PNG is exact; JPEG with and without a declared size is what OpenCV decodes; BGR is turned."""
    wrist = robot.image("wrist_left", "raw", robot.wrist.tobytes())
    png = cv2.imencode(".png", robot.head[:, :, ::-1])[1].tobytes()
    jpeg = cv2.imencode(".jpg", robot.head[:, :, ::-1])[1]
    decoded = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[:, :, ::-1]
    sent = {
        "png": (robot.image("head", "PNG", png), robot.head),
        "jpeg": (robot.image("cam_high", "jpeg", jpeg.tobytes()), decoded),
        "no size": (robot.image("head", "jpg", jpeg.tobytes(), 0, 0), decoded),
        "bgr8": (robot.image("head", "bgr8", robot.head[:, :, ::-1].tobytes()), robot.head),
    }
    for kind, (image, seen) in sent.items():
        reply = client.predict_chunk(robot.observation([image, wrist]))
        assert reply.status == OK, (kind, reply.error_message)
        assert np.array_equal([step.values for step in reply.actions], robot.chunk(head=seen)), kind


def test_what_does_not_fit_is_named(client, robot):
    """Every kind of broken observation is INVALID_INPUT with what came and what was expected; then all goes on."""
    raw = robot.head.tobytes()
    jpeg = cv2.imencode(".jpg", robot.head)[1].tobytes()
    png = cv2.imencode(".png", robot.head)[1].tobytes()
    wrist = robot.image("left_wrist", "raw", robot.wrist.tobytes())
    broken = [
        (robot.image("head", "jpeg", jpeg[: len(jpeg) // 8]), "'head'"),
        (robot.image("head", "png", png[: len(png) // 2]), "damaged"),
        (robot.image("head", "jpeg", png), "24x32"),
        (robot.image("head", "jpeg", b""), "without data"),
        (robot.image("head", "jpeg", b"\x80\x04\x95pickle", 0, 0), "header"),
        (robot.image("head", "png", png, 320, 240), "24x32"),
        (robot.image("head", "raw", raw[:-1]), "2303 bytes"),
        (robot.image("head", "raw", raw, 0, 0), "0x0"),
        (robot.image("head", "raw", b"", -32, -24), "-24x-32"),
        (robot.image("head", "raw", b"", 2**31 - 1, 2**31 - 1), "pixels"),
        (robot.image("head", "h265", raw), "h265"),
        (robot.image("head", "rgb8", raw[: 12 * 32 * 3], 32, 12), "32x12"),
        (robot.image("torso_rgbd", "raw", raw), "'head'"),
    ]
    observations = [(robot.observation([image, wrist]), said) for image, said in broken]
    twice = [robot.image(name, "raw", raw) for name in ("head", "head_rgbd")]
    observations += [
        (robot.observation([*twice, wrist]), "two images"),
        (robot.observation([robot.image("nose", "raw", raw)]), "nose"),
        (robot.observation([wrist] * 40), "40 images"),
        (robot.observation([]), "camera"),
        (robot.observation(state=[]), "state"),
        (robot.observation(state=[0.0] * 7), "[7]"),
        (robot.observation(state=[0.0] * 15 + [float("nan")]), "not finite"),
        (robot.observation(state=[0.0] * 5000), "5000"),
    ]
    for observation, said in observations:
        for reply in (client.predict(observation), client.predict_chunk(observation)):
            assert reply.status == INVALID_INPUT, reply
            assert said in reply.error_message
            assert "Traceback" not in reply.error_message
    assert client.predict(robot.observation()).status == OK


def test_commands_that_cannot_be_obeyed(client, robot):
    """Their answer has no status, so the call itself fails."""
    code = grpc.StatusCode.INVALID_ARGUMENT
    assert "'seven'" in refused(code, client.control, CMD_SET_EPISODE, episode="seven")
    assert "''" in refused(code, client.control, CMD_SET_EPISODE)
    assert "integer" in refused(code, client.control, CMD_SET_EPISODE, episode=str(2**31))
    assert "prompt" in refused(code, client.control, CMD_SET_PROMPT)
    assert "17" in refused(code, client.control, 17)


def test_a_message_over_the_cap_is_refused(port, messages, robot):
    """By gRPC, before it is read; the server goes on."""
    with Client(port, messages, cap=2**30) as client:
        huge = robot.observation(extra_state="x" * (100 * 1024 * 1024))
        refused(grpc.StatusCode.RESOURCE_EXHAUSTED, client.predict, huge)
        assert client.predict(robot.observation()).status == OK


def test_bytes_that_are_no_message(port, messages, robot):
    """gRPC's own codes, and not a word about our insides; so for a method that does not exist."""
    junk = b"\x80\x04\x95cos\nsystem\n"
    methods = ("Configure", "Predict", "PredictChunk", "Control", "GetStatus", "Reset")
    with Client(port, messages) as client:
        for name in methods:
            call = client.channel.unary_unary(f"/openpi.OpenPiInferenceService/{name}")
            said = refused(grpc.StatusCode.INVALID_ARGUMENT, call, junk, timeout=10)
            assert said.startswith("14 bytes that are no openpi.")
        stream = client.channel.stream_stream("/openpi.OpenPiInferenceService/StreamPredict")
        answers = stream(iter([robot.observation().SerializeToString(), junk]), timeout=10)
        assert next(answers)
        assert "Observation" in refused(grpc.StatusCode.INVALID_ARGUMENT, next, answers)
        unknown = client.channel.unary_unary("/openpi.OpenPiInferenceService/PredictAll")
        refused(grpc.StatusCode.UNIMPLEMENTED, unknown, junk, timeout=10)
        assert client.predict(robot.observation()).status == OK


def test_a_client_that_leaves_its_stream_takes_nothing_along(port, messages, robot):
    """More often than there are workers; the fixture looks for tracebacks at the end."""
    leave = threading.Event()

    def observations():
        yield robot.observation()
        leave.wait(20)

    for _ in range(15):
        with Client(port, messages) as client:
            stream = client.stream(observations())
            assert next(stream).status == OK
            stream.cancel()
    leave.set()
    with Client(port, messages) as client:
        assert client.predict(robot.observation()).status == OK


def test_a_server_of_one_checkpoint_refuses_configure(client, robot, folder):
    """The peer that asked for another policy is not moved by this one; others are."""
    status = client.configure(config_name="other", checkpoint_dir=str(folder / "other"))
    assert not status.is_ready
    assert status.message.startswith("INVALID_INPUT: this server was started for its own checkpoints")
    action = client.predict(robot.observation())
    assert (action.status, list(action.values)) == (MODEL_NOT_LOADED, [])
    assert "was not loaded" in action.error_message
    assert not client.status().is_ready


def test_peers_share_nothing(port, messages):
    """Prompt, chunk and episode of eight connections at once, each as if it were alone."""

    def drive(number: int) -> None:
        with Client(port, messages) as client:
            client.control(CMD_SET_PROMPT, prompt=f"task {number}")
            for tick in range(24):
                robot = Robot(messages, 100 * number + tick)
                if tick % 4 == 0:
                    chunk = robot.chunk(f"task {number}")
                action = client.predict(robot.observation(episode_id=number, frame_index=tick))
                assert action.status == OK, action.error_message
                assert np.array_equal(np.float32(action.values), chunk[tick % 4])
            assert client.status().current_episode == number

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(drive, range(8)))


def test_a_port_in_use_is_a_sentence(port, folder):
    """And not a port that two servers share."""
    code = (
        "import asyncio; from grasp_cube.gateways.grpc import GrpcGateway\n"
        "from grasp_cube.policies.policy import PolicyError\n"
        "from grasp_cube.serving.configure import Policies\n"
        "from grasp_cube.serving.loading import Loader\n"
        "from grasp_cube.serving.scheduler import Scheduler\n"
        "from grasp_cube.serving.service import PolicyService\n"
        "async def main():\n"
        "    scheduler = Scheduler()\n"
        "    service = PolicyService(Policies(Loader(scheduler)), scheduler)\n"
        f"    gateway = GrpcGateway(service, port={port})\n"
        "    try: await gateway.start()\n"
        "    except PolicyError as error: print('said:', error)\n"
        "asyncio.run(main())"
    )
    with running(sys.executable, "-c", code) as process:
        assert str(port) in process.wait_for("said: (.*)")[1]
