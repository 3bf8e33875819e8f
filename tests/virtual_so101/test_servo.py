"""Registers, packets and the motion profile, without any driver."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_so101.calibration import MID_TICK, ArmCalibration
from virtual_so101.chain import ServoChain
from virtual_so101.motion import ACCELERATION, ON, TARGET, TOP_SPEED, Motion
from virtual_so101.protocol import BROADCAST_ID, Instruction, Packet, PacketParser, status_packet
from virtual_so101.servo import REGISTERS, Servo, from_sign, to_sign

LIMITS = np.array([1.9, 1.7, 1.6, 1.6, 2.7, 0.9])


def instruction(servo_id: int, code: int, params: bytes = b"") -> bytes:
    """One instruction packet as bytes."""
    body = bytes((servo_id, len(params) + 2, code)) + params
    return b"\xff\xff" + body + bytes((~sum(body) & 0xFF,))


@pytest.fixture
def calibration():
    return ArmCalibration.of_limits(-LIMITS, LIMITS)


@pytest.fixture
def chain(calibration):
    return ServoChain(calibration)


# Packets


def test_packets_are_found_among_garbage():
    """Noise, a broken checksum and a cut packet cost nothing but themselves."""
    parser = PacketParser()
    good = instruction(3, Instruction.READ, bytes((56, 2)))
    broken = good[:-1] + bytes((good[-1] ^ 1,))
    assert parser.feed(b"\x00\xff\x12" + broken + good + good[:4]) == [
        Packet(3, Instruction.READ, bytes((56, 2)))
    ]
    assert parser.pending
    assert parser.feed(good[4:]) == [Packet(3, Instruction.READ, bytes((56, 2)))]
    assert not parser.pending


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 7))
def test_any_split_of_a_stream_gives_the_same_packets(params, step):
    """How the line cuts the bytes does not matter."""
    stream = b"".join(instruction(i + 1, Instruction.WRITE, p) for i, p in enumerate(params))
    whole = PacketParser().feed(stream)
    parser = PacketParser()
    pieces = [p for at in range(0, len(stream), step) for p in parser.feed(stream[at : at + step])]
    assert pieces == whole
    assert [p.params for p in whole] == params


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_break_the_parser(data):
    """Arbitrary bytes neither raise nor stay behind without bound."""
    parser = PacketParser()
    parser.feed(data)
    assert parser.skipped <= len(data)


# Registers


@given(st.integers(-2000, 2000))
def test_sign_magnitude_goes_both_ways(value):
    """Every value comes back; the sign is a bit."""
    assert from_sign(to_sign(value, 11), 11) == value
    assert to_sign(-5, 11) == 2048 + 5


def test_a_servo_starts_as_an_sts3215():
    """Model, firmware and id read as from the factory."""
    servo = Servo(4)
    assert int.from_bytes(servo.read(3, 2), "little") == 777
    assert servo.read(5, 1) == b"\x04"
    assert servo.read(0, 2) == bytes((3, 10))
    assert servo.get("torque_enable") == 0


def test_read_only_registers_stay():
    """A write over the present position changes nothing there."""
    servo = Servo(1)
    servo.write(REGISTERS["model_number"].address, b"\x00\x00")
    servo.write(REGISTERS["present_position"].address, b"\x01\x02")
    assert servo.get("model_number") == 777
    servo.encoder = 100.0
    assert int.from_bytes(servo.read(56, 2), "little") == 100


def test_the_lock_decides_what_survives():
    """EEPROM writes act at once, but stay over a power cycle only with the lock off."""
    servo = Servo(1)
    address = REGISTERS["p_coefficient"].address
    servo.write(address, b"\x14")
    assert servo.get("p_coefficient") == 20
    servo.power_cycle()
    assert servo.get("p_coefficient") == 32
    servo.write(REGISTERS["lock"].address, b"\x00")
    servo.write(address, b"\x14")
    servo.power_cycle()
    assert servo.get("p_coefficient") == 20
    assert servo.get("lock") == 1


@pytest.mark.parametrize("offset", [-1500, 0, 1500])
def test_the_offset_shifts_and_wraps_the_position(offset):
    """What the bus sees is the encoder minus the offset, within one turn."""
    servo = Servo(1, homing_offset=offset)
    for encoder in (0.0, 100.0, 4000.0, -50.0, 5000.0):
        servo.encoder = encoder
        assert servo.position == (round(encoder) - offset) % 4096


def test_writing_128_to_torque_makes_here_the_middle():
    """The firmware's own calibration: the offset changes, torque does not."""
    servo = Servo(1)
    servo.encoder = 3000.0
    servo.write(REGISTERS["torque_enable"].address, bytes((128,)))
    assert servo.position == 2048
    assert servo.get("torque_enable") == 0


def test_goals_are_cut_to_the_limits_and_wait_for_torque():
    """A goal beyond the range stops at it; without torque it moves nothing; torque on holds the pose."""
    servo = Servo(1, min_limit=1000, max_limit=3000)
    servo.encoder = 2000.0
    goal = REGISTERS["goal_position"].address
    servo.write(goal, (3900).to_bytes(2, "little"))
    assert not servo.driving
    servo.write(REGISTERS["torque_enable"].address, b"\x01")
    assert servo.driving
    assert servo.target == 2000.0
    servo.write(goal, (3900).to_bytes(2, "little"))
    assert servo.target == 3000.0
    servo.write(goal, to_sign(-10, 15).to_bytes(2, "little"))
    assert servo.target == 1000.0


def test_overload_ends_with_torque_off():
    """The status bit stays until torque is switched off."""
    servo = Servo(1)
    servo.write(40, b"\x01")
    servo.overloaded = True
    assert servo.error == 0x20
    assert not servo.driving
    servo.write(40, b"\x01")
    assert servo.error == 0x20
    servo.write(40, b"\x00")
    assert servo.error == 0


# The chain


def test_a_sync_read_answers_in_the_asked_order(chain):
    """One status per servo, in the order of the request; unknown ids are silent."""
    packet = Packet(BROADCAST_ID, Instruction.SYNC_READ, bytes((5, 1, 4, 9, 2)))
    assert chain.handle(packet, 1_000_000) == [status_packet(4, 0, b"\x04"), status_packet(2, 0, b"\x02")]


def test_a_sync_write_reaches_all_and_is_not_answered(calibration):
    """Goals arrive with their joint, as received."""
    heard = []
    chain = ServoChain(calibration, on_goal=heard.append)
    params = bytes((42, 2)) + b"".join(bytes((i, *(4000 + i).to_bytes(2, "little"))) for i in range(1, 7))
    assert chain.handle(Packet(BROADCAST_ID, Instruction.SYNC_WRITE, params), 1_000_000) == []
    assert heard == [{i: 4001 + i for i in range(6)}]
    assert chain.goal_packets == 1


def test_a_registered_write_waits_for_the_action(chain):
    """REG_WRITE is answered and does nothing until ACTION."""
    params = bytes((42, *(2100).to_bytes(2, "little")))
    assert chain.handle(Packet(1, Instruction.REG_WRITE, params), 1_000_000) == [status_packet(1, 0)]
    assert chain.goal_packets == 0
    assert chain.handle(Packet(BROADCAST_ID, Instruction.ACTION, b""), 1_000_000) == []
    assert chain.servos[0].get("goal_position") == 2100


def test_servos_hear_only_their_baud_rate_and_their_wire(chain):
    """Another speed, an unwired or a dead servo: silence."""
    ping = Packet(2, Instruction.PING, b"")
    assert chain.handle(ping, 500_000) == []
    assert chain.handle(ping, 1_000_000) == [status_packet(2, 0)]
    chain.wire({0, 2})
    assert chain.handle(ping, 1_000_000) == []
    chain.wire(None)
    chain.set_dead(1)
    assert chain.handle(ping, 1_000_000) == []


def test_two_servos_with_one_id_garble_the_line(chain):
    """As on the wire: what arrives has a wrong checksum."""
    chain.as_from_factory()
    replies = chain.handle(Packet(1, Instruction.PING, b""), 1_000_000)
    assert replies != [status_packet(1, 0)]
    assert len(replies) == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 254), st.integers(0, 255), st.binary(max_size=20), st.booleans())
def test_no_packet_breaks_the_chain(servo_id, code, params, known):
    """Any instruction with any parameters is survived."""
    chain = ServoChain(ArmCalibration.of_limits(-LIMITS, LIMITS))
    code = list(Instruction)[code % len(Instruction)] if known else code
    for reply in chain.handle(Packet(servo_id, code, params), 1_000_000):
        assert reply[:2] == b"\xff\xff"
    assert np.all(np.isfinite(chain.command()))


def test_the_command_is_in_radians(chain, calibration):
    """A goal of the middle tick is the middle of the joint's range; a pose survives the way there and back."""
    chain.enable_torque()
    pose = np.array([0.5, -0.4, 0.3, 0.2, -1.0, 0.1])
    for i, ticks in enumerate(calibration.to_ticks(pose)):
        chain.handle(Packet(i + 1, Instruction.WRITE, bytes((42, *int(ticks).to_bytes(2, "little")))), 0)
    command = chain.command()
    assert np.all(command[ON] == 1.0)
    assert np.allclose(command[TARGET], pose, atol=0.001)


# Units


def test_units_agree_with_lerobot(calibration):
    """Normalised values are what LeRobot's formula makes of the ticks."""
    assert calibration.to_ticks(np.zeros(6)).tolist() == [MID_TICK] * 6
    assert calibration.to_normalized(-LIMITS)[:5] == pytest.approx([-100.0] * 5)
    assert calibration.to_normalized(LIMITS) == pytest.approx([100.0] * 6)
    assert calibration.to_normalized(-LIMITS)[5] == pytest.approx(0.0)
    pose = np.array([0.5, -0.4, 0.3, 0.2, -1.0, 0.1])
    there_and_back = calibration.from_normalized(calibration.to_normalized(pose))
    assert np.allclose(there_and_back, pose, atol=2 * 2 * np.pi / 4096)


def test_the_range_never_exceeds_the_limits(calibration):
    """Rounding goes inwards, so that no tick of the range lies beyond a stop."""
    assert np.all(calibration.from_ticks(calibration.range_min) >= -LIMITS)
    assert np.all(calibration.from_ticks(calibration.range_max) <= LIMITS)


def test_wrong_limits_are_refused():
    """The sentence says what was expected."""
    with pytest.raises(ValueError, match="lower limit below"):
        ArmCalibration.of_limits(LIMITS, -LIMITS)


# Motion


def command_for(target: float, top: float = 0.0, acceleration: float = 0.0) -> np.ndarray:
    command = np.zeros((4, 6))
    command[TARGET], command[ON] = target, 1.0
    command[TOP_SPEED], command[ACCELERATION] = top, acceleration
    return command


def test_without_limits_the_goal_goes_straight_to_the_motor():
    """LeRobot's settings: the physics alone shapes the motion."""
    goals, on = Motion().advance(0.01, command_for(1.0), np.zeros(6))
    assert goals.tolist() == [1.0] * 6
    assert on.all()


def test_a_motor_that_is_off_follows_the_joint():
    """No set point for a limp joint."""
    command = command_for(1.0)
    command[ON] = 0.0
    goals, on = Motion().advance(0.01, command, np.full(6, 0.3))
    assert goals.tolist() == [0.3] * 6
    assert not on.any()


@pytest.mark.parametrize(("top", "acceleration"), [(0.5, 0.0), (0.5, 2.0), (0.0, 2.0)])
def test_speed_and_acceleration_limits_hold(top, acceleration):
    """The set point keeps both limits, does not overshoot, and arrives."""
    motion, dt = Motion(), 0.004
    path = [0.0]
    for _ in range(1500):
        path.append(motion.advance(dt, command_for(1.0, top, acceleration), np.zeros(6))[0][0])
    speed = np.diff(path) / dt
    assert path[-1] == pytest.approx(1.0, abs=1e-3)
    assert max(path) <= 1.0 + 1e-3
    if top:
        assert speed.max() <= top + 1e-9
    if acceleration:
        # The last step onto the goal is cut short.
        assert np.abs(np.diff(speed))[:-1].max() <= 2.0 * acceleration * dt + 0.1
