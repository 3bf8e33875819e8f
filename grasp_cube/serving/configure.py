"""Which policies are served, under which names, and which of them are in memory.

Life cycle: `Policies(...)`, then `add` for each checkpoint that the operator names and `load_first` before the server
listens; without any the server is idle until a client's `configure`.

A session keeps the policy that it was greeted with. A swap (a `configure` of a name that is taken) is for the session
that asked and for those that come afterwards; the old policy leaves the memory with the last session that was greeted
with it. So no session ever mixes two policies, and a load that fails changes nothing.

What is asked for and is not in memory is loaded, and its requests wait for it.
Error policy: `PolicyError` while the server starts, `WireError` for clients; a traceback goes to the log.
Everything here runs on the event loop's thread.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from env_client.wire import Configure, ErrorCode, InvalidInput, Progress, WireError

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.load import checkpoint_folder
from grasp_cube.policies.policy import Policy, PolicyError
from grasp_cube.serving.checkpoints import allowed_folder
from grasp_cube.serving.loading import Loader, Tell
from grasp_cube.serving.served import ServedPolicy

__all__ = ["Policies"]

logger = logging.getLogger(__name__)

# The name of the policy that is served where a client names none; any other name is a path in the URL.
UNNAMED = ""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# Names that a server has at most, since clients may make them up.
MAX_NAMES = 64


class Policies:
    """The policies of one server."""

    def __init__(
        self,
        loader: Loader,
        *,
        base: PolicyConfig | None = None,
        root: Path | None = None,
    ):
        """`base` holds the options of every policy that a client configures; `root` is where its path must lie, and
        None refuses paths."""
        self.base = base or PolicyConfig()
        self.root = root
        self.loader = loader
        # By name; the first one is the default.
        self._slots: dict[str, ServedPolicy] = {}

    # -------------------------------------------------------------------------------------- questions

    @property
    def ready(self) -> bool:
        """Whether a policy is warm."""
        return any(served.policy is not None for served in self._slots.values())

    @property
    def loading(self) -> bool:
        return self.loader.pending > 0

    @property
    def default(self) -> str:
        """The name of the policy that is served at `/`."""
        return UNNAMED if UNNAMED in self._slots else next(iter(self._slots), UNNAMED)

    def slot(self, path: str) -> str:
        """The name that a URL's path means. Raises `InvalidInput` when the server has others.

        A server whose policy has no name serves it at every path, as plain servers do.
        """
        name = path.strip("/")
        if not name:
            return self.default
        named = [known for known in self._slots if known != UNNAMED]
        if name in named:
            return name
        if named:
            raise InvalidInput(f"no policy is named {name!r:.80} here: {', '.join(named)} are served")
        return UNNAMED

    def at(self, slot: str) -> ServedPolicy | None:
        """The policy of a name."""
        return self._slots.get(slot)

    def status(self) -> list[dict[str, Any]]:
        """What operators see of each policy, as plain values."""
        named = {id(served): name for name, served in self._slots.items()}
        return [
            served.status() | {"at": "/" + named[id(served)] if id(served) in named else None}
            for served in sorted(
                self.loader.known | set(self._slots.values()), key=lambda served: -served.used
            )
        ]

    # ---------------------------------------------------------------------------------- the operator's

    def add(self, config: PolicyConfig, name: str = UNNAMED) -> None:
        """Serve a checkpoint under a name. It is read by `load_first`, or when a client asks for it."""
        if name and not NAME.fullmatch(name):
            raise PolicyError(
                f"the policy's name {name!r} is none: letters, digits, '.', '_' and '-' were expected; "
                "write --policy.path NAME=FOLDER"
            )
        if name in self._slots:
            raise PolicyError(
                f"two policies are named {name!r}: write --policy.path NAME=FOLDER with different names"
            )
        self._slots[name] = ServedPolicy.on_disk(config, checkpoint_folder(config))

    async def load_first(self, tell: Tell) -> None:
        """Bring what fits into the budget into memory, in the order in which it was added. Raises `PolicyError`."""
        room = self.loader.budget_bytes
        for served in self._slots.values():
            self.loader.check_size(served)
        for served in self._slots.values():
            if room is not None:
                if served.size > room:
                    tell(Progress("queued", f"{served.name} is loaded when a client asks for it"))
                    continue
                room -= served.size
            await self.loader.bring(served, tell)
        self.loader.serving = True

    # ---------------------------------------------------------------------------------- the sessions'

    @contextlib.contextmanager
    def use(self, served: ServedPolicy) -> Iterator[None]:
        """Around each request: it is not evicted meanwhile."""
        served.requests += 1
        served.used = time.monotonic()
        try:
            yield
        finally:
            served.requests -= 1
            served.used = time.monotonic()
            self._let_go(served)

    async def greeted(self, slot: str) -> ServedPolicy | None:
        """The policy of a name, which a session keeps until `release`; None where there is none yet.

        Its metadata is known from here on: what was never in memory is loaded. Raises `WireError`.
        """
        served = self._slots.get(slot)
        if served is None:
            return None
        if served.policy is None and served.greeting and await asyncio.to_thread(served.changed):
            served = self._replace(slot, ServedPolicy.on_disk(served.config, served.folder))
        self.bind(served)
        if not served.greeting:
            try:
                await self.loaded(served)
            except BaseException:
                self.release(served)
                raise
        return served

    def bind(self, served: ServedPolicy) -> None:
        """A session keeps this policy until `release`."""
        served.sessions += 1

    def release(self, served: ServedPolicy) -> None:
        served.sessions -= 1
        self._let_go(served)

    async def loaded(self, served: ServedPolicy, tell: Tell | None = None) -> Policy:
        """The policy itself, in memory. Raises `WireError` when it cannot be loaded."""
        while served.policy is None:
            # More than once where another one's load evicts it before its turn.
            await self._told(self.loader.bring(served, tell))
        return served.policy

    async def configure(self, wish: Configure, slot: str, tell: Tell) -> tuple[str, ServedPolicy]:
        """The policy that a client of `slot` wishes, in memory, and the name under which it is served.

        A client that leaves leaves no half of it: the load goes on. Raises `WireError`; then nothing has changed.
        """
        if wish.path is None:
            return await self._chosen(wish, tell)
        if self.root is None:
            there = self._there(wish)
            if there is not None:
                await self.loaded(there[1], tell)
                return there
            raise InvalidInput(
                "this server was started for its own checkpoints and cannot be configured: start it without one, or with "
                "--policy.root FOLDER for the checkpoints that clients may name"
            )
        name = slot if wish.name is None else wish.name
        if name and not NAME.fullmatch(name):
            raise InvalidInput(f"the name {name!r:.80}; letters, digits, '.', '_' and '-' were expected")
        if name not in self._slots and len(self._slots) >= MAX_NAMES:
            raise WireError(
                ErrorCode.OVERLOADED, f"{MAX_NAMES} policies have names already: take one of those"
            )
        task = asyncio.create_task(self._told(self._swap(wish, name, tell)))
        self.loader.keep(task)
        return name, await asyncio.shield(task)

    def _there(self, wish: Configure) -> tuple[str, ServedPolicy] | None:
        """What a client names that is served already, as robots do that configure whenever they start."""
        path = Path(wish.path or "")
        for name, served in self._slots.items():
            if path.is_absolute() and path == served.folder and wish.name in (None, name):
                return name, served
        return None

    async def _chosen(self, wish: Configure, tell: Tell) -> tuple[str, ServedPolicy]:
        others = [
            key for key in ("type", "config_name", "device", "prompt") if getattr(wish, key) is not None
        ]
        if wish.name is None or others:
            raise InvalidInput(
                f"configure came with {', '.join(others) or 'neither'} and without a path: the path of a checkpoint was "
                "expected, or only the name of a policy that is served"
            )
        served = self._slots.get(wish.name)
        if served is None:
            names = ", ".join(name for name in self._slots if name) or "no other"
            raise InvalidInput(f"no policy is named {wish.name!r:.80} here: {names} is served")
        await self.loaded(served, tell)
        return wish.name, served

    async def _swap(self, wish: Configure, name: str, tell: Tell) -> ServedPolicy:
        assert wish.path is not None
        assert self.root is not None
        tell(Progress("checking", f"looking at {wish.path}"))
        folder = await asyncio.to_thread(allowed_folder, wish.path, self.root)
        config = replace(
            self.base,
            path=str(folder),
            task=None,
            type=wish.type,
            config_name=wish.config_name,
            prompt=wish.prompt or self.base.prompt,
            device=wish.device or self.base.device,
            name=wish.name,
        )
        wanted = await asyncio.to_thread(ServedPolicy.on_disk, config, folder)
        current = self._slots.get(name)
        if current is not None and current.same_as(wanted):
            # Robots configure whenever they start; what they ask for is mostly there.
            await self.loader.bring(current, tell)
            return current
        await self.loader.bring(wanted, tell)
        logger.info("%s is served at /%s", wanted.name, name)
        return self._replace(name, wanted)

    def _replace(self, name: str, served: ServedPolicy) -> ServedPolicy:
        before = self._slots.get(name)
        self._slots[name] = served
        if before is not None:
            before.retired = True
            self._let_go(before)
        return served

    def _let_go(self, served: ServedPolicy) -> None:
        """A policy that was replaced leaves with its last session."""
        if served.retired and not served.sessions and not served.requests:
            self.loader.forget(served)

    async def _told[T](self, work: Awaitable[T]) -> T:
        """Only what was written for clients leaves the server."""
        try:
            return await work
        except PolicyError as error:
            raise WireError(ErrorCode.MODEL_NOT_LOADED, str(error)) from error
