"""rollout.rrd as Rerun's own program reads it, and the live viewer's process."""

import re
import subprocess
from pathlib import Path

import psutil
import pytest
import rerun_cli
from env_client.record.files import RunFolder
from env_client.record.rerun_record import FILE, RerunRecord
from env_client.sidecar.types import Mark
from record_parts import begin, only, play, run_info, ticks

RERUN = Path(rerun_cli.__file__).parent / "rerun"


def printed(file: Path) -> str:
    done = subprocess.run(
        [str(RERUN), "rrd", "print", str(file)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(text: str, entity: str) -> int:
    return sum(int(n) for n in re.findall(rf"with (\d+) rows \(.*?\) - {re.escape(entity)} - ", text))


def test_everything_is_in_the_file(tmp_path: Path) -> None:
    """Pictures, joints, chunks, timings, judgements and the blueprint; a torn file opens as well."""
    record = RerunRecord(RunFolder(tmp_path), live=False)
    record.begin_run(run_info())
    play(record, 0, 40)
    record.mark(Mark(0, True, "neat"))
    begin(record, 1)
    for tick in ticks(1, 20):
        record.tick(tick)
    record.close()
    file = only(tmp_path) / FILE
    text = printed(file)
    assert rows_of(text, "/cameras/front") == rows_of(text, "/cameras/wrist") == 60
    assert rows_of(text, "/joints/gripper") == 60 + 1
    assert rows_of(text, "/joints/gripper/chunk") == 6 * 10 + 1
    assert rows_of(text, "/timings") == 60 + 1
    assert rows_of(text, "/round_trip") == 6 + 1
    assert rows_of(text, "/log") == 4
    assert "BlueprintActivationCommand" in text
    torn = tmp_path / "torn.rrd"
    torn.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 5])
    assert 0 < printed(torn).count("Chunk(") < text.count("Chunk(")


@pytest.mark.slow
def test_the_live_viewer_listens_on_this_machine_only_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No port of it is open beyond loopback, and no process of it is left."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    said: list[str] = []
    record = RerunRecord(RunFolder(tmp_path), live=True, say=said.append)
    record.begin_run(run_info())
    play(record, 0, 30)
    assert re.search(r"Rerun: http://127\.0\.0\.1:\d+/", said[0])
    here = psutil.Process()
    viewers = [child for child in here.children(recursive=True) if "rerun" in child.name()]
    assert viewers
    listening = [
        connection.laddr.ip
        for viewer in viewers
        for connection in viewer.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    record.close()
    assert set(listening) == {"127.0.0.1"}
    _, alive = psutil.wait_procs(viewers, timeout=20)
    assert not alive
    assert rows_of(printed(only(tmp_path) / FILE), "/cameras/front") == 30
