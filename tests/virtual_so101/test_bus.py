"""The port itself: its link, who may take it, and the bus process's end."""

from __future__ import annotations

import os
import time

import pytest
import serial
from virtual_so101.bus import PortTakenError
from virtual_so101.bus_process import BusProcess
from virtual_so101.calibration import ArmCalibration
from virtual_so101.twin import Twin

PING_1 = bytes((0xFF, 0xFF, 1, 2, 1, 0xFB))
ALIVE_1 = bytes((0xFF, 0xFF, 1, 2, 0, 0xFC))
IN_PROCESS = pytest.mark.parametrize("bus_process", [False, True], ids=["threads", "process"])


def ping(link) -> bytes:
    """What servo 1 answers on this port."""
    with serial.Serial(str(link), 1_000_000, timeout=2.0) as port:
        port.write(PING_1)
        return port.read(6)


@IN_PROCESS
def test_the_port_answers_and_goes_with_the_twin(make_twin, bus_process):
    """A link to a terminal while it runs, nothing afterwards; it can be opened again and again."""
    twin = make_twin(bus_process=bus_process)
    link = twin.buses[0].link
    assert [ping(link) for _ in range(3)] == [ALIVE_1] * 3
    twin.close()
    assert not os.path.lexists(link)
    twin.close()


@IN_PROCESS
def test_a_dead_twins_link_is_taken_over(make_twin, tmp_path, bus_process):
    """A link that leads to no living twin is replaced."""
    (tmp_path / "port0").symlink_to("/dev/pts/99999")
    twin = make_twin(bus_process=bus_process)
    assert ping(twin.buses[0].link) == ALIVE_1


@IN_PROCESS
def test_a_living_twins_link_is_not(new_world, make_twin, tmp_path, bus_process):
    """A second robot on the same path is refused, and the first goes on."""
    first = make_twin(bus_process=bus_process)
    second = Twin(new_world(1), [tmp_path / "port0"], camera_port=None, bus_process=bus_process)
    with pytest.raises(PortTakenError, match="another virtual SO-101 serves"):
        second.start()
    assert ping(first.buses[0].link) == ALIVE_1


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_ours_stays(new_world, tmp_path, kind):
    """A file, a folder or a link to somewhere else is neither replaced nor removed."""
    path = tmp_path / "port0"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path)
    twin = Twin(new_world(1), [path], camera_port=None)
    with pytest.raises(PortTakenError, match="--port-link"):
        twin.start()
    assert os.path.lexists(path)


def test_a_bus_process_that_dies_is_noticed(make_twin):
    """`check`, which the command and the control socket call, says so."""
    twin = make_twin()
    twin.check()
    twin._process._process.kill()
    twin._process._process.wait()
    with pytest.raises(RuntimeError, match="servo bus process has ended"):
        twin.check()


@IN_PROCESS
def test_a_plug_that_does_not_fit_is_told_to_who_pushes_it(make_twin, bus_process):
    """Replugging where the link's folder is gone raises there; the bus lives on and fits afterwards."""
    twin = make_twin(bus_process=bus_process)
    link = twin.buses[0].link
    twin.buses[0].unplug()
    link.mkdir()
    with pytest.raises(OSError, match="port0"):
        twin.buses[0].replug()
    link.rmdir()
    twin.check()
    twin.buses[0].replug()
    assert ping(link) == ALIVE_1


def test_the_bus_process_removes_its_port_when_its_twin_is_gone(new_world, tmp_path):
    """Whatever ended the twin, the socket closes, and the link does not stay behind."""
    world = new_world(1)
    calibration = ArmCalibration.of_limits(world.joint_lower, world.joint_upper)
    process = BusProcess([calibration], [tmp_path / "port"])
    process.buses[0].start()
    assert ping(tmp_path / "port") == ALIVE_1
    process.close()
    assert not process.alive
    assert not os.path.lexists(tmp_path / "port")
    process.close()


def test_an_unwritable_log_is_refused(new_world, tmp_path):
    """The error of the other process arrives here with its type."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Twin(
            new_world(1),
            [tmp_path / "port"],
            camera_port=None,
            bus_process=True,
            log_path=tmp_path / "file" / "servo.jsonl",
        )


def test_half_a_packet_is_forgotten(make_twin):
    """A packet that stops in the middle does not swallow the next one."""
    twin = make_twin()
    with serial.Serial(str(twin.buses[0].link), 1_000_000, timeout=2.0) as port:
        port.write(PING_1[:4])
        time.sleep(0.4)
        port.write(PING_1)
        assert port.read(6) == ALIVE_1
