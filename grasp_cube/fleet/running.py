"""A fleet at work: what Ray runs, what HAProxy knows of it, what operators are shown; and its updates.

Life cycle: `async with Fleet.started(config)`; `until_ready`, then `until` the signal to stop. Each turn of the loop
tells HAProxy and the pages which replicas there are, and begins an update that somebody proposed.
Error policy: `PolicyError` where the fleet cannot start; later on what fails is logged and tried again at the next turn,
and an update that fails is told to who asked for it.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import ray

from grasp_cube.fleet.config import FleetConfig
from grasp_cube.fleet.directory import ACTOR, NAMESPACE, Proposal
from grasp_cube.fleet.engine import Engine, join_ray
from grasp_cube.fleet.front import Front, find_haproxy
from grasp_cube.fleet.pages import Pages
from grasp_cube.policies.policy import PolicyError
from grasp_cube.serving.access import Access, read_key
from grasp_cube.serving.listener import listening
from grasp_cube.serving.websocket import Connection

__all__ = ["Fleet", "update"]

logger = logging.getLogger(__name__)

# Between two looks at what there is, and between two questions to the replicas, in seconds.
TURN_S, ASK_S = 0.25, 1.0


class Fleet:
    """Made by `started`."""

    def __init__(self, config: FleetConfig, key: str | None, engine: Engine, front: Front, pages: Pages):
        self.config, self.key = config, key
        self.address: tuple[str, int] = ("", 0)
        self._engine, self._front, self._pages = engine, front, pages
        # Of each policy, as it is served: its files may be others by now.
        self._generations = {name: group.generation() for name, group in config.policies.items()}
        self._http: aiohttp.ClientSession
        self._update: asyncio.Task[None] | None = None
        self._asked = 0.0
        # Of the last proposal that was begun.
        self._begun = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, config: FleetConfig) -> AsyncIterator["Fleet"]:
        """The fleet, with its replicas asked for. Raises `PolicyError`."""
        key = read_key(config.api_key, config.api_key_file)
        command = find_haproxy(config.haproxy)
        # What Ray calls home is not ours to tell, nor are its colours.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        async with contextlib.AsyncExitStack() as stack:
            robots = stack.enter_context(contextlib.closing(_bound(config)))
            robots.listen(1024)
            own = stack.enter_context(contextlib.closing(socket.create_server(("127.0.0.1", 0))))
            pages = Pages(config, Access(key))
            await stack.enter_async_context(
                listening(own, _no_handler, pages.answer, max_bytes=1024, max_connections=1000)
            )
            policies = {name: group.max_replicas for name, group in config.policies.items()}
            front = Front(command, robots, policies, own.getsockname()[1], config.tls_pem)
            stack.callback(front.close)
            await asyncio.to_thread(front.start)
            engine = await asyncio.to_thread(Engine, config, key)
            fleet = cls(config, key, engine, front, pages)
            stack.push_async_callback(fleet._close)
            fleet.address = robots.getsockname()[:2]
            fleet._http = await stack.enter_async_context(aiohttp.ClientSession())
            for name, generation in fleet._generations.items():
                await asyncio.to_thread(engine.deploy, config, name, generation)
            yield fleet

    async def until_ready(self, stop: asyncio.Event) -> bool:
        """Wait until every policy has a replica; False when `stop` came first. Raises `PolicyError`."""
        while not stop.is_set():
            await self._turn()
            for name, generation in self._generations.items():
                # Raises what Ray found in the way.
                await asyncio.to_thread(self._engine.ready, name, generation)
            if self._pages.not_ready() is None:
                return True
            await _pause(stop)
        return False

    async def until(self, stop: asyncio.Event) -> None:
        """Serve."""
        while not stop.is_set():
            try:
                await self._turn()
                await self._look_for_update()
            except Exception:
                logger.exception("a turn of the fleet failed and is made again")
            await _pause(stop)

    async def _turn(self) -> None:
        replicas = await asyncio.to_thread(self._engine.replicas)
        await asyncio.to_thread(self._front.follow, replicas)
        now = time.monotonic()
        if now - self._asked >= ASK_S or self._pages.not_ready() is not None:
            self._asked = now
            await self._pages.follow(self._http, replicas)

    async def _close(self) -> None:
        self._pages.closing = True
        if self._update is not None:
            self._update.cancel()
        ending = asyncio.create_task(asyncio.to_thread(self._engine.close))
        await asyncio.wait((ending,))
        if error := ending.exception():
            logger.error("Ray did not end as it should: %s", error)

    # ------------------------------------------------------------------------------------------ updates

    async def _look_for_update(self) -> None:
        proposal = await asyncio.to_thread(self._engine.proposal)
        if proposal is None or proposal.number <= self._begun:
            return
        self._begun = proposal.number
        self._update = asyncio.create_task(self._carry_out(proposal))

    async def _carry_out(self, proposal: Proposal) -> None:
        def tell(line: str, done: bool | None = None) -> asyncio.Future[None]:
            print(line, flush=True)
            return asyncio.ensure_future(asyncio.to_thread(self._engine.tell, line, done))

        before, wanted = self.config, proposal.config
        self._pages.updating = True
        try:
            if why := _refusal(before, wanted):
                await tell(why, False)
                return
            self.config = self._pages.config = replace(
                before, policies=wanted.policies, drain_s=wanted.drain_s
            )
            for name, group in wanted.policies.items():
                generation = group.generation()
                await tell(f"… {name}: {group.path}")
                await asyncio.to_thread(self._engine.deploy, self.config, name, generation)
                try:
                    while not await asyncio.to_thread(self._engine.ready, name, generation):
                        await asyncio.sleep(TURN_S)
                except PolicyError as error:
                    self.config = self._pages.config = before
                    await asyncio.to_thread(self._engine.deploy, before, name, self._generations[name])
                    await tell(f"{error}\n{name} goes on as it was.", False)
                    return
                self._generations[name] = generation
                await tell(f"✓ {name} is served by {generation}")
            await tell("Updated.", True)
        except Exception as error:
            logger.exception("the update failed")
            await tell(f"the update failed: {error}", False)
        finally:
            self._pages.updating = False


def _refusal(before: FleetConfig, wanted: FleetConfig) -> str:
    """Why a running fleet cannot become `wanted`; empty when it can."""
    if list(before.policies) != list(wanted.policies):
        return "policies were added, removed or put in another order: for that the fleet is started again"
    for name, group in wanted.policies.items():
        if group.max_replicas > before.policies[name].max_replicas:
            return f"{name} is to have more replicas than before at most: for that the fleet is started again"
    return ""


def update(config: FleetConfig) -> int:
    """Ask the running fleet to become as `config` says, and tell what it does; the exit code. Raises `PolicyError`."""
    join_ray(config.ray_address or "auto")
    try:
        directory = ray.get_actor(ACTOR, namespace=NAMESPACE)
        number: Any = ray.get(directory.propose.remote(config))
        if number is None:
            raise PolicyError("another update is under way: wait for its end")
        told = 0
        while True:
            proposal = ray.get(directory.proposal.remote())
            for line in proposal.lines[told:]:
                print(line, flush=True)
            told = len(proposal.lines)
            if proposal.number != number or proposal.done is not None:
                return 0 if proposal.done else 1
            time.sleep(TURN_S)
    except ValueError as error:
        raise PolicyError("no fleet runs in this Ray cluster: start it without --update") from error
    except ray.exceptions.RayActorError as error:
        raise PolicyError("the fleet ended during the update") from error
    finally:
        ray.shutdown()


async def _pause(stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), TURN_S)


async def _no_handler(connection: Connection) -> None:
    """No WebSocket gets so far."""


def _bound(config: FleetConfig) -> socket.socket:
    try:
        return socket.create_server(
            (config.host, config.port), family=socket.AF_INET6 if ":" in config.host else socket.AF_INET
        )
    except OSError as error:
        raise PolicyError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror or error}): is another server running "
            f"(ss -tlnp | grep {config.port})? Take another --port or --host"
        ) from error
