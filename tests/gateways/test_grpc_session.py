"""What the gateway remembers of peers: bounded, expiring, never taken from under a call."""

from grasp_cube.gateways.grpc_access import is_local
from grasp_cube.gateways.grpc_session import Sessions


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def touch(sessions: Sessions, peer: str) -> int:
    with sessions.use(peer) as session:
        return id(session)


def test_the_number_of_peers_is_bounded():
    """The one that was silent longest is forgotten."""
    sessions = Sessions(3)
    first = touch(sessions, "a")
    for peer in "bcad":
        touch(sessions, peer)
    assert {session.peer for session in sessions} == {"c", "a", "d"}
    assert touch(sessions, "a") == first


def test_a_silent_peer_expires():
    """With its prompt, and only then."""
    clock = Clock()
    sessions = Sessions(3, idle_s=10, clock=clock)
    with sessions.use("a") as session:
        session.prompt = "wipe"
    clock.now = 10
    with sessions.use("a") as session:
        assert session.prompt == "wipe"
    clock.now = 20.5
    with sessions.use("a") as session:
        assert session.prompt is None


def test_a_session_in_use_is_not_forgotten():
    """However long its stream is open, and however many others come."""
    clock = Clock()
    sessions = Sessions(2, idle_s=10, clock=clock)
    with sessions.use("a") as session:
        clock.now = 100
        for peer in "bcd":
            touch(sessions, peer)
        with sessions.use("a") as again:
            assert again is session
    assert len(sessions) == 2


def test_who_is_on_this_machine():
    """As gRPC writes addresses."""
    assert all(map(is_local, ("ipv4:127.0.0.1:5", "ipv6:[::1]:5", "ipv6:%5B::1%5D:5")))
    assert not any(map(is_local, ("ipv4:10.0.0.127:5", "ipv6:[fe80::1]:5", "ipv6:%5B2001:db8::1%5D:5")))
    assert not is_local("ipv4:127.0.0.1:5", [("x-forwarded-for", "10.0.0.1")])
