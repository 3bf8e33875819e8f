"""Sending a server's clients elsewhere, so that it can end without taking an answer or an episode along.

Life cycle: one `Draining` for each server; `join` and `leave` for each connection, `takes` before and `answered` after
each request; `run` once, when the server is to end.
A client is told to connect again by the close code 1012. It is told when every request of its that was begun has been
answered, so a request that comes back unanswered with 1012 was never begun and may be sent again at once, anywhere.
Error policy: nothing here raises; who does not go in time is left to the listener, which says 1001 and cuts.
"""

import asyncio
import contextlib

from env_client.wire import Infer, Request, Reset
from env_client.wire.frames import SERVICE_RESTART

from grasp_cube.serving.session import Session
from grasp_cube.serving.websocket import Connection

__all__ = ["Draining"]

REASON = "this server ends: connect again"
# How long the answers to what was begun are waited for when the clients are sent away, in seconds; with what comes
# after it this stays below the 10 s that container engines wait before they kill.
ANSWER_S = 5.0


class Draining:
    """Which connections are open, and whether they may stay. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._connections: dict[Session, Connection] = {}
        self._begun = self._after_episode = False
        self._empty = asyncio.Event()

    def join(self, session: Session, connection: Connection) -> None:
        self._connections[session] = connection
        if self._begun:
            # Its handshake was accepted right before.
            self._send_away(session)

    def leave(self, session: Session) -> None:
        self._connections.pop(session, None)
        if not self._connections:
            self._empty.set()

    def takes(self, session: Session, request: Request) -> bool:
        """Whether this request is answered here; otherwise its client has been sent away."""
        begins = isinstance(request, Reset)
        if isinstance(request, Infer) and request.episode is not None:
            begins = request.episode != session.episode
            session.episode = request.episode
        if self._after_episode and begins:
            self._send_away(session)
        if session.leaving:
            return False
        session.answering += 1
        return True

    def answered(self, session: Session) -> None:
        session.answering -= 1
        if session.leaving:
            self._send_away(session)

    async def run(self, episodes_s: float, hurry: asyncio.Event) -> None:
        """Send everybody away: for `episodes_s`, or until `hurry`, those whose episode ends, then all.

        Returns when nobody is left, or when the answers to what was begun took longer than `ANSWER_S`.
        """
        self._begun = True
        self._empty.clear()
        if not self._connections:
            return
        if episodes_s > 0:
            self._after_episode = True
            for session in list(self._connections):
                if not session.requests:
                    self._send_away(session)
            empty, hurried = asyncio.create_task(self._empty.wait()), asyncio.create_task(hurry.wait())
            await asyncio.wait((empty, hurried), timeout=episodes_s, return_when=asyncio.FIRST_COMPLETED)
            empty.cancel()
            hurried.cancel()
        for session in list(self._connections):
            self._send_away(session)
        if self._connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), ANSWER_S)

    def _send_away(self, session: Session) -> None:
        """Now, or when it has its answers; until then nothing more is begun for it."""
        session.leaving = True
        connection = self._connections.get(session)
        if connection is not None and not session.answering:
            connection.close(SERVICE_RESTART, REASON)
