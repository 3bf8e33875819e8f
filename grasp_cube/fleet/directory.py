"""Which replicas there are, and what the fleet is to become: the one thing that its processes share.

Life cycle: one Ray actor for each fleet, made by `serve_fleet`, gone with it. Replicas `join` when they answer and
`leave` when they are told to end; `serve_fleet` asks for all of them, and `serve_fleet --update` leaves a proposal.
Error policy: nothing here raises; who is not known is not an error.
"""

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["ACTOR", "NAMESPACE", "Directory", "Proposal", "ReplicaEntry"]

NAMESPACE, ACTOR = "grasp_cube", "fleet"


@dataclass(frozen=True)
class ReplicaEntry:
    """One replica's server."""

    # Ray's id of the replica, short.
    replica: str
    # The policy's name, and which form of it (`GroupConfig.generation`).
    policy: str
    generation: str
    host: str
    port: int
    pid: int
    # Whether it takes no new clients any more.
    draining: bool = False

    @property
    def address(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Proposal:
    """An update that somebody asked for, and what became of it so far."""

    number: int
    # The `FleetConfig` that is to hold from now on.
    config: Any
    lines: tuple[str, ...] = ()
    # None while it is under way, then whether it was carried out.
    done: bool | None = None


class Directory:
    """The actor's class. Its methods are quick."""

    def __init__(self) -> None:
        self._replicas: dict[str, ReplicaEntry] = {}
        self._newest: dict[str, str] = {}
        self._proposal: Proposal | None = None

    def expect(self, policy: str, generation: str) -> None:
        """From now on replicas of this generation stand for the policy; others are being replaced."""
        self._newest[policy] = generation

    def join(self, entry: ReplicaEntry) -> None:
        self._replicas[entry.replica] = entry

    def leave(self, replica: str) -> bool:
        """It takes no new clients. True when it is being replaced: its clients' policy is then nowhere else for long."""
        entry = self._replicas.get(replica)
        if entry is None:
            return False
        self._replicas[replica] = replace(entry, draining=True)
        return self._newest.get(entry.policy) not in (None, entry.generation)

    def forget(self, replica: str) -> None:
        self._replicas.pop(replica, None)

    def replicas(self) -> list[ReplicaEntry]:
        return list(self._replicas.values())

    def propose(self, config: Any) -> int | None:
        """The number of a new proposal; None while another one is under way."""
        if self._proposal is not None and self._proposal.done is None:
            return None
        self._proposal = Proposal(1 if self._proposal is None else self._proposal.number + 1, config)
        return self._proposal.number

    def proposal(self) -> Proposal | None:
        return self._proposal

    def tell(self, line: str, done: bool | None = None) -> None:
        """How far the proposal is."""
        if self._proposal is not None:
            self._proposal = replace(self._proposal, lines=(*self._proposal.lines, line), done=done)
