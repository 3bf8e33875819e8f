"""The JavaScript client of examples/, which knows docs/protocol.md only, against our server and our own client.

It runs in the Node that Playwright brings, so that no machine needs one of its own, and in Chromium.
"""

import base64
import functools
import json
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import playwright
import pytest
from env_client.wire import Dialect, encode_image, pack, unpack
from needs_browser import ARGUMENTS, CHROMIUM, needs_browser
from numpy_policy import write_checkpoint
from processes import ROOT
from serving_parts import CAMERAS, client, make_observation, serving

NODE = Path(playwright.__file__).parent / "driver" / "node"
EXAMPLE = ROOT / "examples" / "javascript"


def node(script: str, *arguments: object, frame: bytes = b"") -> str:
    """What an ES module prints; it sees the client's exports, `frame` (stdin) and `argv`."""
    head = (
        f'import {{ readFileSync, writeSync }} from "node:fs";\n'
        f"import * as wire from {json.dumps(str(EXAMPLE / 'msgpack.js'))};\n"
        f"import {{ PolicyClient, NdArray, EncodedImage }} from {json.dumps(str(EXAMPLE / 'client.js'))};\n"
        f"const frame = readFileSync(0); const argv = {json.dumps([str(a) for a in arguments])};\n"
    )
    command = [str(NODE), "--input-type=module", "--eval", head + script]
    done = subprocess.run(command, input=frame, capture_output=True, timeout=60, cwd=EXAMPLE)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("policy"), cameras=CAMERAS, n_obs_steps=2, horizon=8)
    with serving("--policy.path", folder, "--api-key", "a-key-for-tests") as (_, port):
        yield port


# Reads observations from stdin (a list in one frame), asks for their chunks, prints what came as JSON.
ASK = """
const client = await PolicyClient.connect(`ws://127.0.0.1:${argv[0]}`, { apiKey: "a-key-for-tests" });
const plain = (reply) => ({ ...reply, actions: [...reply.actions.data], shape: reply.actions.shape, action: undefined });
const outcome = (promise) => promise.then(plain, (error) => ({ code: error.code, message: error.message }));
const [before, now, damaged] = wire.unpack(frame);
const results = {
  spec: client.policy,
  chunk: await outcome(client.infer(now, { history: [before], prompt: "lift", episode: 3, captureTime: 12.5 })),
  refused: await outcome(client.infer(damaged)),
  afterwards: await outcome(client.infer(now, { history: [before], prompt: "lift" })),
  status: await client.status(),
  prompt: await client.setPrompt("lift"),
  remembered: await outcome(client.infer({ ...now, task: undefined }, { history: [before] })),
  reset: await client.reset(),
};
client.close();
console.log(JSON.stringify(results));
"""


def test_it_gets_the_chunk_that_our_own_client_gets(server):
    """Images, states, history and prompt arrive as ours do; errors come with their code and the connection goes on."""
    before, now = make_observation(1), make_observation(2)
    damaged = now | {"states": {"arm": np.zeros(5, np.float32)}}
    results = json.loads(node(ASK, server, frame=pack([before, now, damaged])))
    ours = client(server, api_key="a-key-for-tests")
    try:
        expected = ours.infer(now, history=[before], prompt="lift")["actions"]
        assert results["spec"] == ours.metadata["policy"]
    finally:
        ours.close()
    for name in ("chunk", "afterwards", "remembered"):
        assert results[name]["shape"] == [8, 6]
        np.testing.assert_array_equal(np.array(results[name]["actions"], np.float32).reshape(8, 6), expected)
    assert (results["chunk"]["episode"], results["chunk"]["capture_time"]) == (3, 12.5)
    assert results["refused"]["code"] == "INVALID_INPUT"
    assert "states.arm" in results["refused"]["message"]
    assert results["status"]["ready"] is True
    assert results["prompt"]["prompt"] == "lift"
    assert results["reset"]["reset"] is True


def test_a_compressed_image_is_answered_like_its_pixels(server):
    """A PNG that JavaScript passes on gives the chunk of the picture in it."""
    now = make_observation(4)
    as_png = now | {"images": {name: encode_image(image, "png") for name, image in now["images"].items()}}
    script = """
const client = await PolicyClient.connect(`ws://127.0.0.1:${argv[0]}`, { apiKey: "a-key-for-tests" });
const chunks = [];
for (const obs of wire.unpack(frame)) chunks.push([...(await client.infer(obs)).actions.data]);
client.close();
console.log(JSON.stringify(chunks));
"""
    raw, png = json.loads(node(script, server, frame=pack([now, as_png])))
    assert raw == png


def test_a_wrong_key_and_a_server_that_is_not_there_are_said(server):
    """`connect` rejects with a sentence instead of waiting."""
    script = """
for (const url of argv) await PolicyClient.connect(url, { apiKey: "wrong" }).catch((error) => console.log(error.message));
"""
    said = node(script, f"ws://127.0.0.1:{server}", "ws://127.0.0.1:9").splitlines()
    assert said == [
        f"ws://127.0.0.1:{server} does not answer, or refused the key",
        "ws://127.0.0.1:9 does not answer, or refused the key",
    ]


VALUES = {
    "numbers": [
        0,
        127,
        128,
        255,
        256,
        65535,
        65536,
        2**32 - 1,
        2**32,
        2**53 - 1,
        -1,
        -32,
        -33,
        -129,
        -(2**40),
    ],
    "floats": [0.5, -1e300, 3.0000001],
    "texts": ["", "é🤖", "x" * 31, "x" * 32, "x" * 300, "x" * 70000],
    "lists": [[], list(range(15)), list(range(16)), [None, True, False]],
    "many keys": {str(number): number for number in range(20)},
    "bins": [b"", b"a" * 255, b"a" * 256, b"a" * 70000],
}


def test_what_python_packs_comes_back_unchanged():
    """Every length form of msgpack and every dtype of the wire: Python -> JavaScript -> Python."""
    kinds = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f4", "<f8")
    arrays = {kind: np.arange(12).astype(kind).reshape(3, 4) for kind in kinds}
    sent = VALUES | {"arrays": arrays, "empty": np.zeros((0, 6), np.float32), "scalar": np.float32(2.5)}
    script = "writeSync(1, Buffer.from(wire.pack(wire.unpack(frame))).toString('base64'));"
    back, dialect = unpack(base64.b64decode(node(script, frame=pack(sent))))
    assert dialect is Dialect.OPENPI
    assert {key: back[key] for key in VALUES} == VALUES
    for kind, array in arrays.items():
        assert back["arrays"][kind].dtype == array.dtype
        np.testing.assert_array_equal(back["arrays"][kind], array)
    assert back["empty"].shape == (0, 6)
    assert back["scalar"] == 2.5


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"\x92\x01", "the frame ends at 2"),
        (pack("whole") + b"\x01", "1 surplus bytes"),
        (b"\xc7\x01\x02\x03", "plain msgpack was expected"),
        (b"\xda\xff\xff", "the frame ends at 3"),
        (pack({b"__ndarray__": True, b"data": b"12", b"dtype": "|O", b"shape": [1]}), "the dtype |O"),
        (
            pack({b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [3]}),
            "1 values for the shape 3",
        ),
    ],
)
def test_a_damaged_frame_is_refused(frame, said):
    """It is named, and nothing beyond its end is read."""
    printed = node("try { wire.unpack(frame); } catch (error) { console.log(error.message); }", frame=frame)
    assert said in printed


def test_the_command_of_its_readme(server):
    """`node ask.js` prints the policy, the shape of the chunk and its first action by name."""
    command = [str(NODE), "ask.js", f"ws://127.0.0.1:{server}", "a-key-for-tests"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert "chunk 8 x 6 in" in done.stdout
    assert "joint_5.pos" in done.stdout


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


PAGE = """async (port) => {
  const { PolicyClient, NdArray } = await import("/client.js");
  const client = await PolicyClient.connect(`ws://127.0.0.1:${port}`);
  const images = {}, states = {};
  for (const { name, height, width } of client.policy.cameras)
    images[name] = new NdArray(new Uint8Array(height * width * 3).fill(128), [height, width, 3]);
  for (const { name, size } of client.policy.states) states[name] = new NdArray(new Float32Array(size), [size]);
  const { actions } = await client.infer({ images, states });
  client.close();
  return { shape: actions.shape, values: [...actions.data] };
}"""


@needs_browser
def test_it_runs_in_a_browser(tmp_path):
    """The same two files, loaded by a page: it gets the chunk that our own client gets."""
    from playwright.sync_api import sync_playwright

    pages = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(EXAMPLE)))
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    folder = write_checkpoint(tmp_path / "policy", cameras=CAMERAS, horizon=8)
    try:
        with serving("--policy.path", folder) as (_, port), sync_playwright() as player:
            browser = player.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{pages.server_address[1]}/")
            came = page.evaluate(PAGE, port)
            browser.close()
            ours = client(port)
            grey = {name: np.full((24, 32, 3), 128, np.uint8) for name in ("front", "wrist")}
            expected = ours.infer({"images": grey, "states": {"arm": np.zeros(6, np.float32)}})["actions"]
            ours.close()
    finally:
        pages.shutdown()
        pages.server_close()
    np.testing.assert_array_equal(np.array(came["values"], np.float32).reshape(came["shape"]), expected)
