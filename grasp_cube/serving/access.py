"""Who may ask, and who may say what is served. The same for WebSocket and gRPC clients.

Life cycle: `Access` is made once from the flags; its questions are answered for each connection or call.
Error policy: `PolicyError` for a key that cannot be used, before the server listens.
"""

import hmac
import ipaddress
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from env_client.own_host import host_name, is_own_host

from grasp_cube.policies.policy import PolicyError

__all__ = ["KEY_VARIABLE", "Access", "TlsConfig", "is_loopback", "read_key"]

KEY_VARIABLE = "GRASP_CUBE_API_KEY"
SCHEMES = ("api-key", "bearer")
# A proxy on the server's machine connects from there for others, and says so; a web page names its origin.
FOREIGN_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via", "origin")


@dataclass(frozen=True)
class TlsConfig:
    """Encrypted connections; both or none."""

    # The server's certificate with its chain, a PEM file.
    cert: Path | None = None
    # The certificate's private key, a PEM file.
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("--tls.cert and --tls.key belong together; give both or none")

    def context(self) -> ssl.SSLContext | None:
        """What the sockets use, None without a certificate. Raises `PolicyError`."""
        if self.cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # What Python takes for the default depends on how it was built.
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise PolicyError(
                f"--tls.cert {self.cert} and --tls.key {self.key} cannot be used ({error}): a PEM certificate and its "
                "private key were expected"
            ) from error
        return context

    def pem(self) -> tuple[bytes, bytes] | None:
        """(private key, certificate chain) for gRPC."""
        if self.cert is None or self.key is None:
            return None
        return self.key.read_bytes(), self.cert.read_bytes()


@dataclass(frozen=True)
class Access:
    """The rules."""

    # Clients must send it as `Authorization: Api-Key KEY` (or Bearer); None lets everybody in.
    api_key: str | None = None
    # Origins whose web pages may connect although there is no key (`https://lab.example`).
    origins: tuple[str, ...] = ()

    def lets_in(self, given: Sequence[str]) -> bool:
        """Whether the values of a request's authorization headers hold the key."""
        if self.api_key is None:
            return True
        scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        # Compared in constant time, and always compared, so that the time says nothing about the key.
        equal = hmac.compare_digest(key.strip().encode(errors="surrogatepass"), self.api_key.encode())
        return equal and scheme.lower() in SCHEMES

    def lets_page(self, origins: Sequence[str], host: str) -> bool:
        """Whether a client with these Origin headers, which asked for `host`, may connect: no page of a foreign site.

        Only browsers send an origin, and no page can send a key, so where there is one the key alone decides.
        """
        if not origins or self.api_key is not None:
            return True
        if len(origins) > 1:
            return False
        if origins[0] in self.origins:
            return True
        # A page from the server's own machine, whatever its port.
        try:
            page = urlsplit(origins[0]).netloc
        except ValueError:
            return False
        return host_name(page) == host_name(host) and is_own_host(host)

    def may_configure(self, *, local: bool) -> bool:
        """Whether a client that was let in may have checkpoints loaded; `local`: from the server's own machine."""
        return local or self.api_key is not None


def is_loopback(address: str | None, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a client with this address, and these headers, sits on the server's own machine.

    A proxy's client does not, nor does a web page that a browser on this machine shows, be it from a site whose name
    was pointed here.
    """
    headers = headers or {}
    if address is None or any(name in headers for name in FOREIGN_HEADERS):
        return False
    if "host" in headers and not is_own_host(headers["host"]):
        return False
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def read_key(key: str | None, file: Path | None) -> str | None:
    """The key from the flag, the file or the environment; None without any. Raises `PolicyError`."""
    if key is not None and file is not None:
        raise PolicyError("--api-key and --api-key-file are two keys; give one")
    source = "--api-key"
    if file is not None:
        source = f"--api-key-file {file}"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(
                f"{source} cannot be read ({error}): a text file with one key was expected"
            ) from error
        key = lines[0] if lines else ""
    elif key is None:
        source, key = f"the environment variable {KEY_VARIABLE}", os.environ.get(KEY_VARIABLE)
        # Set and empty is how containers leave a variable out.
        key = key or None
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise PolicyError(
            f"{source} holds no usable key: printable ASCII characters without spaces were expected"
        )
    return key
