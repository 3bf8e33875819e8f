"""The inference log as files: what a line holds, and what is left of one that was torn."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from env_client.record.files import JsonLines, plain, read_lines, write_json
from env_client.record.inference_log import InferenceLog
from env_client.sidecar.types import Mark
from env_client.wire import EncodedImage, encode_image
from record_parts import CAMERAS, actions, begin, lines_of, only, picture, play, run_info, ticks


def test_every_step_has_its_line_and_its_pictures(tmp_path: Path) -> None:
    """State, the action at each stage, chunk, prompt and pictures of each tick, and how the episodes went."""
    log = InferenceLog(tmp_path / "logs")
    log.begin_run(run_info())
    play(log, 0, 12)
    log.mark(Mark(0, False, "dropped the cube"))
    play(log, 1, 5, success=True)
    log.close()
    folder = only(tmp_path / "logs")
    assert folder.name == "session_2026-11-21_13-45-00"
    lines = lines_of(folder / "inference_log.jsonl")
    assert [(line["episode"], line["tick"], line["frame"]) for line in lines] == [
        *((0, tick, tick) for tick in range(12)),
        *((1, tick, 12 + tick) for tick in range(5)),
    ]
    np.testing.assert_allclose([line["stages"]["velocity"] for line in lines[:12]], actions(0, 12), atol=1e-5)
    np.testing.assert_allclose(lines[11]["state"], actions(0, 12)[11] - 0.5, atol=1e-5)
    assert (lines[11]["chunk_id"], lines[11]["chunk_index"], lines[10]["boundary"]) == (1, 1, True)
    assert (lines[10]["round_trip_ms"], "round_trip_ms" in lines[11]) == (50.0, False)
    np.testing.assert_allclose(lines[10]["chunk"]["actions"], actions(0, 22)[10:20], atol=1e-5)
    assert not any(line["starved"] or line["held"] for line in lines)
    for line in lines:
        assert set(line["images"]) == set(CAMERAS)
        shown = cv2.imread(str(folder / line["images"]["front"]))[:, :, ::-1]
        assert np.abs(shown.astype(int) - picture(line["tick"])).mean() < 3
    metadata = json.loads((folder / "metadata.json").read_text())
    told = [(e["ended"], e["success"], e["note"]) for e in metadata["episodes"]]
    assert told == [("time", False, "dropped the cube"), ("time", True, "")]
    assert metadata["action_names"][5] == "gripper.pos"


def test_a_tick_without_an_action_is_starved_or_says_why(tmp_path: Path) -> None:
    """Starved, refused and unreadable ticks can be told apart."""
    log = InferenceLog(tmp_path)
    log.begin_run(run_info())
    begin(log, 0)
    for change in (
        {"requested": None, "held": True, "stages": {}, "origin": None},
        {"held": True, "refused": "stale"},
        {"requested": None, "state": None, "images": {}, "sent": None, "error": "no status packet"},
    ):
        log.tick(next(ticks(0, 1, **change)))
    log.close()
    starved, refused, away = lines_of(only(tmp_path) / "inference_log.jsonl")
    assert (starved["starved"], starved["held"], starved["chunk_id"]) == (True, True, None)
    assert (refused["starved"], refused["refused"]) == (False, "stale")
    assert (away["error"], away["state"], away["images"]) == ("no status packet", None, {})


def test_a_cameras_own_jpeg_is_written_as_it_is(tmp_path: Path) -> None:
    """No picture is compressed twice."""
    image = encode_image(picture(3), "jpeg", quality=70)
    assert isinstance(image, EncodedImage)
    log = InferenceLog(tmp_path)
    log.begin_run(run_info())
    begin(log, 0)
    log.tick(replace(next(ticks(0, 1)), images={"front": image}))
    log.close()
    assert (only(tmp_path) / "images/frame_000000/front.jpg").read_bytes() == image.data


def test_a_run_that_broke_off_says_so(tmp_path: Path) -> None:
    """An episode without an end is torn; two runs of one second have folders of their own."""
    for _ in range(2):
        log = InferenceLog(tmp_path)
        log.begin_run(run_info())
        begin(log, 0)
        for tick in ticks(0, 3):
            log.tick(tick)
        log.close()
    first, second = sorted(tmp_path.iterdir())
    assert second.name == first.name + "_2"
    metadata = json.loads((second / "metadata.json").read_text())
    assert metadata["episodes"][0]["ended"].startswith("torn")
    assert len(lines_of(second / "inference_log.jsonl")) == 3


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    """What a killed process leaves is read; what nobody can have left is an error with its line."""
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path)
    for number in range(3):
        lines.write({"number": number, "values": np.array([1.5, np.nan])})
    lines.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number": 3, "val')
    assert [line["number"] for line in read_lines(path)] == [0, 1, 2]
    path.write_bytes(whole[:-2])
    assert [line["number"] for line in read_lines(path)] == [0, 1]
    path.write_bytes(b"{broken\n" + whole)
    with pytest.raises(ValueError, match="line 1 of"):
        list(read_lines(path))


def test_json_holds_no_words_that_json_does_not_know(tmp_path: Path) -> None:
    """NaN and infinity become null, paths and arrays plain values; the file is replaced as a whole."""
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    write_json(path, {"bad": [float("inf"), np.float32(np.nan)], "array": np.arange(2), "path": tmp_path})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "bad": [None, None],
        "array": [0, 1],
        "path": str(tmp_path),
    }
    assert plain({1: (np.int64(3), True)}) == {"1": [3, True]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]
