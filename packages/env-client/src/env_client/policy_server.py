"""What a run knows of the server: its policy in words, and that it stays the same policy."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from env_client.client_config import ClientConfig
from env_client.envs.env import EnvError, EnvSpec
from env_client.grpc_client_policy import SCHEME, GrpcClientPolicy
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import ErrorCode, InvalidInput, PolicySpec, RemoteError

__all__ = [
    "PolicyClient",
    "SamePolicy",
    "connect",
    "describe",
    "plain_spec",
    "require_policy",
    "settled_unit",
]

PolicyClient = WebsocketClientPolicy | GrpcClientPolicy


def connect(config: ClientConfig, prompt: str, say: Callable[[str], None]) -> PolicyClient:
    """The server that `config` names, over the wire that it speaks, with the policy that `config` asks it to load."""
    kind: Any = GrpcClientPolicy if config.host.startswith(SCHEME) else WebsocketClientPolicy
    client: PolicyClient = kind(
        config.host,
        config.port,
        config.api_key or os.environ.get("GRASP_CUBE_API_KEY"),
        connect_timeout_s=config.connect_timeout_s or None,
        timeout_s=config.timeout_s,
        on_status=say,
        image_codec=config.image_codec,
        **({"use_chunk": config.use_chunk} if kind is GrpcClientPolicy else {}),
    )
    if config.checkpoint or config.config_name:
        client.configure(
            path=config.checkpoint,
            config_name=config.config_name,
            prompt=prompt or None,
            device=config.device,
        )
    return client


class SamePolicy:
    """The client, refusing to go on when another policy answers after a reconnect.

    Between two episodes another checkpoint of the same spec is taken, and `say` told: that is how a fleet updates the
    policy that it serves. Inside an episode nothing but the same checkpoint is.
    """

    def __init__(self, client: PolicyClient, say: Callable[[str], None] = lambda sentence: None) -> None:
        self._client = client
        self._say = say
        self._identity = client.identity
        # The episode of the last answer.
        self._episode: int | None = None

    def connect(self) -> None:
        """Wait for the server, so that the observation that is sent afterwards can be the newest one."""
        self._client.connect()

    @property
    def image_codecs(self) -> tuple[str, ...]:
        """How images may be compressed for this server."""
        return self._client.image_codecs

    def infer(self, obs: dict[str, Any], **request: Any) -> dict[str, Any]:
        self._client.connect()
        episode = request.get("episode")
        if self._changed and not self._takes_over(episode):
            raise InvalidInput(
                "the server now serves another policy than at the start of this run; start the client again"
            )
        try:
            reply = self._client.infer(obs, **request)
        except ConnectionLost:
            # The client asks a policy that it did not know before only when it is told to.
            if not self._changed or not self._takes_over(episode):
                raise
            reply = self._client.infer(obs, **request)
        self._episode = episode
        return reply

    @property
    def _changed(self) -> bool:
        return self._client.identity != self._identity

    def _takes_over(self, episode: int | None) -> bool:
        """Whether the policy that is there now may serve this episode; from here on it is the known one."""
        spec = self._client.identity[0]
        if spec is None or spec != self._identity[0] or episode is None or episode == self._episode:
            return False
        self._identity = self._client.identity
        self._say("The server now serves another checkpoint of the same spec, from this episode on.")
        return True


def require_policy(client: PolicyClient) -> None:
    """Raise `RemoteError` when the server waits for somebody to tell it what to serve."""
    if client.idle:
        raise RemoteError(
            ErrorCode.MODEL_NOT_LOADED,
            f"{client.url} serves no policy yet: start it with --policy.path, or say what it is to "
            "load: --checkpoint FOLDER (a folder on the server)",
        )


def describe(client: PolicyClient) -> str:
    """The server's policy in one sentence."""
    spec = client.spec
    if spec is None:
        kind = "An older gRPC" if isinstance(client, GrpcClientPolicy) else "A plain openpi"
        return f"{kind} server at {client.url}, which does not describe its policy."
    cameras = ", ".join(f"{c.name} {c.height}x{c.width} ({c.resize})" for c in spec.cameras) or "no camera"
    return f"{client.url} serves {spec.type}: {spec.horizon} actions of {spec.action_dim} values ({spec.unit}) from {cameras}."


def settled_unit(
    policy: PolicySpec, flag: str | None, *, real: bool, say: Callable[[str], None]
) -> PolicySpec:
    """The policy in the unit that `--policy-unit` confirms. Raises `EnvError` where the flag contradicts the server, or
    where a real robot would be driven in a unit that the server only assumes."""
    if policy.unit_source != "assumed":
        if flag not in (None, policy.unit):
            raise EnvError(
                f"--policy-unit is {flag}, but the server says that its policy works in {policy.unit} "
                f"({policy.unit_source or 'declared'}): leave the flag out, or start the server with --policy.unit {flag}. "
                "Nothing was moved."
            )
        return policy
    if flag is not None:
        return replace(policy, unit=flag, unit_source="declared")
    if real:
        raise EnvError(
            f"the server assumes that its policy works in {policy.unit}; nothing in the checkpoint says so, and a real "
            "robot is not driven on an assumption: give --policy-unit degrees (LeRobot's default for SO-100 and SO-101 "
            "since 0.4.4) or --policy-unit normalized, as the policy was trained. Nothing was moved."
        )
    say(f"Note: that the policy works in {policy.unit} is assumed; --policy-unit says otherwise.")
    return policy


def plain_spec(
    env: EnvSpec, unit: str | None, client: PolicyClient, state_parts: tuple[str, ...] = ()
) -> PolicySpec:
    """What is assumed of a server that does not describe its policy: it works in the declared unit, and takes
    everything, or over gRPC, where the state is one vector, `state_parts` (by default those that are commanded)."""
    if unit is None:
        raise EnvError(
            f"the server does not say the unit of its actions, this robot works in {env.unit}: declare it with "
            f"--policy-unit {env.unit} if that is what the policy was trained with. Nothing was moved."
        )
    if not isinstance(client, GrpcClientPolicy):
        return PolicySpec(type="openpi", action_dim=env.action_dim, horizon=1, unit=unit)
    horizon, action_dim = client.dimensions
    names = state_parts or _commanded_parts(env)
    states = tuple(part for name in names for part in env.states if part.name == name)
    dim = action_dim or env.action_dim
    return PolicySpec(type="grpc", action_dim=dim, horizon=horizon or 1, unit=unit, states=states)


def _commanded_parts(env: EnvSpec) -> tuple[str, ...]:
    """The parts of the state that an action commands, in the action's order."""
    edges = np.cumsum([part.size for part in env.states])
    owners = np.searchsorted(edges, env.state_index, side="right")
    return tuple(dict.fromkeys(env.states[owner].name for owner in owners))
