"""What a run knows of the server: its policy in words, and that it stays the same policy."""

from __future__ import annotations

from typing import Any

from env_client.envs.env import EnvError, EnvSpec
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import InvalidInput, PolicySpec

__all__ = ["SamePolicy", "describe", "plain_spec"]


class SamePolicy:
    """The client, refusing to go on when another policy answers after a reconnect."""

    def __init__(self, client: WebsocketClientPolicy) -> None:
        self._client = client
        self._spec = client.spec

    def connect(self) -> None:
        """Wait for the server, so that the observation that is sent afterwards can be the newest one."""
        self._client.connect()

    def infer(self, obs: dict[str, Any], **request: Any) -> dict[str, Any]:
        self._client.connect()
        if self._client.spec != self._spec:
            raise InvalidInput(
                "the server now serves another policy than at the start of this run; start the client again"
            )
        return self._client.infer(obs, **request)


def describe(client: WebsocketClientPolicy) -> str:
    """The server's policy in one sentence."""
    spec = client.spec
    if spec is None:
        return f"A plain openpi server at {client.url}, which does not describe its policy."
    cameras = ", ".join(f"{c.name} {c.height}x{c.width} ({c.resize})" for c in spec.cameras) or "no camera"
    return f"{client.url} serves {spec.type}: {spec.horizon} actions of {spec.action_dim} values ({spec.unit}) from {cameras}."


def plain_spec(env: EnvSpec, unit: str | None) -> PolicySpec:
    """What is assumed of a server that does not describe its policy: it takes everything, in the declared unit."""
    if unit is None:
        raise EnvError(
            f"the server does not say the unit of its actions, this robot works in {env.unit}: declare it with "
            f"--policy-unit {env.unit} if that is what the policy was trained with. Nothing was moved."
        )
    return PolicySpec(type="openpi", action_dim=env.action_dim, horizon=1, unit=unit)
