"""Where the panel listens. Light: imported by every command that has a panel."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

__all__ = ["ALIASES", "PanelConfig", "PanelError", "is_loopback", "open_panel", "url_of"]

ALIASES = {"no-panel": "panel.enable=false"}


class PanelError(RuntimeError):
    """The panel cannot listen; the message says where, and what to do."""


@dataclass(frozen=True)
class PanelConfig:
    """The browser page of a run."""

    # Show the run in a browser and take commands from there.
    enable: bool = True
    # Port of the page; 0: any free one.
    port: int = 9000
    # Address that the page listens on; 0.0.0.0 lets others in, with the token in the URL.
    host: str = "127.0.0.1"
    # What the URL must carry; default: nothing on this machine, a new random one beyond it.
    token: str | None = None
    # URDF file of the robot for the 3D view, its joints named as the action values; default: an SO-101.
    urdf: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--panel.port is {self.port}; 0 to 65535 was expected")
        if self.token is not None and len(self.token) < 8:
            raise ValueError("--panel.token is shorter than 8 characters; anybody could guess it")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _missing_packages() -> str:
    """One sentence when the `panel` extra is not installed; empty when it is."""
    missing = [name for name in ("aiohttp", "viser", "yourdfpy") if find_spec(name) is None]
    if not missing:
        return ""
    return f"No panel: {', '.join(missing)} not installed (pip install 'env-client[panel]')."


def open_panel(config: PanelConfig, say: Callable[[str], None]) -> tuple[PanelConfig, socket.socket | None]:
    """The listening socket (None: no panel, and why is said), and the config with the port and the token that hold.

    The address is taken here, at the start of a run, and the socket handed on to the process that serves it: nobody can come in
    between. Raises `PanelError` where it is taken: a person who opens the page must see this run and no other.
    """
    missing = _missing_packages() if config.enable else ""
    if missing:
        say(missing)
    if missing or not config.enable:
        return replace(config, enable=False), None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(64)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise PanelError(
            f"the panel cannot listen on {config.host}:{config.port} ({error.strerror}): is another run open? End it, "
            "take another --panel.port, or --no-panel"
        ) from error
    token = config.token
    if token is None and not is_loopback(config.host):
        token = secrets.token_urlsafe(16)
    config = replace(config, port=listening.getsockname()[1], token=token)
    say(f"Panel: {url_of(config)}")
    return config, listening


def url_of(config: PanelConfig) -> str:
    """What a person types to open the page."""
    host = config.host
    if is_loopback(host):
        host = "localhost"
    elif host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    query = f"/?token={config.token}" if config.token else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}{query}"
