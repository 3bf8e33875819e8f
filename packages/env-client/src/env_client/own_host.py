"""Whether a request names this machine as whoever runs it would: against DNS rebinding, for the panel and the policy server.

A page of an attacker's site may point the site's name at this machine, and then be of one origin with it. Addresses
cannot be pointed elsewhere, nor can the machine's own names be taken.
"""

import functools
import ipaddress
import socket
from urllib.parse import urlsplit

__all__ = ["host_name", "is_own_host"]


def host_name(netloc: str) -> str:
    """The name or address in `HOST:PORT`, in lower case; empty where there is none."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_own_host(netloc: str, names: frozenset[str] = frozenset()) -> bool:
    """Whether the Host of a request is an address, localhost, this machine's name, or one of `names`."""
    name = host_name(netloc)
    if name in names or name in _own_names():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@functools.cache
def _own_names() -> frozenset[str]:
    name = socket.gethostname().lower()
    return frozenset({"localhost", name, f"{name}.local"})
